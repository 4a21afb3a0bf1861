"""An adapter method that trains one factor for each output row: y = (W x) * (1 + s)."""

from attrs import field, frozen

from lorakit import hookimpl
from lorakit.records import AdapterMethod


@frozen(kw_only=True)
class ScaleOptions:
    """`[adapter]` with `name = "scale"`.

    Attributes:
        targets: Endings of the layers' names.
    """

    targets: tuple[str, ...] = field(default=("q_proj", "o_proj"))


def targets(options, linears):
    return [name for name in linears if name.endswith(options.targets)]


def wrap(linear, options, name):
    import torch
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.scale_rows = nn.Parameter(torch.zeros(base.out_features))

        def forward(self, x):
            y, factor = self.base(x), 1 + self.scale_rows.to(x.dtype)
            bias = self.base.bias
            return y * factor if bias is None else (y - bias) * factor + bias

    return Scaled(linear)


def to_config(options, names):
    return {"target_modules": list(options.targets)}


def from_config(config):
    return ScaleOptions(targets=tuple(config["target_modules"]))


def merge(weight, tensors, options, name):
    return weight.float() * (1 + tensors["scale_rows"].float()).unsqueeze(1)


@hookimpl
def lorakit_adapters():
    return [
        AdapterMethod(
            name="scale",
            summary="one factor for each output row",
            options=ScaleOptions,
            peft_type="SCALE",
            parameter_prefix="scale_",
            targets=targets,
            wrap=wrap,
            to_config=to_config,
            from_config=from_config,
            merge=merge,
        )
    ]
