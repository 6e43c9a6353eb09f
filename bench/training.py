"""How fast the trainer is beside TRL's SFTTrainer and transformers' Trainer: `python -m bench.training --case full`.

    python -m bench.training --case full,lora --rounds 1 --steps 4 --dist lognormal --shape 30m --seed 0

Both sides train the same rows on the same model, in the same order, each in a process of its own with one thread, in
turns A B B A. Throughput is un-padded training tokens per CPU second (user and system, all of the process) of the
steps after the first: start-up, loading and tokenising do not count. Every figure comes from one run of this program;
what matters is the ratio. Each case passes the gate first (bench/gate.py), or prints its failure and no figure.
`bench/NOTES.md` says what was learned; `bench/results/` holds what was measured.
"""

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench import model as models
from bench import peak, rows
from bench.measure import Measured, Side, SideFailed, in_turns, median, run_ours, run_peer, start
from bench.peers.clock import PeerSettings

from sftd.protocol import TRAINER_JOB_FILE, TrainerJob
from sftd.spec import JobSpec

BATCH = 8
MAX_LENGTH = 2048
LOSS_LIMIT = 1e-2  # per-step losses of two bf16 runs, relative
PACKED_LIMIT = 1e-3  # log-probability of a token, packed against alone, in fp32
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")

# (method, shape, precision) -> tokens per CPU second of ours over TRL: as shipped against as shipped, our best
# against TRL as shipped, our best against TRL's best.
BARS: dict[tuple[str, str, str], tuple[float, float, float]] = {
    ("full", "30m", "bf16"): (5.0, 6.0, 3.2),
    ("lora", "30m", "bf16"): (5.0, 6.4, 3.4),
    ("qlora", "30m", "bf16"): (3.5, 4.0, 3.5),
    ("full", "30m-151k", "bf16"): (3.5, 4.2, 3.2),
    ("lora", "30m-151k", "bf16"): (4.2, 5.0, 3.8),
    ("full", "30m", "fp32"): (4.0, 4.8, 3.0),
    ("lora", "30m", "fp32"): (4.3, 5.2, 3.1),
}


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    seed: int
    dist: str
    shape: str
    rounds: int
    steps: int
    precision: str
    peers: list[str]
    data_dir: Path
    work: Path


@dataclass(frozen=True)
class Setting:
    """A model and rows to train it on, for both sides."""

    options: Options
    folder: Path
    shape: str
    method: str
    model: Path
    data: Path
    tokens: Path  # the rows as the peers get them
    dist: str  # or the name of a real file
    device: str = "cpu"
    batch: int = BATCH
    max_length: int = MAX_LENGTH

    def job(self, folder: Path, **spec: Any) -> TrainerJob:
        """A job of ours over the rows; keyword arguments are fields of the spec."""
        fields: dict[str, Any] = {
            "base_model": str(self.model),
            "method": self.method,
            "training_file": "file_bench",
            "batch_size": self.batch,
            "gradient_accumulation_steps": 1,
            "max_steps": self.options.steps,
            "max_seq_length": self.max_length,
            "learning_rate": 1e-3 if self.method == "full" else 2e-3,
            "warmup_steps": 0,
            "lr_scheduler": "constant",
            "save_steps": 10**9,
            "eval_steps": 10**9,
            "seed": self.options.seed,
            "precision": self.options.precision,
            "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0},
            **spec,
        }
        return TrainerJob(
            spec=JobSpec.model_validate(fields),
            job_id="bench",
            attempt=1,
            model_path=str(self.model),
            training_path=str(self.data),
            training_name=self.data.name,
            output_dir=str(folder),
            cache_dir=str(self.folder / "cache"),
            device=self.device,
        )

    def peer(self, folder: Path, mode: str, **changes: Any) -> PeerSettings:
        """The same for a peer, `default` as it is shipped, the other modes without gradient checkpointing."""
        settings: dict[str, Any] = {
            "model": str(self.model),
            "rows": str(self.tokens),
            "folder": str(folder),
            "method": self.method,
            "mode": mode,
            "precision": self.options.precision,
            "gradient_checkpointing": mode == "default",
            "learning_rate": 1e-3 if self.method == "full" else 2e-3,
            "batch_size": self.batch,
            "max_length": self.max_length,
            "max_steps": -1,
            "save_steps": 0,
            "device": self.device,
            "frozen_dtype": _frozen_dtype(self.options.precision, mode),
            **changes,
        }
        return PeerSettings(**settings)


def main() -> None:
    """Measure the cases asked for; exit code 1 where a gate or a run failed."""
    args = _arguments()
    names = list(CASES) if args.case == "all" else args.case.split(",")
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"--case: {', '.join(unknown)} is none of {', '.join(CASES)}, all")
    failed = False
    with tempfile.TemporaryDirectory(prefix="sftd-bench-") as work:
        options = Options(
            args.seed,
            args.dist,
            args.shape,
            args.rounds,
            args.steps,
            args.precision,
            args.peers.split(","),
            args.data_dir,
            Path(work),
        )
        for name in names:
            try:
                for line in CASES[name](options):
                    line = {"case": name, **line, **facts(options, known=line)}
                    failed |= "failed" in line
                    print(json.dumps(line), flush=True)
            except (SideFailed, FileNotFoundError) as error:
                failed = True
                line = {"case": name, "failed": str(error), **facts(options)}
                print(json.dumps(line), flush=True)
    sys.exit(1 if failed else 0)


# ---------------------------------------------------------------- cases


def throughput(options: Options, *, method: str, shape: str | None = None) -> Iterator[dict[str, Any]]:
    """Ours with and without gradient checkpointing against TRL as shipped and at its best."""
    setting = synthetic(options, method=method, shape=shape or options.shape, dist=options.dist)
    yield from compare(setting, gated=True)


def real_data(options: Options, *, file: str) -> Iterator[dict[str, Any]]:
    """Full training on a file of real rows."""
    setting = real(options, method="full", file=options.data_dir / file)
    for line in compare(setting, gated=True):
        yield {**line, "dist": file}


def cold_start(options: Options) -> Iterator[dict[str, Any]]:
    """Wall seconds from the start of the process to the end of the first step, a small LoRA job."""
    setting = synthetic(options, method="lora", shape="tiny", dist="short")
    text = setting.folder / "prompts.jsonl"  # TRL tokenises the rows itself here, as we do
    with setting.data.open() as source, text.open("w") as file:
        for line in source:
            row = json.loads(line)
            turns = [("prompt", "user"), ("completion", "assistant")]
            chat = {name: [{"role": role, "content": row[name]}] for name, role in turns}
            file.write(json.dumps(chat) + "\n")

    def ours(folder: Path) -> Measured:
        # Another cache each time: what a second run on the same data saves is not start-up.
        job = setting.job(folder, max_steps=1)
        return run_ours(job.model_copy(update={"cache_dir": str(folder / "cache")}))

    def peer(folder: Path) -> Measured:
        return run_peer("trl_sft", setting.peer(folder, "default", rows=str(text), max_steps=1))

    mine, theirs = in_turns([ours, peer], setting.folder, rounds=options.rounds)
    seconds = [median(runs, lambda run: run.first_step_seconds) for runs in (mine, theirs)]
    cpu = [median(runs, lambda run: run.steps[0].cpu_seconds) for runs in (mine, theirs)]
    yield {
        "unit": "wall seconds to the end of step 1",
        "ours": round(seconds[0], 2),
        "peer": round(seconds[1], 2),
        "ratio": round(seconds[1] / seconds[0], 2),
        "cpu_seconds": [round(value, 2) for value in cpu],
        "shape": "tiny",
        "dist": "short",
    }


def checkpoint(options: Options) -> Iterator[dict[str, Any]]:
    """How long the loop stands still for a save, full training of 98M weights, against transformers' Trainer.

    Wall seconds between the end of a step and the beginning of the next: the median after steps that saved, less the
    median after steps that did not.
    """
    options = Options(**{**vars(options), "steps": 7})
    setting = synthetic(options, method="full", shape="98m", dist="short")

    def ours(folder: Path) -> Measured:
        return run_ours(setting.job(folder, save_steps=2))

    def peer(folder: Path) -> Measured:
        return run_peer("hf_trainer", setting.peer(folder, "default", save_steps=2))

    mine, theirs = in_turns([ours, peer], setting.folder, rounds=options.rounds)
    pauses = [median(runs, lambda run: save_pause(run, every=2)) for runs in (mine, theirs)]
    yield {
        "unit": "seconds the loop stands still for a save",
        "ours": round(pauses[0], 3),
        "peer": round(pauses[1], 3),
        "ratio": round(pauses[1] / max(pauses[0], 1e-3), 1),
        "bar": 0.5,
        "met": pauses[0] <= 0.5,
        "shape": "98m",
        "dist": "short",
        "steps": options.steps,
        "step_seconds": [round(median(runs, step_seconds), 2) for runs in (mine, theirs)],
    }


def prefix(options: Options) -> Iterator[dict[str, Any]]:
    """A system prompt of 256 tokens that all rows share, against rows of the same lengths that share nothing."""
    made = [
        synthetic(options, method="full", shape=options.shape, dist=name)
        for name in ("shared-prefix", "own-prefixes")
    ]

    def side(setting: Setting) -> Side:
        return lambda folder: run_ours(setting.job(folder, gradient_checkpointing=False))

    if (failure := gate(made[0])) is not None:
        yield failure
        return
    shared, own = in_turns([side(setting) for setting in made], made[0].folder, rounds=options.rounds)
    figures = [median(runs, lambda run: run.tokens_per_cpu_second) for runs in (shared, own)]
    yield {
        "unit": "tokens per CPU second; peer: ours over rows that share nothing",
        "ours": round(figures[0], 1),
        "peer": round(figures[1], 1),
        "ratio": round(figures[0] / figures[1], 3),
        "bar": 1.3,
        "met": figures[0] / figures[1] >= 1.3,
        "shape": options.shape,
        "dist": "system prompts of 256 tokens",
        "peak_bytes": [runs[0].peak_bytes for runs in (shared, own)],
    }


def matmul_share(options: Options) -> Iterator[dict[str, Any]]:
    """Model FLOPs a CPU second of our runs over the peak of a large matrix product on this machine."""
    for method in ("full", "lora"):
        for precision in ("fp32", "bf16"):
            here = Options(**{**vars(options), "precision": precision})
            setting = synthetic(here, method=method, shape=options.shape, dist=options.dist)
            lengths = [len(json.loads(line)["input_ids"]) for line in setting.tokens.open()]
            found = peak.best_flops_per_second(precision)
            run = run_ours(setting.job(setting.folder / "run", gradient_checkpointing=False))
            steady = peak.Work(
                tokens=run.steady_tokens,
                supervised=sum(step.supervised_tokens for step in run.steps[1:]),
                squares=float(sum(n * n for n in lengths[BATCH:])),
            )
            flops = peak.model_flops(models.SHAPES[setting.shape], steady, method=method)
            cpu = run.steps[-1].cpu_seconds - run.steps[0].cpu_seconds
            bar = 0.8 if precision == "fp32" else 0.55
            yield {
                "unit": "share of the measured matmul peak",
                "formula": peak.FORMULA[method],
                "method": method,
                "precision": precision,
                "shape": options.shape,
                "gflops": round(flops / cpu / 1e9, 1),
                "peak_gflops": round(found / 1e9, 1),
                "ours": round(flops / cpu / found, 3),
                "bar": bar,
                "met": flops / cpu / found >= bar,
            }


CASES: dict[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "full": lambda options: throughput(options, method="full"),
    "lora": lambda options: throughput(options, method="lora"),
    "qlora": lambda options: throughput(options, method="qlora"),
    "full-151k": lambda options: throughput(options, method="full", shape="30m-151k"),
    "lora-151k": lambda options: throughput(options, method="lora", shape="30m-151k"),
    "q-docs": lambda options: real_data(options, file="q_docs.jsonl"),
    "alpaca": lambda options: real_data(options, file="alpaca_en_demo.json"),
    "start": cold_start,
    "checkpoint": checkpoint,
    "prefix": prefix,
    "matmul-share": matmul_share,
}


# ---------------------------------------------------------------- a comparison


def compare(setting: Setting, *, gated: bool) -> Iterator[dict[str, Any]]:
    """Lines of one setting: as shipped, our best against TRL as shipped, our best against TRL's best."""
    options = setting.options
    if gated and (failure := gate(setting)) is not None:
        yield failure
        return
    sides: dict[str, Side] = {
        "ours": lambda folder: run_ours(setting.job(folder)),
        "ours without checkpointing": lambda folder: run_ours(
            setting.job(folder, gradient_checkpointing=False)
        ),
    }
    for mode in options.peers:
        sides[mode] = _peer_side(setting, mode)
    runs = dict(
        zip(
            sides, in_turns(list(sides.values()), setting.folder / "runs", rounds=options.rounds), strict=True
        )
    )
    speeds = {name: median(of, lambda run: run.tokens_per_cpu_second) for name, of in runs.items()}
    kind = (setting.method, setting.shape, options.precision)
    # On other lengths only the ratios of full training to TRL as shipped and at its best were asked for.
    others_bars = {"short": (None, 4.5, 2.7), "chat": (None, 3.0, 2.4)}.get(setting.dist, (None, None, None))
    shipped, default, best = BARS.get(kind, others_bars) if setting.dist == "lognormal" else others_bars
    ours, fast = "ours", "ours without checkpointing"
    if "default" in runs:
        yield _line(setting, runs, speeds, ours, "default", shipped)
        yield _line(setting, runs, speeds, fast, "default", default)
    others = [mode for mode in options.peers if mode != "default"]
    for mode in sorted(others, key=lambda mode: -speeds[mode]):
        is_best = mode == max(others, key=lambda mode: speeds[mode])
        yield _line(setting, runs, speeds, fast, mode, best if is_best else None)


def _peer_side(setting: Setting, mode: str) -> Side:
    module = "hf_trainer" if mode == "trainer" else "trl_sft"
    return lambda folder: run_peer(module, setting.peer(folder, mode))


def gate(setting: Setting) -> dict[str, Any] | None:
    """None where ours agrees with the reference; else the line that says so."""
    folder = setting.folder / "gate"
    folder.mkdir()
    few = folder / "rows.jsonl"
    _few_rows(setting, few)
    precision = {} if setting.method == "qlora" else {"precision": "fp32"}
    job = setting.job(folder, max_steps=1, max_grad_norm=0.0, **precision)
    job = job.model_copy(update={"training_path": str(few), "training_name": few.name})
    (folder / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    try:
        start(["-m", "bench.gate", str(folder / TRAINER_JOB_FILE)], folder / "output.txt")
    except SideFailed as error:
        return {"failed": f"the gate: {error}"}
    verdict = (folder / "output.txt").read_text().splitlines()[-1]
    print(json.dumps({"gate": json.loads(verdict)}), file=sys.stderr, flush=True)
    return None


def _line(
    setting: Setting,
    runs: dict[str, list[Measured]],
    speeds: dict[str, float],
    ours: str,
    peer: str,
    bar: float | None,
) -> dict[str, Any]:
    mine, theirs = runs[ours][0], runs[peer][0]
    same_steps = [step.tokens for step in mine.steps] == [step.tokens for step in theirs.steps]
    apart = (
        max(abs(a - b) / abs(b) for a, b in zip(mine.losses, theirs.losses, strict=True))
        if same_steps
        else abs(mine.mean_loss - theirs.mean_loss) / theirs.mean_loss
    )
    line = {"method": setting.method, "ours_is": ours, "peer_is": peer, "shape": setting.shape}
    packed_error = theirs.facts.get("packed_error")
    if same_steps and apart > LOSS_LIMIT:
        return {**line, "failed": f"losses of a step differ by {apart:.3g}: {mine.losses}, {theirs.losses}"}
    ratio = speeds[ours] / speeds[peer]
    return {
        **line,
        "unit": "un-padded tokens per CPU second",
        "ours": round(speeds[ours], 1),
        "peer": round(speeds[peer], 1),
        "ratio": round(ratio, 2),
        "bar": bar,
        "met": None if bar is None else ratio >= bar,
        "loss_ours": [round(loss, 4) for loss in mine.losses],
        "loss_peer": [round(loss, 4) for loss in theirs.losses],
        "loss_apart": float(f"{apart:.3g}"),
        "loss_compared": "step by step"
        if same_steps
        else "mean of the run: the peer's steps hold other rows",
        "peer_loss_right": None if packed_error is None else packed_error <= PACKED_LIMIT,
        "packed_error": packed_error,
        "peak_bytes_ours": mine.peak_bytes,
        "peak_bytes_peer": theirs.peak_bytes,
        "memory_ratio": round(mine.peak_bytes / theirs.peak_bytes, 2),
    }


# ---------------------------------------------------------------- settings


def synthetic(
    options: Options, *, method: str, shape: str, dist: str, device: str = "cpu", **size: int
) -> Setting:
    """A model of `shape` and rows of `dist`, made on the spot; `size`: batch, max_length."""
    folder = _new_folder(options, f"{method}-{shape}-{dist}")
    corpus, data = folder / "corpus.jsonl", folder / "rows.jsonl"
    rows.write_corpus(corpus, seed=options.seed)
    tokenizer = models.build_tokenizer(corpus, models.SHAPES[shape])
    words = rows.Words(tokenizer, seed=options.seed)
    num_rows = options.steps * size.get("batch", BATCH)
    if dist.endswith(("-prefix", "-prefixes")):
        rows.write_prefixed_rows(data, words, num_rows=num_rows, prefix=256, shared=dist == "shared-prefix")
    else:
        rows.write_rows(data, words, num_rows=num_rows, dist=dist, seed=options.seed)
    # Weights of the large shapes are kept in bf16, as hubs have them.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = models.build(
        folder / "model", models.SHAPES[shape], tokenizer, seed=options.seed, dtype=dtype, device=device
    )
    return _with_tokens(
        Setting(options, folder, shape, method, model, data, folder / "tokens.jsonl", dist, device, **size)
    )


def real(options: Options, *, method: str, file: Path) -> Setting:
    """The first rows of a real file, with a tokenizer trained on all of it."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; give its folder with --data-dir")
    folder = _new_folder(options, f"{method}-{file.stem}")
    num_rows = options.steps * BATCH
    data = folder / f"rows{file.suffix}"
    if file.suffix == ".json":
        data.write_text(json.dumps(json.loads(file.read_text())[:num_rows]))
    else:
        data.write_text("".join(file.read_text().splitlines(keepends=True)[:num_rows]))
    tokenizer = models.build_tokenizer(file, models.SHAPES[options.shape])
    model = models.build(folder / "model", models.SHAPES[options.shape], tokenizer, seed=options.seed)
    return _with_tokens(
        Setting(options, folder, options.shape, method, model, data, folder / "tokens.jsonl", file.stem)
    )


def _with_tokens(setting: Setting) -> Setting:
    rows.write_tokens(setting.tokens, setting.job(setting.folder))
    return setting


def _few_rows(setting: Setting, path: Path) -> None:
    """Four rows for the gate, of different lengths; the reference keeps full logits, so none of the longest."""
    if setting.data.suffix == ".json":
        found = [json.dumps(row) for row in json.loads(setting.data.read_text())]
    else:
        found = setting.data.read_text().splitlines()
    by_size = sorted(found, key=len)
    chosen = [by_size[len(by_size) * share // 100] for share in (10, 30, 50, 70)]
    path.write_text("\n".join(chosen) + "\n")


def _new_folder(options: Options, name: str) -> Path:
    folder = options.work / f"{len(list(options.work.iterdir()))}-{name}"
    folder.mkdir()
    return folder


def _frozen_dtype(precision: str, mode: str) -> str:
    """Frozen weights as TRL ships them are fp32; at its best it keeps them in bf16, as we do."""
    return "bfloat16" if precision == "bf16" and mode != "default" else "float32"


# ---------------------------------------------------------------- figures


def save_pause(run: Measured, *, every: int) -> float:
    """Seconds between two steps with a save in between, less the seconds without; medians."""
    gaps = [
        (step.step, after.begun_at - step.at) for step, after in zip(run.steps, run.steps[1:], strict=False)
    ]
    with_save = sorted(gap for step, gap in gaps if step % every == 0)
    without = sorted(gap for step, gap in gaps if step % every != 0)
    return with_save[len(with_save) // 2] - without[len(without) // 2]


def step_seconds(run: Measured) -> float:
    """Median wall seconds of a step."""
    found = sorted(step.at - step.begun_at for step in run.steps[1:])
    return found[len(found) // 2]


def facts(options: Options, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a figure depends on, but for what a case has settled itself."""
    found: dict[str, Any] = {
        "precision": options.precision,
        "seed": options.seed,
        "dist": options.dist,
        "steps": options.steps,
        "rounds": options.rounds,
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }
    return {name: value for name, value in found.items() if name not in (known or {})}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="full", help=f"comma-separated: {', '.join(CASES)}; or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dist", choices=rows.DISTS, default="lognormal")
    parser.add_argument("--shape", choices=list(models.SHAPES), default="30m")
    parser.add_argument("--rounds", type=int, default=1, help="turns there and back")
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps of 8 rows; the first is left out"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--peers", default="default,packing,padding_free,single", help="of TRL; also: trainer (transformers')"
    )
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
