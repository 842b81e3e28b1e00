"""Generating runs that share forwards: prompts join with any forward over tokens, then all rows step together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from patchbay_server.engine.generate import Decoding, keeps_some_logits
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.row_cache import PromptCache, RowCache
from patchbay_server.models.taps import first_tensor

if TYPE_CHECKING:
    from patchbay_server.engine.forwards import ForwardCall

#: Rows of one batch, and how many times longer than its shortest run its longest may become: attention is computed over
#: the longest for all.
MAX_ROWS, MAX_SPREAD = 256, 8
#: Runs up to this length spread no batch.
_SHORT = 256


class DecodeBatches:
    """The batches of rows that generate on one model.

    Attributes:
        caches: one for each batch that has rows, and of those that had.
    """

    def __init__(self, hosted: HostedModel, *, max_rows: int = MAX_ROWS) -> None:
        self._hosted, self._max_rows = hosted, max_rows
        self.caches: list[RowCache] = []
        self._extents: dict[int, list[int]] = {}

    def prompts(self, calls: Sequence[ForwardCall], starts: Sequence[int]) -> PromptCache:
        """Seats for the runs among `calls` that are about to put their prompts through, and the cache that fills them.

        Args:
            calls: of one forward.
            starts: first row of each in it.
        """
        takers, leaving = [], []
        for call, start in zip(calls, starts, strict=True):
            if call.decoding is not None:
                call.decoding.leave()  # a prompt that is put through once more
                cache = self._cache_for(call.decoding)
                seat = cache.admit(call.decoding.lengths)
                call.decoding.seat = (cache, seat)
                takers.append((start, cache, seat))
                if call.decoding.leaving is not None:
                    leaving.append((start, call.decoding.lengths[0], call.decoding.leaving))
        first = calls[0].decoding
        return PromptCache(takers, None if first is None else first.known, leaving)

    def _cache_for(self, decoding: Decoding) -> RowCache:
        extent = max(_SHORT, decoding.extent)
        for cache in self.caches:
            lengths = [max(_SHORT, max(seat.lengths)) for seat in cache.seats] or [extent]
            close = max(*lengths, extent) <= MAX_SPREAD * min(*lengths, extent)
            if close and cache.used + len(decoding.lengths) <= max(self._max_rows, len(decoding.lengths)):
                return cache
        self.caches = [cache for cache in self.caches if cache.seats]
        self.caches.append(RowCache())
        return self.caches[-1]

    def step(self, calls: Sequence[ForwardCall]) -> DecodeStep:
        """The next forward of every run of one batch, or of one run of it."""
        return DecodeStep(self._hosted, calls)


class DecodeStep:
    """One forward in which runs that generate put their newest tokens through.

    Attributes:
        starts: first row of each call in the forward.
        inputs: what the model is given.
    """

    def __init__(self, hosted: HostedModel, calls: Sequence[ForwardCall]) -> None:
        self._calls = calls
        self._runs = [call.decoding for call in calls if call.decoding is not None]
        seats = [run.seat for run in self._runs]
        self._cache = next(seat[0] for seat in seats if seat is not None)
        self._seats = [seat[1] for seat in seats if seat is not None]
        self.starts, positions, seen = self._cache.begin(self._seats)
        device = hosted.device
        tokens = torch.zeros_like(positions)
        for start, run in zip(self.starts, self._runs, strict=True):
            tokens[start : start + run.rows] = run.newest_tokens
        self.inputs: dict[str, Any] = {
            "input_ids": tokens.to(device),
            "position_ids": positions.to(device),
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if seen is not None:
            self.inputs["attention_mask"] = seen.to(device)

    def take(self, output: Any) -> None:
        """Choose every run's next tokens; what goes wrong for one is its call's error."""
        logits = first_tensor(output)
        assert logits is not None
        choose(self._calls, self.starts, logits[:, -1])
        self._cache.end([seat for call, seat in zip(self._calls, self._seats, strict=True) if call.error is None])


def choose(calls: Sequence[ForwardCall], starts: Sequence[int], newest: torch.Tensor) -> None:
    """Choose the next tokens of every run among `calls`.

    Args:
        calls: of one forward.
        starts: the first row of each in `newest`.
        newest: logits ``[rows, vocab]``.
    """
    runs = [(call, start) for call, start in zip(calls, starts, strict=True) if call.decoding and call.error is None]
    likeliest = newest.argmax(-1).tolist()  # one transfer for all rows
    for call, start in runs:
        run = call.decoding
        assert run is not None
        rows = slice(start, start + run.rows)
        try:
            run.take(newest[rows], likeliest[rows])
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - those that have taken theirs must not be asked again
            call.error = error


def prompt_logits(hosted: HostedModel, calls: Sequence[ForwardCall]) -> torch.Tensor | None:
    """The positions whose logits are all that is needed of a forward over these prompts, or None for every position."""
    positions: set[int] = set()
    if not keeps_some_logits(hosted, {site for call in calls for site in call.sites}):
        return None
    for call in calls:
        if call.decoding is None:
            return None
        positions.update(length - 1 - call.decoding.first for length in call.decoding.lengths)
    kept = tuple(sorted(positions))
    for call in calls:
        assert call.decoding is not None
        call.decoding.kept = kept
    return torch.tensor(kept, device=hosted.device)
