"""References of patchbay.ir.ops.control: bodies run one operation after the other, loops as Python loops.

Gradients and modules of a model have no reference: the tests hold those to automatic differentiation and to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchbay.errors import UnknownOpError
from patchbay.ir.bodies import Body
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.reference.arrays import Array, to_numpy_dtype
from patchbay.reference.registry import Operand, evaluate


def evaluate_control(
    op: str, attrs: Mapping[str, Any], args: Sequence[Array], bodies: Sequence[Body]
) -> tuple[Array, ...]:
    """The parts of a ``scan``, ``cond`` or ``map``.

    Args:
        op: which.
        attrs: its attributes.
        args: its values.
        bodies: of its graph.

    Raises:
        UnknownOpError: a body holds what has no reference.
    """
    filled = op_spec(op).fill(attrs)
    if op == "cond":
        chosen = filled["then"] if bool(args[0]) else filled["otherwise"]
        return run_body(bodies, chosen, args[1:])
    body = bodies[filled["body"]]
    carried = filled["carry"] if op == "scan" else 0
    sliced = filled["xs"] if op == "scan" else filled["mapped"]
    length = filled["length"] if op == "scan" else args[0].shape[0]
    carry = list(args[:carried])
    rows: list[tuple[Array, ...]] = []
    for i in range(length):
        slices = [np.asarray(x[i]) for x in args[carried : carried + sliced]]
        gave = run_body(bodies, filled["body"], [*carry, *slices, *args[carried + sliced :]])
        carry = list(gave[:carried])
        rows.append(gave[carried:])
    stacked = []
    for k, spec in enumerate(body.returns[carried:]):
        whole = np.empty((length, *spec.shape), to_numpy_dtype(spec.dtype))
        for i, row in enumerate(rows):
            whole[i] = row[k]
        stacked.append(whole)
    return (*carry, *stacked)


def run_body(bodies: Sequence[Body], number: int, args: Sequence[Operand]) -> tuple[Array, ...]:
    """What a body gives for its parameters.

    Raises:
        UnknownOpError: it holds what has no reference.
    """
    body = bodies[number]
    values: list[Any] = list(args)
    for node in body.nodes:
        given = [values[a] for a in node.args]
        if node.op == "const":
            values.append(node.attrs["scalar"])
        elif node.op == "item":
            values.append(given[0][node.attrs["index"]])
        elif node.op in BODY_ATTRS:
            values.append(evaluate_control(node.op, node.attrs, given, bodies))
        elif op_spec(node.op).structural:
            raise UnknownOpError(f"{node.op} has no reference")
        else:
            values.append(evaluate(op_spec(node.op), given, node.attrs))
    return tuple(values[r] for r in body.results)
