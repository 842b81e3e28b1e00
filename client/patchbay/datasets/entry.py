"""`Model.map` and `AsyncModel.map`: the same map, with the user's code called where it belongs."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

from patchbay.arguments import check_callback, check_names, check_timeout, flag, integer, real, refused, seen
from patchbay.arguments import options as execute_options
from patchbay.datasets.calls import Host, blocking_host, direct_host
from patchbay.datasets.locking import held
from patchbay.datasets.mapping import Mapper
from patchbay.datasets.plan import Plan
from patchbay.datasets.progress import MapProgress, TerminalLine
from patchbay.errors import TraceError

if TYPE_CHECKING:
    from patchbay.datasets.batch_trace import BatchRun, BatchTrace
    from patchbay.datasets.columns import BatchRows
    from patchbay.datasets.results import MapResults
    from patchbay.ir.card import ModelCard
    from patchbay.model import AsyncModel, Model


#: Batches fill a forward by themselves. Sharing one with whatever else waits, or going on from what an earlier request
#: computed, would make their last bits depend on it.
NOT_SHARED = ("cobatch", "continuous_batching", "prefix_cache")
_MAY_BE_NONE = frozenset({"window", "prepend_bos", "to", "resume"})
#: How long a map that is given up may take to put its files in order.
_END_S = 30.0


#: Makes a dict of values and reductions of a run over a batch, or of a trace and a batch's rows.
MapFunction: TypeAlias = (
    "Callable[[BatchRun], Mapping[str, Any]] | Callable[[BatchTrace, BatchRows], Mapping[str, Any]]"
)


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


def map_blocking(model: Model, dataset: Any, function: Callable[..., Any], how: MapHow) -> MapResults:
    """`Model.map`: the data set is read, the function traced and progress shown in the calling thread."""
    plan, progress = _planned(how, model.core.card)
    with_rows = _takes_rows(function)
    shown = TerminalLine() if progress is None else progress

    def make(emit: Callable[[Any], None] | None) -> Coroutine[Any, Any, MapResults]:
        assert emit is not None
        host: Host = blocking_host(emit)
        mapper = Mapper(
            model.core, model.edits, dataset, function, with_rows, plan, host, lambda p: emit(lambda: shown(p))
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
        with held(*_places(plan)):
            try:
                return model.wait_with_events(make, work)
            finally:
                over.wait(_END_S)
    finally:
        if isinstance(shown, TerminalLine):
            shown.close()


async def map_awaited(model: AsyncModel, dataset: Any, function: Callable[..., Any], how: MapHow) -> MapResults:
    """`AsyncModel.map`: all in the event loop."""
    plan, progress = _planned(how, model.core.card)
    with_rows = _takes_rows(function)
    shown = TerminalLine() if progress is None else progress
    try:
        with held(*_places(plan)):
            mapper = Mapper(model.core, model.edits, dataset, function, with_rows, plan, direct_host, shown)
            return await mapper.run()
    finally:
        if isinstance(shown, TerminalLine):
            shown.close()


def _places(plan: Plan) -> list[Path]:
    """What nobody else may write meanwhile."""
    return [path.absolute() for path in (plan.resume, plan.folder) if path is not None]


def _takes_rows(function: Callable[..., Any]) -> bool:
    """Whether a function takes a trace and the rows, not a run over them.

    Raises:
        ArgumentError: it takes neither one nor two arguments, or is no function.
    """
    if not callable(function):
        raise refused(f"map takes a data set and a function of a run, not {seen(function)} as the function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not a function of Python's
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(needed) > 2 or (not positional and not several):
        raise refused(f"map: the function takes a run, or a trace and its rows (t, rows), not {len(needed)} arguments")
    return len(needed) == 2


def _planned(how: MapHow, card: ModelCard) -> tuple[Plan, Callable[[MapProgress], Any] | None]:
    given: dict[str, Any] = {**how}
    check_names("map", given, MapHow.__annotations__)
    progress = cast("Callable[[MapProgress], Any] | None", given.pop("progress", None))
    check_callback("progress", progress)
    disabled = given.pop("disabled", None)
    options = execute_options(given.pop("deterministic", False), () if disabled is None else disabled, card.attributes)
    if disabled is None:
        options = replace(options, disabled=NOT_SHARED)
    check_timeout(given.get("timeout_s"))
    for name in ("batch", "max_tokens", "lanes", "window", "patience_s", "keep", "prepend_bos", "to", "resume"):
        if name not in given or (given[name] is None and name in _MAY_BE_NONE):
            continue
        if name in ("to", "resume"):
            if not isinstance(given[name], (str, os.PathLike)):
                raise refused(f"map: {name} is a path, not {seen(given[name])}")
            given[name] = Path(given[name])
        elif name in ("keep", "prepend_bos"):
            flag(f"map: {name}", given[name])
        elif name == "patience_s":
            real(f"map: {name}", given[name], least=0)
        else:
            given[name] = integer(f"map: {name}", given[name], least=1)
    if given.get("resume") is not None and given["resume"].is_dir():
        raise TraceError(f"map: resume is a file, and {given['resume']} is a folder")
    return Plan(options=options, **given), progress
