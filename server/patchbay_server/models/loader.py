"""From a name to a hosted model: load, instrument, derive, prove, and write the card."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from patchbay.errors import FailedPreconditionError
from patchbay.ir.card import CallableSpec, ModelCard, SiteSpec
from patchbay.ir.dtypes import DTYPES, DType
from patchbay_server.models import attention
from patchbay_server.models.binding import Binding, derive
from patchbay_server.models.hosted import HostedModel, weights_digest
from patchbay_server.models.proofs import Proof, prove, read_all
from patchbay_server.models.recording import Recording, record
from patchbay_server.models.taps import InputTap, OutputTap, Tap

log = logging.getLogger(__name__)

#: Source that stands for the model shipped with Patchbay.
DEMO = "demo"

#: Shapes of the two recordings that tell an extent from a width: rows and tokens differ between them.
_PROBES = ((2, 7), (3, 5))


def load(source: str, *, name: str | None = None, dtype: str = "auto", device: str = "auto") -> HostedModel:
    """Load a causal language model and make it ready.

    Args:
        source: ``"demo"``, the id of a model on the Hugging Face hub, or a folder in its format (safetensors only).
        name: name to serve it under; the last part of `source` when None.
        dtype: ``"auto"`` (as stored) or a floating dtype's name.
        device: ``"auto"`` (cuda where there is one, else cpu) or a torch device.

    Raises:
        FailedPreconditionError: the source cannot be loaded; the message says why and what to try.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source == DEMO:
        from patchbay_server.models.demo import demo_path

        path = str(demo_path())
    else:
        path = source
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype, None)
    if not (kind == "auto" or isinstance(kind, torch.dtype)):
        raise FailedPreconditionError(f"dtype {dtype!r} is not a torch dtype; use auto, float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(
            f"the model {source!r} could not be loaded: {error}\n"
            "Give 'demo', a hub id such as org/name (needs network, or a filled HF cache), or a folder with "
            "config.json and *.safetensors."
        ) from error
    placed: torch.nn.Module = model
    placed.to(where)
    return host(placed, tokenizer, name=name or Path(source).name, source=source)


def host(
    model: torch.nn.Module, tokenizer: Any = None, *, name: str = "local", source: str | None = None
) -> HostedModel:
    """Make a transformers model ready: derive its sites, prove them, write its card.

    The model is put in eval mode and given Patchbay's attention function, which computes what sdpa computes, to the
    bit, while nothing is tapped. Its outputs do not change otherwise.

    Raises:
        FailedPreconditionError: the model has no stack of layers that can be found.
    """
    attention.register()
    model.eval()
    hf: Any = model
    if hasattr(hf, "set_attn_implementation"):
        try:
            hf.set_attn_implementation(attention.IMPLEMENTATION)
        except (ValueError, KeyError) as error:
            log.info("attention sites are not offered by %s: %s", name, error)
    config = hf.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    probes = [_probe(model, rows, seq, int(text.vocab_size)) for rows, seq in _PROBES]
    recordings = [record(model, ids) for ids in probes]
    try:
        binding = derive(model, recordings[0])
    except ValueError as error:
        raise FailedPreconditionError(f"{name!r}: {error}") from error
    proof = prove(model, binding, probes[1])
    for failed, identity in proof.failed.items():
        binding.sites.pop(failed, None)
        binding.absent[failed] = f"not proved at load: {identity}"
    taps: dict[str, Tap] = {n: s.tap for n, s in binding.sites.items()}
    module_dims = _module_sites(recordings)
    for site, (tap, _) in module_dims.items():
        taps[site] = tap
    reached, _ = read_all(model, taps, probes[0])
    order = {site: position for position, site in enumerate(reached)}
    taps = {site: taps[site] for site in order}
    card = _card(
        model,
        text,
        name,
        source or getattr(config, "name_or_path", "") or name,
        binding,
        proof,
        order,
        reached,
        module_dims,
    )
    callables = {
        c.name: model.get_submodule(p) for c in card.callables if (p := _callable_path(binding, c.name)) is not None
    }
    return HostedModel(
        model=model,
        tokenizer=tokenizer,
        card=card,
        taps=MappingProxyType(taps),
        layers=tuple(binding.layers),
        callables=MappingProxyType(callables),
        proofs=MappingProxyType({**proof.proved, **{n: f"absent: {r}" for n, r in binding.absent.items()}}),
    )


def _probe(model: torch.nn.Module, rows: int, seq: int, vocab: int) -> torch.Tensor:
    """Random token ids, the same every time, on the model's device."""
    generator = torch.Generator().manual_seed(rows * 1000 + seq)
    ids = torch.randint(0, vocab, (rows, seq), generator=generator)
    return ids.to(next(model.parameters()).device)


def _module_sites(recordings: list[Recording]) -> dict[str, tuple[Tap, tuple[int | str, ...]]]:
    """Input and output of every module that is called once, as far as their extents are rows, positions and widths."""
    first, second = recordings
    sites: dict[str, tuple[Tap, tuple[int | str, ...]]] = {}
    for call in first.calls:
        a, b = first.of(call.path), second.of(call.path)
        if a is None or b is None:
            continue
        for side, left, right in (("input", a.input, b.input), ("output", a.output, b.output)):
            dims = _dims(left, right)
            if dims is not None:
                tap: Tap = InputTap(call.path) if side == "input" else OutputTap(call.path)
                sites[f"module:{call.path}.{side}"] = (tap, dims)
    return sites


def _dims(a: torch.Tensor | None, b: torch.Tensor | None) -> tuple[int | str, ...] | None:
    if a is None or b is None or a.ndim != b.ndim or a.ndim < 2 or not a.is_floating_point():
        return None
    (rows_a, seq_a), (rows_b, seq_b) = _PROBES
    dims: list[int | str] = []
    for left, right in zip(a.shape, b.shape, strict=True):
        if left == right:
            dims.append(left)
        elif (left, right) == (rows_a, rows_b):
            dims.append("rows")
        elif (left, right) == (seq_a, seq_b):
            dims.append("seq")
        else:
            return None
    return tuple(dims) if dims[0] == "rows" and dims.count("rows") == 1 else None


def _callable_path(binding: Binding, name: str) -> str | None:
    return {"ln_final": binding.ln_final, "unembed": binding.unembed}.get(name)


def dtype_of(tensor: torch.Tensor) -> DType:
    """The IR's dtype of a torch tensor."""
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _callables(model: torch.nn.Module, binding: Binding, dtype: DType) -> Iterator[CallableSpec]:
    width = binding.widths.d_model
    if binding.ln_final is not None:
        yield CallableSpec("ln_final", width, width, dtype, "final norm, before the unembedding")
    if binding.unembed is not None:
        yield CallableSpec("unembed", width, binding.widths.d_vocab, dtype, "unembedding: residual stream to logits")


def _card(
    model: torch.nn.Module,
    text: Any,
    name: str,
    source: str,
    binding: Binding,
    proof: Proof,
    order: Mapping[str, int],
    reached: Mapping[str, torch.Tensor],
    modules: Mapping[str, tuple[Tap, tuple[int | str, ...]]],
) -> ModelCard:
    sites: list[SiteSpec] = []
    for site in sorted(binding.sites, key=lambda n: order[n]):
        found = binding.sites[site]
        sites.append(SiteSpec(site, found.dims, dtype_of(reached[site]), order[site], doc=found.doc))
    dtype = dtype_of(next(p for p in model.parameters() if p.is_floating_point()))
    for site in sorted(binding.absent):
        sites.append(SiteSpec(site, ("rows",), dtype, -1, writable=False, absent=binding.absent[site]))
    for site in sorted((n for n in modules if n in order), key=lambda n: order[n]):
        side = site.rpartition(".")[2]
        sites.append(
            SiteSpec(site, modules[site][1], dtype_of(reached[site]), order[site], doc=f"{side} of the module")
        )
    widths = binding.widths
    return ModelCard(
        name=name,
        family=str(getattr(model.config, "model_type", type(model).__name__)),
        source=source,
        revision=weights_digest(model),
        dtype=dtype,
        n_layers=widths.n_layers,
        d_model=widths.d_model,
        n_heads=widths.n_heads,
        n_kv_heads=widths.n_kv_heads,
        d_head=widths.d_head,
        d_mlp=widths.d_mlp,
        d_vocab=int(text.vocab_size),
        n_ctx=int(getattr(text, "max_position_embeddings", 0) or 2**20),
        n_params=sum(p.numel() for p in model.parameters()),
        causal=True,
        sites=tuple(sites),
        callables=tuple(_callables(model, binding, dtype)),
    )
