"""How a site is attached to a model: one small class per kind of place, each translating to the canonical layout.

A tap calls its handler with the site's value in canonical layout and puts a replacement, if the handler returns one,
back where the model expects it. Taps hold no state of their own; whoever attaches one must remove the handle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch

from patchbay_server.models import attention
from patchbay_server.models.layouts import Heads, Layout
from patchbay_server.models.operations import EVERY, OpPlace, intercept, replace_call

Handler: TypeAlias = "Callable[[torch.Tensor], torch.Tensor | None]"


class Handle(Protocol):
    """What undoes an attachment."""

    def remove(self) -> None: ...


class Tap(Protocol):
    """One way of reaching one site."""

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        """Call `handler` with the site's value in every forward until the handle is removed."""
        ...


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that a module's input or output carries: itself, or the first of a tuple, list or model output."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return value[0] if value and isinstance(value[0], torch.Tensor) else None
    if hasattr(value, "to_tuple"):
        return first_tensor(value.to_tuple())
    return None


def replace_first_tensor(value: Any, new: torch.Tensor) -> Any:
    """`value` with the tensor that `first_tensor` finds replaced."""
    if isinstance(value, torch.Tensor):
        return new
    if isinstance(value, tuple):
        return type(value)(*((new, *value[1:]))) if hasattr(value, "_fields") else (new, *value[1:])
    if isinstance(value, list):
        return [new, *value[1:]]
    key = next(iter(value.keys()))  # a transformers ModelOutput
    value[key] = new
    return value


@dataclass(frozen=True)
class OutputTap:
    """A module's output.

    Attributes:
        path: the module's name in the model; "" for the model itself.
        layout: how the site lies in it; None where it is the whole output.
        part: which tensor of a tuple output is meant.
    """

    path: str
    layout: Layout | None = None
    part: int = 0

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes

        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            del module, args
            if self.part:
                new = through(self.layout, output[self.part], handler)
                return None if new is None else (*output[: self.part], new, *output[self.part + 1 :])
            whole = first_tensor(output)
            assert whole is not None
            new = through(self.layout, whole, handler)
            return None if new is None else replace_first_tensor(output, new)

        return model.get_submodule(self.path).register_forward_hook(hook)


@dataclass(frozen=True)
class InputTap:
    """One of a module's tensor inputs.

    Attributes:
        path: the module's name in the model.
        layout: how the site lies in it; None where it is the whole input.
        part: which of the tensors among the arguments (keywords after positions) is meant.
    """

    path: str
    layout: Layout | None = None
    part: int = 0

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            del module
            where: list[int | str] = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
            where += [k for k, v in kwargs.items() if isinstance(v, torch.Tensor)]
            place = where[self.part]
            new = through(self.layout, args[place] if isinstance(place, int) else kwargs[place], handler)
            if new is None:
                return None
            if isinstance(place, int):
                return (*args[:place], new, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: new}

        return model.get_submodule(self.path).register_forward_pre_hook(hook, with_kwargs=True)


def through(layout: Layout | None, whole: torch.Tensor, handler: Handler) -> torch.Tensor | None:
    """What `handler` makes of the site that lies in `whole`, put back; None when it replaces nothing."""
    if layout is None:
        return handler(whole)
    new = handler(layout.split(whole))
    return None if new is None else layout.merge(whole, new)


@dataclass(frozen=True)
class OpTap:
    """The value that an operation inside a module returns, or is given.

    Attributes:
        path: the module whose own forward runs the operation.
        place: which operation.
        argument: position or keyword of the argument that is meant; None for what it returns.
        layout: how the site lies in it; None where it is the whole tensor.
        part: which tensor is meant of an operation that returns several.
    """

    path: str
    place: OpPlace
    argument: int | str | None = None
    layout: Layout | None = None
    part: int = 0

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes

        def handle(whole: Any) -> Any:
            if isinstance(whole, torch.Tensor):
                return through(self.layout, whole, handler)
            new = through(self.layout, whole[self.part], handler)
            return None if new is None else (*whole[: self.part], new, *whole[self.part + 1 :])

        return intercept(model.get_submodule(self.path), self.place, self.argument, handle)


@dataclass(frozen=True)
class FlatTap:
    """A value that the model keeps as ``[rows * seq, ...]``, shown as ``[rows, seq, ...]``.

    Attributes:
        inner: the way to the flat value.
        shape_from: a module whose first tensor input is ``[rows, seq, ...]`` and which is entered before.
    """

    inner: Tap
    shape_from: str

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        leading: list[tuple[int, ...]] = [(1, 1)]

        def remember(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            leading[0] = tuple(first.shape[:2])

        def handle(flat: torch.Tensor) -> torch.Tensor | None:
            new = handler(flat.unflatten(0, leading[0]))
            return None if new is None else new.flatten(0, 1)

        shape = model.get_submodule(self.shape_from).register_forward_pre_hook(remember, with_kwargs=True)
        return _Both(shape, self.inner.attach(model, handle, writes=writes))


@dataclass(frozen=True)
class SharedRowsTap:
    """A module's output that has one row for all rows (learned positions), shown and written per row.

    Attributes:
        path: the module's name in the model.
        rows_from: name of the module whose output has as many rows as the batch, reached earlier.
    """

    path: str
    rows_from: str

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes
        rows: list[int] = [1]

        def count(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            tensor = first_tensor(output)
            assert tensor is not None
            rows[0] = tensor.shape[0]

        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            del module, args
            return handler(output.expand(rows[0], *output.shape[1:]))

        counter = model.get_submodule(self.rows_from).register_forward_hook(count)
        main = model.get_submodule(self.path).register_forward_hook(hook)
        return _Both(counter, main)


@dataclass(frozen=True)
class _Both:
    first: Handle
    second: Handle

    def remove(self) -> None:
        self.first.remove()
        self.second.remove()


@dataclass(frozen=True)
class AttentionInsideTap:
    """A part of an attention module that exists only inside the attention function.

    Attributes:
        path: the attention module's name.
        part: one of `attention.PARTS`.
    """

    path: str
    part: str

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        return attention.tap(model.get_submodule(self.path), self.part, handler, writes=writes)


@dataclass(frozen=True)
class NormForm:
    """What a normalization module computes, found out by comparing with its own output.

    Attributes:
        centered: whether the mean is subtracted (LayerNorm) or not (RMSNorm).
        eps: added to the variance.
        gain_offset: 1.0 where the module multiplies by ``1 + weight`` (Gemma), else 0.0.
    """

    centered: bool
    eps: float
    gain_offset: float

    def scale_of(self, value: torch.Tensor) -> torch.Tensor:
        """The divisor, float32 ``[rows, seq, 1]``: the square root of variance (or mean square) plus eps."""
        wide = value.float()
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def normalize(self, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`value`, centered where the form is, divided by `scale`; before gain and bias."""
        wide = value.float()
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide / scale).to(value.dtype)

    def finish(self, module: torch.nn.Module, normalized: torch.Tensor) -> torch.Tensor:
        """Gain and bias of `module` applied to a normalized value."""
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        out = normalized if weight is None else normalized * (weight + self.gain_offset).to(normalized.dtype)
        return out if bias is None else out + bias


#: Attribute of a normalization module that holds its taps while a pass runs.
_NORM_TAPS = "_patchbay_norm_taps"


@dataclass(frozen=True)
class NormTap:
    """The inside of a normalization: its ``scale`` or its ``normalized`` value.

    Reading leaves the module's own output in place, to the bit; writing recomputes it from the edited part. An edited
    scale is what ``normalized`` is then computed with.

    Attributes:
        path: the module's name.
        part: ``"scale"`` (``[rows, seq, 1]``) or ``"normalized"`` (``[rows, seq, d_model]``, before gain and bias).
        form: what the module computes.
    """

    path: str
    part: str
    form: NormForm

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes
        module = model.get_submodule(self.path)
        entry = (self.part, handler)
        entries: list[tuple[str, Handler]] | None = module.__dict__.get(_NORM_TAPS)
        if entries is not None:
            entries.append(entry)
            return _Nothing()
        module.__dict__[_NORM_TAPS] = entries = [entry]
        return _NormHandle(module, module.register_forward_hook(self._hook))

    def _hook(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        del output
        entries: list[tuple[str, Handler]] = module.__dict__[_NORM_TAPS]
        value: torch.Tensor = args[0]
        scale = self.form.scale_of(value)
        edited = False
        for part, handler in entries:
            if part == "scale" and (new := handler(scale.to(value.dtype))) is not None:
                scale, edited = new.float(), True
        normalized = self.form.normalize(value, scale)
        for part, handler in entries:
            if part == "normalized" and (new := handler(normalized)) is not None:
                normalized, edited = new, True
        return self.form.finish(module, normalized) if edited else None


class _Nothing:
    """A handle whose work another handle of the same module does."""

    def remove(self) -> None:
        return None


@dataclass(frozen=True)
class _NormHandle:
    module: torch.nn.Module
    hook: Handle

    def remove(self) -> None:
        self.module.__dict__.pop(_NORM_TAPS, None)
        self.hook.remove()


@dataclass(frozen=True)
class ResultTap:
    """What each head adds to the residual stream: its slice of the output projection applied to its z.

    Computed only while attached; ``[rows, seq, head, d_model]``. Writing replaces the projection's output by the sum
    of the edited results plus the projection's bias.

    Attributes:
        path: the output projection's name.
        heads: how its input splits into heads.
    """

    path: str
    heads: Heads

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            del output
            z = self.heads.split(args[0])
            new = handler(torch.einsum("...he,hed->...hd", z, self.weight(module)))
            if new is None:
                return None
            total = new.sum(-2)
            bias = getattr(module, "bias", None)
            return total if bias is None else total + bias

        return model.get_submodule(self.path).register_forward_hook(hook)

    def weight(self, module: torch.nn.Module) -> torch.Tensor:
        """The projection's weight as ``[head, d_head, d_model]``."""
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        rows = weight.T if isinstance(module, torch.nn.Linear) else weight  # Conv1D keeps [in, out]
        return rows.unflatten(0, (self.heads.heads, self.heads.width))


@dataclass(frozen=True)
class ReadOrWrite:
    """A site that is cheapest to see at one place but must be replaced at another.

    Attributes:
        read: where it is attached when nothing is written.
        write: where it is attached when something is.
    """

    read: Tap
    write: Tap

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        return (self.write if writes else self.read).attach(model, handler, writes=writes)


@dataclass(frozen=True)
class ExpertTap:
    """What each of a token's chosen experts contributes, weighted: ``[tokens, slot, d_model]``.

    Computed only while attached, by applying the experts' module once for each slot. Writing replaces the module's
    output by the sum of the edited contributions.

    Attributes:
        path: name of the module that applies the experts.
        indices, weights: which of its tensor inputs are the experts' numbers and weights, ``[tokens, slots]``.
        slots: number of experts per token.
    """

    path: str
    indices: int
    weights: int
    slots: int

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            where: list[int | str] = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
            where += [k for k, v in kwargs.items() if isinstance(v, torch.Tensor)]
            shares = []
            for slot in range(self.slots):
                chosen: list[Any] = list(args)
                named = dict(kwargs)
                for part in (self.indices, self.weights):
                    place = where[part]
                    if isinstance(place, int):
                        chosen[place] = args[place][:, slot : slot + 1]
                    else:
                        named[place] = kwargs[place][:, slot : slot + 1]
                shares.append(first_tensor(module.forward(*chosen, **named)))
            new = handler(torch.stack([s for s in shares if s is not None], dim=1))
            return None if new is None else replace_first_tensor(output, new.sum(1).to(new.dtype))

        return model.get_submodule(self.path).register_forward_hook(hook, with_kwargs=True)


@dataclass(frozen=True)
class FusedTap:
    """A part of an attention that a model computes by torch's fused function itself.

    Attributes:
        path: the module whose own forward calls the function.
        place: the call.
        part: one of `attention.PARTS`.
    """

    path: str
    place: OpPlace
    part: str

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        module = model.get_submodule(self.path)

        def instead(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            return attention.open_fused(module, function, args, kwargs)

        opened = replace_call(module, self.place, instead)
        return _Both(opened, attention.tap(module, self.part, handler, writes=writes))


@dataclass(frozen=True)
class StepsTap:
    """A value that a module computes once for each position, shown for all of them: ``[rows, seq, ...]``.

    It is shown when the last position's is computed, and cannot be replaced.

    Attributes:
        path: the module whose own forward runs the operation.
        place: the operation, at its first occurrence.
        seq_from: a module whose first tensor input is ``[rows, seq, ...]`` and which is entered before.
    """

    path: str
    place: OpPlace
    seq_from: str

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        del writes
        length: list[int] = [1]
        steps: list[torch.Tensor] = []

        def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            length[0] = first.shape[1]
            steps.clear()

        def handle(step: torch.Tensor) -> None:
            steps.append(step)
            if len(steps) == length[0]:
                handler(torch.stack(steps, dim=1))
                steps.clear()

        start = model.get_submodule(self.seq_from).register_forward_pre_hook(begin, with_kwargs=True)
        place = replace(self.place, occurrence=EVERY)
        return _Both(start, intercept(model.get_submodule(self.path), place, None, handle))
