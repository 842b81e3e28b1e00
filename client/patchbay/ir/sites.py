"""The grammar of site names: one canonical spelling, and the spellings of other tools that lead to it.

Canonical names are TransformerLens's without ``hook_`` (``blocks.3.attn.pattern``, ``ln_final.normalized``), or a
module's path in the checkpoint with the side that is meant (``module:model.layers.3.mlp.down_proj.output``). Also
understood:

    ``blocks.3.attn.hook_z``, ``hook_embed``       TransformerLens
    ``("resid_post", 3)``, ``("normalized", 3, "ln1")``  TransformerLens's cache keys
    ``resid_post.3``, ``attn.z.3``                 interp-engine addresses
    ``blocks[3].attn.z``, ``blocks.-1.resid_post`` Python spellings; negative blocks count from the end

Nothing here knows a model: whether a name exists is the card's to say.
"""

from __future__ import annotations

import re
from typing import TypeAlias

from patchbay.errors import UnknownSiteError

#: A site as a user may write it.
Address: TypeAlias = "str | tuple[object, ...]"

MODULE_PREFIX = "module:"
MODULE_SIDES = ("output", "input")

#: Canonical sites of one block, by where they hang.
BLOCK_SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    *("attn_in", "attn_out", "mlp_in", "mlp_out", "mixer_in", "mixer_out"),
)
ATTENTION_SITES = (
    *("q", "k", "v", "q_normed", "k_normed", "rot_q", "rot_k"),
    *("attn_scores", "sinks", "pattern", "z", "z_out", "result", "out"),
)
MLP_SITES = (
    *("pre", "pre_linear", "post", "out"),
    *("router_logits", "expert_weights", "expert_indices", "expert_out"),
)
#: Inside a state-space mixer.
STATE_SITES = ("conv", "x", "dt", "B", "C", "state", "y")
NORM_SITES = ("scale", "normalized")
#: Canonical sites outside the blocks.
TOP_SITES = ("embed", "pos_embed", "ln_final.scale", "ln_final.normalized", "logits")

#: TransformerLens's abbreviations in ``utils.get_act_name`` (same meaning, other word).
_LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": ""}
_TOP_ALIASES = {"unembed.out": "logits", "unembed": "logits"}
_SIDE = re.compile(r"(?P<path>.+)\.(?P<side>output|input)\Z")
_BRACKET = re.compile(r"\[(-?\d+)\]")


def module_site(path: str, side: str = "output") -> str:
    """The name of the site at a module's `side`, ``"output"`` or ``"input"``."""
    if side not in MODULE_SIDES:
        raise UnknownSiteError(f"a module has the sides 'output' and 'input', not {side!r}")
    return f"{MODULE_PREFIX}{path}.{side}"


def is_module_site(name: str) -> bool:
    """Whether `name` (canonical) is reached by a module's path."""
    return name.startswith(MODULE_PREFIX)


def block_of(name: str) -> int | None:
    """The block that a canonical name lies in, or None."""
    parts = name.split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() else None


def canonical(address: Address, n_layers: int | None = None) -> str:
    """The canonical spelling of `address`.

    Args:
        address: a name or a tuple in any of the spellings listed above.
        n_layers: number of blocks, which negative block indices count from; without it they are refused.

    Raises:
        UnknownSiteError: not a spelling that this grammar knows. (That the name exists is not checked.)
    """
    if isinstance(address, tuple):
        return _from_tuple(address, n_layers)
    if not isinstance(address, str) or not address.strip():
        raise UnknownSiteError(f"a site is a name such as 'blocks.3.resid_post' or ('resid_post', 3), not {address!r}")
    name = address.strip()
    if name.startswith(MODULE_PREFIX):
        if _SIDE.match(name[len(MODULE_PREFIX) :]) is None:
            raise UnknownSiteError(f"{name!r} lacks the side: end it in '.output' or '.input'")
        return name
    parts = [_strip_hook(p) for p in _BRACKET.sub(r".\1", name).split(".")]
    if parts[0] == "blocks" and len(parts) >= 3:
        return ".".join(["blocks", str(_block(parts[1], n_layers, address)), *parts[2:]])
    if len(parts) >= 2 and _is_int(parts[-1]):
        return _in_block(".".join(parts[:-1]), _block(parts[-1], n_layers, address))
    plain = ".".join(parts)
    return _TOP_ALIASES.get(plain, plain)


def _from_tuple(address: tuple[object, ...], n_layers: int | None) -> str:
    if len(address) == 1 and isinstance(address[0], str):
        return canonical(address[0], n_layers)
    if len(address) not in (2, 3) or not isinstance(address[0], str):
        raise UnknownSiteError(f"a site as a tuple is (name, block) or (name, block, part), not {address!r}")
    name = ".".join(_strip_hook(p) for p in address[0].split("."))
    layer = address[1]
    if layer is None:
        return canonical(name, n_layers)
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise UnknownSiteError(f"the block of a site is an integer, not {layer!r}")
    block = _block(str(layer.__index__()), n_layers, address)
    if len(address) == 3 and address[2] is not None:
        part = str(address[2])
        part = _LAYER_TYPES.get(part, part)
        return f"blocks.{block}.{part}.{name}" if part else f"blocks.{block}.{name}"
    return _in_block(name, block)


def _in_block(name: str, block: int) -> str:
    """``z`` and 3 -> ``blocks.3.attn.z``: the part of the block is implied where only one part has the name."""
    if "." not in name:
        if name in ATTENTION_SITES and name != "out":
            name = f"attn.{name}"
        elif name in MLP_SITES and name != "out":
            name = f"mlp.{name}"
        elif name in STATE_SITES:
            name = f"ssm.{name}"
        elif name in NORM_SITES:
            raise UnknownSiteError(
                f"{name!r} of block {block} is ambiguous: ln1 or ln2? Write 'blocks.{block}.ln1.{name}'",
                suggestions=(f"blocks.{block}.ln1.{name}", f"blocks.{block}.ln2.{name}"),
            )
    return f"blocks.{block}.{name}"


def _strip_hook(part: str) -> str:
    return part[len("hook_") :] if part.startswith("hook_") and len(part) > len("hook_") else part


def _is_int(text: str) -> bool:
    return text.lstrip("-").isdigit() and text.count("-") <= 1


def _block(text: str, n_layers: int | None, address: Address) -> int:
    if not _is_int(text):
        raise UnknownSiteError(f"{text!r} in {address!r} is not a block number")
    block = int(text)
    if block >= 0:
        if n_layers is not None and block >= n_layers:
            raise UnknownSiteError(f"{address!r}: the model has {n_layers} blocks, 0 to {n_layers - 1}")
        return block
    if n_layers is None:
        raise UnknownSiteError(f"{address!r}: a negative block needs the model's number of blocks")
    if block < -n_layers:
        raise UnknownSiteError(f"{address!r}: the model has {n_layers} blocks, so the lowest index is {-n_layers}")
    return n_layers + block
