"""Low-rank adapters (Hu et al. 2021, LoRA) as edits of a model: ``model.edited(methods.lora("adapter/"))``.

An adapter in the form of Hugging Face's PEFT, a folder or a dict of its tensors, becomes a named, versioned function
that adds ``scale * (x @ A.T) @ B.T`` to what each adapted module makes of ``x``. It lives in the client's traces: the
hosted model is not touched, several users' adapters and other edits stack.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.arrays import as_array, to_array, to_data
from patchbay.errors import TraceError
from patchbay.tracing.fragments import Function

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.tracing.runs import Run

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>A|B)(?:\.\w+)?(?:\.weight)?")


def lora(
    adapter: str | os.PathLike[str] | Mapping[str, Any],
    *,
    alpha: float | None = None,
    rslora: bool = False,
    name: str = "lora",
) -> Callable[[Run], None]:
    """An adapter as an edit.

    Args:
        adapter: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT writes it; or its
            tensors by name: ``lora_A`` is ``[rank, d_in]``, ``lora_B`` ``[d_out, rank]``.
        alpha: numerator of the scale; from the folder's configuration, else the rank, so that the scale is 1.
        rslora: whether the scale is ``alpha / sqrt(rank)`` and not ``alpha / rank``.
        name: what it is called in printed graphs; the version is a digest of its tensors.

    Returns:
        A function of a run, for `patchbay.model.Model.edited`.

    Raises:
        TraceError: no low-rank tensors, or one without its other half; a kind of adapter that is not this.
    """
    if isinstance(adapter, (str, os.PathLike)):
        tensors, config = _read(Path(adapter))
        alpha = float(config.get("lora_alpha", 0.0)) or None if alpha is None else alpha
        rslora = bool(config.get("use_rslora", rslora))
        if config.get("use_dora") or config.get("alpha_pattern") or config.get("rank_pattern"):
            raise TraceError("adapters with DoRA or with scales of their own for some modules are not this method's")
    else:
        tensors = {key: as_array(value) for key, value in adapter.items()}
    pairs = _pairs(tensors)
    digest = hashlib.sha256()
    for module, parts in sorted(pairs.items()):
        for part in ("A", "B"):
            digest.update(f"{module}.{part}{parts[part].shape};".encode() + bytes(to_data(parts[part]).data))

    def adapt(run: Run) -> None:
        for module, parts in pairs.items():
            rank = parts["A"].shape[0]
            scale = (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)
            place = run.module(module)
            down, up = (run.trace.constant(parts[p].astype("float32")) for p in ("A", "B"))
            place.output = place.output + ((place.input @ down.T) @ up.T) * scale

    return Function(adapt, name, digest.hexdigest()[:8])


def _read(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    from patchbay.saving import read_safetensors

    try:
        tensors = {n: to_array(t) for n, t in read_safetensors(folder / "adapter_model.safetensors").items()}
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"{folder} holds no adapter as PEFT writes it: {error}") from error
    return tensors, config


def _pairs(tensors: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    pairs: dict[str, dict[str, NDArray[Any]]] = {}
    for key, value in tensors.items():
        found = _NAME.fullmatch(key)
        if found is None or value.ndim != 2:
            raise TraceError(f"{key!r} is no low-rank matrix; adapters of linear modules have lora_A and lora_B")
        pairs.setdefault(found["module"], {})[found["part"]] = value
    for module, parts in pairs.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise TraceError(f"{module}: lora_A is [rank, d_in] and lora_B is [d_out, rank]; one is missing or differs")
    if not pairs:
        raise TraceError("the adapter holds no low-rank matrices")
    return pairs
