"""The model of a run: weights, precision, adapter, tokenizer and chat template; and the two halves of its forward.

Trainable weights are always fp32 and the matrix products run in `precision` under autocast: an update of 2e-5 is lost
in bf16 weights. Frozen weights are kept in `precision`. Weights are read from safetensors only.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sftd.protocol import TrainerJob
from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.trainer import attention
from sftd_worker.trainer.embedding import add_gradients_by_row
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.loss import Head
from sftd_worker.trainer.memory import is_out_of_memory
from sftd_worker.trainer.packing import (
    Kernel,
    MicroBatch,
    Prefix,
    TokenRow,
    collate,
    collate_padded,
    find_prefixes,
)
from sftd_worker.trainer.precision import Precision
from sftd_worker.trainer.probe import decoder_of, require_causal, try_end_to_end
from sftd_worker.trainer.sharding import Sharding, Shards, load_in_shares
from sftd_worker.trainer.template import Template, chatml, require_bounded
from sftd_worker.trainer.world import World

T = TypeVar("T")

# What some models do behind their head: see Model.logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2, RecurrentGemma
_SCALINGS = ("logits_scaling", "logit_scale", "lm_head_multiplier", *_CAPS)
_LARGE_LOGITS = 100.0
_OF_A_DEVICE = re.compile(r"CUDA|CUBLAS|cuDNN|NCCL", re.I)
_IS_NOISE = re.compile(r"^(?!classifier_|summary_).*(drop|jitter)")  # those are of other heads


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
    kernel: Kernel = "rows"  # how rows laid end to end attend: see attention.py
    shares_prefixes: bool = False  # tokens that rows begin with in common are computed once
    one_by_one: bool = False  # a row's numbers depend on the rows beside it: micro-batches of one row
    shards: Shards | None = None  # with `sharding: fsdp`

    @property
    def vocab_size(self) -> int:
        return int(self.causal.get_output_embeddings().weight.shape[0])

    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer moves, in a fixed order."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bf16, where that is the precision."""
        return self.precision.autocast(self.device)

    def batch(
        self, rows: Sequence[TokenRow], *, pad_id: int, prefixes: Sequence[Prefix | None] | None = None
    ) -> MicroBatch:
        """Tensors of a micro-batch, laid out as this model can read them."""
        if not self.end_to_end:
            return collate_padded(rows, device=self.device, pad_id=pad_id)
        return collate(rows, device=self.device, prefixes=prefixes, kernel=self.kernel)

    def prefixes(self, rows: Sequence[TokenRow]) -> list[Prefix | None]:
        """What rows share from their start, as far as this model can share it.

        Not under dropout: rows would share their noise, and packing would change the training.
        """
        if not self.shares_prefixes or (self.net.training and self.has_dropout):
            return [None] * len(rows)
        return find_prefixes(rows)

    @cached_property
    def has_dropout(self) -> bool:
        """Does training draw random numbers: in an adapter, or in the model itself?"""
        rates = [module.p for module in self.net.modules() if isinstance(module, torch.nn.Dropout)]
        # Many models call it as a function, at rates of their config.
        settings = self.causal.config.get_text_config().to_dict().items()
        rates += [
            value
            for name, value in settings
            if _IS_NOISE.search(name) and isinstance(value, float | int) and not isinstance(value, bool)
        ]
        return any(rate > 0 for rate in rates)

    def whole(self, compute: Callable[[], T]) -> T:
        """`compute()` with all weights at hand that `hidden` and `head` read; a whole model has them anyway."""
        return compute() if self.shards is None else self.shards.whole(compute)

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states at the positions whose next token is supervised: (n, d)."""
        extra: dict[str, Any] = {"use_cache": False}
        if batch.layout is not None:
            extra["row_layout"] = batch.layout
        if self.one_by_one:
            self._rotary.reset()
        states = self._decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            **extra,
        ).last_hidden_state  # (1, T, d) or (B, T, d)
        return states.reshape(-1, states.shape[-1])[batch.predict_at]  # type: ignore[no-any-return]

    @cached_property
    def _decoder(self) -> Any:
        return decoder_of(self.causal)

    @cached_property
    def _rotary(self) -> "_Rotary":
        return _Rotary(self.causal)

    @property
    def head(self) -> Head:
        """What makes logits of hidden states."""
        layer = self.causal.get_output_embeddings()
        config = self.causal.config.get_text_config()
        scaled = any(getattr(config, name, None) is not None for name in _SCALINGS)
        plain = type(layer) is torch.nn.Linear and layer.bias is None and not scaled
        return Head(
            logits=self.logits,
            vocab_size=self.vocab_size,
            weight=layer.weight if plain else None,
            adds_up=self.shards is None,  # sharding is told of gradients by autograd
            parameters=tuple(parameter for parameter in layer.parameters() if parameter.requires_grad),
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of hidden states (n, d), with the scaling that some models put behind their head."""
        logits: torch.Tensor = self.causal.get_output_embeddings()(hidden)
        config = self.causal.config.get_text_config()
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (factor := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon H1
            logits = logits * factor
        for name in _CAPS:
            if (cap := getattr(config, name, None)) is not None:
                logits = torch.tanh(logits / cap) * cap
        return logits


def load_tokenizer(job: TrainerJob) -> tuple[Any, Template, bool]:
    """(tokenizer, chat template, does the model bring its own template). ChatML is put into a tokenizer without one."""
    tokenizer = from_hub(job, "tokenizer", AutoTokenizer.from_pretrained, job.model_path, **hub_options(job))
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
    require_bounded(source)
    return tokenizer, Template(source, special, sorted(ends), _control_tokens(tokenizer)), own


def _control_tokens(tokenizer: Any) -> list[str]:
    """Tokens that mean something to the model by being there, not by what they say. `<think>` and `<tool_call>` are
    not among them: data writes those on purpose."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in tokenizer.all_special_tokens} | {str(t) for t in added if t.special}
    return sorted(token for token in found if len(token) > 1)


def load_model(
    job: TrainerJob, *, world: World, sharding: Sharding, precision: Precision, resume_from: Path | None
) -> Model:
    """Load the base, put an adapter on it where the method asks for one, and prepare it for training.

    A run that is resumed reads its weights (all of them, or the adapter's) from the checkpoint `resume_from`.
    Raises RunFailed: model_not_found, model_unsupported, checkpoint_corrupt or out_of_memory.
    """
    device = world.device
    spec = job.spec
    attention.register()
    config = from_hub(job, "config", AutoConfig.from_pretrained, job.model_path, **hub_options(job))
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    dtype = torch.float32 if spec.method == "full" else precision.dtype
    source = str(resume_from) if resume_from is not None and spec.method == "full" else job.model_path

    def load(place: torch.device) -> tuple[Any, Any]:
        causal = from_hub(job, "model", _load_weights, job, source, config, dtype, place)
        causal.config.use_cache = False
        _keep_4bit_trainable(causal)
        causal.requires_grad_(spec.method == "full")
        if spec.method == "full":
            return causal, causal
        net = _with_adapter(causal, job)
        if resume_from is not None:
            _load_adapter(net, resume_from)
        return net, causal

    shards = None
    if sharding.name == "fsdp":
        net, causal, shards = load_in_shares(load, world)
    else:
        net, causal = load(device)
    model = Model(
        net=net,
        causal=causal,
        precision=precision,
        device=device,
        end_to_end=False,
        padded_because="its rotary positions depend on the longest row of a micro-batch",
        stored_dtype=stored,
        one_by_one=spec.max_seq_length > _rope_limit(config),
        shards=shards,
    )
    with torch.no_grad(), _said_as_unsupported(spec, shards):
        model.whole(lambda: require_causal(causal, device, precision))
        if not model.one_by_one:
            apart = model.whole(lambda: try_end_to_end(causal, device, precision))
            model.end_to_end, model.padded_because = apart.end_to_end, apart.because
            model.kernel, model.shares_prefixes = apart.kernel, apart.shares_prefixes
        if model.end_to_end:
            causal.set_attn_implementation(attention.NAME)
        model.whole(lambda: _check_head(causal, device, precision, spec))
    if spec.method == "full" and shards is None:
        add_gradients_by_row(causal.get_input_embeddings())
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
    options: dict[str, Any] = dict(hub_options(job), dtype=dtype, use_safetensors=True)
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
        if not (
            Path(job.adapter_path) / "adapter_model.safetensors"
        ).is_file():  # peft would read a pickle instead
            raise RunFailed(
                FailureReason.MODEL_UNSUPPORTED,
                f"{job.spec.base_model}: its adapter has no adapter_model.safetensors; other formats are not read",
            )
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


def _load_adapter(net: Any, folder: Path) -> None:
    outcome = set_peft_model_state_dict(net, load_file(folder / "adapter_model.safetensors"))
    if outcome.unexpected_keys:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT, f"{folder.name} holds weights that the adapter does not have"
        )


# ---------------------------------------------------------------- what this model can do


@torch.no_grad()
def _check_head(causal: Any, device: torch.device, precision: Precision, spec: JobSpec) -> None:
    """The head as computed here must be the model's own, else the loss would be another model's.

    Looked at twice: as it is, and with states so large that a cap on logits would show.
    """
    training = causal.training
    causal.eval()
    probe = Model(causal, causal, precision, device, False, None, precision.dtype)  # for its logits alone
    decoder = decoder_of(causal)
    ids = torch.arange(7, device=device)[None]
    slack = 1e-4 if precision.name == "fp32" else 2e-2
    same = []
    with probe.autocast():
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        most = float(probe.logits(states).float().nan_to_num().abs().max())
        for times in (1.0, _LARGE_LOGITS / most if most else 1.0):
            with _states_times(decoder, times):
                wanted = causal(input_ids=ids, use_cache=False).logits[0].float()
            got = probe.logits(states * times).float()
            room = slack * float(wanted.nan_to_num().abs().max())
            same.append(
                got.shape == wanted.shape
                and torch.allclose(got, wanted, rtol=slack, atol=room, equal_nan=True)
            )
    causal.train(training)
    if not all(same):
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"{spec.base_model}: its output head does something that is not known here; choose another model",
        )


@contextmanager
def _states_times(decoder: Any, factor: float) -> Iterator[None]:
    """The decoder's hidden states are so many times as large."""

    def enlarge(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    hook = decoder.register_forward_hook(enlarge)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _said_as_unsupported(spec: JobSpec, shards: Shards | None) -> Iterator[None]:
    """A model whose own code breaks in a first forward of a few tokens is none that can be trained here."""
    # A device that fails, or another rank, is no fault of the model's.
    others = (torch.AcceleratorError,) if shards is None else (RuntimeError,)
    try:
        yield
    except (RunFailed, MemoryError, OSError, *others):
        raise
    except Exception as error:  # whatever a model's own code raises
        if is_out_of_memory(error) or _OF_A_DEVICE.search(str(error)):
            raise
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"{spec.base_model}: its forward pass cannot be used here ({type(error).__name__}: {_first_line(error)}); "
            "choose another model",
        ) from error


class _Rotary:
    """Rotary positions that grow with the longest row seen (dynamic NTK): what they were before the first.

    transformers keeps the grown ones for shorter rows that come after, so that a row's numbers would depend on the past.
    """

    def __init__(self, causal: Any) -> None:
        self._kept = [
            (
                module,
                {key: value for key, value in vars(module).items() if key.endswith("max_seq_len_cached")},
                {key: value.clone() for key, value in module.named_buffers(recurse=False)},
                getattr(module, "attention_scaling", None),
            )
            for module in causal.modules()
            if hasattr(module, "max_seq_len_cached")
        ]

    def reset(self) -> None:
        for module, lengths, buffers, scaling in self._kept:
            for name, value in lengths.items():
                setattr(module, name, value)
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
            if scaling is not None:
                module.attention_scaling = scaling


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


# ---------------------------------------------------------------- loading


def hub_options(job: TrainerJob) -> dict[str, Any]:
    return {"trust_remote_code": job.trust_remote_code, "local_files_only": job.local_files_only}


def from_hub(job: TrainerJob, part: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
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
    except SafetensorError as error:  # a header that does not fit the file
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"base_model: the weights of {name} are damaged ({_first_line(error)}); fetch the model again",
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
