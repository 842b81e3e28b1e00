"""Writes a model's card from what was derived, proved and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from patchbay.ir.card import SYMBOLS, Dim, ModelCard, SiteSpec
from patchbay.ir.dtypes import DTYPES, DType
from patchbay_server.models.binding import Binding
from patchbay_server.models.hosted import weights_digest
from patchbay_server.models.inputs import Extents, ModelInputs
from patchbay_server.models.recording import Recording
from patchbay_server.models.taps import InputTap, OutputTap, Tap

#: Longest row of models that state no limit.
UNLIMITED = 2**20


def dtype_of(tensor: torch.Tensor) -> DType:
    """The IR's dtype of a torch tensor."""
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def module_taps(recordings: Sequence[Recording], probes: Sequence[Extents]) -> dict[str, Tap]:
    """Input and output of every module that is called once, as far as they hold floating-point rows."""
    first, second = recordings
    taps: dict[str, Tap] = {}
    for call in first.calls:
        a, b = first.of(call.path), second.of(call.path)
        if not call.path or a is None or b is None:
            continue
        for side, left, right in (("input", a.input, b.input), ("output", a.output, b.output)):
            if observed_dims(left, right, probes) is not None:
                taps[f"module:{call.path}.{side}"] = InputTap(call.path) if side == "input" else OutputTap(call.path)
    return taps


def observed_dims(
    a: torch.Tensor | None, b: torch.Tensor | None, probes: Sequence[Extents], named: Sequence[Dim] = ()
) -> tuple[Dim, ...] | None:
    """What each extent of a value is, from its shape on the two made-up inputs.

    Args:
        a, b: the value on the first and on the second.
        probes: their sizes.
        named: what the extents are thought to be; a name is kept where what was seen agrees (``query`` for ``seq``).

    Returns:
        Extents, ``"rows"`` first; None for what is no tensor of rows, and for integers that nothing is thought of.
    """
    if a is None or b is None or a.ndim != b.ndim or a.ndim < 1 or not (a.is_floating_point() or named):
        return None
    dims: list[Dim] = []
    for axis, (left, right) in enumerate(zip(a.shape, b.shape, strict=True)):
        seen = left if left == right else probes[0].symbol(left, right, probes[1])
        if seen is None:
            return None
        name = named[axis] if axis < len(named) else seen
        if isinstance(seen, str) and isinstance(name, str):
            seen = name if SYMBOLS[name] == seen else {"query": "dec_query", "key": "dec_key"}.get(name, seen)
        dims.append(seen)
    return tuple(dims) if dims[0] == "rows" and dims.count("rows") == 1 else None


def write_card(
    model: torch.nn.Module,
    name: str,
    source: str,
    inputs: ModelInputs,
    binding: Binding,
    proofs: Mapping[str, str],
    order: Mapping[str, int],
    values: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    *,
    causal: bool,
    ragged: bool,
) -> ModelCard:
    """The card.

    Args:
        model: the model.
        name: what it is served as.
        source: what it was loaded from.
        inputs: what it takes.
        binding: its canonical sites; those whose extents make no sense are declared absent here.
        proofs: the identity that held, by canonical site.
        order: position in the forward of every site that is reached, module sites included.
        values: every site's value on the two made-up inputs.
        causal: whether a position was seen to depend on itself and earlier ones only.
        ragged: whether rows of unequal length were seen to give what each gives alone.
    """
    first, second = values
    sites: list[SiteSpec] = []
    for site in sorted((n for n in binding.sites if n in order), key=lambda n: order[n]):
        found = binding.sites[site]
        dims = observed_dims(first[site], second[site], inputs.probes, found.dims)
        if dims is None:
            binding.absent[site] = "its extents are not those of rows and positions"
            continue
        sites.append(
            SiteSpec(
                site,
                dims,
                dtype_of(first[site]),
                order[site],
                writable=not getattr(found, "read_only", ""),
                doc=getattr(found, "read_only", "") or found.doc,
                **({"proof": proofs.get(site, "")} if "proof" in SiteSpec.__dataclass_fields__ else {}),
            )
        )
    floating = dtype_of(next(p for p in model.parameters() if p.is_floating_point()))
    sites.extend(
        SiteSpec(site, ("rows",), floating, -1, writable=False, absent=binding.absent[site])
        for site in sorted(binding.absent)
    )
    for site in sorted((n for n in order if n.startswith("module:")), key=lambda n: order[n]):
        dims = observed_dims(first[site], second[site], inputs.probes)
        if dims is not None:
            side = site.rpartition(".")[2]
            sites.append(SiteSpec(site, dims, dtype_of(first[site]), order[site], doc=f"{side} of the module"))
    widths = binding.widths
    text = inputs.text
    return ModelCard(
        name=name,
        family=str(getattr(inputs.config, "model_type", None) or type(model).__name__),
        source=source,
        revision=weights_digest(model),
        dtype=floating,
        n_layers=widths.n_layers,
        d_model=widths.d_model,
        n_heads=widths.n_heads,
        n_kv_heads=widths.n_kv_heads,
        d_head=widths.d_head,
        d_mlp=widths.d_mlp,
        d_vocab=inputs.d_vocab,
        n_ctx=_context(text, binding),
        n_params=sum(p.numel() for p in model.parameters()),
        causal=causal,
        takes_tokens=inputs.takes_tokens,
        ragged=ragged,
        inputs=inputs.specs(),
        sites=tuple(sites),
    )


def _context(text: Any, binding: Binding) -> int:
    """The longest row: what the configuration says, and no more than there are learned positions for."""
    limits = [b.longest for b in binding.beginnings if b.tokens is not None and b.longest is not None]
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(found := getattr(text, name, None), int) and found > 0:
            limits.append(found)
    return min(limits, default=UNLIMITED)
