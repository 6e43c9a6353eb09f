"""Models of the benches: Qwen2-shaped, random weights, built on the spot; nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from examples.tiny_model import train_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sftd_worker.trainer.template import chatml


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-shaped model. The head is tied to the embedding unless said otherwise."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = True
    positions: int = 4096

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def body_parameters(self) -> int:
        """Weights of the matrix products of all layers, without embedding and head."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    def adapter_parameters(self, rank: int) -> int:
        """Weights of an adapter of `rank` on all linear layers but the head."""
        d, kv, inner = self.hidden, self.kv_width, self.intermediate
        widths = [(d, d), (d, d), (d, kv), (d, kv), (d, inner), (d, inner), (inner, d)]
        return self.layers * rank * sum(into + out for into, out in widths)


SHAPES = {
    "30m": Shape(hidden=512, layers=6, heads=8, kv_heads=2, intermediate=1008, vocab=32_000),  # 29.6M
    "30m-151k": Shape(hidden=512, layers=6, heads=8, kv_heads=2, intermediate=1008, vocab=151_936),  # 91M
    "98m": Shape(hidden=768, layers=12, heads=12, kv_heads=4, intermediate=1968, vocab=32_000),  # 98M
    "200m": Shape(hidden=1024, layers=16, heads=16, kv_heads=4, intermediate=2736, vocab=32_000),  # 209M
    "tiny": Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=192, vocab=2_048),
    # For GPUs: Qwen2.5-1.5B and Llama-3-8B, with the names and biases of Qwen2.
    "1.5b": Shape(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocab=151_936),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocab=128_256, tied=False),
}


def build_tokenizer(corpus: Path, shape: Shape) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML, trained on a data file; it may know fewer tokens than the model."""
    tokenizer = train_tokenizer(corpus, min(shape.vocab, 32_000))
    tokenizer.chat_template = chatml(has_im_end=True)
    return tokenizer


def build(
    folder: Path,
    shape: Shape,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write model and tokenizer to `folder` as a hub would have them; returns it."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return folder
