"""The gate of a bench: our loss and gradients of one step against a plain padded reference: `python -m bench.gate JOB`.

JOB is a job.json of one step, rate and rows as they are. Ours comes from the real run (`sftd_worker.trainer.run`), in
fp32; its gradients are taken from the parameters as the optimizer is about to use them, unclipped. The reference is
transformers alone: the rows padded to one length, full logits in fp32, the mean over supervised tokens. An adapter
starts from random weights in both, since a fresh one has no gradient in its A. Prints a JSON line; exit code 1 where
a difference is too large.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.rows import write_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sftd.protocol import TRAINER_LINE, StepLine, TrainerJob
from sftd_worker.trainer import train as train_module
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

Gradients = dict[str, torch.Tensor]
LIMITS = (1e-5, 1e-4)  # largest relative difference of loss and gradients in fp32
# qlora always computes in bf16, so that ours cannot come as near to the fp32 reference. What bf16 costs is measured: the
# reference itself is run in bf16 too, and we may be this much farther from fp32 than it is.
BF16_LOSS_LIMIT, BF16_SLACK = 1e-3, 1.25


@dataclass(frozen=True)
class Verdict:
    """How far we are from the reference, relative."""

    passed: bool
    loss: float  # ours
    reference_loss: float
    loss_error: float
    gradient_error: float  # of all gradients as one vector
    worst_tensor_error: float  # of one tensor, relative to the larger of it and a thousandth of the whole
    limits: tuple[float, float, float]  # of the three errors
    num_rows: int


def main() -> None:
    """Judge one job."""
    job = TrainerJob.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    verdict = judge(job)
    print(json.dumps(asdict(verdict)))
    sys.exit(0 if verdict.passed else 1)


def judge(job: TrainerJob) -> Verdict:
    """Run both sides and compare."""
    if job.spec.method != "full":
        job = job.model_copy(update={"adapter_path": str(_random_adapter(job))})
    tokens = Path(job.output_dir) / "gate-rows.jsonl"
    write_tokens(tokens, job)
    rows = [json.loads(line) for line in tokens.read_text().splitlines()]
    loss, gradients = our_step(job)
    wanted_loss, wanted = reference_step(job, rows)
    loss_error = abs(loss - wanted_loss) / abs(wanted_loss)
    gradient_error, worst = compare(gradients, wanted)
    limits = (LIMITS[0], LIMITS[1], LIMITS[1])
    if job.spec.method == "qlora":
        _, rounded = reference_step(job, rows, dtype=torch.bfloat16)
        whole, tensor = compare(rounded, wanted)
        limits = (BF16_LOSS_LIMIT, BF16_SLACK * whole, BF16_SLACK * tensor)
    passed = loss_error <= limits[0] and gradient_error <= limits[1] and worst <= limits[2]
    return Verdict(passed, loss, wanted_loss, loss_error, gradient_error, worst, limits, len(rows))


def our_step(job: TrainerJob) -> tuple[float, Gradients]:
    """(loss, gradients by name) of the first step of the real run."""
    taken: Gradients = {}
    names: dict[int, str] = {}
    load = train_module.load_model  # type: ignore[attr-defined]  # replaced where it is used

    def load_and_name(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        names.update({id(parameter): name for name, parameter in model.net.named_parameters()})
        return model

    def take(optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    taken[names[id(parameter)]] = parameter.grad.detach().float().cpu().clone()

    train_module.load_model = load_and_name  # type: ignore[attr-defined]
    hook = register_optimizer_step_pre_hook(take)
    try:
        end = run(job, signals=Signals())
    finally:
        train_module.load_model = load  # type: ignore[attr-defined]
        hook.remove()
    if end.outcome != "succeeded":
        raise SystemExit(f"the gate's run failed: {end.message}")
    text = (Path(job.output_dir) / "logs" / "events.jsonl").read_text()
    lines = [TRAINER_LINE.validate_json(line) for line in text.splitlines()]
    return next(line.values["loss"] for line in lines if isinstance(line, StepLine)), taken


def reference_step(
    job: TrainerJob, rows: list[dict[str, list[int]]], *, dtype: torch.dtype = torch.float32
) -> tuple[float, Gradients]:
    """(loss, gradients by name) of transformers' model over the rows as one padded batch, in fp32 or under autocast."""
    model = _reference_model(job, dtype)
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
    labels = torch.full((len(rows), width), -100)  # (B, T)
    mask = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        mask[i, :length] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()  # (B, T, V)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    named = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), named


def compare(ours: Gradients, reference: Gradients) -> tuple[float, float]:
    """(relative error of the whole gradient, largest of a tensor). Infinite where one side misses a parameter."""
    if ours.keys() != reference.keys():
        print(f"only on one side: {sorted(ours.keys() ^ reference.keys())[:5]}", file=sys.stderr)
        return float("inf"), float("inf")
    squares = {
        name: float((ours[name] - wanted).double().square().sum()) for name, wanted in reference.items()
    }
    sizes = {name: float(wanted.double().square().sum()) for name, wanted in reference.items()}
    whole = sum(sizes.values()) ** 0.5
    worst = max(squares[name] ** 0.5 / max(sizes[name] ** 0.5, 1e-3 * whole) for name in squares)
    return sum(squares.values()) ** 0.5 / whole, worst


def _reference_model(
    job: TrainerJob, dtype: torch.dtype
) -> Any:  # a transformers model, or the peft model around it
    if job.spec.method == "full":
        return AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32).train()
    options: dict[str, Any] = {"dtype": dtype}
    if job.spec.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(job.model_path, **options)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the 4-bit layers' inference layout has no gradient
    base.requires_grad_(False)
    return PeftModel.from_pretrained(base, job.adapter_path, is_trainable=True).train()


def _random_adapter(job: TrainerJob) -> Path:
    """An adapter whose B is not zero."""
    folder = Path(job.output_dir) / "random-adapter"
    torch.manual_seed(1)
    config = LoraConfig(
        r=job.spec.lora.rank,
        lora_alpha=int(job.spec.lora.alpha),
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32), config)
    net.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
