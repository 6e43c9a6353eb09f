"""The whole way of a job on this machine: `make demo`.

Starts server and worker on loopback over a fresh data folder, builds a small model with random weights (nothing is
downloaded), posts a LoRA job on examples/q_basics.jsonl, follows it, and shows what came out. Exit code 0 only if the
job succeeded and the evaluation loss fell.
"""

import argparse
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
DATA_FILE = ROOT / "examples" / "q_basics.jsonl"
QUESTIONS = [
    "How do I make a list of the first 5 natural numbers in q?",
    "How do I join two lists in q?",
    "Select the rows of table t where price is over 10.",
]


def main() -> None:
    """Run the demo; `--data DIR` keeps its folder elsewhere, `--steps N` trains longer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "demo-data")
    parser.add_argument("--steps", type=int, default=128)
    args = parser.parse_args()
    data = args.data.resolve()
    shutil.rmtree(data, ignore_errors=True)
    model = build_model(data / "models" / "tiny-q")
    with service(data) as url:
        job_id, exit_code = train(url, data, args.steps)
        if exit_code:
            sys.exit(f"demo: the job did not succeed (sftd show {job_id})")
        fell = show(url, data, job_id, model)
    if not fell:
        sys.exit("demo: the evaluation loss did not fall")


def build_model(folder: Path) -> Path:
    """The model that is fine-tuned: random weights, its tokenizer trained on the example data."""
    print(f"Building a small model with random weights in {folder}")
    script = str(ROOT / "examples" / "tiny_model.py")
    subprocess.run(
        [sys.executable, script, str(folder), str(DATA_FILE)], check=True, stderr=subprocess.DEVNULL
    )
    return folder


@contextmanager
def service(data: Path) -> Iterator[str]:
    """`sftd up` as a person would start it; its address."""
    port = free_port()
    log = (data / "service.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "sftd.cli", "up", "--data", str(data), "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, data)
        print(f"Server and worker are up at {url} (their log: {log.name})")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str, data: Path) -> None:
    """Until /healthz answers; a service that ends before is shown."""
    for _ in range(300):
        if process.poll() is not None:
            sys.exit(f"demo: the service did not start:\n{(data / 'service.log').read_text()}")
        try:
            if httpx.get(f"{url}/healthz", timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    sys.exit("demo: the service did not answer within 30 s")


def train(url: str, data: Path, steps: int) -> tuple[str, int]:
    """Post the job by the command line and follow it; (job id, exit code)."""
    spec = data / "demo.yaml"
    spec.write_text(
        f"base_model: {data / 'models' / 'tiny-q'}\n"
        f"training_file: {DATA_FILE}\n"
        "method: lora\nname: demo\nvalidation_split: 0.1\nmax_seq_length: 512\n"
        f"max_steps: {steps}\nwarmup_steps: 10\nlearning_rate: 3.0e-3\nlr_scheduler: cosine\n"
        "batch_size: 8\ngradient_accumulation_steps: 2\nsave_steps: 32\neval_steps: 32\n"
        "gradient_checkpointing: false\nlora: {rank: 32, alpha: 64, dropout: 0.05}\n"
    )
    environment = {**os.environ, "SFTD_URL": url, "SFTD_API_KEY": (data / "admin.key").read_text().strip()}
    followed = subprocess.run(
        [sys.executable, "-m", "sftd.cli", "submit", str(spec), "--follow"], env=environment, check=False
    )
    newest = get(url, data, "/jobs")["data"][0]
    return newest["id"], followed.returncode


def show(url: str, data: Path, job_id: str, model: Path) -> bool:
    """Print what the job left; did the evaluation loss fall?"""
    job = get(url, data, f"/jobs/{job_id}")
    points = [
        p for p in get(url, data, f"/jobs/{job_id}/metrics?limit=5000")["data"] if p.get("loss") is not None
    ]
    evaluations = get(url, data, f"/jobs/{job_id}/evaluations")["data"]
    checkpoints = get(url, data, f"/jobs/{job_id}/checkpoints")["data"]
    result = Path(job["folder"]) / "results"
    first, last = evaluations[0], evaluations[-1]
    print(
        f"\nLoss             {points[0]['loss']:.3f} at step {points[0]['step']}, {points[-1]['loss']:.3f} at step {points[-1]['step']}"
    )
    print(f"Evaluation loss  {first['eval_loss']:.3f} before, {last['eval_loss']:.3f} after")
    print(f"Token accuracy   {first['token_accuracy']:.1%} before, {last['token_accuracy']:.1%} after")
    for checkpoint in sorted(checkpoints, key=lambda c: int(c["step"])):
        print(
            f"Checkpoint       step {checkpoint['step']}, {checkpoint['bytes'] / 1e6:.1f} MB, {len(checkpoint['files'])} files"
        )
    print(f"Result           {result}")
    print("\nAnswers (the model is tiny and knew nothing: expect form, not sense)")
    for question, (before, after) in zip(QUESTIONS, answers(model, result), strict=True):
        print(f"\n  Q       {question}\n  before  {before}\n  after   {after}")
    return bool(last["eval_loss"] < first["eval_loss"])


def answers(model: Path, adapter: Path) -> list[tuple[str, str]]:
    """(before, after) training for every question."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(model)

    def ask(net: Any, question: str) -> str:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = net.generate(**inputs, max_new_tokens=40, do_sample=False)
        return repr(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    before = [ask(base, question) for question in QUESTIONS]
    trained = PeftModel.from_pretrained(base, adapter)
    return list(zip(before, [ask(trained, question) for question in QUESTIONS], strict=True))


def get(url: str, data: Path, path: str) -> Any:
    """One GET with the admin key, as curl would do it."""
    key = (data / "admin.key").read_text().strip()
    answer = httpx.get(url + path, headers={"Authorization": f"Bearer {key}"}, timeout=30)
    answer.raise_for_status()
    return answer.json()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
