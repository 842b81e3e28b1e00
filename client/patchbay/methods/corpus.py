"""Activations over a data set: harvested, their means, differences of means and principal components, and the examples
that excite a neuron most.

Each streams the rows through one graph and reduces on the server (`Model.map`); rows are whatever `Model.map` takes,
and further keyword arguments (``batch``, ``resume``, ``progress`` ...) go to it. What is looked at is a site by name,
or a function of a run that returns a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from patchbay import reduce

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from patchbay.datasets.batch_trace import BatchRun
    from patchbay.datasets.entry import MapHow
    from patchbay.datasets.results import MapResults, PrincipalComponents, TopK
    from patchbay.model import Model
    from patchbay.tracing import Proxy

#: A site's name, or a function that takes a run to a value, rows first.
Look: TypeAlias = "str | Callable[[BatchRun], Any]"


def harvest(
    model: Model,
    rows: Iterable[Any],
    looks: Look | Sequence[str] | Mapping[str, Look],
    *,
    dtype: str | None = None,
    **how: Unpack[MapHow],
) -> MapResults:
    """Activations of every row, without padding: in memory, or with ``to=folder`` in safetensors shards.

    Args:
        model: the model.
        rows: the data set.
        looks: a site, several, or what to look at by name.
        dtype: what to cast them to on the server, such as ``"float16"``, to halve the bytes.
        how: of `Model.map`.

    Returns:
        Results by the sites' names, or the names given; a function alone is called ``"value"``.
    """
    if isinstance(looks, str):
        wanted: Mapping[str, Look] = {looks: looks}
    elif callable(looks):
        wanted = {"value": looks}
    else:
        wanted = looks if isinstance(looks, Mapping) else {site: site for site in looks}

    def collect(run: BatchRun) -> dict[str, Proxy]:
        values = {name: _seen(run, look) for name, look in wanted.items()}
        return values if dtype is None else {name: value.astype(dtype) for name, value in values.items()}

    return model.map(rows, collect, **how)


def mean_activations(
    model: Model, rows: Iterable[Any], sites: Iterable[str], **how: Unpack[MapHow]
) -> dict[str, NDArray[Any]]:
    """The mean of each site over the tokens of all rows, such as mean ablation puts in the place of activations.

    Returns:
        float64 arrays by site, of the site's extents behind its positions: ``[d_model]`` for a residual stream,
        ``[heads, d_head]`` for ``attn.z``; assign one with ``run.site(name)[...] = mean``.
    """
    names = tuple(sites)
    found = model.map(rows, lambda run: {name: reduce.mean(run.site(name)) for name in names}, **how)
    return {name: found[name] for name in names}


def mean_difference(
    model: Model,
    rows: Iterable[Any],
    look: Look,
    *,
    label: str = "label",
    values: Sequence[Any] = (0, 1),
    last: bool = False,
    **how: Unpack[MapHow],
) -> NDArray[Any]:
    """The mean over the rows of the second label minus the mean over those of the first: a direction, float64.

    Marks & Tegmark 2023, "The Geometry of Truth"; `difference_in_means` is the same for values of one trace.

    Args:
        model: the model.
        rows: dicts with a prompt under ``"text"`` and a label.
        look: what to take the means of; over all tokens where it has a sequence axis.
        label: the field that holds the label.
        values: the two labels, the one that the direction points away from first.
        last: take the last token of each row alone.
        how: of `Model.map`.

    Raises:
        ValueError: not two labels; no row has one of them.
    """
    if len(values) != 2:
        raise ValueError(f"a difference is between two labels, not {len(values)}")

    def means(run: BatchRun) -> dict[str, Any]:
        value = _seen(run, look)
        value = value[:, -1] if last else value
        return {"means": reduce.mean(value, by=run.column(label, values=values), groups=2)}

    found = model.map(rows, means, **how)["means"]
    for value, mean in zip(values, found, strict=True):
        if (mean != mean).all():
            raise ValueError(f"no row has the {label} {value!r}")
    difference: NDArray[Any] = found[1] - found[0]
    return difference


def principal_components(
    model: Model, rows: Iterable[Any], look: Look, k: int, *, last: bool = False, **how: Unpack[MapHow]
) -> PrincipalComponents:
    """The k directions in which an activation varies most over the tokens of all rows.

    Args:
        model: the model.
        rows: the data set.
        look: what to look at, a vector for each token or row.
        k: how many directions.
        last: take the last token of each row alone.
        how: of `Model.map`.
    """

    def fold(run: BatchRun) -> dict[str, Any]:
        value = _seen(run, look)
        return {"found": reduce.principal_components(value[:, -1] if last else value, k)}

    found: PrincipalComponents = model.map(rows, fold, **how)["found"]
    return found


@dataclass(frozen=True)
class Example:
    """A token at which a neuron is strongly active, with what stands around.

    Attributes:
        value: the activation.
        row: number of the row in the data set.
        position: of the token in its row.
        tokens: the tokens around it, itself included.
        values: the activation at each of them.
        center: which of them it is.
    """

    value: float
    row: int
    position: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    center: int

    def __str__(self) -> str:
        shown = [f"[{t.strip()}]" if i == self.center else t for i, t in enumerate(self.tokens)]
        text = "".join(shown) if any(t.startswith(" ") for t in self.tokens) else " ".join(shown)
        return f"{self.value:8.3f}  row {self.row}: {text}"


def max_activating_examples(
    model: Model,
    rows: Iterable[Any],
    look: Look,
    k: int = 10,
    *,
    neurons: Sequence[int] | None = None,
    context: int = 8,
    **how: Unpack[MapHow],
) -> list[list[Example]]:
    """For each neuron the k tokens of the data set at which it is most active, the most active first.

    Args:
        model: the model.
        rows: the data set.
        look: activations ``[rows, seq, neurons]``, such as ``"blocks.3.mlp.post"`` or the features of a dictionary.
        k: how many examples.
        neurons: which; all when left out.
        context: tokens to show before and after each.
        how: of `Model.map`.
    """

    def fold(run: BatchRun) -> dict[str, Any]:
        value = _seen(run, look)
        return {"top": reduce.topk(value if neurons is None else value[..., list(neurons)], k, context=context)}

    top: TopK = model.map(rows, fold, **how)["top"]
    assert top.positions is not None
    assert top.context is not None
    ids = sorted({int(i) for i in top.context.ids.ravel() if i >= 0})
    names = dict(zip(ids, model.token_strings(ids) if ids else [], strict=True))
    found = []
    for neuron in range(len(top.values)):
        examples = []
        for j in range(k):
            if top.rows[neuron, j] < 0:
                break
            around = [i for i, token in enumerate(top.context.ids[neuron, j]) if token >= 0]
            examples.append(
                Example(
                    float(top.values[neuron, j]),
                    int(top.rows[neuron, j]),
                    int(top.positions[neuron, j]),
                    tuple(names[int(top.context.ids[neuron, j, i])] for i in around),
                    tuple(float(top.context.values[neuron, j, i]) for i in around),
                    around.index(top.context.center),
                )
            )
        found.append(examples)
    return found


def _seen(run: BatchRun, look: Look) -> Proxy:
    value: Proxy = run.site(look) if isinstance(look, str) else look(run)
    return value
