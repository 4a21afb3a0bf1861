"""A precision policy: everything in double precision, and it says so."""

from lorakit import hookimpl
from lorakit.records import PrecisionPolicy


def resolve(device, options):
    import torch

    class Double:
        storage = compute = adapter = torch.float64
        notice = "precision: twice the usual"

        def __init__(self):
            self.steps = 0

        def backward(self, loss):
            loss.backward()

        def step(self, optimizer, max_norm):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
            optimizer.step()
            self.steps += 1
            return float(norm)

        def state(self):
            return {"steps": self.steps}

        def restore(self, state):
            self.steps = state["steps"]

    return Double()


@hookimpl
def lorakit_precisions():
    return [PrecisionPolicy(name="double", summary="float64", resolve=resolve)]
