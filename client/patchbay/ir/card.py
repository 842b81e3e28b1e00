"""What a client knows of a model: its widths and its sites. The model's *card*.

Sites are named as in TransformerLens without ``hook_``. A card lists every site with its dimensions, so that the
shape of every value is known before anything is sent.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

from patchbay.errors import GraphError, UnknownSiteError
from patchbay.ir.copying import reduced
from patchbay.ir.dtypes import DType
from patchbay.ir.graph import Run
from patchbay.ir.limits import Limits
from patchbay.ir.params import NONE, ParamSpec, find_param

#: An extent: a number, or ``"rows"``, ``"seq"``, ``"query"``, ``"key"`` (the last three all mean the run's length).
Dim: TypeAlias = "int | str"

ROWS = "rows"
LOGITS = "logits"
#: Under this name a card's attributes list the optimisations that its server can leave out, joined by ", ".
OPTIMISATIONS = "optimisations"
#: Symbolic extents that stand for a run's length, and so hold padding in ragged runs.
SEQUENCE_DIMS = frozenset({"seq", "query", "key"})
#: Every symbolic extent, and the one whose number it shares. ``dec_*`` are of the decoder's own tokens, in models that
#: have an encoder and a decoder.
SYMBOLS: Mapping[str, str] = MappingProxyType(
    {
        "rows": "rows",
        "seq": "seq",
        "query": "seq",
        "key": "seq",
        "dec_seq": "dec_seq",
        "dec_query": "dec_seq",
        "dec_key": "dec_seq",
    }
)


def _extent(extents: Mapping[str, int], symbol: str) -> int:
    """The number behind a symbol: its own where it has one (keys of a decode step), else the one that it shares."""
    return extents[symbol] if symbol in extents else extents[SYMBOLS[symbol]]


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One place in the model where a value can be read or written.

    Attributes:
        name: canonical name (``blocks.3.attn.pattern``) or ``module:PATH.output`` / ``module:PATH.input``.
        dims: extents; the first is ``"rows"``.
        dtype: element type of the value.
        order: position in the forward; a site of smaller order is reached first.
        writable: whether ``site.write`` is allowed.
        doc: what the value is, or why it cannot be written.
        absent: why a canonical site is not offered by this model; None when it is offered.
        proof: the identities that held when the site was proved at load, in words; "" for modules' own sites, which
            are what they say by definition.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: DType
    order: int
    writable: bool = True
    doc: str = ""
    absent: str | None = None
    proof: str = ""

    def shape(self, extents: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the value for a run of these extents (see `ModelCard.extents`)."""
        return tuple(_extent(extents, d) if isinstance(d, str) else d for d in self.dims)

    @property
    def sequence_axes(self) -> tuple[int, ...]:
        """Axes that run over token positions."""
        return tuple(i for i, d in enumerate(self.dims) if d in SEQUENCE_DIMS)


@dataclass(frozen=True, slots=True)
class CallableSpec:
    """A module of the model that a graph may apply to a value of its own (op ``call``).

    Attributes:
        name: canonical name, such as ``"ln_final"``, ``"unembed"`` or ``"blocks.3.mlp"``; or the module's path.
        d_in: extent of the last axis that it takes.
        d_out: extent of the last axis that it returns.
        dtype: element type that it returns.
        doc: what it computes.
        params: number of its weights; two operations for each and position is what applying it costs.
        positionwise: whether it treats every position by itself, so that any axes may stand before the last; a module
            that does not (attention) takes ``[rows, seq, d_in]``.
        absent: why it cannot be applied to a value; None when it can.
        path: the module's name in the checkpoint.
    """

    name: str
    d_in: int
    d_out: int
    dtype: DType
    doc: str = ""
    params: int = 0
    positionwise: bool = True
    absent: str | None = None
    path: str = ""

    @property
    def canonical(self) -> bool:
        """Whether its name is a canonical one, not its path."""
        return self.name != self.path


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of the model beside its token ids.

    Attributes:
        name: the argument's name in transformers, such as ``pixel_values``.
        dims: extents; the first is ``"rows"``.
        dtype: element type.
        required: whether every run must have it.
        below: for integers, what every element must be below (and at least 0); None for no bound.
        doc: what it is.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: DType
    required: bool = True
    below: int | None = None
    doc: str = ""


@dataclass(frozen=True)
class ModelCard:
    """A model's widths, sites and callables, as its server proved them.

    Attributes:
        name: name it is served under.
        family: transformers' model type, such as ``"llama"``.
        source: hub id or folder name that it was loaded from.
        revision: digest of its weights, for reproducibility.
        dtype: element type of its weights.
        n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp, d_vocab, n_ctx: widths.
        n_params: number of parameters.
        causal: whether a position sees only itself and earlier ones.
        takes_tokens: whether runs have token ids.
        ragged: whether the rows of a run may differ in length.
        inputs: what runs have beside token ids.
        sites: every site, canonical ones first, in forward order.
        callables: modules that ``call`` may apply.
        params: weights that ``param.read`` may name, canonical ones first.
        weights: the server's policy on them: one of `patchbay.ir.params.POLICIES`.
        limits: what the server holds every graph to; checked on the client too, before sending.
        attributes: further facts for people (training, licence, accuracies), never interpreted.
    """

    name: str
    family: str
    source: str
    revision: str
    dtype: DType
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_params: int
    causal: bool
    sites: tuple[SiteSpec, ...]
    callables: tuple[CallableSpec, ...] = ()
    takes_tokens: bool = True
    ragged: bool = True
    inputs: tuple[InputSpec, ...] = ()
    params: tuple[ParamSpec, ...] = ()
    weights: str = NONE
    limits: Limits = field(default_factory=Limits)
    attributes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    @cached_property
    def _by_name(self) -> Mapping[str, SiteSpec]:
        return {s.name: s for s in self.sites}

    @cached_property
    def names_by_order(self) -> Mapping[int, str]:
        """Names of the sites that the model offers, by their position in the forward."""
        return {s.order: s.name for s in self.sites if s.absent is None}

    @cached_property
    def _callables_by_name(self) -> Mapping[str, CallableSpec]:
        return {c.name: c for c in self.callables}

    def extents(self, run: Run) -> Mapping[str, int]:
        """The numbers behind the symbolic extents for `run`; those of inputs that it lacks are left out."""
        extents = {"rows": run.rows, "seq": run.seq}
        given = dict(run.inputs)
        for spec in self.inputs:
            if spec.name in given:
                for dim, size in zip(spec.dims, given[spec.name].shape, strict=False):
                    if isinstance(dim, str) and dim not in extents:
                        extents[SYMBOLS[dim]] = size
        return extents

    def site_shape(self, site: SiteSpec, run: Run, step: int = 0) -> tuple[int, ...]:
        """The shape of the value at `site` in one forward of `run`: its only one, or its `step`-th when it generates.

        In a generating run logits are those of the newest position alone; a decode step has one position, whose keys
        are all positions so far.
        """
        extents = self.extents(run)
        if run.generation is not None:
            extents = dict(extents)
            if step:
                extents |= {"seq": 1, "key": run.seq + step}
            elif site.name == LOGITS:
                extents["seq"] = 1
        return site.shape(extents)

    def __contains__(self, name: object) -> bool:
        site = self._by_name.get(name) if isinstance(name, str) else None
        return site is not None and site.absent is None

    def site(self, name: str) -> SiteSpec:
        """The site called `name` (canonical; see `patchbay.ir.sites.canonical` for aliases).

        Raises:
            UnknownSiteError: no such site, or one that this model does not offer; the message says why, or what is
                near.
        """
        spec = self._by_name.get(name)
        if spec is None:
            near = self.nearest(name)
            hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
            raise UnknownSiteError(f"{self.name!r} has no site {name!r}{hint}", suggestions=near)
        if spec.absent is not None:
            raise UnknownSiteError(f"{self.name!r} does not offer the site {name!r}: {spec.absent}")
        return spec

    def callable(self, name: str) -> CallableSpec:
        """The module named `name`, canonically or by its path, which values may be put through.

        Raises:
            GraphError: there is such a module, but it cannot be applied to a value; the message says why.
            UnknownSiteError: no such module; the message names the nearest.
        """
        spec = self._callables_by_name.get(name)
        if spec is not None:
            if spec.absent is not None:
                raise GraphError(f"{name!r} cannot be applied to a value: {spec.absent}")
            return spec
        if any(f"module:{name}.{side}" in self for side in ("input", "output")):
            raise GraphError(f"{name!r} cannot be applied to a value: it does not map positions to positions")
        known = [c.name for c in self.callables if c.absent is None]
        near = tuple(difflib.get_close_matches(name, known, n=3, cutoff=0.6))
        short = ", ".join(n for n in known if "." not in n) or "none"
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has: {short}"
        raise UnknownSiteError(f"{self.name!r} has no callable {name!r} ({hint})", suggestions=near)

    @cached_property
    def _params_by_name(self) -> Mapping[str, ParamSpec]:
        return {p.name: p for p in self.params}

    def param(self, name: str) -> ParamSpec:
        """The parameter called `name`.

        Raises:
            GraphError: the server's policy lets no graph use the weights.
            UnknownSiteError: no such parameter; the message names the nearest.
        """
        return find_param(self, self._params_by_name, name)

    def nearest(self, name: str, count: int = 3) -> tuple[str, ...]:
        """Names of existing sites that look most like `name`."""
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and int(block.group(1)) >= self.n_layers:
            name = f"blocks.{self.n_layers - 1}.{name[block.end() :]}"
        names = [s.name for s in self.sites if s.absent is None]
        return tuple(difflib.get_close_matches(name, names, n=count, cutoff=0.6))
