#!/usr/bin/env bash
# The five model sizes of the q experiments, one after the other, without a server. Fill in the paths.
# A size that needs several GPUs is started with torchrun; each run continues from its newest checkpoint if interrupted.
set -euo pipefail

MODELS=${MODELS:-/path/to/models}        # holds Qwen2.5-1.5B-Instruct, …, or use hub ids below
TRAIN=${TRAIN:-/path/to/train.jsonl}
EVAL=${EVAL:-/path/to/test.jsonl}
OUT=${OUT:-outputs}
SIZES=${SIZES:-"1.5B 3B 7B 14B 32B"}
EXTRA=${EXTRA:-}                         # more flags for every run, e.g. "--wandb --use_no_test_cases"

run() { # run SIZE GPUS FLAGS…
  local size=$1 gpus=$2
  shift 2
  [[ " $SIZES " == *" $size "* ]] || return 0
  local launch=(sftd-run-sft)
  if ((gpus > 1)); then launch=(torchrun --standalone "--nproc_per_node=$gpus" -m sftd_worker.run_sft); fi
  # shellcheck disable=SC2086  # EXTRA is a list of flags
  "${launch[@]}" --base_model "$MODELS/Qwen2.5-$size-Instruct" --train_file "$TRAIN" --eval_file "$EVAL" \
    --max_steps "${MAX_STEPS:-1000}" --save_steps 50 --experiment_name "sft_$size" --output_dir "$OUT/$size" "$@" $EXTRA
}

run 1.5B 1 --learning_rate 2e-5
run 3B   1 --learning_rate 2e-5
run 7B   1 --learning_rate 1e-4 --use_lora
run 14B  4 --learning_rate 1e-4 --use_lora --gradient_accumulation_steps 2
run 32B  4 --learning_rate 1e-4 --use_qlora --gradient_accumulation_steps 2
