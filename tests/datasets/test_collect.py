"""Values of every row: in memory, in a folder of shards, or left on the server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import patchbay as pb
from patchbay import reduce
from patchbay.datasets import RowArrays, Shards
from patchbay.errors import ProtocolError, TraceError
from tests.datasets.common import data_set, fetched, local_model, token_rows
from tests.tiny import D_MODEL, N_HEADS

ROWS = token_rows(23, 9)


def look(run):
    return {
        "h": run.embed,
        "last": run.embed[:, -1],
        "pattern": run.blocks[1].attn.pattern,
        "ids": [run.ids, run.lengths],
        "total": reduce.sum(run.embed),
    }


def test_values_come_back_for_every_row_in_order() -> None:
    """One array where all rows have one shape, an array for each row without padding where they have not."""
    whole = fetched(local_model(), ROWS, "embed")
    pattern = fetched(local_model(), ROWS, "blocks.1.attn.pattern")
    found = local_model().map(ROWS, look, batch=4, window=9)
    np.testing.assert_array_equal(found["last"], whole.value[:, -1])
    assert isinstance(found["h"], RowArrays)
    assert len(found["h"]) == len(ROWS)
    for i, row in enumerate(ROWS):
        n = len(row)
        np.testing.assert_array_equal(found["h"][i], whole.value[i, -n:])
        np.testing.assert_allclose(found["pattern"][i], pattern.value[i, :, -n:, -n:], atol=1e-6)
        np.testing.assert_array_equal(found["ids"][0][i], row)
    np.testing.assert_array_equal(found["ids"][1], [len(row) for row in ROWS])
    padded, mask = found["h"].padded()
    np.testing.assert_array_equal(mask, whole.mask)
    np.testing.assert_array_equal(padded[mask], whole.value[whole.mask])
    assert found["pattern"].padded()[0].shape == pattern.value.shape
    assert found["h"][2:4][0] is found["h"][2]
    assert "23 rows" in repr(found)


def test_values_are_the_callers_own() -> None:
    """Writing to one row's array changes no other."""
    found = local_model().map([[3, 4], [5, 6], [3, 4]], lambda run: {"h": run.embed, "again": run.embed}, batch=3)
    before = found["again"].copy()
    found["h"][0] = 0
    np.testing.assert_array_equal(found["again"], before)


def test_equal_lengths_make_one_array() -> None:
    """[rows, seq, d], as a trace would give it."""
    rows = [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    found = local_model().map(rows, lambda run: {"h": run.embed}, batch=2)
    np.testing.assert_array_equal(found["h"], fetched(local_model(), rows, "embed").value)


def test_a_folder_of_shards_holds_the_same_rows(tmp_path: Path) -> None:
    """Fixed rows per shard, readable by safetensors; the index names shapes, rows and tokens."""
    here = local_model().map(ROWS, look, batch=4, window=9)
    folder = tmp_path / "rows"
    found = local_model().map(ROWS, look, batch=4, window=9, to=folder)
    shards = found["h"]
    assert isinstance(shards, Shards)
    assert [s["rows"] for s in shards.index["shards"]] == [9, 9, 5]
    assert [s["first_row"] for s in shards.index["shards"]] == [0, 9, 18]
    assert shards.index["tokens"] == sum(map(len, ROWS))
    assert {n: v["layout"] for n, v in shards.index["values"].items()} == {
        "h": "joined", "last": "stacked", "pattern": "padded", "ids.0": "joined", "ids.1": "stacked",
    }  # fmt: skip
    np.testing.assert_array_equal(found["total"], here["total"])
    for name in ("h", "pattern"):
        for a, b in zip(shards.value(name), here[name], strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(shards.value("last"), here["last"])
    assert [t.tolist() for shard in shards for t in shard.row_tokens()] == ROWS
    first = load_file(folder / shards.index["shards"][0]["file"])
    np.testing.assert_array_equal(first["h"], np.concatenate(list(here["h"])[:9]))
    np.testing.assert_array_equal(first["_rows"], np.arange(9))
    assert first["pattern"].shape[:2] == (9, N_HEADS)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_shards_that_are_damaged_or_incomplete_say_so(tmp_path: Path) -> None:
    """No index: not complete; a cut file, another version, an unknown name: errors that say which."""
    folder = tmp_path / "rows"
    local_model().map(ROWS, lambda run: {"h": run.embed}, to=folder)
    shards = pb.datasets.Shards(folder)
    with pytest.raises(KeyError, match="they hold: h"):
        shards[0]["g"]
    file = folder / shards.index["shards"][0]["file"]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ProtocolError, match="damaged"):
        shards[0]
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(ProtocolError, match="version"):
        Shards(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ProtocolError, match="not complete"):
        Shards(folder)


def test_bfloat16_values_keep_their_dtype(tmp_path: Path) -> None:
    """In memory and in shards."""
    make = lambda run: {"h": run.embed.astype("bfloat16")}  # noqa: E731
    here = local_model().map(ROWS, make)
    there = local_model().map(ROWS, make, to=tmp_path / "rows")["h"].value("h")
    assert here["h"][0].dtype.name == there[0].dtype.name == "bfloat16"
    np.testing.assert_array_equal(here["h"][5].astype(np.float32), there[5].astype(np.float32))


def test_values_may_stay_on_the_server_and_be_constants_there() -> None:
    """keep=True gives handles with their rows; they stand in later graphs, and nothing but names came back."""
    model = local_model()
    found = model.map(ROWS, lambda run: {"last": run.blocks[1].resid_post[:, -1]}, batch=8, keep=True)
    whole = fetched(model, ROWS, "blocks.1.resid_post").value[:, -1]
    assert sorted(r for kept in found["last"] for r in kept.rows) == list(range(len(ROWS)))
    for kept in found["last"]:
        assert kept.value.shape == (len(kept.rows), D_MODEL)
        assert kept.lengths == tuple(len(ROWS[r]) for r in kept.rows)
        with model.trace() as t:
            t.save(mean=t.constant(kept.value).mean(axis=0))
        np.testing.assert_allclose(t.results["mean"], whole[list(kept.rows)].mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(kept.value.get(), whole[list(kept.rows)], rtol=1e-5, atol=1e-6)
    with pytest.raises(TraceError, match="not both"):
        model.map(ROWS, look, keep=True, to="folder")


def test_a_generator_is_read_as_it_is_needed() -> None:
    """Rows are pulled a window at a time, in the caller's thread, not all before the first batch runs."""
    import threading

    pulled, seen, threads = 0, [], set()

    def rows():
        nonlocal pulled
        for row in token_rows(200, 4):
            pulled += 1
            threads.add(threading.current_thread())
            yield row

    def note(progress: pb.datasets.MapProgress) -> None:
        seen.append((progress.rows, pulled))
        threads.add(threading.current_thread())

    found = local_model().map(rows(), lambda run: {"n": reduce.count(run.mask)}, batch=5, window=10, progress=note)
    assert found["n"] == sum(map(len, token_rows(200, 4)))
    assert seen[0][1] <= 60
    assert seen[-1] == (200, 200)
    assert threads == {threading.current_thread()}


def test_columns_of_dicts_are_values_of_the_trace() -> None:
    """Numbers, vectors and labels of the rows, in the data set's order whatever the batches."""
    data = data_set(12, 5)

    def take(run):
        label = run.column("label", values=("no", "yes", "perhaps"))
        vector = run.column("vector").astype("float32")
        return {"weight": run.column("weight"), "label": label, "row": run.row_numbers, "vector": vector}

    found = local_model().map(data, take, batch=5, window=6)
    np.testing.assert_array_equal(found["weight"], [row["weight"] for row in data])
    np.testing.assert_array_equal(found["label"], np.arange(12) % 3)
    np.testing.assert_array_equal(found["row"], np.arange(12))
    np.testing.assert_array_equal(found["vector"], [row["vector"] for row in data])
