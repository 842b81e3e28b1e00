"""The identities that the sites of a model must satisfy, as a table.

Each names the sites that it is about, those from which the others follow, and what is checked. A check sees the values
of one forward as they were after any write, and those of the plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from patchbay_server.models.beginnings import beginning
from patchbay_server.models.binding import Binding, BlockShape, close
from patchbay_server.models.binding.compare import is_linear, tolerance
from patchbay_server.models.checks import Check, Identity, Values, bare, factor_between
from patchbay_server.models.sums import stream_identities
from patchbay_server.models.taps import InputTap, NormTap, OutputTap, ResultTap


def identities(
    model: torch.nn.Module, binding: Binding, values: Values, inputs: Mapping[str, torch.Tensor]
) -> Iterator[Identity]:
    """Every identity that the sites of `binding` are held to.

    Args:
        model: the model.
        binding: its derived sites.
        values: of one plain forward, which some identities are chosen by (a norm's output is either what attention
            takes or it is not).
        inputs: of the same forward.
    """
    for shape in binding.beginnings:
        yield from beginning(model, binding, values, inputs, shape)
    table = _Table(model, binding, values)
    for block in binding.blocks:
        yield from table.block(block)
    for prefix in dict.fromkeys(shape.prefix.rpartition("blocks.")[0] for shape in binding.blocks):
        yield from table.ends(prefix, [s for s in binding.blocks if s.prefix.rpartition("blocks.")[0] == prefix])


class _Table:
    def __init__(self, model: torch.nn.Module, binding: Binding, values: Values) -> None:
        self.model, self.binding, self.values = model, binding, values

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def norm_of(self, site: str) -> NormTap | None:
        """The tap of a site inside a norm."""
        if not self.has(site):
            return None
        tap = bare(self.binding.sites[site].tap)
        return tap if isinstance(tap, NormTap) else None

    def equal(self, sentence: str, left: tuple[str, ...], right: str, also: tuple[str, ...] = ()) -> Identity:
        """The sum of the sites `left` is the site `right`."""

        def holds(c: Check) -> bool:
            total = c.now[left[0]]
            for name in left[1:]:
                total = total + c.now[name]
            return close(total, c.now[right])

        return Identity(sentence, (*left, right), (*left, *also), holds)

    # --- around a stack

    def ends(self, prefix: str, blocks: list[BlockShape]) -> Iterator[Identity]:
        for shape, following in pairwise(blocks):
            post, pre = f"{shape.prefix}.resid_post", f"{following.prefix}.resid_pre"
            if self.has(post, pre):
                same = lambda c, a=post, b=pre: torch.equal(c.now[a], c.now[b])  # noqa: E731
                yield Identity("resid_post of a block = resid_pre of the next, to the bit", (post, pre), (post,), same)
        last = f"{blocks[-1].prefix}.resid_post"
        norm = f"{prefix}ln_final"
        yield from self._norm(norm, last, ())
        if self.has("logits") and prefix in ("", "decoder."):
            yield from self._logits(norm, last)

    def _logits(self, norm: str, last: str) -> Iterator[Identity]:
        unembed, final = self.binding.unembed, self.binding.ln_final
        if unembed is not None and final is not None:
            matrix, module = self.model.get_submodule(unembed), self.model.get_submodule(final)
            weight = next(matrix.parameters())

            def head(stream: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = matrix(stream.to(weight.dtype))  # a stream kept in float32 is cast before it
                return out

            def again(c: Check, by: Callable[[torch.Tensor], torch.Tensor]) -> bool:
                with torch.no_grad():
                    raw, shown = head(by(c.now[last])), c.now["logits"]
                return close(raw, shown) or rises_with(raw, shown)

            with torch.no_grad():
                exact = close(head(module(self.values[last])), self.values["logits"])
            whole = "logits" if exact else "logits, up to one increasing function"
            yield Identity(
                f"unembed(ln_final(last resid_post)) = {whole}", (last, "logits"), (last,), lambda c: again(c, module)
            )
            normalized = f"{norm}.normalized"
            if self.has(normalized):
                tap = self.norm_of(normalized)
                assert tap is not None

                def finished(c: Check) -> bool:
                    return again(c, lambda _: tap.form.finish(module, c.now[normalized]))

                sentence = f"unembed of normalized times gain = {whole}"
                yield Identity(sentence, (normalized, "logits"), (normalized,), finished)
            return
        yield Identity(
            "the model's output, which follows the last resid_post row by row",
            ("logits",),
            (),
            lambda c: c.follows(last, "logits"),
        )

    # --- norms

    def _norm(
        self, prefix: str, source: str, readers: tuple[str, ...], behind: torch.nn.Module | None = None
    ) -> Iterator[Identity]:
        """The norm called `prefix`, which reads `source` (through `behind`) and is read by one of `readers`."""
        scale, normalized = f"{prefix}.scale", f"{prefix}.normalized"
        if not self.has(scale, normalized, source):
            return
        tap = self.norm_of(normalized)
        assert tap is not None
        form, module = tap.form, self.model.get_submodule(tap.path)

        def given(values: Values) -> torch.Tensor:
            with torch.no_grad():
                return values[source] if behind is None else behind(values[source])

        def divided(c: Check) -> bool:
            return close(form.normalize(given(c.now), c.now[scale].float()), c.now[normalized])

        yield Identity("input / scale = normalized", (scale, normalized), (scale,), divided)

        def whole(c: Check) -> bool:
            with torch.no_grad():
                return close(form.finish(module, c.plain[normalized]), module(given(c.plain)))

        yield Identity("normalized times gain = the norm's output", (scale, normalized), (), whole)
        for reader in readers:
            if self.has(reader) and close(form.finish(module, self.values[normalized]).detach(), self.values[reader]):

                def taken(c: Check, reader: str = reader) -> bool:
                    return close(form.finish(module, c.now[normalized]).detach(), c.now[reader])

                yield Identity(f"normalized times gain = {_short(reader)}", (normalized, reader), (normalized,), taken)

    # --- one block

    def block(self, shape: BlockShape) -> Iterator[Identity]:
        p = shape.prefix
        pre, post = f"{p}.resid_pre", f"{p}.resid_post"
        names = [f"{p}.{n}" for n in shape.additions if self.has(f"{p}.{n}")]
        if len(names) == len(shape.additions) > 0:
            yield from stream_identities(self.model, self.binding, self.values, shape)
        else:
            yield Identity("what the layer's module is given, by definition", (pre,), (), lambda c: True)
            yield Identity("what the layer's module returns, by definition", (post,), (), lambda c: True)
        for add, raw, norm in (
            ("attn_out", "attn.out", "ln1"),
            ("mlp_out", "mlp.out", "ln3" if "cross_attn_out" in shape.additions else "ln2"),
            ("mixer_out", "mixer.out", "ln1"),
            ("cross_attn_out", "cross_attn.out", "ln2"),
        ):
            if self.has(f"{p}.{add}", f"{p}.{raw}"):
                yield from self._raw(f"{p}.{raw}", f"{p}.{add}", f"{p}.{norm}_post")
        readers = tuple(f"{p}.{n}" for n in ("attn_in", "mixer_in", "cross_attn_in", "mlp_in"))
        of_the_stream = [n[0] for n in shape.norms if n is not None]
        for name in ("ln1", "ln2", "ln3"):
            if name not in of_the_stream:
                behind = self.model.get_submodule(shape.start) if shape.start and name == "ln1" else None
                yield from self._norm(f"{p}.{name}", self._ln_source(shape, name), readers, behind)
        yield from self._norm(f"{p}.ln1_post", f"{p}.attn.out", (f"{p}.attn_out",))
        yield from self._norm(f"{p}.ln1_post", f"{p}.mixer.out", (f"{p}.mixer_out",))
        yield from self._norm(f"{p}.ln2_post", f"{p}.mlp.out", (f"{p}.mlp_out",))
        yield from self._norm(f"{p}.ln2_post", f"{p}.cross_attn.out", (f"{p}.cross_attn_out",))
        yield from self._norm(f"{p}.ln3_post", f"{p}.mlp.out", (f"{p}.mlp_out",))
        yield from self._taken(shape)
        yield from self._attention(f"{p}.attn")
        yield from self._attention(f"{p}.cross_attn")
        yield from self._mlp(p)
        yield from self._experts(p)
        yield from self._state_space(p)

    def _ln_source(self, shape: BlockShape, name: str) -> str:
        p = shape.prefix
        tap = self.norm_of(f"{p}.{name}.normalized")
        if tap is None:
            return f"{p}.resid_pre"
        for site in ("resid_mid_cross", "resid_mid", "resid_pre"):
            if self.has(f"{p}.{site}"):
                value = self.values[f"{p}.{site}"]
                normalized = tap.form.normalize(value, tap.form.scale_of(value))
                if close(normalized, self.values[f"{p}.{name}.normalized"]):
                    return f"{p}.{site}"
        return f"{p}.resid_pre"

    def _raw(self, raw: str, added: str, norm: str) -> Iterator[Identity]:
        before, after = self.values[raw], self.values[added]
        names = (raw, added)
        if close(before, after):
            yield Identity(
                "the module's output is what is added", names, (raw,), lambda c: close(c.now[raw], c.now[added])
            )
            return
        factor = factor_between(before, after)
        if factor is not None:
            yield Identity(
                f"the module's output times {factor:.6g} is what is added",
                names,
                (raw,),
                lambda c: close(c.now[raw] * factor, c.now[added]),
            )
        elif not self.has(f"{norm}.normalized"):
            yield Identity(
                "what is added follows it row by row", (raw,), (raw,), lambda c: c.follows(raw, added), plain=False
            )

    def _taken(self, shape: BlockShape) -> Iterator[Identity]:
        """What the modules take: the stream, a norm of it, or what a projection makes the queries of."""
        p = shape.prefix
        streams = [f"{p}.{n}" for n in ("resid_pre", "resid_mid", "resid_mid_cross")]
        for name, follower in (
            ("attn_in", "attn.out"),
            ("mlp_in", "mlp.out"),
            ("mixer_in", "mixer.out"),
            ("cross_attn_in", "cross_attn.out"),
        ):
            site, out = f"{p}.{name}", f"{p}.{follower}"
            if not self.has(site):
                continue
            for stream in streams:
                if self.has(stream) and close(self.values[stream], self.values[site]):
                    yield self.equal(f"{_short(stream)} is what it takes", (stream,), site)
            if self.has(out) and name != "cross_attn_in":  # there, the keys stay with the encoder's rows
                yield Identity(
                    "the module's output follows it row by row",
                    (site,),
                    (site,),
                    lambda c, site=site, out=out: c.follows(site, out),  # type: ignore[misc]
                    plain=False,
                )
            for part in ("attn.q", "attn.k", "attn.v", "cross_attn.q", "mlp.pre", "mlp.pre_linear"):
                target = f"{p}.{part}"
                if part.split(".")[0] == name.removesuffix("_in") and self.has(target):
                    yield from self._projected(site, target)

    def _projected(self, site: str, target: str) -> Iterator[Identity]:
        tap = self.binding.sites[target].tap
        inner = bare(tap)
        if not isinstance(inner, OutputTap) or not inner.path:
            return
        module = self.model.get_submodule(inner.path)
        if not is_linear(module):
            return

        def holds(c: Check) -> bool:
            with torch.no_grad():
                made = module(c.now[site])
            shown = made if inner.layout is None else inner.layout.split(made)
            return close(shown, c.now[target])

        try:
            if not holds(Check(self.values, self.values, frozenset())):
                return
        except RuntimeError:  # the projection takes something of another width
            return
        yield Identity(f"{_short(target)} is its projection of {_short(site)}", (site, target), (site,), holds)

    # --- attention

    def _attention(self, p: str) -> Iterator[Identity]:
        q, k, value, z, z_out, result, out = (f"{p}.{n}" for n in ("q", "k", "v", "z", "z_out", "result", "out"))
        scores, pattern, rot_q, rot_k = (f"{p}.{n}" for n in ("attn_scores", "pattern", "rot_q", "rot_k"))
        sinks = f"{p}.sinks"
        if self.has(pattern, scores, sinks):

            def with_sink(c: Check) -> bool:
                whole = torch.cat([c.now[scores], c.now[sinks].unsqueeze(-1)], -1)
                return close(torch.softmax(whole, -1)[..., :-1], c.now[pattern])

            sentence = "softmax of the scores and the sink, less the sink's share = pattern"
            yield Identity(sentence, (scores, sinks, pattern), (scores, sinks), with_sink)
        elif self.has(pattern, scores):

            def soft(c: Check) -> bool:
                return close(torch.softmax(c.now[scores].float(), -1).to(c.now[pattern].dtype), c.now[pattern])

            yield Identity("softmax of the scores = pattern, whose rows sum to 1", (scores, pattern), (scores,), soft)
        if self.has(pattern, value, z):

            def weighted(c: Check) -> bool:
                groups = c.now[z].shape[2] // c.now[value].shape[2]
                heads = c.now[value].repeat_interleave(groups, dim=2)
                return close(torch.einsum("bhqk,bkhe->bqhe", c.now[pattern].to(heads.dtype), heads), c.now[z])

            yield Identity("pattern times v = z", (pattern, value, z), (pattern, value), weighted)
        taken = z_out if self.has(z_out) else z
        if self.has(z, z_out):
            moved = lambda c: z not in c.written or not torch.equal(c.now[z_out], c.plain[z_out])  # noqa: E731
            yield Identity(
                "the output projection takes it after a gate, norm or factor", (z,), (z,), moved, plain=False
            )
        if self.has(result, taken, out):
            yield from self._results(result, taken, out)
        for flat, normed, rotated in ((q, f"{q}_normed", rot_q), (k, f"{k}_normed", rot_k)):
            yield from self._rotation(flat, normed, rotated)
        used_q, used_k = (rot_q if self.has(rot_q) else q), (rot_k if self.has(rot_k) else k)
        if self.has(used_q, used_k, scores):
            yield from self._products(used_q, used_k, scores)

    def _results(self, result: str, taken: str, out: str) -> Iterator[Identity]:
        tap = self.binding.sites[result].tap
        assert isinstance(tap, ResultTap)
        bias = getattr(self.model.get_submodule(tap.path), "bias", None)

        def total(c: Check) -> bool:
            summed = c.now[result].sum(2)
            return close(summed if bias is None else (summed + bias).detach(), c.now[out])

        yield Identity("sum of result over heads (plus the bias) = attn.out", (result, out), (result,), total)

        def per_head(c: Check) -> bool:
            weight = tap.weight(self.model.get_submodule(tap.path)).detach()
            return close(torch.einsum("...he,hed->...hd", c.now[taken], weight), c.now[result])

        yield Identity(f"{_short(taken)} times W_O = result", (taken, result), (taken,), per_head)

    def _rotation(self, flat: str, normed: str, rotated: str) -> Iterator[Identity]:
        if self.has(flat, normed):
            yield Identity(
                "its norm follows it row by row", (flat,), (flat,), lambda c: c.follows(flat, normed), plain=False
            )
        for source in (flat, normed):
            if not self.has(source, rotated):
                continue
            a, b = self.values[source], self.values[rotated]
            repeats = b.shape[2] // a.shape[2]
            a = a.repeat_interleave(repeats, 2)
            if a.shape == b.shape and close(a[:, 0].sort(-1).values, b[:, 0].sort(-1).values):
                lengths = close(a.float().norm(dim=-1).to(a.dtype), b.float().norm(dim=-1).to(b.dtype))
                sentence = "position 0 is not rotated, and every other position keeps its length"
                yield Identity(sentence, (source, rotated), (), lambda c, lengths=lengths: lengths)  # type: ignore[misc]
            yield Identity(
                f"{_short(rotated)} follows it row by row",
                (source,),
                (source,),
                lambda c, source=source: c.follows(source, rotated),  # type: ignore[misc]
                plain=False,
                essential=True,
            )

    def _products(self, q: str, k: str, scores: str) -> Iterator[Identity]:
        def holds(c: Check) -> bool:
            groups = c.now[q].shape[2] // c.now[k].shape[2]
            keys = c.now[k].repeat_interleave(groups, dim=2)
            return scores_from(torch.einsum("bqhe,bkhe->bhqk", c.now[q], keys), c.now[scores])

        sentence = (
            "scores = one increasing function of the products of queries and keys, plus the same bias in every row"
        )
        yield Identity(sentence, (q, k, scores), (q, k), holds)

    # --- MLP and experts

    def _mlp(self, p: str) -> Iterator[Identity]:
        out, post, pre, linear = (f"{p}.mlp.{n}" for n in ("out", "post", "pre", "pre_linear"))
        if not self.has(out, post):
            return
        tap = self.binding.sites[post].tap
        inner = bare(tap)
        assert isinstance(inner, InputTap)
        down = self.model.get_submodule(inner.path)

        def projected(c: Check) -> bool:
            with torch.no_grad():
                return close(down(c.now[post]), c.now[out])

        yield Identity("down-projection of post = mlp.out", (post, out), (post,), projected)
        if self.has(pre):
            sources = (pre, linear) if self.has(linear) else (pre,)
            yield from self._nonlinearity(sources, post)

    def _nonlinearity(self, sources: tuple[str, ...], post: str) -> Iterator[Identity]:
        def moved(c: Check) -> bool:
            changed = [s for s in sources if s in c.written]
            return not changed or not torch.equal(c.now[post], c.plain[post])

        yield Identity("post is computed from it", sources, sources, moved, plain=False)

    def _experts(self, p: str) -> Iterator[Identity]:
        logits, weights, numbers, each, out = (
            f"{p}.mlp.{n}" for n in ("router_logits", "expert_weights", "expert_indices", "expert_out", "out")
        )
        if self.has(logits, numbers):
            chosen = self.values[numbers].long()
            top = self.values[logits].float().topk(chosen.shape[-1], -1).indices
            if torch.equal(top.sort(-1).values, chosen.sort(-1).values):

                def highest(c: Check) -> bool:
                    best = c.now[logits].float().topk(chosen.shape[-1], -1).indices
                    return torch.equal(best.sort(-1).values, c.now[numbers].long().sort(-1).values)

                yield Identity("the experts of the highest logits are chosen", (logits, numbers), (logits,), highest)

            def routed(c: Check) -> bool:
                return logits not in c.written or torch.equal(c.now[numbers], c.plain[numbers].roll(1, 0))

            sentence = "the chosen experts follow the logits row by row"
            yield Identity(sentence, (logits, numbers), (logits,), routed, plain=False)
        if self.has(each, weights, out):

            def proportional(c: Check) -> bool:
                if weights not in c.written:
                    return True
                left = c.now[each] * c.plain[weights].unsqueeze(-1)
                right = c.plain[each] * c.now[weights].unsqueeze(-1)
                return close(left.to(c.now[each].dtype), right.to(c.now[each].dtype))

            yield Identity("each expert's share is proportional to its weight", (weights,), (weights,), proportional)

            def summed(c: Check) -> bool:
                if not c.written & {each, weights}:
                    return True
                parts = [t.float() for t in (c.plain[out], c.now[each].sum(2), c.plain[each].sum(2), c.now[out])]
                apart = (parts[0] + parts[1] - parts[2] - parts[3]).abs().max()
                return bool(apart <= tolerance(c.now[out].dtype) * max(float(t.abs().max()) for t in parts))

            yield Identity("mlp.out changes by as much as the shares' sum", (each, out), (each, weights), summed)
            if close(self.values[each].sum(2), self.values[out]):
                whole = lambda c: close(c.now[each].sum(2), c.now[out])  # noqa: E731
                yield Identity("sum of the experts' shares = mlp.out", (each, weights, out), (each, weights), whole)

    # --- state spaces

    def _state_space(self, p: str) -> Iterator[Identity]:
        conv, x, dt, b, c, state, y = (f"{p}.ssm.{n}" for n in ("conv", "x", "dt", "B", "C", "state", "y"))
        mixed = f"{p}.mixer.out"
        if self.has(conv, mixed):
            target = x if self.has(x) else mixed

            def moved(v: Check) -> bool:
                return conv not in v.written or not torch.equal(v.now[target], v.plain[target])

            yield Identity(f"{_short(target)} is computed from it", (conv,), (conv,), moved)
        if not self.has(x, dt, b, c, y):
            return
        space = self.binding.spaces[p]

        def recurs(v: Check) -> bool:
            states, _ = space.states(v.now[x], v.now[dt], v.now[b])
            if state in v.now and not close(states.flatten(2, 3), v.now[state].to(v.now[x].dtype)):
                return False
            return close(space.readout(states, v.now[c], v.now[x]), v.now[y].to(v.now[x].dtype))

        names = (x, dt, b, c, y, state) if self.has(state) else (x, dt, b, c, y)
        sentence = "the recurrence written out with A and D gives the same"
        yield Identity(sentence, names, (x, dt, b, c), recurs)


@dataclass(frozen=True)
class Joint:
    """An identity between what is written at several sites at once and what the model makes of it.

    Attributes:
        sentence: it, in words.
        names: the sites that it is about.
        writes: the values to write, by site.
        holds: whether it held, given the values of the forward in which they were written.
        needed: whether the sites are not what they are called when it does not hold.
    """

    sentence: str
    names: tuple[str, ...]
    writes: Values
    holds: Callable[[Values], bool]
    needed: bool = True


def joints(binding: Binding, values: Values) -> Iterator[list[Joint]]:
    """Identities for which several sites must be written at once; those of one list can share a forward."""
    neurons, positions, signs = [], [], []
    for shape in binding.blocks:
        p = shape.prefix
        pre, linear, post = (f"{p}.mlp.{n}" for n in ("pre", "pre_linear", "post"))
        if pre in values and post in values:
            neurons.append(_same_function([s for s in (pre, linear) if s in values], post, values))
            if linear in values:
                signs.append(_linear_side(pre, linear, post, values))
        taken, out = f"{p}.mlp_in", f"{p}.mlp.out"
        if taken in values and out in values and values[taken].ndim == 3 and values[taken].shape[1] > 1:
            positions.append(_own_position(taken, out, values))
    yield neurons
    yield signs
    yield positions


def _same_function(sources: list[str], post: str, values: Values) -> Joint:
    """Neurons that change places in what goes in change places in what comes out."""
    what = "pre and pre_linear" if len(sources) == 2 else "pre"
    writes = {s: values[s].roll(1, -1) for s in sources}
    expected = values[post].roll(1, -1)
    sentence = f"post is one function of {what}, the same for every neuron"
    return Joint(sentence, (*sources, post), writes, lambda now: close(now[post], expected))


def _linear_side(pre: str, linear: str, post: str, values: Values) -> Joint:
    """The other sign on the linear side gives the other sign; this is what tells it from the side with the gate."""
    sentence = "the sign of post changes with the sign of pre_linear"
    return Joint(sentence, (pre, linear), {linear: -values[linear]}, lambda now: close(now[post], -values[post]))


def _own_position(taken: str, out: str, values: Values) -> Joint:
    """What comes out at a position does not change when the others go in changed."""
    changed = values[taken].clone()
    changed[:, 0] = changed[:, 0].roll(1, 0)
    sentence = "mlp.out at a position depends on mlp_in at that position only"

    def holds(now: Values) -> bool:
        here = close(now[out][:, 1:], values[out][:, 1:])
        return here and not torch.equal(now[out][:, 0], values[out][:, 0])

    return Joint(sentence, (taken, out), {taken: changed}, holds, needed=False)


def _short(name: str) -> str:
    return name.split(".", 2)[2] if "blocks." in name else name


def scores_from(products: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether scores are products times one factor, or rise with them (a soft cap), or differ by a constant bias.

    Args:
        products: of queries and keys, ``[rows, head, query, key]``.
        scores: the same, masked entries at -inf or at the dtype's lowest number.
    """
    seen = torch.isfinite(scores) & (scores > -1e30)
    if rises_with(products[seen], scores[seen]):
        return True
    rows, allowed = products.shape[0], tolerance(products.dtype, scores.dtype)
    if rows < 2 or not bool((seen == seen[:1]).all()):
        return False
    x, y = products.float(), scores.float()
    dx, dy = (x[1:] - x[:1])[seen[1:]], (y[1:] - y[:1])[seen[1:]]
    factor = (dx * dy).sum() / (dx * dx).sum().clamp_min(1e-30)
    return bool(factor > 0 and (dx * factor - dy).abs().max() <= 4 * allowed * y[seen].abs().max())


def rises_with(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether `y` is `x` times one positive factor, or rises with it all the way (a soft cap)."""
    allowed = tolerance(x.dtype, y.dtype)
    given, shown = x.float().flatten(), y.float().flatten()
    factor = (given * shown).sum() / (given * given).sum().clamp_min(1e-30)
    if factor > 0 and close((given * factor).to(x.dtype), shown.to(y.dtype)):
        return True
    rise = shown[given.argsort()].diff()
    return bool((rise >= -allowed * shown.abs().max()).all())
