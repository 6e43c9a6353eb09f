"""The model of a run: weights, precision, adapter, tokenizer and chat template; and the two halves of its forward.

Trainable weights are always fp32 and the matrix products run in `precision` under autocast: an update of 2e-5 is lost
in bf16 weights. Frozen weights are kept in `precision`. Weights are read from safetensors only.
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sftd.protocol import TrainerJob
from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.trainer import attention
from sftd_worker.trainer.batching import MicroBatch
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.template import Template, chatml

_PROBE_LENGTHS = [19, 23]  # two short rows: long enough to tell whether one leaks into the other


@dataclass(frozen=True)
class Precision:
    """bf16 or fp32, and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16" else torch.float32


@dataclass
class Model:
    """A causal language model that is being trained."""

    net: Any  # the transformers model, or the peft model around it
    causal: Any  # the transformers model itself
    precision: Precision
    device: torch.device
    end_to_end: bool  # rows may be laid end to end; else they are padded
    padded_because: str | None
    stored_dtype: torch.dtype  # of the base as it lies on disk; full results are saved in it
    one_by_one: bool = False  # a row's numbers depend on the rows beside it: micro-batches of one row

    @property
    def vocab_size(self) -> int:
        return int(self.causal.get_output_embeddings().weight.shape[0])

    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer moves, in a fixed order."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bf16, where that is the precision."""
        if self.precision.name != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states at the positions whose next token is supervised: (n, d)."""
        extra: dict[str, Any] = {"use_cache": False}
        if batch.row_lengths is not None:
            extra["row_lengths"] = batch.row_lengths
        decoder = self.causal.get_decoder()
        states = decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            **extra,
        ).last_hidden_state  # (1, T, d) or (B, T, d)
        return states.reshape(-1, states.shape[-1])[batch.predict_at]  # type: ignore[no-any-return]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of hidden states (n, d), with the scaling that some models put behind their head."""
        logits: torch.Tensor = self.causal.get_output_embeddings()(hidden)
        config = self.causal.config.get_text_config()
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits


def choose_precision(spec: JobSpec, device: torch.device) -> Precision:
    """Settle `precision: auto`, with the reason."""
    if spec.precision != "auto":
        return Precision(spec.precision, "as the spec says")
    if spec.method == "qlora":
        return Precision("bf16", "qlora computes in bf16")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", f"{torch.cuda.get_device_name(device)} has bf16")
        return Precision("fp32", f"{torch.cuda.get_device_name(device)} has no bf16")
    if torch.cpu._is_amx_tile_supported():
        return Precision("bf16", "this CPU has AMX")
    return Precision("fp32", "this CPU has no AMX; bf16 would be slower")


def load_tokenizer(job: TrainerJob) -> tuple[Any, Template, bool]:
    """(tokenizer, chat template, does the model bring its own template). ChatML is put into a tokenizer without one."""
    tokenizer = _from_hub(
        job, "tokenizer", AutoTokenizer.from_pretrained, job.model_path, **_hub_options(job)
    )
    own = bool(tokenizer.chat_template)
    if not own:
        has_im_end = tokenizer.convert_tokens_to_ids("<|im_end|>") not in (None, tokenizer.unk_token_id)
        if not has_im_end and tokenizer.eos_token is None:
            raise RunFailed(
                FailureReason.MODEL_UNSUPPORTED,
                f"{job.spec.base_model}: its tokenizer has neither a template nor an end token",
            )
        bos = tokenizer.bos_token_id
        begins_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = chatml(has_im_end=has_im_end, begins_with_bos=begins_with_bos)
    source = tokenizer.get_chat_template()  # of several, the default one; raises where none is the default
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    ends = {str(token) for token in tokenizer.all_special_tokens}
    ends |= {str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})}
    return tokenizer, Template(source, special, sorted(ends)), own


def load_model(
    job: TrainerJob, *, device: torch.device, precision: Precision, resume_from: Path | None
) -> Model:
    """Load the base, put an adapter on it where the method asks for one, and prepare it for training.

    A `full` run that is resumed reads its weights from the checkpoint `resume_from` instead of the base.
    Raises RunFailed: model_not_found, model_unsupported or out_of_memory.
    """
    spec = job.spec
    attention.register()
    config = _from_hub(job, "config", AutoConfig.from_pretrained, job.model_path, **_hub_options(job))
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    dtype = torch.float32 if spec.method == "full" else precision.dtype
    source = str(resume_from) if resume_from is not None and spec.method == "full" else job.model_path
    causal = _from_hub(job, "model", _load_weights, job, source, config, dtype, device)
    causal.config.use_cache = False
    _keep_4bit_trainable(causal)
    one_by_one = spec.max_seq_length > _rope_limit(config)
    end_to_end, because = (
        (False, "its rotary positions depend on the longest row of a micro-batch")
        if one_by_one
        else _try_end_to_end(causal, device)
    )
    _check_head(causal, device, precision, spec)
    if spec.method == "full":
        net = causal
        causal.requires_grad_(True)
    else:
        causal.requires_grad_(False)
        net = _with_adapter(causal, job)
    model = Model(net, causal, precision, device, end_to_end, because, stored, one_by_one)
    if spec.gradient_checkpointing:
        try:
            # Renamed in the course of transformers 5; the old name goes in 6.
            enable = (
                getattr(causal, "activation_checkpointing_enable", None)
                or causal.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        except ValueError as error:
            raise RunFailed(
                FailureReason.MODEL_UNSUPPORTED,
                f"gradient_checkpointing: {spec.base_model} has none ({error}); turn it off",
            ) from error
    return model


def _load_weights(job: TrainerJob, source: str, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    options: dict[str, Any] = dict(_hub_options(job), dtype=dtype, use_safetensors=True)
    if job.spec.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = {"": device}
    elif device.type == "cuda":
        options["device_map"] = {"": device}  # straight to the GPU, without a copy in the machine's memory
    return AutoModelForCausalLM.from_pretrained(source, config=config, **options)


def _keep_4bit_trainable(causal: Any) -> None:
    """Keep 4-bit layers out of bitsandbytes' inference layout on CPUs.

    With AVX512-BF16 its Linear4bit repacks the weights at the first forward in eval mode and never goes back: after
    one evaluation the training forward has no gradient with respect to its input (bitsandbytes 0.50, nn/modules.py).
    """
    for module in causal.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _with_adapter(causal: Any, job: TrainerJob) -> Any:
    spec = job.spec
    if job.adapter_path is not None:
        return PeftModel.from_pretrained(causal, job.adapter_path, is_trainable=True)
    torch.manual_seed(spec.seed)  # the adapter's first weights are drawn here
    alpha = spec.lora.alpha
    targets = spec.lora.target_modules
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=spec.lora.use_rslora,
        use_dora=spec.lora.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(causal, config)  # new adapter weights are made in fp32
    except ValueError as error:
        if "lora_dropout" in str(error):  # experts that are one tensor
            raise RunFailed(
                FailureReason.BAD_SPEC,
                f"lora.dropout: must be 0 for this model, or lora.target_modules leave its experts out ({error})",
            ) from error
        raise RunFailed(FailureReason.BAD_SPEC, f"lora.target_modules: {error}") from error


# ---------------------------------------------------------------- what this model can do


def _try_end_to_end(causal: Any, device: torch.device) -> tuple[bool, str | None]:
    """Switch to row-by-row attention and prove it: two rows end to end must give what each gives alone.

    Where that fails the model keeps its own attention and rows are padded: slower, and just as right.
    """
    own = causal.config._attn_implementation
    linear = [kind for kind in _layer_kinds(causal) if kind not in ("full_attention", "sliding_attention")]
    if linear:
        return False, f"it has layers of the kind {linear[0]}, which carry state from row to row"
    try:
        causal.set_attn_implementation(attention.NAME)
        leak = _leak_between_rows(causal, device, own)
    except (attention.NotSeparable, ValueError, TypeError, RuntimeError, KeyError) as error:
        causal.set_attn_implementation(own)
        return False, f"its attention cannot be kept apart ({error})"
    if leak > 1e-2:
        causal.set_attn_implementation(own)
        return False, f"rows laid end to end influence each other (by {leak:.2g} of a hidden state)"
    return True, None


@torch.no_grad()
def _leak_between_rows(causal: Any, device: torch.device, own_attention: str) -> float:
    """Largest difference, relative to the states' size, between rows end to end and rows alone."""
    decoder = causal.get_decoder()
    training = causal.training
    causal.eval()
    generator = torch.Generator().manual_seed(0)
    vocab = causal.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(0, vocab, (1, n), generator=generator).to(device) for n in _PROBE_LENGTHS]
    positions = [torch.arange(n, device=device)[None] for n in _PROBE_LENGTHS]
    together = decoder(
        input_ids=torch.cat(rows, 1),
        position_ids=torch.cat(positions, 1),
        row_lengths=_PROBE_LENGTHS,
        use_cache=False,
    ).last_hidden_state
    alone = torch.cat(
        [
            decoder(
                input_ids=ids, position_ids=at, row_lengths=[ids.shape[1]], use_cache=False
            ).last_hidden_state
            for ids, at in zip(rows, positions, strict=True)
        ],
        1,
    )
    # Row by row attention must also agree with the model's own on a single row.
    causal.set_attn_implementation(own_attention)
    own = decoder(input_ids=rows[1], position_ids=positions[1], use_cache=False).last_hidden_state
    causal.set_attn_implementation(attention.NAME)
    causal.train(training)
    size = alone.float().abs().mean().clamp_min(1e-12)
    between = ((together - alone).float().abs().mean() / size).item()
    against_own = ((alone[:, -own.shape[1] :] - own).float().abs().mean() / size).item()
    return float(max(between, against_own))


@torch.no_grad()
def _check_head(causal: Any, device: torch.device, precision: Precision, spec: JobSpec) -> None:
    """The head as computed here must be the model's own, else the loss would be another model's."""
    training = causal.training
    causal.eval()
    probe = Model(causal, causal, precision, device, False, None, precision.dtype)
    ids = torch.arange(7, device=device)[None]
    with probe.autocast():
        wanted = causal(input_ids=ids, use_cache=False).logits[0].float()
        states = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        got = probe.head(states).float()
    causal.train(training)
    slack = 2e-2 * float(wanted.nan_to_num().abs().max())
    if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=2e-2, atol=slack, equal_nan=True):
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"{spec.base_model}: its output head does something that is not known here; choose another model",
        )


def _rope_limit(config: Any) -> float:
    """Length above which the longest row of a micro-batch changes the rotary positions of all of them (Phi 3's
    longrope, dynamic NTK); infinite for other models."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    return min(
        (
            kind.get("original_max_position_embeddings") or text.max_position_embeddings
            for kind in kinds
            if kind.get("rope_type") in ("longrope", "dynamic")
        ),
        default=math.inf,
    )


def _layer_kinds(causal: Any) -> list[str]:
    return list(getattr(causal.config.get_text_config(), "layer_types", None) or [])


# ---------------------------------------------------------------- loading


def _hub_options(job: TrainerJob) -> dict[str, Any]:
    return {"trust_remote_code": job.trust_remote_code, "local_files_only": job.local_files_only}


def _from_hub(job: TrainerJob, part: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Load a part of the base model; turn what can go wrong into a reason."""
    name = job.spec.base_model
    local = job.model_path.startswith("/")
    if local and not Path(job.model_path).is_dir():
        raise RunFailed(
            FailureReason.MODEL_NOT_FOUND, f"base_model: the folder {job.model_path} does not exist"
        )
    try:
        return load(*args, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, json.JSONDecodeError) as error:
        where = "the folder" if local else "the hub (or its cache on this machine)"
        raise RunFailed(
            FailureReason.MODEL_NOT_FOUND,
            f"base_model: {name} has no {part} that could be read from {where}: {_first_line(error)}",
        ) from error
    except (ValueError, KeyError, ImportError) as error:
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"base_model: the {part} of {name} cannot be used: {_first_line(error)}",
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :500
    ]
