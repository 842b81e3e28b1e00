"""From a name to a hosted model: load, instrument, derive, prove, and write the card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from patchbay.errors import FailedPreconditionError
from patchbay.ir.params import USED_IN_GRAPH
from patchbay_server.models import attention
from patchbay_server.models.activations import find_activations
from patchbay_server.models.applicable import find_applicable
from patchbay_server.models.binding import Binding, derive
from patchbay_server.models.cards import module_taps, write_card
from patchbay_server.models.continuation_proof import prove_continuation
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.independence import row_independence, shared_decoding
from patchbay_server.models.inputs import DECODER_TOKENS, MASK, TOKENS, ModelInputs, forward
from patchbay_server.models.narrowing import find_unembedding, output_embeddings
from patchbay_server.models.parameters import find_parameters
from patchbay_server.models.products import find_products
from patchbay_server.models.proofs import Proof, prove, read_all
from patchbay_server.models.recording import Recording, record
from patchbay_server.models.taps import Tap, first_tensor

log = logging.getLogger(__name__)

#: Source that stands for the model shipped with Patchbay.
DEMO = "demo"


def load(
    source: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    compile_layers: bool = False,
) -> HostedModel:
    """Load a model and make it ready.

    Args:
        source: ``"demo"``, the id of a model on the Hugging Face hub, or a folder in its format (safetensors only).
        name: name to serve it under; the last part of `source` when None.
        dtype: ``"auto"`` (as stored) or a floating dtype's name.
        device: ``"auto"`` (cuda where there is one, else cpu) or a torch device.
        compile_layers: whether torch compiles the layers now, for forwards that look at nothing inside them.

    Raises:
        FailedPreconditionError: the source cannot be loaded; the message says why and what to try.
    """
    from transformers import AutoConfig, AutoTokenizer

    if source == DEMO:
        from patchbay_server.models.demo import demo_path

        path = str(demo_path())
    else:
        path = source
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype, None)
    if not (kind == "auto" or isinstance(kind, torch.dtype)):
        raise FailedPreconditionError(f"dtype {dtype!r} is not a torch dtype; use auto, float32, bfloat16 or float16")
    if where.startswith("cuda") and int(where.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise FailedPreconditionError(
            f"the model {source!r} is to run on {where!r}, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA devices here; say 'cpu' or 'auto', or see to the driver and to a CUDA "
            "build of torch"
        )
    if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise FailedPreconditionError(f"the model {source!r} could not be loaded: there is no such folder here")
    try:
        model = _architecture(AutoConfig.from_pretrained(path, trust_remote_code=False)).from_pretrained(
            path, dtype=kind, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(
            f"the model {source!r} could not be loaded: {error}\n"
            "Give 'demo', a hub id such as org/name (needs network, or a filled HF cache), or a folder with "
            "config.json and *.safetensors."
        ) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        log.info("%s has no tokenizer (%s); its runs are made from token ids", source, error)
        tokenizer = None
    placed: torch.nn.Module = model
    placed.to(where)
    # A folder's whole path is the operator's business: clients see its name.
    shown = Path(source).name if Path(path).is_dir() else source
    hosted = host(placed, tokenizer, name=name or Path(source).name, source=shown)
    return hosted.with_compiled_layers() if compile_layers else hosted


def host(
    model: torch.nn.Module,
    tokenizer: Any = None,
    *,
    name: str = "local",
    source: str | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
) -> HostedModel:
    """Make a model ready: derive its sites, prove them, write its card.

    The model is put in eval mode. A transformers model is given Patchbay's attention function, which computes what sdpa
    computes, to the bit, while nothing is tapped; its outputs do not change otherwise. A model in which no stack of
    layers is found (a convolutional network, say) has its modules as sites, by path.

    Args:
        model: a transformers model, or any module together with `example`.
        tokenizer: its tokenizer, if it takes text.
        name: what it is served as.
        source: what it was loaded from.
        example: for modules that are not transformers models: one input by argument name, rows first.

    Raises:
        FailedPreconditionError: it is not known what the model takes.
    """
    attention.register()
    model.eval()
    hf: Any = model
    if hasattr(hf, "set_attn_implementation"):
        try:
            hf.set_attn_implementation(attention.IMPLEMENTATION)
        except (ValueError, KeyError) as error:
            log.info("attention sites are not offered by %s: %s", name, error)
    inputs = ModelInputs(model, example)
    probes = [inputs.probe(extents) for extents in inputs.probes]
    recordings = [_recorded(model, probe) for probe in probes]
    binding = derive(model, recordings[0])
    proof = prove(model, binding, probes[1]) if binding.sites else Proof()
    for failed, identity in proof.failed.items():
        binding.sites.pop(failed, None)
        binding.absent[failed] = f"not proved at load: {identity}"
    for unwritable, why in proof.read_only.items():
        if unwritable in binding.sites:
            binding.sites[unwritable] = replace(binding.sites[unwritable], read_only=why)
    taps: dict[str, Tap] = {n: s.tap for n, s in binding.sites.items()}
    taps.update(module_taps(recordings, inputs.probes))
    (first, _), (second, _) = (read_all(model, taps, probe) for probe in probes)
    order = {site: position for position, site in enumerate(first) if site in second}
    where = source or getattr(inputs.config, "name_or_path", "") or name
    causal = _is_causal(model, probes[0], binding)
    ragged = causal or _is_ragged(model, probes[0], inputs, binding)
    values = (first, second)
    card = write_card(model, name, where, inputs, binding, proof.proved, order, values, causal=causal, ragged=ragged)
    parameters, params = find_parameters(model, taps, first, probes[0].get(TOKENS))
    applicable, callables = find_applicable(model, binding, taps, recordings)
    card = replace(card, params=params, weights=USED_IN_GRAPH, callables=callables)
    sharing = row_independence(model, binding.layers, probes[0], causal=causal)
    shared = sharing.reason if sharing.holds else f"no: {sharing.reason}"
    decoding = shared_decoding(model, probes[0]) if sharing.holds else sharing
    together = decoding.reason if decoding.holds else f"no: {decoding.reason}"
    card = replace(card, attributes={**card.attributes, "shared_forwards": shared, "shared_generation": together})
    offered = MappingProxyType({s.name: taps[s.name] for s in card.sites if s.absent is None})
    going_on = prove_continuation(model, binding.layers, offered, card, probes[0])
    said = going_on.sentence if going_on.how is not None else f"no: {going_on.sentence}"
    card = replace(card, attributes={**card.attributes, "shared_prefixes": said})
    return HostedModel(
        model=model,
        tokenizer=tokenizer,
        card=card,
        taps=offered,
        layers=tuple(binding.layers),
        callables=MappingProxyType(applicable),
        proofs=MappingProxyType({**proof.proved, **{n: f"absent: {r}" for n, r in binding.absent.items()}}),
        parameters=MappingProxyType(parameters),
        row_independent=sharing.holds,
        decodes_together=decoding.holds,
        continuation=going_on.how,
        activations=() if going_on.how is None else find_activations(model, binding.layers),
        products=None if going_on.how is None else find_products(model, binding.layers),
        unembedding=find_unembedding(model, binding.unembed or output_embeddings(model), offered, card, probes[0]),
    )


def _recorded(model: torch.nn.Module, probe: Mapping[str, torch.Tensor]) -> Recording:
    try:
        return record(model, probe)
    except Exception as error:  # models raise what they like about inputs that they do not take
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in probe.items())
        raise FailedPreconditionError(
            f"{type(model).__name__} failed on made-up inputs ({shapes}): {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}\nGive an example of what it takes, rows first: "
            "pb.local(model, example={'pixel_values': tensor})"
        ) from error


def _architecture(config: Any) -> Any:
    """The transformers class that the checkpoint was saved from; else the one for causal language models."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def _is_causal(model: torch.nn.Module, probe: Mapping[str, torch.Tensor], binding: Binding) -> bool:
    """Whether changing the last token leaves every layer's output at earlier positions as it was.

    With an encoder, positions are not all in one order; images among the tokens are.
    """
    if TOKENS not in probe or DECODER_TOKENS in probe or not binding.layers or binding.beginnings[-1].prefix:
        return False
    changed = probe[TOKENS].clone()
    changed[:, -1] = torch.where(changed[:, -1] == changed[:, -2], changed[:, 0], changed[:, -2])
    before, after = (_last_layer(model, binding, {**probe, TOKENS: ids}) for ids in (probe[TOKENS], changed))
    moved = (before.float() - after.float()).abs()
    earlier, last = float(moved[:, :-1].max()), float(moved[:, -1].max())
    # The same shapes round alike, so next to nothing may move; and nothing in comparison with what should.
    return earlier <= 4 * _rounding(before) and earlier <= 1e-2 * last


def _is_ragged(
    model: torch.nn.Module, probe: Mapping[str, torch.Tensor], inputs: ModelInputs, binding: Binding
) -> bool:
    """Whether a row that is padded on the right, and masked there, gives what it gives alone."""
    if TOKENS not in probe or MASK not in inputs.arguments or not binding.layers:
        return False
    shorter = probe[TOKENS].shape[1] - 2
    mask = torch.ones_like(probe[TOKENS])
    mask[:, shorter:] = 0
    padded = probe[TOKENS].clone()
    padded[:, shorter:] = 0
    try:
        together = _last_layer(model, binding, {**probe, TOKENS: padded, MASK: mask})
        alone = _last_layer(model, binding, {**probe, TOKENS: probe[TOKENS][:, :shorter]})
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        log.info("rows of unequal length are not taken: %s", error)
        return False
    kept = together[:, : alone.shape[1]]
    if kept.shape != alone.shape:
        return False
    return float((kept.float() - alone.float()).abs().max()) <= 256 * _rounding(alone)


def _rounding(value: torch.Tensor) -> float:
    """One rounding error of the largest element."""
    return torch.finfo(value.dtype).eps * float(value.float().abs().max())


def _last_layer(model: torch.nn.Module, binding: Binding, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the last layer of the main stack returns."""
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        del module, args
        value = first_tensor(output)
        assert value is not None
        seen.append(value)

    handle = model.get_submodule(binding.layers[-1]).register_forward_hook(keep)
    try:
        with torch.no_grad():
            forward(model, inputs)
    finally:
        handle.remove()
    return seen[0]
