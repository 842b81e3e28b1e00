"""The inside of a state-space layer: convolution, step sizes, input and output matrices, states, readout.

A layer counts as a state space when, with the module's own ``A_log`` and ``D``, the recurrence written out below gives
what the layer computed, from values that the recording holds. Other recurrences (gated delta rules, linear recurrent
units, RWKV) have mixer sites only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import close, is_linear
from patchbay_server.models.binding.flow import op_tap, reaches, strip
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.layouts import Axes
from patchbay_server.models.recording import Op, Value
from patchbay_server.models.taps import OpTap, StepsTap, Tap

#: Every canonical name below ``ssm.``.
STATE_SITES = ("conv", "x", "dt", "B", "C", "state", "y")


@dataclass(frozen=True)
class StateSpace:
    """A recurrence ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``, read out as ``y_t = C_t h_t + D x_t``.

    Attributes:
        module: the one that has A_log and D.
    """

    module: torch.nn.Module

    def states(self, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every state, ``[rows, seq, head, width, state]``, and x as ``[rows, seq, head, width]``.

        Args:
            x: ``[rows, seq, channels]``.
            dt: ``[rows, seq, heads]``; there are as many heads as channels, or fewer.
            b: ``[rows, seq, groups * state]``.
        """
        a_log = self._parameter("A_log")
        a = -torch.exp(a_log.reshape(a_log.shape[0], -1))  # [head, state or 1]
        heads = dt.shape[-1]
        wide = x.float().unflatten(-1, (heads, -1))
        matrix = self._per_head(b, heads, a)
        state = torch.zeros(())
        states = []
        for t in range(x.shape[1]):
            step = dt[:, t].float()[..., None, None]
            entering = step * wide[:, t].unsqueeze(-1) * matrix[:, t].unsqueeze(2)
            state = torch.exp(step * a[None, :, None, :]) * state + entering
            states.append(state)
        return torch.stack(states, 1), wide

    def readout(self, states: torch.Tensor, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y, ``[rows, seq, channels]``, from states ``[rows, seq, head, width, state]`` and x, C as in `states`."""
        skip = self._parameter("D").reshape(-1)
        heads = states.shape[2]
        matrix = self._per_head(c, heads, states)
        wide = x.float().unflatten(-1, (heads, -1))
        out = (states * matrix.unsqueeze(3)).sum(-1)
        return (out + skip.reshape(heads, -1) * wide).flatten(2)

    def _per_head(self, matrix: torch.Tensor, heads: int, like: torch.Tensor) -> torch.Tensor:
        """``[rows, seq, groups * state]`` as ``[rows, seq, head, state]``."""
        size = like.shape[-1] if like.shape[-1] > 1 else matrix.shape[-1]
        groups = matrix.float().unflatten(-1, (-1, size))
        return groups.repeat_interleave(heads // groups.shape[2], 2) if groups.shape[2] > 1 else groups

    def _parameter(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = getattr(self.module, name)
        return parameter.detach().float()


@dataclass
class _Parts:
    """Values of a recurrence, each with its way and the layout that makes it ``[rows, seq, ...]``."""

    x: tuple[Value, Tap, Axes | None]
    dt: tuple[Value, Tap, Axes | None]
    b: tuple[Value, Tap, Axes | None]
    c: tuple[Value, Tap, Axes | None]
    y: tuple[Value, Tap, Axes | None]


def bind_mixer(block: Block, raw: Value) -> None:
    """Derive the sites below ``ssm.`` of a layer whose mixer gives `raw`."""
    ops = block.recording.ops_within(block.path)
    seq = block.given.shape[1]
    conv = next((o for o in ops if o.name == "conv1d" and reaches(raw, o.outputs[0])), None)
    cut = None if conv is None else next((v for v in _after(ops, conv) if v.shape and v.shape[-1] == seq), None)
    owner = next((c for c in reversed(block.map.makers(raw)) if hasattr(c.module, "A_log")), None)
    if owner is None or cut is None or not hasattr(owner.module, "D"):
        reason = "its mixer is not a state space with a convolution, A_log and D that the recording could follow"
        block.absent(reason, *(f"ssm.{n}" for n in STATE_SITES))
        return
    block.add("ssm.conv", _with(op_tap(cut), Axes((0, 2, 1))), (*RESIDUAL, cut.shape[1]), "output of the convolution")
    space = StateSpace(owner.module)
    parts = _find_parts(block, space, ops, cut, raw)
    if parts is None:
        reason = "no values of the recording satisfy the recurrence"
        block.absent(reason, *(f"ssm.{n}" for n in STATE_SITES if n != "conv"))
        return
    block.binding.spaces[block.prefix] = space
    for name, (value, tap, layout), doc in (
        ("x", parts.x, "what enters the recurrence: the convolution's output after its nonlinearity"),
        ("dt", parts.dt, "step sizes, after softplus"),
        ("B", parts.b, "input matrices"),
        ("C", parts.c, "output matrices"),
        ("y", parts.y, "readout of the states plus D times x, before the gate"),
    ):
        shown = _canonical(value, layout)
        block.add(f"ssm.{name}", _with(tap, layout), (*RESIDUAL, *shown.shape[2:]), doc)
    _bind_state(block, ops, parts, seq)


def _after(ops: list[Op], op: Op) -> list[Value]:
    """What `op` gives, and slices of it."""
    made = op.outputs[0]
    return [made, *(o.outputs[0] for o in ops if o.name == "getitem" and o.inputs[0][1] is made)]


def _canonical(value: Value, layout: Axes | None) -> torch.Tensor:
    assert value.tensor is not None
    shown = value.tensor if layout is None else layout.split(value.tensor)
    return shown if shown.ndim == 3 else shown.flatten(2)


def _with(tap: Tap, layout: Axes | None) -> Tap:
    if layout is None or not isinstance(tap, OpTap):
        return tap
    return OpTap(tap.path, tap.place, tap.argument, layout, tap.part)


def _find_parts(block: Block, space: StateSpace, ops: list[Op], conv: Value, raw: Value) -> _Parts | None:
    """Values that satisfy the recurrence."""
    softplus = next((o.outputs[0] for o in ops if o.name == "softplus" and reaches(raw, o.outputs[0])), None)
    readouts = _before_gate(block, raw)
    if softplus is None or not readouts:
        return None
    splits = [
        o for o in ops
        if o.name in ("split", "split_with_sizes", "chunk") and len(o.outputs) == 3
        and o.outputs[1].shape == o.outputs[2].shape and reaches(raw, o.outputs[2])
    ]  # fmt: skip
    activated = [o.outputs[0] for o in ops if o.outputs[0].shape == conv.shape and o.inputs[0][1] is conv]
    seq = block.given.shape[1]
    for split in splits:
        tap = OpTap(split.owner, split.place)
        b, c = (_normed(block, split.outputs[i], OpTap(tap.path, tap.place, part=i)) for i in (1, 2))
        inputs = [(split.outputs[0], OpTap(tap.path, tap.place, part=0)), *((v, op_tap(v)) for v in activated)]
        for value, way in inputs:
            for y, y_tap in readouts:
                found = _Parts(
                    *(
                        (v, t, _layout(v, seq))
                        for v, t in ((value, way), (softplus, op_tap(softplus)), b, c, (y, y_tap))
                    )
                )
                if _satisfied(space, found):
                    return found
    return None


def _layout(value: Value, seq: int) -> Axes | None:
    """The order of axes that puts positions second."""
    shape = value.shape
    return Axes((0, 2, 1)) if len(shape) == 3 and shape[2] == seq and shape[1] != seq else None


def _satisfied(space: StateSpace, parts: _Parts) -> bool:
    try:
        x, dt, b, c, y = (_canonical(v, layout) for v, _, layout in (parts.x, parts.dt, parts.b, parts.c, parts.y))
        states, _ = space.states(x, dt, b)
        return close(space.readout(states, c, x), y.to(x.dtype))
    except (RuntimeError, AssertionError):  # extents that do not fit: not these values
        return False


def _normed(block: Block, value: Value, tap: Tap) -> tuple[Value, Tap]:
    """`value` as it is used: after a norm of its own, where it has one."""
    for call in block.map.readers(value):
        if block.map.is_norm(call) and call.made is not None:
            made = block.map.tap(call.made, call.made.shape)
            if made is not None:
                return call.made, made
    return value, tap


def _before_gate(block: Block, raw: Value) -> list[tuple[Value, Tap]]:
    """What may be the readout: factors of what the output projection takes, or the first input of a gated norm."""
    projection = next((c for c in block.map.makers(raw) if is_linear(c.module)), None)
    if projection is None or projection.given is None:
        return []
    value = strip(projection.given)
    while value.maker is not None and value.maker.name in ("transpose", "permute"):
        value = strip(value.maker.inputs[0][1])
    for call in block.map.makers(value):
        if len(call.takes) > 1 and block.map.once(call):
            return [(v, t) for v in call.takes[:1] if (t := block.map.input_tap(call, v, v.shape)) is not None]
    if value.maker is None or value.maker.name != "mul":
        return []
    return [(strip(v), op_tap(strip(v))) for v in value.maker.operands if strip(v).maker is not None]


def _bind_state(block: Block, ops: list[Op], parts: _Parts, seq: int) -> None:
    """The states, where the model computes them one position at a time."""
    x = _canonical(parts.x[0], parts.x[2])
    size = parts.b[0].shape[-1] if parts.b[2] is None else parts.b[0].shape[1]
    wanted = (x.shape[0], x.shape[2], size)
    for op in ops:
        if op.name != "add" or op.place.occurrence or op.outputs[0].shape != wanted:
            continue
        same = [o for o in ops if o.owner == op.owner and o.place.at == op.place.at]
        if len(same) == seq:
            block.add(
                "ssm.state",
                StepsTap(op.owner, op.place, seq_from=block.path),
                (*RESIDUAL, x.shape[2], size),
                "state after each position",
                read_only="each position's state is computed from the one before it: write x, B or dt",
            )
            return
    block.absent("the reference path computes no state for each position (it works in chunks)", "ssm.state")
