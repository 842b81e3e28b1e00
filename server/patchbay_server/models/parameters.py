"""A model's weights by canonical name: head-split, oriented and computed on demand, each proved at load.

The names and orientations are TransformerLens's: a matrix multiplies from the right (``x @ W``), heads come first
(``W_Q [head, d_model, d_head]``, ``W_O [head, d_head, d_model]``). Grouped keys and values keep their own heads. Which
projection a name stands for is read off the taps of the sites around it, and a name is offered only where its identity
held on a made-up input (``x @ W_Q + b_Q = attn.q``). Nothing is copied until a graph uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.params import RAW, ParamSpec
from patchbay_server.models.binding.compare import close, is_linear
from patchbay_server.models.expert_parameters import expert_parameters
from patchbay_server.models.layouts import Heads, Layout
from patchbay_server.models.narrowing import output_embeddings
from patchbay_server.models.taps import InputTap, NormTap, OutputTap, Tap


class Parameter(Protocol):
    """How a parameter is made from the model's own tensors."""

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        """Its value; may share memory with the model, so nobody may write to it."""
        ...


@dataclass(frozen=True)
class Raw:
    """A tensor as the checkpoint has it."""

    path: str

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        return model.get_parameter(self.path).detach()


@dataclass(frozen=True)
class Rows:
    """A table as the checkpoint has it, from one of its rows on."""

    path: str
    first: int

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        return model.get_parameter(self.path).detach()[self.first :]


@dataclass(frozen=True)
class Projection:
    """The part of a projection's matrix that makes, or takes, a site: ``[d_in, d_out]``, an axis of heads in front.

    Attributes:
        path: the projection's name.
        layout: how the site lies among the projection's features.
        takes: whether the site is what the projection takes (else what it makes).
    """

    path: str
    layout: Layout | None
    takes: bool

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        module: Any = model.get_submodule(self.path)
        matrix: torch.Tensor = module.weight.detach()
        if not _in_out(module):
            matrix = matrix.T
        if self.takes:
            matrix = matrix.T  # [d_out, d_in]: layouts split the last axis
        if self.layout is not None:
            matrix = self.layout.split(matrix)
        if not isinstance(self.layout, Heads):
            return matrix.T if self.takes else matrix
        return matrix.permute(1, 2, 0) if self.takes else matrix.permute(1, 0, 2)


@dataclass(frozen=True)
class Vector:
    """A bias or gain: the part of it that belongs to a site, plus an offset (Gemma multiplies by ``1 + weight``)."""

    path: str
    attribute: str
    layout: Layout | None = None
    offset: float = 0.0

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        vector: torch.Tensor = getattr(model.get_submodule(self.path), self.attribute).detach()
        vector = vector if self.layout is None else self.layout.split(vector)
        return vector + self.offset if self.offset else vector


def find_parameters(
    model: torch.nn.Module, taps: Mapping[str, Tap], values: Mapping[str, torch.Tensor], ids: torch.Tensor | None
) -> tuple[dict[str, Parameter], tuple[ParamSpec, ...]]:
    """Every parameter of `model`, canonical names first.

    Args:
        model: the model.
        taps: the way to every site, modules' included.
        values: every site's value in one forward.
        ids: the token ids of that forward, ``[rows, seq]``, if it had any.
    """
    found: dict[str, Parameter] = {}
    docs: dict[str, str] = {}
    with torch.no_grad():
        for name, parameter, doc in _canonical(model, taps, values, ids):
            found[name], docs[name] = parameter, doc
    for path, tensor in model.named_parameters(remove_duplicate=False):
        if str(tensor.dtype).removeprefix("torch.") in DTYPES:
            found[RAW + path], docs[RAW + path] = Raw(path), "as the checkpoint has it"
    specs: list[ParamSpec] = []
    for name, parameter in found.items():
        value = parameter.of(model)
        dtype = DTYPES[str(value.dtype).removeprefix("torch.")]
        specs.append(ParamSpec(name, tuple(value.shape), dtype, docs[name]))
    return found, tuple(specs)


_Found = tuple[str, Parameter, str]


def _canonical(
    model: torch.nn.Module, taps: Mapping[str, Tap], values: Mapping[str, torch.Tensor], ids: torch.Tensor | None
) -> Iterator[_Found]:
    blocks = sorted({m[0] for n in taps if (m := re.match(r"(.*\.)?blocks\.\d+\.", n))}, key=_by_number)
    for block in blocks:
        for letter in "QKV":
            site = f"{block}attn.{letter.lower()}"
            yield from _made(model, taps, values, site, f"{block}attn", letter, "head, d_model, d_head")
        yield from _taken(model, taps, values, f"{block}attn.z", f"{block}attn", "O", "head, d_head, d_model")
        gated = f"{block}mlp.pre_linear" in taps
        linear = "pre_linear" if gated else "pre"
        yield from _made(model, taps, values, f"{block}mlp.{linear}", f"{block}mlp", "in", "d_model, d_mlp")
        if gated:
            yield from _made(model, taps, values, f"{block}mlp.pre", f"{block}mlp", "gate", "d_model, d_mlp")
        yield from _taken(model, taps, values, f"{block}mlp.post", f"{block}mlp", "out", "d_mlp, d_model")
        yield from expert_parameters(model, block, taps, values)
    for site, tap in taps.items():
        if isinstance(tap, NormTap) and tap.part == "normalized":
            yield from _norm(model, tap, site.rpartition(".")[0], values.get(site), values)
    embed = taps.get("embed")
    if isinstance(embed, OutputTap) and embed.layout is None and ids is not None and "embed" in values:
        table = getattr(model.get_submodule(embed.path), "weight", None)
        if isinstance(table, torch.Tensor) and table.ndim == 2 and close(table[ids], values["embed"]):
            yield "embed.W_E", Raw(f"{embed.path}.weight"), "d_vocab, d_model"
    yield from _positions(model, taps, values)
    made = list(_made(model, taps, values, "logits", "unembed", "U", "d_model, d_vocab"))
    yield from made or _before_the_cap(model, taps, values)


def _positions(model: torch.nn.Module, taps: Mapping[str, Tap], values: Mapping[str, torch.Tensor]) -> Iterator[_Found]:
    """The table of learned positions: its rows, from the first position's on, are what is added."""
    shown = values.get("pos_embed")
    if shown is None or shown.ndim != 3:
        return
    seq = shown.shape[1]
    for path, module in model.named_modules():
        table = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Embedding) or not isinstance(table, torch.Tensor):
            continue
        for first in (0, 2):  # OPT's and BART's tables begin with two rows for padding
            rows = table[first : first + seq]
            if table.shape[-1] == shown.shape[-1] and rows.shape[0] == seq and close(rows, shown[0]):
                yield "pos_embed.W_pos", Rows(f"{path}.weight", first), "n_ctx, d_model"
                return


def _before_the_cap(
    model: torch.nn.Module, taps: Mapping[str, Tap], values: Mapping[str, torch.Tensor]
) -> Iterator[_Found]:
    """The unembedding where the logits are capped or scaled behind it."""
    path = output_embeddings(model)
    if path is None or "logits" not in taps:
        return
    yield from _made(
        model,
        {"logits": OutputTap(path)},
        {**values, "logits": values.get(f"module:{path}.output", torch.zeros(0))},
        "logits",
        "unembed",
        "U",
        "d_model, d_vocab; the logits are capped or scaled behind it",
    )


def _by_number(prefix: str) -> tuple[str, int]:
    stack, _, number = prefix.rstrip(".").rpartition(".")
    return stack, int(number)


def _made(
    model: torch.nn.Module,
    taps: Mapping[str, Tap],
    values: Mapping[str, torch.Tensor],
    site: str,
    group: str,
    letter: str,
    axes: str,
) -> Iterator[_Found]:
    """The matrix and bias of the projection whose output a site is."""
    tap = taps.get(site)
    if not isinstance(tap, OutputTap) or tap.part or site not in values:
        return
    given = values.get(f"module:{tap.path}.input")
    if given is None or not is_linear(model.get_submodule(tap.path)):
        return
    weight = Projection(tap.path, tap.layout, takes=False)
    matrix = weight.of(model)
    if not matrix.is_floating_point() or matrix.shape[-2] != given.shape[-1]:
        return
    split = matrix.ndim == 3
    product = torch.einsum("...d,hde->...he" if split else "...d,de->...e", given, matrix.to(given.dtype))
    bias = _bias(model, tap.path, tap.layout)
    names = (f"{group}.W_{letter}", axes), (f"{group}.b_{letter}", axes.replace("d_model, ", ""))
    yield from _proved(model, product, values[site], weight, bias, names)


def _taken(
    model: torch.nn.Module,
    taps: Mapping[str, Tap],
    values: Mapping[str, torch.Tensor],
    site: str,
    group: str,
    letter: str,
    axes: str,
) -> Iterator[_Found]:
    """The matrix and bias of the projection whose input a site is."""
    tap = taps.get(site)
    if not isinstance(tap, InputTap) or tap.part or site not in values:
        return
    made = values.get(f"module:{tap.path}.output")
    if made is None or not is_linear(model.get_submodule(tap.path)):
        return
    weight = Projection(tap.path, tap.layout, takes=True)
    matrix, given = weight.of(model), values[site]
    if not matrix.is_floating_point() or matrix.shape[:-1] != given.shape[1 - matrix.ndim :]:
        return
    equation = "...he,hed->...d" if matrix.ndim == 3 else "...e,ed->...d"
    product = torch.einsum(equation, given, matrix.to(given.dtype))
    names = (f"{group}.W_{letter}", axes), (f"{group}.b_{letter}", "d_model")
    yield from _proved(model, product, made, weight, _bias(model, tap.path, None), names)


def _proved(
    model: torch.nn.Module,
    product: torch.Tensor,
    expected: torch.Tensor,
    weight: Parameter,
    bias: Parameter | None,
    names: tuple[tuple[str, str], tuple[str, str]],
) -> Iterator[_Found]:
    """A weight, and the bias that goes with it, if its product and that come to what was expected.

    Args:
        model: the model.
        product: what the weight makes of what was given.
        expected: what the model made of it.
        weight, bias: the parameters.
        names: name and axes of each.
    """
    if close(product if bias is None else product + bias.of(model), expected):
        for (name, axes), parameter in zip(names, (weight, bias), strict=True):
            if parameter is not None:
                yield name, parameter, axes


def _bias(model: torch.nn.Module, path: str, layout: Layout | None) -> Vector | None:
    bias = getattr(model.get_submodule(path), "bias", None)
    return Vector(path, "bias", layout) if isinstance(bias, torch.Tensor) else None


def _norm(
    model: torch.nn.Module, tap: NormTap, group: str, given: torch.Tensor | None, values: Mapping[str, torch.Tensor]
) -> Iterator[_Found]:
    """Gain and bias of a normalization: ``normalized * w + b`` is its output."""
    made, module = values.get(f"module:{tap.path}.output"), model.get_submodule(tap.path)
    if made is None or given is None or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return
    gain = Vector(tap.path, "weight", offset=tap.form.gain_offset)
    product, names = given * gain.of(model).to(given.dtype), ((f"{group}.w", "d_model"), (f"{group}.b", "d_model"))
    yield from _proved(model, product, made, gain, _bias(model, tap.path, None), names)


def _in_out(module: torch.nn.Module) -> bool:
    """Whether a projection keeps its matrix as ``[d_in, d_out]`` (transformers' Conv1D) and not ``[d_out, d_in]``."""
    return not hasattr(module, "in_features") and type(module).__name__ == "Conv1D"
