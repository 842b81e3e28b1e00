"""Generating runs: which token comes next, what the next forward is given, and what a step's values look like.

Rows are stored padded on the right, as in every forward of the engine, and what they generate stands behind the
padding; a mask hides it from decode steps, and every row keeps the positions that it would have alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from patchbay.errors import GraphError
from patchbay.ir.card import LOGITS
from patchbay.ir.graph import Generation, Graph
from patchbay_server.engine.steps import Pass
from patchbay_server.models.continuation import Trunk
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.narrowing import output_embeddings
from patchbay_server.models.row_cache import Known, RowCache, Seat
from patchbay_server.models.taps import OutputTap, first_tensor

#: Stands in for tokens that were never generated.
NO_TOKEN = -1
_FILLER = 0


def check_generates(hosted: HostedModel, ragged: bool) -> None:
    """
    Raises:
        GraphError: the model keeps no keys and values between forwards, or cannot be told the positions of rows.
    """
    takes = inspect.signature(hosted.model.forward).parameters
    if "past_key_values" not in takes or "use_cache" not in takes:
        raise GraphError(f"{hosted.card.name!r} cannot generate: it keeps no keys and values between forwards")
    if ragged and not {"position_ids", "attention_mask"} <= set(takes):
        raise GraphError(f"{hosted.card.name!r} generates from rows of one length only: it takes no positions")


def _behind_the_cache(value: torch.Tensor, axis: int) -> torch.Tensor:
    """The newest position's part of what the cache holds; sites before it have that position alone. Only for reads."""
    return value if value.shape[axis] == 1 else value.narrow(axis, value.shape[axis] - 1, 1)


def check_sites(hosted: HostedModel, graph: Graph) -> None:
    """
    Raises:
        GraphError: a generating run changes values that this model has only behind its cache of keys and values.
    """
    differentiated = {a for node in graph.nodes if node.op == "grad" for a in node.args[1:]}
    for i, node in enumerate(graph.nodes):
        site = str(node.attrs.get("site", ""))
        if node.run is None or not site.endswith(".attn.v") or graph.runs[node.run].generation is None:
            continue
        if node.op != "site.write" and i not in differentiated:
            continue
        if site in hosted.taps and not isinstance(hosted.taps[site], OutputTap):
            raise GraphError(
                f"{site} of {hosted.card.name!r} cannot be changed while tokens are generated: it has values only "
                "where later forwards take them from the cache; use the module that makes them",
                node=i,
                field=f"nodes[{i}]",
            )


def takes(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def keeps_some_logits(hosted: HostedModel, used: Iterable[str]) -> bool:
    """Whether a prompt's forward may give the logits of some positions alone, where `used` are the sites it visits.

    The model cuts the others off before it makes logits: no site from there on may be used but the logits themselves.
    """
    card = hosted.card
    if not takes(hosted.model, "logits_to_keep") or card.d_vocab == 0:
        return False
    made = f"module:{output_embeddings(hosted.model)}.input"
    behind = min(site.order for site in card.sites if site.name == made or site.dims[-1:] == (card.d_vocab,))
    return all(site == LOGITS or card.site(site).order < behind for site in used)


class Decoding:
    """One generating run while it runs.

    Args:
        hosted: the model.
        each: the pass.
        shared: whether its rows go through the model together with those of other runs (`engine.decoding`).

    Attributes:
        step: the forward that comes next, or is under way.
        so_far: int64 [rows, max_new_tokens], NO_TOKEN where there is no token (yet).
        stopped: bool [rows]: what rows ended before this step.
        seat: where the keys and values of a run that shares are.
        kept: positions of the prompt whose logits the model gave, where it did not give all; counted from the first
            that is computed.
        known: how every prompt begins, where an earlier request's keys and values stand for that.
        leaving: where the first prompt leaves what later ones may go on from; None where it leaves nothing.
    """

    def __init__(self, hosted: HostedModel, each: Pass, *, shared: bool = False) -> None:
        assert each.generation is not None
        self._hosted, self._pass, self._how, self._shared = hosted, each, each.generation, shared
        self.seat: tuple[RowCache, Seat] | None = None
        self.kept: tuple[int, ...] | None = None
        self.known: Known | None = None
        self.leaving: Trunk | None = None
        self._lengths = torch.tensor([len(row) for row in each.tokens])
        self._ragged = bool((self._lengths != each.seq).any())
        check_generates(hosted, self._ragged)
        if not shared:
            self._check_windows()
        self._cache: Any = None
        self.step = 0
        self.so_far = torch.full((each.rows, self._how.max_new_tokens), NO_TOKEN)
        self.stopped = torch.zeros(each.rows, dtype=torch.bool)
        self._stops = [list(sequence) for sequence in self._how.stop]
        if self._how.eos:
            self._stops += [[token] for token in end_tokens(hosted.model)]
        self._generators = [torch.Generator().manual_seed(self._how.seed + row) for row in range(each.rows)]

    def _check_windows(self) -> None:
        """Padding between a row and what it generates would count towards a window over the latest positions."""
        config: Any = self._hosted.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None)
        if window is None or not self._ragged or (kinds and all(kind == "full_attention" for kind in kinds)):
            return
        if self._pass.seq + self._how.max_new_tokens > int(window):
            raise GraphError(
                f"rows of different lengths are generated from only within the window of {window} positions that "
                f"{self._hosted.card.name!r} looks back; make a run of each"
            )

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self._pass.rows

    @property
    def lengths(self) -> list[int]:
        """Length of every prompt."""
        return [len(row) for row in self._pass.tokens]

    @property
    def first(self) -> int:
        """The first position of the prompts that is computed."""
        return 0 if self.known is None else self.known.length

    @property
    def extent(self) -> int:
        """Positions of its longest row, once everything is generated."""
        return self._pass.seq + self._how.max_new_tokens

    @property
    def newest_tokens(self) -> torch.Tensor:
        """What goes through the model next, int64 [rows, 1]; a filler in rows that have stopped."""
        return self.so_far[:, self.step - 1 : self.step].clamp(min=_FILLER)

    def leave(self) -> None:
        """Give up the seat, where there is one."""
        if self.seat is not None:
            cache, seat = self.seat
            cache.leave(seat)
            self.seat = None

    @property
    def ended(self) -> bool:
        """Whether no row goes on."""
        return bool(self.stopped.all()) or self.step >= self._how.max_new_tokens

    @property
    def gone(self) -> torch.Tensor | None:
        """Rows whose values no longer mean anything, as indices; None where there are none."""
        return self.stopped.nonzero().squeeze(1).to(self._hosted.device) if bool(self.stopped.any()) else None

    def advance(self) -> None:
        """Run the next forward, under whatever hooks are there, and choose every row's next token."""
        model = self._hosted.model
        output = model(**self._inputs(), use_cache=True)
        self._cache = output.past_key_values
        logits = first_tensor(output)
        assert logits is not None and logits.ndim == 3
        newest = self.newest(logits)[:, 0]
        self.take(newest, newest.argmax(-1).tolist())

    def take(self, newest: torch.Tensor, likeliest: list[int]) -> None:
        """Choose every row's next token.

        Args:
            newest: logits of the newest position, ``[rows, vocab]``.
            likeliest: where each row's are highest.

        Raises:
            GraphError: no token can be drawn.
        """
        chosen = likeliest
        if self._how.temperature:
            logits = newest.float().cpu()
            chosen = [_choose(logits[row], self._how, self._generators[row]) for row in range(self._pass.rows)]
        for row, token in enumerate(chosen):
            if not self.stopped[row]:
                self.so_far[row, self.step] = token
        self.step += 1
        if not self._stops:
            return
        for row in range(self._pass.rows):
            made = self.so_far[row, : self.step].tolist()
            if any(made[-len(stop) :] == stop for stop in self._stops):
                self.stopped[row] = True

    def _inputs(self) -> dict[str, Any]:
        device, each, step = self._hosted.device, self._pass, self.step
        if step == 0:
            rows = [[*row, *([_FILLER] * (each.seq - len(row)))] for row in each.tokens]
            inputs: dict[str, Any] = {"input_ids": torch.tensor(rows, device=device)}
            if self._hosted.decodes_together:  # proved with a cache that keeps everything, as the card's shapes say
                inputs["past_key_values"] = DynamicCache()
            if not self._ragged and keeps_some_logits(self._hosted, self._pass.steps[0].sites):
                inputs["logits_to_keep"] = 1
            return inputs
        inputs = {"input_ids": self.newest_tokens.to(device), "past_key_values": self._cache}
        if self._ragged:
            at = torch.arange(each.seq + step)
            mask = (at[None] < self._lengths[:, None]) | (at[None] >= each.seq)
            inputs["attention_mask"] = mask.long().to(device)
            inputs["position_ids"] = (self._lengths[:, None] + step - 1).to(device)
        return inputs

    # --- what a step's values look like

    def newest(self, value: torch.Tensor) -> torch.Tensor:
        """``[rows, positions, ...]`` -> ``[rows, 1, ...]``, the newest position of every row."""
        if value.shape[1] == 1:
            return value
        rows = torch.arange(value.shape[0], device=value.device)
        return value[rows, self._newest_at(value)].unsqueeze(1)

    def _newest_at(self, value: torch.Tensor) -> torch.Tensor:
        """For every row, where its newest position is among those that `value` holds."""
        last = self._lengths - 1 - self.first
        if self.kept is not None and value.shape[1] == len(self.kept):
            last = torch.searchsorted(torch.tensor(self.kept), last)
        return last.to(value.device)

    def seen_through(
        self, site: str, dims: tuple[Any, ...], handle: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """`handle`, given what users see of `site` in this forward: the newest logits, keys without the padding."""
        if site == LOGITS and self.step == 0:
            return lambda value: self._at_newest(value, handle)
        if self.step == 0 and self.known is not None:
            return lambda value: self._behind_known(site, value, handle)
        if self.step and self._shared and "key" in dims:
            return lambda value: self._at_latest_keys(value, dims.index("key"), handle)
        if self.step and self._ragged and "key" in dims:
            return lambda value: self._at_keys(value, dims.index("key"), handle)
        if self.step and "seq" in dims:
            return lambda value: handle(_behind_the_cache(value, dims.index("seq")))
        return handle

    def _at_newest(
        self, value: torch.Tensor, handle: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        if value.shape[1] == 1:
            return handle(value)
        new = handle(self.newest(value))
        if new is None:
            return None
        result = value.clone()
        rows = torch.arange(value.shape[0], device=value.device)
        result[rows, self._newest_at(value)] = new[:, 0]
        return result

    def _behind_known(
        self, site: str, value: torch.Tensor, handle: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """What is not computed reads as zero: nothing that anybody asked for depends on it."""
        assert self._hosted.continuation is not None
        axes = self._hosted.continuation.reaches[site].short
        shape = [extent + self.first * (axis in axes) for axis, extent in enumerate(value.shape)]

        def computed(whole: torch.Tensor) -> torch.Tensor:
            for axis in axes:
                whole = whole.narrow(axis, self.first, value.shape[axis])
            return whole

        shown = value.new_zeros(shape)
        computed(shown).copy_(value)
        new = handle(shown)
        return None if new is None else computed(new)

    def _at_latest_keys(
        self, value: torch.Tensor, axis: int, handle: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Rows end together and may stand behind longer ones of other runs: the latest keys are their own."""
        own = self._pass.seq + self.step
        place = (axis, value.shape[axis] - own, own)
        pads = [self._pass.seq - int(length) for length in self._lengths]
        shown = value.narrow(*place)
        if any(pads):
            shown = shown.clone()
            for row, pad in enumerate(pads):
                shown[row].narrow(axis - 1, 0, pad).zero_()
        new = handle(shown)
        if new is None:
            return None
        result = value.clone()
        for row, pad in enumerate(pads):  # padding ignores writes
            kept = own - pad
            target = result[row].narrow(axis - 1, value.shape[axis] - kept, kept)
            target.copy_(new[row].narrow(axis - 1, pad, kept))
        return result

    def _at_keys(
        self, value: torch.Tensor, axis: int, handle: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Every row's padding moves from behind its prompt to the front, where it reads as zero."""
        pads = [self._pass.seq - int(length) for length in self._lengths]

        def moved(whole: torch.Tensor, back: bool) -> torch.Tensor:
            result = torch.empty_like(whole)
            for row, pad in enumerate(pads):
                prompt, rest = whole[row].split([self._pass.seq, self.step], dim=axis - 1)
                prompt = prompt.roll(-pad if back else pad, dims=axis - 1)
                if not back:
                    prompt.narrow(axis - 1, 0, pad).zero_()
                result[row] = torch.cat([prompt, rest], dim=axis - 1)
            return result

        new = handle(moved(value, back=False))
        if new is None:
            return None
        result = moved(new, back=True)
        for row, pad in enumerate(pads):  # padding ignores writes
            if pad:
                place = (axis - 1, self._pass.seq - pad, pad)
                result[row].narrow(*place).copy_(value[row].narrow(*place))
        return result


def end_tokens(model: torch.nn.Module) -> tuple[int, ...]:
    """The ids that end a text, as the model's own configuration says."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(int(i) for i in found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def _choose(logits: torch.Tensor, how: Generation, generator: torch.Generator) -> int:
    """The next token of one row, from its logits ``[vocab]`` in float32."""
    if how.temperature == 0:
        return int(logits.argmax())
    logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], float("-inf"))
    if how.top_p < 1:
        # Ascending, as transformers' TopPLogitsWarper: what is dropped has at most 1 - top_p in all.
        ordered, index = logits.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - how.top_p
        drop[-1] = False
        logits = logits.masked_fill(drop.scatter(0, index, drop), float("-inf"))
    chances = logits.softmax(-1)
    if not bool(torch.isfinite(chances).all()):
        raise GraphError("no token can be drawn: the logits hold NaN or infinity, or every token was ruled out")
    return int(torch.multinomial(chances, 1, generator=generator))
