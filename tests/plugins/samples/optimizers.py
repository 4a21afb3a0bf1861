"""An optimizer: the sign of a running mean of gradients."""

from attrs import field, frozen

from lorakit import hookimpl
from lorakit.options import OptimizerOptions
from lorakit.records import OptimizerType


@frozen(kw_only=True)
class SignOptions(OptimizerOptions):
    """`[optimizer]` with `name = "sign"`.

    Attributes:
        decay: Of the mean.
    """

    decay: float = field(default=0.5)


def build(parameters, options):
    import torch

    class Sign(torch.optim.Optimizer):
        def __init__(self):
            super().__init__(parameters, {"lr": options.lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - options.decay)
                    parameter.sub_(mean.sign(), alpha=group["lr"])

    return Sign()


@hookimpl
def lorakit_optimizers():
    return [OptimizerType(name="sign", summary="signs", options=SignOptions, build=build)]
