"""Conformance checks that first-party and third-party plugins run alike, and what tests of a
plugin need: small random checkpoints, and fresh environments to install it into.

Nothing here needs pytest: a check raises `ConformanceError`, an `AssertionError`.
"""

from lorakit.testing.checkpoints import write_checkpoint
from lorakit.testing.conformance import Case, check_plugin, conformance_cases
from lorakit.testing.failure import ConformanceError
from lorakit.testing.inputs import check_dataset, check_model_source, check_weight_format
from lorakit.testing.kernels import check_kernels
from lorakit.testing.layers import check_adapter, check_quantization
from lorakit.testing.models import check_model_family
from lorakit.testing.offers import check_torch_free
from lorakit.testing.steps import check_optimizer, check_precision
from lorakit.testing.storage import check_checkpointer, check_logger

__all__ = [
    "Case",
    "ConformanceError",
    "check_adapter",
    "check_checkpointer",
    "check_dataset",
    "check_kernels",
    "check_logger",
    "check_model_family",
    "check_model_source",
    "check_optimizer",
    "check_plugin",
    "check_precision",
    "check_quantization",
    "check_torch_free",
    "check_weight_format",
    "conformance_cases",
    "write_checkpoint",
]
