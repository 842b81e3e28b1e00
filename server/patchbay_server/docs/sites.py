"""docs/sites.md: the canonical sites, and which of forty families of models offer which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import patchbay_server
from patchbay.ir.site_names import MEANINGS

#: What `python -m tests.families` found when it last hosted every family.
FACTS = Path("tests") / "vectors" / "families.json"

_INTRODUCTION = """# Sites

<!-- Written by `make docs` from patchbay.ir.site_names and tests/vectors/families.json; do not edit. -->

A site is a named place in a model whose value can be read and, mostly, written. Names are TransformerLens's without
`hook_`; its spellings, interp-engine's addresses (`resid_post.3`) and `blocks[3].attn.z` lead to the same sites.

No name below is looked up in a table of families. When a model is loaded, one tiny forward is recorded: every module's
inputs and outputs, and every torch function with what it took and gave. The residual stream is the chain of sums from a
block's input to its output; attention is the call of transformers' attention interface, of torch's fused attention, or
a square softmax between two products; projections, norms, gates, factors and experts are found by where values come
from. Then each site is proved, on random tokens:

- reading every site leaves the output as it was, to the bit;
- identities hold between the values (`resid_pre + attn_out = resid_mid`, `pattern times v = z`, ...);
- the site is written, in all layers at once with each layer's input held, and the identities that start from it hold
  between what was written and what the model made of it.

A site that fails is declared absent with the reason; one that reads rightly but cannot be written says so. `patchbay
card MODEL --proofs` shows the identities that held for each site. `attn_out`, `mixer_out` and `mlp_out` are always what
is *added to the stream*, after post-norms and residual factors; the modules' raw outputs are `attn.out`, `mixer.out`
and `mlp.out`. Every module is reachable besides by its path: `module:model.layers.3.mlp.down_proj.input`.

## The sites

| name | extents | what it is |
|---|---|---|
"""

_FAMILIES = """
## Families

Tiny random models of these families are hosted in CI. `x`: proved; `r`: proved, read only; a number: proved in so many
of its layers (hybrid stacks); `.`: not offered, for a reason listed below. Sites that hardly any model has are left out
where a family has none of them.
"""


def sites_page() -> str:
    """The whole page."""
    root = Path(str(patchbay_server.__file__)).parents[2]
    facts: dict[str, dict[str, Any]] = json.loads((root / FACTS).read_text(encoding="utf-8"))
    rows = [f"| `{name}` | `[{dims}]` | {meaning} |" for name, (dims, meaning) in MEANINGS.items()]
    return _INTRODUCTION + "\n".join(rows) + "\n" + _FAMILIES + _matrix(facts) + _reasons(facts)


def _mark(facts: Mapping[str, Any], kind: str) -> str:
    for entry in facts["proved"]:
        name, _, layers = entry.partition(" (")
        if name == kind:
            if kind in facts["read_only"]:
                return "r"
            return str(layers.count(",") + 1) if layers else "x"
    return "."


def _matrix(facts: Mapping[str, Mapping[str, Any]]) -> str:
    kinds = [name.replace("{i}", "*") for name in MEANINGS]
    marks = {kind: [_mark(f, kind) for f in facts.values()] for kind in kinds}
    shown = [kind for kind in kinds if set(marks[kind]) != {"."}]
    lines: list[str] = []
    names = list(facts)
    for start in range(0, len(names), 10):
        some = names[start : start + 10]
        lines += ["", "| site | " + " | ".join(some) + " |", "|---|" + ":-:|" * len(some)]
        for kind in shown:
            part = marks[kind][start : start + 10]
            if set(part) != {"."}:
                lines.append(f"| `{kind.removeprefix('blocks.*.')}` | " + " | ".join(part) + " |")
    return "\n".join(lines) + "\n"


def _reasons(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Why sites are absent, each reason once."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for family, entry in facts.items():
        for kind, reason in entry["absent"].items():
            kinds, families = found.setdefault(reason, ([], []))
            name = kind.removeprefix("blocks.*.")
            if name not in kinds:
                kinds.append(name)
            if family not in families:
                families.append(family)
    lines = ["", "## Why a site is absent", "", "| reason | sites | families |", "|---|---|---|"]
    for reason, (kinds, families) in sorted(found.items(), key=lambda item: -len(item[1][1])):
        sites = ", ".join(f"`{k}`" for k in kinds)
        lines.append(f"| {reason.replace('|', chr(92) + '|')} | {sites} | {', '.join(families)} |")
    return "\n".join(lines) + "\n"
