"""Whether a model can go on from an earlier forward (`patchbay_server.models.continuation`): tried out at load.

Rows are disturbed somewhere in the middle of a whole forward, and again in one that starts there; every site must have
the same value in both. What does not is no part of such forwards; a model whose output does not is run whole.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from patchbay.ir.card import SEQUENCE_DIMS, ModelCard
from patchbay_server.models.binding import close
from patchbay_server.models.continuation import EMBEDDING, Continuation, Reach, Trunk, continuing, keeping
from patchbay_server.models.ending import Ending, Place, leaves, position_axes
from patchbay_server.models.inputs import TOKENS
from patchbay_server.models.taps import Handle, Handler, InputTap, Tap, first_tensor, replace_first_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContinuationProof:
    """What came of it.

    Attributes:
        how: how the model goes on; None where it does not.
        sentence: what held, or why it does not, in words.
    """

    how: Continuation | None
    sentence: str


def prove_continuation(
    model: torch.nn.Module,
    layers: Sequence[str],
    taps: Mapping[str, Tap],
    card: ModelCard,
    probe: Mapping[str, torch.Tensor],
) -> ContinuationProof:
    """Try it out on made-up tokens.

    Args:
        model: the model.
        layers: paths of its layers.
        taps: the way to every site.
        card: its card.
        probe: made-up inputs of two rows.
    """
    arguments = inspect.signature(model.forward).parameters
    if not (card.causal and set(probe) == {TOKENS} and layers):
        return ContinuationProof(None, "only causal models of tokens go on from an earlier forward")
    if not {"past_key_values", "use_cache"} <= set(arguments):
        return ContinuationProof(None, "it keeps no keys and values between forwards")
    assert probe[TOKENS].shape[0] == 2
    trial = _Trial(model, tuple(layers), taps, card, probe[TOKENS][[0, 1, 0]])
    with torch.no_grad():
        failure = ""
        for growing in (True, False):
            try:
                return trial.judge(growing)
            except _NotTheSameError as error:
                failure = str(error)
            except Exception as error:  # noqa: BLE001 - models raise what they like about caches that they do not know
                failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                log.info("%s does not go on from an earlier forward: %s", card.name, failure)
    return ContinuationProof(None, failure)


class _NotTheSameError(Exception):
    """A forward that goes on from another does not come out as the whole one does."""


@dataclass(frozen=True)
class _Seen:
    """Every site's value in one forward, and what was complete when each was reached."""

    values: Mapping[str, torch.Tensor]
    reached: Mapping[str, tuple[int, bool]]
    output: torch.Tensor


class _Trial:
    def __init__(
        self,
        model: torch.nn.Module,
        layers: tuple[str, ...],
        taps: Mapping[str, Tap],
        card: ModelCard,
        tokens: torch.Tensor,
    ) -> None:
        self.model, self.layers, self.taps, self.card, self.tokens = model, layers, taps, card, tokens
        self.returned = [0] * len(layers)

    def judge(self, growing: bool) -> ContinuationProof:
        """
        Raises:
            _NotTheSameError: the output comes out otherwise.
        """
        last, seq = len(self.layers) - 1, self.tokens.shape[1]
        middle = (last - 1) // 2 if last else -1
        trunk, plain = self._trunk()
        reaches: dict[str, Reach] = {}
        for name in plain.values:
            complete, inside = plain.reached[name]
            axes = tuple(i for i, d in enumerate(self.card.site(name).dims) if d in SEQUENCE_DIMS)
            if plain.values[name].shape[0] == self.tokens.shape[0]:
                reaches[name] = Reach(complete, inside, axes)
        entries: list[tuple[int, ...]] = [(-1, middle, last)] if growing else [(-1,) * 3, (middle,) * 3, (last,) * 3]
        how = Continuation(self.layers, tuple(self.returned), reaches, growing, beside=False)
        for after in [(EMBEDDING,) * 3, *entries]:
            for first in (seq // 2, seq - 1):
                whole = plain if after[0] == EMBEDDING else self._whole(after, first)
                found = self._continued(how, trunk, after, first)
                self._compare(reaches, whole, found, after, first, settle=first == seq // 2)
        if "logits" not in reaches:
            raise _NotTheSameError("the logits do not come out as in a whole forward")
        how = replace(how, beside=self._attends_beside(how, trunk))
        how = replace(how, ending=self._ending(how, trunk, entries[: 2 if last else 1]))
        odd = len(plain.values) - len(reaches)
        sentence = "a forward that starts at a later layer and position, against kept keys and values, equals the whole"
        sentence += "" if growing else "; all its rows start at one layer"
        sentence += f"; {odd} sites do not and are read in whole forwards" if odd else ""
        return ContinuationProof(how, sentence)

    def _attends_beside(self, how: Continuation, trunk: Trunk) -> bool:
        """Whether rows that go on from one row come out the same when its keys and values are not copied for each."""
        seq, after, rows = self.tokens.shape[1], (-1,) * 3, (1,) * 3
        for first in (seq // 2, seq - 1):
            outputs = []
            for beside in (False, True):
                tried = replace(how, beside=beside)
                try:
                    with (
                        continuing(self.model, tried, trunk, self.tokens, first, rows, after) as inputs,
                        self._disturbed((-1, EMBEDDING, EMBEDDING), first, first),
                    ):
                        outputs.append(first_tensor(self.model(**inputs)))
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    log.info("keys and values are copied for every row: %s", error)
                    return False
            if not close(outputs[1], outputs[0]):
                return False
        return True

    def _ending(self, how: Continuation, trunk: Trunk, entries: Sequence[tuple[int, ...]]) -> Ending | None:
        """How the last layer is computed at some positions alone, where that gives what all of it gives there."""
        try:
            axes = self._given_to_the_last_layer(how, trunk)
            if axes is None:
                return None
            end, seq = self.layers[-1], self.tokens.shape[1]
            entrance = (name for name, tap in self.taps.items() if isinstance(tap, InputTap) and tap.path == end)
            found = replace(how, ending=Ending(end, axes, frozenset(entrance)))
            for after in entries:
                for first, last in ((0, seq - 1), (seq // 2, seq - 1), (1, seq - 2)):
                    self._check_ending(found, trunk, after, first, last)
            return found.ending
        except _NotTheSameError as error:
            log.info("the last layer is computed at all positions: %s", error)
        except Exception as error:  # noqa: BLE001 - models raise what they like about calls that they do not expect
            log.info("the last layer is computed at all positions: %s: %s", type(error).__name__, error)
        return None

    def _given_to_the_last_layer(self, how: Continuation, trunk: Trunk) -> Mapping[Place, int | None] | None:
        """The axis over computed positions of everything that the last layer is given."""
        seq, shapes = self.tokens.shape[1], list[Mapping[Place, torch.Size]]()

        def look(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            del module
            shapes.append({place: value.shape for place, value in leaves(args, kwargs).items()})

        if seq < 4 or len(self.layers) < 2:
            return None
        handle = self.model.get_submodule(self.layers[-1]).register_forward_pre_hook(look, with_kwargs=True)
        try:
            for first in (1, 2):
                with continuing(self.model, how, trunk, self.tokens, first, (0, 1, 2), (-1,) * 3) as inputs:
                    self.model(**inputs)
        finally:
            handle.remove()
        return position_axes(shapes[0], shapes[1], (seq - 1, seq - 2))

    def _check_ending(self, how: Continuation, trunk: Trunk, after: tuple[int, ...], first: int, last: int) -> None:
        """
        Raises:
            _NotTheSameError: what follows the last layer is not what it is in a whole forward, from position `last` on.
        """
        whole, rows = self._whole(after, first), tuple(range(len(after)))
        end, count = len(self.layers) - 1, self.tokens.shape[1] - last
        behind = {name for name, reach in how.reaches.items() if reach.after == end}
        with (
            continuing(self.model, how, trunk, self.tokens, first, rows, after, last) as inputs,
            self._disturbed(after, first, first),
            self._watched(behind) as (values, _),
        ):
            output = first_tensor(self.model(**inputs))
        if output is None or not close(output[:, -count:], whole.output[:, last:]):
            raise _NotTheSameError("the output of a last layer at some positions is not that of the whole one")
        for name in behind:
            there, expected = values.get(name), whole.values[name]
            for axis in how.reaches[name].short:
                there = None if there is None else there.narrow(axis, there.shape[axis] - count, count)
                expected = expected.narrow(axis, last, count)
            if there is None or not _alike(there, expected):
                raise _NotTheSameError(f"{name} is not what it is in a whole forward")
        outputs = []
        for later in (None, last):  # from one row, with nothing tapped
            with (
                continuing(self.model, how, trunk, self.tokens, first, (1,) * len(rows), after, later) as inputs,
                self._disturbed(after, first, first),
            ):
                outputs.append(first_tensor(self.model(**inputs)))
        if outputs[0] is None or outputs[1] is None or not close(outputs[1][:, -count:], outputs[0][:, -count:]):
            raise _NotTheSameError("rows that go on from one row do not come out alike")

    def _compare(
        self,
        reaches: dict[str, Reach],
        whole: _Seen,
        found: _Seen,
        after: tuple[int, ...],
        first: int,
        *,
        settle: bool,
    ) -> None:
        seq = self.tokens.shape[1]
        if not close(found.output, whole.output[:, first:]):
            raise _NotTheSameError("the output of a forward that starts later is not that of the whole one")
        for name in list(reaches):
            reach, there = reaches[name], found.values.get(name)
            present = [row for row, entry in enumerate(after) if entry <= reach.after]
            if not present:
                continue
            expected = whole.values[name][: len(present)]
            if there is None or there.ndim != expected.ndim or there.shape[0] < len(present):
                reaches.pop(name)
                continue
            short = tuple(a for a in reach.short if there.shape[a] == seq - first)
            if settle and first:
                reaches[name] = reach = Reach(reach.after, reach.inside, short)
            for axis in reach.short:
                expected = expected.narrow(axis, first, seq - first)
            if not _alike(there[: len(present)], expected):
                reaches.pop(name)

    def _trunk(self) -> tuple[Trunk, _Seen]:
        trunk = Trunk()
        with keeping(self.model, self.layers, trunk) as more, self._watched() as (values, reached):
            output = first_tensor(self.model(input_ids=self.tokens, **more))
        assert output is not None
        return trunk, _Seen(values, reached, output)

    def _whole(self, after: tuple[int, ...], first: int) -> _Seen:
        with self._disturbed(after, first, 0), self._watched() as (values, reached):
            output = first_tensor(self.model(input_ids=self.tokens, use_cache=False))
        assert output is not None
        return _Seen(values, reached, output)

    def _continued(self, how: Continuation, trunk: Trunk, after: tuple[int, ...], first: int) -> _Seen:
        rows = tuple(range(len(after)))
        with (
            continuing(self.model, how, trunk, self.tokens, first, rows, after) as inputs,
            self._disturbed(after, first, first),
            self._watched() as (values, reached),
        ):
            output = first_tensor(self.model(**inputs))
        assert output is not None
        return _Seen(values, reached, output)

    @contextmanager
    def _disturbed(self, after: tuple[int, ...], first: int, shown: int) -> Iterator[None]:
        """Each row's stream after its layer is another from position `first` on; `shown` is the first that is there."""
        handles: list[Handle] = []

        def disturb(value: torch.Tensor, layer: int) -> torch.Tensor:
            value = value.clone()
            for row, entry in enumerate(after):
                if entry == layer:
                    value[row, first - shown :] = value[row, first - shown :].flip(-1)
            return value

        def before(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            del module
            if args and isinstance(args[0], torch.Tensor):
                return (disturb(args[0], -1), *args[1:]), kwargs
            place, value = next((k, v) for k, v in kwargs.items() if isinstance(v, torch.Tensor))
            return args, {**kwargs, place: disturb(value, -1)}

        def behind(layer: int) -> object:
            def hook(module: torch.nn.Module, args: object, output: object) -> object:
                del module, args
                stream = first_tensor(output)
                assert stream is not None
                return replace_first_tensor(output, disturb(stream, layer))

            return hook

        try:
            for layer in sorted(set(after)):
                if layer == -1:
                    module = self.model.get_submodule(self.layers[0])
                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))  # type: ignore[arg-type]
                elif layer >= 0:
                    module = self.model.get_submodule(self.layers[layer])
                    handles.append(module.register_forward_hook(behind(layer)))  # type: ignore[arg-type]
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _watched(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, tuple[int, bool]]]]:
        """Every site's value (or that of some), and how far the forward was, while the body runs."""
        values: dict[str, torch.Tensor] = {}
        reached: dict[str, tuple[int, bool]] = {}
        begun, done = [False], [EMBEDDING + 1]
        handles: list[Handle] = []

        def begin(module: torch.nn.Module, args: object) -> None:
            del module, args
            begun[0] = True

        def finish(number: int) -> object:
            def hook(module: torch.nn.Module, args: object, output: object) -> None:
                del module, args
                begun[0], done[0] = False, number
                self.returned[number] = len(output) if isinstance(output, tuple) else 0

            return hook

        def watch(name: str) -> Handler:
            def handle(value: torch.Tensor) -> None:
                now = (EMBEDDING if done[0] == -1 and not begun[0] else done[0], begun[0])
                reached[name] = min(now, reached.get(name, now))
                values[name] = value.clone()

            return handle

        try:
            for number, path in enumerate(self.layers):
                module = self.model.get_submodule(path)
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(finish(number)))  # type: ignore[arg-type]
            for name, tap in self.taps.items():
                if names is not None and name not in names:
                    continue
                handles.append(tap.attach(self.model, watch(name), writes=False))
            yield values, reached
        finally:
            for handle in handles:
                handle.remove()


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding; scores of what cannot be seen are minus infinity in both."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    hidden = torch.isinf(b)
    return torch.equal(torch.isinf(a), hidden) and close(a.masked_fill(hidden, 0), b.masked_fill(hidden, 0))
