"""What the fault harness's trainer computes: pure functions of (seed, step), so that a lost, repeated or foreign step shows.

Shared by the trainer (a bare interpreter) and the checker; the standard library only.
"""

import hashlib

NAN = "NaN"  # as it travels


def metrics(seed: int, step: int) -> dict[str, float | str]:
    """The metrics of a step."""
    share = _number(f"loss {seed} {step}")
    odd = NAN if step % 7 == 0 else _number(f"odd {seed} {step}") * 1e300
    return {"loss": 1 / step + share, "grad_norm": share * 3, "odd": odd, "tokens_seen": float(step * 1000)}


def evaluation(seed: int, step: int) -> dict[str, float]:
    """The evaluation at a step."""
    loss = _number(f"eval {seed} {step}")
    return {
        "step": step, "eval_loss": loss, "perplexity": 1 + loss, "token_accuracy": 1 - loss, "num_tokens": 100 + step,
    }  # fmt: skip


def log_line(seed: int, step: int) -> str:
    """The line that a step writes into the job's log."""
    return f"step {step} of seed {seed}"


def start(seed: int) -> bytes:
    """The weights before the first step."""
    return hashlib.sha256(f"start {seed}".encode()).digest()


def advance(weights: bytes, seed: int, step: int) -> bytes:
    """The weights after a step: a chain, which tells whether every step was made once, in order."""
    return hashlib.sha256(weights + f"{seed} {step}".encode()).digest()


def weights_after(seed: int, step: int) -> bytes:
    """The weights that an undisturbed run has after a step."""
    weights = start(seed)
    for done in range(1, step + 1):
        weights = advance(weights, seed, done)
    return weights


def file_of(weights: bytes, kind: str) -> bytes:
    """A file of a checkpoint or a result: some kilobytes that stand for the weights. They begin with them."""
    return weights + hashlib.shake_256(weights + kind.encode()).digest(6000)


def _number(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
