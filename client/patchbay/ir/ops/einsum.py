"""Einstein summation as a checked structure: an equation is parsed here and never handed on unread."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from patchbay.errors import GraphError, ShapeError
from patchbay.ir.limits import MAX_DIMS
from patchbay.ir.ops.rules import promoted
from patchbay.ir.ops.spec import AttrSpec, OpSpec, TensorSpec, ValueSpec

MAX_OPERANDS = 8
MAX_EQUATION = 256

_TERM = re.compile(r"[A-Za-z]*(\.\.\.[A-Za-z]*)?")
#: A letter, or the place of an ellipsis axis counted from the right (-1 is its last one).
Label: TypeAlias = "str | int"


@dataclass(frozen=True, slots=True)
class Contraction:
    """A parsed equation with the extents of one set of operands.

    Attributes:
        inputs: the labels of each operand's axes.
        output: the labels of the result's axes.
        extents: extent of each label.
        equation: the equation without spaces, with its output written out.
    """

    inputs: tuple[tuple[Label, ...], ...]
    output: tuple[Label, ...]
    extents: Mapping[Label, int]
    equation: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.extents[label] for label in self.output)

    def size(self, labels: Sequence[Label] | set[Label]) -> int:
        """Elements of a tensor with these axes."""
        return math.prod(self.extents[label] for label in labels)

    def steps(self) -> list[tuple[set[Label], set[Label]]]:
        """(labels involved, labels kept) of each step: two operands at a time from the left, as torch does."""
        steps: list[tuple[set[Label], set[Label]]] = []
        kept = set(self.inputs[0])
        for position in range(1, len(self.inputs)):
            involved = kept | set(self.inputs[position])
            later: set[Label] = set(self.output).union(*self.inputs[position + 1 :])
            kept = involved & later
            steps.append((involved, kept))
        return steps


def _terms(equation: str) -> tuple[list[str], str | None]:
    """The input terms and the output term (None when it is left out), each known to be well-formed."""
    if len(equation) > MAX_EQUATION:
        raise GraphError(f"einsum: the equation is longer than {MAX_EQUATION} characters")
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    inputs = left.split(",")
    for term in [*inputs, right] if arrow else inputs:
        if not _TERM.fullmatch(term):
            raise GraphError(f"einsum: {term!r} in {equation!r} is not letters with at most one ellipsis")
    return inputs, right if arrow else None


def parse(equation: str, shapes: Sequence[tuple[int, ...]]) -> Contraction:
    """`equation` as in torch.einsum, for operands of `shapes`.

    Letters name axes; ``...`` stands for axes that broadcast; the output may be left out (the letters that occur once,
    in order). Axes of extent 1 broadcast.

    Raises:
        GraphError: the equation is malformed.
        ShapeError: it does not fit the shapes.
    """
    terms, result = _terms(equation)
    if len(terms) != len(shapes) or len(shapes) > MAX_OPERANDS:
        raise GraphError(
            f"einsum: {equation!r} is for {len(terms)} operands, got {len(shapes)} (at most {MAX_OPERANDS})"
        )
    inputs: list[tuple[Label, ...]] = []
    extents: dict[Label, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        covered = len(shape) - len(before) - len(after)
        if covered < 0 or (covered and not dots):
            raise ShapeError(f"einsum: {term!r} in {equation!r} does not fit a tensor of shape {list(shape)}")
        labels: tuple[Label, ...] = (*before, *range(-covered, 0), *after)
        own: dict[Label, int] = {}
        for label, extent in zip(labels, shape, strict=True):
            if own.setdefault(label, extent) != extent:
                raise ShapeError(f"einsum: {label!r} in {term!r} names axes of extents {own[label]} and {extent}")
        for label, extent in own.items():
            known = extents.get(label, 1)
            if extent != known and 1 not in (extent, known):
                raise ShapeError(f"einsum: {label!r} in {equation!r} has extents {known} and {extent}")
            extents[label] = extent if known == 1 else known
        inputs.append(labels)
    if len(extents) > MAX_DIMS:
        raise GraphError(f"einsum: {equation!r} names {len(extents)} axes, of at most {MAX_DIMS}")
    ellipsis: tuple[Label, ...] = tuple(sorted(label for label in extents if isinstance(label, int)))
    if result is None:
        letters = "".join(terms).replace(".", "")
        result = ("..." if ellipsis else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    before, dots, after = result.partition("...")
    if ellipsis and not dots:
        raise GraphError(f"einsum: {equation!r} loses its ellipsis; put ... into the output, or name the axes to sum")
    output: tuple[Label, ...] = (*before, *(ellipsis if dots else ()), *after)
    if len(set(output)) != len(output) or not set(output) <= set(extents):
        raise GraphError(f"einsum: the output of {equation!r} repeats a letter or names one that no operand has")
    return Contraction(tuple(inputs), output, extents, ",".join(terms) + "->" + result)


def _rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    contraction = parse(attrs["equation"], [a.shape for a in args])
    return TensorSpec(contraction.shape, promoted("einsum", args, "float"))


def _flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del out
    contraction = parse(attrs["equation"], [a.shape for a in args])
    return sum(a.size for a in args) + sum(2 * contraction.size(involved) for involved, _ in contraction.steps())


def _workspace(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    assert isinstance(out, TensorSpec)
    contraction = parse(attrs["equation"], [a.shape for a in args])
    between = [contraction.size(kept) for _, kept in contraction.steps()[:-1]]
    return out.dtype.itemsize * (2 * max(between, default=0) + sum(a.size for a in args))


EINSUM = OpSpec(
    name="einsum",
    params=("operands",),
    rule=_rule,
    doc="Sums of products over named axes (torch.einsum), two operands at a time from the left.",
    category="linalg",
    attrs=(AttrSpec("equation", "str", doc="such as `bqd,bkd->bqk`; letters, commas, one arrow, ellipses"),),
    flops=_flops,
    workspace=_workspace,
    variadic=True,
)
