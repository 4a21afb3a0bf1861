"""A quantization scheme: int8 with one scale for each output row."""

from lorakit import hookimpl
from lorakit.records import QuantizationScheme


def quantize(linear, weight, options, compute_dtype):
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Int8Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bias = linear.bias
            scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("codes", (weight / scale).round().to(torch.int8))

        def dequantize(self):
            return (self.codes * self.scale).to(compute_dtype)

        def forward(self, x):
            return F.linear(x, self.dequantize(), self.bias)

    return Int8Linear()


@hookimpl
def lorakit_quantizations():
    return [QuantizationScheme(name="rows8", summary="int8, a scale a row", quantize=quantize)]
