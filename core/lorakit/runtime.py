"""The process settings a run is fastest with, made in one place before the first tensor.

On Linux with glibc, every large tensor is by default given back to the kernel when it is freed
and faulted in again when the next one is made: 15 to 26% of a CPU run's time.  Raising the two
thresholds of malloc keeps that memory in the process.  On AMD processors with AVX-512, oneDNN
computes the products that MKL is slow at: see `lorakit.modules.matmul`.

LORAKIT_TUNE=0 leaves the process as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEEP_BYTES = 2**30
OWN_PAGES_BYTES = 2**20


def tune_process(device: torch.device) -> str | None:
    """Applies the settings; returns one line for the log, or None where none was made."""
    if os.environ.get("LORAKIT_TUNE") == "0" or device.type != "cpu":
        return None
    # Here, since modules take their buffers by this module's settings.
    from lorakit.modules.matmul import use_onednn

    done = []
    if _raise_malloc_thresholds():
        done.append("large tensors' memory is kept for reuse")
    if torch.set_flush_denormal(True):
        done.append("denormals count as zero")
    if prefers_onednn() and use_onednn(True):
        done.append("fp32 products by oneDNN")
    if not done:
        return None
    return f"process: {', '.join(done)} (LORAKIT_TUNE=0 turns this off)"


@contextmanager
def tensors_in_own_pages() -> Iterator[None]:
    """For loading weights: in a tuned process, every tensor above 1 MB gets pages of its own.

    Kept for reuse, the memory of what a quantization reads and frees would be cut up by what it
    keeps: measured, 25% more than the quantized model takes.
    """
    tuned = _tuned["malloc"]
    if tuned:
        _mallopt(M_MMAP_THRESHOLD, OWN_PAGES_BYTES)
    try:
        yield
    finally:
        if tuned:
            _mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)


_tuned = {"malloc": False}
"""What `tune_process` has done to this process."""


def prefers_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has AVX-512 and is not Intel's: MKL keeps to AVX2 there."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(vendors) and "GenuineIntel" not in vendors


def _raise_malloc_thresholds() -> bool:
    raised = _mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) and _mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    _tuned["malloc"] = raised
    return raised


def _mallopt(setting: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        # Another C library (musl) has no such setting.
        return False
    return bool(mallopt(setting, value))
