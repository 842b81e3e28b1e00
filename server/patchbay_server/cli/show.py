"""`patchbay models`, `card` and `prove`: what a server hosts, and what can be read and written inside it."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from patchbay.credentials import find_api_key, find_target
from patchbay.ir.card import ModelCard, SiteSpec
from patchbay.transport.base import Transport
from patchbay_server.cli.text import count, table

T = TypeVar("T")


def ask(args: argparse.Namespace, question: Callable[[Transport], Awaitable[T]], timeout_s: float = 30.0) -> T:
    """Put a question to the server that the flags or the environment name.

    Raises:
        PatchbayError: it cannot be reached, or refuses.
    """
    from patchbay.transport.grpc import GrpcTransport

    target = find_target(args.url)

    async def connect() -> T:
        transport = GrpcTransport(target, api_key=find_api_key(target, args.api_key), timeout_s=timeout_s)
        try:
            return await question(transport)
        finally:
            await transport.close()

    return asyncio.run(connect())


def models(args: argparse.Namespace) -> int:
    """One line per model."""
    summaries = ask(args, lambda transport: transport.list_models())
    rows = [
        (
            m.name,
            m.family or "-",
            count(m.n_params) if m.n_params else "-",
            str(m.n_layers or "-"),
            str(m.d_model or "-"),
            "yes" if m.ready else "no",
            m.source,
        )
        for m in summaries
    ]
    print(table(rows, head=("MODEL", "FAMILY", "PARAMS", "LAYERS", "WIDTH", "READY", "SOURCE")))
    return 0


def card(args: argparse.Namespace) -> int:
    """A model's widths, limits and sites."""
    found = ask(args, lambda transport: transport.get_model(args.model))
    print(render(found, every_site=args.sites, proofs=args.proofs))
    return 0


def prove(args: argparse.Namespace) -> int:
    """Loads a model in this process and shows its card with the proof of every site, and what loading took."""
    from patchbay_server.models.loader import load

    started = time.perf_counter()
    hosted = load(args.source, dtype=args.dtype, device=args.device)
    print(render(hosted.card, proofs=True))
    named = [s for s in hosted.card.sites if not s.name.startswith("module:")]
    proved = sum(s.absent is None for s in named)
    took = time.perf_counter() - started
    print(f"\n{proved} sites proved, {len(named) - proved} absent; loaded and proved in {took:.1f} s")
    return 0


def render(model: ModelCard, *, every_site: bool = False, proofs: bool = False) -> str:
    """A card as text.

    Args:
        model: the card.
        every_site: list each site by itself, modules included; else the sites of all layers share a line.
        proofs: say below each site how it was proved when the model was loaded.
    """
    head = f"{model.name}: {model.family}, {count(model.n_params)} parameters, {model.dtype.name}"
    facts = [
        ("layers", str(model.n_layers)),
        ("width", f"{model.d_model} (heads {model.n_heads} x {model.d_head}, key/value heads {model.n_kv_heads})"),
        ("mlp", str(model.d_mlp)),
        ("vocabulary", str(model.d_vocab)),
        ("context", f"{model.n_ctx} tokens{'' if model.causal else ', not causal'}"),
        ("source", f"{model.source} (weights {model.revision})"),
        *((key.replace("_", " "), value) for key, value in sorted(model.attributes.items())),
    ]
    callables = dict.fromkeys(
        f"{re.sub(r'^blocks[.][0-9]+', 'blocks[i]', c.name)} [{c.d_in} -> {c.d_out}]"
        for c in model.callables
        if c.canonical and c.absent is None
    )
    if callables:
        facts.append(("callables", ", ".join(callables)))
    limits = dataclasses.asdict(model.limits)
    facts.append(("limits", ", ".join(f"{name} {count(value)}" for name, value in limits.items())))
    present = [s for s in model.sites if s.absent is None]
    absent = [s for s in model.sites if s.absent is not None]
    parts = [head, table(facts, indent="  "), ""]
    head_of = ("SITE", "SHAPE", "DTYPE", "ACCESS", "WHAT IT IS")
    named = [s for s in present if not s.name.startswith("module:")]
    if every_site:
        parts.append(table([_site(s) for s in present], head=head_of))
    else:
        parts.append(table(_per_layer_kind(named), head=head_of))
        modules = len(present) - len(named)
        parts.append(f"\n{len(named)} sites and {modules} module inputs and outputs; --sites lists them all")
    if proofs:
        parts.append("\nproved when it was loaded:")
        parts += [f"  {name}\n    {proof}" for name, proof in _per_layer_proofs(named)]
    if absent:
        parts.append("\nnot offered by this model:")
        parts.append(table(_reasons(absent), indent="  "))
    return "\n".join(parts)


def _site(site: SiteSpec, name: str | None = None) -> tuple[str, ...]:
    shape = "[" + ", ".join(map(str, site.dims)) + "]"
    return (name or site.name, shape, site.dtype.name, "read, write" if site.writable else "read", site.doc)


def _per_layer_kind(sites: list[SiteSpec]) -> list[tuple[str, ...]]:
    """One line for sites that differ in their layer's number only, in forward order."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for site in sites:
        pattern, layer = _of_layer(site.name)
        groups.setdefault(_site(site, pattern), []).append(layer)
    return [(row[0].replace("{i}", _span(layers)), *row[1:]) for row, layers in groups.items()]


def _per_layer_proofs(sites: list[SiteSpec]) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        pattern, layer = _of_layer(site.name)
        groups.setdefault((pattern, site.proof), []).append(layer)
    return [(name.replace("{i}", _span(layers)), proof) for (name, proof), layers in groups.items() if proof]


def _of_layer(name: str) -> tuple[str, int]:
    """A site's name with ``{i}`` for its layer, and the layer; -1 for a site of none."""
    found = re.match(r"(.*?\bblocks)\.(\d+)\.(.*)", name)
    return (f"{found[1]}.{{i}}.{found[3]}", int(found[2])) if found else (name, -1)


def _span(layers: list[int]) -> str:
    """Numbers as a set of ranges: 0-3, or 0,2,4."""
    if len(layers) == 1:
        return str(layers[0])
    first, last = layers[0], layers[-1]
    return f"{{{first}-{last}}}" if layers == list(range(first, last + 1)) else "{" + ",".join(map(str, layers)) + "}"


def _reasons(sites: list[SiteSpec]) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], None] = {}
    for site in sites:
        groups[re.sub(r"\bblocks\.\d+\.", "blocks.*.", site.name), site.absent or ""] = None
    return list(groups)
