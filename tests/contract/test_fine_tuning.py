"""`client.fine_tuning` and `client.models` of the real openai packages: every call, every list to its end, every error."""

from pathlib import Path

from tests.contract.lossy import lossy_proxy


def test_fine_tuning_and_models_work_with_the_unmodified_package(
    box, run_script, openai_python: Path
) -> None:
    file = box.upload()
    posted = {"model": "org/model", "training_file": file, "suffix": "done", "keep_checkpoints": 20}
    done = box.admin.post("/v1/fine_tuning/jobs", json=posted).json()["id"]
    lease = box.claim()
    lease.start()
    for step in range(1, 13):
        lease.checkpoint(step)
    lease.metrics(0, *[(step, {"loss": 6 / step}) for step in range(1, 13)])
    lease.event(0, "evaluation", step=10, eval_loss=1.5, perplexity=4.5, token_accuracy=0.5, num_tokens=9)
    assert lease.finish().status_code == 200
    for _ in range(5):
        box.submit(training_file=file)
    other = box.key("other").headers["authorization"].removeprefix("Bearer ")

    with lossy_proxy(box.url) as lossy:
        said = run_script(box, "fine_tuning.py", file, done, lossy, OTHER_KEY=other)

    # The package is the version that its environment is named after.
    assert said.split(".")[0] == openai_python.parents[1].name.rsplit("-", 1)[-1]
