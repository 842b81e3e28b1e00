"""Stacks of layers, and what stands before and after each: embeddings, final norm, unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import close, norm_form, same
from patchbay_server.models.binding.found import RESIDUAL, Binding
from patchbay_server.models.binding.norms import bind_norm
from patchbay_server.models.binding.stream import bind_block
from patchbay_server.models.recording import Call, Recording
from patchbay_server.models.taps import OutputTap, SharedRowsTap


@dataclass(frozen=True)
class Stack:
    """Layers that feed one another.

    Attributes:
        path: name of the list that holds them.
        layers: their names, in order.
        prefix: what the names of their sites begin with: "" for the one stack of most models.
        tokens: name of the input whose ids its embedding takes; None for stacks of images and sounds.
    """

    path: str
    layers: tuple[str, ...]
    prefix: str
    tokens: str | None


def derive(model: torch.nn.Module, recording: Recording) -> Binding:
    """Find every canonical site of `model` in a recording of one of its forwards."""
    binding = Binding()
    for stack in find_stacks(model, recording):
        calls = [c for path in stack.layers if (c := recording.of(path)) is not None]
        first, last = calls[0], calls[-1]
        assert first.input is not None
        if stack.prefix in ("", "decoder.") or not binding.widths.n_layers:
            binding.widths.n_layers, binding.widths.d_model = len(calls), first.input.shape[-1]
        binding.layers.extend(stack.layers)
        _bind_embeddings(recording, stack, first, binding)
        for index, path in enumerate(stack.layers):
            bind_block(Block(recording, binding, index, path, stack.prefix))
        _bind_final_norm(recording, stack, last, binding)
        if stack.prefix in ("", "decoder."):
            _bind_unembedding(model, recording, last, binding)
    return binding


def find_stacks(model: torch.nn.Module, recording: Recording) -> list[Stack]:
    """Every list of like modules that are called one after the other, each fed by the one before, in the order called.

    A model with one stack has it unprefixed. With an encoder and a decoder, each is named so. With several others (an
    image tower beside a language model), the one that leads to the unembedding is unprefixed, and the rest are named by
    where they are.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            layers = _chained(recording, name, module)
            if layers is not None:
                found[name] = layers
    if len(found) > 1:  # a lone layer is a stack only where there is no other
        found = {name: layers for name, layers in found.items() if len(layers) > 1} or found
    paths = sorted(found, key=lambda name: _start(recording, found[name][0]))
    config: Any = getattr(model, "config", None)
    pair = bool(getattr(config, "is_encoder_decoder", False)) and len(paths) == 2
    unembeds = getattr(model, "get_output_embeddings", lambda: None)() is not None
    stacks = []
    for path in paths:
        if pair:
            prefix = "encoder." if path == paths[0] else "decoder."
        elif len(paths) == 1 or (unembeds and path == paths[-1]):
            prefix = ""
        else:
            prefix = f"{_own_part(path, [p for p in paths if p != path])}."
        tokens = "decoder_input_ids" if prefix == "decoder." else "input_ids"
        stacks.append(Stack(path, found[path], prefix, tokens if tokens in recording.inputs else None))
    return stacks


def _chained(recording: Recording, name: str, module: torch.nn.ModuleList) -> tuple[str, ...] | None:
    """Names of the members, when each was called once, on what the one before returned, and keeps its shape."""
    if not len(module):  # members may differ: hybrid stacks mix attention and recurrences
        return None
    calls = [c for i in range(len(module)) if (c := recording.of(f"{name}.{i}")) is not None]
    whole = [c for c in calls if c.input is not None and c.output is not None and c.input.ndim == 3]
    if len(whole) < len(module) or any(c.input.shape != c.output.shape for c in whole):  # type: ignore[union-attr]
        return None
    if not all(same(a.output, b.input) for a, b in pairwise(whole)):
        return None
    return tuple(c.path for c in whole)


def _start(recording: Recording, path: str) -> int:
    call = recording.of(path)
    return -1 if call is None else call.start


def _own_part(path: str, others: list[str]) -> str:
    """The first part of `path` that no other has, without what every such part ends with."""
    taken = {part for other in others for part in other.split(".")}
    own = next((part for part in path.split(".") if part not in taken), path.replace(".", "_"))
    for ending in ("_tower", "_model"):
        own = own.removesuffix(ending)
    return own


# --- around a stack -----------------------------------------------------------------------------------------------


def _bind_embeddings(recording: Recording, stack: Stack, first: Call, binding: Binding) -> None:
    embed, pos_embed = f"{stack.prefix}embed", f"{stack.prefix}pos_embed"
    tables = [c for c in recording.calls if isinstance(c.module, torch.nn.Embedding) and c.end < first.start]
    ids = recording.inputs.get(stack.tokens) if stack.tokens is not None else None
    token = next((c for c in tables if ids is not None and same(c.input, ids)), None)
    if token is None or token.output is None:
        why = "the stack takes no token ids" if ids is None else "no embedding module of its own takes the token ids"
        binding.absent[embed] = why
        binding.absent[pos_embed] = "no token embedding to add to"
        return
    if not binding.widths.d_vocab:
        binding.widths.d_vocab = token.module.num_embeddings  # type: ignore[assignment]
    width = token.output.shape[-1]
    binding.add(embed, OutputTap(token.path), (*RESIDUAL, width), "token embedding")
    for c in tables:
        if c is token or c.output is None or c.output.shape[-1] != width or c.output.shape[0] != 1:
            continue
        if close(token.output + c.output, first.input):
            tap = SharedRowsTap(c.path, rows_from=token.path)
            binding.add(pos_embed, tap, (*RESIDUAL, width), "learned positional embedding, the same for every row")
            return
    rotary = bool(recording.attention)
    binding.absent[pos_embed] = "no learned positional embedding is added" + (
        " (positions enter in attention)" if rotary else ""
    )


def _bind_final_norm(recording: Recording, stack: Stack, last: Call, binding: Binding) -> None:
    assert last.output is not None
    after = [c for c in recording.calls if c.start > last.end]
    norm = next((c for c in after if same(c.input, last.output) and norm_form(c) is not None), None)
    prefix = f"{stack.prefix}ln_final"
    if norm is None:
        for part in ("scale", "normalized"):
            binding.absent[f"{prefix}.{part}"] = "no norm follows the last layer"
        return
    if stack.prefix in ("", "decoder."):
        binding.ln_final = norm.path
    bind_norm(binding, prefix, norm, last.output.shape[-1])


def _bind_unembedding(model: torch.nn.Module, recording: Recording, last: Call, binding: Binding) -> None:
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((c for c in recording.calls if c.start > last.end and c.module is embeddings), None)
    if embeddings is None or head is None or head.output is None or recording.output is None:
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
