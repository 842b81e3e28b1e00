"""Questions about where a value of a recording came from and where it can be tapped."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from patchbay_server.models.binding.compare import norm_form
from patchbay_server.models.recording import Call, Op, Recording, Value
from patchbay_server.models.taps import FlatTap, InputTap, OpTap, OutputTap, Tap

#: Functions that multiply or divide.
_SCALES = frozenset({"mul", "div"})


def strip(value: Value) -> Value:
    """The value that `value` is a copy, a reshape or a cast of; itself when something was computed."""
    if value.core is None:
        source = _copied_from(value)
        value.core = value if source is None else strip(source)
    return value.core


def _copied_from(value: Value) -> Value | None:
    maker, tensor = value.maker, value.tensor
    if maker is None or tensor is None or not maker.inputs or len(maker.outputs) != 1:
        return None
    where, source = maker.inputs[0]
    if where != 0 or source.tensor is None or source.tensor.numel() != tensor.numel():
        return None
    if source.tensor.is_floating_point() != tensor.is_floating_point() or maker.name in _SCALES:
        return None
    if maker.name in ("transpose", "permute", "T", "mT", "swapaxes", "movedim"):
        return None
    same = torch.equal(source.tensor.reshape(-1).to(tensor.dtype), tensor.reshape(-1))
    return source if same else None


def equal(a: Value | None, b: Value | None) -> bool:
    """Whether one is a copy or reshape of the other, by their histories."""
    return a is not None and b is not None and strip(a) is strip(b)


def ancestors(value: Value, stop: Collection[Value] = ()) -> Iterator[Op]:
    """The operations that `value` was computed by, nearest first, not looking behind `stop` (compared stripped)."""
    barred = {id(strip(s)) for s in stop}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if id(strip(current)) in barred or current.maker is None or id(current.maker) in seen:
            continue
        seen.add(id(current.maker))
        yield current.maker
        waiting.extend(v for _, v in current.maker.inputs)


def reaches(value: Value, source: Value, stop: Collection[Value] = ()) -> bool:
    """Whether `value` was computed from `source`."""
    wanted = strip(source)
    if strip(value) is wanted:
        return True
    return any(strip(v) is wanted for op in ancestors(value, stop) for _, v in op.inputs)


class Map:
    """Which calls of a part of the model gave or took which values."""

    def __init__(self, recording: Recording, path: str) -> None:
        self.recording, self.path = recording, path
        self.calls = recording.within(path)
        self._made: dict[int, list[Call]] = {}
        self._given: dict[int, list[Call]] = {}
        for call in self.calls:
            if call.made is not None:
                self._made.setdefault(id(strip(call.made)), []).append(call)
            if call.given is not None:
                self._given.setdefault(id(strip(call.given)), []).append(call)
        self._norms: dict[str, bool] = {}
        self._users: dict[int, list[Op]] = {}
        for op in recording.ops_within(path):
            for _, taken in op.inputs:
                self._users.setdefault(id(strip(taken)), []).append(op)

    def used_before(self, value: Value, tick: int) -> bool:
        """Whether something is computed from `value` (a copy of it does not count) before `tick`."""
        core = strip(value)
        return any(
            op.tick < tick and all(strip(o) is not core for o in op.outputs) for op in self._users.get(id(core), ())
        )

    def taken_twice(self, given: Value, value: Value) -> bool:
        """Whether `value` alone is computed from `given`, by more than one module or argument."""
        readers = [c for c in self.calls if sum(strip(v) is strip(given) for v in c.takes)]
        outer = [c for c in readers if not any(o is not c and o.start < c.start and c.end < o.end for o in readers)]
        count = sum(sum(strip(v) is strip(given) for v in c.takes) for c in outer)
        return count > 1 and all(c.made is not None and reaches(value, c.made, (given,)) for c in outer)

    def makers(self, value: Value) -> list[Call]:
        """Calls whose output `value` is, innermost first."""
        return sorted(self._made.get(id(strip(value)), []), key=lambda c: c.end)

    def readers(self, value: Value) -> list[Call]:
        """Calls that `value` is the first tensor input of, in order."""
        return self._given.get(id(strip(value)), [])

    def is_norm(self, call: Call) -> bool:
        """Whether the call computes a LayerNorm or an RMSNorm."""
        if call.path not in self._norms:
            self._norms[call.path] = norm_form(call) is not None
        return self._norms[call.path]

    def norm_behind(self, value: Value) -> Call | None:
        """The norm whose output `value` is."""
        return next((c for c in self.makers(value) if self.is_norm(c)), None)

    def once(self, call: Call) -> bool:
        """Whether the call's module was called this one time."""
        return self.recording.of(call.path) is call

    def tap(self, value: Value, shape: torch.Size | tuple[int, ...]) -> Tap | None:
        """A place through which everything that uses `value` (a result of this part) gets it.

        The output of the outermost module that gives it, else of the operation that makes it. A model that keeps rows
        and positions in one axis is shown with the two apart.
        """
        flat = (shape[0] * shape[1], *shape[2:])
        for wanted, is_flat in ((tuple(shape), False), (flat, True)):
            fitting = [c for c in self.makers(value) if c.made is not None and c.made.shape == wanted and self.once(c)]
            fitting = [c for c in fitting if not self.used_before(value, c.end)]
            if fitting:
                return self._shown(OutputTap(fitting[-1].path), is_flat)
        core = strip(value)
        for wanted, is_flat in ((tuple(shape), False), (flat, True)):
            if core.maker is not None and core.shape == wanted and len(core.maker.outputs) == 1:
                return self._shown(op_tap(core), is_flat)
        return None

    def input_tap(self, call: Call, value: Value, shape: torch.Size | tuple[int, ...]) -> Tap | None:
        """The input of `call` that `value` is."""
        for part, taken in enumerate(call.takes):
            if strip(taken) is strip(value) and self.once(call):
                if taken.shape == tuple(shape):
                    return InputTap(call.path, part=part)
                if taken.shape == (shape[0] * shape[1], *shape[2:]):
                    return self._shown(InputTap(call.path, part=part), True)
        return None

    def _shown(self, tap: Tap, is_flat: bool) -> Tap:
        return FlatTap(tap, shape_from=self.path) if is_flat else tap


def op_tap(value: Value) -> OpTap:
    """The tap on the operation that makes `value`."""
    assert value.maker is not None
    return OpTap(value.maker.owner, value.maker.place)


def behind_scaling(value: Value) -> tuple[Value, Op] | None:
    """What `value` is a multiple of, when it is one by a number or by one factor per feature."""
    maker = strip(value).maker
    if maker is None or maker.name not in _SCALES or value.tensor is None:
        return None
    wide = [v for v in maker.operands if v.tensor is not None and v.tensor.shape == maker.outputs[0].shape]
    if len(wide) != 1 or (maker.inputs[0][1] is not wide[0] and maker.name == "div"):
        return None
    others = [v for v in maker.operands if v is not wide[0]]
    if all(v.tensor is None or (v.tensor.ndim <= 1 and v.maker is None) for v in others):
        return wide[0], maker
    return None
