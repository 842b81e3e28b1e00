"""Whether the derived sites are what their names say: identities checked on random tokens when a model is loaded.

A site that fails, or that no identity reaches, is taken off the card with the reason. The identities are read through
the same taps that experiments use, so the taps are proved along with the binding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from patchbay_server.models.binding import Binding, close
from patchbay_server.models.inputs import forward
from patchbay_server.models.taps import Handle, NormTap, ResultTap, Tap


@dataclass
class Proof:
    """Outcome of the checks.

    Attributes:
        proved: the identity that held, in words, by site.
        failed: the identity that did not hold, by site.
        order: position of every tapped site in the forward, from 0.
    """

    proved: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    def judge(self, holds: bool, identity: str, *names: str) -> None:
        """Record for each of `names` that `identity` held or not; one failure outweighs any success."""
        for name in names:
            if holds:
                self.proved.setdefault(name, identity)
            else:
                self.failed[name] = identity


def read_all(
    model: torch.nn.Module, taps: Mapping[str, Tap], inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every tap's value in one forward, in the order reached, and the forward's output."""
    values: dict[str, torch.Tensor] = {}

    def reader(name: str) -> Callable[[torch.Tensor], None]:
        def read(value: torch.Tensor) -> None:
            values[name] = value.clone()

        return read

    handles: list[Handle] = []
    try:
        for name, tap in taps.items():
            handles.append(tap.attach(model, reader(name), writes=False))
        with torch.no_grad():
            return values, forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def write_same(model: torch.nn.Module, taps: Mapping[str, Tap], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The forward's output when every tap writes back a copy of what it read."""
    handles: list[Handle] = []
    try:
        for tap in taps.values():
            handles.append(tap.attach(model, lambda value: value.clone(), writes=True))
        with torch.no_grad():
            return forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def prove(model: torch.nn.Module, binding: Binding, inputs: Mapping[str, torch.Tensor]) -> Proof:
    """Check every identity of `binding` on `inputs`."""
    proof = Proof()
    taps = {name: site.tap for name, site in binding.sites.items()}
    with torch.no_grad():
        plain = forward(model, inputs)
    values, tapped = read_all(model, taps, inputs)
    proof.order = {name: i for i, name in enumerate(values)}
    proof.judge(torch.equal(plain, tapped), "reading every site leaves the output unchanged to the bit", *taps)
    for name in taps:
        if name not in values:
            proof.failed[name] = "the forward never reaches it"
    if proof.failed:
        return proof
    proof.proved.clear()  # unchanged output is necessary for all, but says nothing about which value was read
    _Identities(model, binding, values, proof).check()
    for name in set(taps) - set(proof.proved) - set(proof.failed):
        proof.failed[name] = "no identity reaches it"
    good = {name: tap for name, tap in taps.items() if name not in proof.failed}
    if not close(write_same(model, good, inputs), plain):
        for name, tap in good.items():
            if not close(write_same(model, {name: tap}, inputs), plain):
                proof.failed[name] = "writing back what was read changes the output"
    return proof


class _Identities:
    def __init__(
        self, model: torch.nn.Module, binding: Binding, values: Mapping[str, torch.Tensor], proof: Proof
    ) -> None:
        self.model, self.binding, self.values, self.proof = model, binding, values, proof

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def check(self) -> None:
        last = len(self.binding.layers) - 1
        for i in range(last + 1):
            self._block(f"blocks.{i}", f"blocks.{i + 1}" if i < last else None)
        self._ends(last)

    def _ends(self, last: int) -> None:
        v, judge = self.values, self.proof.judge
        if self.has("embed", "pos_embed"):
            holds = close(v["embed"] + v["pos_embed"], v["blocks.0.resid_pre"])
            judge(holds, "embed + pos_embed = blocks.0.resid_pre", "embed", "pos_embed")
        elif self.has("embed"):
            ratio = v["blocks.0.resid_pre"] / v["embed"].where(v["embed"] != 0, torch.ones_like(v["embed"]))
            factor = ratio.flatten()[ratio.flatten() != 0].median()
            holds = close(v["embed"] * factor, v["blocks.0.resid_pre"])
            scaled = "" if abs(float(factor) - 1) < 1e-3 else f" times {float(factor):.6g}"
            judge(holds, f"embed{scaled} = blocks.0.resid_pre", "embed")
        if self.binding.ln_final is not None:
            self._norm("ln_final", v[f"blocks.{last}.resid_post"])
        if self.has("logits"):
            if self.binding.unembed is not None and self.binding.ln_final is not None:
                norm = self.model.get_submodule(self.binding.ln_final)
                unembed = self.model.get_submodule(self.binding.unembed)
                with torch.no_grad():
                    again = unembed(norm(v[f"blocks.{last}.resid_post"]))
                judge(close(again, v["logits"]), "unembed(ln_final(last resid_post)) = logits", "logits")
            else:
                judge(True, "it is the model's output", "logits")

    def _norm(self, prefix: str, source: torch.Tensor) -> None:
        scale, normalized = f"{prefix}.scale", f"{prefix}.normalized"
        if not self.has(scale, normalized):
            return
        tap = self.binding.sites[normalized].tap
        assert isinstance(tap, NormTap)
        module = self.model.get_submodule(tap.path)
        with torch.no_grad():
            output = module(source)
            finished = tap.form.finish(module, self.values[normalized])
        form = tap.form.normalize(source, self.values[scale].float())
        holds = close(finished, output) and close(form, self.values[normalized])
        self.proof.judge(
            holds, "input / scale = normalized; normalized times gain = the norm's output", scale, normalized
        )

    def _block(self, p: str, following: str | None) -> None:
        v, judge = self.values, self.proof.judge
        pre, mid, post, attn, mlp = (
            f"{p}.{n}" for n in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        )
        if self.has(mid, attn):
            judge(close(v[pre] + v[attn], v[mid]), "resid_pre + attn_out = resid_mid", pre, attn, mid)
        if self.has(mid, mlp):
            judge(close(v[mid] + v[mlp], v[post]), "resid_mid + mlp_out = resid_post", mid, mlp, post)
        if self.has(attn, mlp) and not self.has(mid):
            judge(
                close(v[pre] + v[attn] + v[mlp], v[post]),
                "resid_pre + attn_out + mlp_out = resid_post",
                pre,
                attn,
                mlp,
                post,
            )
        if following is not None:
            nxt = f"{following}.resid_pre"
            judge(torch.equal(v[post], v[nxt]), "resid_post of a block = resid_pre of the next", post, nxt)
        else:
            judge(True, "it is the last layer's output", post)
        judge(True, "it is the layer's input", pre)
        self._norm(f"{p}.ln1", v[pre])
        if f"{p}.ln2.scale" in v:
            self._norm(f"{p}.ln2", v.get(mid, v[pre]))
        self._attention(p)
        self._mlp(p)

    def _attention(self, p: str) -> None:
        v, judge = self.values, self.proof.judge
        q, k, value, z, result, out = (f"{p}.attn.{n}" for n in ("q", "k", "v", "z", "result", "out"))
        scores, pattern, rot_q, rot_k = (f"{p}.attn.{n}" for n in ("attn_scores", "pattern", "rot_q", "rot_k"))
        if self.has(pattern, scores):
            sums = v[pattern].float().sum(-1)
            judge(close(sums, torch.ones_like(sums)), "rows of the pattern sum to 1", pattern)
            soft = torch.softmax(v[scores], -1, dtype=torch.float32).to(v[pattern].dtype)
            judge(close(soft, v[pattern]), "softmax of the scores = pattern", scores, pattern)
        if self.has(pattern, value, z):
            groups = v[z].shape[2] // v[value].shape[2]
            heads = v[value].repeat_interleave(groups, dim=2)
            again = torch.einsum("bhqk,bkhe->bqhe", v[pattern], heads)
            judge(close(again, v[z]), "pattern times v = z", value, z, pattern)
        if self.has(result, z, out):
            tap = self.binding.sites[result].tap
            assert isinstance(tap, ResultTap)
            bias = getattr(self.model.get_submodule(tap.path), "bias", None)
            total = v[result].sum(2) if bias is None else v[result].sum(2) + bias
            judge(close(total, v[out]), "sum of result over heads (plus the bias) = attn.out", result, z, out)
        for flat, rotated in ((q, rot_q), (k, rot_k)):
            if not self.has(flat, rotated):
                continue
            if close(v[flat][:, 0], v[rotated][:, 0]):
                holds = close(v[flat].float().norm(dim=-1), v[rotated].float().norm(dim=-1))
                judge(holds, "equal to its rotated form at position 0, and of equal norm at every other", flat, rotated)
            else:  # a norm of queries and keys stands between the two
                judge(True, "bit-equal to what the norm before the rotation is given", flat)
        used_q, used_k = (rot_q if rot_q in v else q), (rot_k if rot_k in v else k)
        if self.has(used_q, used_k, scores):
            groups = v[used_q].shape[2] // v[used_k].shape[2]
            products = torch.einsum("bqhe,bkhe->bhqk", v[used_q], v[used_k].repeat_interleave(groups, dim=2)).float()
            seen = torch.isfinite(v[scores])
            holds = _one_increasing_function(products[seen], v[scores].float()[seen])
            judge(
                holds,
                "the scores are one increasing function of the products of queries and keys",
                used_q,
                used_k,
                scores,
            )

    def _mlp(self, p: str) -> None:
        v, judge = self.values, self.proof.judge
        out, post, pre, linear = (f"{p}.mlp.{n}" for n in ("out", "post", "pre", "pre_linear"))
        if not self.has(out):
            return
        if not self.has(post):
            judge(True, "it is the MLP module's output", out)
            return
        down = self.model.get_submodule(self.binding.sites[post].tap.path)  # type: ignore[attr-defined]
        with torch.no_grad():
            judge(close(down(v[post]), v[out]), "down-projection of post = mlp.out", post, out)
        if self.has(pre):
            # The nonlinearity is unknown: equal inputs must give equal outputs, and larger gates scale the product.
            gate = v[linear] if self.has(linear) else torch.ones_like(v[pre])
            activated = v[post] / gate.where(gate != 0, torch.ones_like(gate))
            holds = _is_function_of(v[pre], activated)
            names = (pre, linear) if self.has(linear) else (pre,)
            judge(holds, "post is one nonlinearity of pre" + (" times pre_linear" if self.has(linear) else ""), *names)


def _one_increasing_function(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether `y` is `x` times one positive factor, or rises with it all the way (a soft cap)."""
    factor = (x * y).sum() / (x * x).sum().clamp_min(1e-30)
    if factor > 0 and close(x * factor, y):
        return True
    rise = y[x.argsort()].diff()
    return bool((rise >= -1e-4 * y.abs().max()).all())


def _is_function_of(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether `y` looks like one continuous elementwise function of `x`: sorted by x, y has no jumps."""
    order = x.flatten().float().argsort()
    xs, ys = x.flatten().float()[order], y.flatten().float()[order]
    near = (xs[1:] - xs[:-1]).abs() < 1e-3 * (xs.abs().max() + 1e-12)
    jumps = (ys[1:] - ys[:-1]).abs()[near]
    return not near.any() or bool((jumps <= 2e-2 * (ys.abs().max() + 1e-12)).float().mean() > 0.98)


__all__ = ["Proof", "prove", "read_all", "write_same"]
