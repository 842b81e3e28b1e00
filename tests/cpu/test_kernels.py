"""Every operation: torch kernel against numpy reference, and both against the shape rule, on random calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from patchbay import reference
from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS, PURE
from patchbay.ir.ops.spec import OpSpec, TensorSpec
from patchbay_server import kernels
from tests.op_examples import Operand, op_examples

#: Relative to the largest element of the result: what a few roundings of each dtype may make of it.
_TOLERANCE = {
    "float64": 1e-10,
    "float32": 2e-5,
    "float16": 1e-2,
    "bfloat16": 6e-2,
    "float8_e5m2": 0.3,
    "float8_e4m3fn": 0.15,
}


def to_torch(value: Operand) -> Any:
    """A tensor of its own for an array; Python numbers as they are."""
    return kernels.to_tensor(reference.to_data(value)) if isinstance(value, np.ndarray) else value


def to_wide(value: torch.Tensor | np.ndarray) -> np.ndarray:
    """As numpy, floats in float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to(torch.float64).numpy() if value.is_floating_point() else value.detach().numpy()
    return value.astype(np.float64) if value.dtype.kind not in "iub" else value


def assert_spec(result: torch.Tensor, spec: TensorSpec) -> None:
    assert tuple(result.shape) == spec.shape
    assert kernels.from_torch_dtype(result.dtype) == spec.dtype


def assert_close(got: torch.Tensor | np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    a, b = to_wide(got), to_wide(wanted)
    if b.dtype.kind in "iub":
        np.testing.assert_array_equal(a, b)
        return
    finite = np.abs(b[np.isfinite(b)])
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, finite.max(initial=0.0)))


Check = Callable[[list[Any], dict[str, Any], tuple[Any, ...], tuple[Any, ...], float], None]


def _check_topk(
    args: list[Any], attrs: dict[str, Any], got: tuple[Any, ...], wanted: tuple[Any, ...], tol: float
) -> None:
    """The values are determined; of the positions, only that they are different and hold those values."""
    assert_close(got[0], wanted[0], 0)
    assert_close(torch.take_along_dim(args[0], got[1], attrs["axis"]), wanted[0], 0)
    ordered = torch.sort(got[1], attrs["axis"]).values
    assert not (torch.diff(ordered, dim=attrs["axis"]) == 0).any()


def _check_qr(
    args: list[Any], attrs: dict[str, Any], got: tuple[Any, ...], wanted: tuple[Any, ...], tol: float
) -> None:
    q, r = got
    assert_close(q @ r, to_wide(args[0]), 20 * tol)
    assert_close(q.mT @ q, np.broadcast_to(np.eye(q.shape[-1]), (q.mT @ q).shape), 20 * tol)
    assert_close(r.tril(-1), np.zeros(r.shape), tol)


def _check_svd(
    args: list[Any], attrs: dict[str, Any], got: tuple[Any, ...], wanted: tuple[Any, ...], tol: float
) -> None:
    u, s, vh = got
    assert_close(s, wanted[1], 20 * tol)
    rank = s.shape[-1]
    assert_close(u[..., :rank] * s.unsqueeze(-2) @ vh[..., :rank, :], to_wide(args[0]), 20 * tol)


def _check_eigh(
    args: list[Any], attrs: dict[str, Any], got: tuple[Any, ...], wanted: tuple[Any, ...], tol: float
) -> None:
    values, vectors = got
    assert_close(values, wanted[0], 20 * tol)
    assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, to_wide(args[0]), 20 * tol)


#: Operations whose result is not unique, or whose problem amplifies rounding.
_CHECKS: Mapping[str, Check] = {"topk": _check_topk, "qr": _check_qr, "svd": _check_svd, "eigh": _check_eigh}
_LOOSER = {
    "inv": 10,
    "solve": 10,
    "pinv": 1000,
    "det": 10,
    "slogdet": 100,
    "cholesky": 10,
    "matrix_norm": 10,
    "svdvals": 10,
}


def check_example(spec: OpSpec, args: list[Operand], attrs: dict[str, Any]) -> None:
    """Kernel, reference and rule agree on one call, and the kernel leaves its arguments alone."""
    inferred = spec.infer([reference.spec_of(a) for a in args], attrs)
    tensors = [to_torch(a) for a in args]
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    filled = spec.fill(attrs)
    got = kernels.kernel(spec)(*tensors, **filled)
    wanted = reference.evaluate(spec, args, attrs)
    parts, expected = (got, wanted) if isinstance(inferred, tuple) else ((got,), (wanted,))
    specs = inferred if isinstance(inferred, tuple) else (inferred,)
    assert isinstance(parts, tuple)
    assert len(parts) == len(specs) == len(spec.results or "x")
    for part, one in zip(parts, specs, strict=True):
        assert_spec(part, one)
    for tensor, copy in zip(tensors, before, strict=True):
        if isinstance(tensor, torch.Tensor):
            assert bytes(kernels.to_data(tensor).data) == bytes(kernels.to_data(copy).data)
    dtypes = {str(a.dtype) for a in args if isinstance(a, np.ndarray)} | {s.dtype.name for s in specs}
    tolerance = max((_TOLERANCE[d] for d in dtypes if d in _TOLERANCE), default=0.0) * _LOOSER.get(spec.name, 1)
    if spec.name in _CHECKS:
        _CHECKS[spec.name](tensors, filled, parts, expected, tolerance)
        return
    for part, one in zip(parts, expected, strict=True):
        assert_close(part, one, tolerance)


@pytest.mark.parametrize("name", [op.name for op in PURE])
def test_kernel_equals_reference_and_rule(name: str) -> None:
    """On random calls the kernel has the rule's shape and dtype, the reference's values, and changes no argument."""
    spec = OPS[name]

    @settings(max_examples=50, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(op_examples(spec))
    def check(example: tuple[list[Operand], dict[str, Any]]) -> None:
        check_example(spec, *example)

    check()


def test_dtypes_map_both_ways() -> None:
    """Every dtype of the graph has a torch dtype and a numpy dtype of its own name and size."""
    for dtype in DTYPES.values():
        assert kernels.from_torch_dtype(kernels.to_torch_dtype(dtype)) == dtype
        assert reference.from_numpy_dtype(reference.to_numpy_dtype(dtype)) == dtype
        assert kernels.to_torch_dtype(dtype).itemsize == reference.to_numpy_dtype(dtype).itemsize == dtype.itemsize
