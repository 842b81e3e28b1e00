"""Models that are no transformers: a convolutional network is hosted by its modules' paths, read and patched."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay import methods
from patchbay.errors import FailedPreconditionError, UnknownSiteError

CHANNELS = 4


class Mixed(torch.nn.Module):
    """An Inception block: branches of several receptive fields beside one another, concatenated by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = torch.nn.Conv2d(channels, CHANNELS, 1)
        self.three = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 3, 1), torch.nn.ReLU(), torch.nn.Conv2d(3, CHANNELS, 3, padding=1)
        )
        self.five = torch.nn.Conv2d(channels, CHANNELS, 5, padding=2)
        self.pool = torch.nn.Sequential(torch.nn.MaxPool2d(3, 1, 1), torch.nn.Conv2d(channels, CHANNELS, 1))
        self.relu = torch.nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self.one(x), self.three(x), self.five(x), self.pool(x)]
        return self.relu(torch.cat(branches, dim=1))


class Inception(torch.nn.Module):
    """A small relative of the network of Szegedy et al. 2014."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(6)
        self.mixed3a = Mixed(6)
        self.mixed3b = Mixed(4 * CHANNELS)
        self.head = torch.nn.Linear(4 * CHANNELS, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv1(image)))
        hidden = self.mixed3b(self.mixed3a(hidden))
        scores: torch.Tensor = self.head(hidden.mean((2, 3)))
        return scores


@functools.cache
def _net() -> Inception:
    torch.manual_seed(0)
    net = Inception().eval()
    with torch.no_grad():  # without biases, what a channel answers is due to the image
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return net


@functools.cache
def _served() -> pb.Model:
    return pb.local(_net(), example={"image": torch.zeros(1, 3, 16, 16)})


def _images(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 3, 16, 16)).astype(np.float32)


def test_channels_are_read_by_path() -> None:
    """Every branch and the concatenation are sites; channels of a branch are a slice of the concatenation's."""
    model = _served()
    assert model.card.n_layers == 0 and [i.name for i in model.card.inputs] == ["image"]
    with model.trace({"image": _images()}) as run:
        run.save(
            five=run.module("mixed3a.five").output,
            mixed=run.module("mixed3a").output,
            scores=run.module("head").output,
        )
    seen: dict[str, torch.Tensor] = {}
    handle = _net().mixed3a.five.register_forward_hook(lambda m, a, o: seen.update(five=o))
    with torch.no_grad():
        scores = _net()(torch.from_numpy(_images()))
    handle.remove()
    np.testing.assert_allclose(run.results["five"], seen["five"].numpy(), atol=1e-6)
    np.testing.assert_allclose(run.results["scores"], scores.numpy(), atol=1e-6)
    branch = run.results["mixed"][:, 2 * CHANNELS : 3 * CHANNELS]
    np.testing.assert_allclose(branch, np.maximum(run.results["five"], 0), atol=1e-6)


def test_channels_are_patched_by_index() -> None:
    """A channel carried from one image's run into another's equals the same edit by a hook, and nothing else moves."""
    model, images = _served(), _images()
    with model.trace() as t:
        donor, run = t.run({"image": images[:1]}), t.run({"image": images[1:]})
        run.module("mixed3a").output[:, 5] = donor.module("mixed3a").output[:, 5]
        t.save(scores=run.module("head").output, after=run.module("mixed3a").output)
    donated: list[torch.Tensor] = []

    def edit(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        del module, args
        donated.append(output.clone())
        if len(donated) == 1:
            return output
        edited = output.clone()
        edited[:, 5] = donated[0][:, 5]
        return edited

    handle = _net().mixed3a.register_forward_hook(edit)
    with torch.no_grad():
        _net()(torch.from_numpy(images[:1]))
        expected = _net()(torch.from_numpy(images[1:]))
    handle.remove()
    np.testing.assert_allclose(t.results["scores"], expected.numpy(), atol=1e-6)
    others = [c for c in range(4 * CHANNELS) if c != 5]
    np.testing.assert_allclose(t.results["after"][:, others], donated[1].numpy()[:, others], atol=1e-6)


def test_gradients_by_an_image() -> None:
    """The gradient of a class score with respect to the image equals torch's."""
    images = _images(1)
    with _served().trace({"image": images}) as run:
        slope = pb.grad(run.module("head").output[0, 3], run.module("conv1").input).save()
    image = torch.from_numpy(images).requires_grad_()
    (expected,) = torch.autograd.grad(_net()(image)[0, 3], image)
    np.testing.assert_allclose(slope.value, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("site", ["module:mixed3b.five.output", "module:mixed3a.output"])
def test_feature_visualization_raises_a_channel(site: str) -> None:
    """Climbing the gradient from weak noise raises a channel's mean activation several-fold."""
    start = 0.1 * _images(1)
    channel = int(np.argmax(_means(site, start)))
    found = methods.feature_visualization(
        _served(), site, channel, 48, start=start, input_site="module:conv1.input", bounds=(-2.0, 2.0)
    )
    assert found.activations.shape == (49,)
    assert found.activations[-1] > 5 * abs(found.activations[0]) > 0
    assert _means(site, found.input)[channel] == pytest.approx(found.activations[-1], rel=1e-4)
    assert np.abs(found.input).max() <= 2.0


def _means(site: str, images: np.ndarray) -> np.ndarray:
    with _served().trace({"image": images}) as run:
        value = run.site(site).save()
    means: np.ndarray = value.value.mean((0, 2, 3))
    return means


def test_smooth_and_shifted_climbs() -> None:
    """A penalty on rough images gives smoother ones, and random shifts leave a channel still raised."""
    start, site = 0.1 * _images(1), "module:mixed3a.output"
    channel = int(np.argmax(_means(site, start)))
    kinds = {"plain": {}, "smooth": {"smoothness": 2.0}, "shifted": {"jitter": 2}}
    found = {
        name: methods.feature_visualization(
            _served(), site, channel, 24, start=start, input_site="module:conv1.input", **more
        )
        for name, more in kinds.items()
    }
    rough = {n: float(np.square(np.diff(f.input, axis=-1)).mean()) for n, f in found.items()}
    assert rough["smooth"] < rough["plain"]
    assert found["shifted"].activations[-1] > 2 * abs(found["shifted"].activations[0])


def test_a_module_without_an_example_is_refused() -> None:
    """A module that declares nothing cannot be hosted without an example of its input."""
    with pytest.raises(FailedPreconditionError, match="give an example"):
        pb.local(Inception())


def test_unknown_modules_are_named() -> None:
    """A path that is not there is refused with the nearest ones."""
    with _served().trace({"image": _images()}) as run, pytest.raises(UnknownSiteError, match="mixed3a"):
        run.module("mixed3c")


def test_a_model_that_refuses_made_up_inputs_says_how_to_go_on() -> None:
    """Where a model takes something else than its configuration tells, the error names it and asks for an example."""
    served = pb.local(_Picky(), example={"x": torch.ones(1, 4)})
    assert "module:inner.output" in served.card
    says = r"_Picky failed on made-up inputs \(x \[2, 3\]\).*only four"
    with pytest.raises(FailedPreconditionError, match=says) as error:
        pb.local(_Picky(), example={"x": torch.ones(1, 3)})
    assert "Give an example" in str(error.value)


class _Picky(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 4:
            raise AttributeError("only four")
        out: torch.Tensor = self.inner(x)
        return out
