"""What is counted for a plan is what a run comes to: the same rows, masks, steps, micro-batches and parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.trainer.harness import Q_BASICS, Finished

from sftd.footprint import adapter_parameters, trainable_parameters
from sftd.plan import PlanProblem, RenderedRow
from sftd.protocol import (
    ANALYSIS_FILE,
    ANALYSIS_RESULT_FILE,
    Analysis,
    AnalysisJob,
    AnalysisReport,
    AnalysisRequest,
    InputFile,
    TrainerJob,
)
from sftd.spec import JobSpec
from sftd_worker.trainer import analysis
from sftd_worker.trainer.checkpoint import hash_file

Analyse = Callable[..., Analysis]


@pytest.fixture
def analyse(tiny: Path, tmp_path: Path) -> Analyse:
    """Count a file, or rows given here; keyword arguments are fields of the spec."""

    def go(
        training: Path | list[Any],
        *,
        validation: Path | list[Any] | None = None,
        lines: list[int] | None = None,
        model: Path = tiny,
        **fields: Any,
    ) -> Analysis:
        first, second = (path_of(rows, tmp_path) for rows in (training, validation))
        assert first is not None
        spec = JobSpec.model_validate(
            {"base_model": str(model), "training_file": "file_1", "max_seq_length": 512, **fields}
        )
        request = AnalysisRequest(
            spec=spec,
            training_file=input_file("file_1", first),
            validation_file=input_file("file_2", second) if second else None,
            lines=lines,
        )
        job = AnalysisJob(
            request=request,
            model_path=str(model),
            training_path=str(first),
            validation_path=str(second) if second else None,
            cache_dir=str(tmp_path / "cache"),
            local_files_only=True,
        )
        (tmp_path / ANALYSIS_FILE).write_text(job.model_dump_json())
        analysis.analyse(tmp_path)
        report = AnalysisReport.model_validate_json((tmp_path / ANALYSIS_RESULT_FILE).read_text())
        assert report.analysis is not None, report.error
        return report.analysis

    return go


def path_of(rows: Path | list[Any] | None, folder: Path) -> Path | None:
    if not isinstance(rows, list):
        return rows
    path = folder / f"rows-{abs(hash(json.dumps(rows)))}.jsonl"
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def derived_of(finished: Finished) -> dict[str, Any]:
    """What a run said of itself."""
    whole: dict[str, Any] = yaml.safe_load((finished.folder / "config.yaml").read_text())
    return dict(whole["derived"])


def input_file(file_id: str, path: Path) -> InputFile:
    return InputFile(
        file_id=file_id,
        filename=path.name,
        sha256=hash_file(path),
        bytes=path.stat().st_size,
        path=path.name,
    )


def row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def numbered(num: int) -> list[dict[str, str]]:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    return [
        row(f"say {i}", " ".join(f"{word}{i * 7 % 13}" for word in words[: 3 + i % 7])) for i in range(num)
    ]


def told(problems: list[PlanProblem]) -> list[tuple[int | None, str | None]]:
    return [(problem.line, problem.row_field) for problem in problems if problem.severity == "error"]


def learned(rendered: RenderedRow) -> str:
    return "".join(segment.text for segment in rendered.segments if segment.supervised)


@pytest.mark.parametrize("spec", [{}, {"method": "full"}, {"packing": False}, {"on_overlong": "truncate"}])
def test_counts_are_those_of_the_run(
    spec: dict[str, Any],
    analyse: Analyse,
    make_job: Callable[..., TrainerJob],
    run_job: Callable[..., Finished],
) -> None:
    fields = {"num_epochs": 1, "validation_split": 0.2, "max_seq_length": 96, "on_overlong": "drop", **spec}
    fields["max_steps"] = None
    job = make_job(**fields)
    derived = derived_of(run_job(**fields))
    run = job.spec

    counted = analyse(
        Path(job.training_path), **run.model_dump(exclude={"training_file", "base_model"}, exclude_none=True)
    )

    assert counted.steps is not None
    assert counted.training is not None
    assert counted.validation is not None
    assert counted.model is not None
    assert counted.packing is not None
    assert counted.steps.total_steps == derived["total_steps"]
    assert counted.steps.rows_per_step == derived["rows_per_step"]
    assert counted.steps.warmup_steps == derived["warmup_steps"]
    assert counted.training.num_used == derived["num_rows"]
    assert counted.validation.num_used == derived["num_eval_rows"]
    share = counted.training.supervised_tokens.total / counted.training.tokens.total
    assert share == pytest.approx(derived["supervised_share"], abs=1e-4)
    assert trainable_parameters(run, counted.model) == derived["trainable_parameters"]
    added = 0 if run.method == "full" else derived["trainable_parameters"]
    assert counted.model.parameters + added == derived["parameters"]


def test_every_problem_is_told_with_its_line(analyse: Analyse) -> None:
    rows: list[Any] = [row(f"q{i}", f"a{i}") for i in range(60)]
    for i in range(10, 50):
        rows[i] = {"prompt": f"q{i}"} if i % 2 else row(f"q{i}", " ")
    rows[55] = "{not json"

    counted = analyse(rows)

    assert counted.num_problems == 41
    assert [line for line, _ in told(counted.problems)] == [*range(11, 51), 56]
    assert counted.training is not None
    assert counted.training.num_used == 19
    assert counted.training.num_rows == 60
    problem = next(problem for problem in counted.problems if problem.line == 11)
    assert (problem.field, problem.file) == ("training_file", "file_1")
    assert problem.message
    assert problem.remedy


def test_a_file_with_mistakes_leaves_no_tokens_for_a_run(analyse: Analyse, tmp_path: Path) -> None:
    analyse([row("q", "a"), {"prompt": "q"}])

    assert not [p.name for p in (tmp_path / "cache").iterdir() if p.suffixes == [".arrow"]]


def test_a_second_count_tells_the_same_from_the_cache(analyse: Analyse) -> None:
    rows = [*numbered(20), {"prompt": "q"}, {"text": "another format"}]

    first, second = analyse(rows), analyse(rows)

    assert first == second
    assert first.training is not None
    assert first.training.formats == {"prompt_completion": 20, "text": 1}


@pytest.mark.parametrize("on_overlong", ["error", "truncate", "drop"])
def test_long_rows_are_told_by_line(on_overlong: str, analyse: Analyse) -> None:
    rows = [row("say it", "word " * length) for length in (5, 200, 5, 300)]
    rows.append(row("word " * 200, "yes"))  # nothing of the answer is left after the cut

    counted = analyse(rows, max_seq_length=64, on_overlong=on_overlong)

    part = counted.training
    assert part is not None
    assert part.overlong.lines == [2, 4, 5]
    if on_overlong == "drop":
        assert (part.dropped.lines, part.truncated.lines, part.fully_masked.lines) == ([2, 4, 5], [], [])
    else:
        assert (part.dropped.lines, part.truncated.lines, part.fully_masked.lines) == ([5], [2, 4], [5])
    assert told(counted.problems) == ([(2, "row"), (4, "row"), (5, "row")] if on_overlong == "error" else [])
    assert part.tokens.max <= 64


def test_rows_are_rendered_with_what_is_learned_marked(analyse: Analyse) -> None:
    counted = analyse([row("What is 2+2?", "It is 4."), row("3+3?", "6")])

    assert counted.training is not None
    shown = counted.training.examples[0]
    assert (shown.line, learned(shown)) == (1, "It is 4.<|im_end|>")
    whole = "".join(segment.text for segment in shown.segments)
    assert whole.startswith("<|im_start|>user\nWhat is 2+2?<|im_end|>")
    assert shown.num_supervised == counted.training.supervised_tokens.max


def test_repeats_are_counted_within_and_between_files(analyse: Analyse) -> None:
    rows = numbered(30)
    longer = row("say much", " ".join(f"word{i}" for i in range(60)))
    nearly = row("say much", " ".join(f"word{i}" for i in range(59)) + " other")

    counted = analyse([*rows, rows[4], longer], validation=[rows[6], nearly, row("new", "something else")])

    assert counted.training is not None
    assert counted.training.exact_duplicates.count == 1
    assert counted.training.exact_duplicates.examples[0].lines == [5, 31]
    assert counted.overlap is not None
    assert counted.overlap.exact.count == 1
    assert counted.overlap.exact.examples[0].lines == [7, 1]
    assert counted.overlap.near is not None
    assert [found.lines for found in counted.overlap.near.examples] == [[32, 2]]


def test_histograms_count_every_row(analyse: Analyse) -> None:
    counted = analyse(Q_BASICS)

    assert counted.training is not None
    for histogram in (counted.training.tokens, counted.training.supervised_tokens):
        assert sum(histogram.counts) == counted.training.num_used
        assert len(histogram.edges) == len(histogram.counts) + 1
        assert (histogram.edges[0], histogram.edges[-1]) == (histogram.min, histogram.max)


def test_packing_never_fills_a_micro_batch_beyond_its_budget(analyse: Analyse) -> None:
    packed = analyse(Q_BASICS, batch_size=4, max_tokens_per_step=256)
    padded = analyse(Q_BASICS, batch_size=4, packing=False)

    assert packed.packing is not None
    assert padded.packing is not None
    assert 128 < packed.packing.max_tokens <= 256
    assert packed.packing.efficiency == 1
    assert padded.packing.efficiency == padded.packing.padded_efficiency < 1


def test_a_preview_shows_the_lines_that_were_asked_for(analyse: Analyse) -> None:
    rows = [*numbered(5), {"prompt": "no completion"}, *numbered(3)]

    counted = analyse(rows, lines=[2, 6, 8, 40])

    assert [shown.line for shown in counted.rows] == [2, 8]
    assert [problem.line for problem in counted.problems] == [6]


def test_unknown_target_modules_are_named_with_those_there_are(analyse: Analyse) -> None:
    counted = analyse(numbered(8), lora={"target_modules": ["q_proj", "querry"]})

    (problem,) = [problem for problem in counted.problems if problem.severity == "error"]
    assert problem.field == "lora.target_modules"
    assert "'querry'" in problem.message
    assert "v_proj" in (problem.remedy or "") + problem.message
    assert counted.model is not None


def test_a_missing_model_is_told_as_a_problem_of_base_model(analyse: Analyse, tmp_path: Path) -> None:
    counted = analyse(numbered(8), model=tmp_path / "nowhere")

    assert [problem.field for problem in counted.problems] == ["base_model"]


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"rank": 4, "target_modules": ["q_proj", "down_proj"]}]
)
def test_adapter_parameters_are_those_that_peft_makes(
    lora: dict[str, Any],
    analyse: Analyse,
    make_job: Callable[..., TrainerJob],
    run_job: Callable[..., Finished],
) -> None:
    derived = derived_of(run_job(max_steps=1, lora=lora))

    counted = analyse(Q_BASICS, lora=lora)

    assert counted.model is not None
    spec = make_job(max_steps=1, lora=lora).spec
    assert adapter_parameters(spec, counted.model) == derived["trainable_parameters"]


def test_good_rows_beside_an_unreadable_one_are_all_counted(analyse: Analyse) -> None:
    counted = analyse([*numbered(300), "{not json"])

    assert counted.training is not None
    assert (counted.training.num_used, counted.training.num_rows) == (300, 301)
    assert [line for line, _ in told(counted.problems)] == [301]


def test_the_longest_run_costs_no_more_than_a_short_one(analyse: Analyse) -> None:
    counted = analyse(numbered(20), max_steps=10**9, eval_steps=1, validation_split=0.2)

    assert counted.steps is not None
    assert counted.steps.num_evaluations == 10**9 + 1


def test_a_long_row_behind_the_steps_that_are_laid_out_still_counts(
    analyse: Analyse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "_STEPS_LAID_OUT", 3)
    rows = [*numbered(60), row("say much", "word " * 300)]

    for seed in range(4):
        counted = analyse(rows, seed=seed, batch_size=2, gradient_accumulation_steps=1, max_seq_length=512)
        assert counted.largest_tokens >= counted.longest_row > 300


def test_a_row_of_very_many_turns_is_shortened(analyse: Analyse) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(400)]

    counted = analyse([{"messages": turns}] * 2, max_seq_length=8192)

    assert counted.training is not None
    assert len(counted.training.examples[0].segments) == 100
    assert counted.training.examples[0].shortened


def test_half_of_what_is_kept_of_a_file_with_mistakes_is_made_anew(analyse: Analyse, tmp_path: Path) -> None:
    rows = [*numbered(12), {"prompt": "q"}]
    first = analyse(rows)
    for kept in (tmp_path / "cache").glob("*.partial.arrow"):
        kept.unlink()

    assert analyse(rows) == first


def test_problems_beyond_those_that_are_told_are_counted(
    analyse: Analyse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "MAX_PLAN_PROBLEMS", 5)
    counted = analyse([*[row(f"q{i}", " ") for i in range(8)], *numbered(3)])

    assert len([problem for problem in counted.problems if problem.line]) == 5
    assert counted.num_problems == 8


def test_a_file_of_which_no_row_is_left_is_told_as_a_problem(analyse: Analyse) -> None:
    counted = analyse([row("say much", "word " * 200)] * 3, max_seq_length=64, on_overlong="drop")

    (problem,) = [problem for problem in counted.problems if problem.severity == "error"]
    assert (problem.field, problem.file) == ("training_file", "file_1")
    assert "no row is left" in problem.message
    assert counted.training is None
