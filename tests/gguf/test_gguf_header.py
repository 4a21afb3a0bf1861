"""The header reader: equal to gguf's own, and never anything but a UserError on bad bytes."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

import gguf
from lorakit.errors import UserError
from lorakit_gguf.checkpoint import GGUFCheckpoint
from lorakit_gguf.file import GGUFFile


def test_reads_what_ggufs_own_reader_reads(tiny: Any, tmp_path: Path) -> None:
    more = {"general.languages": ["en", "fr"], "test.numbers": [1, -2], "test.nothing": False}
    path = tiny.write(tmp_path / "m.gguf", "Q8_0", fields=more)
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.fields.keys() == theirs.keys()
    for key, value in theirs.items():
        assert file.fields[key] == (pytest.approx(value) if isinstance(value, float) else value)
    assert [(t.name, tuple(reversed(t.shape.tolist())), t.data_offset) for t in reader.tensors] == [
        (name, stored.shape, stored.offset) for name, stored in file.tensors.items()
    ]


def test_floats_are_the_shortest_decimal(tiny: Any, tmp_path: Path) -> None:
    file = GGUFFile(tiny.write(tmp_path / "m.gguf", fields={"a.b": 3.4028234663852886e38}))
    assert file.fields["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert file.fields["llama.rope.freq_base"] == 50000.0
    stored = struct.pack("<f", 3.4028234663852886e38)
    assert struct.pack("<f", file.fields["a.b"]) == stored


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 this is a zip", "not a GGUF file"),
        (b"GGUF", "ends inside the version"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "ends inside"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "ends inside"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 60), "claims 1,15"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "not UTF-8"),
    ],
)
def test_bytes_that_are_no_gguf(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        GGUFFile(path)
    assert str(path) in error.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        GGUFFile(tmp_path / "none.gguf")


def test_a_file_cut_short_anywhere(tiny: Any, tmp_path: Path) -> None:
    content = tiny.write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 1200, 37), *range(1200, len(content), 9973), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError) as error:
            GGUFCheckpoint.open(path)
        assert str(path) in error.value.message


def test_damaged_headers_never_end_in_another_exception(tiny: Any, tmp_path: Path) -> None:
    content = bytearray(tiny.write(tmp_path / "m.gguf").read_bytes())
    end = min(stored.offset for stored in GGUFFile(tmp_path / "m.gguf").tensors.values())
    dice = random.Random(0)
    path = tmp_path / "damaged.gguf"
    messages = []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[dice.randrange(end)] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            GGUFCheckpoint.open(path).files()
        except UserError as error:
            messages.append(error.message)
    assert len(messages) > 50
    assert all(str(path) in message for message in messages)


def test_a_part_of_a_split_model(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one part of 3"):
        GGUFFile(tiny.write(tmp_path / "m.gguf", fields={"split.count": 3}))


def test_a_type_gguf_cannot_dequantize(tiny: Any, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    # The name's length, the name, the number of dimensions, two dimensions, then the type.
    name = b"blk.0.ffn_up.weight"
    place = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    content[place : place + 4] = struct.pack("<I", gguf.GGMLQuantizationType.I32)
    path.write_bytes(content)
    with pytest.raises(UserError, match="tensors of type I32, which gguf cannot") as error:
        GGUFFile(path)
    assert "Q4_1" in error.value.fix
    content[place : place + 4] = struct.pack("<I", 9999)
    path.write_bytes(content)
    with pytest.raises(UserError, match="type number 9999"):
        GGUFFile(path)
