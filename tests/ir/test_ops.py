"""The operations as objects: complete, documented, strict about what they take, and cheap whatever the shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbay import reference
from patchbay.errors import DTypeError, GraphError, IndexOutOfRangeError, ShapeError, UnknownOpError
from patchbay.ir.dtypes import DTYPES, bfloat16, bool_, float16, float32, float64, int8, int32, int64, uint8
from patchbay.ir.ops import OPS, PURE, document, spec
from patchbay.ir.ops.einsum import parse
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from tests.op_examples import has_examples, op_examples

ROOT = Path(__file__).parents[2]
F = TensorSpec((), float32, "float")
I = TensorSpec((), int64, "int")  # noqa: E741
BOOL = TensorSpec((), bool_, "bool")


def tensor(*shape: int, dtype: Any = float32) -> TensorSpec:
    return TensorSpec(shape, dtype)


def infer(name: str, *args: TensorSpec, **attrs: Any) -> ValueSpec:
    return OPS[name].infer(args, attrs)


@pytest.mark.parametrize("name", [op.name for op in PURE])
def test_every_op_is_complete(name: str) -> None:
    """Each pure operation has a rule, a cost, a reference, examples, a category, and one sentence that describes it."""
    op = OPS[name]
    assert op.rule is not None
    assert callable(op.flops)
    assert callable(op.workspace)
    assert reference.has_reference(op)
    assert has_examples(op)
    assert op.category in {"elementwise", "reductions", "shape", "indexing", "linalg", "nn", "creation"}
    assert op.doc.endswith(".")
    assert all(attr.doc for attr in op.attrs)


@pytest.mark.parametrize("name", [op.name for op in PURE])
def test_rule_equals_reference(name: str) -> None:
    """On random calls the reference makes the shape that the rule says, and costs are whole numbers from 0."""
    op = OPS[name]

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(op_examples(op))
    def check(example: tuple[list[Any], dict[str, Any]]) -> None:
        args, attrs = example
        specs = [reference.spec_of(a) for a in args]
        inferred = op.infer(specs, attrs)
        value = reference.evaluate(op, args, attrs)
        parts = value if isinstance(value, tuple) else (value,)
        wanted = inferred if isinstance(inferred, tuple) else (inferred,)
        assert [reference.spec_of(p) for p in parts] == list(wanted)
        for cost in (op.flops, op.workspace):
            amount = cost(specs, inferred, op.fill(attrs))
            assert isinstance(amount, int)
            assert amount >= 0

    check()


def test_names_are_the_array_apis() -> None:
    """The array API's names are used where it has one, and its near misses are absent."""
    for name in (
        "permute_dims",
        "concat",
        "matrix_transpose",
        "expand_dims",
        "take_along_axis",
        "cumulative_sum",
        "pow",
    ):
        assert name in OPS
    for name in ("transpose", "cat", "concatenate", "cumsum", "unsqueeze", "mul", "power", "clamp"):
        assert name not in OPS


def test_unknown_op_names_the_nearest() -> None:
    """A name that is nearly right raises UnknownOpError with what was meant."""
    with pytest.raises(UnknownOpError, match="'softmax'"):
        spec("sofmax")
    assert spec("add") is OPS["add"]


@pytest.mark.parametrize(
    ("name", "args", "attrs", "wanted"),
    [
        ("add", [tensor(3, 1), tensor(4, dtype=int64)], {}, tensor(3, 4)),
        ("add", [tensor(2, dtype=bfloat16), F], {}, tensor(2, dtype=bfloat16)),
        ("add", [tensor(2, dtype=int32), F], {}, tensor(2)),
        ("add", [tensor(2, dtype=int32), I], {}, tensor(2, dtype=int32)),
        ("multiply", [tensor(2, dtype=bool_), I], {}, tensor(2, dtype=int64)),
        ("add", [tensor(dtype=float32), tensor(2, dtype=bfloat16)], {}, tensor(2)),
        ("add", [tensor(2, dtype=float16), tensor(2, dtype=bfloat16)], {}, tensor(2)),
        ("divide", [tensor(2, dtype=int64), I], {}, tensor(2)),
        ("where", [tensor(2, dtype=bool_), I, F], {}, tensor(2)),
        ("where", [tensor(2, dtype=bool_), BOOL, I], {}, tensor(2, dtype=int64)),
        ("sum", [tensor(2, 3, dtype=uint8)], {"axis": -1}, tensor(2, dtype=int64)),
        ("mean", [tensor(2, 3)], {"axis": (0, 1), "keepdims": True}, tensor(1, 1)),
        ("argmax", [tensor(2, 3)], {}, tensor(dtype=int64)),
        ("reshape", [tensor(2, 6)], {"shape": (3, -1)}, tensor(3, 4)),
        ("matmul", [tensor(5, 1, 2, 3), tensor(4, 3, 7)], {}, tensor(5, 4, 2, 7)),
        ("matmul", [tensor(3), tensor(3)], {}, tensor()),
        ("einsum", [tensor(2, 3, 4), tensor(5, 4)], {"equation": "...d,kd->...k"}, tensor(2, 3, 5)),
        ("softmax", [tensor(2, dtype=float16)], {"dtype": "float32"}, tensor(2)),
        ("topk", [tensor(2, 9)], {"k": 5}, (tensor(2, 5), tensor(2, 5, dtype=int64))),
        ("arange", [], {"start": 10}, tensor(10, dtype=int64)),
        ("arange", [], {"start": 0.0, "stop": 1.0, "step": 0.25}, tensor(4)),
        ("eye", [], {"n_rows": 3, "dtype": "float64"}, tensor(3, 3, dtype=float64)),
    ],
)  # fmt: skip
def test_rule_by_hand(name: str, args: list[TensorSpec], attrs: dict[str, Any], wanted: ValueSpec) -> None:
    """Shapes and dtypes that were worked out by hand from the array API's and torch's documents."""
    assert infer(name, *args, **attrs) == wanted


@pytest.mark.parametrize(
    ("name", "args", "attrs", "error"),
    [
        ("add", [tensor(2), tensor(3)], {}, ShapeError),
        ("add", [F, F], {}, DTypeError),
        ("add", [tensor(2)], {}, GraphError),
        ("exp", [F], {}, DTypeError),
        ("subtract", [tensor(2, dtype=bool_), tensor(2, dtype=bool_)], {}, DTypeError),
        ("add", [tensor(2, dtype=DTYPES["float8_e5m2"]), F], {}, DTypeError),
        ("add", [tensor(2, dtype=DTYPES["float8_e5m2"]), tensor(2)], {}, DTypeError),
        ("bitwise_and", [tensor(2), I], {}, DTypeError),
        ("where", [tensor(2), F, tensor(2)], {}, DTypeError),
        ("clip", [tensor(2, dtype=int64)], {"min": 0.5}, DTypeError),
        ("gelu", [tensor(2, dtype=int64)], {}, DTypeError),
        ("gelu", [tensor(2)], {"approximate": "sigmoid"}, GraphError),
        ("gelu", [tensor(2)], {"aproximate": "tanh"}, GraphError),
        ("mean", [tensor(2, dtype=int64)], {}, DTypeError),
        ("sum", [tensor(2)], {"axis": 1}, ShapeError),
        ("sum", [tensor(2, 2)], {"axis": (0, -2)}, ShapeError),
        ("sum", [tensor(2, 2)], {"axis": ()}, ShapeError),
        ("sum", [tensor(2, 2)], {"axis": True}, GraphError),
        ("max", [tensor(2, 0)], {"axis": 1}, ShapeError),
        ("argmin", [tensor(0)], {}, ShapeError),
        ("var", [tensor(1)], {"correction": 1}, ShapeError),
        ("std", [tensor(3)], {"correction": float("nan")}, ShapeError),
        ("cumulative_sum", [tensor(2, 2)], {}, ShapeError),
        ("reshape", [tensor(6)], {"shape": (4, -1)}, ShapeError),
        ("reshape", [tensor(6)], {"shape": (-1, -1)}, ShapeError),
        ("reshape", [tensor(0)], {"shape": (0, -1)}, ShapeError),
        ("reshape", [tensor(6)], {"shape": (-2, -3)}, ShapeError),
        ("permute_dims", [tensor(2, 3)], {"axes": (0, 0)}, ShapeError),
        ("squeeze", [tensor(2, 1)], {"axis": 0}, ShapeError),
        ("broadcast_to", [tensor(2)], {"shape": (2, 3)}, ShapeError),
        ("broadcast_to", [tensor(1)], {"shape": (-1,)}, ShapeError),
        ("concat", [tensor(2, 2), tensor(3, 3)], {}, ShapeError),
        ("concat", [], {}, GraphError),
        ("stack", [tensor(2), tensor(1)], {}, ShapeError),
        ("repeat", [tensor(2)], {"repeats": -1}, ShapeError),
        ("tile", [tensor(2)], {"repetitions": (-1,)}, ShapeError),
        ("pad", [tensor(2)], {"pad": (1, -1)}, ShapeError),
        ("pad", [tensor(2)], {"pad": (1, 1, 1, 1)}, ShapeError),
        ("unfold", [tensor(2)], {"axis": 0, "size": 3}, ShapeError),
        ("unfold", [tensor(2)], {"axis": 0, "size": 1, "step": 0}, ShapeError),
        ("getitem", [tensor(2)], {"index": (("int", 2),)}, IndexOutOfRangeError),
        ("getitem", [tensor(2), tensor(2)], {"index": (("array", 0),)}, DTypeError),
        ("set_index", [tensor(2, dtype=int64), F], {"index": ()}, DTypeError),
        ("set_index", [tensor(2), tensor(3)], {"index": ()}, ShapeError),
        ("set_index", [F, tensor(1)], {"index": ()}, DTypeError),
        ("take", [tensor(2, 2), tensor(1, dtype=int64)], {}, ShapeError),
        ("take_along_axis", [tensor(2, 2), tensor(1, dtype=int64)], {}, ShapeError),
        ("scatter_add", [tensor(2), tensor(2, dtype=int64), tensor(3)], {}, ShapeError),
        ("topk", [tensor(2)], {"k": 3}, ShapeError),
        ("one_hot", [tensor(2)], {"num_classes": 3}, DTypeError),
        ("one_hot", [tensor(2, dtype=int64)], {"num_classes": 0}, ShapeError),
        ("embedding", [tensor(2, dtype=int64), tensor(2)], {}, ShapeError),
        ("masked_fill", [tensor(2), tensor(2), F], {}, DTypeError),
        ("matmul", [tensor(2, 3), tensor(2, 3)], {}, ShapeError),
        ("matmul", [tensor(2, dtype=int64), tensor(2, dtype=int64)], {}, DTypeError),
        ("matmul", [tensor(), tensor(2)], {}, ShapeError),
        ("tensordot", [tensor(2), tensor(2)], {"axes": 2}, ShapeError),
        ("tensordot", [tensor(2), tensor(2)], {"axes_x1": (0,)}, ShapeError),
        ("inv", [tensor(2, 3)], {}, ShapeError),
        ("svd", [tensor(2, 2, dtype=bfloat16)], {}, DTypeError),
        ("matrix_norm", [tensor(0, 3)], {}, ShapeError),
        ("matrix_norm", [tensor(3, 3)], {"ord": "3"}, GraphError),
        ("cross", [tensor(2), tensor(2)], {}, ShapeError),
        ("layer_norm", [tensor(2, 3), tensor(2)], {}, ShapeError),
        ("rms_norm", [tensor(2, 3)], {"normalized_shape": (2,)}, ShapeError),
        ("cross_entropy", [tensor(2, 3), tensor(2)], {}, DTypeError),
        ("cross_entropy", [tensor(2, 3), tensor(3, dtype=int64)], {}, ShapeError),
        ("kl_div", [tensor(2, 3), tensor(3)], {}, ShapeError),
        ("linear", [tensor(2, 3), tensor(3, 2)], {}, ShapeError),
        ("scaled_dot_product_attention", [tensor(2, 3), tensor(2, 4), tensor(2, 3)], {}, ShapeError),
        ("scaled_dot_product_attention", [tensor(2, 2)] * 4, {"is_causal": True}, GraphError),
        ("arange", [], {"start": 1, "stop": 2, "step": 0}, GraphError),
        ("arange", [], {"start": float("inf")}, GraphError),
        ("arange", [], {"start": 300, "dtype": "int8"}, DTypeError),
        ("full", [], {"shape": (2,), "fill_value": 300, "dtype": "uint8"}, DTypeError),
        ("full", [], {"shape": (2,), "fill_value": 0.5, "dtype": "int64"}, DTypeError),
        ("zeros", [], {"shape": (-1,)}, ShapeError),
        ("zeros", [], {"shape": (2,), "dtype": "complex64"}, GraphError),
        ("linspace", [], {"start": 0, "stop": 1, "num": -1}, ShapeError),
    ],
)  # fmt: skip
def test_rule_refuses(name: str, args: list[TensorSpec], attrs: dict[str, Any], error: type[Exception]) -> None:
    """What has no meaning raises the most specific error, from shapes alone, and its message names the operation."""
    with pytest.raises(error, match=rf"{name}|var, std") as caught:
        infer(name, *args, **attrs)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "equation",
    [
        "ij,jk->ik->i", "ij,jk-ik", "i.j,jk", "....i,jk", "i...j...,jk", "ij,jk->ii", "ij,jk->iz", "ij;jk", "i1,jk", "",
        "ij", "ij,jk,kl", "__import__('os'),jk", "i\u0131,jk", "i\nj,jk", "->", "," * 300, "ij,jk->" + "i" * 300,
        "...ij,...jk->ik" + "x", ",".join("i" * 9),
    ],
)  # fmt: skip
def test_einsum_refuses_malformed_equations(equation: str) -> None:
    """An equation that is not letters, commas, an arrow and ellipses for just these operands raises GraphError."""
    with pytest.raises(GraphError):
        infer("einsum", tensor(2, 2), tensor(2, 2), equation=equation)


def test_einsum_knows_its_intermediates() -> None:
    """A chain whose result is small but whose steps are huge is priced by its steps."""
    op, attrs = OPS["einsum"], {"equation": "ik,jk,i,j->"}
    args = [tensor(10**5, 1), tensor(10**5, 1), tensor(10**5), tensor(10**5)]
    out = op.infer(args, attrs)
    assert out == tensor()
    assert op.flops(args, out, attrs) > 10**10
    assert op.workspace(args, out, attrs) >= 4 * 10**10


def test_einsum_broadcasts_ones_and_writes_its_output_out() -> None:
    """Axes of extent 1 broadcast, and the implied output is the ellipsis and then the single letters in order."""
    contraction = parse("b...a,...ac", [(4, 1, 3), (7, 5, 3, 2)])
    assert contraction.equation == "b...a,...ac->...bc"
    assert contraction.shape == (7, 5, 4, 2)


@pytest.mark.parametrize(
    ("name", "args", "attrs"),
    [
        ("broadcast_to", [tensor(1)], {"shape": (10**12,)}),
        ("outer", [tensor(10**9), tensor(10**9)], {}),
        ("repeat", [tensor(10**6)], {"repeats": 10**9}),
        ("tile", [tensor(10**6)], {"repetitions": (10**6, 10**6)}),
        ("einsum", [tensor(10**6), tensor(10**6), tensor(10**6)], {"equation": "a,b,c->abc"}),
        ("one_hot", [tensor(10**9, dtype=int64)], {"num_classes": 10**8}),
        ("zeros", [], {"shape": (10**9, 10**9)}),
        ("pad", [tensor(1)], {"pad": (10**12, 10**12)}),
        ("matmul", [tensor(10**9, 1), tensor(1, 10**9)], {}),
        ("vecdot", [tensor(10**6, 1, 8), tensor(10**6, 8)], {}),
    ],
)
def test_huge_results_are_only_numbers(name: str, args: list[TensorSpec], attrs: dict[str, Any]) -> None:
    """Results too large for any machine are inferred and priced in Python integers; limits refuse them later."""
    op = OPS[name]
    out = op.infer(args, attrs)
    assert isinstance(out, TensorSpec)
    assert out.size >= 10**12
    assert op.flops(args, out, op.fill(attrs)) >= 0
    assert op.workspace(args, out, op.fill(attrs)) >= 0


def test_broadcast_products_are_priced_by_their_workspace() -> None:
    """A product whose operands broadcast against each other is charged for writing them out."""
    args = [tensor(10**3, 1, 1, 512), tensor(1, 10**3, 512, 1)]
    out = infer("matmul", *args)
    assert isinstance(out, TensorSpec)
    assert OPS["matmul"].workspace(args, out, {}) >= 4 * 10**6 * 512


def test_reference_integer_division_is_total() -> None:
    """Integers divided by 0 give 0, and the least integer divided by -1 wraps, in the reference as in the kernels."""
    least = np.array([-(2**63), 5], np.int64)
    assert reference.evaluate(OPS["floor_divide"], [least, 0], {}).tolist() == [0, 0]  # type: ignore[union-attr]
    assert reference.evaluate(OPS["remainder"], [least, -1], {}).tolist() == [0, 0]  # type: ignore[union-attr]


def test_python_integers_must_fit() -> None:
    """A Python integer beyond an integer dtype raises DTypeError instead of wrapping."""
    for number in (300, -1, 2**70):
        with pytest.raises(DTypeError):
            reference.evaluate(OPS["add"], [np.zeros(2, np.uint8), number], {})


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12), st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3))
def test_einsum_parser_never_fails_otherwise(equation: str, shapes: list[list[int]]) -> None:
    """Whatever the text, the parser returns a contraction or raises GraphError."""
    try:
        contraction = parse(equation, [tuple(s) for s in shapes])
    except GraphError:
        return
    assert set(contraction.equation) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,->")
    assert len(contraction.inputs) == len(shapes)


def test_page_is_current() -> None:
    """docs/ops.md is what `python -m patchbay.ir.ops.document` prints."""
    page = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert page == document.page()
    assert all(f"| `{name}` |" in page for name in OPS)


def test_ops_import_nothing_but_the_standard_library() -> None:
    """Importing every operation loads neither numpy nor anything else that is installed."""
    code = "import sys, patchbay.ir.ops; print(sorted({'numpy', 'torch', 'ml_dtypes', 'grpc'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "client")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_int8_and_uint8_meet_in_int16() -> None:
    """Mixed signedness of one size goes to the next size, as the array API says."""
    assert infer("add", tensor(2, dtype=int8), tensor(2, dtype=uint8)) == tensor(2, dtype=DTYPES["int16"])


@pytest.mark.parametrize(
    ("name", "args", "attrs", "error"),
    [
        ("zeros", [], {"shape": (0, 2**61)}, ShapeError),
        ("zeros", [], {"shape": (1,) * 33}, ShapeError),
        ("broadcast_to", [tensor(1)], {"shape": (2**31, 2**31)}, ShapeError),
        ("tile", [tensor(2)], {"repetitions": (1,) * 40}, ShapeError),
        ("outer", [tensor(2**31), tensor(2**31)], {}, ShapeError),
        ("zeros", [], {"shape": (10**30,)}, GraphError),
        ("tril", [tensor(2, 2)], {"k": 2**63}, GraphError),
        ("clip", [tensor(2)], {"min": 10**400}, GraphError),
        ("full", [], {"shape": (), "fill_value": 10**400, "dtype": "float64"}, GraphError),
        ("arange", [], {"start": 10**400}, GraphError),
        ("arange", [], {"start": float("nan")}, GraphError),
        ("linspace", [], {"start": 10**400, "stop": 0, "num": 2}, GraphError),
    ],
)
def test_what_no_library_can_address_is_refused(
    name: str, args: list[TensorSpec], attrs: dict[str, Any], error: type[Exception]
) -> None:
    """Too many axes, extents that overflow 64 bits (even beside an extent of 0) and larger integers are errors."""
    with pytest.raises(error):
        infer(name, *args, **attrs)
