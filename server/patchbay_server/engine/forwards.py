"""Forwards of the model: one call or several stacked in one, each call's handlers seeing its own rows alone.

An execution says what it wants as a `ForwardCall`; who drives executions decides which calls share a forward. What goes
wrong in one call's handlers ends that call and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchbay.errors import GraphError, RequestCancelledError
from patchbay.ir.card import LOGITS
from patchbay.ir.graph import TensorData
from patchbay_server.engine.bypass import bypassing
from patchbay_server.engine.decoding import DecodeBatches, choose, prompt_logits
from patchbay_server.engine.fusing import ConstantWrite, write_all
from patchbay_server.kernels import to_tensor
from patchbay_server.models.activations import one_kernel
from patchbay_server.models.continuation import Trunk, continuing, keeping, places, watched_streams
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.inputs import forward
from patchbay_server.models.narrowing import narrowed, positions
from patchbay_server.models.taps import Handle, first_tensor

if TYPE_CHECKING:
    from patchbay_server.engine.generate import Decoding
    from patchbay_server.engine.steps import Start

#: Token that fills rows up to the longest of their forward; causal rows never see it.
FILLER = 0

#: What goes wrong with the device, and so with everybody's rows.
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)

#: Called with a call's rows of a site's value; returns their replacement, or None.
Handler: TypeAlias = "Callable[[torch.Tensor], torch.Tensor | None]"


@dataclass(frozen=True, slots=True)
class SiteCall:
    """What a call does at one site.

    Attributes:
        handler: called with the call's rows of the value.
        writes: whether the handler ever returns a replacement.
        constant: what the handler does, where it can be done together with what others do.
    """

    handler: Handler
    writes: bool
    constant: ConstantWrite | None = None


@dataclass(frozen=True, slots=True)
class GoingOn:
    """Where the rows of a call start, and what they start from."""

    start: Start
    trunk: Trunk


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a call leaves for others to go on from.

    Attributes:
        trunk: where it is put.
        through: the layer after which the forward ends; None where `ForwardCall.stop_at` says when.
    """

    trunk: Trunk
    through: int | None


@dataclass(eq=False, slots=True)
class ForwardCall:
    """One forward that an execution wants, and what came of it.

    Attributes:
        rows, seq: extents of its batch; shorter rows are padded on the right.
        tokens: one tuple of ids per row, unpadded, without what `decoding` knows already; none where the model takes no
            tokens.
        inputs: further inputs by name, one value per slot.
        sites: what happens at each site, in forward order.
        stop_at: the last site that anything needs; None runs the model to its end.
        alone: whether it must not share a forward with another call.
        cancelled: whether its request is gone.
        decoding: the generating run whose next forward this is; None for a forward of its own.
        compiled: whether layers may run as torch compiled them.
        bypass: layers that hand on what they are given, if all calls agree: nothing sees what they do.
        twice: whether it will be differentiated twice, which torch's fused attention cannot be.
        values: what the execution remembers; put back when the forward has to be run again.
        going: what its rows go on from, whose tokens `tokens` then are; None for whole rows. Such a call is `alone`.
        leaving: what others go on from. Such a call is `alone`.
        fast: whether products may be left to the library that does them faster.
        one_kernel: whether activations may be done by one kernel each.
        logits: the only positions at which it needs logits: row, first position, number of positions.
        columns: the only tokens whose logits it needs, in order, where `logits` is given; None for all.
        shown: the tokens whose logits are there when `narrowed`; None for all.
        narrowed: whether logits are there at those positions only, ``[1, all of them, d_vocab]``.
        reached: the sites that the forward came to.
        layers_run: decoder layers that ran.
        layers_bypassed: how many of those of `bypass` did not run.
        layers_compiled: how many of the model's layers were there as torch compiled them.
        fused: its writes that another call's took along.
        fast_positions: positions that modules were given whose products were left to the faster library.
        kernel_elements: elements of activations that one kernel did.
        error: what ended the call early.
    """

    rows: int
    seq: int
    tokens: tuple[tuple[int, ...], ...]
    inputs: Mapping[str, tuple[TensorData, ...]]
    sites: Mapping[str, SiteCall]
    stop_at: str | None
    alone: bool
    cancelled: Callable[[], bool]
    decoding: Decoding | None = None
    compiled: bool = False
    bypass: frozenset[int] = frozenset()
    twice: bool = False
    values: dict[int, Any] = field(default_factory=dict)
    going: GoingOn | None = None
    leaving: Leaving | None = None
    fast: bool = False
    one_kernel: bool = False
    logits: tuple[tuple[int, int, int], ...] | None = None
    columns: tuple[int, ...] | None = None
    shown: tuple[int, ...] | None = None
    narrowed: bool = False
    reached: set[str] = field(default_factory=set)
    layers_run: int = 0
    layers_bypassed: int = 0
    layers_compiled: int = 0
    fused: int = 0
    fast_positions: int = 0
    kernel_elements: int = 0
    error: BaseException | None = None

    @property
    def decodes(self) -> bool:
        """Whether it is a forward of a run that generates beside others, after its prompt's."""
        return self.decoding is not None and not self.alone and self.decoding.step > 0


_Own: TypeAlias = "slice | tuple[slice, slice]"


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Everything that is needed has been seen; unwinds the forward."""


def run_forward(hosted: HostedModel, calls: Sequence[ForwardCall], batches: DecodeBatches) -> None:
    """Run one forward for all of `calls`; what went wrong for one of them is its `error`.

    Args:
        hosted: the model.
        calls: one, or several that may share: tokens alone, none of them `alone`, rows that do not change one another;
            prompts of which the same beginning is known; or the steps of runs that generate in one batch.
        batches: where rows that generate together are kept.

    Raises:
        BaseException: what is nobody's own fault, such as a device error.
    """
    first = calls[0]
    try:
        if first.decodes:
            _step(hosted, calls, batches)
        elif any(call.decoding is not None and not call.alone for call in calls):
            _prompts(hosted, calls, batches)
        else:
            _plain(hosted, calls)
    except _Stop:
        pass
    except GraphError as error:
        if len(calls) > 1:  # whose it is shows when each runs alone
            raise
        first.error = first.error or error
    except ValueError as error:  # how models say that what they were given does not fit together
        if not first.inputs:
            raise
        refused = GraphError(f"the model does not take these inputs: {str(error).partition(chr(10))[0]}")
        refused.__cause__ = error
        first.error = refused


def _plain(hosted: HostedModel, calls: Sequence[ForwardCall]) -> None:
    """A forward of whole rows, or of one call that goes on from another forward or leaves something for others."""
    first, starts = calls[0], _starts(calls)
    with ExitStack() as stack:
        inputs: dict[str, Any] = {}
        if first.going is not None:
            inputs = stack.enter_context(_going_on(hosted, first.going, first.tokens))
        elif first.leaving is not None:
            inputs = stack.enter_context(_leaving(hosted, first.leaving))
        if first.decoding is None:
            stack.enter_context(_some_logits(hosted, calls, starts))
        stack.enter_context(_attached(hosted, calls, starts))
        stack.enter_context(_compiled_layers(hosted, calls))
        stack.enter_context(_differentiable(calls))
        stack.enter_context(bypassing(hosted, sorted(_bypassed(calls))))
        stack.enter_context(_faster(hosted, calls))
        if first.decoding is not None:
            first.decoding.advance()
        elif first.going is not None:
            hosted.model(**inputs)
        elif first.leaving is not None:
            hosted.model(**_inputs(hosted, calls), **inputs)
        else:
            forward(hosted.model, _inputs(hosted, calls))


def _going_on(
    hosted: HostedModel, going: GoingOn, tokens: Sequence[Sequence[int]]
) -> AbstractContextManager[dict[str, Any]]:
    assert hosted.continuation is not None
    start, seq = going.start, max(map(len, tokens))
    ids = torch.tensor([[*row, *([FILLER] * (seq - len(row)))] for row in tokens], device=hosted.device)
    return continuing(
        hosted.model, hosted.continuation, going.trunk, ids, start.first, start.rows, start.after, start.last
    )


def _leaving(hosted: HostedModel, leaving: Leaving) -> AbstractContextManager[dict[str, Any]]:
    def finished(layer: int) -> None:
        if layer == leaving.through:
            raise _Stop

    return keeping(hosted.model, hosted.layers, leaving.trunk, finished)


@contextmanager
def _some_logits(hosted: HostedModel, calls: Sequence[ForwardCall], starts: Sequence[int]) -> Iterator[None]:
    """Logits are computed where some call reads them, if each says where."""
    where, site = hosted.unembedding, hosted.card.site
    for call in calls:
        call.narrowed, call.shown = False, None
    if where is None or not any(call.logits is not None for call in calls):
        yield
        return
    if any(call.logits is None and any(site(s).order >= where.order for s in call.sites) for call in calls):
        yield
        return
    spans = [
        (start + row, first, count)
        for call, start in zip(calls, starts, strict=True)
        for row, first, count in call.logits or ()
    ]
    asked = [call for call in calls if call.logits]
    shown = None
    if asked and all(call.columns is not None for call in asked):
        shown = tuple(sorted({token for call in asked for token in call.columns or ()}))
    for call in calls:
        call.narrowed, call.shown = True, shown
    with narrowed(hosted.model, where, *positions(spans, hosted.device), shown):
        yield


def _step(hosted: HostedModel, calls: Sequence[ForwardCall], batches: DecodeBatches) -> None:
    """The newest tokens of runs that generate together."""
    step = batches.step(calls)
    with _attached(hosted, calls, step.starts), _compiled_layers(hosted, calls):
        output = hosted.model(**step.inputs)
    step.take(output)


def _prompts(hosted: HostedModel, calls: Sequence[ForwardCall], batches: DecodeBatches) -> None:
    """Prompts of runs that generate, beside whatever other rows of tokens there are."""
    starts = _starts(calls)
    inputs: dict[str, Any] = dict(_inputs(hosted, calls))
    kept = prompt_logits(hosted, calls)
    if kept is not None:
        inputs["logits_to_keep"] = kept
    cache = batches.prompts(calls, starts)
    ids: torch.Tensor = inputs["input_ids"]
    if calls[0].decoding is not None and calls[0].decoding.known is not None:
        before = calls[0].decoding.known.length
        inputs |= places(hosted.model, ids.shape[0], before, before + ids.shape[1], ids.device)
    with _attached(hosted, calls, starts), _leaving_streams(hosted, calls, starts), _compiled_layers(hosted, calls):
        output = hosted.model(**inputs, past_key_values=cache, use_cache=True)
    logits = first_tensor(output)
    assert logits is not None
    runs = [(call, start) for call, start in zip(calls, starts, strict=True) if call.decoding is not None]
    newest = [run.decoding.newest(logits[start : start + run.rows])[:, 0] for run, start in runs if run.decoding]
    firsts = [sum(call.rows for call, _ in runs[:i]) for i in range(len(runs))]
    choose([call for call, _ in runs], firsts, torch.cat(newest))


def _leaving_streams(
    hosted: HostedModel, calls: Sequence[ForwardCall], starts: Sequence[int]
) -> AbstractContextManager[None]:
    """The residual streams of prompts that later ones may go on from are kept."""
    runs = [(call.decoding, start) for call, start in zip(calls, starts, strict=True) if call.decoding is not None]
    leaving = [(run, start) for run, start in runs if run.leaving is not None]
    if not leaving:
        return nullcontext()

    def take(layer: int, stream: torch.Tensor) -> None:
        for run, row in leaving:
            assert run.leaving is not None
            own, known = stream[row : row + 1, : run.lengths[0] - run.first], run.known
            if known is None:
                run.leaving.streams[layer] = own.clone()
            elif layer in known.trunk.streams:
                earlier = known.trunk.streams[layer][known.row : known.row + 1, : known.length]
                run.leaving.streams[layer] = torch.cat([earlier, own], dim=1)

    return watched_streams(hosted.model, hosted.layers, take)


def _starts(calls: Sequence[ForwardCall]) -> list[int]:
    """The first row of each call, one after the other."""
    starts, start = [], 0
    for call in calls:
        starts.append(start)
        start += call.rows
    return starts


@contextmanager
def _attached(hosted: HostedModel, calls: Sequence[ForwardCall], starts: Sequence[int]) -> Iterator[None]:
    """Every site's handlers are on the model while the body runs."""
    model = hosted.model
    handles: list[Handle] = []

    def enter_layer(module: torch.nn.Module, args: Any) -> None:
        del module, args
        for call in calls:
            if call.error is None and call.cancelled():
                call.error = RequestCancelledError("the request was cancelled")
            if call.error is None:
                call.layers_run += 1
        if all(call.error is not None for call in calls):
            raise _Stop

    def pass_layer(module: torch.nn.Module, args: Any) -> None:
        del module, args
        for call in calls:
            call.layers_bypassed += call.error is None

    going, bypassed = calls[0].going, _bypassed(calls)
    try:
        for number in range(0 if going is None else going.start.skipped, len(hosted.layers)):
            hook = pass_layer if number in bypassed else enter_layer
            handles.append(model.get_submodule(hosted.layers[number]).register_forward_pre_hook(hook))
        for site, handler, writes in _handlers(hosted, calls, starts):
            handles.append(hosted.taps[site].attach(model, handler, writes=writes))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _faster(hosted: HostedModel, calls: Sequence[ForwardCall]) -> Iterator[None]:
    """Products and activations are done by faster means, where every call allows it."""
    products = hosted.products if all(call.fast for call in calls) else None
    activations = hosted.activations if all(call.one_kernel for call in calls) else ()
    with (
        nullcontext([0]) if products is None else products.in_use(hosted.model) as positions,
        one_kernel(hosted.model, activations) as elements,
    ):
        try:
            yield
        finally:
            for call in calls:
                call.fast_positions, call.kernel_elements = positions[0], elements[0]


def _bypassed(calls: Sequence[ForwardCall]) -> frozenset[int]:
    return frozenset.intersection(*(call.bypass for call in calls))


@contextmanager
def _differentiable(calls: Sequence[ForwardCall]) -> Iterator[None]:
    """Attention is computed in operations that have second derivatives, where a call needs them."""
    if not any(call.twice for call in calls):
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _compiled_layers(hosted: HostedModel, calls: Sequence[ForwardCall]) -> Iterator[None]:
    """Layers that nothing looks into run compiled, where the operator asked for that and every call allows it."""
    if hosted.compiled is None or not all(call.compiled for call in calls):
        yield
        return
    with hosted.compiled.in_use() as count:
        for call in calls:
            call.layers_compiled = count
        yield


def _handlers(
    hosted: HostedModel, calls: Sequence[ForwardCall], starts: Sequence[int]
) -> Iterator[tuple[str, Handler, bool]]:
    """Each site that any call visits, in forward order, with the one handler for all of them."""
    order = hosted.card.site
    stops = None
    if all(call.stop_at is not None for call in calls):
        stops = max((call.stop_at for call in calls if call.stop_at), key=lambda site: order(site).order)
    if len(calls) == 1:
        for site, what in calls[0].sites.items():
            yield site, _alone(calls[0], site, what, stops=site == stops), what.writes
        return
    for site in sorted({site for call in calls for site in call.sites}, key=lambda site: order(site).order):
        parts = [(c, c.sites[site], _own(calls, starts, n, site)) for n, c in enumerate(calls) if site in c.sites]
        yield site, _together(parts, site, calls, stops=site == stops), any(what.writes for _, what, _ in parts)


def _alone(call: ForwardCall, site: str, what: SiteCall, *, stops: bool) -> Handler:
    def handle(value: torch.Tensor) -> torch.Tensor | None:
        call.reached.add(site)
        try:
            new = what.handler(value)
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - it is raised where the call was asked for
            call.error = error
            raise _Stop from None
        if stops:
            raise _Stop
        return new

    return handle


def _own(calls: Sequence[ForwardCall], starts: Sequence[int], number: int, site: str) -> _Own:
    """Which part of a site's value is a call's."""
    call = calls[number]
    if site != LOGITS or not call.narrowed:
        return slice(starts[number], starts[number] + call.rows)
    counts = [sum(count for _, _, count in each.logits or ()) for each in calls]
    return (slice(None), slice(sum(counts[:number]), sum(counts[: number + 1])))


def _together(
    parts: Sequence[tuple[ForwardCall, SiteCall, _Own]], site: str, calls: Sequence[ForwardCall], *, stops: bool
) -> Handler:
    constants = [(call, what.constant, own) for call, what, own in parts if what.constant and isinstance(own, slice)]
    fuse = len(constants) > 1
    others = [part for part in parts if part[1].constant is None] if fuse else parts

    def handle(value: torch.Tensor) -> torch.Tensor | None:
        result, owned = _write_constants(site, value, constants) if fuse else (value, False)
        for call, what, own in others:
            if call.error is not None:
                continue
            call.reached.add(site)
            try:
                new = what.handler(result[own])
            except DEVICE_ERRORS:
                raise
            except Exception as error:  # noqa: BLE001 - one request's failure is nobody else's
                call.error = error
                continue
            if new is not None:
                if not owned:
                    result, owned = value.clone(), True
                result[own] = new
        if stops or all(call.error is not None for call in calls):
            raise _Stop
        return result if owned else None

    return handle


def _write_constants(
    site: str, value: torch.Tensor, constants: Sequence[tuple[ForwardCall, ConstantWrite, slice]]
) -> tuple[torch.Tensor, bool]:
    """The constants of all calls that are still there, written in one operation."""
    writes = []
    for call, write, own in constants:
        if call.error is not None:
            continue
        call.reached.add(site)
        try:
            writes.append((call, (write, write.value(), own)))
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - one request's failure is nobody else's
            call.error = error
    if not writes:
        return value, False
    written = write_all(value, [what for _, what in writes])
    for number, (call, (write, _, _)) in enumerate(writes):
        write.done()
        call.fused += number > 0
    return written


def _inputs(hosted: HostedModel, calls: Sequence[ForwardCall]) -> dict[str, torch.Tensor]:
    device = hosted.device
    inputs = {
        name: torch.cat([to_tensor(value, device) for value in values]) for name, values in calls[0].inputs.items()
    }
    lengths = [row for call in calls for row in call.tokens]
    if lengths:
        seq = max(call.seq for call in calls)
        rows = [[*row, *([FILLER] * (seq - len(row)))] for row in lengths]
        inputs["input_ids"] = torch.tensor(rows, dtype=torch.long, device=device)  # [rows, seq]
        if not hosted.card.causal and any(len(row) < seq for row in lengths):
            seen = [[1] * len(row) + [0] * (seq - len(row)) for row in lengths]
            inputs["attention_mask"] = torch.tensor(seen, dtype=torch.long, device=device)
    return inputs
