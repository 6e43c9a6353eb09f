"""The oracles: transformers' Trainer and TRL's SFTTrainer give the same run on the same rows in the same order.

Same per-step losses, learning rates and gradient norms, same final weights, in fp32: for all weights and for an
adapter, packed here and padded (or flattened, TRL's `padding_free`) there.

Where a peer's default is something else than the mean over the step's learned tokens, the peer is told so, and not the
other way round: SFTTrainer adds a load-balancing loss to a mixture of experts unless `router_aux_loss_coef` is 0.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.comparison import assert_same_movement, assert_same_series, saved_weights
from tests.trainer.harness import Q_BASICS, Finished
from tests.trainer.reference import (
    PeerRun,
    run_sft_trainer,
    run_sft_trainer_on_messages,
    run_transformers_trainer,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from sftd.protocol import TrainerJob

RunJob = Callable[..., Finished]
MakeJob = Callable[..., TrainerJob]
Peer = Callable[[TrainerJob, Path], PeerRun]

# Two rows at once, four times a step. The decay is strong enough to show in the weights which of them it acts on. With
# a warm-up the first step, at rate 0, only fills AdamW's moments: its direction is the sign of each gradient, of which
# the smallest are rounding.
BASE: dict[str, Any] = {
    "max_steps": 20,
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "save_steps": 100,
    "gradient_checkpointing": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "learning_rate": 1e-3},
    "lora": {"method": "lora", "learning_rate": 1e-3, "lora": {"rank": 8, "alpha": 16, "dropout": 0.0}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear, never over the limit": {"max_grad_norm": 100.0},
    "cosine, always clipped": {"lr_scheduler": "cosine", "max_grad_norm": 0.05},
    "constant, no limit": {"lr_scheduler": "constant", "max_grad_norm": 0.0},
}


def flattened(job: TrainerJob, folder: Path) -> PeerRun:
    return run_sft_trainer(job, folder, padding_free=True)


PEERS: dict[str, Peer] = {
    "Trainer": run_transformers_trainer,
    "SFTTrainer": run_sft_trainer,
    "SFTTrainer, padding free": flattened,
}
PAIRS = [
    *((setting, "Trainer") for setting in SETTINGS),
    ("cosine, always clipped", "SFTTrainer"),
    ("linear, never over the limit", "SFTTrainer, padding free"),
]


def assert_same_as_peer(ours: Finished, peer: PeerRun, start: Path, *, slack: float = 1.0) -> None:
    """`start` holds the weights that both began with: the base model, or the first adapter."""
    assert ours.end is not None
    assert ours.end.outcome == "succeeded", ours.end.message
    for name, theirs in (("loss", peer.loss), ("grad_norm", peer.grad_norm)):
        assert_same_series(name, list(ours.values(name).values()), theirs, rtol=1e-5, mean_rtol=1e-6)
    rates = list(ours.values("learning_rate").values())
    assert_same_series("learning_rate", rates, peer.learning_rate, rtol=1e-12, mean_rtol=1e-12)
    assert_same_movement(
        saved_weights(ours.folder / "results"),
        peer.weights,
        saved_weights(start),
        rtol=slack * 1e-4,
        mean_rtol=slack * 1e-5,
    )


@pytest.mark.parametrize(("setting", "peer"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_that_of_the_peer(
    method: str,
    setting: str,
    peer: str,
    run_job: RunJob,
    make_job: MakeJob,
    tiny: Path,
    first_adapter: Path,
    tmp_path: Path,
) -> None:
    start = first_adapter if method == "lora" else tiny
    fields = {**BASE, **METHODS[method], **SETTINGS[setting]}
    fields["job"] = {"adapter_path": str(start)} if method == "lora" else {}

    ours = run_job("ours", **fields)
    theirs = PEERS[peer](make_job("peer", **fields), tmp_path / "peer")

    assert_same_as_peer(ours, theirs, start)
    clipped = {0.0 < fields["max_grad_norm"] < norm for norm in theirs.grad_norm}
    assert clipped == {setting == "cosine, always clipped"}


def test_conversations_are_the_tokens_and_the_mask_that_sft_trainer_makes_of_them(
    run_job: RunJob, make_job: MakeJob, tiny: Path, tmp_path: Path
) -> None:
    """The tokens are TRL's own here, rendered by the same template and masked by its markers."""
    fields = {**BASE, **METHODS["full"]}
    messages = [json.loads(line)["messages"] for line in Q_BASICS.read_text().splitlines()]

    ours = run_job("ours", **fields)
    theirs = run_sft_trainer_on_messages(make_job("peer", **fields), tmp_path / "peer", messages)

    assert_same_as_peer(ours, theirs, tiny)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rank": 4, "alpha": 8}, {"r": 4, "lora_alpha": 8}),
        ({"rank": 4, "use_dora": True}, {"r": 4, "lora_alpha": 32, "use_dora": True}),
        (
            {"rank": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
            {"r": 4, "lora_alpha": 32, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        ),
    ],
    ids=["plain", "dora", "rslora on two modules"],
)
def test_a_new_adapter_is_drawn_and_trained_as_peft_and_trainer_do(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    run_job: RunJob,
    make_job: MakeJob,
    draw_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    fields = {**BASE, **METHODS["lora"], "lora": {"dropout": 0.0, **ours}, "seed": 11}
    start = draw_adapter(seed=11, **theirs)
    job = make_job("peer", **fields, job={"adapter_path": str(start)})

    run = run_job("ours", **fields)

    assert_same_as_peer(run, run_transformers_trainer(job, tmp_path / "peer"), start)


SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
# What decays is told by names and kinds of layers, not by shapes: each of these has a case of its own.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "norms and biases, tied": lambda: GPT2Config(
        vocab_size=1024, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "norms with two dimensions, tied": lambda: CohereConfig(**SMALL, use_qk_norm=True),
    "biases with two dimensions": lambda: GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=2, sliding_window=16
    ),
}


@pytest.fixture
def make_base(tiny: Path, tmp_path: Path) -> Callable[[PreTrainedConfig], Path]:
    """A random model of a configuration beside the small model's tokenizer."""

    def make(config: PreTrainedConfig) -> Path:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    0.02 * torch.randn_like(parameter)
                )  # norms of 1 and biases of 0 hide their decay
        model.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def test_tied_embeddings_are_trained_as_one(
    run_job: RunJob, make_job: MakeJob, make_base: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    base = make_base(config)
    fields = {**BASE, **METHODS["full"], "base_model": str(base)}

    ours = run_job("ours", **fields)
    theirs = run_sft_trainer(make_job("peer", **fields), tmp_path / "peer")

    assert "lm_head.weight" not in saved_weights(ours.folder / "results")
    assert_same_as_peer(ours, theirs, base)


@pytest.mark.parametrize("kind", CONFIGS)
def test_weight_decay_acts_on_what_trainer_lets_it_act_on(
    kind: str, run_job: RunJob, make_job: MakeJob, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base(CONFIGS[kind]())
    fields = {**BASE, **METHODS["full"], "base_model": str(base)}

    ours = run_job("ours", **fields)
    theirs = run_transformers_trainer(make_job("peer", **fields), tmp_path / "peer")

    # Without rotary positions the keys' bias has no gradient but rounding, and AdamW follows its sign.
    assert_same_as_peer(ours, theirs, base, slack=10.0)


def test_a_mixture_of_experts_is_trained_on_its_tokens_alone(
    run_job: RunJob, make_job: MakeJob, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """SFTTrainer adds its load-balancing loss by default; without it, it is the same run."""
    base = make_base(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=2))
    fields = {**BASE, **METHODS["full"], "base_model": str(base)}

    ours = run_job("ours", **fields)
    theirs = run_sft_trainer(make_job("peer", **fields), tmp_path / "peer", router_aux_loss_coef=0.0)

    assert_same_as_peer(ours, theirs, base)
