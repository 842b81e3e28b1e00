"""pb.ops and methods: one function per OpSpec, with its names, defaults and documentation."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import DTypeError, GraphError, ShapeError, TraceError
from patchbay.ir.ops import OPS, PURE
from patchbay.ir.ops.spec import OpSpec
from patchbay.ir.site_names import MEANINGS
from patchbay.model import Model
from patchbay.tracing import Proxy, Run, stubs
from patchbay.tracing.functions import methods
from patchbay.tracing.stubs import stub
from tests.tracing.conftest import FRANCE

NAMED = [spec for spec in PURE if spec.name != "getitem"]


@pytest.fixture
def run(model: Model) -> Run:
    """A run whose trace is never sent."""
    return model.trace().run(FRANCE)


@pytest.mark.parametrize("spec", NAMED, ids=lambda s: s.name)
def test_every_operation_is_a_function_with_its_names(spec: OpSpec) -> None:
    """Each is in `pb.ops` under its own name, with parameters and a docstring from its spec."""
    function = getattr(pb.ops, spec.name)
    assert function.__name__ == spec.name
    assert function.__doc__
    assert spec.name in dir(pb.ops)
    names = set(inspect.signature(function).parameters)
    if spec.name not in ("set_index", "tensordot"):
        assert names == {*spec.params, *(a.name for a in spec.attrs)}


def test_most_operations_are_methods() -> None:
    """Those that act on their first argument; the others are only functions."""
    methods = {spec.name for spec in NAMED if hasattr(Proxy, spec.name)}
    assert {"sum", "mean", "softmax", "topk", "reshape", "argmax", "astype", "take_along_axis"} <= methods
    assert not {"where", "einsum", "concat", "zeros", "embedding"} & methods
    assert not any(OPS[name].structural for name in methods)


def test_arguments_by_position_and_by_name(run: Run) -> None:
    """Both ways give the same node."""
    e = run.embed
    same = [e.sum(-1, True), e.sum(axis=-1, keepdims=True), pb.ops.sum(e, axis=(-1,), keepdims=np.True_)]
    assert {x.shape for x in same} == {(1, 6, 1)}
    assert e.softmax(-1).shape == e.shape


def test_shapes_may_be_spread_out(run: Run) -> None:
    """`x.reshape(2, 3)` is `x.reshape((2, 3))`, as in numpy."""
    e = run.embed
    assert e.reshape(2, -1).shape == e.reshape((2, -1)).shape == (2, 24)
    assert e.reshape(-1).shape == (48,)
    assert e.permute_dims(2, 0, 1).shape == e.permute_dims((2, 0, 1)).shape == (8, 1, 6)
    assert e.squeeze(0).shape == (6, 8)


def test_lists_and_equations(model: Model) -> None:
    """concat and stack take a list, einsum its equation first."""
    with model.trace(FRANCE) as run:
        e = run.embed[0]
        run.save(
            e=e,
            both=pb.ops.concat([e, np.zeros((1, 8), dtype=np.float32)], axis=0),
            piled=pb.ops.stack([e, e], axis=-1),
            gram=pb.ops.einsum("pd,qd->pq", e, e),
            dot=pb.ops.tensordot(e, e, axes=([1], [1])),
            one=pb.ops.tensordot(e, e.T, 1),
        )
    r = run.results
    assert r["both"].shape == (7, 8)
    assert r["piled"].shape == (6, 8, 2)
    for name in ("gram", "dot", "one"):
        np.testing.assert_allclose(r[name], r["e"] @ r["e"].T, rtol=1e-5, atol=1e-6)


def test_optional_tensors_are_left_out_from_the_end(run: Run) -> None:
    """layer_norm without a bias is fine, a bias without a weight is not."""
    e = run.embed
    w = np.ones(8, dtype=np.float32)
    assert pb.ops.layer_norm(e, w, eps=1e-6).shape == e.shape
    assert e.layer_norm(weight=w, bias=w).shape == e.shape
    with pytest.raises(GraphError, match="weight may be left out only together"):
        pb.ops.layer_norm(e, None, w)


def test_functional_update(model: Model) -> None:
    """set_index copies; the original stays."""
    with model.trace(FRANCE) as run:
        e = run.embed
        run.save(e=e, new=pb.ops.set_index(e, (0, [1, 2]), 0.0), added=e.set_index((..., 0), 1.0, mode="add"))
    r = run.results
    assert (r["new"][0, 1:3] == 0).all()
    assert (r["new"][0, 3:] == r["e"][0, 3:]).all()
    np.testing.assert_allclose(r["added"][..., 0], r["e"][..., 0] + 1, rtol=1e-6)


def test_creation_joins_the_trace_that_it_meets(model: Model) -> None:
    """zeros, arange and eye need no trace until they meet one of its values."""
    eye = pb.ops.eye(8)
    assert eye.shape == (8, 8)
    assert "not in a trace" in repr(eye)
    with model.trace(FRANCE) as run:
        run.save(e=run.embed, same=run.embed @ eye, shifted=pb.ops.arange(8) + run.embed, kept=pb.ops.ones((2,)))
        run.blocks[0].resid_post[:, 0] = pb.ops.zeros((8,))
    r = run.results
    np.testing.assert_array_equal(r["same"], r["e"])
    np.testing.assert_allclose(r["shifted"], r["e"] + np.arange(8), rtol=1e-6)
    assert r["kept"].tolist() == [1.0, 1.0]


def test_nothing_is_computed_from_what_is_in_no_trace(model: Model) -> None:
    """Indexing, operators, methods and functions of such a value say how to begin instead; beside a proxy it works."""
    zeros = pb.ops.zeros(3)
    for attempt in (
        lambda: zeros[0],
        lambda: -zeros,
        lambda: 2 * zeros,
        lambda: zeros - np.ones(3, "float32"),
        lambda: np.ones(3, "float32") - zeros,
        lambda: zeros < 1,
        lambda: pb.ops.mean(zeros),
        lambda: np.asarray(zeros),
        lambda: list(zeros),
    ):
        with pytest.raises(TraceError, match=r"belongs to no trace by itself.*t\.constant"):
            attempt()
    with pytest.raises(AttributeError, match="belongs to no trace by itself"):
        zeros.mean()
    with model.trace(FRANCE) as run:
        joined = zeros - run.trace.constant([1.0, 2.0, 3.0])
        assert joined.shape == (zeros < joined).shape == (3,)


def test_dtypes_in_every_spelling(run: Run) -> None:
    """Names, `pb.ops` dtypes, numpy dtypes and Python types."""
    e = run.embed
    for dtype in ("float16", pb.ops.float16, np.float16, np.dtype("float16")):
        assert e.astype(dtype).dtype.name == "float16"
    assert e.astype(float).dtype.name == "float32"
    assert e.astype(int).dtype.name == "int64"
    assert e.astype(bool).dtype.name == "bool"
    with pytest.raises(DTypeError, match="complex64"):
        e.astype("complex64")


def test_wrong_calls_say_what_is_wrong(run: Run) -> None:
    """Missing and unknown arguments, proxies where a number must be known, nothing of a trace at all."""
    e = run.embed
    with pytest.raises(TypeError, match=r"topk.*missing.*k"):
        e.topk()
    with pytest.raises(TypeError, match="unexpected"):
        e.sum(axes=1)
    with pytest.raises(TraceError, match="k must be known before the run"):
        e.topk(e.argmax())
    with pytest.raises(TraceError, match="arrays: numpy"):
        pb.ops.exp(np.zeros(3))
    with pytest.raises(ShapeError, match="axis 5"):
        e.sum(5)
    with pytest.raises(GraphError, match="keepdims must be True or False"):
        e.sum(-1, np.float32)
    with pytest.raises(GraphError, match="must be an axis, an integer"):
        e.softmax("last")
    with pytest.raises(GraphError, match="list of tensors"):
        pb.ops.stack(e)
    with pytest.raises(DTypeError, match="Python scalar"):
        e.matmul(2)


def test_the_namespace_has_the_standards_constants() -> None:
    """pi, inf, nan, newaxis and the dtypes."""
    assert pb.ops.pi == np.pi
    assert pb.ops.newaxis is None
    assert pb.ops.float32.name == "float32"
    assert pb.ops.bool.name == "bool"


def test_the_stub_for_editors_is_current() -> None:
    """`ops.pyi` says what the operations say: `python -m patchbay.tracing.stubs` writes it."""
    written = Path(pb.ops.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert ast.unparse(ast.parse(written)) == ast.unparse(ast.parse(stub()))
    typed = {node.name for node in ast.parse(written).body if isinstance(node, ast.FunctionDef)}
    assert typed == {spec.name for spec in NAMED}


def test_the_stub_of_methods_and_sites_is_current() -> None:
    """`typed.pyi` has every method of values, and every canonical site as an attribute that gives a value."""
    path = Path(pb.ops.__file__).parent / "tracing" / "typed.pyi"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.unparse(tree) == ast.unparse(ast.parse(stubs.typed()))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {node.name for node in classes["Methods"].body if isinstance(node, ast.FunctionDef)}
    assert found == set(methods()) and all(callable(getattr(Proxy, name)) for name in found)

    def sites(kind: str, path: str) -> set[str]:
        names = set[str]()
        for node in classes[kind].body:
            if isinstance(node, ast.FunctionDef) and node.name == "__getitem__":
                names |= sites(ast.unparse(node.returns or node), f"{path}{{i}}.")
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) not in ("encoder", "decoder"):
                below, name = ast.unparse(node.annotation), path + ast.unparse(node.target)
                names |= {name} if below == "Site" else sites(below, f"{name}.")
        return names

    assert sites("RunSites", "") == set(MEANINGS)
