"""Kernels are the plain torch call: bit-equal to it in every float dtype, differentiable, total where torch is not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn import functional as F

from patchbay import reference
from patchbay.errors import GraphError
from patchbay.ir.ops import OPS, PURE
from patchbay_server import kernels
from tests.cpu.test_kernels import to_torch
from tests.op_examples import Operand, op_examples


def run(name: str, *args: Any, **attrs: Any) -> Any:
    return kernels.kernel(OPS[name])(*args, **OPS[name].fill(attrs))


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, x.shape[-1]).to(x.dtype)


#: (our call, what a researcher writes), both of x [4, 5, 6] and y [4, 5, 6].
PLAIN: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "x + y": (lambda x, y: run("add", x, y), lambda x, y: x + y),
    "x * 0.1": (lambda x, y: run("multiply", x, 0.1), lambda x, y: x * 0.1),
    "0.1 - x": (lambda x, y: run("subtract", 0.1, x), lambda x, y: 0.1 - x),
    "x / y": (lambda x, y: run("divide", x, y), lambda x, y: x / y),
    "1 / x": (lambda x, y: run("divide", 1, x), lambda x, y: 1 / x),
    "x ** 2": (lambda x, y: run("pow", x, 2), lambda x, y: x**2),
    "x ** 0.5": (lambda x, y: run("pow", run("abs", x), 0.5), lambda x, y: x.abs() ** 0.5),
    "2 ** x": (lambda x, y: run("pow", 2, x), lambda x, y: 2**x),
    "x // y": (lambda x, y: run("floor_divide", x, y), lambda x, y: x // y),
    "x % 0.3": (lambda x, y: run("remainder", x, 0.3), lambda x, y: x % 0.3),
    "x > 0.1": (lambda x, y: run("greater", x, 0.1), lambda x, y: x > 0.1),
    "maximum": (lambda x, y: run("maximum", x, y), torch.maximum),
    "clip": (lambda x, y: run("clip", x, min=-0.5, max=0.5), lambda x, y: x.clamp(-0.5, 0.5)),
    "where": (lambda x, y: run("where", run("greater", x, 0), x, 0.0), lambda x, y: torch.where(x > 0, x, 0.0)),
    "gelu": (lambda x, y: run("gelu", x), lambda x, y: F.gelu(x)),
    "gelu tanh": (lambda x, y: run("gelu", x, approximate="tanh"), lambda x, y: F.gelu(x, approximate="tanh")),
    "silu": (lambda x, y: run("silu", x), lambda x, y: F.silu(x)),
    "exp": (lambda x, y: run("exp", x), lambda x, y: x.exp()),
    "sum": (lambda x, y: run("sum", x), lambda x, y: x.sum()),
    "sum(-1)": (lambda x, y: run("sum", x, axis=-1), lambda x, y: x.sum(-1)),
    "mean": (lambda x, y: run("mean", x), lambda x, y: x.mean()),
    "mean(1)": (lambda x, y: run("mean", x, axis=1, keepdims=True), lambda x, y: x.mean(1, keepdim=True)),
    "mean((0, 1))": (lambda x, y: run("mean", x, axis=(0, 1)), lambda x, y: x.mean((0, 1))),
    "std": (lambda x, y: run("std", x, axis=-1, correction=1), lambda x, y: x.std(-1)),
    "var": (lambda x, y: run("var", x), lambda x, y: x.var(correction=0)),
    "max": (lambda x, y: run("max", x, axis=-1), lambda x, y: x.max(-1).values),
    "argmax": (lambda x, y: run("argmax", x, axis=-1), lambda x, y: x.argmax(-1)),
    "logsumexp": (lambda x, y: run("logsumexp", x, axis=-1), lambda x, y: x.logsumexp(-1)),
    "norm": (lambda x, y: run("vector_norm", x, axis=-1), lambda x, y: x.norm(dim=-1)),
    "norm all": (lambda x, y: run("vector_norm", x), lambda x, y: torch.linalg.vector_norm(x)),
    "cumsum": (lambda x, y: run("cumulative_sum", x, axis=1), lambda x, y: x.cumsum(1)),
    "x @ y.mT": (lambda x, y: run("matmul", x, run("matrix_transpose", y)), lambda x, y: x @ y.mT),
    "matmul 2d": (lambda x, y: run("matmul", x, y[0].mT), lambda x, y: x @ y[0].mT),
    "einsum": (
        lambda x, y: run("einsum", x, y, equation="bqd,bkd->bqk"),
        lambda x, y: torch.einsum("bqd,bkd->bqk", x, y),
    ),
    "einsum 3": (
        lambda x, y: run("einsum", x, y, x, equation="bqd,bkd,bqe->ke"),
        lambda x, y: torch.einsum("bqd,bkd,bqe->ke", x, y, x),
    ),
    "tensordot": (
        lambda x, y: run("tensordot", x, y.permute(1, 2, 0)),
        lambda x, y: torch.tensordot(x, y.permute(1, 2, 0), 2),
    ),
    "softmax": (lambda x, y: run("softmax", x), lambda x, y: x.softmax(-1)),
    "softmax float32": (
        lambda x, y: run("softmax", x, dtype="float32"),
        lambda x, y: x.softmax(-1, dtype=torch.float32),
    ),
    "log_softmax": (lambda x, y: run("log_softmax", x, axis=1), lambda x, y: x.log_softmax(1)),
    "layer_norm": (
        lambda x, y: run("layer_norm", x, _weights(x), _weights(x)),
        lambda x, y: F.layer_norm(x, (6,), _weights(x), _weights(x)),
    ),
    "rms_norm": (
        lambda x, y: run("rms_norm", x, _weights(x), eps=1e-6),
        lambda x, y: F.rms_norm(x, (6,), _weights(x), 1e-6),
    ),
    "cross_entropy": (
        lambda x, y: run("cross_entropy", x[0], torch.arange(5)),
        lambda x, y: F.cross_entropy(x[0], torch.arange(5)),
    ),
    "kl_div": (
        lambda x, y: run("kl_div", run("log_softmax", x), run("softmax", y), reduction="batchmean"),
        lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    ),
    "mse_loss": (lambda x, y: run("mse_loss", x, y), lambda x, y: F.mse_loss(x, y)),
    "cosine_similarity": (
        lambda x, y: run("cosine_similarity", x, y, axis=-1),
        lambda x, y: F.cosine_similarity(x, y, -1),
    ),
    "normalize": (lambda x, y: run("normalize", x, axis=-1), lambda x, y: F.normalize(x, dim=-1)),
    "linear": (lambda x, y: run("linear", x, y[0]), lambda x, y: F.linear(x, y[0])),
    "attention": (
        lambda x, y: run("scaled_dot_product_attention", x, y, y, is_causal=True),
        lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
    ),
    "topk": (lambda x, y: run("topk", x, k=3), lambda x, y: tuple(x.topk(3))),
    "getitem": (lambda x, y: run("getitem", x, index=(("ellipsis",), ("int", -1))), lambda x, y: x[..., -1]),
    "tril": (lambda x, y: run("tril", x, k=-1), lambda x, y: x.tril(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(PLAIN))
def test_bit_equal_to_plain_torch(name: str, dtype: torch.dtype) -> None:
    """A kernel gives, bit for bit and in the same dtype, what the call written by hand gives."""
    generator = torch.Generator().manual_seed(0)
    ours, plain = PLAIN[name]
    for _ in range(5):
        x, y = (torch.randn(4, 5, 6, generator=generator).to(dtype) for _ in range(2))
        got, wanted = ours(x, y), plain(x, y)
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


#: Steps, which have no gradient in torch, what is meant to stop it, and operations without arguments.
_WITHOUT_GRADIENT = {"heaviside", "stop_gradient", *(op.name for op in PURE if op.category == "creation")}
#: Their gradients do not exist for every shape (complete qr and svd), with equal eigenvalues, or for order 0.
_PARTLY_DIFFERENTIABLE = {"svd", "qr", "eigh", "vector_norm"}


@pytest.mark.parametrize("name", [op.name for op in PURE if op.name not in _WITHOUT_GRADIENT])
def test_gradients_flow(name: str) -> None:
    """A floating result has gradients for every floating argument: no kernel detaches, or writes in place."""
    op = OPS[name]

    @settings(max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(op_examples(op))
    def check(example: tuple[list[Operand], dict[str, Any]]) -> None:
        args, attrs = example
        tensors = [to_torch(a) for a in args]
        leaves = [t for t in tensors if isinstance(t, torch.Tensor) and t.dtype in (torch.float32, torch.float64)]
        for leaf in leaves:
            leaf.requires_grad_()
        got = kernels.kernel(op)(*tensors, **op.fill(attrs))
        parts = [p for p in (got if isinstance(got, tuple) else (got,)) if p.is_floating_point()]
        assert all(leaf._version == 0 for leaf in leaves)
        if leaves and parts and name not in _PARTLY_DIFFERENTIABLE:
            assert any(p.requires_grad for p in parts)
            torch.stack([p.sum().double() for p in parts]).sum().backward()
            assert all(leaf.grad is not None for leaf in leaves)

    check()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integer_division_never_traps(dtype: torch.dtype) -> None:
    """Integers over 0 and the least integer over -1 give numpy's answers; plain torch raises or ends the process."""
    least = torch.iinfo(dtype).min
    x = torch.tensor([least, least, 7, -7], dtype=dtype)
    y = torch.tensor([-1, 0, 0, 2], dtype=dtype)
    assert run("floor_divide", x, y).tolist() == [least, 0, 0, -4]
    assert run("remainder", x, y).tolist() == [0, 0, 0, 1]
    assert run("floor_divide", x, -1).tolist() == [least, least, -7, 7]
    assert run("remainder", 5, y).tolist() == [0, 0, 0, 1]


def test_integer_powers_are_total() -> None:
    """Integers to negative powers are truncated towards 0, whether the power is a tensor or a number."""
    x = torch.tensor([2, -1, 1, 3])
    assert run("pow", x, -3).tolist() == run("pow", x, torch.tensor(-3)).tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize("name", ["inv", "solve", "cholesky", "svd", "eigh", "pinv"])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_matrices_without_answer_are_typed(name: str, value: float) -> None:
    """A singular, indefinite or non-finite matrix gives a result or a GraphError that names the operation."""
    args = [torch.full((3, 3), value)] * (2 if name == "solve" else 1)
    try:
        run(name, *args)
    except GraphError as error:
        assert str(error).startswith(f"{name}: ")
    else:
        assert name not in ("cholesky",)


def test_singular_inverse_says_so() -> None:
    """The inverse of a singular matrix is an error whose message says why."""
    with pytest.raises(GraphError, match="^inv: .*singular"):
        run("inv", torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["floor", "ceil", "round", "trunc", "positive", "abs", "sign"])
def test_integers_stay_integers(name: str) -> None:
    """Rounding and signs keep integer dtypes."""
    for dtype in (torch.int8, torch.uint8, torch.int64):
        assert run(name, torch.tensor([0, 3], dtype=dtype)).dtype == dtype


def test_zero_dimensional_tensors_promote_like_others() -> None:
    """A float32 tensor of no dimensions is not weak: with bfloat16 it gives float32, though not in plain torch."""
    x, scale = torch.ones(2, dtype=torch.bfloat16), torch.tensor(0.1)
    assert (x * scale).dtype == torch.bfloat16
    assert run("multiply", x, scale).dtype == torch.float32
    assert run("multiply", x, 0.1).dtype == torch.bfloat16


def test_nothing_warns() -> None:
    """Kernels that could trip a torch warning do not: each default call of the losses and norms is silent."""
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("kl_div", x, x.softmax(-1)).ndim == 0
        assert run("std", x, axis=1).shape == (2,)
        assert run("softmax", x).shape == (2, 3)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 3),
        torch.tensor(True),
        torch.arange(6, dtype=torch.int8).reshape(2, 3).mT,
        torch.randn(2, 3).to(torch.bfloat16),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.randn(4, 4)[1:2, 2:3],
        torch.randn(2, requires_grad=True),
        torch.randn(3).expand(2, 3),
    ],
    ids=str,
)
def test_tensors_survive_the_trip_through_bytes(tensor: torch.Tensor) -> None:
    """A tensor of any dtype, layout and size comes back from its bytes bit for bit; numpy reads the same bytes."""
    data = kernels.to_data(tensor)
    again = kernels.to_tensor(data)
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    assert data.nbytes == tensor.numel() * tensor.element_size()
    assert bytes(kernels.to_data(again).data) == bytes(data.data) == reference.to_array(data).tobytes()
    assert not again.requires_grad


def test_bytes_and_tensors_do_not_share() -> None:
    """Writing to a tensor made of bytes leaves them alone; their number must be right, and bools become 0 or 1."""
    data = reference.to_data(reference.to_array(kernels.to_data(torch.tensor([1.0, 2.0]))))
    kernels.to_tensor(data).zero_()
    assert reference.to_array(data).tolist() == [1.0, 2.0]
    odd = type(data)(kernels.from_torch_dtype(torch.bool), (2,), b"\x02\x00")
    assert kernels.to_tensor(odd).tolist() == [True, False]
    assert bytes(kernels.to_data(kernels.to_tensor(odd)).data) == b"\x01\x00"
    with pytest.raises(ValueError, match="needs 12 bytes, got 8"):
        kernels.to_tensor(type(data)(data.dtype, (3,), data.data))


@pytest.mark.parametrize(
    ("name", "x", "attrs"),
    [
        ("repeat", torch.zeros(0), {"repeats": 2**62}),
        ("repeat", torch.zeros(0, 2), {"repeats": 2**62, "axis": 0}),
        ("repeat", torch.zeros(2, 0), {"repeats": 3, "axis": 0}),
        ("tile", torch.zeros(0), {"repetitions": (2**62,)}),
        ("roll", torch.arange(3.0), {"shift": 2**62, "axis": 0}),
        ("roll", torch.arange(3.0), {"shift": -(2**63)}),
        ("unfold", torch.arange(3.0), {"axis": 0, "size": 2, "step": 2**62}),
        ("getitem", torch.arange(3.0), {"index": (("slice", -(2**63), 2**63 - 1, 2**62),)}),
        ("diagonal", torch.zeros(2, 2), {"offset": -(2**63)}),
        ("triu", torch.ones(2, 2), {"k": 2**63 - 1}),
    ],
)
def test_extreme_attributes(name: str, x: torch.Tensor, attrs: dict[str, Any]) -> None:
    """Attributes at the edge of 64 bits give the rule's shape and the reference's values: nothing overflows."""
    got = run(name, x, **attrs)
    wanted = reference.evaluate(OPS[name], [x.numpy()], attrs)
    assert isinstance(wanted, np.ndarray)
    assert tuple(got.shape) == wanted.shape
    assert got.tolist() == wanted.tolist()


def test_an_empty_identity_allocates_nothing() -> None:
    """An identity of many rows and no columns is made at once."""
    assert run("eye", n_rows=2**58, n_cols=0, k=1).shape == (2**58, 0)


def test_stop_gradient_stops_it() -> None:
    """The value passes, its gradient does not."""
    x = torch.tensor([2.0], requires_grad=True)
    (run("stop_gradient", x) * x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0]
