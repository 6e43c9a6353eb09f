"""A job that is tried again from a checkpoint ends with the weights of one that was never interrupted."""

import hashlib
import json
from pathlib import Path

from tests.e2e.conftest import Service


def weights(service: Service, job_id: str) -> dict[str, str]:
    folder = service.data / "jobs" / job_id / "results"
    found = {path.name: path for path in folder.glob("*.safetensors")}
    assert found
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def test_a_retried_job_gives_the_weights_of_one_that_was_never_interrupted(service: Service) -> None:
    client = service.client
    spec = service.spec(max_steps=120, save_steps=15, eval_steps=40, lora={"rank": 4, "dropout": 0.2})
    whole = client.jobs.create(spec=spec)
    client.jobs.wait(whole.id, timeout_seconds=240)
    old = client.jobs.create(spec=spec)
    service.wait(lambda: len(list(client.jobs.checkpoints(old.id))) >= 2, "two checkpoints")
    client.jobs.cancel(old.id)
    service.wait(lambda: client.jobs.retrieve(old.id).state == "cancelled", "the cancel")
    steps = [checkpoint.step for checkpoint in client.jobs.checkpoints(old.id)]

    again = client.jobs.wait(client.jobs.retry(old.id).id, timeout_seconds=240)

    assert max(steps) < 120
    assert again.retry_of == old.id
    (run,) = (event for event in client.jobs.events(again.id) if event.type == "run")
    assert run.data["start_step"] == max(steps)
    assert weights(service, again.id) == weights(service, whole.id)
    theirs = {p.step: p.model_dump() for p in client.jobs.metrics(whole.id)}
    for point in client.jobs.metrics(again.id):
        ours = point.model_dump()
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "tokens_seen"):
            assert ours.get(name) == theirs[point.step].get(name), (point.step, name)


def test_a_damaged_checkpoint_of_the_old_job_gives_way_to_an_older_one(service: Service) -> None:
    client = service.client
    spec = service.spec(max_steps=1_000_000, save_steps=5, eval_steps=10**6)
    old = client.jobs.create(spec=spec)
    service.wait(lambda: len(list(client.jobs.checkpoints(old.id))) >= 3, "three checkpoints")
    client.jobs.cancel(old.id)
    service.wait(lambda: client.jobs.retrieve(old.id).state == "cancelled", "the cancel")
    *_, older, newest = sorted(c.step for c in client.jobs.checkpoints(old.id))
    damage(service.data / "jobs" / old.id / "checkpoints" / f"checkpoint-{newest}")

    again = client.jobs.retry(old.id)
    service.wait(lambda: client.jobs.retrieve(again.id).step > older, "some steps")
    client.jobs.cancel(again.id)
    service.wait(lambda: client.jobs.retrieve(again.id).state == "cancelled", "the end")

    (run,) = (event for event in client.jobs.events(again.id) if event.type == "run")
    assert run.data["start_step"] == older
    assert newest not in [c.step for c in client.jobs.checkpoints(old.id)]


def damage(checkpoint: Path) -> None:
    name = next(name for name in json.loads((checkpoint / "manifest.json").read_text())["files"])
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
