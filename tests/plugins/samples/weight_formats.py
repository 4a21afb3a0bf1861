"""A weight format: numpy archives, beside a config.json."""

import json

from lorakit import hookimpl
from lorakit.protocols import TensorSpec
from lorakit.records import WeightFormat


class Archive:
    def __init__(self, path):
        import numpy

        self.path = path
        self.config = json.loads((path / "config.json").read_text())
        self.arrays = numpy.load(path / "weights.npz")

    def files(self):
        return {p.name: p.read_bytes() for p in self.path.glob("tokenizer*.json")}

    def shards(self):
        specs = {n: TensorSpec(self.arrays[n].shape, "F32") for n in self.arrays.files}
        return {"model.safetensors": specs}

    def tensors(self, shard=None):
        import torch

        for name in self.arrays.files:
            yield name, torch.from_numpy(self.arrays[name])


def claims(path):
    return (path / "weights.npz").is_file()


@hookimpl
def lorakit_weight_formats():
    return [WeightFormat(name="npz", summary="numpy archives", claims=claims, open=Archive)]
