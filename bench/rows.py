"""Rows of the benches: text whose number of tokens is known, and the same rows as tokens for the peers.

Text goes through our ordinary data path. The peers are given the tokens and labels that came out of it, in the order
in which our plan takes them: the same rows with the same mask in the same step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from sftd.protocol import TrainerJob
from sftd_worker.trainer.batching import make_plan
from sftd_worker.trainer.checkpoint import hash_file
from sftd_worker.trainer.data import Tokenizing, choose_rows, tokenize_file
from sftd_worker.trainer.model import load_tokenizer

DISTS = ("lognormal", "short", "chat", "fixed")
NUM_WORDS = 8_000
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def write_corpus(path: Path, *, seed: int) -> None:
    """Text to train the tokenizer on: made-up words, the frequent ones far more often than the rare (Zipf)."""
    rng = np.random.default_rng(seed)
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    words = sorted({"".join(rng.choice(syllables, size)) for size in rng.integers(2, 5, 3 * NUM_WORDS)})
    rng.shuffle(words)
    with path.open("w") as file:
        for _ in range(400):
            text = " ".join(words[i] for i in _zipf(rng, len(words), 1000))
            file.write(json.dumps({"text": text}) + "\n")
        file.write(json.dumps({"text": " ".join(words)}) + "\n")


class Words:
    """Text by the token: each word, with the space before it, is one token of the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        known = sorted(t[1:] for t in tokenizer.get_vocab() if t.startswith("Ġ") and t[1:].isalpha())
        self._words = [word for word in known if len(tokenizer(" " + word)["input_ids"]) == 1]
        self._rng.shuffle(self._words)

    def text(self, num_tokens: int) -> str:
        return "".join(" " + self._words[i] for i in _zipf(self._rng, len(self._words), num_tokens))


def _zipf(rng: np.random.Generator, num_words: int, size: int) -> np.ndarray:
    """Ranks 0 … num_words - 1 with probability proportional to 1 / (rank + 10)."""
    weights = 1.0 / (np.arange(num_words) + 10)
    return rng.choice(num_words, size, p=weights / weights.sum())


def write_rows(path: Path, words: Words, *, num_rows: int, dist: str, seed: int) -> None:
    """JSONL of `num_rows` rows whose lengths follow `dist`; lengths are of the words, without the template's tokens.

    lognormal: prompt + completion of 50-1,500 tokens, median 300; short: 10-120, median 40; fixed: 512;
    for GPUs: skewed: 50-4,000, median 600; long: 4,000;
    chat: conversations of 2-8 turns of 5-400 tokens each. Of a pair, 30-70 % are prompt.
    """
    rng = np.random.default_rng([seed, 1])
    with path.open("w") as file:
        for _ in range(num_rows):
            file.write(json.dumps(_chat(rng, words) if dist == "chat" else _pair(rng, words, dist)) + "\n")


def write_prefixed_rows(path: Path, words: Words, *, num_rows: int, prefix: int, shared: bool) -> None:
    """Rows that begin with a system prompt of `prefix` tokens: the same in all of them, or one of its own in each.

    The prompts that differ do so from the first word on, and have the same length: what is left to compute is the
    same, but nothing can be shared.
    """
    rng = np.random.default_rng(5)
    common = words.text(prefix)
    with path.open("w") as file:
        for _ in range(num_rows):
            own = words.text(prefix)  # drawn in both cases, so that the rest of the row is the same size
            question, answer = words.text(int(rng.integers(20, 80))), words.text(int(rng.integers(40, 160)))
            messages = [("system", common if shared else own), ("user", question), ("assistant", answer)]
            row = {"messages": [{"role": role, "content": content} for role, content in messages]}
            file.write(json.dumps(row) + "\n")


def _pair(rng: np.random.Generator, words: Words, dist: str) -> dict[str, Any]:
    total = {"fixed": 512, "long": 4000}.get(dist, 0)
    if dist == "skewed":
        total = int(np.clip(rng.lognormal(np.log(600), 0.9), 50, 4000))
    elif dist == "lognormal":
        total = int(np.clip(rng.lognormal(np.log(300), 0.8), 50, 1500))
    elif dist == "short":
        total = int(np.clip(rng.lognormal(np.log(40), 0.6), 10, 120))
    prompt = max(1, int(total * rng.uniform(0.3, 0.7)))
    return {"prompt": words.text(prompt), "completion": words.text(total - prompt)}


def _chat(rng: np.random.Generator, words: Words) -> dict[str, Any]:
    messages = []
    for _ in range(int(rng.integers(1, 5))):
        for role in ("user", "assistant"):
            length = int(np.clip(rng.lognormal(np.log(80), 0.8), 5, 400))
            messages.append({"role": role, "content": words.text(length)})
    return {"messages": messages}


def tokenized(job: TrainerJob) -> Dataset:
    """All rows of a job's training file as the trainer tokenises them, in the order of the file."""
    tokenizer, template, _ = load_tokenizer(job)
    path = Path(job.training_path)
    return tokenize_file(
        path,
        sha256=hash_file(path),
        name=job.training_name,
        how=Tokenizing(tokenizer, template, job.spec.train_on),
        cache_dir=Path(job.cache_dir),
    )


def order_of_rows(job: TrainerJob, num_rows: int) -> list[int]:
    """Indices of a job's rows in the order that its steps see them."""
    spec = job.spec
    plan = make_plan(
        num_rows=num_rows,
        rows_per_step=spec.batch_size * spec.gradient_accumulation_steps,
        max_steps=spec.max_steps,
        num_epochs=spec.num_epochs,
        seed=spec.seed,
    )
    return [row for step in range(plan.total_steps) for row in plan.rows_of_step(step)]


def write_tokens(path: Path, job: TrainerJob) -> int:
    """The rows that a job trains on, as JSONL of input_ids and labels (-100: not learned), in the order of its steps.

    Returns the length of the longest.
    """
    spec = job.spec
    rows = choose_rows(
        tokenized(job),
        name=job.training_name,
        max_seq_length=spec.max_seq_length,
        on_overlong=spec.on_overlong,
    )
    with path.open("w") as file:
        for index in order_of_rows(job, len(rows)):
            ids, supervised = rows.row(index)
            labels = np.where(supervised, ids, -100)
            labels[0] = -100  # has no predecessor
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")
    return int(rows.lengths.max())
