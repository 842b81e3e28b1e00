"""safetensors files are read over a map of them, and nothing in one is believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from patchbay.arrays import view_of
from patchbay.errors import ProtocolError
from patchbay.saving import read_safetensors, save_results


def write(path: Path, header: Any, data: bytes = bytes(16), *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Every dtype and shape, extents of zero and no axes included, to the bit."""
    arrays = {
        "f32": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32),
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "f8": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
        "bool": np.array([True, False]),
        "number": np.array(7, np.int64),
        "none": np.empty((0, 3), np.float16),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    save_results(arrays, tmp_path / "a.safetensors")
    back = {name: view_of(tensor) for name, tensor in read_safetensors(tmp_path / "a.safetensors").items()}
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    """Free text in the header is passed over."""
    file = write(tmp_path / "m", {"__metadata__": {"format": "pt"}, **entry()})
    assert list(read_safetensors(file)) == ["x"]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        {"x": None},
        {"x": {}},
        entry(dtype="U32"),
        entry(dtype=["F32"]),
        entry(shape=(-4,)),
        entry(shape=(4.0,)),
        entry(shape="4"),
        entry(shape=(2**40, 2**40)),
        entry(offsets=(0, 17)),
        entry(offsets=(-16, 0)),
        entry(offsets=(16, 0)),
        entry(offsets=(8, 24)),
        entry(offsets=(0, 16, 32)),
        entry(offsets=(True, 16)),
        entry(offsets=None),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: Any) -> None:
    """Whatever a header says, the answer is a ProtocolError."""
    with pytest.raises(ProtocolError):
        read_safetensors(write(tmp_path / "bad.safetensors", header))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10_000])
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    """The announced length is compared with the file before anything is read."""
    with pytest.raises(ProtocolError):
        read_safetensors(write(tmp_path / "bad.safetensors", entry(), length=length))


def test_files_too_short_to_be_one_are_refused(tmp_path: Path) -> None:
    """An empty file, and one that ends inside its first number."""
    for size in (0, 7):
        (tmp_path / "short").write_bytes(bytes(size))
        with pytest.raises(ProtocolError, match="not a safetensors file"):
            read_safetensors(tmp_path / "short")
