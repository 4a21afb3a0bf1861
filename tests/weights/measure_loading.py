"""Loads a directory into a sample model and prints its bytes and this process's peak.

Run by test_loading_memory.py in a process of its own: arguments are the directory, the storage
dtype, and `rows8`, to quantize, or `none`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from lorakit.catalog import load_catalog
from lorakit.progress import SilentProgress
from lorakit.runtime import tune_process
from lorakit.weights.base import open_base
from lorakit.weights.stream import check_tensors, stream_weights


class Sample(nn.Module):
    """As many linears as the config says, and an embedding."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width, inner = config["width"], config["inner"]
        self.embed_tokens = nn.Embedding(config["vocabulary"], width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, inner), "down": nn.Linear(inner, width)})
            for _ in range(config["layers"])
        )


class Rows8(nn.Module):
    """int8 with one scale for each row, as a scheme that shrinks what it is given."""

    def __init__(self, linear: nn.Linear, weight: torch.Tensor) -> None:
        super().__init__()
        self.bias = linear.bias
        scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (weight / scale.to(weight.dtype)).round_().to(torch.int8))

    def dequantize(self) -> torch.Tensor:
        return self.codes * self.scale


def main(directory: str, dtype: str, scheme: str) -> None:
    tune_process(torch.device("cpu"))
    checkpoint = open_base(Path(directory), load_catalog())
    with torch.device("meta"):
        model = Sample(dict(checkpoint.config))
    check_tensors(model, checkpoint)
    before = peak_bytes()
    stream_weights(
        model,
        checkpoint,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        progress=SilentProgress(),
        quantize=Rows8 if scheme == "rows8" else None,
    )
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    print(json.dumps({"model": size, "before": before, "peak": peak_bytes()}))


def peak_bytes() -> int:
    """Not getrusage's ru_maxrss: that starts from the parent's, which a new program inherits."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
