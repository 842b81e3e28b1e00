"""`Model.map` and `AsyncModel.map`: the same map, with the user's code called where it belongs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from patchbay.datasets.calls import Host, blocking_host, direct_host
from patchbay.datasets.mapping import Mapper, Plan
from patchbay.datasets.progress import MapProgress, TerminalLine
from patchbay.errors import TraceError
from patchbay.inputs import Text
from patchbay.ir.events import ExecuteOptions

if TYPE_CHECKING:
    from patchbay.datasets.results import MapResults
    from patchbay.model import AsyncModel, Model
    from patchbay.tokens import Tokens


#: Batches fill a forward by themselves. Sharing one with whatever else waits would make their last bits depend on it.
NOT_SHARED = ("cobatch",)
#: How long a map that is given up may take to put its files in order.
_END_S = 30.0


class MapHow(TypedDict, total=False):
    """Keyword arguments of `Model.map`, which says what they are."""

    batch: int
    max_tokens: int
    window: int | None
    lanes: int
    prepend_bos: bool | None
    to: str | os.PathLike[str] | None
    keep: bool
    resume: str | os.PathLike[str] | None
    progress: Callable[[MapProgress], Any] | None
    deterministic: bool
    disabled: Sequence[str]
    timeout_s: float | None
    patience_s: float


def map_blocking(model: Model, dataset: Any, function: Callable[[Any], Any], how: MapHow) -> MapResults:
    """`Model.map`: the data set is read, the function traced and progress shown in the calling thread."""
    plan, progress = _planned(how)
    shown = TerminalLine() if progress is None else progress

    def tokens_of(text: str) -> Tokens:
        (tokens,) = model.wait(model.core.tokenize([Text(text, special=False)]))
        return tokens

    def make(emit: Callable[[Any], None] | None) -> Coroutine[Any, Any, MapResults]:
        assert emit is not None
        host: Host = blocking_host(emit)
        mapper = Mapper(
            model.core, model.edits, dataset, function, plan, host, lambda p: emit(lambda: shown(p)), tokens_of
        )
        return ended_by(mapper.run())

    async def ended_by(work: Coroutine[Any, Any, MapResults]) -> MapResults:
        over.clear()
        try:
            return await work
        finally:
            over.set()

    def work(call: Any) -> None:
        call()

    over = threading.Event()  # the portal does not wait for what it cancels
    over.set()
    try:
        return model.wait_with_events(make, work)
    finally:
        over.wait(_END_S)
        if isinstance(shown, TerminalLine):
            shown.close()


async def map_awaited(model: AsyncModel, dataset: Any, function: Callable[[Any], Any], how: MapHow) -> MapResults:
    """`AsyncModel.map`: all in the event loop."""
    plan, progress = _planned(how)
    shown = TerminalLine() if progress is None else progress

    def tokens_of(text: str) -> Tokens:
        tokens = model.core.known_tokens(Text(text, special=False))
        if tokens is None:
            raise TraceError(
                f"the tokens of {text!r} are not known yet: await model.tokenize({text!r}, add_special_tokens=False)"
                " before, or give token ids"
            )
        return tokens

    try:
        return await Mapper(model.core, model.edits, dataset, function, plan, direct_host, shown, tokens_of).run()
    finally:
        if isinstance(shown, TerminalLine):
            shown.close()


def _planned(how: MapHow) -> tuple[Plan, Callable[[MapProgress], Any] | None]:
    given: dict[str, Any] = {**how}
    unknown = sorted(set(given) - set(MapHow.__annotations__))
    if unknown:
        raise TypeError(f"map takes no {unknown[0]!r}; it takes: {', '.join(MapHow.__annotations__)}")
    progress = cast("Callable[[MapProgress], Any] | None", given.pop("progress", None))
    options = ExecuteOptions(given.pop("deterministic", False), tuple(given.pop("disabled", NOT_SHARED)))
    for name in ("to", "resume"):
        if given.get(name) is not None:
            given[name] = Path(given[name])
    if given.get("resume") is not None and given["resume"].is_dir():
        raise TraceError(f"map: resume is a file, and {given['resume']} is a folder")
    return Plan(options=options, **given), progress
