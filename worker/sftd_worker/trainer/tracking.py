"""Weights & Biases. Training never waits for it or fails with it: what goes wrong is said once, and the run goes on.

The key comes from the worker's environment (WANDB_API_KEY); WANDB_MODE=offline keeps the run in a local file.
"""

import os
import threading
from pathlib import Path
from typing import Any, Literal, cast

from sftd.spec import WandbSpec
from sftd_worker.trainer.events import Events

_INIT_SECONDS = 20
_FINISH_SECONDS = 30


class Tracker:
    """A W&B run, or nothing at all behind the same three calls."""

    def __init__(self, run: Any, events: Events) -> None:
        self._run = run
        self._events = events

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Metrics of a step, under `train/…` and `eval/…`."""
        if self._run is None:
            return
        named = {_wandb_name(name): value for name, value in values.items()}
        try:
            self._run.log({**named, "step": step})
        except Exception as error:  # a tracker must not end a run, whatever it raises
            self._give_up(error)

    def finish(self, *, failed: bool) -> None:
        """Close the run, waiting a bounded time for what is still on its way."""
        if self._run is None:
            return
        run, self._run = self._run, None
        done = threading.Thread(target=lambda: run.finish(exit_code=int(failed)), daemon=True)
        done.start()
        done.join(_FINISH_SECONDS)
        if done.is_alive():
            self._events.log(f"W&B: still uploading after {_FINISH_SECONDS} s; the rest stays in {run.dir}")

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._events.notice(f"W&B: stopped logging ({error}); training goes on")


def start_tracker(
    spec: WandbSpec | None,
    *,
    events: Events,
    folder: Path,
    run_id: str | None,
    run_name: str | None,
    config: dict[str, Any],
) -> Tracker:
    """Begin or continue the W&B run `run_id`. Falls back to an offline run, then to none, and says so."""
    if spec is None:
        return Tracker(None, events)
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    wanted = os.environ.get("WANDB_MODE", "online")
    modes = [wanted] if wanted != "online" else ["online", "offline"]  # offline: a file to `wandb sync` later
    if wanted == "online" and not os.environ.get("WANDB_API_KEY"):
        events.notice("W&B: WANDB_API_KEY is not set on the worker; logging offline")
        modes = ["offline"]
    for mode in modes:
        try:
            run = wandb.init(
                project=spec.project,
                entity=spec.entity,
                name=spec.name or run_name,
                tags=spec.tags or None,
                id=run_id,
                resume="allow",
                mode=cast(Literal["online", "offline", "disabled"], mode),
                dir=str(folder),
                config=config,
                settings=wandb.Settings(
                    init_timeout=_INIT_SECONDS, silent=True, console="off", disable_git=True
                ),
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:  # a tracker must not end a run, whatever it raises
            events.notice(
                f"W&B: cannot start {mode} ({str(error).splitlines()[0] if str(error) else error!r}); training goes on"
            )
            continue
        events.log(f"W&B: run {run.id} ({mode}), files in {run.dir}")
        return Tracker(run, events)
    return Tracker(None, events)


def _wandb_name(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
