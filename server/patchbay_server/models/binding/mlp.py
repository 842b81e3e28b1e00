"""The hidden activations of one feed-forward module."""

from __future__ import annotations

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import is_linear, same
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.recording import Call
from patchbay_server.models.taps import InputTap, OutputTap


def bind_mlp(block: Block, module: Call | None) -> None:
    names = ("mlp.pre", "mlp.pre_linear", "mlp.post")
    if module is None:
        block.absent("the MLP was not found", "mlp.out", *names)
        return
    block.add("mlp.out", OutputTap(module.path), (*RESIDUAL, block.d_model), "raw output of the MLP module")
    inside = block.recording.within(module.path)
    linear = [c for c in inside if is_linear(c.module)]
    if len(linear) < 2 or linear[-1].input is None or linear[-1].input.ndim != 3:
        block.absent(f"{module.path} is not a feed-forward of linear modules", *names)
        return
    *ups, down = linear
    d_mlp = down.input.shape[-1]  # type: ignore[union-attr]
    block.binding.widths.d_mlp = d_mlp
    dims = (*RESIDUAL, d_mlp)
    block.add("mlp.post", InputTap(down.path), dims, "hidden activations, after nonlinearity and gate")
    act = next((c for c in inside if not is_linear(c.module) and any(same(c.input, u.output) for u in ups)), None)
    fitting = [u for u in ups if u.output is not None and u.output.shape[-1] == d_mlp]
    pre = next((u for u in fitting if act is not None and same(act.input, u.output)), None)
    if pre is None and len(fitting) == 1:
        pre = fitting[0]
    if pre is None:
        block.absent(f"{module.path} fuses its projections or its nonlinearity", "mlp.pre", "mlp.pre_linear")
        return
    block.add("mlp.pre", OutputTap(pre.path), dims, "input of the nonlinearity")
    others = [u for u in fitting if u is not pre]
    if len(others) == 1:
        block.add("mlp.pre_linear", OutputTap(others[0].path), dims, "linear side of the gate")
    else:
        block.absent("the MLP is not gated", "mlp.pre_linear")
