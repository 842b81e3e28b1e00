"""A model's weights by name: ``t.params["blocks.3.attn.W_O"]`` inside a trace, ``model.params[...]`` anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import GraphError
from patchbay.ir.card import ModelCard
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.params import RAW, ParamSpec
from patchbay.places import located
from patchbay.tracing.proxy import Created, Proxy

if TYPE_CHECKING:
    from patchbay.tracing.trace import BaseTrace


class Parameter(Created):
    """A weight of the model, which joins the first trace whose value it meets."""

    __slots__ = ()

    def __init__(self, spec: ParamSpec) -> None:
        self._op = op_spec("param.read")
        self._attrs = {"name": spec.name}
        self._spec = TensorSpec(spec.shape, spec.dtype)

    @property
    def _joined(self) -> str:
        return f"t.params[{self._attrs['name']!r}] in the trace t"

    def __repr__(self) -> str:
        return f"<{self._attrs['name']}: {self._spec}, not in a trace yet>"


class _Names:
    """Parameters' names, as a mapping shows its keys."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card

    def __iter__(self) -> Iterator[str]:
        return (p.name for p in self._card.params)

    def __len__(self) -> int:
        return len(self._card.params)

    def __contains__(self, name: object) -> bool:
        return any(name in (p.name, p.name.removeprefix(RAW)) for p in self._card.params)

    def keys(self) -> list[str]:
        """Every name: canonical ones, then ``param:`` and the checkpoint's."""
        return list(self)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def __repr__(self) -> str:
        if not self._card.params:
            return f"<no parameters of {self._card.name!r} are offered>"
        lines = [f"parameters of {self._card.name!r} ({self._card.weights}):"]
        raw = 0
        shown: dict[str, None] = {}
        for p in self._card.params:
            if p.name.startswith(RAW):
                raw += 1
                continue
            name = re.sub(r"\bblocks\.\d+\.", "blocks.{i}.", p.name)
            shown[f"  {name:<24} {p.dtype}{list(p.shape)}  {p.doc}"] = None
        return "\n".join([*lines, *shown, f"  {raw} by their names in the checkpoint, as {RAW}<name>"])


#: Weights that read the stream through a norm, and the names of that norm in the order in which they are looked for.
_READS = re.compile(
    r"(?P<block>(?:\w+\.)?blocks\.\d+\.)(?P<part>attn|mlp)\.(?P<experts>experts\.|router\.)?"
    r"(?P<kind>W|b)(?P<rest>_[QKV]|_in|_gate|(?<=router\.[Wb]))"
)


def _norms_before(name: str) -> tuple[str, str, tuple[str, ...]] | None:
    """For a weight that reads the stream through a norm: the names of its matrix and bias, and of the norm."""
    if name in ("unembed.W_U", "unembed.b_U"):
        return "unembed.W_U", "unembed.b_U", ("ln_final",)
    found = _READS.fullmatch(name)
    if found is None:
        return None
    stem = f"{found['block']}{found['part']}.{found['experts'] or ''}"
    norms = ("ln1",) if found["part"] == "attn" else ("ln2", "ln1")  # parallel blocks have one norm for both
    return f"{stem}W{found['rest']}", f"{stem}b{found['rest']}", tuple(found["block"] + n for n in norms)


def _folding(params: _Names, name: str) -> tuple[str, str]:
    """Of a weight that reads the stream: the name of its matrix, and of the norm before it."""
    names = _norms_before(name)
    norm = next((n for n in names[2] if f"{n}.w" in params), None) if names else None
    if names is None or norm is None:
        raise GraphError(f"{name!r} does not read the stream through a norm, so nothing can be folded into it")
    return names[0], norm


class FoldedParameter(Created):
    """A weight with a norm folded in, which joins the first trace whose value it meets."""

    __slots__ = ("_name",)

    def __init__(self, params: ModelParams, name: str) -> None:
        matrix, _ = _folding(params, name)
        made = params[name if name in params else matrix]
        shape = made.shape if name == matrix or name in params else (*made.shape[:-2], made.shape[-1])
        self._name, self._spec = name, TensorSpec(shape, made.dtype)

    @property
    def _joined(self) -> str:
        return f"t.params.folded({self._name!r}) in the trace t"

    def add_to(self, trace: BaseTrace) -> int:
        """The node of this value in `trace`."""
        return TraceParams(trace).folded(self._name)._node

    def __repr__(self) -> str:
        return f"<folded {self._name}: {self._spec}, not in a trace yet>"


class ModelParams(_Names):
    """The weights of a model, for use in any of its traces."""

    @located
    def __getitem__(self, name: str) -> Parameter:
        """The parameter called `name`, to stand beside a value of a trace; to index it, take it from ``t.params``.

        Raises:
            GraphError: the model's policy forbids it.
            UnknownSiteError: there is none; the message names the nearest.
        """
        return Parameter(self._card.param(name))

    @located
    def folded(self, name: str) -> FoldedParameter:
        """A weight that reads the stream, with the norm before it folded in; see `TraceParams.folded`.

        Raises:
            GraphError: the weight does not read the stream through a norm; the policy forbids it.
            UnknownSiteError: there is no such weight.
        """
        return FoldedParameter(self, name)


class TraceParams(_Names):
    """The weights of a model as values of one trace."""

    def __init__(self, trace: BaseTrace) -> None:
        super().__init__(trace.builder.card)
        self._trace = trace

    @located
    def __getitem__(self, name: str) -> Proxy:
        """The parameter called `name`.

        Raises:
            GraphError: the model's policy forbids it.
            UnknownSiteError: there is none; the message names the nearest.
        """
        spec = self._trace.builder.card.param(name)
        return Proxy(self._trace, self._trace.builder.add("param.read", (), {"name": spec.name}))

    @located
    def folded(self, name: str) -> Proxy:
        """A weight that reads the stream, with the gain and bias of the norm before it folded in.

        ``normalized @ folded("...W_Q") + folded("...b_Q")`` is what ``W_Q`` makes of the norm's output; biases that the
        model lacks are there. For ``attn.W_Q``, ``W_K``, ``W_V``, ``mlp.W_in``, ``W_gate`` (experts' and router's too),
        ``unembed.W_U`` and the biases of their names.

        Raises:
            GraphError: the weight does not read the stream through a norm; the policy forbids it.
            UnknownSiteError: there is no such weight.
        """
        of, norm = _folding(self, name)
        matrix = self[of]
        gain = self[f"{norm}.w"]
        if name == of:
            return matrix * gain[:, None]
        bias = self[f"{norm}.b"] @ matrix if f"{norm}.b" in self else None
        if name not in self:
            return matrix[..., 0, :] * 0.0 if bias is None else bias
        return self[name] if bias is None else self[name] + bias
