"""A tiny Llama with random weights and a tokenizer of whole words `w0` .. `w507`: what vLLM can serve on any CPU.

python -m tests.helpers.tiny_model FOLDER  # makes it, in a process that may import torch as it likes
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import REPOSITORY

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
WORDS = 508
CONTEXT = 2048  # tokens


def tiny_model() -> Path:
    """The folder of the model, made when it isn't there yet."""
    folder = REPOSITORY / ".cache" / "tiny-llama"
    if not folder.exists():
        making = folder.with_name(f"{folder.name}-{os.getpid()}")
        making.mkdir(parents=True)
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.helpers.tiny_model", str(making)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            timeout=120,
        )
        making.rename(folder)  # whole or not at all, however many make it at once
    return folder


def words(count: int, first: int = 0) -> str:
    """A prompt of so many tokens."""
    return " ".join(f"w{(first + number) % WORDS}" for number in range(count))


def token_id(word: str) -> int:
    """The token that stands for a word."""
    return len(SPECIAL_TOKENS) + int(word.removeprefix("w"))


def make(folder: Path) -> None:
    """Write model and tokenizer into the folder."""
    # transformers imports torch_npu where it is installed, which fails without an Ascend runtime.
    sys.modules["torch_npu"] = None  # type: ignore[assignment]
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(WORDS))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=SPECIAL_TOKENS[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, start, end, padding = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end, pad_token=padding
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    configuration = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(configuration).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
