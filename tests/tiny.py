"""Tiny random models, built from configs and never downloaded, and how a researcher would hook them by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

N_LAYERS, D_MODEL, N_HEADS, D_HEAD, D_MLP, VOCAB = 3, 16, 4, 4, 24, 32


def build(family: str, *, seed: int = 0, attention: str = "sdpa") -> transformers.PreTrainedModel:
    """A random model in eval mode; the same weights for the same seed.

    Args:
        family: ``"gpt2"`` or ``"llama"`` (grouped-query: two key/value heads).
        seed: of the weights.
        attention: transformers' attention implementation.
    """
    shared = {"attn_implementation": attention, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        config: transformers.PretrainedConfig = transformers.GPT2Config(
            n_layer=N_LAYERS, n_embd=D_MODEL, n_head=N_HEADS, n_inner=D_MLP, vocab_size=VOCAB, n_positions=32, **shared
        )
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=N_LAYERS,
            hidden_size=D_MODEL,
            intermediate_size=D_MLP,
            num_attention_heads=N_HEADS,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=32,
            **shared,
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


@dataclass(frozen=True)
class Place:
    """Where a site is, written by hand from the model's source.

    Attributes:
        path: module name.
        side: ``"in"`` or ``"out"``.
        start: first feature of the slice that is the site; heads of D_HEAD when `heads` is not 0.
        heads: number of heads.
        block: for the stream between attention and MLP: the layer, to whose output the edited stream is carried.
    """

    path: str
    side: str
    start: int = 0
    heads: int = 0
    block: str = ""

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """The site's part of the module's tensor; shares memory with it."""
        if not self.heads:
            return whole
        part = whole[..., self.start : self.start + self.heads * D_HEAD]
        return part.unflatten(-1, (self.heads, D_HEAD))


def places(family: str) -> dict[str, Place]:
    """Every hookable canonical site of a family, in forward order."""
    found: dict[str, Place] = {}
    if family == "gpt2":
        found["embed"] = Place("transformer.wte", "out")
        for i in range(N_LAYERS):
            b, p = f"transformer.h.{i}", f"blocks.{i}."
            found[p + "resid_pre"] = Place(b, "in")
            for n, name in enumerate("qkv"):
                found[p + f"attn.{name}"] = Place(f"{b}.attn.c_attn", "out", n * D_MODEL, N_HEADS)
            found[p + "attn.z"] = Place(f"{b}.attn.c_proj", "in", 0, N_HEADS)
            found[p + "attn_out"] = Place(f"{b}.attn", "out")
            found[p + "resid_mid"] = Place(f"{b}.ln_2", "in", block=b)
            found[p + "mlp.pre"] = Place(f"{b}.mlp.c_fc", "out")
            found[p + "mlp.post"] = Place(f"{b}.mlp.c_proj", "in")
            found[p + "mlp_out"] = Place(f"{b}.mlp", "out")
            found[p + "resid_post"] = Place(b, "out")
    else:
        found["embed"] = Place("model.embed_tokens", "out")
        for i in range(N_LAYERS):
            b, p = f"model.layers.{i}", f"blocks.{i}."
            found[p + "resid_pre"] = Place(b, "in")
            for name, heads in (("q", N_HEADS), ("k", 2), ("v", 2)):
                found[p + f"attn.{name}"] = Place(f"{b}.self_attn.{name}_proj", "out", 0, heads)
            found[p + "attn.z"] = Place(f"{b}.self_attn.o_proj", "in", 0, N_HEADS)
            found[p + "attn_out"] = Place(f"{b}.self_attn", "out")
            found[p + "resid_mid"] = Place(f"{b}.post_attention_layernorm", "in", block=b)
            found[p + "mlp.pre"] = Place(f"{b}.mlp.gate_proj", "out")
            found[p + "mlp.pre_linear"] = Place(f"{b}.mlp.up_proj", "out")
            found[p + "mlp.post"] = Place(f"{b}.mlp.down_proj", "in")
            found[p + "mlp_out"] = Place(f"{b}.mlp", "out")
            found[p + "resid_post"] = Place(b, "out")
    found["logits"] = Place("lm_head", "out")
    return found


#: An edit by hand: takes the site's tensor (a copy it may change in place) and returns nothing.
Edit = Callable[[torch.Tensor], None]


def run_hooked(
    model: transformers.PreTrainedModel,
    where: dict[str, Place],
    input_ids: torch.Tensor,
    edits: list[tuple[str, Edit]],
    read: str,
    reads_after: int | None = None,
) -> torch.Tensor:
    """One plain forward with plain hooks.

    Args:
        model: a model that Patchbay has never touched.
        where: the family's places.
        input_ids: ``[rows, seq]``.
        edits: site and edit, in program order; at one site they apply in this order.
        read: the site to return.
        reads_after: how many of the edits at `read` itself come before the read; None means all.
    """
    seen: list[torch.Tensor] = []
    handles = []
    streams: dict[str, torch.Tensor] = {}

    def carry(block: str, stream: torch.Tensor) -> None:
        """The stream between attention and MLP is read by a norm, but also added to the MLP's output."""
        streams[block], first = stream, block not in streams
        if not first:
            return
        added: list[torch.Tensor] = []  # registered only now, so after every edit of the MLP's output
        mlp = model.get_submodule(f"{block}.mlp")
        handles.append(mlp.register_forward_hook(lambda module, args, output: added.append(output)))

        def total(module, args, output):
            new = streams[block] + added[0]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(model.get_submodule(block).register_forward_hook(total, prepend=True))

    def attach(place: Place, edit: Edit | None) -> None:
        module = model.get_submodule(place.path)
        if place.block:  # torch looks for hooks when a module is entered, which is before `carry` adds its own
            for path in (place.block, f"{place.block}.mlp"):
                handles.append(model.get_submodule(path).register_forward_hook(lambda *_: None))

        def act(whole: torch.Tensor) -> torch.Tensor | None:
            if edit is None:
                seen.append(place.view(whole).contiguous().clone())
                return None
            new = whole.clone()
            edit(place.view(new))
            return new

        def after(module, args, output):
            whole = output[0] if isinstance(output, tuple) else output
            new = act(whole)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        def before(module, args, kwargs):
            if args:
                new = act(args[0])
                if new is not None and place.block:
                    carry(place.block, new)
                return None if new is None else ((new, *args[1:]), kwargs)
            new = act(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        if place.side == "out":
            handles.append(module.register_forward_hook(after))
        else:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    at_site = 0
    for site, edit in edits:
        if site == read:
            if reads_after is not None and at_site == reads_after:
                attach(where[read], None)
                reads_after = -1
            at_site += 1
        attach(where[site], edit)
    if reads_after is None or reads_after >= 0:
        attach(where[read], None)
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 1
    return seen[0]
