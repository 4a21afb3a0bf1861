"""fp32 training on AMX and by AVX-512: the plugin's entry point, which does not import torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lorakit import hookimpl
from lorakit.records import KernelLibrary

if TYPE_CHECKING:
    from lorakit.kernel_protocol import Kernels


AVX512, AMX = 0, 1
"""What computes; see `_kernels.pyi`."""


def unusable(units: int) -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    try:
        from lorakit_x86 import _kernels
    except ModuleNotFoundError:
        return (
            "they were not built, for want of a C compiler when lorakit-x86 was installed "
            "(pip install --no-cache-dir --force-reinstall lorakit-x86 builds them)"
        )
    except ImportError as error:
        return f"they cannot be loaded: {error}"
    return _kernels.unusable(units)


def load(units: int) -> Kernels:
    """See `lorakit_x86.kernels`.

    Raises:
        RuntimeError: They cannot be used on this machine.
    """
    # Also asks Linux for AMX's units: without, their first instruction would end the process.
    if (reason := unusable(units)) is not None:
        raise RuntimeError(reason)
    from lorakit_x86 import _kernels
    from lorakit_x86.kernels import AMXKernels, AVX512Kernels

    return AMXKernels(_kernels) if units == AMX else AVX512Kernels(_kernels)


@hookimpl
def lorakit_kernels() -> list[KernelLibrary]:
    return [
        KernelLibrary(
            name="amx",
            summary="fp32 products by AMX's bf16 units, three to six of them for each",
            unusable=partial(unusable, AMX),
            load=partial(load, AMX),
        ),
        KernelLibrary(
            name="avx512",
            summary="attention, norms, gates and products of bf16 weights by AVX-512",
            unusable=partial(unusable, AVX512),
            load=partial(load, AVX512),
        ),
    ]
