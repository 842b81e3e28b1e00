"""Control as data: bounded loops, choices and maps over pure sub-programs of the graph (`patchbay.ir.bodies`).

Meant as jax.lax.scan, jax.lax.cond and jax.vmap mean them. Each names its bodies by number and has one part for each
of its results, picked apart by ``item``.
"""

from __future__ import annotations

from patchbay.ir.ops.spec import AttrSpec, OpSpec, no_flops

SCAN = OpSpec(
    name="scan",
    params=("values",),
    rule=None,
    variadic=True,
    flops=no_flops,
    category="control",
    attrs=(
        AttrSpec("body", "int", doc="number of the body that is one step"),
        AttrSpec("length", "int", doc="how many steps"),
        AttrSpec("carry", "int", doc="how many of the values are carried from step to step; they come first"),
        AttrSpec("xs", "int", 0, "how many after them are taken slice by slice along their first axis"),
    ),
    doc=(
        "A loop: the body takes what is carried, a slice of each x, and the remaining values whole; it gives what is "
        "carried on, and a value of its own, stacked over the steps."
    ),
)

COND = OpSpec(
    name="cond",
    params=("condition", "values"),
    rule=None,
    variadic=True,
    optional=1,
    flops=no_flops,
    category="control",
    attrs=(
        AttrSpec("then", "int", doc="number of the body that runs where the condition is true"),
        AttrSpec("otherwise", "int", doc="number of the body that runs where it is false"),
    ),
    doc="One of two bodies applied to the values, chosen by a bool of no dimensions; the other does not run.",
)

MAP = OpSpec(
    name="map",
    params=("values",),
    rule=None,
    variadic=True,
    flops=no_flops,
    category="control",
    attrs=(
        AttrSpec("body", "int", doc="number of the body"),
        AttrSpec("mapped", "int", doc="how many of the values are taken slice by slice; they come first"),
    ),
    doc="The body applied to every slice along the first axis of the mapped values; its results are stacked.",
)

CONTROL = (SCAN, COND, MAP)

#: Attributes that name bodies, by operation.
BODY_ATTRS = {"scan": ("body",), "cond": ("then", "otherwise"), "map": ("body",)}
