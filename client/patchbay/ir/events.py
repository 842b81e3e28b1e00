"""What a server says while it executes a graph, in the order in which it may say it.

Queued (any number) -> Started -> Progress, TensorValue and Kept (any number, mixed) -> Done. A failure ends the stream
with an exception instead of Done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.copying import reduced
from patchbay.ir.graph import TensorData

#: The optimisation that the wire makes, by its off switch in `ExecuteOptions.disabled`; it saves bytes.
COMPRESSION = "compression"


@dataclass(frozen=True, slots=True)
class ExecuteOptions:
    """How to run a graph.

    Attributes:
        deterministic: run alone, one run per forward, so that every value equals the same forward done by hand, bit
            for bit. disabled: names of optimisations to leave out (their off switches), such as ``"early_stop"``.
            dry_run: verify and price only; the stream is Done alone, with the cost filled in.
    """

    deterministic: bool = False
    disabled: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """What a graph needs, known before it runs.

    Attributes:
        flops: floating-point operations, model forwards included.
        peak_bytes: highest sum of live values of the graph (the model's own activations not included).
        result_bytes: bytes of the outputs.
        tokens: token positions put through the model, over all passes.
        passes: forwards of the model.
        kept_bytes: bytes of the outputs that stay on the server.
    """

    flops: int = 0
    peak_bytes: int = 0
    result_bytes: int = 0
    tokens: int = 0
    passes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What an execution cost and saved.

    Attributes:
        tokens: token positions put through the model.
        passes: forwards of the model.
        layers_run: decoder layers executed, summed over passes.
        layers_skipped: decoder layers that early stop left out, summed over passes.
        nodes: nodes received.
        nodes_run: nodes that were computed (the rest were dead or merged).
        queue_ms: milliseconds waited.
        run_ms: milliseconds executed.
        bytes_in: bytes of the request.
        bytes_out: bytes of the results.
        cost: the price computed beforehand.
        saved: what each optimisation saved, by its name (``"early_stop"``: layers, ``"dead_code"``: nodes, ...).
    """

    tokens: int = 0
    passes: int = 0
    layers_run: int = 0
    layers_skipped: int = 0
    nodes: int = 0
    nodes_run: int = 0
    queue_ms: float = 0.0
    run_ms: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    cost: Cost = Cost()
    saved: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; `position` requests run or wait before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """The request has begun to run."""


@dataclass(frozen=True, slots=True)
class Progress:
    """`pass_index` of `passes` forwards are done."""

    pass_index: int
    passes: int


@dataclass(frozen=True, slots=True)
class TensorValue:
    """An output's value.

    Attributes:
        name: the output's name.
        value: the tensor.
        finite: False when it holds a NaN or an infinity.
    """

    name: str
    value: TensorData
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Kept:
    """An output's value stays on the server.

    Attributes:
        name: the output's name.
        artifact: what names it from now on.
        finite: False when it holds a NaN or an infinity.
    """

    name: str
    artifact: ArtifactInfo
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Done:
    """Everything was sent."""

    usage: Usage


Event: TypeAlias = "Queued | Started | Progress | TensorValue | Kept | Done"


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One tokenized text.

    Attributes:
        ids: token ids, special tokens included.
        strings: the text of each token as the tokenizer shows it.
        offsets: half-open character span of each token in the text; (0, 0) for tokens that stand for no text.
        special: True for tokens that the tokenizer added (BOS and the like).
        text: for a row that was asked for by its ids: the text that they make together, special tokens left out.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: ``"system"``, ``"user"``, ``"assistant"``, or what else the model's template knows.
        content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One line of ListModels."""

    name: str
    family: str
    source: str
    n_params: int
    n_layers: int
    d_model: int
    ready: bool = True
