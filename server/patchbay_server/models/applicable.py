"""Modules that a graph may apply to values of its own: which there are, found by applying each of them at load.

A module is offered when it gives, for the one tensor that it took in the recorded forward, what it gave there. It is
applied to a twin of the model that shares its weights and carries no hooks, so that the taps of a forward under way see
nothing of it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchbay.ir.card import CallableSpec
from patchbay.ir.dtypes import DTYPES
from patchbay_server.models.binding import Binding
from patchbay_server.models.binding.compare import close
from patchbay_server.models.recording import Call, Recording
from patchbay_server.models.taps import InputTap, NormTap, OutputTap, Tap, first_tensor

#: Canonical names within a block, each with sites whose taps lead to the module: it makes the first, or holds the one
#: that takes the second.
_PARTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "ln1": (("ln1.normalized",), ""),
    "attn": (("attn.out", "attn_out"), "attn.z"),
    "ln2": (("ln2.normalized",), ""),
    "mlp": (("mlp.out", "mlp_out"), "mlp.post"),
}
_DOCS: Mapping[str, str] = {
    "ln_final": "final norm, before the unembedding",
    "unembed": "unembedding: residual stream to logits",
    "ln1": "norm before attention",
    "attn": "attention, as it is added to the stream but for a norm behind it",
    "ln2": "norm before the MLP",
    "mlp": "MLP, as it is added to the stream but for a norm behind it",
    "block": "the whole layer: stream in, stream out",
}


@dataclass(frozen=True)
class Applicable:
    """A module that maps one tensor to another.

    Attributes:
        module: the module, of a model that carries no hooks.
        ndim: axes of what it takes in the model: 3 for ``[rows, seq, d_in]``, 2 where rows and positions are one axis.
        dtype: element type that it takes.
    """

    module: torch.nn.Module
    ndim: int
    dtype: torch.dtype

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """`value` put through it over its last axis; other axes are folded into those that the module knows."""
        given = value.to(self.dtype)
        if value.ndim != self.ndim:
            flat = given.reshape(-1, given.shape[-1])
            given = flat if self.ndim == 2 else flat.unsqueeze(0)
        with torch._C.DisableTorchFunction():  # a forward under way watches for its own operations
            made = first_tensor(self.module(given))
        assert made is not None
        return made if value.ndim == self.ndim else made.reshape(*value.shape[:-1], made.shape[-1])


def find_applicable(
    model: torch.nn.Module, binding: Binding, taps: Mapping[str, Tap], recordings: Sequence[Recording]
) -> tuple[dict[str, Applicable], tuple[CallableSpec, ...]]:
    """Every module that may be applied, by canonical name and by path, and all that a card says of modules.

    Args:
        model: the model; nothing may be attached to it.
        binding: its canonical sites.
        taps: the way to every site.
        recordings: two forwards over inputs of different extents.
    """
    twin = without_hooks(model)
    first, second = recordings
    floating = next(p.dtype for p in model.parameters() if p.is_floating_point())
    by_path: dict[str, tuple[CallableSpec, Applicable | None]] = {}
    with torch.no_grad():
        for call in first.calls:
            a, b = first.of(call.path), second.of(call.path)
            if a is not None and b is not None:
                module = twin.get_submodule(call.path)
                if (found := _examined(module, a, b, floating)) is not None:
                    by_path[call.path] = found
    applicable: dict[str, Applicable] = {}
    specs: list[CallableSpec] = []

    def offer(name: str, path: str, doc: str = "") -> None:
        spec, found = by_path[path]
        specs.append(CallableSpec(name, spec.d_in, spec.d_out, spec.dtype, doc, spec.params, spec.positionwise,
                                  spec.absent, path))  # fmt: skip
        if found is not None:
            applicable[name] = found

    for name, path in canonical_paths(model, binding, taps):
        if path in by_path:
            part = "block" if re.fullmatch(r"(.*\.)?blocks\.\d+", name) else name.rpartition(".")[2]
            offer(name, path, _DOCS[part])
    named = {spec.name for spec in specs}
    for path in by_path:
        if path not in named:
            offer(path, path)
    return applicable, tuple(specs)


def canonical_paths(model: torch.nn.Module, binding: Binding, taps: Mapping[str, Tap]) -> Iterator[tuple[str, str]]:
    """Canonical names of modules and their paths: the ends first, then block by block."""
    for name, path in (("ln_final", binding.ln_final), ("unembed", binding.unembed)):
        if path is not None:
            yield name, path
    for block in binding.blocks:
        yield block.prefix, block.path
        for part, (made, taken) in _PARTS.items():
            tap = next((t for s in made if (t := taps.get(f"{block.prefix}.{s}")) is not None), None)
            path = _weighty(model, tap)
            projection = taps.get(f"{block.prefix}.{taken}")
            if isinstance(projection, InputTap) and not projection.path.startswith(f"{path}."):
                above = projection.path.rpartition(".")[0]  # what is added comes out of a dropout, say
                path = above if above != block.path else None
            if path is not None:
                yield f"{block.prefix}.{part}", path


def _weighty(model: torch.nn.Module, tap: Tap | None) -> str | None:
    """The module whose output a tap shows, when it is one with weights."""
    whole = isinstance(tap, NormTap) or (isinstance(tap, OutputTap) and tap.layout is None and not tap.part)
    if not whole:
        return None
    path: str = tap.path  # type: ignore[union-attr]
    has_weights = next(model.get_submodule(path).parameters(), None) is not None
    return path if has_weights or isinstance(tap, NormTap) else None


def _examined(
    module: torch.nn.Module, a: Call, b: Call, floating: torch.dtype
) -> tuple[CallableSpec, Applicable | None] | None:
    """What a card says of a module, and the way to apply it; None for one that does not map positions to positions."""
    given, made = a.input, a.output
    if given is None or made is None or b.input is None or b.output is None:
        return None
    if not (given.is_floating_point() and made.is_floating_point() and given.ndim in (2, 3)):
        return None
    same_positions = given.shape[:-1] == made.shape[:-1] and b.input.shape[:-1] == b.output.shape[:-1]
    same_widths = given.shape[-1] == b.input.shape[-1] and made.shape[-1] == b.output.shape[-1]
    # An axis as long in both forwards is no axis of rows or positions.
    varies = all(x != y for x, y in zip(given.shape[:-1], b.input.shape[:-1], strict=True))
    if not (same_positions and same_widths and varies):
        return None
    params = sum(p.numel() for p in module.parameters())
    dtype = DTYPES[str(made.dtype).removeprefix("torch.")]
    whole = Applicable(module, given.ndim, given.dtype)
    reason = _refusal(whole, a)
    spread = reason is None and _positionwise(whole, given, made)
    if reason is None and not spread and given.ndim == 2:
        reason = "in the model, rows and positions are one axis of what it takes, and it is not the same for each"
    spec = CallableSpec(a.path, given.shape[-1], made.shape[-1], dtype, "", params, spread, reason, a.path)
    return spec, (whole if reason is None else None)


def _refusal(found: Applicable, call: Call) -> str | None:
    """Why a module cannot be applied to one tensor; None where it can."""
    assert call.input is not None
    again, failure = None, ""
    try:
        again = first_tensor(found.module(call.input))
    except Exception as error:  # noqa: BLE001 - modules raise what they like when something is missing
        failure = type(error).__name__
    if close(again, call.output):
        return None
    parameters = list(inspect.signature(found.module.forward).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if len(call.takes) > 1 or required:
        told = [p.name for p in parameters if any(word in p.name for word in ("position", "alibi", "bias", "mask"))]
        names = ", ".join(required or told[:3]) or "unnamed"
        return f"it needs more than one tensor ({names}), which only the model's own forward has"
    if failure:
        return f"by itself it fails ({failure})"
    return "by itself it does not give what it gives in the model"


def _positionwise(found: Applicable, given: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether every position is treated alike and by itself, so that any axes may stand before the last."""
    order = torch.arange(given[..., 0].numel() - 1, -1, -1, device=given.device)
    flat = given.reshape(-1, given.shape[-1])[order]
    try:
        turned = first_tensor(found.module(flat if given.ndim == 2 else flat.unsqueeze(0)))
    except Exception:  # noqa: BLE001 - see above
        return False
    return turned is not None and close(turned.reshape(-1, made.shape[-1])[order], made.reshape(-1, made.shape[-1]))


#: Where torch's modules keep their hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def without_hooks(module: torch.nn.Module, made: dict[int, torch.nn.Module] | None = None) -> torch.nn.Module:
    """A copy that shares every weight and buffer with `module`, and none of its hooks, now or later.

    Args:
        module: nothing may be attached to it.
        made: copies so far, by the module's identity: modules that stand in two places stay one.
    """
    made = {} if made is None else made
    if id(module) not in made:
        new: Any = copy.copy(module)
        made[id(module)] = new
        for name in _HOOKS:
            new.__dict__[name] = OrderedDict()
        children = module.__dict__["_modules"]
        new.__dict__["_modules"] = {n: None if c is None else without_hooks(c, made) for n, c in children.items()}
    return made[id(module)]
