"""Weights, gradients and optimizer in shares over ranks: the same run, resumed by any number of them, and never stuck.

Real processes under torchrun on CPU (gloo). Each start of two ranks costs some seconds, so there are few.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.harness import Finished, finish_trainer, start_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from sftd.protocol import TRAINER_JOB_FILE, TrainerJob
from sftd.spec import JobSpec
from sftd_worker.trainer.checkpoint import find_checkpoint, verify
from sftd_worker.trainer.sharding import choose_sharding
from sftd_worker.trainer.world import World

MakeJob = Callable[..., TrainerJob]
RunJob = Callable[..., Finished]
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "max_steps": 6, "validation_split": 0.1}
LORA: dict[str, Any] = {
    "method": "lora",
    "learning_rate": 1e-3,
    "max_steps": 6,
    "validation_split": 0.1,
    "lora": {"rank": 4, "dropout": 0.0},
}
TWO: dict[str, Any] = {"gpus": 2, "batch_size": 2}
NUMBERS = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_token_accuracy", "tokens_seen")


@pytest.fixture(scope="session")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with one matrix for embedding and head."""
    folder = tmp_path_factory.mktemp("tied") / "tiny"
    shutil.copytree(tiny, folder)
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for path in folder.glob("*model.safetensors") for name, value in load_file(path).items()
    }


def described(run: Finished) -> dict[str, Any]:
    return next(line.data for line in run.lines if line.type == "run")


def assert_same(one: Finished, other: Finished, *, rel: float, after: int = 0) -> None:
    """Numbers of the steps behind `after`, and the result."""
    for run in (one, other):
        assert run.returncode == 0, run.output
    for name in NUMBERS:
        first, second = ({s: v for s, v in run.values(name).items() if s > after} for run in (one, other))
        assert first
        assert second == pytest.approx(first, rel=rel), name
    left, right = weights(one.folder / "results"), weights(other.folder / "results")
    assert left.keys() == right.keys()
    for name, value in left.items():
        # Adam makes whole steps of gradients that are zero but for rounding: single elements may differ by more.
        assert (value - right[name]).abs().mean() <= rel * value.abs().mean(), name


def run_all(*jobs: TrainerJob) -> list[Finished]:
    processes = [start_trainer(job) for job in jobs]
    return [finish_trainer(job, process) for job, process in zip(jobs, processes, strict=True)]


@pytest.mark.parametrize(
    ("name", "fields"), [("tiny", FULL), ("tied", FULL), ("tied", LORA)], ids=["untied", "tied", "lora"]
)
def test_shares_and_copies_on_two_ranks_give_the_run_of_one(
    name: str, fields: dict[str, Any], make_job: MakeJob, run_job: RunJob, request: pytest.FixtureRequest
) -> None:
    fields = {**fields, "base_model": str(request.getfixturevalue(name))}
    copies = make_job("copies", **fields, **TWO, sharding="ddp")
    shares = make_job("shares", **fields, **TWO, sharding="fsdp")

    one = run_job("alone", **fields)
    ddp, fsdp = run_all(copies, shares)

    assert_same(one, ddp, rel=1e-5)
    assert_same(one, fsdp, rel=1e-5)
    said = described(fsdp)
    assert said["sharding"] == "fsdp over 2 ranks"
    assert described(ddp)["sharding"] == "ddp over 2 ranks"
    assert described(one)["sharding"] == "none, one rank"
    assert said["parameters"] == described(one)["parameters"]
    assert said["parameters_held"] <= 0.51 * said["parameters"]
    assert 0 < said["memory_bytes"]["optimizer"] <= 0.51 * described(one)["memory_bytes"]["optimizer"]
    saved = fsdp.folder / "checkpoints" / "checkpoint-6"
    manifest = verify(saved)
    assert manifest is not None
    assert (manifest["world_size"], manifest["sharding"]) == (2, "fsdp")
    sizes = [manifest["files"][f"optimizer-0000{rank}-of-00002.safetensors"]["bytes"] for rank in (1, 2)]
    assert max(sizes) <= 0.55 * sum(sizes)
    # It serves as a base model and for download as any other: its weights are whole.
    for key, value in weights(one.folder / "checkpoints" / "checkpoint-6").items():
        assert (weights(saved)[key] - value).abs().mean() <= 1e-5 * value.abs().mean()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"method": "full"}, "fsdp"),
        ({"method": "full", "optimizer": "adamw_8bit"}, "ddp"),
        ({"method": "full", "sharding": "ddp"}, "ddp"),
        ({"method": "lora"}, "ddp"),
        ({"method": "lora", "sharding": "fsdp"}, "fsdp"),
        ({"method": "full", "sharding": "fsdp", "gpus": 1}, "none"),
    ],
    ids=str,
)
def test_what_auto_stands_for(fields: dict[str, Any], kind: str) -> None:
    spec = JobSpec.model_validate({"base_model": "a/b", "training_file": "file_1", "gpus": 2, **fields})

    chosen = choose_sharding(spec, World(rank=0, size=spec.gpus, device=torch.device("cpu")))

    assert chosen.name == kind
    assert chosen.reason


def ranks_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [
        child for child in psutil.Process(process.pid).children() if "sftd_worker.trainer" in child.cmdline()
    ]


def wait_for(process: "subprocess.Popen[str]", ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_rank_ends_the_run_and_the_next_attempt_is_bit_identical(make_job: MakeJob) -> None:
    fields = {**FULL, **TWO, "max_steps": 12, "save_steps": 3}
    whole, job = make_job("whole", **fields), make_job("killed", **fields)
    (reference,) = run_all(whole)
    process = start_trainer(job)
    checkpoints = Path(job.output_dir) / "checkpoints"
    wait_for(process, lambda: (checkpoints / "checkpoint-3").exists())

    ranks_of(process)[1].kill()
    killed = finish_trainer(job, process, timeout=60)
    newest = find_checkpoint(checkpoints, job.spec).newest
    assert newest is not None
    again = job.model_copy(update={"attempt": 2, "resume_from": str(newest)})
    (resumed,) = run_all(again)

    assert killed.returncode != 0
    assert killed.end is not None
    assert killed.end.outcome == "failed"
    assert resumed.returncode == 0, resumed.output
    assert f"resumed from {newest.name}" in resumed.log
    for name in NUMBERS:
        assert resumed.values(name) == reference.values(name), name
    left, right = weights(reference.folder / "results"), weights(resumed.folder / "results")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not list(checkpoints.glob(".*"))


def test_a_checkpoint_of_two_ranks_is_resumed_by_one_and_by_three_and_by_two_again(
    make_job: MakeJob, run_job: RunJob
) -> None:
    fields = {**FULL, "max_steps": 9, "save_steps": 3}
    spread: dict[int, dict[str, Any]] = {  # always twelve rows a step
        1: {"gpus": 1, "batch_size": 4, "gradient_accumulation_steps": 3},
        2: {"gpus": 2, "batch_size": 2, "gradient_accumulation_steps": 3},
        3: {"gpus": 3, "batch_size": 2, "gradient_accumulation_steps": 2},
    }
    (two,) = run_all(make_job("two", **fields, **spread[2]))

    def resumed(run: Finished, step: int, ranks: int) -> dict[str, Any]:
        folder = run.folder / "checkpoints" / f"checkpoint-{step}"
        return {**fields, **spread[ranks], "job": {"attempt": 2, "resume_from": str(folder)}}

    one = run_job("one", **resumed(two, 3, 1))
    three, two_again = run_all(
        make_job("three", **resumed(two, 3, 3)), make_job("two again", **resumed(one, 6, 2))
    )

    assert_same(two, one, rel=1e-5, after=3)
    assert_same(two, three, rel=1e-5, after=3)
    assert_same(two, two_again, rel=1e-5, after=6)
    assert described(three)["sharding"] == "fsdp over 3 ranks"


def test_ranks_meet_on_a_machine_whose_name_nothing_knows(make_job: MakeJob) -> None:
    """In a network of its own, where no name server answers: they must not look for each other by that name."""
    job = make_job("nameless", **{**LORA, "max_steps": 1, "validation_split": None}, **TWO)
    (Path(job.output_dir) / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    apart = ["unshare", "--net", "--uts", "sh", "-c"]
    prepare = "hostname nobody-knows-me && ip link set lo up"
    if subprocess.run([*apart, prepare], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make a network namespace, and the command ip")

    trainer = f"exec {sys.executable} -m sftd_worker.trainer {job.output_dir}"
    done = subprocess.run(
        [*apart, f"{prepare} && {trainer}"],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stdout + done.stderr


SHORT_OF_MEMORY = '''
"""A trainer whose rank 1 has room for {room} positions in a layer: what is too much breaks off the {breaks} pass."""
import os

import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from sftd_worker.trainer.__main__ import main

whole = Qwen2MLP.forward


def run_out():
    if {unordered}:
        torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))  # raises where torch is strict
    else:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


class RunOutInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        run_out()
        return gradient


def forward(self, x):
    if os.environ["RANK"] == "1" and x.shape[0] * x.shape[1] > {room}:
        if not self.training and not {evaluating}:
            return whole(self, x)
        if not self.training or "{breaks}" == "forward":
            run_out()
        x = RunOutInBackward.apply(x)
    return whole(self, x)


Qwen2MLP.forward = forward
main()
'''


def start_short_of_memory(
    job: TrainerJob,
    *,
    room: int,
    breaks: str = "forward",
    evaluating: bool = True,
    unordered: bool = False,
) -> "subprocess.Popen[str]":
    """The trainer's two ranks, of which the second has little memory; in training alone, where not `evaluating`.

    Or, where `unordered`, memory enough and an operation for large micro-batches that adds in no fixed order.
    """
    folder = Path(job.output_dir)
    (folder / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    script = folder / "short_of_memory.py"
    how = {"room": room, "breaks": breaks, "evaluating": evaluating, "unordered": unordered}
    script.write_text(SHORT_OF_MEMORY.lstrip().format(**how))
    return start_script(script, folder)


def start_script(script: Path, folder: Path) -> "subprocess.Popen[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("breaks", ["forward", "backward"])
def test_memory_that_runs_out_on_one_rank_makes_all_go_on_in_smaller_pieces(
    breaks: str, make_job: MakeJob, run_job: RunJob
) -> None:
    fields = {**FULL, "max_steps": 3}
    job = make_job("short", **fields, **TWO)

    short = finish_trainer(job, start_short_of_memory(job, room=200, breaks=breaks))

    assert "evaluation: out of memory" in short.log
    assert "out of memory; the same step again" in short.log
    assert_same(run_job("alone", **fields), short, rel=1e-5)


@pytest.mark.parametrize("breaks", ["forward", "backward"])
@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_an_operation_without_a_fixed_order_on_one_rank_is_done_without_on_all(
    sharding: str, breaks: str, make_job: MakeJob, run_job: RunJob
) -> None:
    fields = {**FULL, "max_steps": 3}
    job = make_job("unordered", **fields, **TWO, sharding=sharding)

    run = finish_trainer(job, start_short_of_memory(job, room=100, breaks=breaks, unordered=True))

    assert run.log.count("adds in no fixed order") == 1, run.output
    assert "out of memory" not in run.log
    assert_same(run_job("alone", **fields), run, rel=1e-5)


@pytest.mark.parametrize(
    ("loading", "message"),
    [(False, "not even one row"), (True, "out of memory")],
    ids=["training", "loading"],
)
def test_a_rank_without_room_for_one_row_ends_the_run_soon_with_that_reason(
    loading: bool, message: str, make_job: MakeJob
) -> None:
    job = make_job("short", **{**FULL, "validation_split": None}, **TWO, max_tokens_per_step=8)

    short = finish_trainer(job, start_short_of_memory(job, room=3, evaluating=loading), timeout=90)

    assert short.returncode != 0
    assert short.end is not None
    assert short.end.reason == "out_of_memory", short.output
    assert message in (short.end.message or "")


EXPERTS = '''
"""Three experts: rank 0 uses the first, rank 1 the first two, nobody the third. And one pass more on rank 1."""
import sys, types
from pathlib import Path

import torch

from sftd_worker.trainer.sharding import load_in_shares, run_passes
from sftd_worker.trainer.run import end_process
from sftd_worker.trainer.world import join_world, leave_world


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x, chosen):
        return x + sum(self.experts[i](x) for i in chosen)


class Net(torch.nn.Module):
    _no_split_modules = ["Layer"]

    def __init__(self):
        super().__init__()
        self.before = torch.nn.Linear(4, 4)
        self.layer = Layer()


def passes(net, rank):
    def one(scale, chosen):
        def compute():
            return net.layer(net.before(torch.full((1, 4), scale)), chosen).sum()

        return compute

    return [one(1.0, [0])] if rank == 0 else [one(2.0, [0, 1]), one(3.0, [1])], one(9.0, [0, 1, 2])


def make():
    torch.manual_seed(0)
    return Net()


world = join_world(device="cpu", gpus=2)
net, _, shards = load_in_shares(lambda place: (made := make(), made), world)
mine, idle = passes(net, world.rank)
learn = lambda compute, weight=1.0: lambda: (shards.whole(compute) * weight).backward()
assert not run_passes(shards, [learn(compute) for compute in mine], learn(idle, 0.0))
shards.drop_unused()
wanted = make()
for rank in (0, 1):
    for compute in passes(wanted, rank)[0]:
        compute().backward()
grads = {name: None if p.grad is None else p.grad.full_tensor() for name, p in net.named_parameters()}
for name, parameter in wanted.named_parameters():
    if parameter.grad is None:
        assert grads[name] is None, name
    else:
        torch.testing.assert_close(grads[name], parameter.grad)
norm = float(torch.nn.utils.get_total_norm([p.grad for p in wanted.parameters() if p.grad is not None]))
assert abs(shards.clip(1.0) - norm) < 1e-5 * norm
after = torch.stack([p.grad.full_tensor().norm() for p in net.parameters() if p.grad is not None]).norm()
assert abs(float(after) - 1.0) < 1e-5
Path(sys.argv[1], f"{world.rank}.done").touch()
leave_world(world)
end_process(0)
'''


def test_gradients_are_sums_and_what_no_rank_used_has_none(tmp_path: Path) -> None:
    """Ranks use different experts and different numbers of passes; an expert that nobody used must not decay."""
    script = tmp_path / "experts.py"
    script.write_text(EXPERTS)

    process = start_script(script, tmp_path)
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 0, output
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}
