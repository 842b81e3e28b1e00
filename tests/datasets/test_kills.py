"""Servers and clients that are killed in the middle of a map, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from tests.datasets.killed_client import HOW, KINDS, ROWS, arrays_of, look, texts
from tests.serving_fixtures import Served, start_cli, tiny_config, wait_for_line

ROOT = Path(__file__).resolve().parents[2]


class PlainServer:
    """``patchbay serve --plain`` with the tiny model, on one port and over one folder of artifacts."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._config = tiny_config(
            host="127.0.0.1", insecure=True, torch_threads=1, artifacts={"path": str(home / "artifacts")}
        )
        self.target = f"127.0.0.1:{self._config.port}"
        self.served: Served | None = None

    def start(self) -> None:
        """Begins to start; does not wait."""
        self.served = start_cli(self._config, self._home, "--plain", env={"OMP_NUM_THREADS": "1"})

    def wait(self) -> None:
        """Until it answers."""
        assert self.served is not None
        wait_for_line(self.served, " serves ")

    def kill(self) -> None:
        """SIGKILL, and until it is gone."""
        if self.served is not None and self.served.process is not None:
            self.served.process.kill()
            self.served.process.wait(60)
            assert self.served.process.stdout is not None
            self.served.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainServer]:
    """A server that a test may kill, if it starts it again."""
    running = PlainServer(tmp_path_factory.mktemp("server"))
    running.start()
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def whole(server: PlainServer) -> dict[str, np.ndarray]:
    """The results of a map that nothing interrupted."""
    with pb.connect(server.target) as client:
        return arrays_of(client.model("tiny").map(texts(), look, **HOW))


def assert_same(found: dict[str, Any], whole: dict[str, np.ndarray]) -> None:
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_client_that_was_killed_goes_on_in_another_process(
    server: PlainServer, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """SIGKILL twice in the middle; the third process ends with the bits of an uninterrupted map, and what the killed
    ones left on the server is gone.
    """
    rows, function = KINDS[kind]
    with pb.connect(server.target) as client:
        model = client.model("tiny")
        before = {artifact.digest for artifact in model.artifacts.list()}
        whole = request.getfixturevalue("whole") if kind == "texts" else arrays_of(model.map(rows(), function, **HOW))
    state, out = tmp_path / "state.json", tmp_path / "out.npz"
    command = [sys.executable, "-m", "tests.datasets.killed_client", server.target, "", str(state), str(out), kind]
    path = os.pathsep.join([str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    reached = 0
    for kill_at in (100, 250):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if int(line) >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.wait(60) == -signal.SIGKILL
        done = json.loads(state.read_text())["rows"]
        assert reached < done < ROWS
        reached = done
    last = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert last.returncode == 0, last.stderr
    assert int(last.stdout.split()[0]) >= reached
    with np.load(out) as found:
        assert_same(dict(found), whole)
    needed = {lane["digest"] for lane in json.loads(state.read_text())["lanes"]}
    with pb.connect(server.target) as client:
        assert {artifact.digest for artifact in client.model("tiny").artifacts.list()} - before == needed


def test_a_server_that_was_killed_and_comes_back_is_waited_for(
    server: PlainServer, whole: dict[str, np.ndarray]
) -> None:
    """The map goes on with the states that the server finds on its disk; it says meanwhile that it waits."""
    killed, waited = False, set()

    def note(progress: pb.datasets.MapProgress) -> None:
        nonlocal killed
        if progress.waiting is not None:
            waited.add(progress.waiting)
        if progress.rows >= 120 and not killed:
            killed = True
            server.kill()
            server.start()

    with pb.connect(server.target) as client:
        found = client.model("tiny").map(texts(), look, progress=note, patience_s=240, **HOW)
    assert killed
    assert found.retries > 0
    assert any("unavailable" in text for text in waited), waited
    assert_same(arrays_of(found), whole)


def test_a_server_that_stays_away_ends_the_map(tmp_path: Path) -> None:
    """Patience has an end: the error says that nobody answers, and the state file has what was done."""
    own = PlainServer(tmp_path / "server")
    (tmp_path / "server").mkdir()
    own.start()
    state = tmp_path / "state.json"

    def note(progress: pb.datasets.MapProgress) -> None:
        if progress.rows >= 60:
            own.kill()

    try:
        own.wait()
        with pb.connect(own.target) as client, pytest.raises(pb.errors.UnavailableError, match="no Patchbay server"):
            client.model("tiny").map(texts(), look, progress=note, patience_s=0.5, resume=state, **HOW)
        assert 0 < json.loads(state.read_text())["rows"] < ROWS
        own.start()
        own.wait()
        # By another name: to gRPC the address is in disgrace for a while, for every client of this process.
        with pb.connect(own.target.replace("127.0.0.1", "localhost")) as client:
            found = client.model("tiny").map(texts(), look, resume=state, **HOW)
        assert found.rows == ROWS
    finally:
        own.kill()
