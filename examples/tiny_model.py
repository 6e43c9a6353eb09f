"""Build a small Qwen2-shaped model with random weights and a tokenizer trained on your data: for demos and tests.

    python examples/tiny_model.py FOLDER examples/q_basics.jsonl

Nothing is downloaded. The chat template is ChatML; `--without-template` leaves it out.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sftd.rows import read_rows
from sftd_worker.trainer.template import chatml

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build(
    folder: Path,
    data: Path,
    *,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    num_layers: int = 2,
    initializer_range: float = 0.02,
    seed: int = 0,
    template: str | None = None,
    with_template: bool = True,
) -> Path:
    """Write model and tokenizer to `folder`; returns it. `template` replaces the ChatML one."""
    tokenizer = train_tokenizer(data, vocab_size)
    if with_template:
        tokenizer.chat_template = template or chatml(has_im_end=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=initializer_range,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype=torch.float32,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def train_tokenizer(data: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (as GPT-2, Qwen and Llama 3 have) trained on the words of a data file."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_texts(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def _texts(data: Path) -> Iterator[str]:
    for row in read_rows(data, name=data.name):
        if row.text is not None:
            yield row.text
        for message in row.messages or []:
            yield message["content"] + json.dumps(message.get("tool_calls", ""))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--without-template", action="store_true")
    args = parser.parse_args()
    build(
        args.folder,
        args.data,
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        with_template=not args.without_template,
        initializer_range=0.1,  # large enough for an adapter to have something to work with
    )
    print(args.folder)


if __name__ == "__main__":
    main()
