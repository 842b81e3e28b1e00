"""The identities of what stands before a stack of layers: embeddings, positions, patches, and the norm behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from patchbay_server.models.binding import Binding, close
from patchbay_server.models.binding.found import Beginning
from patchbay_server.models.checks import Check, Identity, Values, factor_between
from patchbay_server.models.taps import NormTap


def beginning(
    model: torch.nn.Module, binding: Binding, values: Values, inputs: Mapping[str, torch.Tensor], shape: Beginning
) -> Iterator[Identity]:
    """Every identity before the first layer of one stack.

    Args:
        model: the model.
        binding: its derived sites.
        values: of one plain forward.
        inputs: of the same forward.
        shape: what enters the stack.
    """
    prefix, first = shape.prefix, f"{shape.prefix}blocks.0.resid_pre"
    embed, positions, types = (f"{prefix}{n}" for n in ("embed", "pos_embed", "token_type_embed"))
    if shape.tokens is not None and shape.table is not None and embed in values:
        yield from _rows_of_table(model, values, inputs[shape.tokens], shape.table, embed)
    elif shape.tokens is None:
        yield from _patches(prefix, values)
    if types in values:
        flat = values[types]
        holds = close(flat, flat[:, :1].expand_as(flat))
        yield Identity("the same at every position", (types,), (), lambda c: holds)
    if positions in values:
        rows = values[positions]
        alike = close(rows, rows[:1].expand_as(rows))
        yield Identity("the same in every row", (positions,), (), lambda c: alike)
    if first not in values:
        return
    summands = shape.summands or ()
    if summands and all(s in values and values[s].shape == values[first].shape for s in summands):
        factor = _factor_of_embed(model, values, summands, shape, first)
        if factor is not None:
            yield from _sum(model, binding, values, summands, factor, shape, first)
            return
    for name in (embed, positions, types):
        if name in values and name == embed and values[embed].shape == values[first].shape:
            kept = (values[embed] == values[first]).all(-1)
            if bool(kept.any()):  # images take the other positions
                yield Identity(
                    "= first resid_pre wherever nothing takes the place of tokens",
                    (embed, first),
                    (embed,),
                    lambda c, kept=kept: close(c.now[embed][kept], c.now[first][kept]),  # type: ignore[misc]
                )
                continue
        if name in values:
            yield Identity(
                "what enters the first block follows it row by row",
                (name, first),
                (name,),
                lambda c, name=name: c.follows(name, first),  # type: ignore[misc]
                plain=False,
            )


def _rows_of_table(
    model: torch.nn.Module, values: Values, ids: torch.Tensor, path: str, embed: str
) -> Iterator[Identity]:
    table = model.get_submodule(path).weight
    assert isinstance(table, torch.Tensor)
    rows = table.detach()[ids]
    factor = factor_between(rows, values[embed])
    if factor is not None:
        scaled = "" if abs(factor - 1) < 1e-6 else f", times {factor:.6g}"
        yield Identity(f"rows of the table at the token ids{scaled}", (embed,), (), lambda c: True)


def _patches(prefix: str, values: Values) -> Iterator[Identity]:
    """Less the positions, the embedding ends in the patches."""
    embed, positions, patches = (f"{prefix}{n}" for n in ("embed", "pos_embed", "patch_embed"))
    if not (embed in values and patches in values):
        return
    names = tuple(n for n in (patches, positions, embed) if n in values)
    count = values[patches].shape[1]

    def ends(c: Check) -> bool:
        bare = c.now[embed] - c.now[positions] if positions in c.now else c.now[embed]
        return close(bare[:, -count:], c.now[patches])

    yield Identity(
        "embed" + (" less pos_embed" if positions in values else "") + " ends in patch_embed", names, names[:-1], ends
    )


def _factor_of_embed(
    model: torch.nn.Module, values: Values, summands: tuple[str, ...], shape: Beginning, first: str
) -> float | None:
    """What the embedding is multiplied by before the others are added; None when the sum is something else."""
    embed, others = values[summands[0]], [values[s] for s in summands[1:]]
    target = values[first]
    if shape.norm is not None:
        with torch.no_grad():
            total = embed + sum(others) if others else embed
            return 1.0 if close(model.get_submodule(shape.norm)(total), target) else None
    for other in others:
        target = target - other
    return factor_between(embed, target)


def _sum(
    model: torch.nn.Module,
    binding: Binding,
    values: Values,
    summands: tuple[str, ...],
    factor: float,
    shape: Beginning,
    first: str,
) -> Iterator[Identity]:
    short = [s.removeprefix(shape.prefix) for s in summands]
    if abs(factor - 1) > 1e-6:
        short[0] += f" times {factor:.6g}"
    said = " + ".join(short)

    def total(c: Check) -> torch.Tensor:
        result = c.now[summands[0]] * factor if factor != 1.0 else c.now[summands[0]]
        for name in summands[1:]:
            result = result + c.now[name]
        return result

    if shape.norm is None:
        yield Identity(
            f"{said} = first resid_pre", (*summands, first), summands, lambda c: close(total(c), c.now[first])
        )
        return
    module = model.get_submodule(shape.norm)
    scale, normalized = f"{shape.prefix}embed_ln.scale", f"{shape.prefix}embed_ln.normalized"

    def normed(c: Check) -> bool:
        with torch.no_grad():
            return close(module(total(c)), c.now[first])

    yield Identity(f"the norm of {said} = first resid_pre", (*summands, first), summands, normed)
    if not (scale in values and normalized in values):
        return
    tap = binding.sites[normalized].tap
    assert isinstance(tap, NormTap)
    form = tap.form

    def divided(c: Check) -> bool:
        return close(form.normalize(total(c), c.now[scale].float()), c.now[normalized])

    def finished(c: Check) -> bool:
        return close(form.finish(module, c.now[normalized]).detach(), c.now[first])

    yield Identity(f"({said}) / scale = normalized", (scale, normalized), (scale,), divided)
    yield Identity("normalized times gain = first resid_pre", (normalized, first), (normalized,), finished)
