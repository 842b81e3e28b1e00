"""The stack of layers, and what stands before and after it: embeddings, final norm, unembedding."""

from __future__ import annotations

from itertools import pairwise

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import close, norm_form, same
from patchbay_server.models.binding.found import RESIDUAL, Binding
from patchbay_server.models.binding.norms import bind_norm
from patchbay_server.models.binding.stream import bind_block
from patchbay_server.models.recording import Call, Recording
from patchbay_server.models.taps import OutputTap, SharedRowsTap


def derive(model: torch.nn.Module, recording: Recording) -> Binding:
    """Find every canonical site of `model` in a recording of one of its forwards."""
    binding = Binding()
    binding.layers = _find_layers(model, recording)
    first, last = recording.of(binding.layers[0]), recording.of(binding.layers[-1])
    assert first is not None and last is not None and first.input is not None
    widths = binding.widths
    widths.n_layers, widths.d_model = len(binding.layers), first.input.shape[-1]
    _bind_embeddings(model, recording, first, binding)
    for index, path in enumerate(binding.layers):
        bind_block(Block(recording, binding, index, path))
    _bind_head(model, recording, last, binding)
    return binding


def _find_layers(model: torch.nn.Module, recording: Recording) -> list[str]:
    """Paths of the longest list of like modules that are called one after the other, each fed by the one before."""
    best: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        calls = [c for i in range(len(module)) if (c := recording.of(f"{name}.{i}")) is not None]
        if len(calls) < len(module):
            continue
        chained = all(same(a.output, b.input) for a, b in pairwise(calls))
        keeps_width = all(
            c.input is not None and c.output is not None and c.input.shape == c.output.shape for c in calls
        )
        if chained and keeps_width and len(module) > len(best):
            best = [f"{name}.{i}" for i in range(len(module))]
    if not best:
        raise ValueError(
            "no stack of layers was found: no ModuleList of one class whose members feed one another; "
            "the model's modules can still be reached by path"
        )
    return best


# --- around the stack ---------------------------------------------------------------------------------------------


def _bind_embeddings(model: torch.nn.Module, recording: Recording, first: Call, binding: Binding) -> None:
    d_model = binding.widths.d_model
    tables = [c for c in recording.calls if isinstance(c.module, torch.nn.Embedding) and c.end < first.start]
    token = next((c for c in tables if c.input is not None and torch.equal(c.input, recording.input_ids)), None)
    if token is None or token.output is None:
        binding.absent["embed"] = "no embedding module takes the token ids"
        binding.absent["pos_embed"] = "no token embedding to add to"
        return
    binding.widths.d_vocab = token.module.num_embeddings  # type: ignore[assignment]
    binding.add("embed", OutputTap(token.path), (*RESIDUAL, token.output.shape[-1]), "token embedding")
    for c in tables:
        if c is token or c.output is None or c.output.shape[-1] != d_model or c.output.shape[0] != 1:
            continue
        if close(token.output + c.output, first.input):
            tap = SharedRowsTap(c.path, rows_from=token.path)
            binding.add("pos_embed", tap, (*RESIDUAL, d_model), "learned positional embedding, the same for every row")
            return
    rotary = any("rot_q" in n for n in binding.absent) or bool(recording.attention)
    binding.absent["pos_embed"] = "no learned positional embedding is added" + (
        " (positions enter in attention)" if rotary else ""
    )


def _bind_head(model: torch.nn.Module, recording: Recording, last: Call, binding: Binding) -> None:
    d_model = binding.widths.d_model
    after = [c for c in recording.calls if c.start > last.end]
    norm = next((c for c in after if same(c.input, last.output) and norm_form(c) is not None), None)
    if norm is None:
        for part in ("scale", "normalized"):
            binding.absent[f"ln_final.{part}"] = "no norm follows the last layer"
    else:
        binding.ln_final = norm.path
        bind_norm(binding, "ln_final", norm, d_model)
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((c for c in after if c.module is embeddings), None)
    if head is None or head.output is None or recording.output is None:
        binding.absent["logits"] = "the model has no unembedding"
        return
    binding.widths.d_vocab = head.output.shape[-1]
    dims = (*RESIDUAL, head.output.shape[-1])
    if same(head.output, recording.output):
        binding.unembed = head.path
        binding.add("logits", OutputTap(head.path), dims, "next-token logits")
    elif recording.output.shape == head.output.shape:
        binding.add("logits", OutputTap(""), dims, "next-token logits, after the model's own scaling or cap")
    else:
        binding.absent["logits"] = "the model's output is not what its unembedding gives"
