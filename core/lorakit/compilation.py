"""torch.compile, block by block."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lorakit.errors import RunError, UserError
from lorakit.logs import LoggerGroup
from lorakit.modules.uncompiled import leave_uncompiled
from lorakit.protocols import CausalLM

CPU_COMPILERS = ("g++", "clang++", "cl")


def check_compiler(device: torch.device) -> None:
    """Tells before anything is loaded that a device's code cannot be compiled.

    Raises:
        UserError: What torch.compile calls is not installed.
    """
    if device.type == "cuda":
        missing = None if importlib.util.find_spec("triton") else "Triton (pip install triton)"
    else:
        named = os.environ.get("CXX")
        found = any(shutil.which(name) for name in ([named] if named else CPU_COMPILERS))
        missing = None if found else f"a C++ compiler ({named or 'g++ or clang++'})"
    if missing:
        raise UserError(
            f"training.compile: torch.compile needs {missing}, which is not there",
            "Install it, or set training.compile = false.",
        )


def compile_blocks(model: CausalLM) -> None:
    """Compiles block by block: one compilation serves all that are alike, so starting stays
    short, and one serves all lengths.  Comes before checkpointing, which calls what is compiled.
    """
    leave_uncompiled()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


@contextmanager
def compilation_told(optimizer: torch.optim.Optimizer, log: LoggerGroup) -> Iterator[None]:
    """Within it, the first optimizer step is followed by a notice of how long compiling took.

    Raises:
        RunError: Something could not be compiled.
    """
    from torch._dynamo.callback import callback_handler
    from torch._dynamo.exc import TorchDynamoException

    spent, since = 0.0, 0.0

    # Before torch 2.7 they are given nothing.
    def start(*_: Any) -> None:
        nonlocal since
        since = time.perf_counter()

    def end(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter() - since

    def tell(*_: Any) -> None:
        hook.remove()
        log.notice(f"compiling took {spent:.1f} s")

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    hook = optimizer.register_step_post_hook(tell)
    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise RunError(
            f"training.compile: a block cannot be compiled: {reason} "
            "(set training.compile = false to run without)"
        ) from error
    finally:
        hook.remove()
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
