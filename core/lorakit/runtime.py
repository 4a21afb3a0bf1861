"""The process settings a run is fastest with, made in one place before the first tensor.

On Linux with glibc, every large tensor is by default given back to the kernel when it is freed
and faulted in again when the next one is made: 15 to 26% of a CPU run's time.  The large ones that
lorakit makes itself, most that a step makes, come from an arena (`lorakit.arena`); for the others,
raising two thresholds of malloc keeps their memory in the process.  On AMD processors with
AVX-512, oneDNN computes the products that MKL is slow at: see `lorakit.modules.matmul`.

LORAKIT_TUNE=0 leaves the process as it is; of what an earlier run in it has set, products go back
to the library that torch takes and large tensors to malloc, whose settings stay, as denormals do.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakit.arena import use_arena

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
KEEP_BYTES = 2**30
OWN_PAGES_BYTES = 2**20
KEPT_PRODUCTS = 256
"""Products that oneDNN keeps compiled, 0.4 MB each; a step has some 40, and a new one takes half a
millisecond.  Its own limit is 1024."""
LARGEST_DYNAMIC_BYTES = 2**25
"""How far glibc raises the threshold on its own, as larger tensors are freed; older ones take no
more from anybody (HEAP_MAX_SIZE / 2, `do_set_mmap_threshold` in glibc's malloc.c)."""


def tune_process(device: torch.device) -> str | None:
    """Applies the settings; returns one line for the log, or None where none was made.

    Args:
        device: Settings are for the CPU only.
    """
    # Here, since modules take their buffers by this module's settings.
    from lorakit.modules.matmul import use_onednn

    if not is_tuned(device):
        use_onednn(False)
        use_arena(False)
        return None
    done = []
    if use_arena(True):
        done.append("large tensors share an arena")
    if _set_malloc_thresholds():
        done.append("malloc keeps the memory of others")
    if set_flush_denormal():
        done.append("denormals count as zero")
    if use_onednn(prefers_onednn()):
        # Read at oneDNN's first product.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
        done.append("fp32 products by oneDNN")
    if not done:
        return None
    return f"process: {', '.join(done)} (LORAKIT_TUNE=0 turns this off)"


def set_flush_denormal() -> bool:
    """Has denormals count as zero in the calling thread, if the process is tuned; whether so."""
    return is_tuned(torch.device("cpu")) and bool(torch.set_flush_denormal(True))


@contextmanager
def tensors_in_own_pages() -> Iterator[None]:
    """For weights that come and go: in a tuned process, every tensor above 1 MB gets pages of its
    own.

    Kept for reuse, the memory of what a quantization reads and frees would be cut up by what it
    keeps: measured, 25% more than the quantized model takes.
    """
    before = _tuned["threshold"]
    if before > OWN_PAGES_BYTES:
        _mallopt(M_MMAP_THRESHOLD, OWN_PAGES_BYTES)
        _tuned["threshold"] = OWN_PAGES_BYTES
    try:
        yield
    finally:
        if before > OWN_PAGES_BYTES:
            _mallopt(M_MMAP_THRESHOLD, before)
            _tuned["threshold"] = before


def is_tuned(device: torch.device) -> bool:
    """Whether `tune_process` does anything there."""
    return os.environ.get("LORAKIT_TUNE") != "0" and device.type == "cpu"


def own_pages_from(device: torch.device) -> int:
    """From how many bytes on a tensor has pages of its own in such a process; smaller ones share
    a heap.  0 where there is no such heap."""
    if device.type != "cpu" or _glibc_mallopt() is None:
        return 0
    if not is_tuned(device):
        return LARGEST_DYNAMIC_BYTES
    return _tuned["keep"]


_tuned = {"threshold": 0, "keep": KEEP_BYTES}
"""What `tune_process` has done to this process: the threshold that holds, and the one that malloc
takes where memory is to be kept, KEEP_BYTES until it has refused that."""


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


def _set_malloc_thresholds() -> bool:
    threshold = _tuned["keep"]
    done = _mallopt(M_MMAP_THRESHOLD, threshold)
    if not done and threshold > LARGEST_DYNAMIC_BYTES:
        _tuned["keep"] = threshold = LARGEST_DYNAMIC_BYTES
        done = _mallopt(M_MMAP_THRESHOLD, threshold)
    done = done and _mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    # One heap for all threads: what one frees, another can have.
    _mallopt(M_ARENA_MAX, 1)
    _tuned["threshold"] = threshold if done else 0
    return done


def trim_heap() -> None:
    """Has malloc give back what it keeps of memory that is freed, where it is told to keep any."""
    if _tuned["threshold"] and (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def _mallopt(setting: int, value: int) -> bool:
    mallopt = _glibc_mallopt()
    return mallopt is not None and bool(mallopt(setting, value))


def _glibc_mallopt() -> Callable[[int, int], int] | None:
    return _glibc("mallopt")


def _glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        # Another C library (musl) has no such function.
        return None
    return found
