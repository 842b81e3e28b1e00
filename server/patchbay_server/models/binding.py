"""Where the canonical sites of a model are, derived from what one tiny forward did with its tensors.

No family's module names appear here. A residual stream is found by its sums, an attention module by its call of the
attention function, queries and keys by what that function received (at position 0 a rotary embedding is the identity),
norms by what they compute. A site that cannot be found is declared absent with the reason; `proofs` tests the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from patchbay_server.models.recording import AttentionCall, Call, Recording
from patchbay_server.models.taps import (
    AttentionInsideTap,
    Heads,
    InputTap,
    NormForm,
    NormTap,
    OutputTap,
    ResultTap,
    SharedRowsTap,
    Tap,
)


@dataclass(frozen=True)
class FoundSite:
    """A canonical site and the way to it.

    Attributes:
        name: canonical name.
        tap: how it is reached.
        dims: symbolic extents, as in a SiteSpec.
        doc: one sentence.
    """

    name: str
    tap: Tap
    dims: tuple[int | str, ...]
    doc: str


@dataclass
class Widths:
    """Extents read off the recording; 0 where a model has no such thing."""

    n_layers: int = 0
    d_model: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    d_vocab: int = 0


@dataclass
class Binding:
    """What was derived.

    Attributes:
        sites: found sites by canonical name.
        absent: reason by canonical name.
        widths: extents.
        layers: paths of the decoder layers, in order.
        ln_final: path of the final norm, or None.
        unembed: path of the unembedding, or None.
        attention: attention module path by layer.
    """

    sites: dict[str, FoundSite] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    widths: Widths = field(default_factory=Widths)
    layers: list[str] = field(default_factory=list)
    ln_final: str | None = None
    unembed: str | None = None
    attention: dict[int, str] = field(default_factory=dict)

    def add(self, name: str, tap: Tap, dims: tuple[int | str, ...], doc: str) -> None:
        self.sites[name] = FoundSite(name, tap, dims, doc)


RESIDUAL = ("rows", "seq")


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
        _Block(recording, binding, index, path).bind()
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
        _bind_norm(binding, "ln_final", norm, d_model)
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


def _bind_norm(binding: Binding, prefix: str, call: Call, d_model: int) -> None:
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


# --- one block ----------------------------------------------------------------------------------------------------


class _Block:
    """Derives the sites of one layer."""

    def __init__(self, recording: Recording, binding: Binding, index: int, path: str) -> None:
        self.recording, self.binding, self.path, self.index = recording, binding, path, index
        self.prefix = f"blocks.{index}"
        call = recording.of(path)
        assert call is not None and call.input is not None and call.output is not None
        self.x, self.y = call.input, call.output  # [rows, seq, d_model], before and after the block
        self.children = recording.children(path)
        self.d_model = self.x.shape[-1]

    def add(self, name: str, tap: Tap, dims: tuple[int | str, ...], doc: str) -> None:
        self.binding.add(f"{self.prefix}.{name}", tap, dims, doc)

    def absent(self, reason: str, *names: str) -> None:
        for name in names:
            self.binding.absent[f"{self.prefix}.{name}"] = reason

    def bind(self) -> None:
        residual = (*RESIDUAL, self.d_model)
        self.add("resid_pre", InputTap(self.path), residual, "residual stream before the block")
        self.add("resid_post", OutputTap(self.path), residual, "residual stream after the block")
        inner = [c for c in self.recording.attention if c.path.startswith(self.path + ".")]
        attended = inner[0] if len(inner) == 1 else None
        module = self.recording.of(attended.path) if attended is not None else None
        self._bind_stream(module)
        if attended is None or module is None:
            reason = "the layer does not call transformers' attention interface exactly once"
            names = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result", "out")
            self.absent(reason, *(f"attn.{n}" for n in names))
        else:
            self.binding.attention[self.index] = attended.path
            self._bind_attention(attended, module)

    def _bind_stream(self, attention: Call | None) -> None:
        """resid_mid, attn_out, mlp_out, ln1, ln2 and the MLP, from the sums that the block makes."""
        residual = (*RESIDUAL, self.d_model)
        like = [c for c in self.children if c.output is not None and c.output.shape == self.x.shape]
        first_add = self._first_addition(like)
        before_mlp = self.x
        if first_add is not None:
            added, reader = first_add
            assert reader.input is not None
            before_mlp = reader.input
            self.add("attn_out", OutputTap(added.path), residual, "what attention adds to the residual stream")
            self.add("resid_mid", InputTap(reader.path), residual, "residual stream between attention and MLP")
            second = next(
                (c for c in reversed(like) if c.start >= reader.start and close(_sum(before_mlp, c.output), self.y)),
                None,
            )
        else:
            second = None
            self._bind_parallel(like, attention)
        if second is not None:
            self.add("mlp_out", OutputTap(second.path), residual, "what the MLP adds to the residual stream")
            self._bind_mlp(self._maker_of(second, like))
        elif f"{self.prefix}.mlp_out" not in self.binding.sites:
            self.absent("no module's output is what is added after resid_mid", "mlp_out")
            self._bind_mlp(None)
        self._bind_norms(before_mlp, attention)

    def _first_addition(self, like: list[Call]) -> tuple[Call, Call] | None:
        """The call whose output is added to the block's input, and the first call that reads the sum."""
        for reader in self.children:
            for added in like:
                if added.end < reader.start and added.output is not None and close(self.x + added.output, reader.input):
                    return added, reader
        return None

    def _bind_parallel(self, like: list[Call], attention: Call | None) -> None:
        """Blocks that add attention and MLP at once."""
        residual = (*RESIDUAL, self.d_model)
        for a in like:
            for m in like:
                if a is m or attention is None or not (a is attention or same(a.input, attention.output)):
                    continue
                assert a.output is not None and m.output is not None
                if close(self.x + a.output + m.output, self.y):
                    self.add("attn_out", OutputTap(a.path), residual, "what attention adds to the residual stream")
                    self.add("mlp_out", OutputTap(m.path), residual, "what the MLP adds to the residual stream")
                    self.absent("attention and MLP are added at once: there is no stream between them", "resid_mid")
                    self._bind_mlp(self._maker_of(m, like))
                    return
        self.absent("no sum of the block's parts gives its output", "resid_mid", "attn_out")

    def _maker_of(self, call: Call, like: list[Call]) -> Call:
        """The MLP itself, when `call` is a norm that follows it."""
        if norm_form(call) is None:
            return call
        return next((c for c in like if c is not call and same(c.output, call.input)), call)

    def _bind_norms(self, before_mlp: torch.Tensor, attention: Call | None) -> None:
        norms = [c for c in self.children if norm_form(c) is not None]
        first = next((c for c in norms if same(c.input, self.x)), None)
        second = next((c for c in norms if c is not first and same(c.input, before_mlp)), None)
        for name, call in (("ln1", first), ("ln2", second)):
            if call is None:
                where = "the block's input" if name == "ln1" else "the stream before the MLP"
                self.absent(f"no norm of its own reads {where}", f"{name}.scale", f"{name}.normalized")
            else:
                _bind_norm(self.binding, f"{self.prefix}.{name}", call, self.d_model)

    # --- attention

    def _bind_attention(self, attended: AttentionCall, module: Call) -> None:
        n_heads, d_head = attended.rot_q.shape[2:]
        n_kv_heads = attended.rot_k.shape[2]
        widths = self.binding.widths
        widths.n_heads, widths.n_kv_heads, widths.d_head = n_heads, n_kv_heads, d_head
        self.add("attn.out", OutputTap(module.path), (*RESIDUAL, self.d_model), "raw output of the attention module")
        square = ("rows", n_heads, "query", "key")
        inside = module.path
        self.add(
            "attn.attn_scores",
            AttentionInsideTap(inside, "attn_scores"),
            square,
            "scaled, masked scores (-inf where masked)",
        )
        self.add("attn.pattern", AttentionInsideTap(inside, "pattern"), square, "attention pattern; rows sum to 1")
        before = [c for c in self.recording.within(inside) if 0 <= c.end < attended.tick and c.output is not None]
        rotary = False
        for name, value, heads in (("q", attended.rot_q, n_heads), ("k", attended.rot_k, n_kv_heads)):
            found, rotated = self._projection(before, value)
            rotary |= rotated
            what = "queries" if name == "q" else "keys"
            dims = (*RESIDUAL, heads, d_head)
            if found is None:
                self.absent(f"no module's output holds the {what}", f"attn.{name}")
            else:
                self.add(f"attn.{name}", found, dims, f"{what}" + (", before the rotary embedding" if rotated else ""))
            rot_doc = f"{what} after the rotary embedding"
            self.add(f"attn.rot_{name}", AttentionInsideTap(inside, f"rot_{name}"), dims, rot_doc)
        if not rotary:
            for name in ("rot_q", "rot_k"):
                if f"{self.prefix}.attn.{name[-1]}" in self.binding.sites:
                    self.binding.sites.pop(f"{self.prefix}.attn.{name}")
                    self.absent("the model has no rotary embedding", f"attn.{name}")
        value_tap, _ = self._projection(before, attended.v)
        dims = (*RESIDUAL, attended.v.shape[2], attended.v.shape[3])
        self.add("attn.v", value_tap or AttentionInsideTap(inside, "v"), dims, "values")
        self._bind_output_projection(attended, module, n_heads, attended.v.shape[3])

    def _bind_output_projection(self, attended: AttentionCall, module: Call, n_heads: int, width: int) -> None:
        after = [c for c in self.recording.within(module.path) if c.start > attended.tick and is_linear(c.module)]
        fitting = [c for c in after if c.input is not None and c.input.shape[-1] == n_heads * width]
        if len(fitting) != 1:
            self.absent("no single projection follows the attention function", "attn.z", "attn.result")
            return
        projection, heads = fitting[0], Heads(0, n_heads, width)
        self.add(
            "attn.z", InputTap(projection.path, heads), (*RESIDUAL, n_heads, width), "pattern times values, per head"
        )
        result_dims = (*RESIDUAL, n_heads, self.d_model)
        doc = "what each head writes: z times its slice of W_O, without the bias; computed only when asked for"
        self.add("attn.result", ResultTap(projection.path, heads), result_dims, doc)

    def _projection(self, calls: list[Call], value: torch.Tensor) -> tuple[Tap | None, bool]:
        """The linear module's output that holds `value`, and whether a rotary embedding stands between them."""
        linear = [c for c in calls if is_linear(c.module)]
        for call, start in _slices_equal(linear, value):
            return OutputTap(call.path, Heads(start, value.shape[2], value.shape[3])), False
        at_zero = value[:, :1]
        for call, start in _slices_equal(linear, at_zero):
            return OutputTap(call.path, Heads(start, value.shape[2], value.shape[3])), True
        for norm in (c for c in calls if norm_form(c) is not None):
            assert norm.output is not None and norm.input is not None
            for target, rotated in ((value, False), (at_zero, True)):
                if _holds(norm.output, target):
                    raw = _as_heads(norm.input, value)
                    for call, start in _slices_equal(linear, raw) if raw is not None else ():
                        return OutputTap(call.path, Heads(start, value.shape[2], value.shape[3])), rotated
        return None, False

    # --- MLP

    def _bind_mlp(self, module: Call | None) -> None:
        names = ("mlp.pre", "mlp.pre_linear", "mlp.post")
        if module is None:
            self.absent("the MLP was not found", "mlp.out", *names)
            return
        self.add("mlp.out", OutputTap(module.path), (*RESIDUAL, self.d_model), "raw output of the MLP module")
        inside = self.recording.within(module.path)
        linear = [c for c in inside if is_linear(c.module)]
        if len(linear) < 2 or linear[-1].input is None or linear[-1].input.ndim != 3:
            self.absent(f"{module.path} is not a feed-forward of linear modules", *names)
            return
        *ups, down = linear
        d_mlp = down.input.shape[-1]  # type: ignore[union-attr]
        self.binding.widths.d_mlp = d_mlp
        dims = (*RESIDUAL, d_mlp)
        self.add("mlp.post", InputTap(down.path), dims, "hidden activations, after nonlinearity and gate")
        act = next((c for c in inside if not is_linear(c.module) and any(same(c.input, u.output) for u in ups)), None)
        fitting = [u for u in ups if u.output is not None and u.output.shape[-1] == d_mlp]
        pre = next((u for u in fitting if act is not None and same(act.input, u.output)), None)
        if pre is None and len(fitting) == 1:
            pre = fitting[0]
        if pre is None:
            self.absent(f"{module.path} fuses its projections or its nonlinearity", "mlp.pre", "mlp.pre_linear")
            return
        self.add("mlp.pre", OutputTap(pre.path), dims, "input of the nonlinearity")
        others = [u for u in fitting if u is not pre]
        if len(others) == 1:
            self.add("mlp.pre_linear", OutputTap(others[0].path), dims, "linear side of the gate")
        else:
            self.absent("the MLP is not gated", "mlp.pre_linear")


# --- comparing tensors --------------------------------------------------------------------------------------------


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal in shape and in every bit."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal up to the rounding of their dtype."""
    if a is None or b is None or a.shape != b.shape or not a.is_floating_point() or not b.is_floating_point():
        return False
    tolerance = 64 * torch.finfo(b.dtype).eps
    scale = float(b.abs().max()) + 1e-12
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def _sum(a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if b is None else a + b


def is_linear(module: torch.nn.Module) -> bool:
    """A leaf that multiplies by one weight matrix (torch's Linear, transformers' Conv1D and their quantized kin)."""
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding)


def norm_form(call: Call) -> NormForm | None:
    """What normalization the called module computes, if it computes one."""
    value, output = call.input, call.output
    weight = getattr(call.module, "weight", None)
    if value is None or output is None or value.shape != output.shape or not value.is_floating_point():
        return None
    if isinstance(weight, torch.Tensor) and weight.ndim != 1:
        return None
    eps = next(
        (float(e) for n in ("variance_epsilon", "eps") if isinstance(e := getattr(call.module, n, None), (int, float))),
        None,
    )
    if eps is None:
        return None
    for centered in (False, True):
        for offset in (0.0, 1.0):
            form = NormForm(centered, eps, offset)
            if close(form.finish(call.module, form.normalize(value, form.scale_of(value))), output):
                return form
    return None


def _as_heads(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """`value` as ``[rows, seq, head, d_head]`` when it holds as many elements as `like`."""
    if value.shape == like.shape:
        return value
    if value.shape == like.transpose(1, 2).shape:
        return value.transpose(1, 2)
    if value.shape == like.flatten(2).shape:
        return value.reshape(like.shape)
    return None


def _holds(output: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether `output` (heads in any layout) agrees with `target` on the positions that `target` has."""
    rows, seq, heads, width = target.shape
    for view in (output, output.transpose(1, 2) if output.ndim == 4 else None):
        if view is None or view.shape[0] != rows or view.numel() != rows * view.shape[1] * heads * width:
            continue
        if close(view.reshape(rows, view.shape[1], heads, width)[:, :seq], target):
            return True
    return False


def _slices_equal(calls: list[Call], value: torch.Tensor) -> Iterator[tuple[Call, int]]:
    """Calls, and the feature at which a contiguous slice of their output equals `value` on the positions it has."""
    seq, size = value.shape[1], value.shape[2] * value.shape[3]
    flat = value.reshape(*value.shape[:2], size)
    for call in calls:
        output = call.output
        if output is None or output.ndim != 3 or output.shape[0] != value.shape[0]:
            continue
        for start in range(0, output.shape[-1] - size + 1, value.shape[3]):
            if torch.equal(output[:, :seq, start : start + size], flat):
                yield call, start
