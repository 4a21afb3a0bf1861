"""Reading safetensors through a map: every dtype, odd layouts, and files that are damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import UserError
from lorakit.protocols import TensorSpec
from lorakit.weights.dtypes import dtype_name, torch_dtype
from lorakit.weights.safetensors_file import read_header, read_tensors

NAMES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]
NAMES += ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "C64"]


def write(path: Path, entries: dict[str, Any], data: bytes, pad: int = 0) -> Path:
    header = json.dumps(entries).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    if name == "F8_E8M0" and not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no such dtype")
    dtype = torch_dtype(name)
    assert dtype is not None
    assert dtype_name(dtype) == name
    raw = bytes(i % 2 for i in range(6 * dtype.itemsize))
    entry = {"dtype": name, "shape": [2, 3], "data_offsets": [0, len(raw)]}
    path = write(tmp_path / "m.safetensors", {"x": entry}, raw)
    assert read_header(path) == {"x": TensorSpec((2, 3), name)}
    ((found, tensor),) = read_tensors(path)
    assert (found, tensor.dtype, tuple(tensor.shape)) == ("x", dtype, (2, 3))
    assert tensor.view(torch.uint8).numpy().tobytes() == raw


@pytest.mark.parametrize("pad", range(8))
def test_as_safetensors_reads_it_at_any_alignment(pad: int, tmp_path: Path) -> None:
    values = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "m": torch.rand(5, 7)}
    values["odd"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    values["b"] = torch.rand(4).bfloat16()
    save_file(values, tmp_path / "first.safetensors")
    content = (tmp_path / "first.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    path = write(tmp_path / "m.safetensors", entries, content[8 + length :], pad)
    theirs = load_file(path)
    found = {name: tensor.clone() for name, tensor in read_tensors(path)}
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)


def test_a_tensor_can_be_read_after_its_pages_went(tmp_path: Path) -> None:
    values = {f"t{i}": torch.rand(300, 1000) for i in range(4)}
    save_file(values, tmp_path / "m.safetensors")
    kept = dict(read_tensors(tmp_path / "m.safetensors"))
    assert all(torch.equal(kept[name], values[name]) for name in values)


def test_pages_are_let_go_of(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("measured with Linux's /proc")
    path = tmp_path / "m.safetensors"
    save_file({f"t{i}": torch.rand(1024, 1024) for i in range(8)}, path)
    resident = []
    for _, tensor in read_tensors(path):
        tensor.sum()
        after = smaps.read_text().split(str(path))[1]
        resident.append(int(after.split("Rss:")[1].split()[0]))
    assert min(resident) >= 4096
    assert max(resident) < 2 * 4096 + 256


@pytest.mark.parametrize(
    ("entry", "size", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, 4, "describes"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, 8, r"x: bytes .* are not \[3\]"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, 8, "an entry of"),
        ({"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}, 8, "F3, which torch lacks"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, 8, "shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, 0, "an entry of"),
        ("x", 0, "not a readable safetensors file"),
    ],
)
def test_damaged_files(entry: Any, size: int, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"x": entry}, bytes(size))
    with pytest.raises(UserError, match=message) as error:
        list(read_tensors(path))
    assert str(path) in error.value.message
