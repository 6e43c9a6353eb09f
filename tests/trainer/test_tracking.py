"""Weights & Biases: what a run logged is read back from its offline file; a tracker that fails ends nothing."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.trainer.harness import Finished
from wandb.proto import wandb_internal_pb2

from sftd.protocol import TrainerJob
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals


def read_back(folder: Path) -> tuple[list[dict[str, float]], "wandb_internal_pb2.RunRecord"]:
    """(history rows, run) of a .wandb file: protobuf records in a LevelDB log behind a 7-byte header."""
    history, found = [], None
    for data in records(next(folder.rglob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
        elif kind == "run":
            found = record.run
    assert found is not None
    return history, found


def records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: chunks of (crc, length, kind) within blocks of 32 KiB; kind 1 whole, 2-4 pieces."""
    block, at, held = 32768, 7, b""
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        if kind == 0:
            return
        held += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def test_an_offline_run_holds_every_step_and_the_same_id_after_resume(
    make_job: Callable[..., TrainerJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    spec = {"wandb": {"project": "q-sft", "name": "night", "tags": ["lora"]}, "validation_split": 0.1}
    job = make_job(**spec, job={"wandb_run_id": "job1"})

    assert run(job, signals=Signals()).outcome == "succeeded"

    history, record = read_back(Path(job.output_dir) / "logs" / "wandb")
    logged = Finished(None, Path(job.output_dir))
    assert {row["step"]: row["train/loss"] for row in history if "train/loss" in row} == logged.values("loss")
    assert {row["step"]: row["eval/loss"] for row in history if "eval/loss" in row} == logged.values(
        "eval_loss"
    )
    assert (record.project, record.display_name, record.run_id, list(record.tags)) == (
        "q-sft",
        "night",
        "job1",
        ["lora"],
    )

    again = make_job(
        "again",
        **spec,
        job={
            "wandb_run_id": "job1",
            "attempt": 2,
            "resume_from": f"{job.output_dir}/checkpoints/checkpoint-2",
        },
    )
    assert run(again, signals=Signals()).outcome == "succeeded"
    history, record = read_back(Path(again.output_dir) / "logs" / "wandb")
    assert record.run_id == "job1"
    assert min(row["step"] for row in history if "train/loss" in row) == 3


def test_without_a_key_training_goes_on_offline_and_says_so(
    make_job: Callable[..., TrainerJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    job = make_job(wandb={"project": "p"}, max_steps=2)

    assert run(job, signals=Signals()).outcome == "succeeded"

    assert (
        "WANDB_API_KEY is not set on the worker; logging offline" in Finished(None, Path(job.output_dir)).log
    )


def test_an_unreachable_server_is_said_and_training_goes_on(
    make_job: Callable[..., TrainerJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("sftd_worker.trainer.tracking._INIT_SECONDS", 2)
    job = make_job(wandb={"project": "p"}, max_steps=2)

    assert run(job, signals=Signals()).outcome == "succeeded"

    log = Finished(None, Path(job.output_dir)).log
    assert "W&B: cannot start online" in log
    assert "(offline)" in log
