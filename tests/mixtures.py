"""Graphs in which everything meets: several runs, writes of all kinds, gradients, generation, loops, modules, weights.

Made from a seed, so that a failure is a number. `tests.strategies` has graphs that hypothesis shrinks; these are wider.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from patchbay.errors import GraphError
from patchbay.ir.bodies import Body
from patchbay.ir.card import ModelCard, SiteSpec
from patchbay.ir.dtypes import float32, int64
from patchbay.ir.graph import Generation, Graph, Node, Output, Run, TensorData
from patchbay.ir.infer import infer_node
from patchbay.ir.ops.spec import TensorSpec, ValueSpec

_ALL = ("slice", None, None, None)
#: Sites that experiments are about.
_LIKED = ("resid", "attn_out", "mlp_out", "attn.z", "attn.pattern", "attn.q", "attn.k", "attn.v")
Index = tuple[tuple[Any, ...], ...]


class Mixture:
    """One graph under construction.

    Args:
        card: of a model of tokens.
        seed: of the graph.
        prompts: what runs are over; None draws some that begin alike.
        gradients, generation: whether there may be any.
        ragged: whether rows that generate may differ in length; beyond a model's window they may only beside others.
    """

    def __init__(
        self,
        card: ModelCard,
        seed: int,
        *,
        prompts: Sequence[tuple[int, ...]] | None = None,
        gradients: bool = True,
        generation: bool = True,
        ragged: bool = True,
    ) -> None:
        self.card, self.draw = card, random.Random(seed)
        self.gradients, self.generation, self.ragged = gradients, generation, ragged
        self.nodes: list[Node] = []
        self.specs: list[ValueSpec] = []
        self.runs: list[Run] = []
        self.bodies: list[Body] = []
        self.sites = [s for s in card.sites if s.absent is None and s.dtype == float32]
        self.canonical = [s for s in self.sites if not s.name.startswith("module:")]
        self.liked = [s for s in self.canonical if any(part in s.name for part in _LIKED)]
        self.prompts = self._prompts() if prompts is None else list(prompts)

    # --- whole graphs

    def anything(self) -> Graph:
        """Runs over prompts that are mostly alike, and a few of all the things that can be done."""
        for _ in range(self.draw.choice([1, 2, 3, 5])):
            self.runs.append(self._run())
        doings: list[Callable[[], Any]] = [self.read, self.write, self.write, self.patch, self.patch, self.compute]
        doings += [self.compute, self.newest, self.newest, self.skip, self.call, self.weight, self.tokens, self.loop]
        doings += [self.gradient] * (2 * self.gradients)
        for _ in range(self.draw.randint(3, 12)):
            self._try(self.draw.choice(doings))
        self.newest()
        values = self._tensors()
        return self._graph({values[-1], *self.draw.sample(values, min(len(values), 4))})

    def sweep(self) -> Graph:
        """Many runs over few prompts, each patched at a place or two, and looked at in few."""
        first, rows = self.prompts[0], self.draw.choice([1, 1, 2])
        shorter = first[: self.draw.choice([len(first), len(first) - 2])]
        rest = (first, shorter)[:rows]
        self.runs += [Run(rest), Run((self.prompts[2],) * rows)]
        self.runs += [Run(self.draw.choice([rest, (self.prompts[3],) * rows])) for _ in range(self.draw.randint(3, 9))]
        seen: set[int] = set()
        for run in range(len(self.runs)):
            for _ in range(self.draw.choice([1, 1, 2]) if run > 1 else 0):
                self._try(self.draw.choice([self.patch, self.patch, self.write]), run)
            for _ in range(self.draw.choice([1, 2])):
                look = self.newest if self.draw.random() < 0.7 else self.part
                seen |= {found for found in [self._try(look, run)] if found is not None}
        return self._graph(seen or {self.newest()})

    def _graph(self, outputs: set[int]) -> Graph:
        named = tuple(Output(f"value_{i}", i) for i in sorted(outputs))
        return Graph(tuple(self.runs), tuple(self.nodes), named, tuple(self.bodies))

    def _try(self, doing: Callable[..., Any], *args: Any) -> Any:
        """What does not fit is left out."""
        try:
            return doing(*args)
        except GraphError:
            return None

    # --- runs

    def _prompts(self) -> list[tuple[int, ...]]:
        def row(n: int) -> tuple[int, ...]:
            return tuple(self.draw.randrange(self.card.d_vocab) for _ in range(n))

        base = row(7)
        return [base, base[:5], row(7), (*base[:3], *row(4)), base[:1], base[:-1]]

    def _run(self) -> Run:
        if self.runs and self.draw.random() < 0.65:
            rows = self.draw.choice(self.runs).tokens
        else:
            rows = tuple(self.draw.choice(self.prompts) for _ in range(self.draw.choice([1, 1, 2, 3])))
            if not self.card.ragged or self.draw.random() < 0.6:
                rows = tuple(row[: min(map(len, rows))] for row in rows)
        how = None
        if self.generation and self.draw.random() < 0.25:
            how = Generation(
                max_new_tokens=self.draw.randint(1, 3),
                temperature=self.draw.choice([0.0, 0.0, 1.0]),
                seed=self.draw.randrange(5),
                eos=False,
                stop=self.draw.choice([(), ((self.draw.randrange(self.card.d_vocab),),)]),
            )
            if not self.ragged:
                rows = tuple(row[: min(map(len, rows))] for row in rows)
        return Run(rows, generation=how)

    def _any_run(self, run: int | None) -> int:
        return self.draw.randrange(len(self.runs)) if run is None else run

    def _step(self, run: int) -> dict[str, int]:
        how = self.runs[run].generation
        return {} if how is None else {"step": self.draw.randrange(how.max_new_tokens)}

    # --- nodes

    def add(self, op: str, args: Sequence[int] = (), run: int | None = None, **attrs: Any) -> int:
        """A node, if it may be.

        Raises:
            GraphError: it may not.
        """
        node = Node(op, tuple(args), attrs, run)
        world = Graph(tuple(self.runs), bodies=tuple(self.bodies))
        self.specs.append(infer_node(world, self.card, node, self.specs))
        self.nodes.append(node)
        return len(self.nodes) - 1

    def shape(self, i: int) -> tuple[int, ...]:
        """Of a tensor."""
        spec = self.specs[i]
        assert isinstance(spec, TensorSpec)
        return spec.shape

    def _tensors(self) -> list[int]:
        return [
            i for i, s in enumerate(self.specs) if isinstance(s, TensorSpec) and s.scalar is None and s.dtype == float32
        ]

    def _constant(self, shape: Sequence[int]) -> int:
        size = 1
        for extent in shape:
            size *= extent
        data = struct.pack(f"<{size}f", *[self.draw.uniform(-1, 1) for _ in range(size)])
        return self.add("const", value=TensorData(float32, tuple(shape), data))

    def _integers(self, values: Sequence[int]) -> int:
        data = struct.pack(f"<{len(values)}q", *values)
        return self.add("const", value=TensorData(int64, (len(values),), data))

    def _number(self) -> int:
        return self.add("const", scalar=self.draw.choice([-1.5, -0.5, 0.0, 0.25, 1.5]))

    def _site(self) -> SiteSpec:
        chance = self.draw.random()
        if chance < 0.2:
            return self.card.site("logits")
        return self.draw.choice(self.liked if chance < 0.7 else self.canonical if chance < 0.95 else self.sites)

    def _index(self, shape: Sequence[int]) -> tuple[Index, tuple[int, ...]]:
        """An index of any kind, and the constants that its arrays are."""
        items: list[tuple[Any, ...]] = []
        arrays: tuple[int, ...] = ()
        for extent in shape[: self.draw.randint(0, len(shape))]:
            kind = self.draw.choice(["int", "slice", "all", "all", "array"])
            at = self.draw.randrange(extent) if extent else 0
            if kind == "int" and extent:
                items.append(("int", self.draw.choice([at, at - extent])))
            elif kind == "slice":
                stop = self.draw.choice([self.draw.randint(at, extent), None])
                items.append(("slice", self.draw.choice([at, None]), stop, self.draw.choice([None, 2])))
            elif kind == "array" and extent and not arrays:
                values = self.draw.sample(range(extent), min(extent, self.draw.randint(1, 3)))
                arrays = (self._integers([self.draw.choice([v, v - extent]) for v in values]),)
                items.append(("array", 0))
            else:
                items.append(_ALL)
        if len(items) < len(shape) and self.draw.random() < 0.2:
            items.append(("ellipsis",))
        return tuple(items), arrays

    # --- what experiments do

    def read(self, run: int | None = None) -> int:
        """A site's value."""
        run = self._any_run(run)
        return self.add("site.read", (), run, site=self._site().name, **self._step(run))

    def part(self, run: int | None = None) -> int:
        """Some positions of a site's value."""
        found = self.read(run)
        dims = self.card.site(str(self.nodes[found].attrs["site"])).dims
        axis = next((axis for axis, dim in enumerate(dims) if dim in ("seq", "query")), None)
        if axis is None:
            return found
        at = self.draw.randrange(self.shape(found)[axis])
        item = self.draw.choice([("int", at), ("slice", at, None, None), ("slice", -2, None, None)])
        return self.add("getitem", (found,), index=(*[_ALL] * axis, item))

    def newest(self, run: int | None = None) -> int:
        """Logits of the last positions, of all tokens or of one."""
        run = self._any_run(run)
        found = self.add("site.read", (), run, site="logits", **self._step(run))
        index: Index = (_ALL, self.draw.choice([("int", -1), ("int", -1), ("slice", -2, None, None)]))
        if self.draw.random() < 0.4:
            index = (*index, ("int", self.draw.randint(-self.card.d_vocab, self.card.d_vocab - 1)))
        return self.add("getitem", (found,), index=index)

    def write(self, run: int | None = None) -> None:
        """Something fitting at a site, at any index of it."""
        run, site = self._any_run(run), self._site()
        if not site.writable:
            return
        step = self._step(run) if self.draw.random() < 0.7 else {}
        full = self.card.site_shape(site, self.runs[run], step.get("step", 0))
        index, arrays = self._index(full) if self.draw.random() < 0.7 else ((), ())
        taken = self._taken(full, index, arrays)
        fitting = [i for i in self._tensors() if _fits(self.shape(i), taken)]
        if fitting and self.draw.random() < 0.6:
            value = self.draw.choice(fitting[-6:])
        else:
            value = self._constant(taken) if self.draw.random() < 0.5 else self._number()
        mode = self.draw.choice(["set", "add", "add", "mul"])
        self.add("site.write", (value, *arrays), run, site=site.name, mode=mode, index=index, **step)

    def patch(self, run: int | None = None) -> None:
        """A position, some of them, or one head's of a site, from another run into the same place."""
        into, site = self._any_run(run), self.draw.choice(self.liked)
        source = self.draw.randrange(len(self.runs))
        there, here = self._step(source), self._step(into)
        read = self.add("site.read", (), source, site=site.name, **there)
        full = self.card.site_shape(site, self.runs[into], here.get("step", 0))
        axis = next(axis for axis, dim in enumerate(site.dims) if dim in ("seq", "query"))
        at, arrays = self.draw.randrange(full[axis]), ()
        item: tuple[Any, ...] = self.draw.choice(
            [("int", at), ("int", at - full[axis]), ("slice", at, None, None), ("array", 0)]
        )
        if item[0] == "array":
            arrays = (self._integers(self.draw.sample(range(full[axis]), min(2, full[axis]))),)
        index: Index = (*[_ALL] * axis, item)
        if len(full) == 4 and axis == 1 and not arrays and self.draw.random() < 0.4:
            index = (*index, ("int", self.draw.randrange(full[2])))
        value = self.add("getitem", (read, *arrays), index=index)
        if _fits(self.shape(value), self._taken(full, index, arrays)):
            mode = self.draw.choice(["set", "set", "add"])
            self.add("site.write", (value, *arrays), into, site=site.name, mode=mode, index=index, **here)

    def _taken(self, full: tuple[int, ...], index: Index, arrays: Sequence[int]) -> tuple[int, ...]:
        node = Node("getitem", (0, *range(1, 1 + len(arrays))), {"index": index})
        found = infer_node(Graph(), self.card, node, [TensorSpec(full, float32), *(self.specs[a] for a in arrays)])
        assert isinstance(found, TensorSpec)
        return found.shape

    def skip(self) -> None:
        """A layer hands on what it is given."""
        run, layer = self._any_run(None), self.draw.randrange(self.card.n_layers)
        step = self._step(run)
        value = self.add("site.read", (), run, site=f"blocks.{layer}.resid_pre", **step)
        self.add("site.write", (value,), run, site=f"blocks.{layer}.resid_post", mode="set", index=(), **step)

    def compute(self) -> int | None:
        """An operation on values that are there."""
        there = self._tensors()
        if not there:
            return self.read()
        a = self.draw.choice(there[-8:])
        kind = self.draw.choice(["unary", "number", "binary", "getitem", "reduce", "softmax"])
        if kind == "unary":
            return self.add(self.draw.choice(["tanh", "relu", "sigmoid", "gelu"]), (a,))
        if kind == "number":
            return self.add(self.draw.choice(["add", "multiply"]), (a, self._number()))
        if kind == "binary":
            return self.add(self.draw.choice(["add", "multiply", "maximum"]), (a, self.draw.choice(there)))
        if kind == "getitem":
            index, arrays = self._index(self.shape(a))
            return self.add("getitem", (a, *arrays), index=index)
        if not self.shape(a) or not all(self.shape(a)):
            return None
        if kind == "softmax":
            return self.add("softmax", (a,), axis=-1)
        return self.add(self.draw.choice(["sum", "mean", "max"]), (a,), axis=-1, keepdims=self.draw.random() < 0.5)

    def gradient(self) -> None:
        """Of a number with respect to one or two reads."""
        reads = [i for i, node in enumerate(self.nodes) if node.op == "site.read"]
        values = self._tensors()
        if not reads or not values:
            return
        wrt = self.draw.sample(reads, min(len(reads), self.draw.choice([1, 2])))
        square = self.add("square", (self.add("tanh", (self.draw.choice(values[-6:]),)),))
        taken = self.add("grad", (self.add("mean", (square,), axis=None), *wrt))
        for k in range(len(wrt)):
            self.add("item", (taken,), index=k)

    def loop(self) -> None:
        """A scan or a map over the first axis of a value."""
        long = [i for i in self._tensors() if self.shape(i)[:1] > (0,)]
        if not long:
            return
        value = self.draw.choice(long)
        each = TensorSpec(self.shape(value)[1:], float32)
        if self.draw.random() < 0.5:
            self.bodies.append(Body((each,), (Node("tanh", (0,)), Node("add", (1, 0))), (2,), (each,)))
            found = self.add("map", (value,), body=len(self.bodies) - 1, mapped=1)
        else:
            nodes = (Node("add", (0, 1)), Node("tanh", (2,)))
            self.bodies.append(Body((each, each), nodes, (3, 2), (each, each)))
            start = self.add("getitem", (value,), index=(("int", 0),))
            length = self.shape(value)[0]
            found = self.add("scan", (start, value), body=len(self.bodies) - 1, length=length, carry=1, xs=1)
        self.add("item", (found,), index=0)

    def call(self) -> None:
        """A module of the model applied to a value."""
        modules = [c for c in self.card.callables if c.absent is None and c.positionwise]
        module = self.draw.choice(modules)
        fitting = [i for i in self._tensors() if self.shape(i)[-1:] == (module.d_in,)]
        if fitting:
            self.add("call", (self.draw.choice(fitting),), target=module.name)

    def weight(self) -> None:
        """One of the model's."""
        self.add("param.read", name=self.draw.choice([p.name for p in self.card.params if p.dtype == float32]))

    def tokens(self) -> None:
        """What a run has generated."""
        generating = [i for i, run in enumerate(self.runs) if run.generation]
        if generating:
            run = self.draw.choice(generating)
            how = self.runs[run].generation
            assert how is not None
            self.add("run.tokens", (), run, step=self.draw.randint(0, how.max_new_tokens))


def _fits(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False)
    )
