"""Gradients of a metric with respect to values at sites (or to any value of the trace)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from patchbay.arguments import refused, seen
from patchbay.errors import WrongTraceError
from patchbay.places import here
from patchbay.tracing.namespaces import SiteNamespace
from patchbay.tracing.proxy import Proxy


@overload
def grad(metric: Proxy, wrt: Proxy) -> Proxy: ...


@overload
def grad(metric: Proxy, wrt: Sequence[Proxy]) -> list[Proxy]: ...


def grad(metric: Proxy, wrt: Proxy | Sequence[Proxy]) -> Proxy | list[Proxy]:
    """The gradient of `metric` with respect to each value of `wrt`, computed on the server by reverse-mode autodiff.

    It runs through every operation, write, layer and run in between; the model's parameters collect none. Values of
    many runs may be given at once. The results are proxies like any other: save them, multiply them with activations
    (attribution patching), write them into another run, take the gradient of what depends on them (second order).
    Where only operations without a derivative (``argmax``, comparisons) or `patchbay.ops.stop_gradient` lie between,
    the gradient is zero. In a generating run a gradient goes back through the keys and values of earlier steps; which
    tokens were chosen has no derivative.

    Args:
        metric: one floating-point number (shape ``()`` or ``[1]``).
        wrt: a floating-point value, or several. To differentiate by part of a site, take the site's whole value and
            index its gradient: a slice by itself is not what the model goes on with.

    Returns:
        A proxy of the shape and dtype of `wrt`; a list of them for a sequence.

    Raises:
        ShapeError: the metric is more than one number.
        DTypeError: the metric or a value is not floating-point.
        GraphError: when the trace is verified, if the metric does not depend on a value.
        ArgumentError: the metric or a value is none of a trace.
    """
    given: Any = metric  # whatever its type says
    if not isinstance(given, Proxy):
        raise refused(f"grad: the metric is a value of the trace, one number, not {seen(given)}")
    values: list[Any] = list(wrt) if isinstance(wrt, (list, tuple)) else [wrt]
    for value in values:
        if isinstance(value, SiteNamespace):
            raise value._group_error()
        if not isinstance(value, Proxy):
            raise refused(f"grad: wrt is a value of the trace, or a list of them, not {seen(value)}")
    if not values:
        raise refused("grad: wrt is empty; give the values to differentiate by")
    if any(v._trace is not metric._trace for v in values):
        raise WrongTraceError(
            "grad: the metric and the values to differentiate by belong to different traces", location=here()
        )
    builder = metric._trace.builder
    node = builder.add("grad", (metric._node, *(v._node for v in values)))
    parts = [Proxy(metric._trace, builder.add("item", (node,), {"index": i})) for i in range(len(values))]
    return parts[0] if isinstance(wrt, Proxy) else parts
