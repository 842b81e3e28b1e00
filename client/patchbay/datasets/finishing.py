"""The end of a map: the lanes' states merged on the server, and everything put where the function had it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchbay.arrays import to_array
from patchbay.datasets.results import KeptRows
from patchbay.datasets.shards import Shards, concatenated, joined, layout_of, write_index
from patchbay.datasets.state import Lane, lost
from patchbay.datasets.template import Collected, Reduced, Template, merged_graph
from patchbay.errors import NotFoundError
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.dtypes import DTYPES
from patchbay.ir.events import ExecuteOptions
from patchbay.results import map_tree
from patchbay.tracing.artifacts import Artifact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.core import ModelCore
    from patchbay.datasets.calls import Patience
    from patchbay.datasets.ledger import Ledger
    from patchbay.datasets.plan import Plan

#: Texts that are asked for at a time.
_AT_ONCE = 64


class Finish:
    """Makes what the user gets.

    Args:
        core: the model.
        plan: of the map.
        ledger: what it has done.
        template: any template of it.
        patience: makes calls that wait for the server.
    """

    def __init__(self, core: ModelCore, plan: Plan, ledger: Ledger, template: Template, patience: Patience) -> None:
        self._core, self._plan, self._ledger, self._template = core, plan, ledger, template
        self._patience = patience

    async def tree(self) -> Any:
        """What the function returned, with numbers for its values."""
        arrays = await self._merged()
        values = await asyncio.to_thread(self._collected)
        texts = {
            leaf.name: await self._texts(values[leaf.name])
            for leaf in self._template.collected
            if leaf.text and not isinstance(values[leaf.name], Shards)
        }
        values |= texts
        made = {
            i: reduction.result({name: array for (j, name), array in arrays.items() if j == i})
            for i, reduction in enumerate(self._template.reductions)
        }

        def leaf_of(leaf: object, path: tuple[str, ...]) -> object:
            del path
            if isinstance(leaf, Reduced):
                return made[leaf.index]
            return values[leaf.name] if isinstance(leaf, Collected) else leaf

        return map_tree(self._template.tree, leaf_of)

    async def _merged(self) -> dict[tuple[int, str], NDArray[Any]]:
        """The reductions' arrays."""
        lanes = [lane for lane in self._ledger.state.lanes if lane is not None]
        if not lanes:
            return {}
        graph, wanted = merged_graph(self._core, self._template, [constant(lane) for lane in lanes])
        try:
            outcome = await self._patience.call(
                lambda: self._core.execute(graph, ExecuteOptions(), self._plan.timeout_s)
            )
        except NotFoundError as error:
            raise lost(error) from None
        return {(i, name): to_array(outcome.values[output].value) for i, name, output in wanted}

    def _collected(self) -> dict[str, Any]:
        """Values of rows: in memory, in a folder, or on the server."""
        collected = self._template.collected
        if not collected:
            return {}
        if self._plan.keep:
            return {leaf.name: self._handles(leaf) for leaf in collected}
        folder = self._plan.folder
        if folder is None:
            ragged = self._ledger.ragged
            return {
                name: joined(arrays) if name in ragged else concatenated(arrays)
                for name, arrays in self._ledger.values.items()
            }
        about = {
            "model": self._core.card.name,
            "revision": self._core.card.revision,
            "prompts": list(self._template.prompts),
            "values": {
                leaf.name: {
                    "layout": layout_of(leaf.sequence),
                    "sequence_axes": [[axis, key] for axis, key in leaf.sequence.items()],
                }
                for leaf in collected
            },
        }
        write_index(folder, about, self._ledger.state.shards)
        shards = Shards(folder)
        if self._plan.to is not None:
            return {leaf.name: shards for leaf in collected}
        return {leaf.name: shards.value(leaf.name) for leaf in collected}

    def _handles(self, leaf: Collected) -> list[KeptRows]:
        handles = []
        for entry in (e for e in self._ledger.state.kept if e["name"] == leaf.name):
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            info = ArtifactInfo(entry["digest"], dtype, shape, math.prod(shape) * dtype.itemsize, leaf.name)
            rows, lengths = tuple(entry["rows"]), tuple(entry["lengths"])
            handles.append(KeptRows(Artifact(info, self._core.stored), rows, lengths))
        return handles

    async def _texts(self, ids: Sequence[Any]) -> list[str]:
        """The texts of rows of token ids, -1 behind each one's last."""
        rows = [tuple(int(i) for i in row if i >= 0) for row in ids]
        found: dict[tuple[int, ...], str] = {(): ""}
        new = [row for row in dict.fromkeys(rows) if row]

        async def text(row: tuple[int, ...]) -> str:
            return (await self._patience.call(lambda: self._core.decode(row))).text

        for at in range(0, len(new), _AT_ONCE):
            some = new[at : at + _AT_ONCE]
            found.update(zip(some, await asyncio.gather(*map(text, some)), strict=True))
        return [found[row] for row in rows]


def constant(lane: Lane) -> dict[str, Any]:
    """Attributes of the constant that is a lane's state."""
    return {"artifact": lane.digest, "shape": (lane.size,), "dtype": "float64"}
