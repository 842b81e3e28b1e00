"""A fake server for tests of code that uses Patchbay: no network, no model, the same answers every time.

    from patchbay.testing import fake_client

    def test_my_experiment():
        model = fake_client().model("fake")
        with model.trace("the cat sat") as run:
            h = run.blocks[0].resid_post[:, -1].save()
        assert h.value.shape == (1, 8)

The model has 2 layers, a width of 8, 2 heads and 16 words. Its sites hold pseudo-random numbers that depend on the
site and the run's tokens only; no site is computed from another, so a write shows in later reads of the same site and
nowhere else. Pure operations are evaluated by `patchbay.reference`, and graphs are verified as a server would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from zlib import crc32

from patchbay.errors import GraphError, NotFoundError, UnavailableError
from patchbay.ir.artifacts import ArtifactInfo, digest_of, not_there
from patchbay.ir.card import CallableSpec, ModelCard, SiteSpec
from patchbay.ir.dtypes import float32
from patchbay.ir.events import (
    ChatMessage,
    Done,
    Event,
    ExecuteOptions,
    Kept,
    ModelSummary,
    Progress,
    Started,
    TensorValue,
    TokenizedRow,
    Usage,
)
from patchbay.ir.graph import Graph, Node, Run, TensorData
from patchbay.transport.base import Transport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.client import Client

N_LAYERS, D_MODEL, N_HEADS, D_HEAD, D_MLP, D_VOCAB, N_CTX = 2, 8, 2, 4, 16, 16, 64
BOS = 0


def fake_card(name: str = "fake") -> ModelCard:
    """The card of the fake model."""
    block = {
        "resid_pre": ("rows", "seq", D_MODEL),
        "attn.q": ("rows", "seq", N_HEADS, D_HEAD),
        "attn.k": ("rows", "seq", N_HEADS, D_HEAD),
        "attn.v": ("rows", "seq", N_HEADS, D_HEAD),
        "attn.attn_scores": ("rows", N_HEADS, "query", "key"),
        "attn.pattern": ("rows", N_HEADS, "query", "key"),
        "attn.z": ("rows", "seq", N_HEADS, D_HEAD),
        "attn_out": ("rows", "seq", D_MODEL),
        "resid_mid": ("rows", "seq", D_MODEL),
        "mlp.pre": ("rows", "seq", D_MLP),
        "mlp.post": ("rows", "seq", D_MLP),
        "mlp_out": ("rows", "seq", D_MODEL),
        "resid_post": ("rows", "seq", D_MODEL),
    }
    named: list[tuple[str, tuple[int | str, ...]]] = [("embed", ("rows", "seq", D_MODEL))]
    named += [(f"blocks.{layer}.{site}", dims) for layer in range(N_LAYERS) for site, dims in block.items()]
    named += [("ln_final.normalized", ("rows", "seq", D_MODEL)), ("logits", ("rows", "seq", D_VOCAB))]
    return ModelCard(
        name=name,
        family="fake",
        source="patchbay.testing",
        revision="0",
        dtype=float32,
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_heads=N_HEADS,
        n_kv_heads=N_HEADS,
        d_head=D_HEAD,
        d_mlp=D_MLP,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
        n_params=0,
        causal=True,
        sites=tuple(SiteSpec(site, dims, float32, order) for order, (site, dims) in enumerate(named)),
        callables=(
            CallableSpec("ln_final", D_MODEL, D_MODEL, float32, "layer norm without parameters"),
            CallableSpec("unembed", D_MODEL, D_VOCAB, float32, "product with a fixed matrix"),
        ),
        attributes=MappingProxyType({"note": "a fake for tests"}),
    )


class FakeModel:
    """What the fake server does with texts and graphs, without any transport."""

    def __init__(self, name: str = "fake") -> None:
        self.card = fake_card(name)
        self.summary = ModelSummary(name, "fake", "patchbay.testing", 0, N_LAYERS, D_MODEL)
        self.artifacts: dict[str, tuple[ArtifactInfo, TensorData]] = {}

    def tokenize(self, texts: Sequence[str], add_special_tokens: bool = True) -> tuple[TokenizedRow, ...]:
        """Words between white space; a word's id depends on its letters only and is never `BOS`."""
        return tuple(_tokenize(text, add_special_tokens) for text in texts)

    def render_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        """Roles and contents as words."""
        return tuple(" ".join(f"<{m.role}> {m.content}" for m in messages) for messages in chats)

    def token_strings(self, ids: Sequence[int]) -> TokenizedRow:
        """Every id has a name of its own; words cannot be told from their ids."""
        strings = tuple("<bos>" if i == BOS else f"word{i}" for i in ids)
        return TokenizedRow(tuple(ids), strings, ((0, 0),) * len(strings), tuple(i == BOS for i in ids))

    def store(self, tensor: TensorData, name: str) -> ArtifactInfo:
        """Keeps a tensor; nothing expires."""
        digest = digest_of(tensor)
        copy = TensorData(tensor.dtype, tensor.shape, bytes(tensor.data))
        info = ArtifactInfo(digest, tensor.dtype, tensor.shape, tensor.nbytes, name)
        return self.artifacts.setdefault(digest, (info, copy))[0]

    def stored(self, digest: str, **metadata: str) -> tuple[ArtifactInfo, TensorData]:
        """A tensor that was kept.

        Raises:
            NotFoundError: there is none of that digest.
        """
        if digest not in self.artifacts:
            raise not_there(digest, **metadata)
        return self.artifacts[digest]

    def execute(self, graph: Graph, options: ExecuteOptions) -> Iterator[Event]:
        """The events of running `graph`.

        Raises:
            GraphError: as a server would raise it.
        """
        from patchbay.arrays import shared_data
        from patchbay.ir.price import price
        from patchbay.ir.verify import verify

        if any(run.generation for run in graph.runs):
            raise GraphError("the fake model generates no tokens")
        verified = verify(graph, self.card)
        cost = price(verified.flat, verified.flat_specs, verified.facts)
        if options.dry_run:
            yield Done(Usage(nodes=len(graph.nodes), cost=cost))
            return
        yield Started()
        nodes = list(graph.nodes)
        for i, node in enumerate(nodes):
            if "artifact" in node.attrs:
                value = self.stored(str(node.attrs["artifact"]), node=str(i))[1]
                nodes[i] = Node("const", (), {"value": value})
        values = _Evaluation(Graph(graph.runs, tuple(nodes), bodies=graph.bodies), self.card).values()
        yield Progress(len(graph.runs), len(graph.runs))
        sent = 0
        for output in graph.outputs:
            import numpy as np

            array = np.asarray(values[output.node])
            tensor = shared_data(array)
            finite = bool(np.isfinite(array.astype(np.float64)).all())
            if output.keep:
                yield Kept(output.name, self.store(tensor, output.name), finite)
                continue
            sent += tensor.nbytes
            yield TensorValue(output.name, tensor, finite)
        tokens = sum(run.rows * run.seq for run in graph.runs)
        layers = N_LAYERS * len(graph.runs)
        yield Done(
            Usage(
                tokens=tokens,
                passes=len(graph.runs),
                layers_run=layers,
                nodes=len(graph.nodes),
                nodes_run=len(graph.nodes),
                bytes_out=sent,
                cost=cost,
            )
        )


class FakeTransport(Transport):
    """A `Transport` that ends in a `FakeModel`; everything happens in this process."""

    def __init__(self, name: str = "fake") -> None:
        self.model = FakeModel(name)
        self._closed = False

    async def list_models(self) -> tuple[ModelSummary, ...]:
        self._check_open()
        return (self.model.summary,)

    async def get_model(self, name: str) -> ModelCard:
        return self._model(name).card

    async def tokenize(
        self, model: str, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        return self._model(model).tokenize(texts, add_special_tokens if prepend_bos is None else prepend_bos)

    async def render_chats(self, model: str, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        return self._model(model).render_chats(chats)

    async def token_strings(self, model: str, ids: Sequence[int]) -> TokenizedRow:
        return self._model(model).token_strings(ids)

    async def execute(
        self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        del timeout_s
        for event in self._model(model).execute(graph, options):
            if isinstance(event, TensorValue):
                self.bytes_received += event.value.nbytes
            yield event

    async def put_artifact(
        self,
        info: ArtifactInfo,
        tensor: TensorData,
        *,
        automatic: bool = False,
        known: bool = False,
        model: str | None = None,
    ) -> ArtifactInfo:
        self._check_open()
        if info.digest not in self.model.artifacts:
            self.bytes_sent += tensor.nbytes
        return self.model.store(tensor, info.name)

    async def get_artifact(self, digest: str, *, model: str | None = None) -> tuple[ArtifactInfo, TensorData]:
        self._check_open()
        info, tensor = self.model.stored(digest)
        self.bytes_received += tensor.nbytes
        return info, tensor

    async def stat_artifacts(self, digests: Sequence[str], *, model: str | None = None) -> tuple[ArtifactInfo, ...]:
        self._check_open()
        return tuple(self.model.artifacts[digest][0] for digest in digests if digest in self.model.artifacts)

    async def list_artifacts(self) -> tuple[ArtifactInfo, ...]:
        self._check_open()
        return tuple(info for _, (info, _) in sorted(self.model.artifacts.items()))

    async def delete_artifact(self, digest: str) -> None:
        self._check_open()
        self.model.stored(digest)
        del self.model.artifacts[digest]

    async def close(self) -> None:
        self._closed = True

    def _model(self, name: str) -> FakeModel:
        self._check_open()
        if name != self.model.card.name:
            raise NotFoundError(f"the fake server hosts no model {name!r}; it hosts: {self.model.card.name}")
        return self.model

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("this connection has been closed; open a new one")


def fake_client() -> Client:
    """A real client before a `FakeTransport`; its model is called ``"fake"``."""
    from patchbay.client import Client

    return Client(FakeTransport())


# --- the fake model -----------------------------------------------------------------------------------------------


def _tokenize(text: str, add_special_tokens: bool) -> TokenizedRow:
    ids, strings, offsets, special = [], [], [], []
    if add_special_tokens:
        ids, strings, offsets, special = [BOS], ["<bos>"], [(0, 0)], [True]
    start = 0
    for word in text.split():
        start = text.index(word, start)
        ids.append(1 + crc32(word.encode("utf-8", "replace")) % (D_VOCAB - 1))
        strings.append(word)
        offsets.append((start, start + len(word)))
        special.append(False)
        start += len(word)
    return TokenizedRow(tuple(ids), tuple(strings), tuple(offsets), tuple(special))


class _Evaluation:
    """One graph's values, in program order."""

    def __init__(self, graph: Graph, card: ModelCard) -> None:
        self._graph = graph
        self._card = card
        self._sites: dict[tuple[int, str], NDArray[Any]] = {}

    def values(self) -> list[Any]:
        values: list[Any] = []
        for node in self._graph.nodes:
            values.append(self._value(node, [values[arg] for arg in node.args]))
        return values

    def _value(self, node: Node, args: list[Any]) -> Any:
        from patchbay import reference
        from patchbay.arrays import view_of
        from patchbay.ir.ops import spec

        match node.op:
            case "const":
                value = node.attrs.get("value")
                return view_of(value) if isinstance(value, TensorData) else node.attrs["scalar"]
            case "site.read":
                return self._site(node).copy()
            case "site.write":
                self._write(node, args)
                return ()
            case "call":
                return _call(str(node.attrs["target"]), args[0])
            case "item":
                return args[0][node.attrs["index"]]
            case "scan" | "cond" | "map":
                return reference.evaluate_control(node.op, node.attrs, args, self._graph.bodies)
        return reference.evaluate(spec(node.op), args, node.attrs)

    def _site(self, node: Node) -> NDArray[Any]:
        assert node.run is not None
        key = (node.run, str(node.attrs["site"]))
        if key not in self._sites:
            self._sites[key] = _pseudo_value(self._card.site(key[1]), self._graph.runs[node.run])
        return self._sites[key]

    def _write(self, node: Node, args: list[Any]) -> None:
        site = self._site(node)
        value, *arrays = args
        index = _numpy_index(node.attrs.get("index", ()), arrays)
        match node.attrs.get("mode", "set"):
            case "add":
                site[index] = site[index] + value
            case "mul":
                site[index] = site[index] * value
            case _:
                site[index] = value


def _pseudo_value(site: SiteSpec, run: Run) -> NDArray[Any]:
    import numpy as np

    seed = crc32(repr((site.name, run.tokens)).encode())
    value = np.random.default_rng(seed).standard_normal(site.shape({"rows": run.rows, "seq": run.seq}))
    if site.name.endswith("attn.pattern"):
        weights = np.exp(value) * np.tri(run.seq)
        value = weights / weights.sum(-1, keepdims=True)
    return value.astype(np.float32)


def _numpy_index(index: Any, arrays: Sequence[Any]) -> tuple[Any, ...]:
    items: list[Any] = []
    for kind, *rest in index:
        match kind:
            case "int":
                items.append(rest[0])
            case "slice":
                items.append(slice(*rest))
            case "ellipsis":
                items.append(...)
            case "newaxis":
                items.append(None)
            case "array":
                items.append(arrays[rest[0]])
    return tuple(items) if items else (...,)


def _call(target: str, value: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    if target == "ln_final":
        centred = value - value.mean(-1, keepdims=True)
        return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5), dtype=np.float32)
    matrix = np.random.default_rng(0).standard_normal((D_MODEL, D_VOCAB)).astype(np.float32)
    return np.asarray(value @ matrix, dtype=np.float32)
