"""The run, from top to bottom: spec, device, model, data, optimiser, resume, loop, export.

    python -m sftd_worker.trainer WORKDIR        # WORKDIR/job.json says what to do

The loss of a step is the sum over its supervised tokens divided by their number, over micro-batches and ranks.
Which rows a step sees, the learning rate and the random numbers of dropout are functions of (seed, step, rank): a run
that is killed and resumed sees the same ones, and there is nothing to restore but weights, optimizer and counters.
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sftd.protocol import TrainerJob
from sftd.schemas import FailureReason, ManifestFile
from sftd_worker.trainer.batching import Plan, make_plan, share_of_rank
from sftd_worker.trainer.checkpoint import (
    RunState,
    data_sha_of,
    hash_file,
    load_checkpoint,
    require_whole,
)
from sftd_worker.trainer.data import (
    Tokenizing,
    TokenRows,
    choose_rows,
    show_mask,
    split_by_hash,
    tokenize_file,
)
from sftd_worker.trainer.divergence import diverged, evaluation_has_exploded, has_exploded, last_good
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.evaluation import evaluate
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.export import export
from sftd_worker.trainer.loss import scaled_loss
from sftd_worker.trainer.memory import (
    Budget,
    checkpoint_bytes,
    estimate_bytes,
    keep_gradients_together,
    release_memory,
    settle_host_memory,
)
from sftd_worker.trainer.model import Model, load_model, load_tokenizer
from sftd_worker.trainer.optim import learning_rate, make_optimizer, set_learning_rate, warmup_steps
from sftd_worker.trainer.order import FixedOrder, keep_threads
from sftd_worker.trainer.packing import Prefix, TokenRow, idle_row, lay_out, most_tokens
from sftd_worker.trainer.precision import choose_precision
from sftd_worker.trainer.saving import Saver
from sftd_worker.trainer.sharding import Sharding, choose_sharding, run_passes
from sftd_worker.trainer.signals import Signals
from sftd_worker.trainer.tracking import start_tracker
from sftd_worker.trainer.world import (
    World,
    any_rank,
    barrier,
    most_of_ranks,
    sum_gradients,
    sum_over_ranks,
    word_of_main,
)


class Stopped(Exception):
    """The run obeyed a signal between two steps."""


def train(job: TrainerJob, *, world: World, events: Events, signals: Signals) -> dict[str, ManifestFile]:
    """Do the whole run. Returns the files of results/. Raises RunFailed or Stopped."""
    spec = job.spec
    output = Path(job.output_dir)
    found = word_of_main(world, job.resume_from)
    resume_from = Path(found) if found else None
    if resume_from is not None:
        if world.is_main:  # its files are large: one rank reads them all, the others wait for its word
            require_whole(resume_from, spec)
        barrier(world)

    # ---- device
    torch.manual_seed(spec.seed)
    precision = choose_precision(spec, world.device)
    torch.backends.cuda.matmul.allow_tf32 = precision.name == "bf16"  # fp32 means fp32
    order = FixedOrder()
    if world.device.type == "cpu":
        settle_host_memory()
    events.log(
        f"{spec.method} on {_device_name(world)}, {world.size} process(es), {precision.name}: {precision.reason}"
    )
    sharding = choose_sharding(spec, world)
    events.log(f"sharding: {sharding} ({sharding.reason})")

    # ---- model
    tokenizer, template, own_template = load_tokenizer(job)
    events.alive()
    model = load_model(job, world=world, sharding=sharding, precision=precision, resume_from=resume_from)
    events.alive()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if not own_template:
        events.log("the model brings no chat template: ChatML is used, and saved with the result")
    packing = spec.packing and model.end_to_end
    if spec.packing and not packing:
        events.notice(f"packing is off for this model: {model.padded_because}; rows are padded instead")

    # ---- data: rank 0 makes the tokens, the others read them
    how = Tokenizing(tokenizer, template, spec.train_on)
    training_sha = hash_file(Path(job.training_path))
    events.alive()
    if world.is_main:
        train_rows, eval_rows = _load_rows(job, how, training_sha, events)
    barrier(world)
    if not world.is_main:
        train_rows, eval_rows = _load_rows(job, how, training_sha, events)
    plan = make_plan(
        num_rows=len(train_rows),
        rows_per_step=spec.batch_size * spec.gradient_accumulation_steps * world.size,
        max_steps=spec.max_steps,
        num_epochs=spec.num_epochs,
        seed=spec.seed,
    )

    # ---- optimiser
    optimizer = make_optimizer(spec, model.net, world.device)
    parameters = model.trainable()
    if model.shards is None:
        keep_gradients_together(parameters)

    # ---- resume
    data_sha = data_sha_of(job, training_sha)
    state = RunState(data_sha=data_sha)
    if resume_from is not None:
        state = load_checkpoint(resume_from, model=model, optimizer=optimizer)
        if state.unordered:
            order.give_up()
            events.log("sums are made in no fixed order, as before: this run may differ in the last bits")
        if state.data_sha not in ("", data_sha):
            raise RunFailed(
                FailureReason.BAD_SPEC,
                f"{resume_from.name} was trained on other rows than {job.training_name} gives now; put the old file "
                "(and flags) back, or use an empty folder",
            )
        if (
            state.threads is not None
            and world.device.type == "cpu"
            and state.threads != torch.get_num_threads()
        ):
            events.log(f"{state.threads} thread(s), as before: the last bits depend on it")
        events.log(f"resumed from {resume_from.name}: {state.step} of {plan.total_steps} steps are done")
    state.threads = keep_threads(state.threads) if world.device.type == "cpu" else None
    _describe(job, model, sharding, train_rows, eval_rows, plan, state, world, events, tokenizer, resume_from)
    if (
        world.is_main and state.evaluations
    ):  # the file may have been left by an attempt that had come less far, or further
        _write_evaluations(output, state)
    tracker = start_tracker(
        spec.wandb if world.is_main else None,
        events=events,
        folder=output / "logs",
        run_id=job.wandb_run_id,
        run_name=spec.name,
        config=spec.model_dump(mode="json"),
    )

    # ---- loop: evaluate, save, stop?, step, log
    rows_at_once = 1 if model.one_by_one else spec.batch_size
    whole_budget = Budget(rows_at_once, spec.max_tokens_per_step or rows_at_once * spec.max_seq_length)
    budget = eval_budget = (
        whole_budget  # apart: an evaluation keeps less in memory, and may be made of longer rows
    )
    if state.whole_budget == asdict(whole_budget):  # not where the spec asks for other micro-batches now
        budget = Budget(**state.budget) if state.budget else budget
        eval_budget = Budget(**state.eval_budget) if state.eval_budget else eval_budget
    state.whole_budget = asdict(whole_budget)
    saved_at = state.step if resume_from is not None else -1
    saver = Saver(
        output / "checkpoints",
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        spec=spec,
        attempt=job.attempt,
        world=world,
        sharding=sharding,
        events=events,
        signals=signals,
    )
    failed = True
    ahead: StepRows | None = None  # of the step to come
    model.net.train()
    try:
        while True:
            saver.check()
            step = state.step
            last = step >= plan.total_steps

            if eval_rows is not None and (last or step % spec.eval_steps == 0) and state.evaluated_at != step:
                result, eval_budget = evaluate(
                    model, eval_rows, world=world, budget=eval_budget, pad_id=pad_id, events=events
                )
                wrong = evaluation_has_exploded(
                    result.eval_loss, state, vocab_size=model.vocab_size, num_tokens=result.num_tokens
                )
                state.evaluated_at = step
                state.eval_budget = asdict(eval_budget)
                state.metrics["eval_loss"] = result.eval_loss
                state.evaluations.append({"step": step, "epoch": plan.epoch_at(step), **asdict(result)})
                said = (
                    f"step {step}: evaluation loss {result.eval_loss:.4f}, perplexity {result.perplexity:.4g}, "
                    f"token accuracy {result.token_accuracy:.1%} over {result.num_tokens:,} tokens"
                )
                values = {
                    "eval_loss": result.eval_loss,
                    "eval_perplexity": result.perplexity,
                    "eval_token_accuracy": result.token_accuracy,
                }
                events.log(said)
                events.step(step, values)
                events.evaluation(said, {"step": step, **asdict(result)})
                tracker.log(values, step=step)
                if world.is_main:
                    _write_evaluations(output, state)
                if wrong is not None:
                    raise _diverged(
                        f"the evaluation loss at step {step} {wrong}",
                        saver,
                        world,
                        output,
                        good_through=last_good(state, step - 1),
                    )

            stop, save_and_stop = any_rank(world, signals.stop, signals.save_and_stop)
            due = step > 0 and (last or step % spec.save_steps == 0)
            if (due or (save_and_stop and not stop and step > 0)) and saved_at != step:
                saver.save(state, goes_on=not (last or stop or save_and_stop))
                saved_at = step

            if last or stop or save_and_stop:
                (given_up,) = any_rank(world, not saver.finish())
                if last and not given_up:
                    break
                saved = step > 0 and not (stop or given_up)
                raise Stopped(f"stopped after step {step}" + ", with a checkpoint" * saved)

            # ------------------------------------------------------------------ step
            started = time.perf_counter()
            rows = ahead or _rows_of_step(step, plan, train_rows, model, packing, world)
            part_of_loss, budget = _accumulate(
                model, rows, budget, packing, pad_id, spec.seed, step, order, world, events
            )
            # While a GPU works on what it was given, the host prepares what comes next.
            ahead = None
            if step + 1 < plan.total_steps:
                ahead = _rows_of_step(step + 1, plan, train_rows, model, packing, world)

            max_norm = spec.max_grad_norm or math.inf
            if model.shards is None:
                sum_gradients(world, parameters)
                size = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            else:  # summed in the backward pass, each rank its share
                model.shards.drop_unused()
                size = torch.tensor(model.shards.clip(max_norm))
            loss, norm = _read(world, part_of_loss, size)  # the host waits for the device here, and once
            wrong = has_exploded(loss, state, vocab_size=model.vocab_size, num_tokens=rows.num_supervised)
            if wrong is not None:
                raise _diverged(
                    f"the loss of step {step + 1} {wrong}",
                    saver,
                    world,
                    output,
                    good_through=last_good(state, step - 1),
                )
            if not math.isfinite(norm):
                raise _diverged(
                    f"the gradient of step {step + 1} has the norm {norm}",
                    saver,
                    world,
                    output,
                    good_through=last_good(state, step),
                )
            rate = learning_rate(spec, step, plan.total_steps)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # ------------------------------------------------------------------

            seconds = time.perf_counter() - started
            state.step = step + 1
            state.budget = asdict(budget)
            state.unordered = order.given_up
            if state.first_loss is None:
                state.first_loss = loss
            state.tokens_seen += rows.num_tokens
            state.metrics["loss"] = loss
            if state.step % spec.logging_steps == 0 or state.step == plan.total_steps:
                values = {
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "epoch": plan.epoch_at(state.step),
                    "tokens": float(rows.num_tokens),
                    "supervised_tokens": float(rows.num_supervised),
                    "tokens_seen": float(state.tokens_seen),
                    "tokens_per_second": rows.num_tokens / seconds,
                    "seconds": seconds,
                }
                events.step(state.step, values)
                events.log(
                    f"step {state.step}/{plan.total_steps}: loss {loss:.4f}, learning rate {rate:.3g}, "
                    f"gradient norm {norm:.3g}, {values['tokens_per_second']:,.0f} tokens/s"
                )
                tracker.log(values, step=state.step)
            # A run that saves its end alone needs no copy; of sharded weights there is no other way to disk.
            if spec.save_steps < plan.total_steps or model.shards is not None:
                saver.prepare()
            if state.step in (3, plan.total_steps // 10):
                left = seconds * (plan.total_steps - state.step)
                events.log(f"about {_duration(left)} left, without evaluations and checkpoints")

        # ---- export
        if state.far_off_since is not None:
            events.notice(
                f"the loss has been far above the first one since step {state.far_off_since + 1}: look at the last steps "
                "before you use the result"
            )
        files: dict[str, ManifestFile] = {}
        if world.is_main or model.shards is not None:
            files = export(output, model=model, tokenizer=tokenizer, job=job, state=state, alive=events.alive)
        if world.is_main:
            events.log(f"done: {plan.total_steps} steps, result in {output / 'results'}")
        barrier(world)
        failed = False
        return files
    except Stopped:
        failed = False
        raise
    finally:
        order.end()
        saver.close()
        tracker.finish(failed=failed)


@dataclass(frozen=True)
class StepRows:
    """What an optimizer step learns from."""

    rows: list[TokenRow]  # this rank's
    prefixes: list[Prefix | None]  # what they have in common from the start
    num_tokens: int  # of all ranks
    num_supervised: int  # of all ranks


def _rows_of_step(
    step: int, plan: Plan, train_rows: TokenRows, model: Model, packing: bool, world: World
) -> StepRows:
    chosen = plan.rows_of_step(step)
    lengths = [int(train_rows.lengths[i]) for i in chosen]
    mine = share_of_rank(lengths, rank=world.rank, world_size=world.size)
    rows = [train_rows.row(chosen[i]) for i in mine]
    return StepRows(
        rows=rows,
        prefixes=model.prefixes(rows) if packing else [None] * len(rows),
        num_tokens=sum(lengths),
        num_supervised=int(train_rows.num_supervised[chosen].sum()),
    )


def _accumulate(
    model: Model,
    step_rows: StepRows,
    budget: Budget,
    packing: bool,
    pad_id: int,
    seed: int,
    step: int,
    order: FixedOrder,
    world: World,
    events: Events,
) -> tuple[torch.Tensor, Budget]:
    """Forward and backward over this rank's rows of a step. Leaves the gradient of the step's mean loss in `.grad`.

    Returns this rank's share of the mean loss (a scalar in fp64) and the budget to go on with. When memory runs out anywhere, all ranks
    do the step again with micro-batches of half the size: more of them, the same step. So they do, in any order, where
    an operation knows no fixed one.
    """
    rows, prefixes = step_rows.rows, step_rows.prefixes
    lengths = [len(ids) for ids, _ in rows]
    while True:
        torch.manual_seed(_seed_of(seed, step, world.rank))  # dropout, on CPU and GPU
        layout = lay_out(
            lengths,
            batch_size=budget.batch_size,
            max_tokens=budget.max_tokens,
            packing=packing,
            prefixes=prefixes,
        )
        total = torch.zeros((), dtype=torch.float64, device=world.device)

        def learn(
            chosen: list[TokenRow], shared: list[Prefix | None], total: torch.Tensor, share: float = 1.0
        ) -> None:
            events.alive()
            batch = model.batch(chosen, pad_id=pad_id, prefixes=shared)
            scale = share / step_rows.num_supervised
            with order.kept() if share else nullcontext():  # what is nothing may be added in any order
                with model.autocast():
                    loss = model.whole(
                        lambda: scaled_loss(model.head, model.hidden(batch), batch.targets, scale=scale)
                    )
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += loss.detach()

        strict = not order.given_up
        broke_off = run_passes(
            model.shards,
            [
                partial(learn, [rows[i] for i in group], [prefixes[i] for i in group], total)
                for group in layout
            ],
            idle=partial(learn, [idle_row(pad_id)], [None], total, 0.0),
            order=order,
        )
        unordered_here = strict and order.given_up
        full = broke_off and not unordered_here
        alone = all(len(group) == 1 for group in layout)
        unordered, full_somewhere, stuck = any_rank(world, unordered_here, full, full and alone)
        if not (unordered or full_somewhere):
            return total, budget
        for parameter in model.trainable():
            parameter.grad = None
        if model.shards is not None:
            model.shards.forget_uses()
        release_memory()
        if (
            strict and full_somewhere and (stuck or budget.is_spent)
        ):  # a sum for each part of a row takes memory
            order.give_up()
            events.notice(
                f"step {step + 1}: memory ran out; the same step again without a fixed order of sums, which takes less: "
                "from here on a resumed run may differ in the last bits"
            )
            continue
        if unordered:
            order.give_up()
            events.notice(
                f"step {step + 1}: {order.because or 'an operation of another rank'} adds in no fixed order on this "
                "device: from here on a resumed run may differ in the last bits"
            )
            continue
        if stuck:
            raise RunFailed(
                FailureReason.OUT_OF_MEMORY,
                f"step {step + 1}: not even one row of {max(lengths, default=0)} tokens fits into memory",
            )
        if budget.is_spent:
            raise RunFailed(
                FailureReason.OUT_OF_MEMORY,
                f"step {step + 1}: memory ran out for micro-batches of {budget.max_tokens} tokens, which had been made "
                "smaller three times already; lower max_tokens_per_step or batch_size, or free memory on the device",
            )
        budget = budget.halved(
            rows=most_of_ranks(world, max((len(group) for group in layout), default=1)),
            tokens=most_of_ranks(world, most_tokens(layout, lengths, prefixes)),
        )
        events.notice(
            f"step {step + 1}: out of memory; the same step again in micro-batches of half the size "
            f"({budget.max_tokens} tokens)",
            {"batch_size": budget.batch_size, "max_tokens": budget.max_tokens},
        )


def _read(world: World, part_of_loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
    """The step's mean loss, summed over ranks, and the norm of its gradient, as numbers."""
    loss, size = torch.stack([part_of_loss, norm.to(part_of_loss)]).tolist()
    return sum_over_ranks(world, [loss])[0], size


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step depend on nothing that came before it."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _load_rows(
    job: TrainerJob, how: Tokenizing, training_sha: str, events: Events
) -> tuple[TokenRows, TokenRows | None]:
    """(training rows, validation rows or None)."""
    spec, cache = job.spec, Path(job.cache_dir)
    limits: dict[str, Any] = {
        "max_seq_length": spec.max_seq_length,
        "on_overlong": spec.on_overlong,
        "skip_test_translation": job.skip_test_translation,
    }
    table = tokenize_file(
        Path(job.training_path),
        sha256=training_sha,
        name=job.training_name,
        how=how,
        cache_dir=cache,
        alive=events.alive,
    )
    if spec.validation_split is not None:
        training, validation = split_by_hash(table, spec.validation_split)
        name = job.training_name
        return (
            choose_rows(table, name=name, keep=training, **limits),
            choose_rows(table, name=name, keep=validation, **limits),
        )
    rows = choose_rows(table, name=job.training_name, **limits)
    if job.validation_path is None:
        return rows, None
    name = job.validation_name or Path(job.validation_path).name
    path = Path(job.validation_path)
    held_out = tokenize_file(
        path, sha256=hash_file(path), name=name, how=how, cache_dir=cache, alive=events.alive
    )
    return rows, choose_rows(held_out, name=name, **limits)


def _describe(
    job: TrainerJob,
    model: Model,
    sharding: Sharding,
    train_rows: TokenRows,
    eval_rows: TokenRows | None,
    plan: Plan,
    state: RunState,
    world: World,
    events: Events,
    tokenizer: Any,
    resume_from: Path | None,
) -> None:
    """Say every number that the spec implied, once, and write config.yaml."""
    spec = job.spec
    warm = warmup_steps(spec, plan.total_steps)
    config = model.causal.config.get_text_config()
    memory = estimate_bytes(spec, list(model.net.parameters()), config.hidden_size, config.num_hidden_layers)
    num_parameters = sum(p.numel() for p in model.net.parameters())
    if model.shards is not None:
        share = model.shards.num_held() / num_parameters
        memory |= {name: round(memory[name] * share) for name in ("weights", "gradients", "optimizer")}
    mean_length = float(train_rows.lengths.mean())
    derived: dict[str, Any] = {
        "start_step": state.step if resume_from is not None else -1,
        "total_steps": plan.total_steps,
        "resumed_from": resume_from.name if resume_from is not None else None,
        "steps_per_epoch": plan.steps_per_epoch,
        "num_epochs": round(plan.epoch_at(plan.total_steps), 4),
        "rows_per_step": plan.rows_per_step,
        "tokens_per_step": round(mean_length * min(plan.rows_per_step, plan.num_rows)),
        "num_rows": len(train_rows),
        "num_eval_rows": 0 if eval_rows is None else len(eval_rows),
        "left_out": train_rows.left_out,
        "eval_left_out": {} if eval_rows is None else eval_rows.left_out,
        "supervised_share": round(float(train_rows.num_supervised.sum() / train_rows.lengths.sum()), 4),
        "trainable_parameters": sum(p.numel() for p in model.trainable()),
        "parameters": num_parameters,
        "parameters_held": num_parameters if model.shards is None else model.shards.num_held(),
        "sharding": str(sharding),
        "device": _device_name(world),
        "precision": model.precision.name,
        "precision_reason": model.precision.reason,
        "packing": spec.packing and model.end_to_end,
        "warmup_steps": warm,
        "memory_bytes": memory,
        "checkpoint_bytes": checkpoint_bytes(spec, list(model.net.parameters())),
    }
    events.run(f"{plan.total_steps} steps over {len(train_rows)} rows", derived)
    events.log(
        f"{len(train_rows):,} rows to train on, {derived['num_eval_rows']:,} to evaluate on; "
        f"left out: {_counts(train_rows.left_out)}"
    )
    if eval_rows is not None and eval_rows.left_out:
        events.log(f"left out of the evaluation: {_counts(eval_rows.left_out)}")
    for rows, what in ((train_rows, "training"), (eval_rows, "validation")):
        if rows is not None and rows.num_spelling:
            events.notice(
                f"{rows.num_spelling:,} of {len(rows):,} {what} rows spell out control tokens of the model, such as its end"
                " token: they are read as plain text, and learned so in answers; if they were written to end a turn, take"
                " them out, the template puts the real ones there"
            )
    events.log(
        f"{plan.total_steps:,} steps of {plan.rows_per_step} rows (about {derived['tokens_per_step']:,} tokens, "
        f"{derived['supervised_share']:.0%} of them supervised), {plan.steps_per_epoch:,} steps an epoch, "
        f"{derived['num_epochs']:g} epochs"
    )
    events.log(
        f"{derived['trainable_parameters']:,} of {derived['parameters']:,} parameters are trained; memory about "
        f"{sum(memory.values()) / 2**30:.2f} GiB (weights {memory['weights'] / 2**30:.2f}, gradients "
        f"{memory['gradients'] / 2**30:.2f}, optimizer {memory['optimizer'] / 2**30:.2f}, a micro-batch up to "
        f"{memory['activations'] / 2**30:.2f})"
    )
    if model.shards is not None:
        held = derived["parameters_held"]
        events.log(
            f"rank 0 holds {held:,} of {num_parameters:,} parameters ({held / num_parameters:.0%}); that is its memory"
        )
    if warm >= plan.total_steps and spec.learning_rate:
        events.notice(
            f"the warm-up ({warm} steps) is as long as the run ({plan.total_steps}): learning_rate is never reached; "
            "lower warmup_steps"
        )
    for text in show_mask(train_rows, tokenizer):
        events.log(f"first row, ⟦what is learned⟧: {text}")
    _notice_unknown_end(model, train_rows, events, tokenizer)
    if world.is_main:
        _write_config(Path(job.output_dir), job, derived)


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items()) or "none"


def _notice_unknown_end(model: Model, rows: TokenRows, events: Events, tokenizer: Any) -> None:
    """A base model with a chat template often stops at the end of a document alone, and would talk on after each answer."""
    ids, supervised = rows.row(0)
    if len(ids) == rows.max_length or tokenizer.eos_token_id is None:
        return  # perhaps cut
    end = int(ids[np.flatnonzero(supervised)[-1]])
    stops = getattr(getattr(model.causal, "generation_config", None), "eos_token_id", None)
    known = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    if end not in known and tokenizer.decode([end]).strip():
        events.notice(
            f"answers end with {tokenizer.decode([end])!r}, which the model's generation config does not stop at: give "
            "it as a stop token when you generate with the result"
        )


def _write_config(output: Path, job: TrainerJob, derived: dict[str, Any]) -> None:
    body = {**job.spec.model_dump(mode="json"), "derived": derived}
    _replace(output / "config.yaml", yaml.safe_dump(body, sort_keys=False, allow_unicode=True))


def _write_evaluations(output: Path, state: RunState) -> None:
    rows = [
        {
            name: value if math.isfinite(value) else str(value) for name, value in row.items()
        }  # JSON has no NaN
        for row in state.evaluations
    ]
    _replace(output / "logs" / "eval_results.json", json.dumps(rows, indent=1))


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")  # the next attempt's, where this one is killed
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def _diverged(what: str, saver: Saver, world: World, output: Path, *, good_through: int) -> RunFailed:
    """The failure of a run whose numbers went off; all ranks see them, and end together."""
    saver.settle(good_through=good_through)
    failure = diverged(what, output / "checkpoints", good_through=good_through)
    barrier(world)  # torchrun stops all ranks when the first ends
    return failure


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
