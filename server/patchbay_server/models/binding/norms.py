"""The inside of a normalization module as sites."""

from __future__ import annotations

from patchbay_server.models.binding.compare import norm_form
from patchbay_server.models.binding.found import RESIDUAL, Binding
from patchbay_server.models.recording import Call
from patchbay_server.models.taps import NormTap


def bind_norm(binding: Binding, prefix: str, call: Call, d_model: int) -> None:
    form = norm_form(call)
    if form is None:
        for part in ("scale", "normalized"):
            binding.absent[f"{prefix}.{part}"] = f"{call.path} computes neither a LayerNorm nor an RMSNorm"
        return
    kind = "standard deviation" if form.centered else "root mean square"
    binding.add(
        f"{prefix}.scale", NormTap(call.path, "scale", form), (*RESIDUAL, 1), f"{kind} that the input is divided by"
    )
    binding.add(
        f"{prefix}.normalized",
        NormTap(call.path, "normalized", form),
        (*RESIDUAL, d_model),
        "normalized input, before gain and bias",
    )
