"""A data set of uneven rows, the model that the tests map over, and the same activations fetched whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import patchbay as pb
from patchbay.model import Model
from tests.tiny import VOCAB, build

LABELS = ("no", "yes", "perhaps")


@cache
def local_model() -> Model:
    """One model in this process for all rooms' tests."""
    return pb.local(build("llama"))


def token_rows(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Rows of random ids, 1 to `longest` long."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def data_set(count: int = 37, longest: int = 9, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a prompt, a label, a number and a vector."""
    rows = token_rows(count, longest, seed)
    return [{"text": row, "label": LABELS[i % 3], "weight": i / 4, "vector": [i, -i]} for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Whole:
    """Activations of all rows, fetched in one trace.

    Attributes:
        value: [rows, seq, d], padded on the left.
        mask: [rows, seq].
        rows, positions, tokens: of each sample, in the data set's order.
    """

    value: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray

    @property
    def samples(self) -> np.ndarray:
        """[samples, d] float64, in the data set's order."""
        return self.value[self.mask].astype(np.float64)


def fetched(model: Model, rows: list[list[int]], site: str) -> Whole:
    """A site at every row."""
    with model.trace(rows) as run:
        run.save(value=run.site(site))
    mask = np.asarray(run.mask)
    seq = mask.shape[1]
    padding = seq - np.array([len(row) for row in rows])
    where = np.argwhere(mask)
    positions = where[:, 1] - padding[where[:, 0]]
    tokens = np.array([rows[r][p] for r, p in zip(where[:, 0], positions, strict=True)])
    return Whole(run.results["value"], mask, where[:, 0], positions, tokens)
