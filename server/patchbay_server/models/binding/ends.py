"""What stands before a stack of layers and after it: embeddings, final norm, unembedding.

The value that enters the first layer is followed back through norms, factors and sums. What is summed is told apart by
what it depends on: the tokens or the image; the position alone (it varies along the sequence and not between rows); or
neither (token types).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from patchbay_server.models.binding.compare import close, norm_form, same
from patchbay_server.models.binding.flow import behind_scaling, op_tap, reaches, strip
from patchbay_server.models.binding.found import RESIDUAL, Beginning, Binding
from patchbay_server.models.binding.norms import bind_norm
from patchbay_server.models.recording import Call, Op, Recording, Value
from patchbay_server.models.shared import SharedTap
from patchbay_server.models.taps import InputTap, OpTap, OutputTap, Tap

#: Most sums and factors followed back.
_TOO_DEEP = 16


@dataclass
class Summand:
    """One of the tensors that are added up before the first layer.

    Attributes:
        value: the tensor, after its factor.
        adding: the addition that takes it, and at which argument; None when there is nothing to add to.
        bare: the tensor before its factor.
    """

    value: Value
    adding: tuple[Op, int | str] | None
    bare: Value


@dataclass
class Sum:
    """What enters a stack.

    Attributes:
        whole: the sum, before its norm.
        norm: the norm behind it, or None.
        summands: what is added up.
    """

    whole: Value
    norm: Call | None = None
    summands: list[Summand] = field(default_factory=list)


def bind_beginning(recording: Recording, prefix: str, tokens: str | None, first: Call, binding: Binding) -> None:
    """Derive ``embed``, ``pos_embed``, ``token_type_embed``, ``patch_embed`` and ``embed_ln`` of one stack.

    Args:
        recording: of the tiny forward.
        prefix: what the names of the stack's sites begin with.
        tokens: name of the input whose ids the stack embeds; None for stacks of images and sounds.
        first: the call of its first layer.
        binding: where the sites go.
    """
    assert first.given is not None
    begin = _begin(recording, first.given, first.start)
    width = first.given.shape[-1]
    ids = recording.inputs.get(tokens) if tokens is not None else None
    own = _own(recording, begin, ids)
    table = None
    if ids is None:
        _bind_image(recording, prefix, begin, own, width, first, binding)
    else:
        table = _bind_table(recording, prefix, ids, first, binding)
    others = [s for s in begin.summands if s is not own]
    added = _bind_others(recording, prefix, others, width, first, binding)
    if begin.norm is not None:
        bind_norm(binding, f"{prefix}embed_ln", begin.norm, width)
    summands: tuple[str, ...] | None = ("embed",)
    if ids is not None:
        summands = ("embed", *added) if own is not None and len(added) == len(others) else None
    norm = None if begin.norm is None else begin.norm.path
    named = None if summands is None else tuple(f"{prefix}{name}" for name in summands)
    longest = min((n for s in others if (n := _learned_positions(recording, s)) is not None), default=None)
    binding.beginnings.append(Beginning(prefix, tokens, table, norm, named, longest))


def embedded_input(recording: Recording, first: Call | None) -> str | None:
    """Name of the input whose ids are embedded into what the layer `first` is given, or None."""
    if first is None or first.given is None:
        return None
    for name, ids in recording.inputs.items():
        tables = [c for c in recording.calls if _looks_up(c, ids) and c.end < first.start]
        if not ids.is_floating_point() and any(c.made and reaches(first.given, c.made) for c in tables):
            return name
    return None


def _begin(recording: Recording, value: Value, before: int) -> Sum:
    begin = Sum(value)
    norm = next((c for c in _makers(recording, value) if norm_form(c) is not None), None)
    if norm is not None and norm.given is not None:
        begin.norm, begin.whole = norm, norm.given
    waiting: list[tuple[Value, tuple[Op, int | str] | None, int]] = [(begin.whole, None, _TOO_DEEP)]
    while waiting:
        current, adding, depth = waiting.pop(0)
        maker = strip(current).maker
        if depth and maker is not None and maker.name == "add" and maker.tick < before and len(maker.operands) == 2:
            waiting += [(v, (maker, where), depth - 1) for where, v in maker.inputs if where != -1]
            continue
        scaled = behind_scaling(current)
        begin.summands.append(Summand(current, adding, scaled[0] if scaled is not None else current))
    return begin


def _makers(recording: Recording, value: Value) -> list[Call]:
    """Calls whose output `value` is, innermost first."""
    core = strip(value)
    return sorted((c for c in recording.calls if c.made is not None and strip(c.made) is core), key=lambda c: c.end)


def _own(recording: Recording, begin: Sum, ids: torch.Tensor | None) -> Summand | None:
    """The summand that carries the tokens or the image, as against positions and token types."""
    for summand in begin.summands:
        calls = [*_makers(recording, summand.value), *_makers(recording, summand.bare)]
        if ids is not None and any(_looks_up(c, ids) for c in calls):
            return summand
    if ids is not None:
        return None
    inputs = [t for t in recording.inputs.values() if t.is_floating_point()]
    sources = {id(v): v for op in recording.ops for _, v in op.inputs if any(same(v.tensor, t) for t in inputs)}
    return next((s for s in begin.summands if any(reaches(s.value, v) for v in sources.values())), None)


def _looks_up(call: Call, ids: torch.Tensor) -> bool:
    """Whether a call gives the rows of its table at `ids`, up to one factor; positional tables look up other rows."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(call.module, torch.nn.Embedding) or not isinstance(weight, torch.Tensor):
        return False
    if not same(call.input, ids) or call.output is None or int(ids.max()) >= weight.shape[0]:
        return False
    rows = weight.detach()[ids].to(call.output.dtype)
    size = float((rows.float() * rows.float()).sum())
    factor = float((rows.float() * call.output.float()).sum()) / size if size else 0.0
    return rows.shape == call.output.shape and close(rows * factor, call.output)


# --- sites --------------------------------------------------------------------------------------------------------


def _bind_table(recording: Recording, prefix: str, ids: torch.Tensor, first: Call, binding: Binding) -> str | None:
    """``embed``: rows of the table at the token ids, as the module gives them. Returns the module's path."""
    tables = [c for c in recording.calls if c.end < first.start and _looks_up(c, ids)]
    token = tables[-1] if tables else None
    if token is None or token.made is None:
        binding.absent[f"{prefix}embed"] = "no embedding module of its own takes the token ids"
        return None
    if not binding.widths.d_vocab:
        binding.widths.d_vocab = int(token.module.num_embeddings)  # type: ignore[arg-type]
    tap = _tap(recording, token.made, first)
    if tap is None:
        binding.absent[f"{prefix}embed"] = "the embedding module is called more than once in a forward"
        return None
    binding.add(f"{prefix}embed", tap, (*RESIDUAL, token.made.shape[-1]), "token embedding: rows of the table")
    return token.path


def _bind_image(
    recording: Recording,
    prefix: str,
    begin: Sum,
    own: Summand | None,
    width: int,
    first: Call,
    binding: Binding,
) -> None:
    """``embed``: what enters the first layer (before the norm); ``patch_embed``: without class token and positions."""
    tap = _tap(recording, begin.whole, first)
    norm = ", before its norm" if begin.norm is not None else ""
    if tap is None:
        binding.absent[f"{prefix}embed"] = "no module and no operation gives it in one piece"
    else:
        doc = f"embedded input with all that is added to it (class token, positions){norm}"
        binding.add(f"{prefix}embed", tap, (*RESIDUAL, width), doc)
    patches = None if own is None else _patches(own.value)
    found = None if patches is None or patches.shape[-1:] != (width,) else _tap(recording, patches, first)
    if found is None or patches is None or len(patches.shape) != 3:
        binding.absent[f"{prefix}patch_embed"] = "no value of one vector per patch was found before the class token"
        return
    doc = "embedded patches (frames of sound), without class token and positions"
    binding.add(f"{prefix}patch_embed", found, (*RESIDUAL, width), doc)


def _patches(value: Value) -> Value:
    """`value` without the tokens that are put before it: the largest part of a concatenation."""
    maker = strip(value).maker
    if maker is None or maker.name not in ("cat", "concat", "concatenate"):
        return value
    return max(maker.operands, key=lambda v: 0 if v.tensor is None else v.tensor.numel())


def _bind_others(
    recording: Recording, prefix: str, others: list[Summand], width: int, first: Call, binding: Binding
) -> list[str]:
    """Positions and token types; returns which were found."""
    found: list[str] = []
    for summand in others:
        tensor = summand.value.tensor
        if tensor is None and summand.adding is not None:  # a parameter: it is not copied, but it is what it is
            tensor = _parameter(recording, summand)
        kind = _kind(tensor, width)
        if kind is None or f"{prefix}{kind}" in binding.sites:
            continue
        tap = _shared_tap(recording, summand, first)
        if tap is not None:
            what = "positional embedding" if kind == "pos_embed" else "embedding of the token type"
            binding.add(f"{prefix}{kind}", tap, (*RESIDUAL, width), f"{what}, as it is added")
            found.append(kind)
    if f"{prefix}pos_embed" not in binding.sites:
        rotary = " (positions enter in attention)" if recording.attention else ""
        binding.absent[f"{prefix}pos_embed"] = "no positional embedding is added" + rotary
    return found


def _learned_positions(recording: Recording, summand: Summand) -> int | None:
    """How many positions there are in the table that a summand's first row comes from, counted from that row on."""
    for call in _makers(recording, summand.value):
        weight = getattr(call.module, "weight", None)
        if isinstance(call.module, torch.nn.Embedding) and isinstance(weight, torch.Tensor) and call.output is not None:
            rows = call.output.reshape(-1, call.output.shape[-1])
            first = (weight.detach() == rows[0]).all(-1).nonzero().flatten()
            if len(first) and _kind(summand.value.tensor, rows.shape[-1]) == "pos_embed":
                return weight.shape[0] - int(first[0])
    return None


def _parameter(recording: Recording, summand: Summand) -> torch.Tensor | None:
    assert summand.adding is not None
    op, where = summand.adding
    # The result less the other operand is the parameter as it was broadcast.
    other = next((v for w, v in op.inputs if w != where), None)
    if other is None or other.tensor is None or op.outputs[0].tensor is None:
        return None
    return op.outputs[0].tensor - other.tensor


def _kind(tensor: torch.Tensor | None, width: int) -> str | None:
    """What an addition is that is the same in every row."""
    if tensor is None or tensor.ndim not in (2, 3) or tensor.shape[-1] != width or tensor.shape[-2] < 2:
        return None
    rows = tensor if tensor.ndim == 3 else tensor[None]
    if not torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-4 * float(rows.abs().max())):
        return None
    flat = torch.allclose(rows, rows[:, :1].expand_as(rows), atol=1e-5 * float(rows.abs().max()))
    return "token_type_embed" if flat else "pos_embed"


def _shared_tap(recording: Recording, summand: Summand, first: Call) -> Tap | None:
    """Where an addition that may have one row for all is reached, shown with a row for each."""
    calls = [c for c in _makers(recording, summand.value) if recording.of(c.path) is c]
    if calls and calls[-1].made is not None:
        tap: Tap = OutputTap(calls[-1].path)
    elif summand.adding is not None:
        op, where = summand.adding
        tap = OpTap(op.owner, op.place, where)
    else:
        return None
    rows = next(iter(recording.inputs.values())).shape[0]
    value = summand.value.tensor
    return tap if value is not None and value.ndim == 3 and value.shape[0] == rows else SharedTap(tap)


def _tap(recording: Recording, value: Value, first: Call) -> Tap | None:
    """A place at which everything up to the first layer can still see a change of `value`."""
    made = [c for c in _makers(recording, value) if recording.of(c.path) is c and c.made is not None]
    fitting = [c for c in made if c.made is not None and c.made.shape == value.shape and not _used(recording, value, c)]
    if fitting:
        return OutputTap(fitting[-1].path)
    core = strip(value)
    given = [c for c in recording.calls if c.given is not None and strip(c.given) is core and recording.of(c.path) is c]
    if given and given[0].given is not None and given[0].given.shape == value.shape and given[0].start <= first.start:
        return InputTap(given[0].path)
    maker = core.maker
    if maker is not None and core.shape == value.shape and len(maker.outputs) == 1:
        return op_tap(core)
    return None


def _used(recording: Recording, value: Value, call: Call) -> bool:
    """Whether something is computed from `value` before `call` returns it."""
    core = strip(value)
    users = (op for op in recording.ops if op.tick < call.end and any(strip(v) is core for _, v in op.inputs))
    return any(all(strip(o) is not core for o in op.outputs) for op in users)


# --- after the stack ----------------------------------------------------------------------------------------------


def bind_final_norm(recording: Recording, prefix: str, last: Call, binding: Binding) -> Call | None:
    """``ln_final``: the norm that takes what the last layer returns."""
    assert last.made is not None
    after = [c for c in recording.calls if c.start > last.end and c.given is not None]
    core = strip(last.made)
    norm = next((c for c in after if c.given and strip(c.given) is core and norm_form(c) is not None), None)
    if norm is None:
        for part in ("scale", "normalized"):
            binding.absent[f"{prefix}ln_final.{part}"] = "no norm follows the last layer"
        return None
    bind_norm(binding, f"{prefix}ln_final", norm, last.made.shape[-1])
    return norm


def bind_unembedding(
    model: torch.nn.Module, recording: Recording, last: Call, norm: Call | None, binding: Binding
) -> None:
    """``logits``, and whether the unembedding may be applied to a residual stream directly."""
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((c for c in recording.calls if c.start > last.end and c.module is embeddings), None)
    if embeddings is None or head is None or head.made is None or recording.result is None:
        binding.absent["logits"] = "the model has no unembedding"
        return
    width = head.made.shape[-1]
    dims = (*RESIDUAL, width)
    binding.widths.d_vocab = width
    kind = "logits over the vocabulary at each position"
    from_stack = norm.made if norm is not None else last.made
    direct = head.given is not None and from_stack is not None and strip(head.given) is strip(from_stack)
    between = "" if direct else "; the model has more between the last layer and its unembedding"
    if strip(head.made) is strip(recording.result):
        if direct:
            binding.unembed = head.path
        binding.add("logits", OutputTap(head.path), dims, kind + between)
    elif recording.result.shape == head.made.shape:
        binding.add("logits", OutputTap(""), dims, f"{kind}, after the model's own scaling or cap{between}")
    else:
        binding.absent["logits"] = "the model's output is not what its unembedding gives"


__all__ = ["bind_beginning", "bind_final_norm", "bind_unembedding", "embedded_input"]
