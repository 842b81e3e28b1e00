"""Prompts that begin as an earlier one of the account did: the values of whole prompts, with fewer positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from patchbay.ir.dtypes import float32
from patchbay.ir.events import ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Generation, Graph, Node, Output, Run, TensorData
from patchbay.ir.limits import Limits
from patchbay_server.engine import Engine, TrunkCache
from patchbay_server.engine.running import Running
from patchbay_server.engine.windows import position_axis
from patchbay_server.kernels import to_tensor
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.loader import host
from tests import families
from tests.tiny import D_MODEL, build

SYSTEM = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
FIRST, SECOND = (*SYSTEM, 7, 9, 3, 2), (*SYSTEM, 10, 11, 12)
STEPS = 5
NEWEST = (("slice", None, None, None), ("int", -1))
Rows = Sequence[Sequence[int]]
Values = dict[str, torch.Tensor]


@cache
def hosted(family: str) -> HostedModel:
    return host(build(family))


def engine_of(family: str, trunks: TrunkCache | None = None, **how: Any) -> Engine:
    """An engine that uses whatever is known, however little that is."""
    return Engine(hosted(family), layer_cost=2, trunks=TrunkCache(2**24) if trunks is None else trunks, **how)


def run(engine: Engine, graph: Graph, account: str | None = "ada", **options: Any) -> tuple[Values, Usage]:
    found: Values = {}

    def take(event: object) -> None:
        if isinstance(event, TensorValue):
            found[event.name] = to_tensor(event.value)

    return found, engine.run(engine.prepare(graph, ExecuteOptions(**options), account=account), take)


def same(found: Values, expected: Values) -> None:
    """Tokens are equal, values to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def generates(rows: Rows, *nodes: Node, reads: Sequence[int] = (), **how: Any) -> Graph:
    """A run that generates: its tokens, the logits of every step, and the values of some of `nodes`, by number."""
    tail = [Node("run.tokens", (), {"step": STEPS}, 0)]
    tail += [Node("site.read", (), {"site": "logits", "step": step}, 0) for step in range(STEPS)]
    outputs = [Output(f"tail{i}", len(nodes) + i) for i in range(len(tail))]
    outputs += [Output(f"read{i}", i) for i in reads]
    generation = Generation(max_new_tokens=STEPS, eos=False, **how)
    run = Run(tuple(map(tuple, rows)), generation=generation)
    return Graph((run,), (*nodes, *tail), tuple(outputs))


def vector() -> Node:
    value = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    return Node("const", (), {"value": TensorData(float32, (D_MODEL,), value.numpy().tobytes())})


def write(value: int, site: str, index: Any = (), **attrs: Any) -> Node:
    return Node("site.write", (value,), {"site": site, "mode": "add", "index": index, **attrs}, 0)


def read(site: str, **attrs: Any) -> Node:
    return Node("site.read", (), {"site": site, **attrs}, 0)


def computed(rows: Rows, known: int) -> int:
    """Positions that go through the model."""
    return len(rows) * (max(map(len, rows)) - known + STEPS - 1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("rows", "known"),
    [
        ([SECOND], len(SYSTEM)),
        ([FIRST], len(FIRST) - 1),
        ([(*FIRST, 3, 3)], len(FIRST)),
        ([FIRST[:9]], 8),
        ([SECOND, (*SYSTEM, 10, 4, 4)], len(SYSTEM)),
        ([SECOND, (*SYSTEM, 9, 8, 7, 6, 5), (*SYSTEM, 1)], len(SYSTEM)),
        ([SECOND, FIRST[1:]], 0),
    ],
)
def test_a_prompt_computes_what_comes_after_what_is_known(family: str, rows: Rows, known: int) -> None:
    """Tokens, and the logits of every step, are those of whole prompts; one row, several, of one length or not."""
    engine = engine_of(family)
    whole, usage = run(engine, generates([FIRST]))
    assert usage.tokens == computed([FIRST], 0) and "known_prompts" not in usage.saved
    same(whole, run(engine, generates([FIRST]), deterministic=True)[0])
    graph = generates(rows)
    found, usage = run(engine, graph)
    assert usage.tokens == computed(rows, known)
    assert usage.saved.get("known_prompts", 0) == len(rows) * known
    for options in ({"deterministic": True}, {"disabled": ("prefix_cache",)}, {"disabled": ("shared_prefix",)}):
        expected, usage = run(engine, graph, **options)
        assert usage.tokens == computed(rows, 0) and "known_prompts" not in usage.saved
        same(found, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_drawn_tokens_are_the_same(family: str) -> None:
    """What is drawn with a temperature and a seed does not depend on what is known."""
    engine = engine_of(family)
    run(engine, generates([FIRST]))
    graph = generates([SECOND], temperature=1.0, seed=5)
    found, usage = run(engine, graph)
    assert usage.saved["known_prompts"] == len(SYSTEM)
    same(found, run(engine, graph, deterministic=True)[0])


STEERED: dict[str, tuple[tuple[Node, ...], tuple[int, ...], int]] = {
    "from step 1": (
        (vector(), *(write(0, "blocks.1.resid_post", step=k) for k in range(1, STEPS))),
        (),
        len(SYSTEM),
    ),
    "newest position of every step": ((vector(), write(0, "blocks.1.resid_post", NEWEST)), (), len(SYSTEM)),
    "a late position of the prompt": (
        (vector(), write(0, "blocks.0.mlp_out", (NEWEST[0], ("slice", -2, None, 1)), step=0)),
        (),
        len(SYSTEM),
    ),
    "every position of every step": ((vector(), write(0, "blocks.1.resid_post")), (), 0),
    "an early position of the prompt": (
        (vector(), write(0, "blocks.1.resid_post", (NEWEST[0], ("int", 5)), step=0)),
        (),
        5,
    ),
    "the first position of the prompt": (
        (vector(), write(0, "blocks.1.resid_post", (NEWEST[0], ("int", 0)), step=0)),
        (),
        0,
    ),
    "keys and values": ((vector(), write(0, "blocks.1.attn_out", NEWEST, step=0)), (), len(SYSTEM)),
    "a whole read": ((read("blocks.1.resid_post", step=0),), (0,), 0),
    "a late read": (
        (read("blocks.1.resid_post", step=0), Node("getitem", (0,), {"index": NEWEST})),
        (1,),
        len(SYSTEM),
    ),
    "a late row of the pattern": (
        (
            read("blocks.1.attn.pattern", step=0),
            Node("getitem", (0,), {"index": (*NEWEST[:1], NEWEST[0], ("int", -1))}),
        ),
        (1,),
        len(SYSTEM),
    ),
    "late keys": (
        (read("blocks.2.attn.k", step=0), Node("getitem", (0,), {"index": (NEWEST[0], ("slice", -2, None, 1))})),
        (1,),
        len(SYSTEM),
    ),
    "a read of a later step": ((read("blocks.1.resid_post", step=2),), (0,), len(SYSTEM)),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("case", STEERED)
def test_what_looks_at_or_changes_a_position_has_it_computed(family: str, case: str) -> None:
    """What is known ends before the first position of the prompt that a read or write takes."""
    nodes, reads, known = STEERED[case]
    engine = engine_of(family)
    run(engine, generates([FIRST]))
    for rows in ([SECOND], [SECOND, (*SYSTEM, 4, 4, 4)]):
        graph = generates(rows, *nodes, reads=reads)
        found, usage = run(engine, graph)
        assert usage.saved.get("known_prompts", 0) == len(rows) * known
        same(found, run(engine, graph, deterministic=True)[0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_rows_of_different_lengths_positions_are_counted_from_their_ends(family: str) -> None:
    """A write at the second last position is at an earlier token of a shorter row."""
    engine = engine_of(family)
    run(engine, generates([FIRST]))
    rows = [(*SYSTEM, 4, 4, 4, 4), (*SYSTEM, 4)]
    late = (NEWEST[0], ("slice", -4, None, 1))
    look = Node("getitem", (2,), {"index": (NEWEST[0], ("slice", -3, None, 1))})
    graph = generates(
        rows,
        vector(),
        write(0, "blocks.1.resid_post", late, step=0),
        read("blocks.2.resid_post", step=0),
        look,
        reads=(3,),
    )
    found, usage = run(engine, graph)
    assert usage.saved["known_prompts"] == 2 * 9
    same(found, run(engine, graph, deterministic=True)[0])


def test_a_prompt_that_is_written_to_leaves_nothing() -> None:
    """Keys and values that a write has changed are nobody's beginning; later steps' writes change none of a prompt."""
    engine = engine_of("llama")
    for nodes in (STEERED["every position of every step"][0], STEERED["newest position of every step"][0]):
        run(engine, generates([FIRST], *nodes))
        assert "known_prompts" not in run(engine, generates([SECOND]))[1].saved
        engine = engine_of("llama")
    run(engine, generates([FIRST], *STEERED["from step 1"][0]))
    found, usage = run(engine, generates([SECOND]))
    assert usage.saved["known_prompts"] == len(SYSTEM)
    same(found, run(engine, generates([SECOND]), deterministic=True)[0])


def test_nothing_of_one_account_is_known_to_another() -> None:
    """Another account's prompt, or nobody's, is computed as if it were the first."""
    engine = engine_of("llama")
    run(engine, generates([FIRST]))
    for account in ("bob", None):
        assert run(engine, generates([FIRST]), account)[1].tokens == computed([FIRST], 0)
    assert run(engine, generates([FIRST]))[1].tokens == computed([FIRST], len(FIRST) - 1)


def test_prompts_and_other_runs_use_what_either_left() -> None:
    """A trace goes on from what a prompt left, also where that was put together of two; a prompt from a trace's."""
    engine = engine_of("llama")
    longer = (*FIRST, 1, 2, 3, 4, 5, 6, 7, 8)
    run(engine, generates([FIRST]))
    assert run(engine, generates([longer]))[1].saved["known_prompts"] == len(FIRST)

    def patched(position: int) -> Graph:
        index = (NEWEST[0], ("int", position))
        nodes = (
            Node("const", (), {"scalar": 2.0}),
            Node("site.write", (0,), {"site": "blocks.1.resid_post", "mode": "mul", "index": index}, 0),
            Node("site.read", (), {"site": "logits"}, 0),
            Node("getitem", (2,), {"index": NEWEST}),
        )
        return Graph((Run((longer,)),), nodes, (Output("out", 3),))

    found, usage = run(engine, patched(5))
    assert usage.tokens == len(longer) - 5 and usage.saved["prefix_cache"] == 1
    same(found, run(engine, patched(5), deterministic=True)[0])
    engine = engine_of("llama")
    for _ in range(2):
        run(engine, patched(-1))
    found, usage = run(engine, generates([longer]))
    assert usage.saved["known_prompts"] == len(longer) - 1
    same(found, run(engine, generates([longer]), deterministic=True)[0])


@pytest.mark.parametrize(
    "family", ["mistral", "gemma3_text", "mixtral", "deepseek_v3", "gpt_oss", "gptj", "falcon", "bloom"]
)
def test_families_go_on_from_known_prompts(family: str) -> None:
    """Windows, experts, latent attention, sinks; every site's last positions; or not at all where rows do not join."""
    model = host(families.build(family), name=family)
    assert model.continuation is not None
    engine = Engine(model, layer_cost=2, trunks=TrunkCache(2**24))
    nodes: list[Node] = []
    for site in model.continuation.reaches:
        axis = position_axis(model.card, site)
        if axis is not None and site != "logits":
            nodes.append(read(site, step=0))
            late = (*[NEWEST[0]] * axis, ("slice", -2, None, 1))
            nodes.append(Node("getitem", (len(nodes) - 1,), {"index": late}))
    assert len(nodes) > 50
    run(engine, generates([FIRST]))
    graph = generates([SECOND], *nodes, reads=range(1, len(nodes), 2))
    found, usage = run(engine, graph)
    assert usage.saved.get("known_prompts", 0) == (len(SYSTEM) if model.decodes_together else 0)
    assert model.decodes_together is (family != "bloom")
    same(found, run(engine, graph, disabled=("prefix_cache",))[0])


def test_prompts_that_begin_alike_share_a_forward() -> None:
    """Requests that arrive together go on from the same beginning in one forward, then step together."""
    engine = engine_of("llama")
    run(engine, generates([FIRST]))
    rows = [(*SYSTEM, 10), (*SYSTEM, 11, 12), (*SYSTEM, 13, 14, 15)]
    found: list[Values] = [{} for _ in rows]

    def taking(values: Values) -> Any:
        return lambda event: (
            values.__setitem__(event.name, to_tensor(event.value)) if isinstance(event, TensorValue) else None
        )

    requests: list[Running] = []
    for row, values in zip(rows, found, strict=True):
        plan = engine.prepare(generates([row]), account="ada")
        requests.append(engine.open(plan, taking(values)))
        requests[-1].begin()
    kinds = {request.wanted.together for request in requests if request.wanted is not None}
    assert len(kinds) == 1 and None not in kinds
    assert [request.wanted.seq for request in requests if request.wanted is not None] == [1, 2, 3]
    forwards = 0
    while not all(request.ended for request in requests):
        engine.advance([request for request in requests if not request.ended])
        forwards += 1
    assert forwards == STEPS
    for row, values, request in zip(rows, found, requests, strict=True):
        assert request.usage is not None and request.usage.saved["known_prompts"] == len(SYSTEM)
        same(values, run(engine, generates([row]), deterministic=True)[0])


def test_prompts_leave_within_bounds() -> None:
    """Nothing is kept without room in the cache or below the request's peak, nor of what is mostly known already."""
    for engine in (engine_of("llama", TrunkCache(1_000)), engine_of("llama", TrunkCache(0))):
        assert [run(engine, generates([FIRST]))[1].tokens for _ in range(2)] == [computed([FIRST], 0)] * 2
    trunks = TrunkCache(2**24)
    engine = engine_of("llama", trunks)
    plan = engine.prepare(generates([FIRST]), account="ada")
    nobodys = engine.prepare(generates([FIRST]))
    assert plan.cost.peak_bytes > nobodys.cost.peak_bytes and trunks.nbytes == 0
    tight = engine_of("llama", trunks, limits=Limits(max_peak_bytes=nobodys.cost.peak_bytes))
    run(tight, generates([FIRST]))
    assert trunks.nbytes == 0
    run(engine, generates([FIRST]))
    held = trunks.nbytes
    assert plan.cost.peak_bytes - nobodys.cost.peak_bytes == held > 0
    run(engine, generates([SECOND]))
    assert trunks.nbytes == held


def test_the_longest_beginning_is_found() -> None:
    """Of all rows of an account's entries; too short a beginning is none."""
    engine, trunks = engine_of("llama"), TrunkCache(2**24)
    kept = TrunkCache(2**24)
    run(engine_of("llama", kept), generates([FIRST]))
    trunk = kept.get("ada", (FIRST,))
    assert trunk is not None and engine.hosted.continues
    trunks.put("ada", ((1, 2, 3, 4), (1, 2, 9, 9)), trunk)
    trunks.put("ada", ((1, 2, 3),), trunk)
    trunks.put("bob", ((1, 2, 9, 9, 9),), trunk)
    found = trunks.longest("ada", (1, 2, 9, 9, 9), 2)
    assert found is not None and (found.row, found.length) == (1, 4)
    assert trunks.longest("ada", (1, 2, 9, 9, 9), 5) is None
    assert trunks.longest("ada", (1, 5, 5), 2) is None
    assert trunks.longest("ada", (1, 2, 9), 2, lambda _: False) is None
    assert trunks.longest("eve", (1, 2, 9), 2) is None
