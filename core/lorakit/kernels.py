"""Which library computes a run's fp32 products on a CPU: torch, or kernels that a plugin brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.errors import UserError
from lorakit.modules.matmul import use_kernels
from lorakit.options import AUTO, TORCH
from lorakit.plugins import explain
from lorakit.runtime import is_tuned

if TYPE_CHECKING:
    from lorakit.catalog import Catalog
    from lorakit.protocols import Kernels
    from lorakit.records import KernelLibrary


def choose_kernels(name: str, catalog: Catalog, device: torch.device) -> str | None:
    """Has products computed by the kernels of that name from here on; returns a line for the log.

    Args:
        name: `training.kernels`; `auto` takes the first by name that can be used on this machine,
            if the process is tuned at all.
        catalog: What is installed.
        device: Kernels are for the CPU.

    Raises:
        UserError: Kernels are named that cannot be used on this machine.
    """
    use_kernels(None)
    unwanted = device.type != "cpu" or (name == AUTO and not is_tuned(device))
    found = None if unwanted else _found(name, catalog)
    if found is None:
        return None
    use_kernels(found[1])
    return f'kernels: {found[0].summary} (training.kernels = "{TORCH}" turns this off)'


def _found(name: str, catalog: Catalog) -> tuple[KernelLibrary, Kernels] | None:
    if name == TORCH:
        return None
    libraries = catalog.all("kernels") if name == AUTO else [catalog.get("kernels", name)]
    for library in libraries:
        try:
            reason = library.unusable()
            if reason is None:
                return library, library.load()
        except Exception as error:
            reason = explain(error)
        if name != AUTO:
            raise UserError(
                f"training.kernels: {name} cannot be used here: {reason}",
                f'Set training.kernels = "{AUTO}".',
            )
    return None
