"""Runs a plan: asks for its forwards, does at their sites what the plan says, hands out results as they appear."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch

from patchbay.errors import GraphError, RequestCancelledError
from patchbay.ir.artifacts import KeyedTensor
from patchbay.ir.card import LOGITS
from patchbay.ir.events import Event, Progress, Usage
from patchbay.ir.graph import TensorData
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.ir.ops.spec import TensorSpec
from patchbay_server.engine.bodies import SIDE_BY_SIDE, detached
from patchbay_server.engine.bypass import unseen_layers
from patchbay_server.engine.constants import ARTIFACT_CACHE, ConstantCache
from patchbay_server.engine.copies import HostCopies
from patchbay_server.engine.forwards import ForwardCall, GoingOn, Leaving, SiteCall
from patchbay_server.engine.fusing import ConstantWrite
from patchbay_server.engine.generate import Decoding
from patchbay_server.engine.gradients import frozen_parameters, take_gradients
from patchbay_server.engine.loops import Loops
from patchbay_server.engine.plan import Plan
from patchbay_server.engine.prompts import KNOWN_PROMPTS, Prompts
from patchbay_server.engine.rows import left_padded, own_rows, seen_rows, write_back
from patchbay_server.engine.steps import (
    Actions,
    Compute,
    Emit,
    Forward,
    Generated,
    Part,
    Pass,
    Read,
    Resume,
    Slot,
    Write,
)
from patchbay_server.engine.switches import (
    COBATCH,
    COMPILE,
    CONTINUOUS_BATCHING,
    FAST_PRODUCTS,
    FUSE_WRITES,
    ONE_KERNEL,
    SKIP_LAYERS,
)
from patchbay_server.kernels import index_get, index_put, to_tensor, to_torch_dtype
from patchbay_server.models.continuation import Trunk
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.narrowing import positions

_ALL = ("slice", None, None, None)


class Execution:
    """One run of one plan; used once, by one thread."""

    def __init__(
        self,
        hosted: HostedModel,
        plan: Plan,
        emit: Callable[[Event], None],
        cancelled: Callable[[], bool],
        left: Callable[[int, Trunk], None] = lambda run, trunk: None,
        constants: ConstantCache | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        self._hosted, self._plan, self._emit, self._cancelled = hosted, plan, emit, cancelled
        self._copies = HostCopies(emit)
        self._values: dict[int, Any] = {}
        #: What runs left for others to go on from, and who else is told.
        self._trunks: dict[int, Trunk] = dict(plan.trunks)
        self._left = left
        self._constants, self._not_copied = constants, 0
        self._prompts, self._known = prompts, 0
        self._layers_run = self._layers_compiled = self._layers_shared = self._layers_bypassed = 0
        self._fused = self._fast = self._in_one = 0
        #: Memory of the model's own tensors while one of its sites is visited; nothing that outlives the visit may
        #: share it.
        self._borrowed: set[int] = set()
        #: The generating run that is under way, and the rows of it that have stopped.
        self._decoding: Decoding | None = None
        self._gone: torch.Tensor | None = None
        self._forwards = self._positions = 0
        self._loops: Loops | None = None

    @property
    def exclusive(self) -> bool:
        """Whether nothing else may run between its forwards: recording gradients is a state of the whole thread."""
        return self._plan.differentiates

    @property
    def _alone(self) -> bool:
        """Whether its forwards are to be the very ones that somebody would make by hand."""
        return self._plan.options.deterministic or self.exclusive

    @property
    def _twice(self) -> bool:
        return any(gradient.twice for gradient in self._plan.gradients.values())

    def forwards(self) -> Generator[ForwardCall, None, Usage]:
        """Every forward that the plan wants, one after the other; each must have been run when it is asked to go on.

        The caller has switched gradients off. Returns what was used.

        Raises:
            GraphError: data that only running reveals as wrong (an index out of range, a singular matrix).
            RequestCancelledError: `cancelled` turned true.
        """
        plan = self._plan
        with frozen_parameters(self._hosted.model, self.exclusive):
            for number, each in enumerate(plan.passes):
                yield from self._pass(each) if each.generation is None else self._generation(each)
                self._copies.deliver(wait=False)
                self._emit(Progress(number + 1, len(plan.passes)))
            self._happen(plan.after)
            self._copies.deliver(wait=True)
        layers = len(self._hosted.layers) * self._forwards
        skipped = layers - self._layers_run
        saved = {
            **plan.saved,
            "early_stop": skipped - self._layers_shared - self._layers_bypassed,
            **({} if self._loops is None else self._loops.saved),
        }
        if self._layers_compiled:
            saved[COMPILE] = self._layers_compiled
        if self._layers_bypassed:
            saved[SKIP_LAYERS] = self._layers_bypassed
        if self._fused:
            saved[FUSE_WRITES] = self._fused
        if self._fast:
            saved[FAST_PRODUCTS] = self._fast
        if self._in_one:
            saved[ONE_KERNEL] = self._in_one
        if self._known:
            saved[KNOWN_PROMPTS] = self._known
        if self._not_copied:
            saved[ARTIFACT_CACHE] = self._not_copied
        return Usage(
            tokens=self._positions,
            passes=self._forwards,
            layers_run=self._layers_run,
            layers_skipped=skipped,
            nodes=plan.received,
            nodes_run=len(plan.graph.nodes),
            cost=plan.cost,
            saved=saved,
        )

    # --- one forward

    def _pass(self, each: Pass) -> Generator[ForwardCall, None, None]:
        self._check_cancelled()
        self._happen(each.before)
        self._positions += each.positions
        going = None
        if each.goes_on is not None:
            going = GoingOn(each.goes_on, self._trunks[each.goes_on.base])
            self._layers_shared += each.goes_on.skipped
        leaving = Leaving(Trunk(), each.keeps_through) if each.keeps else None
        apart = self._alone or bool(each.inputs) or going is not None or leaving is not None
        call = ForwardCall(
            rows=each.rows,
            seq=each.seq,
            tokens=each.tokens,
            inputs=each.inputs,
            sites={site: self._site_call(site, moment, each.rows) for site, moment in each.sites.items()},
            stop_at=each.stop_at,
            alone=apart or COBATCH in self._plan.options.disabled,
            cancelled=self._cancelled,
            values=self._values,
            compiled=not self._alone and going is None and COMPILE not in self._plan.options.disabled,
            going=going,
            leaving=leaving,
            logits=each.logits,
            columns=each.columns,
            fast=going is not None and FAST_PRODUCTS not in self._plan.options.disabled,
            one_kernel=going is not None and ONE_KERNEL not in self._plan.options.disabled,
            twice=self._twice,
            bypass=frozenset() if SKIP_LAYERS in self._plan.options.disabled else unseen_layers(self._hosted, each),
        )
        if each.logits is not None and LOGITS in call.sites:
            call.sites = {**call.sites, LOGITS: self._some_logits(call, call.sites[LOGITS])}
        yield from self._asked_for(call, each, each.sites)
        if leaving is not None:
            for slot in each.keeps:
                self._trunks[slot.run] = trunk = leaving.trunk.rows(slot.start, slot.stop, slot.seq)
                self._left(slot.run, trunk)
        for run in each.drops:
            self._trunks.pop(run, None)

    def _some_logits(self, call: ForwardCall, what: SiteCall) -> SiteCall:
        """What happens at the logits, for handlers that see those of some positions; chosen here when all were made."""

        def handle(value: torch.Tensor) -> torch.Tensor | None:
            shown = call.shown if call.narrowed else None
            if call.columns is not None and shown != call.columns:  # nothing is written to logits of some tokens
                where = call.columns if shown is None else [shown.index(token) for token in call.columns]
                value = value[..., torch.tensor(where, device=value.device)]
            if call.narrowed:
                return what.handler(value)
            assert call.logits is not None
            rows, at = positions(call.logits, value.device)
            new = what.handler(value[rows, at].unsqueeze(0))
            if new is None:
                return None
            result = value.clone()
            result[rows, at] = new[0]
            return result

        return SiteCall(handle, what.writes)

    def _asked_for(
        self, call: ForwardCall, each: Pass, sites: Mapping[str, Actions]
    ) -> Generator[ForwardCall, None, None]:
        yield call
        self._forwards += 1
        self._layers_run += call.layers_run
        self._layers_compiled += call.layers_compiled
        self._layers_bypassed += call.layers_bypassed
        self._fused += call.fused
        self._fast += call.fast_positions
        self._in_one += call.kernel_elements
        if call.error is not None:
            raise call.error
        if call.stop_at is None or call.stop_at not in call.reached:
            self._check_reached(each, sites, call.reached)

    def _site_call(self, site: str, moment: Actions, rows: int) -> SiteCall:
        axes = self._hosted.card.site(site).sequence_axes
        return SiteCall(
            lambda value: self._happen_at(value, axes, moment),
            moment.writes,
            self._constant_write(site, moment, rows, newest=False),
        )

    def _constant_write(self, site: str, moment: Actions, rows: int, *, newest: bool) -> ConstantWrite | None:
        """What happens at a site, where that is to write one constant at every position; `newest`: there is but one."""
        *before, write = moment.steps
        if self._alone or site == LOGITS or FUSE_WRITES in self._plan.options.disabled:
            return None
        if not isinstance(write, Write):
            return None
        index = write.index
        if newest and len(index) > 1 and index[1] in (("int", -1), ("int", 0)):
            index = (index[0], *index[2:])
        if any(item != _ALL for item in index):
            return None
        if not all(isinstance(step, Compute) and step.op == "const" and not step.outputs for step in before):
            return None
        dims, spec = self._hosted.card.site(site).dims, self._plan.specs[write.value]
        constant = isinstance(spec, TensorSpec) and spec.scalar is None and spec.shape == dims[2:]
        everything = write.slot.start == 0 and write.slot.stop == rows and write.slot.flat is None
        if dims[:2] != ("rows", "seq") or not constant or not everything:
            return None

        def value() -> torch.Tensor:
            for step in before:
                assert isinstance(step, Compute)
                self._compute(step)
            made: torch.Tensor = self._values[write.value]
            return made

        return ConstantWrite(write.mode, value, lambda: self._forget(write.free))

    # --- a generating run

    def _generation(self, each: Pass) -> Generator[ForwardCall, None, None]:
        self._check_cancelled()
        self._happen(each.before)
        off = self._plan.options.disabled
        shared = self._hosted.decodes_together and not self._alone and not {COBATCH, CONTINUOUS_BATCHING} & set(off)
        self._decoding = decoding = Decoding(self._hosted, each, shared=shared)
        if shared and self._prompts is not None:
            self._prompts.begin(decoding, each)
        try:
            for step in each.steps:
                self._happen(step.before)
                if decoding.ended:
                    decoding.leave()
                    self._absent(step)
                    continue
                self._check_cancelled()
                first = decoding.first
                seq = each.seq - first if decoding.step == 0 else 1
                self._positions += each.rows * seq
                self._known += each.rows * first
                self._gone = decoding.gone
                call = ForwardCall(
                    rows=each.rows,
                    seq=seq,
                    tokens=tuple(row[first:] for row in each.tokens) if first else each.tokens,
                    inputs={},
                    sites={site: self._step_call(decoding, site, moment) for site, moment in step.sites.items()},
                    stop_at=None,
                    alone=not shared,
                    cancelled=self._cancelled,
                    values=self._values,
                    decoding=decoding,
                    twice=self._twice,
                )
                yield from self._asked_for(call, each, step.sites)
                if self._prompts is not None:
                    self._prompts.end(decoding, each)
        finally:
            decoding.leave()
            self._decoding = self._gone = None

    def _step_call(self, decoding: Decoding, site: str, moment: Actions) -> SiteCall:
        dims = self._hosted.card.site(site).dims
        axes = tuple(i for i in self._hosted.card.site(site).sequence_axes if decoding.step == 0 or dims[i] != "key")
        handler = decoding.seen_through(site, dims, self._fitting(decoding, site, axes, moment))
        constant = self._constant_write(site, moment, decoding.rows, newest=decoding.step > 0)
        return SiteCall(handler, moment.writes, constant)

    def _fitting(
        self, decoding: Decoding, site: str, axes: Sequence[int], moment: Actions
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """What happens at a site of a step, once it is known to have the shape that the card says."""
        access = next((step for step in moment.steps if isinstance(step, (Read, Write))), None)
        if access is None or decoding.step == 0:  # other prompts of the same forward may be longer
            return lambda value: self._happen_at(value, axes, moment)
        run = self._plan.graph.runs[access.slot.run]
        shape = self._hosted.card.site_shape(self._hosted.card.site(site), run, decoding.step)

        def handle(value: torch.Tensor) -> torch.Tensor | None:
            self._check_shape(value, shape, access.node)
            return self._happen_at(value, axes, moment)

        return handle

    def _check_shape(self, value: torch.Tensor, shape: Sequence[int], node: int) -> None:
        """A model that forgets what lies behind a window, say, has other shapes than its card."""
        if tuple(value.shape) != tuple(shape):
            reason = f"the site holds {list(value.shape)} while tokens are generated, not {list(shape)}"
            raise self._named(GraphError(reason), node)

    def _absent(self, step: Forward) -> None:
        """A step that no row lived to see: what it reads is zero, what it writes changes nothing."""
        for moment in step.sites.values():
            for action in moment.steps:
                if isinstance(action, Read):
                    spec = self._plan.specs[action.node]
                    assert isinstance(spec, TensorSpec)
                    dtype = to_torch_dtype(spec.dtype)
                    zero = torch.zeros(spec.shape, dtype=dtype, device=self._hosted.device)
                    self._values[action.node] = self._begin_gradients(zero) if action.differentiated else zero
                elif isinstance(action, Write):
                    self._forget(action.free)
                else:
                    self._happen(Actions((action,)))

    def _check_reached(self, each: Pass, sites: Mapping[str, Actions], reached: set[str]) -> None:
        """What a forward never came to has no value: an image tower, say, in a run without images."""
        for site, moment in sites.items():
            if site not in reached and moment.steps:
                reason = f"the forward never reached the site {site!r}"
                optional = [s.name for s in self._hosted.card.inputs if not s.required and s.name not in each.inputs]
                if optional:
                    reason += f"; the run was given no {' and no '.join(map(repr, optional))}"
                first = next((step for step in moment.steps if isinstance(step, (Read, Write))), moment.steps[0])
                raise self._named(GraphError(reason), first.node)

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise _cancelled()

    # --- one moment

    def _happen(self, moment: Actions) -> None:
        for step in moment.steps:
            if isinstance(step, Compute):
                self._compute(step)
            elif isinstance(step, Generated):
                assert self._decoding is not None
                self._values[step.node] = self._decoding.so_far.to(self._hosted.device, copy=True)
            else:
                assert isinstance(step, Emit)
                self._send(step.node, step.outputs)
                self._forget(step.free)

    def _happen_at(self, value: torch.Tensor, axes: Sequence[int], moment: Actions) -> torch.Tensor | None:
        """Everything at one site; returns its new value when something was written."""
        current, owned = value, False
        self._borrowed = {_storage(value)}
        for step in moment.steps:
            if isinstance(step, Compute):  # nearly all of them, in a graph that does much
                self._compute(step)
                continue
            if isinstance(step, Read):
                seen = seen_rows(current, axes, step.slot)
                if step.part is not None:
                    seen = self._taken(seen, step.part)
                if step.columns is not None:
                    seen = seen[..., torch.tensor(step.columns, device=seen.device)]
                seen = self._living(seen, step.node)
                owned = False  # somebody looks at it now: the next write works on a copy
                if step.differentiated:
                    seen = self._begin_gradients(seen)
                    current = self._resumed(current, seen, axes, step.slot)
                self._values[step.node] = seen
                continue
            if isinstance(step, Resume):
                current = self._resumed(current, self._values[step.node], axes, step.slot)
                owned = False
                self._forget(step.free)
                continue
            if isinstance(step, Write):
                try:
                    current = self._write(current, axes, step, owned)
                except GraphError as error:
                    raise self._named(error, step.node) from None
                owned = True
                self._borrowed.add(_storage(current))
            else:
                assert isinstance(step, Emit)
                self._send(step.node, step.outputs)
            self._forget(step.free)
        for node in moment.survivors:
            kept = self._values.get(node)
            if isinstance(kept, torch.Tensor):
                self._values[node] = self._returned(kept)
            elif isinstance(kept, tuple):
                self._values[node] = tuple(map(self._returned, kept))
        self._borrowed = set()
        return current if current is not value else None

    def _taken(self, seen: torch.Tensor, part: Part) -> torch.Tensor:
        """The positions of a value that are used, those that were not computed taken from the base's."""
        own = seen.narrow(part.axis, part.start, part.count)
        if part.before is not None:
            earlier: torch.Tensor = self._values[part.before]
            own = torch.cat([earlier.narrow(part.axis, part.before_start, part.before_count), own], dim=part.axis)
        return own.contiguous()

    def _living(self, seen: torch.Tensor, node: int) -> torch.Tensor:
        """In a generating run: `seen` with zeros in the rows that have stopped."""
        if self._decoding is None:
            return seen
        spec = self._plan.specs[node]
        assert isinstance(spec, TensorSpec)
        self._check_shape(seen, spec.shape, node)
        return seen if self._gone is None else seen.index_fill(0, self._gone, 0)

    def _write(self, current: torch.Tensor, axes: Sequence[int], step: Write, owned: bool) -> torch.Tensor:
        slot, new = step.slot, self._values[step.value]
        if isinstance(new, torch.Tensor):
            new = new.to(current.dtype)
        arrays = [self._values[i] for i in step.indices]
        for array, seq, by in step.moved:
            arrays[array] = arrays[array].remainder(seq) - by
        if slot.covers(current, axes) and not step.index:
            return _meet(current, new, step.mode)
        result = current if owned else current.clone()
        part = own_rows(result, axes, slot)
        target = left_padded(part, axes, slot) if slot.ragged else part
        if step.mode != "set":
            new = _meet(index_get(target, step.index, arrays), new, step.mode)
        index_put(target, step.index, arrays, new)
        if slot.ragged:
            write_back(part, target, axes, slot)
        return result

    def _resumed(self, current: torch.Tensor, shown: torch.Tensor, axes: Sequence[int], slot: Slot) -> torch.Tensor:
        """`current` with a run's rows replaced by what its user was shown, so that the model depends on that value."""
        if slot.covers(current, axes):
            return shown
        result = current.clone()
        part = own_rows(result, axes, slot)
        if slot.ragged:
            write_back(part, shown, axes, slot)
        else:
            part.copy_(shown)
        return result

    def _begin_gradients(self, value: torch.Tensor) -> torch.Tensor:
        """`value`, in memory of its own, as something to differentiate by; from here on, operations are recorded."""
        torch.set_grad_enabled(True)
        return value.clone() if value.requires_grad else value.detach().clone().requires_grad_()

    def _gradients(self, step: Compute) -> tuple[torch.Tensor, ...]:
        metric, *wrt = (self._values[a] for a in step.args)
        how = self._plan.gradients[step.node]
        parts = take_gradients(metric, wrt, keep=how.shared, twice=how.twice)
        if not how.twice:
            parts = tuple(part.detach() for part in parts)
        torch.set_grad_enabled(how.goes_on)
        for node, value in self._values.items():  # the recorded operations, and what they hold, are let go
            if node not in how.needed:
                self._values[node] = detached(value)
        return parts

    def _compute(self, step: Compute) -> None:
        if self._cancelled():  # a graph may hold far more work than the model's own layers
            raise _cancelled()
        node, op, function, args, attrs, outputs, free, differentiated = step
        values = self._values
        try:
            if function is None:
                values[node] = self._structural(step)
            elif len(args) == 2 and not attrs:
                values[node] = function(values[args[0]], values[args[1]])
            elif args:
                values[node] = function(*[values[a] for a in args], **attrs)
            else:
                with self._hosted.device:  # operations without arguments make tensors on torch's default device
                    values[node] = function(**attrs)
        except GraphError as error:
            raise self._named(error, node) from None
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not of this graph
            raise
        except RuntimeError as error:  # what a kernel can only find out from the data: a singular matrix, say
            reason = str(error).partition("\n")[0]
            raise self._named(GraphError(f"{op} failed: {reason}"), node) from error
        if differentiated:
            values[node] = self._begin_gradients(values[node])
        if outputs:
            self._send(node, outputs)
        for each in free:
            values.pop(each, None)

    def _constant(self, value: TensorData) -> torch.Tensor:
        kept = self._constants
        if kept is None or not isinstance(value, KeyedTensor) or ARTIFACT_CACHE in self._plan.options.disabled:
            return to_tensor(value, self._hosted.device)
        tensor, saved = kept.take(value, self._hosted.device)
        self._not_copied += saved
        return tensor

    def _structural(self, step: Compute) -> Any:
        if step.op == "const":
            value: TensorData | None = step.attrs["value"]
            return step.attrs["scalar"] if value is None else self._constant(value)
        if step.op == "param.read":
            return self._hosted.parameters[step.attrs["name"]].of(self._hosted.model)
        if step.op == "item":
            return self._values[step.args[0]][step.attrs["index"]]
        if step.op == "grad":
            return self._gradients(step)
        if step.op in BODY_ATTRS:
            return self._run_loop(step)
        assert step.op == "call", step.op
        return self._hosted.callables[step.attrs["target"]](self._values[step.args[0]])

    def _run_loop(self, step: Compute) -> tuple[torch.Tensor, ...]:
        if self._loops is None:
            hosted, plan = self._hosted, self._plan
            disabled = (*plan.options.disabled, *((SIDE_BY_SIDE,) if plan.options.deterministic else ()))
            self._loops = Loops(plan.graph, hosted.device, hosted.callables, self._check_cancelled, disabled)
        return self._loops.run(step.op, step.attrs, [self._values[a] for a in step.args])

    def _send(self, node: int, names: Sequence[str]) -> None:
        if not names:
            return
        value = self._values[node]
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        self._copies.send(self._returned(tensor), names)

    def _returned(self, value: torch.Tensor) -> torch.Tensor:
        """`value` in memory of its own."""
        return value.clone() if _storage(value) in self._borrowed else value

    def _forget(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._values.pop(node, None)

    def _named(self, error: GraphError, node: int) -> GraphError:
        if error.node is None:
            error.node = self._plan.origin[node]
            error.field = error.field or f"nodes[{error.node}]"
        return error


def _cancelled() -> RequestCancelledError:
    return RequestCancelledError("the request was cancelled")


def _meet(current: torch.Tensor, new: Any, mode: str) -> torch.Tensor:
    if mode == "add":
        return current + new
    if mode == "mul":
        return current * new
    if isinstance(new, torch.Tensor):
        return new.expand(current.shape).clone()
    return torch.full_like(current, new)


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()
