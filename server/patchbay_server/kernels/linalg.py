"""Kernels of patchbay.ir.ops.linalg and patchbay.ir.ops.einsum."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from patchbay.errors import GraphError
from patchbay.ir.ops import OPS
from patchbay.ir.ops.einsum import parse
from patchbay.ir.ops.linalg import tensordot_axes
from patchbay_server.kernels.registry import Kernel, implements
from patchbay_server.kernels.tensors import promoted_tensors


def _factorises(name: str) -> Callable[[Kernel], Kernel]:
    """Attach a kernel whose matrices may have no inverse or factor: a fault of the graph, not of the server."""

    def attach(function: Kernel) -> Kernel:
        @wraps(function)
        def guarded(*args: torch.Tensor, **attrs: Any) -> Any:
            try:
                return function(*args, **attrs)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                reason = str(error).split("\n")[0].partition(": ")[2]
                raise GraphError(f"{name}: {reason}") from error

        implements(OPS[name])(guarded)
        return guarded

    return attach


@implements(OPS["matmul"])
def _matmul(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    a, b = promoted_tensors(x1, x2)
    return a @ b


@implements(OPS["vecdot"])
def _vecdot(x1: torch.Tensor, x2: torch.Tensor, *, axis: int) -> torch.Tensor:
    a, b = promoted_tensors(x1, x2)
    return torch.linalg.vecdot(a, b, dim=axis)


@implements(OPS["tensordot"])
def _tensordot(
    x1: torch.Tensor,
    x2: torch.Tensor,
    *,
    axes: int,
    axes_x1: tuple[int, ...] | None,
    axes_x2: tuple[int, ...] | None,
) -> torch.Tensor:
    a, b = promoted_tensors(x1, x2)
    left, right = tensordot_axes({"axes": axes, "axes_x1": axes_x1, "axes_x2": axes_x2}, a.ndim, b.ndim)
    return torch.tensordot(a, b, dims=(left, right))


@implements(OPS["einsum"])
def _einsum(*operands: torch.Tensor, equation: str) -> torch.Tensor:
    same = promoted_tensors(*operands)
    # What torch reads is written anew from what the rule understood.
    return torch.einsum(parse(equation, [tuple(x.shape) for x in same]).equation, *same)


@implements(OPS["outer"])
def _outer(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    return torch.outer(*promoted_tensors(x1, x2))


@implements(OPS["cross"])
def _cross(x1: torch.Tensor, x2: torch.Tensor, *, axis: int) -> torch.Tensor:
    a, b = promoted_tensors(x1, x2)
    return torch.linalg.cross(a, b, dim=axis)


@implements(OPS["trace"])
def _trace(x: torch.Tensor) -> torch.Tensor:
    return torch.diagonal(x, 0, -2, -1).sum(-1)


@_factorises("inv")
def _inv(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(x)


@_factorises("solve")
def _solve(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    a, b = promoted_tensors(x1, x2)
    # Batches are written out, because torch takes some matrices for stacks of vectors.
    if b.ndim == 1:
        return torch.linalg.solve(a, b.unsqueeze(-1).expand(*a.shape[:-1], 1)).squeeze(-1)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return torch.linalg.solve(a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]))


@_factorises("det")
def _det(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.det(x)


@_factorises("slogdet")
def _slogdet(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sign, logabsdet = torch.linalg.slogdet(x)
    return sign, logabsdet


@_factorises("qr")
def _qr(x: torch.Tensor, *, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    q, r = torch.linalg.qr(x, mode=mode)
    return q, r


@_factorises("svd")
def _svd(x: torch.Tensor, *, full_matrices: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=full_matrices)
    return u, s, vh


@_factorises("svdvals")
def _svdvals(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x)


@_factorises("eigh")
def _eigh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(x)
    return values, vectors


@_factorises("pinv")
def _pinv(x: torch.Tensor, *, rtol: float | None) -> torch.Tensor:
    return torch.linalg.pinv(x, rtol=rtol)


@_factorises("cholesky")
def _cholesky(x: torch.Tensor, *, upper: bool) -> torch.Tensor:
    return torch.linalg.cholesky(x, upper=upper)


@_factorises("matrix_norm")
def _matrix_norm(x: torch.Tensor, *, ord: str, keepdims: bool) -> torch.Tensor:
    order = ord if ord in ("fro", "nuc") else float(ord)
    return torch.linalg.matrix_norm(x, order, keepdim=keepdims)
