"""fp32 training on Intel's AMX units: the plugin's entry point, which does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit import hookimpl
from lorakit.records import KernelLibrary

if TYPE_CHECKING:
    from lorakit.protocols import Kernels


def unusable() -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    try:
        from lorakit_amx import _kernels
    except ModuleNotFoundError:
        return (
            "they were not built, for want of a C compiler when lorakit-amx was installed "
            "(pip install --no-cache-dir --force-reinstall lorakit-amx builds them)"
        )
    except ImportError as error:
        return f"they cannot be loaded: {error}"
    reason: str | None = _kernels.unusable()
    return reason


def load() -> Kernels:
    """See `lorakit_amx.kernels.AMXKernels`.

    Raises:
        RuntimeError: They cannot be used on this machine.
    """
    # Also asks Linux for the units: without, their first instruction would end the process.
    if (reason := unusable()) is not None:
        raise RuntimeError(reason)
    from lorakit_amx.kernels import AMXKernels

    return AMXKernels()


@hookimpl
def lorakit_kernels() -> list[KernelLibrary]:
    return [
        KernelLibrary(
            name="amx",
            summary="fp32 products by AMX's bf16 units, three to six of them for each",
            unusable=unusable,
            load=load,
        )
    ]
