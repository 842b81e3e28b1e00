"""Feature visualization: an input that excites one channel, found by climbing its gradient.

Olah, Mordvintsev & Schubert 2017, "Feature Visualization" (Distill). The objective is their channel objective (the mean
of one channel over rows and places); of their regularisers, transformation robustness (small shifts) and a penalty on
the distance of neighbouring pixels are offered. The climb happens in the client: the service gives gradients only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchbay.errors import TraceError
from patchbay.tracing import grad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patchbay.model import Model


@dataclass(frozen=True)
class Visualization:
    """An input found by `feature_visualization`.

    Attributes:
        input: the input, ``[rows, ...]`` as the model takes it.
        activations: the channel's mean activation before each step, and at the end: ``[steps + 1]``.
    """

    input: NDArray[np.float32]
    activations: NDArray[np.float64]


def feature_visualization(
    model: Model,
    site: str,
    channel: int,
    steps: int = 64,
    *,
    start: Any,
    input_site: str,
    name: str | None = None,
    step_size: float = 0.05,
    jitter: int = 0,
    smoothness: float = 0.0,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Visualization:
    """Climb from `start` to an input on which `channel` of `site` is large on average.

    Each step goes `step_size` along the gradient, divided by its own root mean square, so that the step does not depend
    on how strong the channel is. A step is one trace: a forward and a backward of the part of the model up to `site`.

    Args:
        model: a model with an input of floating-point numbers (images, spectrograms).
        site: any spelling of a site, ``[rows, channel, height, width]``, or in transformers ``[rows, place, channel]``:
            the channel axis is 1 for sites of four axes, else the last.
        channel: which channel.
        steps: steps of the climb.
        start: the input to start from, ``[rows, ...]``; noise around grey is usual.
        input_site: the site at which the input enters (``"module:conv1.input"``), to differentiate by.
        name: the input's name; may be left out where the model has one.
        step_size: length of a step in units of the input.
        jitter: largest shift, in pixels along the last two axes, applied to the input in each step and taken back from
            its gradient.
        smoothness: weight of the mean squared difference of neighbouring pixels, taken off the objective.
        bounds: smallest and largest value that the input may take.
        seed: of the shifts.

    Raises:
        TraceError: the model has several inputs and `name` is not given, or the input's shape is not that of
            `input_site`.
    """
    import numpy as np

    names = [spec.name for spec in model.card.inputs]
    if name is None:
        if len(names) != 1:
            raise TraceError(f"{model.name!r} has the inputs {names}: say which one is optimised (name=...)")
        name = names[0]
    image = np.array(start, dtype=np.float32)
    rng = np.random.default_rng(seed)
    activations = []
    for step in range(steps + 1):
        shift = tuple(int(s) for s in rng.integers(-jitter, jitter + 1, 2)) if jitter and step < steps else (0, 0)
        shifted = np.roll(image, shift, (-2, -1)) if any(shift) else image
        with model.trace({name: shifted}) as run:
            entry = run.site(input_site)
            if tuple(entry.shape) != image.shape:
                raise TraceError(f"{input_site!r} is {list(entry.shape)}, but the input is {list(image.shape)}")
            value = run.site(site)
            mean = (value[:, channel] if len(value.shape) == 4 else value[..., channel]).mean()
            saved = {"mean": mean} if step == steps else {"mean": mean, "slope": grad(mean, entry)}
            run.save(**saved)
        activations.append(float(run.results["mean"]))
        if step == steps:
            break
        slope = np.asarray(run.results["slope"], dtype=np.float32)
        slope = np.roll(slope, tuple(-s for s in shift), (-2, -1)) if any(shift) else slope
        if smoothness:
            slope = slope - smoothness * _roughness_slope(image)
        size = float(np.sqrt(np.mean(slope * slope)))
        if size > 0:
            image = image + step_size * slope / size
        if bounds is not None:
            image = np.clip(image, *bounds)
    return Visualization(image, np.array(activations))


def _roughness_slope(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gradient of the mean squared difference between neighbours along the last two axes."""
    import numpy as np

    slope = np.zeros_like(image)
    for axis in (-2, -1):
        difference = np.diff(image, axis=axis)
        edge = [(0, 0)] * image.ndim
        edge[axis] = (1, 0)
        into = np.pad(difference, edge)
        edge[axis] = (0, 1)
        slope += 2 * (into - np.pad(difference, edge)) / image.size
    return slope
