"""The README's own examples, run as they stand against a running service."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.conftest import ROOT, Service

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- test: (\w+) -->\n```(bash|python)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("name", "language", "code"), BLOCKS, ids=[block[0] for block in BLOCKS])
def test_the_examples_of_the_readme_run(
    name: str, language: str, code: str, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    small = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **service.environment, "MODEL": service.model, "PATH": small,
        "GITHUB_SHA": "0" * 40, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }  # fmt: skip
    if language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", code]
    else:
        python = ROOT / ".venv-openai-3/bin/python" if name == "openai" else sys.executable
        command = [str(python), "-c", f"MODEL = {service.model!r}\n{code}"]

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if name == "cli":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
        assert "loss" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    if name == "ci":
        assert 'failures="0"' in (tmp_path / "sftd.xml").read_text()
        assert "| met |" in (tmp_path / "summary.md").read_text()
    if name == "curl":
        assert list(tmp_path.glob("job_*/adapter_model.safetensors"))
    if name == "openai":
        assert done.stdout.startswith("ft:")
    if name == "python":
        assert (tmp_path / "result" / "adapter_model.safetensors").exists()


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 230
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_the_python_example_runs(service: Service, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "submit.py"), service.model],
        cwd=tmp_path, env=service.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "evaluation loss" in done.stdout


def test_the_experiments_script_runs_its_sizes(service: Service, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "Qwen2.5-1.5B-Instruct").symlink_to(service.model)
    data = str(ROOT / "examples" / "q_basics.jsonl")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ, "MODELS": str(models), "TRAIN": data, "EVAL": data, "OUT": str(tmp_path / "out"),
        "SIZES": "1.5B", "MAX_STEPS": "2", "EXTRA": "--device cpu --warmup_steps 1", "PATH": path,
    }  # fmt: skip

    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "run_sft_exps.sh")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "1.5B" / "Qwen2.5-1.5B-Instruct" / "results" / "model.safetensors").exists()
