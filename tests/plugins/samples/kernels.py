"""Kernels: torch's own operations on float64, which count what they are asked for."""

import os

from lorakit import hookimpl
from lorakit.records import KernelLibrary


def load():
    import torch

    class Wide:
        def __init__(self):
            self.asked = open(os.environ.get("ASKED", os.devnull), "a", buffering=1)  # noqa: SIM115

        def multiplies(self, rows, weight):
            return rows > 1

        def multiply(self, out, x, weight, *, transposed, add, scale=None):
            self.asked.write("multiply\n")
            wide = weight.double()
            x = x if scale is None else x.double() * scale
            y = x.double() @ (wide.t() if transposed else wide)
            out.copy_(out.double() + y if add else y)

        def adapts(self, rows, dtype):
            return True

        def adapt(self, x, weight, down, up, scale, out, *, ratio=None):
            self.asked.write("adapt\n")
            low = scale * x.double() @ down.double().t()
            y = x.double() @ weight.double().t() + low @ up.double().t()
            out.copy_(y if ratio is None else y * ratio)
            return low.float()

        def adapt_backward(self, dout, x, low, weight, down, up, scale, dx, *, add, ratio=None):
            self.asked.write("adapt_backward\n")
            dout = dout.double() if ratio is None else dout.double() * ratio
            d_low = scale * dout @ up.double()
            if dx is not None:
                found = dout @ weight.double() + d_low @ down.double()
                dx.copy_(dx + found if add else found)
            return (d_low.t() @ x.double()).float(), (dout.t() @ low.double()).float()

        def sublayers(self):
            return None

        def gates(self, g):
            return True

        def gate(self, g, u, out):
            self.asked.write("gate\n")
            out.copy_(torch.nn.functional.silu(g.double()) * u)

        def gate_backward(self, dout, g, u, dg, du):
            self.asked.write("gate_backward\n")
            g, u = (x.double().requires_grad_() for x in (g, u))
            with torch.enable_grad():
                out = torch.nn.functional.silu(g) * u
            found = torch.autograd.grad(out, (g, u), dout.double())
            dg.copy_(found[0])
            du.copy_(found[1])

        def normalizes(self, x):
            return True

        def normalize(self, x, weight, eps, out):
            self.asked.write("normalize\n")
            out.copy_(normalized(x.double(), weight.double(), eps))
            return torch.tensor(eps)

        def normalize_backward(self, dout, x, weight, kept, dx):
            self.asked.write("normalize_backward\n")
            x = x.double().requires_grad_()
            with torch.enable_grad():
                y = normalized(x, weight.double(), kept.item())
            dx.copy_(torch.autograd.grad(y, x, dout.double())[0])

        def rotates(self, x):
            return True

        def rotate(self, x, cos, sin, out, *, back):
            self.asked.write("rotate\n")
            half = cos.shape[-1]
            x, cos, sin = x.double(), cos.double(), -sin.double() if back else sin.double()
            first, second = x[..., :half], x[..., half : 2 * half]
            turned = first * cos - second * sin, second * cos + first * sin
            out.copy_(torch.cat([*turned, x[..., 2 * half :]], dim=-1))

        def attends(self, q, k):
            return True

        def attention_bytes(self, q, k):
            return 0

        def attend(self, q, k, v, documents, scale, out, workspace):
            self.asked.write("attend\n")
            out.copy_(attended(*(x.double() for x in (q, k, v)), documents, scale))
            return torch.empty(0)

        def attend_backward(self, dout, q, k, v, documents, out, kept, scale, into, workspace):
            self.asked.write("attend_backward\n")
            inputs = [x.double().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                again = attended(*inputs, documents, scale)
            found = torch.autograd.grad(again, inputs, dout.double())
            for gradient, tensor in zip(into, found, strict=True):
                gradient.copy_(tensor)

    def normalized(x, weight, eps):
        return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight

    def attended(q, k, v, documents, scale):
        results, start = torch.zeros_like(q), 0
        for length, own in documents.lengths.tolist():
            places = documents.places[start : start + length]
            whole = document_attended(q[places], k[places], v[places], scale)
            results = results.index_copy(0, places[length - own :], whole[length - own :])
            start += length
        return results

    def document_attended(q, k, v, scale):
        shared = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        hidden = torch.ones(q.shape[1], q.shape[1]).triu_(1).bool()
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1)

    return Wide()


@hookimpl
def lorakit_kernels():
    return [
        KernelLibrary(
            name="a-wide", summary="products in float64", unusable=lambda: None, load=load
        ),
        KernelLibrary(
            name="a-none",
            summary="products by units of tomorrow",
            unusable=lambda: "this is today",
            load=load,
        ),
    ]
