"""The identities of the residual stream within one layer: what is added, in which order, and which norms it meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from patchbay_server.models.binding import Binding, BlockShape, close
from patchbay_server.models.checks import Check, Identity, Values, bare
from patchbay_server.models.taps import NormTap


class _Stream:
    """The stream so far: how to compute it from sites, which ones, and how to say it."""

    def __init__(self, value: Callable[[Check], torch.Tensor], said: str, *sources: str) -> None:
        self.value, self.said, self.sources = value, said, sources

    def plus(self, name: str, short: str) -> _Stream:
        before = self.value
        return _Stream(lambda c: before(c) + c.now[name], f"{self.said} + {short}", *self.sources, name)

    def normed(self, module: torch.nn.Module, name: str) -> _Stream:
        before = self.value

        def value(c: Check) -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = module(before(c))
                return result

        return _Stream(value, f"{name}({self.said})", *self.sources)

    def equals(self, site: str, short: str) -> Identity:
        return Identity(
            f"{self.said} = {short}", (*self.sources, site), self.sources, lambda c: close(self.value(c), c.now[site])
        )


def stream_identities(
    model: torch.nn.Module, binding: Binding, values: Values, shape: BlockShape
) -> Iterator[Identity]:
    """Every identity between a layer's input, what is added to it, and its output.

    Args:
        model: the model.
        binding: its derived sites.
        values: of one plain forward.
        shape: how the layer is put together; all of its additions are sites.
    """
    p = shape.prefix
    stream = _Stream(lambda c: c.now[f"{p}.resid_pre"], "resid_pre", f"{p}.resid_pre")
    if shape.start:
        stream = stream.normed(model.get_submodule(shape.start), "norm")
    last = len(shape.additions) - 1
    for i, name in enumerate(shape.additions):
        stream = stream.plus(f"{p}.{name}", name)
        norm = shape.norms[i] if i < len(shape.norms) else None
        site = shape.mids[i] if i < min(last, len(shape.mids)) else "resid_post" if i == last and norm is None else ""
        if site and f"{p}.{site}" in values:
            yield stream.equals(f"{p}.{site}", site)
            stream = _Stream(lambda c, s=site: c.now[f"{p}.{s}"], site, f"{p}.{site}")  # type: ignore[misc]
        if norm is not None:
            ln, path = norm
            module = model.get_submodule(path)
            yield from _norm(module, binding, values, stream, f"{p}.{ln}")
            normalized = f"{p}.{ln}.normalized"
            whole = stream.normed(module, ln)
            if normalized in values:
                tap = bare(binding.sites[normalized].tap)
                assert isinstance(tap, NormTap)
                yield from _finished(module, tap, whole, normalized)
                stream = _Stream(
                    lambda c, m=module, t=tap, n=normalized: t.form.finish(m, c.now[n]).detach(),  # type: ignore[misc]
                    f"normalized of {ln} times gain",
                    normalized,
                )
            else:
                stream = whole
            if i == last:
                yield stream.equals(f"{p}.resid_post", "resid_post")


def _norm(
    module: torch.nn.Module, binding: Binding, values: Values, stream: _Stream, prefix: str
) -> Iterator[Identity]:
    scale, normalized = f"{prefix}.scale", f"{prefix}.normalized"
    if scale not in values or normalized not in values:
        return
    tap = bare(binding.sites[normalized].tap)
    assert isinstance(tap, NormTap)
    form = tap.form

    def divided(c: Check) -> bool:
        return close(form.normalize(stream.value(c), c.now[scale].float()), c.now[normalized])

    del module
    yield Identity(f"({stream.said}) / scale = normalized", (scale, normalized), (scale,), divided)


def _finished(module: torch.nn.Module, tap: NormTap, whole: _Stream, normalized: str) -> Iterator[Identity]:
    def holds(c: Check) -> bool:
        return close(tap.form.finish(module, c.now[normalized]).detach(), whole.value(c))

    yield Identity(f"{whole.said} = its normalized times gain", (*whole.sources, normalized), whole.sources, holds)
