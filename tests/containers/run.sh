#!/usr/bin/env bash
# Builds both images, composes the server and a worker on the CPU, and takes jobs through them: `make containers`.
#
#   bash tests/containers/run.sh
#
# With the engine's script beside the checkout (../shared/tools/containers.sh) it starts a docker of its own on a base
# made by debootstrap, which needs root. Elsewhere it needs a running docker, and BASE_IMAGE with Python 3.11 or newer.
# Proven: the images, their users and health checks, the shared volume, stopping with a checkpoint, and going on after
# `down` and `up`. Not proven: CUDA. Takes some minutes, more for the first time.
set -euo pipefail
cd "$(dirname "$0")/../.."

TOOL=../shared/tools/containers.sh
PYTHON=${PYTHON:-.venv/bin/python}
STOP_SECONDS=120 # the worker's stop_grace_period
STEPS=100 # of the job that is interrupted

main() {
  command -v "$PYTHON" > /dev/null || fail "$PYTHON is not there: run 'make setup' first"
  SCRATCH=$(mktemp -d)
  trap finish EXIT
  find_engine
  write_inputs

  step "Building both images from $BASE_IMAGE"
  compose build
  "$DOCKER" compose -f docker-compose.yml config --quiet
  "$DOCKER" image ls --format '{{.Repository}}  {{.Size}}' | grep -- -try
  is "torch in the server's image" none "$(in_image server 'import importlib.util as u; print(u.find_spec("torch") and "torch" or "none")')"

  step "Starting server and worker"
  compose up --detach --wait
  compose ps --format '{{.Service}}  {{.Status}}'
  for service in server worker; do
    is "$service's user" 10001:10001 "$(compose exec -T $service sh -c 'echo $(id -u):$(id -g)')"
  done
  is "Stranger's answer" 401 "$(status_of /jobs)"
  sftd workers

  step "A LoRA job, over the network"
  build_model
  first=$(sftd submit "$SCRATCH/job.yaml" --set max_steps=12 --set save_steps=6)
  sftd wait "$first" --timeout 300
  sftd get "$first" --out "$SCRATCH/first"
  adapter=$(sha256sum < "$SCRATCH/first/adapter_model.safetensors")
  (cd "$SCRATCH/first" && find . -type f | sort)

  step "Stopping in the middle of a second job"
  second=$(sftd submit "$SCRATCH/job.yaml" --set max_steps=$STEPS --set save_steps=$STEPS)
  await_step "$second" 10
  since=$SECONDS
  compose stop
  took=$((SECONDS - since))
  for service in server worker; do
    is "$service's exit code" 0 "$("$DOCKER" inspect --format '{{.State.ExitCode}}' "$(compose ps --all --quiet $service)")"
  done
  ((took < STOP_SECONDS)) || fail "Stopping took $took s"
  compose logs --no-log-prefix worker | tail -3
  compose down

  step "Starting again: everything is there, and the second job goes on"
  compose up --detach --wait
  is "First job" succeeded "$(field "$first" state)"
  sftd get "$first" --out "$SCRATCH/again"
  is "Its adapter's hash" "$adapter" "$(sha256sum < "$SCRATCH/again/adapter_model.safetensors")"
  sftd wait "$second" --timeout 600
  is "Second job" succeeded "$(field "$second" state)"
  is "Its attempts" 2 "$(field "$second" attempt)"
  sftd logs "$second" | grep --ignore-case resum || fail "It began from the start"
  is "Its points" "$STEPS" "$(sftd metrics "$second" --csv | awk -F, 'NR > 1 && !seen[$1]++' | awk -F, '$1 >= 1' | wc -l)"

  step "Stopping"
  compose down
  PASSED=yes
}

find_engine() {
  local on_path wheel
  on_path=$(command -v docker || true)
  if [ -f "$TOOL" ]; then
    [ "$(id -u)" = 0 ] || fail "$TOOL starts a docker of its own and needs root"
    export W=${W:-$HOME/.cache/sftd-containers}
    export DOCKER_HOST=unix://$W/docker.sock DOCKER_CONFIG=$W/cfg DOCKER_BUILDKIT=1 BASE_IMAGE=local/debian:bookworm
    DOCKER=/usr/bin/docker
    step "Starting a docker engine and making its base image"
    wheel=$(compgen -G "${PIP_FIND_LINKS:-}/torch-*.whl" || true)
    WITH_TORCH=${wheel:+1} bash "$TOOL" setup
  elif [ -n "$on_path" ] && "$on_path" info > /dev/null 2>&1; then
    DOCKER=$on_path
    export BASE_IMAGE=${BASE_IMAGE:-python:3.11-slim-bookworm}
  else
    fail "This needs a running docker with the compose plugin; 'docker info' does not answer"
  fi
}

write_inputs() {
  ADMIN_KEY=$("$PYTHON" -c 'import secrets; print(secrets.token_hex(16))')
  SFTD_TRY_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  SFTD_TRY_ENV=$SCRATCH/try.env
  export SFTD_TRY_PORT SFTD_TRY_ENV
  echo "SFTD_ADMIN_KEY=$ADMIN_KEY" > "$SFTD_TRY_ENV"
  cat > "$SCRATCH/job.yaml" << YAML
base_model: /data/models/tiny-q
training_file: $PWD/examples/q_basics.jsonl
method: lora
validation_split: 0.1
max_seq_length: 512
learning_rate: 1.0e-2
warmup_steps: 2
batch_size: 4
gradient_accumulation_steps: 1
eval_steps: 100
gradient_checkpointing: false
YAML
}

build_model() { # by the worker's user, into the shared volume
  compose cp examples/tiny_model.py worker:/tmp/tiny_model.py
  compose cp examples/q_basics.jsonl worker:/tmp/q_basics.jsonl
  compose exec -T worker python /tmp/tiny_model.py /data/models/tiny-q /tmp/q_basics.jsonl
}

await_step() { # JOB STEP
  for _ in $(seq 300); do
    case $(field "$1" state) in failed | succeeded | cancelled) fail "$1 is over before step $2" ;; esac
    (($(field "$1" step) >= $2)) && return
    sleep 0.2
  done
  fail "$1 did not reach step $2"
}

compose() { "$DOCKER" compose --ansi never --progress quiet --project-name sftd-try -f docker-compose.yml -f tests/containers/override.yml "$@"; }
sftd() { SFTD_URL=http://127.0.0.1:$SFTD_TRY_PORT SFTD_API_KEY=$ADMIN_KEY "$PYTHON" -m sftd.cli "$@"; }
field() { sftd show "$1" --json | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]] or 0)' "$2"; }
in_image() { "$DOCKER" run --rm --network none "sftd-$1-try" python -c "$2"; }
status_of() { "$PYTHON" -c 'import sys, httpx; print(httpx.get(sys.argv[1]).status_code)' "http://127.0.0.1:$SFTD_TRY_PORT$1"; }

is() { # WHAT EXPECTED FOUND
  [ "$2" = "$3" ] || fail "$1 is '$3', not '$2'"
  echo "$1: $3"
}
step() { printf '\n== %s\n' "$*"; }
fail() {
  echo "containers: $*" >&2
  exit 1
}

finish() {
  if [ -n "${SFTD_TRY_PORT:-}" ]; then
    [ -n "${PASSED:-}" ] || compose logs --tail 50 || true
    compose down --volumes --remove-orphans --timeout 20 || true
    "$DOCKER" image rm --force sftd-server-try sftd-worker-try > /dev/null || true
  fi
  [ ! -f "$TOOL" ] || bash "$TOOL" stop
  rm -rf "$SCRATCH"
  [ -z "${PASSED:-}" ] || printf '\ncontainers: passed\n'
}

main
