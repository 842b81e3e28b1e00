"""Fitting to activations where they are: gradient descent, logistic probes, k-means, as loops that the server runs.

Adam: Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization". Linear probes: Alain & Bengio 2017, "Understanding
intermediate layers using linear classifier probes". k-means: Lloyd 1982, "Least squares quantization in PCM".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from patchbay.errors import TraceError
from patchbay.tracing.control import scan
from patchbay.tracing.functions import functions
from patchbay.tracing.gradients import grad
from patchbay.tracing.proxy import Created, Proxy
from patchbay.tracing.trees import flatten, unflatten


class Probe(NamedTuple):
    """A logistic probe.

    Attributes:
        direction: [d], in the dtype of the activations.
        bias: a number.
        losses: mean cross-entropy before every step, [steps].
    """

    direction: Any
    bias: Any
    losses: Any

    def logits(self, x: Any) -> Any:
        """Log-odds of activations [..., d], [...]; for values of the trace, and for arrays once it has run."""
        return x @ self.direction + self.bias


class Clusters(NamedTuple):
    """What k-means found.

    Attributes:
        centres: [k, d].
        labels: the nearest centre of each row, int64 [rows].
        spread: sum of squared distances to the nearest centre, before every step, [steps].
    """

    centres: Any
    labels: Any
    spread: Any


def descend(
    loss: Callable[[Any], Any],
    params: Any,
    steps: int,
    *,
    rate: float = 1e-2,
    optimizer: Literal["adam", "sgd"] = "adam",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    unroll: bool = False,
) -> tuple[Any, Proxy]:
    """Parameters that make a loss small, found by gradient descent on the server; as torch.optim.SGD and Adam.

    Args:
        loss: of the parameters, a number; operations on values alone (see `patchbay.scan`). Activations that it
            mentions stay on the server.
        params: where to begin: values, arrays, handles of what an earlier trace kept, or tuples, lists and dicts of
            them. With `unroll` values of the trace.
        steps: how many.
        rate: the learning rate.
        optimizer: which.
        momentum: of ``"sgd"``.
        betas, eps: of ``"adam"``.
        unroll: write every step out instead of looping on the server. Then the loss may make runs of the trace and
            write at their sites (a rotation, a soft prompt, a steering vector); every step is a forward, and its nodes
            and runs count towards the limits of a graph.

    Returns:
        The parameters after the last step, a tree like `params`; and the loss before every step, [steps].

    Raises:
        TraceError: an optimizer that does not exist; with `unroll` parameters that belong to no trace.
        GraphError: what `patchbay.scan` raises.
    """
    if optimizer not in ("adam", "sgd"):
        raise TraceError(f"there is no optimizer {optimizer!r}: adam or sgd")
    leaves, tree = flatten(params)
    ops = functions()
    sqrt = ops["sqrt"]
    # A handle or a weight of the model joins the trace with the loop; alone it is no value to multiply.
    zeros = [ops["zeros"](p.shape, dtype=p.dtype) if isinstance(p, Created) else p * 0 for p in leaves]
    if unroll and not all(isinstance(leaf, Proxy) for leaf in leaves):
        raise TraceError("descend: with unroll=True parameters are values of the trace, such as t.constant(array)")

    def gradients(values: list[Any]) -> tuple[Any, list[Any]]:
        value = loss(unflatten(tree, values))
        return value, grad(value, wrt=values)

    def sgd(state: Any, _: Any) -> Any:
        values, speeds = state
        value, slopes = gradients(values)
        if momentum:
            speeds = [momentum * m + g for m, g in zip(speeds, slopes, strict=True)]
            slopes = speeds
        return ([p - rate * g for p, g in zip(values, slopes, strict=True)], speeds), value

    def adam(state: Any, corrections: Any) -> Any:
        values, first, second = state
        value, slopes = gradients(values)
        first = [betas[0] * m + (1 - betas[0]) * g for m, g in zip(first, slopes, strict=True)]
        second = [betas[1] * v + (1 - betas[1]) * g * g for v, g in zip(second, slopes, strict=True)]
        # The corrections are float32, and must not widen a narrower parameter.
        at = [[c if isinstance(c, float) else c.astype(p.dtype.name) for c in corrections] for p in values]
        new = [
            p - rate * (m / a) / (sqrt(v / b) + eps) for p, m, v, (a, b) in zip(values, first, second, at, strict=True)
        ]
        return (new, first, second), value

    if unroll:
        step = sgd if optimizer == "sgd" else adam
        state: Any = (leaves, zeros if momentum else []) if optimizer == "sgd" else (leaves, zeros, zeros)
        values = []
        for done in range(1, steps + 1):
            state, value = step(state, [1 - beta**done for beta in betas])
            values.append(value)
        return unflatten(tree, state[0]), ops["stack"](values)
    if optimizer == "sgd":
        (found, _), losses = scan(sgd, (leaves, zeros if momentum else []), length=steps)
    else:
        import numpy as np

        count = np.arange(1, steps + 1)
        corrections = tuple((1 - beta**count).astype("float32") for beta in betas)
        (found, _, _), losses = scan(adam, (leaves, zeros, zeros), corrections)
    return unflatten(tree, found), losses


def logistic_probe(
    x: Proxy,
    labels: Any,
    *,
    steps: int = 200,
    rate: float = 1e-2,
    penalty: float = 0.0,
    optimizer: Literal["adam", "sgd"] = "adam",
) -> Probe:
    """A direction and bias whose logistic regression tells two kinds of rows apart, trained on the server.

    Args:
        x: activations, [rows, d].
        labels: 0 or 1 for each row, [rows]; a value of the trace or an array.
        steps: of gradient descent over all rows.
        rate: the learning rate.
        penalty: times the squared length of the direction is added to the loss.
        optimizer: which.
    """
    ops = functions()
    trace = x._trace
    zero = trace.constant([0.0]).astype(x.dtype.name)[0]
    truth = trace.constant(labels).astype(x.dtype.name)

    def loss(p: Any) -> Any:
        direction, bias = p
        logits = x @ direction + bias
        value = (ops["softplus"](logits) - logits * truth).mean()
        return value + penalty * (direction * direction).sum() if penalty else value

    start = (ops["broadcast_to"](zero, (x.shape[-1],)), zero)
    (direction, bias), losses = descend(loss, start, steps, rate=rate, optimizer=optimizer)
    return Probe(direction, bias, losses)


def k_means(x: Proxy, k: int, *, steps: int = 20, start: Any = None) -> Clusters:
    """Lloyd's algorithm on the server; a cluster that loses all its rows stays where it is.

    Args:
        x: rows to sort, [rows, d].
        k: how many clusters.
        steps: how many.
        start: centres to begin from, [k, d]; the first k rows when left out.

    Raises:
        TraceError: fewer rows than clusters and no `start`.
    """
    ops = functions()
    if start is None:
        if x.shape[0] < k:
            raise TraceError(f"k_means: {k} clusters to begin from the first {k} rows, of {x.shape[0]}")
        start = x[:k]
    squares = (x * x).sum(axis=-1)

    def distances(centres: Any) -> Any:
        return squares[:, None] - 2 * (x @ centres.mT) + (centres * centres).sum(axis=-1)[None]  # [rows, k]

    def step(centres: Any, _: Any) -> Any:
        far = distances(centres)
        mine = ops["one_hot"](far.argmin(axis=-1), k).astype(x.dtype.name)  # [rows, k]
        count = mine.sum(axis=0)[:, None]
        moved = (mine.mT @ x) / ops["maximum"](count, 1)
        return ops["where"](count > 0, moved, centres), far.min(axis=-1).sum()

    centres, spread = scan(step, start, length=steps)
    return Clusters(centres, distances(centres).argmin(axis=-1), spread)
