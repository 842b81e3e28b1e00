"""Hypothesis strategies for anything that the wire carries: well-formed as data, whether or not it means something."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from patchbay.ir.artifacts import ArtifactInfo, digest_of
from patchbay.ir.bodies import Body
from patchbay.ir.card import SYMBOLS, CallableSpec, InputSpec, ModelCard, SiteSpec
from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.events import (
    Cost,
    Done,
    ExecuteOptions,
    Kept,
    ModelSummary,
    Progress,
    Queued,
    Started,
    TensorValue,
    TokenizedRow,
    Usage,
)
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.params import POLICIES, ParamSpec

dtypes = st.sampled_from(list(DTYPES.values()))
int64s = st.integers(-(2**63), 2**63 - 1)
counts = st.integers(0, 2**31 - 1)
big_counts = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
model_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}(/[A-Za-z0-9][A-Za-z0-9._-]{0,8})?", fullmatch=True)
finite_floats = st.floats(allow_nan=False, width=64)


@st.composite
def tensors(draw: st.DrawFn, max_bytes: int = 4_096) -> TensorData:
    """Any tensor of at most `max_bytes`, extents of zero included."""
    dtype: DType = draw(dtypes)
    shape: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        room = max_bytes // (dtype.itemsize * max(math.prod(shape), 1))
        shape.append(draw(st.integers(0, max(min(room, 64), 1))))
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind == "bool":
        data = bytes(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    else:
        data = draw(st.binary(min_size=size, max_size=size))
    return TensorData(dtype, tuple(shape), memoryview(data) if draw(st.booleans()) else data)


attrs = st.recursive(
    st.none() | st.booleans() | int64s | finite_floats | texts | tensors(64),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph whose references exist; its operations and attributes are arbitrary."""
    runs = draw(
        st.lists(
            st.builds(
                Run,
                tokens=st.lists(st.lists(int64s, max_size=4).map(tuple), max_size=3).map(tuple),
                label=texts,
                inputs=st.dictionaries(names, tensors(256), max_size=2).map(lambda d: tuple(d.items())),
            ),
            max_size=3,
        )
    )
    nodes: list[Node] = []
    for position in range(draw(st.integers(0, 8))):
        args = draw(st.lists(st.integers(0, position - 1), max_size=3)) if position else []
        nodes.append(
            Node(
                op=draw(names),
                args=tuple(args),
                attrs=draw(st.dictionaries(names, attrs, max_size=3)),
                run=draw(st.none() | st.integers(0, len(runs) - 1)) if runs else None,
            )
        )
    output_names = draw(st.lists(names, unique=True, max_size=3)) if nodes else []
    outputs = tuple(Output(name, draw(st.integers(0, len(nodes) - 1)), draw(st.booleans())) for name in output_names)
    return Graph(
        runs=tuple(runs), nodes=tuple(nodes), outputs=outputs, bodies=tuple(draw(st.lists(bodies(), max_size=2)))
    )


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    """Any body whose references exist; what it announces has nothing to do with what it does."""
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    types = st.lists(st.builds(TensorSpec, shape=shapes, dtype=dtypes), max_size=3).map(tuple)
    params = draw(types)
    nodes: list[Node] = []
    for k in range(draw(st.integers(0, 4))):
        here = len(params) + k
        args = draw(st.lists(st.integers(0, here - 1), max_size=3)) if here else []
        nodes.append(Node(draw(names), tuple(args), draw(st.dictionaries(names, attrs, max_size=2))))
    values = len(params) + len(nodes)
    results = draw(st.lists(st.integers(0, values - 1), max_size=3)) if values else []
    return Body(params, tuple(nodes), tuple(results), draw(types))


dims = st.lists(counts | st.sampled_from(sorted(set(SYMBOLS) - {"rows"})), max_size=3).map(lambda d: ("rows", *d))
sites = st.builds(
    SiteSpec,
    name=names,
    dims=dims,
    dtype=dtypes,
    order=counts,
    writable=st.booleans(),
    doc=texts,
    absent=st.none() | texts,
    proof=texts,
)
inputs = st.builds(
    InputSpec,
    name=names,
    dims=dims,
    dtype=dtypes,
    required=st.booleans(),
    below=st.none() | big_counts,
    doc=texts,
)
callables = st.builds(
    CallableSpec,
    name=names,
    d_in=counts,
    d_out=counts,
    dtype=dtypes,
    doc=texts,
    params=counts,
    positionwise=st.booleans(),
    absent=st.none() | texts,
    path=texts,
)
params = st.builds(
    ParamSpec, name=names, shape=st.lists(st.integers(0, 99), max_size=3).map(tuple), dtype=dtypes, doc=texts
)
limits = st.builds(Limits, **dict.fromkeys(Limits.__dataclass_fields__, big_counts))
cards = st.builds(
    ModelCard,
    name=model_names,
    family=texts,
    source=texts,
    revision=texts,
    dtype=dtypes,
    n_layers=counts,
    d_model=counts,
    n_heads=counts,
    n_kv_heads=counts,
    d_head=counts,
    d_mlp=counts,
    d_vocab=counts,
    n_ctx=counts,
    n_params=big_counts,
    causal=st.booleans(),
    sites=st.lists(sites, max_size=4).map(tuple),
    callables=st.lists(callables, max_size=2).map(tuple),
    takes_tokens=st.booleans(),
    ragged=st.booleans(),
    inputs=st.lists(inputs, max_size=2).map(tuple),
    params=st.lists(params, max_size=3).map(tuple),
    weights=st.sampled_from(POLICIES),
    limits=limits,
    attributes=st.dictionaries(texts, texts, max_size=3),
)
summaries = st.builds(
    ModelSummary,
    name=model_names,
    family=texts,
    source=texts,
    n_params=big_counts,
    n_layers=counts,
    d_model=counts,
    ready=st.booleans(),
)
costs = st.builds(Cost, **dict.fromkeys(Cost.__dataclass_fields__, big_counts))
usages = st.builds(
    Usage,
    **dict.fromkeys(
        ("tokens", "passes", "layers_run", "layers_skipped", "nodes", "nodes_run", "bytes_in", "bytes_out"), big_counts
    ),
    queue_ms=finite_floats,
    run_ms=finite_floats,
    cost=costs,
    saved=st.dictionaries(texts, int64s, max_size=3),
)


@st.composite
def artifacts(draw: st.DrawFn) -> ArtifactInfo:
    """What is known of any tensor."""
    tensor = draw(tensors(64))
    times = st.integers(0, 2**33).map(float)
    return ArtifactInfo(
        digest_of(tensor), tensor.dtype, tensor.shape, tensor.nbytes, draw(texts), draw(times), draw(times)
    )


events = st.one_of(
    st.builds(Queued, position=counts),
    st.just(Started()),
    st.builds(Progress, pass_index=counts, passes=counts),
    st.builds(TensorValue, name=names, value=tensors(), finite=st.booleans()),
    st.builds(Kept, name=names, artifact=artifacts(), finite=st.booleans()),
    st.builds(Done, usage=usages),
)
options = st.builds(
    ExecuteOptions,
    deterministic=st.booleans(),
    disabled=st.lists(texts, max_size=3).map(tuple),
    dry_run=st.booleans(),
)


@st.composite
def rows(draw: st.DrawFn) -> TokenizedRow:
    """Any tokenized text."""
    count = draw(st.integers(0, 5))

    def lists(items: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
        return st.lists(items, min_size=count, max_size=count).map(tuple)

    return TokenizedRow(
        ids=draw(lists(int64s)),
        strings=draw(lists(texts)),
        offsets=draw(lists(st.tuples(counts, counts))),
        special=draw(lists(st.booleans())),
    )


trees = st.recursive(
    st.none() | st.booleans() | int64s | finite_floats | texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=20,
)
