"""What a derivation comes to: sites with the way to each, absences with their reasons, widths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patchbay_server.models.taps import Tap

#: Leading extents of everything that has one vector per position.
RESIDUAL = ("rows", "seq")


@dataclass(frozen=True)
class FoundSite:
    """A canonical site and the way to it.

    Attributes:
        name: canonical name.
        tap: how it is reached.
        dims: symbolic extents, as in a SiteSpec.
        doc: one sentence.
        read_only: why it cannot be written; "" when it can.
    """

    name: str
    tap: Tap
    dims: tuple[int | str, ...]
    doc: str
    read_only: str = ""


@dataclass
class Widths:
    """Extents read off the recording; 0 where a model has no such thing."""

    n_layers: int = 0
    d_model: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    d_vocab: int = 0


@dataclass(frozen=True)
class BlockShape:
    """How one layer is put together, for those who check its identities.

    Attributes:
        prefix: what its sites' names begin with, such as ``"blocks.3"``.
        path: the layer's name in the model.
        additions: names of what is added to the stream, in order (``("attn_out", "mlp_out")``).
        together: whether they are all added to the block's input at once, so that there is no stream in between.
        norms_stream: whether the stream itself is normalized after each addition (post-norm).
        start: path of a norm that the block's input goes through before anything is added to it, or "".
        mids: names of the stream after each addition but the last, as far as it is a site of its own.
        norms: for each addition, name and path of the norm that the stream goes through after it, or None.
    """

    prefix: str
    path: str
    additions: tuple[str, ...] = ()
    together: bool = False
    norms_stream: bool = False
    start: str = ""
    mids: tuple[str, ...] = ()
    norms: tuple[tuple[str, str] | None, ...] = ()


@dataclass(frozen=True)
class Beginning:
    """What enters a stack, for those who check its identities.

    Attributes:
        prefix: what the names of the stack's sites begin with.
        tokens: name of the input whose ids are embedded, or None.
        table: path of the embedding module, or None.
        norm: path of the norm behind the sum, or None.
        summands: names of what is added up; None when something else is added too.
        longest: positions that the stack has learned embeddings for; None where there is no such limit.
    """

    prefix: str
    tokens: str | None
    table: str | None
    norm: str | None
    summands: tuple[str, ...] | None
    longest: int | None = None


@dataclass
class Binding:
    """What was derived.

    Attributes:
        sites: found sites by canonical name.
        absent: reason by canonical name.
        widths: extents.
        layers: paths of the decoder layers, in order.
        blocks: how each layer is put together, in order.
        beginnings: what enters each stack.
        ln_final: path of the final norm, or None.
        unembed: path of the unembedding, or None.
        attention: attention module path by layer.
        spaces: the recurrence of each state-space layer, by the prefix of its sites' names.
    """

    sites: dict[str, FoundSite] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    widths: Widths = field(default_factory=Widths)
    layers: list[str] = field(default_factory=list)
    blocks: list[BlockShape] = field(default_factory=list)
    beginnings: list[Beginning] = field(default_factory=list)
    ln_final: str | None = None
    unembed: str | None = None
    attention: dict[int, str] = field(default_factory=dict)
    spaces: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, tap: Tap, dims: tuple[int | str, ...], doc: str, read_only: str = "") -> None:
        self.sites[name] = FoundSite(name, tap, dims, doc, read_only)
