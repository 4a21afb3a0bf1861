"""What computes a run in fp32 on a CPU: torch, or kernels that a plugin brings."""

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


def choose_kernels(name: str, catalog: Catalog, device: torch.device) -> list[str]:
    """Has the kernels of that name used from here on; returns lines for the log.

    Args:
        name: `training.kernels`; `auto` takes the first by name that can be used on this machine,
            if the process is tuned at all.
        catalog: What is installed.
        device: Kernels are for the CPU.

    Raises:
        UserError: Kernels are named that cannot be used on this machine.
    """
    use_kernels(None)
    if name == TORCH or device.type != "cpu" or (name == AUTO and not is_tuned(device)):
        return []
    said: list[str] = []
    for library in catalog.all("kernels") if name == AUTO else [catalog.get("kernels", name)]:
        try:
            reason = library.unusable()
            if reason is None:
                use_kernels(library.load())
                off = f'training.kernels = "{TORCH}" turns this off'
                return [*said, f"kernels: {library.summary} ({off})"]
        except Exception as error:
            reason = explain(error)
            said.append(f"kernels: {library.name} failed and is not used: {reason}")
        if name != AUTO:
            raise UserError(
                f"training.kernels: {name} cannot be used here: {reason}",
                f'Set training.kernels = "{AUTO}".',
            )
    return said
