"""One tiny forward, written down: which module took and gave which tensor, in which order.

The binding is derived from such a recording, not from the names that a family happens to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from patchbay_server.models import attention
from patchbay_server.models.inputs import forward
from patchbay_server.models.taps import first_tensor


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: the module's name in the model.
        module: the module.
        start, end: ticks of a counter that goes up at each entry and each return.
        input: its first tensor input, or None.
        output: the first tensor of its output, or None.
    """

    path: str
    module: torch.nn.Module
    start: int
    end: int = -1
    input: torch.Tensor | None = None
    output: torch.Tensor | None = None


@dataclass
class AttentionCall:
    """One call of the attention function.

    Attributes:
        path: name of the attention module that called it.
        tick: when.
        rot_q, rot_k, v: ``[rows, seq, head, d_head]``, as the attention function received them.
    """

    path: str
    tick: int
    rot_q: torch.Tensor
    rot_k: torch.Tensor
    v: torch.Tensor


@dataclass
class Recording:
    """Everything that one forward did.

    Attributes:
        calls: calls of modules in the order of their beginning.
        attention: calls of the attention function, in order.
        output: the model's first output tensor (logits, or the last hidden state of a bare stack).
        inputs: what it was run on, by name.
    """

    inputs: Mapping[str, torch.Tensor]
    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    output: torch.Tensor | None = None

    def of(self, path: str) -> Call | None:
        """The call of the module at `path` when it was called exactly once, else None."""
        found = [c for c in self.calls if c.path == path]
        return found[0] if len(found) == 1 else None

    def within(self, path: str) -> list[Call]:
        """Calls of modules below `path`, in order."""
        return [c for c in self.calls if c.path.startswith(path + ".")]

    def children(self, path: str) -> list[Call]:
        """Calls made directly below `path`: those that are not inside another call below it."""
        inside = self.within(path)
        return [c for c in inside if not any(o is not c and o.start < c.start and c.end < o.end for o in inside)]


def record(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Recording:
    """Run `model` once on `inputs` and write down what happened; leaves no hook behind."""
    recording = Recording(inputs)
    tick = 0
    open_calls: list[Call] = []
    handles: list[Any] = []

    def advance() -> int:
        nonlocal tick
        tick += 1
        return tick

    def watch(path: str, module: torch.nn.Module) -> None:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            call = Call(path, module, advance(), input=next(tensors, None))
            recording.calls.append(call)
            open_calls.append(call)

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            call = open_calls.pop()
            call.end, call.output = advance(), first_tensor(output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    def watch_attention(path: str, module: torch.nn.Module) -> None:
        seen: dict[str, torch.Tensor] = {}

        def take_q(value: torch.Tensor) -> None:
            seen["q"] = value

        def take_k(value: torch.Tensor) -> None:
            seen["k"] = value

        def take_v(value: torch.Tensor) -> None:
            recording.attention.append(AttentionCall(path, advance(), seen["q"], seen["k"], value))

        for part, take in (("rot_q", take_q), ("rot_k", take_k), ("v", take_v)):
            handles.append(attention.tap(module, part, take, writes=False))

    try:
        for path, module in model.named_modules():
            if path:
                watch(path, module)
                watch_attention(path, module)
        with torch.no_grad():
            recording.output = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recording
