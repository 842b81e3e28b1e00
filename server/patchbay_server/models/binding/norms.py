"""The inside of a normalization module as sites."""

from __future__ import annotations

from patchbay_server.models.binding.compare import norm_form
from patchbay_server.models.binding.found import RESIDUAL, Binding
from patchbay_server.models.recording import Call
from patchbay_server.models.taps import FlatTap, NormTap, Tap


def bind_norm(binding: Binding, prefix: str, call: Call, d_model: int, shape_from: str = "") -> None:
    """``PREFIX.scale`` and ``PREFIX.normalized`` of a norm's call.

    Args:
        binding: where they go.
        prefix: what their names begin with.
        call: of the norm.
        d_model: width of what it normalizes.
        shape_from: where rows and positions share an axis, a module that takes them apart (see FlatTap).
    """
    form = norm_form(call)
    if form is None:
        for part in ("scale", "normalized"):
            binding.absent[f"{prefix}.{part}"] = f"{call.path} computes neither a LayerNorm nor an RMSNorm"
        return
    kind = "standard deviation" if form.centered else "root mean square"
    taps: list[Tap] = [NormTap(call.path, "scale", form), NormTap(call.path, "normalized", form)]
    if shape_from and call.made is not None and len(call.made.shape) == 2:
        taps = [FlatTap(tap, shape_from) for tap in taps]
    binding.add(f"{prefix}.scale", taps[0], (*RESIDUAL, 1), f"{kind} that the input is divided by")
    doc = "normalized input, before gain and bias"
    binding.add(f"{prefix}.normalized", taps[1], (*RESIDUAL, d_model), doc)
