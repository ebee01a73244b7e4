"""A small transformer block decoding in a loop, with stages round its parts.

Runs on an NPU where torch_npu is installed, else on the CPU; there the stages are timed by the host.

    OTEL_NPU_ENABLED=1 python examples/torch_loop.py --tokens 200
"""

from __future__ import annotations

import argparse
import importlib.util

import torch

import otel_npu

_WIDTH = 256
_VOCABULARY = 1000


class Model(torch.nn.Module):
    """One attention block and a head: enough to have something to time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(_VOCABULARY, _WIDTH)
        self.attention = torch.nn.MultiheadAttention(_WIDTH, num_heads=4, batch_first=True)
        self.head = torch.nn.Linear(_WIDTH, _VOCABULARY)

    @otel_npu.stage("forward")
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token that comes next, from token ids of shape (1, length)."""
        hidden = self.embedding(tokens)
        with otel_npu.stage("attention"):
            hidden, _ = self.attention(hidden[:, -1:], hidden, hidden)
        return self.head(hidden[:, -1])


def main() -> None:
    """Decode a number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    device = "npu" if importlib.util.find_spec("torch_npu") and hasattr(torch, "npu") else "cpu"
    torch.manual_seed(0)
    model = Model().to(device).eval()
    tokens = torch.randint(_VOCABULARY, (1, 64), device=device)
    with torch.inference_mode():
        for number in range(arguments.tokens):
            kind = "decode" if number else "prefill"
            with otel_npu.step(kind, tokens=tokens.shape[1] if kind == "prefill" else 1):
                logits = model(tokens)
                with otel_npu.stage("sample"):
                    token = logits.argmax(dim=-1, keepdim=True)
                tokens = torch.cat((tokens, token), dim=1)[:, -128:]
    print(f"decoded {arguments.tokens} tokens on {device}, the last one is {int(tokens[0, -1])}")


if __name__ == "__main__":
    main()
