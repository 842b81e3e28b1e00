"""Element types: the closed set that graphs, the wire and the kernels agree on, and how two of them promote.

Promotion follows the array API standard and, for its open question (integers with floats), PyTorch: the float wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["bool", "uint", "int", "float"]

_KIND_RANK: Mapping[str, int] = MappingProxyType({"bool": 0, "uint": 1, "int": 1, "float": 2})


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the array API / torch name, such as ``"float32"``.
        kind: bool, uint, int or float.
        itemsize: bytes per element.
    """

    name: str
    kind: Kind
    itemsize: int

    @property
    def is_floating(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def is_low_precision(self) -> bool:
        """True for 8-bit floats, which are stored and carried but not computed with."""
        return self.kind == "float" and self.itemsize == 1

    def __repr__(self) -> str:
        return self.name


bool_ = DType("bool", "bool", 1)
uint8 = DType("uint8", "uint", 1)
int8 = DType("int8", "int", 1)
int16 = DType("int16", "int", 2)
int32 = DType("int32", "int", 4)
int64 = DType("int64", "int", 8)
float8_e4m3fn = DType("float8_e4m3fn", "float", 1)
float8_e5m2 = DType("float8_e5m2", "float", 1)
float16 = DType("float16", "float", 2)
bfloat16 = DType("bfloat16", "float", 2)
float32 = DType("float32", "float", 4)
float64 = DType("float64", "float", 8)

DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        d.name: d
        for d in (
            bool_,
            uint8,
            int8,
            int16,
            int32,
            int64,
            float8_e4m3fn,
            float8_e5m2,
            float16,
            bfloat16,
            float32,
            float64,
        )
    }
)


def promote(a: DType, b: DType) -> DType:
    """The dtype of a binary operation between arrays of dtypes `a` and `b`.

    Raises:
        ValueError: an 8-bit float meets a different dtype (cast explicitly: no promotion is defined for them).
    """
    if a is b or a == b:
        return a
    if a.is_low_precision or b.is_low_precision:
        raise ValueError(f"{a} and {b} do not promote; cast with astype first")
    rank_a, rank_b = _KIND_RANK[a.kind], _KIND_RANK[b.kind]
    if rank_a != rank_b:
        return a if rank_a > rank_b else b
    if a.is_floating:
        if a.itemsize == b.itemsize:  # float16 with bfloat16: neither holds the other
            return float32
        return a if a.itemsize > b.itemsize else b
    if a.kind == b.kind:
        return a if a.itemsize > b.itemsize else b
    unsigned, signed = (a, b) if a.kind == "uint" else (b, a)
    return signed if signed.itemsize > unsigned.itemsize else int16


def scalar_kind(value: bool | int | float) -> Kind:
    """The kind of a Python scalar, which is all that it contributes to promotion."""
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "float"


def promote_scalar(dtype: DType, kind: Kind) -> DType:
    """The dtype of an operation between an array of `dtype` and a Python scalar of `kind`; scalars are weak."""
    if _KIND_RANK[dtype.kind] >= _KIND_RANK[kind]:
        return dtype
    return float32 if kind == "float" else int64
