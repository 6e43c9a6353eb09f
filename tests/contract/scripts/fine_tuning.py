"""`client.fine_tuning` and `client.models`, sync and async: `fine_tuning.py FILE DONE_JOB LOSSY_URL`; prints the version.

DONE_JOB has succeeded with checkpoints of the steps 1 to 12. LOSSY_URL leads to the server and loses the answer to the first
request that it passes on.
"""

import asyncio
import os
import sys

import openai
from expect import raises

FILE, DONE, LOSSY = sys.argv[1:]
SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}


def main() -> None:
    client = openai.OpenAI()
    create_and_steer(client)
    lists(client)
    models(client)
    mistakes(client)
    retries()
    asyncio.run(later())
    print(openai.__version__)


def create_and_steer(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    job = jobs.create(
        model="org/model",
        training_file=FILE,
        method=SUPERVISED,
        suffix="spring",
        seed=7,
        metadata={"team": "q", "lot": "a=b&c"},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["t"]}}],
        extra_body={"lora": {"rank": 8}, "priority": 3},
    )
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "queued", "org/model")
    assert job.hyperparameters.n_epochs == 2
    assert isinstance(job.hyperparameters.batch_size, int)
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 1
    assert (job.seed, job.training_file, job.validation_file) == (7, FILE, None)
    assert (job.error, job.fine_tuned_model, job.finished_at, job.trained_tokens) == (None, None, None, None)
    assert job.metadata == {"team": "q", "lot": "a=b&c"}
    assert (job.integrations[0].type, job.integrations[0].wandb.project) == ("wandb", "p")
    assert job.spec["lora"]["rank"] == 8  # what is not OpenAI's rides along
    assert job.created_at > 10**9
    assert job.queue_position >= 1

    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    assert jobs.cancel(job.id).status == "cancelled"
    assert jobs.retrieve(job.id).finished_at is not None
    with raises(openai.ConflictError, code="job_finished"):
        jobs.resume(job.id)
    found = list(jobs.list(metadata={"team": "q", "lot": "a=b&c"}))
    assert [one.id for one in found] == [job.id]
    assert job.id not in [one.id for one in jobs.list(limit=100, extra_query={"metadata": "null"})]


def lists(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    found = [job.id for job in jobs.list(limit=2)]
    assert len(found) == len(set(found)) >= 6
    assert found[-1] == DONE  # the oldest
    events = list(jobs.list_events(DONE, limit=3))
    assert len(events) > 3
    assert [event.created_at for event in events] == sorted((e.created_at for e in events), reverse=True)
    assert events[0].message == "Done."
    assert (events[0].object, events[0].level, events[0].type) == ("fine_tuning.job.event", "info", "message")
    assert len({event.id for event in events}) == len(events)
    checkpoints = list(jobs.checkpoints.list(DONE, limit=5))
    assert [one.step_number for one in checkpoints] == list(range(12, 0, -1))
    assert checkpoints[0].metrics.train_loss == 0.5
    assert checkpoints[0].metrics.full_valid_loss == 1.5
    assert checkpoints[0].metrics.train_mean_token_accuracy is None
    assert checkpoints[0].fine_tuning_job_id == DONE


def models(client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.retrieve(DONE)
    name = job.fine_tuned_model
    assert name == f"ft:org/model:admin:done:{DONE}"
    assert job.status == "succeeded"
    assert {"org/model", name} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("org/model").owned_by == "system"
    assert client.models.retrieve(name).owned_by == "admin"
    checkpoint = next(iter(client.fine_tuning.jobs.checkpoints.list(DONE))).fine_tuned_model_checkpoint
    assert client.models.retrieve(checkpoint).id == checkpoint
    with raises(openai.NotFoundError, code="unknown_model"):
        client.models.retrieve("org/other")
    with raises(openai.BadRequestError, code="base_model"):
        client.models.delete("org/model")


def mistakes(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    with raises(openai.NotFoundError, code="unknown_job", type="invalid_request_error"):
        jobs.retrieve("job_nope")
    with raises(openai.BadRequestError, code="invalid_spec", param="suffix", type="invalid_request_error"):
        jobs.create(model="org/model", training_file=FILE, suffix="x" * 65)
    with raises(openai.BadRequestError, param="training_file"):
        jobs.create(model="org/model", training_file="file_nope")
    with raises(openai.BadRequestError, param="hyperparameters.n_epochs"):
        jobs.create(model="org/model", training_file=FILE, hyperparameters={"n_epochs": 3}, method=SUPERVISED)
    with raises(openai.BadRequestError, param="method.type"):
        jobs.create(model="org/model", training_file=FILE, method={"type": "dpo", "dpo": {}})
    with raises(openai.BadRequestError, param="limit"):
        jobs.list(limit=0)
    with raises(openai.AuthenticationError, code="invalid_key"):
        openai.OpenAI(api_key="sftd-wrong").models.list()
    with raises(openai.PermissionDeniedError, code="not_owner"):
        openai.OpenAI(api_key=os.environ["OTHER_KEY"]).fine_tuning.jobs.cancel(DONE)


def retries() -> None:
    """The answer to the first try is lost; the client tries again by itself, and there is one job."""
    lossy = openai.OpenAI(base_url=f"{LOSSY}/v1")
    job = lossy.fine_tuning.jobs.create(model="org/model", training_file=FILE, suffix="once")
    assert [one.id for one in openai.OpenAI().fine_tuning.jobs.list() if one.suffix == "once"] == [job.id]


async def later() -> None:
    async with openai.AsyncOpenAI() as client:
        jobs = client.fine_tuning.jobs
        job = await jobs.create(model="org/model", training_file=FILE, hyperparameters={"n_epochs": 1})
        assert (await jobs.pause(job.id)).status == "paused"
        assert (await jobs.resume(job.id)).status == "queued"
        assert (await jobs.cancel(job.id)).status == "cancelled"
        assert (await jobs.retrieve(job.id)).hyperparameters.n_epochs == 1
        assert len([one async for one in jobs.list(limit=3)]) > 3
        assert len([one async for one in jobs.list_events(DONE, limit=4)]) > 4
        assert len([one async for one in jobs.checkpoints.list(DONE, limit=5)]) == 12
        name = (await jobs.retrieve(DONE)).fine_tuned_model
        assert name in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(name)).id == name
        deleted = await client.models.delete(name)
        assert (deleted.id, deleted.deleted) == (name, True)
        with raises(openai.NotFoundError, code="unknown_model"):
            await client.models.retrieve(name)
        with raises(openai.NotFoundError, code="unknown_job"):
            await jobs.list_events("job_nope")
        with raises(openai.BadRequestError, param="model"):
            await jobs.create(model=name, training_file=FILE)


main()
