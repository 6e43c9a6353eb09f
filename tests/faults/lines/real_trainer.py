"""F1 with the real trainer: jobs of a tiny model, whose worker and trainer are killed; weights and history stay bit-identical."""

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.line import Line, Run
from tests.faults.world import Plan, World

ROWS_FILE = Path(__file__).resolve().parents[3] / "examples" / "q_basics.jsonl"
# Every step as on an idle machine: one thread, so that sums are made in one order.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RES_OPTIONS": "timeout:1 attempts:1",
}  # fmt: skip
SPEC: dict[str, Any] = {
    "max_steps": 24, "save_steps": 3, "eval_steps": 6, "batch_size": 4, "gradient_accumulation_steps": 2,
    "max_seq_length": 512, "validation_split": 0.05, "warmup_steps": 2, "precision": "fp32",
    "gradient_checkpointing": False, "learning_rate": 1e-2,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"rank": 4, "dropout": 0.2}},
    "full": {"method": "full", "learning_rate": 1e-3},
}
SPEEDS = ("seconds", "tokens_per_second")  # differ from run to run


def real_trainer(line: Run) -> None:
    world = line.world(lease_seconds=5)
    world.start_server()
    model = _tiny_model(world)
    file_id = world.upload(ROWS_FILE.read_bytes())
    trainer = (sys.executable, "-m", "sftd_worker.trainer")
    warm = [sys.executable, "-P", "-m", "sftd_worker.trainer.warm"]
    world.add_worker(
        "real",
        start=False,
        trainer_argv=list(trainer),
        warm=True,
        warm_argv=warm,
        offline=True,
        lock_wait_seconds=10,
    )
    world.start_worker("real", **ENVIRONMENT)
    dice = line.random
    methods = list(METHODS)
    whole = {name: _post(world, model, file_id, name) for name in methods}
    for plan in whole.values():
        world.wait(lambda plan=plan: world.state(plan) == "succeeded", "an undisturbed run", seconds=180)  # type: ignore[misc]  # bound now
    runs = 0
    for number in range(line.times(2, 20)):
        name = methods[number % len(methods)]
        plan = _post(world, model, file_id, name)
        for kill in range(dice.randint(2, 3)):
            _wait_for_step(world, plan, dice.randint(1, 6))
            if world.state(plan) == "succeeded":
                break
            if (number + kill) % 2 and (alive := _trainers(world)):
                world.kill_trainer(dice.choice(alive))
            else:
                world.kill_worker("real")
                world.start_worker("real", **ENVIRONMENT)
        world.wait(lambda plan=plan: world.state(plan) == "succeeded", "a killed run to end", seconds=180)  # type: ignore[misc]  # bound now
        line.violations += [f"I10: {text}" for text in differences(world, whole[name], plan)]
        runs += 1
    line.figures |= {"runs_compared": runs, "methods": methods}
    line.settle(world)


def _post(world: World, model: Path, file_id: str, method: str) -> Plan:
    plan = world.plan(steps=SPEC["max_steps"])
    plan.lawful = plan.one_point_a_step = False
    plan.spec = {
        **SPEC, **METHODS[method], "base_model": str(model), "training_file": file_id, "seed": 7,
        "metadata": plan.spec["metadata"],
    }  # fmt: skip
    world.submit(plan)
    return plan


def _tiny_model(world: World) -> Path:
    from examples import tiny_model  # builds with torch: only here

    folder: Path = tiny_model.build(world.data / "models" / "tiny", ROWS_FILE, hidden_size=32, vocab_size=400)
    return folder


def _wait_for_step(world: World, plan: Plan, more: int) -> None:
    """Until the job has made so many more steps."""
    wanted = min(world.job(plan)["step"] + more, SPEC["max_steps"] - 1)
    world.wait(
        lambda: (job := world.job(plan))["state"] == "succeeded" or (job["state"] == "running" and job["step"] >= wanted),
        f"step {wanted}",
        seconds=120,
        pause=0.02,
    )  # fmt: skip
    time.sleep(world.random.uniform(0, 0.3))


def _trainers(world: World) -> list[int]:
    """Processes that train: they were forked by a warm parent, and hold the lock of the job's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            links = [os.readlink(handle) for handle in (entry / "fd").iterdir()]
            is_agent = entry.name == str(world.workers["real"].process.pid)  # type: ignore[union-attr]  # it was started
        except OSError:
            continue
        if not is_agent and any(
            link.startswith(str(world.data)) and link.endswith(".trainer.lock") for link in links
        ):
            found.append(int(entry.name))
    return found


def differences(world: World, whole: Plan, killed: Plan) -> list[str]:
    """What of two jobs of one spec is not the same, to the last bit."""
    found = []
    one, other = (_record(world, plan) for plan in (whole, killed))
    for name in one:
        if one[name] != other[name]:
            found.append(f"{killed.job_id}: its {name} differ from those of an undisturbed run")
    return found


def _record(world: World, plan: Plan) -> dict[str, Any]:
    points = world.client.get(f"/jobs/{plan.job_id}/metrics").json()["data"]
    evaluations = world.client.get(f"/jobs/{plan.job_id}/evaluations").json()["data"]
    assert plan.job_id is not None
    folder = world.data / "jobs" / plan.job_id
    last = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [*(folder / "results").glob("*.safetensors"), *last.glob("*.safetensors")]
    return {
        "metrics": [{name: value for name, value in point.items() if name not in SPEEDS} for point in points],
        "evaluations": [
            {name: value for name, value in found.items() if name not in ("job_id", "attempt", "created_at")}
            for found in evaluations
        ],
        "weights": {
            f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }


LINES = [Line("real trainer", "F1 F2", real_trainer)]
