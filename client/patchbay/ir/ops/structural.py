"""Operations that involve a run or the model. Their shapes need the card, so `patchbay.ir.infer` infers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.ir.ops.spec import AttrSpec, OpSpec, TensorSpec, ValueSpec, no_flops


def _call_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del attrs
    assert isinstance(out, TensorSpec)
    return 2 * args[0].size * out.shape[-1]


CONST = OpSpec(
    name="const",
    params=(),
    rule=None,
    flops=no_flops,
    category="structural",
    attrs=(
        AttrSpec("value", "tensor", None, "the tensor"),
        AttrSpec("scalar", "scalar", None, "instead of `value`: a Python number, weak in promotion"),
        AttrSpec("artifact", "str", None, "instead of `value`: the digest of a tensor that the server keeps"),
        AttrSpec("shape", "shape", None, "of the artifact"),
        AttrSpec("dtype", "dtype", None, "of the artifact"),
    ),
    doc="A constant: a tensor that travels with the graph or that the server keeps, or a Python number.",
)

_STEP = AttrSpec("step", "int", None, "forward of a generating run: 0 the prompt's, None every one of them")

SITE_READ = OpSpec(
    name="site.read",
    params=(),
    rule=None,
    flops=no_flops,
    category="structural",
    attrs=(AttrSpec("site", "str", doc="canonical site name"), _STEP),
    doc="The value at a site of a run, after every write at that site that stands before this node.",
)

SITE_WRITE = OpSpec(
    name="site.write",
    params=("value", "indices"),
    rule=None,
    variadic=True,
    optional=1,
    category="structural",
    attrs=(
        AttrSpec("site", "str", doc="canonical site name"),
        AttrSpec("mode", "str", "set", "how the value meets what is there", choices=("set", "add", "mul")),
        AttrSpec("index", "index", (), "part of the site's value that is written"),
        _STEP,
    ),
    doc="Replaces, adds to or scales (part of) the value at a site of a run; yields no value.",
)

CALL = OpSpec(
    name="call",
    params=("value",),
    rule=None,
    flops=_call_flops,
    category="structural",
    attrs=(AttrSpec("target", "str", doc="name of a module on the model's card"),),
    doc="A module of the model (the final norm, the unembedding, an MLP) applied to a value over its last axis.",
)

PARAM_READ = OpSpec(
    name="param.read",
    params=(),
    rule=None,
    flops=no_flops,
    category="structural",
    attrs=(AttrSpec("name", "str", doc="name of a parameter on the model's card"),),
    doc="A weight of the model; whether it may be an output is the server's policy.",
)

ITEM = OpSpec(
    name="item",
    params=("parts",),
    rule=None,
    flops=no_flops,
    category="structural",
    attrs=(AttrSpec("index", "int", doc="which part"),),
    doc="One part of the value of an operation with several results, such as topk.",
)

GRAD = OpSpec(
    name="grad",
    params=("metric", "wrt"),
    rule=None,
    variadic=True,
    flops=no_flops,
    category="structural",
    doc=(
        "Gradients of a scalar with respect to values, through every operation, write and layer in between; one part "
        "for each value, of its shape and dtype. A gradient may be taken of what depends on one (second order)."
    ),
)

RUN_TOKENS = OpSpec(
    name="run.tokens",
    params=(),
    rule=None,
    flops=no_flops,
    category="structural",
    attrs=(AttrSpec("step", "int", None, "before which forward; max_new_tokens for after the last; None for each"),),
    doc=(
        "Token ids that a generating run has made before a forward, int64 [rows, max_new_tokens]; -1 where none was "
        "made (yet)."
    ),
)

STEPS_STACK = OpSpec(
    name="steps.stack",
    params=("value",),
    rule=None,
    flops=no_flops,
    category="structural",
    doc="The values that a value has at the forwards of a generating run, along a new first axis.",
)

STRUCTURAL = (CONST, PARAM_READ, SITE_READ, SITE_WRITE, CALL, ITEM, GRAD, RUN_TOKENS, STEPS_STACK)
