"""Stacks of layers, and what stands before and after each: embeddings, final norm, unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import same
from patchbay_server.models.binding.ends import bind_beginning, bind_final_norm, bind_unembedding, embedded_input
from patchbay_server.models.binding.found import Binding, Widths
from patchbay_server.models.binding.stream import bind_block
from patchbay_server.models.recording import Recording


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

    @property
    def main(self) -> bool:
        """Whether it is the stack that leads to the model's output: the only one, the language model, the decoder."""
        return self.prefix in ("", "decoder.")


def derive(model: torch.nn.Module, recording: Recording) -> Binding:
    """Find every canonical site of `model` in a recording of one of its forwards."""
    binding = Binding()
    main = Widths()
    for stack in find_stacks(model, recording):
        binding.widths = Widths()  # each stack's own; those of the main one are the model's
        calls = [c for path in stack.layers if (c := recording.of(path)) is not None]
        first, last = calls[0], calls[-1]
        assert first.input is not None
        binding.widths.n_layers, binding.widths.d_model = len(calls), first.input.shape[-1]
        binding.layers.extend(stack.layers)
        bind_beginning(recording, stack.prefix, stack.tokens, first, binding)
        for index, path in enumerate(stack.layers):
            bind_block(Block(recording, binding, index, path, stack.prefix))
        norm = bind_final_norm(recording, stack.prefix, last, binding)
        if stack.main:
            binding.ln_final = None if norm is None else norm.path
            bind_unembedding(model, recording, last, norm, binding)
        if stack.main or not main.n_layers:
            main = binding.widths
    binding.widths = main
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
        stacks.append(Stack(path, found[path], prefix, embedded_input(recording, recording.of(found[path][0]))))
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
