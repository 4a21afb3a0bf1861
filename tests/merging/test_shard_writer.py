"""Files written tensor by tensor are what the safetensors library writes and reads."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit.protocols import TensorSpec
from lorakit.weights.dtypes import torch_dtype
from lorakit.weights.safetensors_file import read_header
from lorakit.weights.shard_writer import ShardWriter, stored_bytes, write_tensors

DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U16",
    "U8",
    "BOOL",
]

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
specs = st.builds(
    TensorSpec,
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
)


def random_tensor(spec, generator):
    content = torch.randint(0, 2, (stored_bytes(spec),), generator=generator, dtype=torch.uint8)
    return content.view(torch_dtype(spec.dtype)).reshape(spec.shape)


def same(left, right):
    """Bit for bit: torch compares no 8-bit floats, and no NaN."""
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


@settings(max_examples=60)
@given(
    st.dictionaries(names.filter(lambda n: n != "__metadata__"), specs, max_size=6),
    st.dictionaries(names, names, max_size=2),
    st.randoms(use_true_random=False),
)
def test_reads_back_as_written_in_any_order(tmp_path_factory, specs, metadata, chance):
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {name: random_tensor(spec, generator) for name, spec in specs.items()}
    order = sorted(tensors)
    chance.shuffle(order)
    with ShardWriter(path, specs, metadata) as writer:
        for name in order:
            writer.write(name, tensors[name])
    with safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(found[name], tensor), name
    assert read_header(path) == specs


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    specs = {
        "a": TensorSpec((3,), "U8"),
        "b": TensorSpec((5,), "F32"),
        "c": TensorSpec((1,), "F16"),
    }
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, specs, {}) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.ones(spec.shape))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, spec in specs.items():
        start = 8 + length + header[name]["data_offsets"][0]
        assert start % torch_dtype(spec.dtype).itemsize == 0
    # What is written as fp32 and announced as fp16 is rounded to it.
    assert same(load_file(path)["c"], torch.ones(1, dtype=torch.float16))


def test_non_contiguous_tensor_is_written_in_its_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).t()
    with ShardWriter(tmp_path / "x", {"t": TensorSpec((4, 3), "F32")}, {}) as writer:
        writer.write("t", tensor)
    assert same(load_file(tmp_path / "x")["t"], tensor)


@pytest.mark.parametrize(
    ("writes", "said"),
    [
        ([("a", (2, 3)), ("a", (2, 3))], "not new"),
        ([("a", (3, 2))], r"a \[3, 2\] is not \[2, 3\]"),
        ([], "never written: \\['a'\\]"),
    ],
)
def test_a_file_that_would_be_wrong_is_an_error(writes, said, tmp_path):
    def write():
        with ShardWriter(tmp_path / "x", {"a": TensorSpec((2, 3), "F32")}, {}) as writer:
            for name, shape in writes:
                writer.write(name, torch.zeros(shape))

    with pytest.raises(ValueError, match=said):
        write()


@given(
    st.dictionaries(names.filter(lambda n: n != "__metadata__"), specs, max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_file_of_tensors_is_one_of_pytorchs(tmp_path_factory, specs, chance):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {name: random_tensor(spec, generator) for name, spec in specs.items()}
    # As parameters are, and transposed ones.
    tensors = {name: t.t() if t.dim() == 2 else t for name, t in tensors.items()}
    write_tensors(path, tensors)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
