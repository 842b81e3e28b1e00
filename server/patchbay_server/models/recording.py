"""One tiny forward, written down: which module took and gave which tensor, and which operation made each from which.

The binding is derived from such a recording, not from the names that a family happens to use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from patchbay_server.models import attention
from patchbay_server.models.inputs import forward
from patchbay_server.models.operations import OpPlace, calling_frame, op_name
from patchbay_server.models.taps import first_tensor

#: Tensors of more elements (weights, mostly) are not copied while recording.
_LARGEST_COPY = 2**22


@dataclass(eq=False)
class Value:
    """One tensor at one moment; an operation in place makes a new one.

    Attributes:
        tensor: a copy of its content, or None when it was too large to keep.
        maker: the operation that made it, or None for inputs and parameters.
        core: the value that it is a copy or a reshape of, once somebody has asked.
    """

    tensor: torch.Tensor | None
    maker: Op | None = None
    core: Value | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.tensor is None else tuple(self.tensor.shape)


@dataclass(eq=False)
class Op:
    """One call of one torch function.

    Attributes:
        place: its name, its place in the source, and how often that place had run before in the same module call.
        owner: path of the innermost module that was running.
        tick: when.
        inputs: the tensors among its arguments, with the argument's position or keyword; with -1, the former
            contents of tensors that it changes in place.
        outputs: the tensors that it returned.
    """

    place: OpPlace
    owner: str
    tick: int
    inputs: tuple[tuple[int | str, Value], ...]
    outputs: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def operands(self) -> tuple[Value, ...]:
        """The tensors among its arguments, in order."""
        return tuple(v for where, v in self.inputs if where != -1)


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: the module's name in the model.
        module: the module.
        start, end: ticks of a counter that goes up at each entry, each return and each operation.
        given, made: its first tensor input and the first tensor of its output.
        takes, makes: every tensor among its arguments and in its output.
        eps: what torch's layer_norm or rms_norm added to the variance, when the module called one itself.
    """

    path: str
    module: torch.nn.Module
    start: int
    end: int = -1
    given: Value | None = None
    made: Value | None = None
    takes: tuple[Value, ...] = ()
    makes: tuple[Value, ...] = ()
    eps: float | None = None

    @property
    def input(self) -> torch.Tensor | None:
        """Content of the first tensor input, or None."""
        return None if self.given is None else self.given.tensor

    @property
    def output(self) -> torch.Tensor | None:
        """Content of the first tensor of the output, or None."""
        return None if self.made is None else self.made.tensor


@dataclass
class AttentionCall:
    """One call of the attention function.

    Attributes:
        path: name of the attention module that called it.
        tick: when.
        rot_q, rot_k, v: ``[rows, seq, head, d_head]``, as the attention function received them.
        q_value, k_value, v_value: the same with their history, ``[rows, head, seq, d_head]``.
        z: the function's output, ``[rows, seq, head, d_head]``.
        z_value: the same with its history.
        extras: names of further tensors that the function was given (sinks, a position bias).
    """

    path: str
    tick: int
    rot_q: torch.Tensor
    rot_k: torch.Tensor
    v: torch.Tensor
    q_value: Value
    k_value: Value
    v_value: Value
    z: torch.Tensor
    z_value: Value
    extras: frozenset[str] = frozenset()


@dataclass
class Recording:
    """Everything that one forward did.

    Attributes:
        inputs: what it was run on, by name.
        calls: calls of modules in the order of their beginning.
        attention: calls of the attention function, in order.
        ops: calls of torch functions, in order.
        output: the model's first output tensor (logits, or the last hidden state of a bare stack).
        result: the same with its history.
    """

    inputs: Mapping[str, torch.Tensor]
    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    output: torch.Tensor | None = None
    result: Value | None = None

    def of(self, path: str) -> Call | None:
        """The call of the module at `path` when it was called exactly once, else None."""
        found = [c for c in self.calls if c.path == path]
        return found[0] if len(found) == 1 else None

    def within(self, path: str) -> list[Call]:
        """Calls of modules below `path`, in order."""
        return [c for c in self.calls if c.path.startswith(path + ".")]

    def ops_within(self, path: str) -> list[Op]:
        """Operations of the module at `path` and those below it, in order."""
        return [o for o in self.ops if o.owner == path or o.owner.startswith(path + ".")]

    def children(self, path: str) -> list[Call]:
        """Calls made directly below `path`: those that are not inside another call below it."""
        inside = self.within(path)
        return [c for c in inside if not any(o is not c and o.start < c.start and c.end < o.end for o in inside)]


def record(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Recording:
    """Run `model` once on `inputs` and write down what happened; leaves no hook behind."""
    recorder = _Recorder(Recording(inputs))
    try:
        for path, module in model.named_modules():
            recorder.watch(path, module)
        with torch.no_grad(), recorder:
            output = forward(model, inputs)
    finally:
        recorder.remove()
    recorder.recording.output, recorder.recording.result = output, recorder.value_of(output)
    return recorder.recording


class _Recorder(TorchFunctionMode):
    """Sees every torch function while it is active, and every module that it watches."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self._tick = 0
        self._open: list[Call] = []
        self._handles: list[Any] = []
        self._values: dict[int, Value] = {}
        self._alive: list[torch.Tensor] = []  # keeps ids from being used again
        self._sharing: dict[int, list[torch.Tensor]] = {}  # by address of the memory
        self._counts: list[dict[OpPlace, int]] = [{}]

    def advance(self) -> int:
        self._tick += 1
        return self._tick

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    # --- values

    def value_of(self, tensor: torch.Tensor) -> Value:
        """What is known of `tensor` now."""
        known = self._values.get(id(tensor))
        return known if known is not None else self._bind(tensor, None)

    def _bind(self, tensor: torch.Tensor, maker: Op | None) -> Value:
        copy = None
        if tensor.numel() <= _LARGEST_COPY and not isinstance(tensor, torch.nn.Parameter):
            copy = tensor.detach().clone()
        value = Value(copy, maker)
        if id(tensor) not in self._values:
            self._alive.append(tensor)
            self._sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._values[id(tensor)] = value
        return value

    # --- operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = op_name(func)
        tensors = [*_tensors(args), *((k, t) for k, v in named.items() for _, t in _tensors((v,)))]
        if not tensors and name in _SILENT:
            return func(*args, **named)
        file, function, offset = calling_frame()
        key = OpPlace(name, file, function, offset, 0)
        counts = self._counts[-1]
        place = OpPlace(name, file, function, offset, counts.get(key, 0))
        counts[key] = place.occurrence + 1
        owner = self._open[-1].path if self._open else ""
        inputs = tuple((where, self.value_of(t)) for where, t in tensors)
        if name.endswith("_as"):  # of the others only the shape or the dtype counts
            inputs = inputs[:1]
        elif name.endswith("_like") or name.startswith("new_"):
            inputs = ()
        if name in ("layer_norm", "rms_norm") and self._open:
            given = named.get("eps", args[-1] if isinstance(args[-1], float) else None)
            self._open[-1].eps = 1e-5 if given is None and name == "layer_norm" else given
        changed = self._changed_by(func, args)
        aliases = [(t, self.value_of(t)) for t in changed]
        output = func(*args, **named)
        op = Op(place, owner, self.advance(), (*inputs, *((-1, v) for _, v in aliases)))
        results = [t for _, t in _tensors((output,))]
        if not results and aliases:
            results = [args[0]]
        op.outputs = tuple(self._bind(t, op) for t in results)
        for tensor, _ in aliases:
            if not any(tensor is r for r in results):
                self._bind(tensor, op)
        if results:
            self.recording.ops.append(op)
        return output

    def _changed_by(self, func: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The known tensors whose content an operation in place changes: those that share memory with its target."""
        name: str = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        in_place |= name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        if not in_place or not args or not isinstance(args[0], torch.Tensor):
            return []
        return list(self._sharing.get(args[0].untyped_storage().data_ptr(), [args[0]]))

    # --- modules

    def watch(self, path: str, module: torch.nn.Module) -> None:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            takes = tuple(self.value_of(t) for _, t in _tensors((*args, *kwargs.values())))
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            call = Call(path, module, self.advance(), given=None if given is None else self.value_of(given))
            call.takes = takes
            if path:
                self.recording.calls.append(call)
            self._open.append(call)
            self._counts.append({})

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            call = self._open.pop()
            self._counts.pop()
            made = first_tensor(output)
            call.end, call.made = self.advance(), None if made is None else self.value_of(made)
            call.makes = tuple(self.value_of(t) for _, t in _tensors((output,)))

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))
        if path:
            self._handles.append(attention.observe(module, lambda *seen: self._attended(path, *seen)))

    def _attended(
        self,
        path: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        extras: frozenset[str],
    ) -> None:
        q, k, v, z = (self.value_of(t) for t in (query, key, value, output))
        rot_q, rot_k, heads_v = (t.detach().transpose(1, 2).clone() for t in (query, key, value))
        heads_z = output.detach().clone()
        call = AttentionCall(path, self.advance(), rot_q, rot_k, heads_v, q, k, v, heads_z, z, extras)
        self.recording.attention.append(call)


#: Functions that tell about tensors without making any.
_SILENT = frozenset({"get", "shape", "dtype", "device"})


def _tensors(values: Sequence[Any], where: int | str | None = None) -> Iterator[tuple[int | str, torch.Tensor]]:
    for position, value in enumerate(values):
        place = position if where is None else where
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value, place)
        elif hasattr(value, "to_tuple"):
            yield from _tensors(value.to_tuple(), place)


__all__ = ["AttentionCall", "Call", "Op", "Recording", "Value", "forward", "record"]
