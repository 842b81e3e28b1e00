"""The launcher with a node of the tests' own: what it passes on, and when it tries again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: Each start takes the next line of a file and says it, as the node would.
NODE = """
import pathlib, sys
sys.stdin.readline()
said = pathlib.Path(sys.argv[1])
first, _, rest = said.read_text().partition("\\n")
said.write_text(rest)
print(first, flush=True)
sys.exit(0 if "ready" in first else 1)
"""
# In a process of its own: the launcher ends every descendant of the process that it runs in.
LAUNCH = """
import json, sys
from patchbay_server.config import Config
from patchbay_server.serving import launcher
launcher.NODE = (sys.executable, "-c", sys.argv[1], sys.argv[2])
shown = []
launch = launcher.run(Config(port=0), progress=shown.append, ready=lambda folder: shown.append("ready"))
print(json.dumps({"shown": shown, "failure": launch.failure, "ready": launch.ready, "log": str(launch.log)}))
"""
SLOW, READY, FAILED = '{"too slow": "busy"}', '{"ready": ""}', '{"failed": "no such model"}'


def launch(tmp_path: Path, *said: str) -> dict[str, object]:
    """How a launch goes whose node says one of `said` at each start."""
    script = tmp_path / "said"
    script.write_text("\n".join(said) + "\n", encoding="utf-8")
    command = [sys.executable, "-c", LAUNCH, NODE, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, object] = json.loads(done.stdout)
    assert isinstance(result["shown"], list)
    return {**result, "left": script.read_text(encoding="utf-8").split()}


def test_a_node_that_was_too_slow_is_started_again(tmp_path: Path) -> None:
    """Ray gave up on itself twice, the third start serves; the user is told each time."""
    gone = launch(tmp_path, SLOW, SLOW, READY)
    assert gone["ready"] is True
    assert gone["failure"] is None
    assert gone["shown"] == ["starting Ray again: this machine was too busy for it"] * 2 + ["ready"]


def test_three_slow_starts_are_a_failure(tmp_path: Path) -> None:
    """It does not go on for ever: the third verdict is the launch's."""
    gone = launch(tmp_path, SLOW, SLOW, SLOW, READY)
    assert (gone["ready"], gone["failure"]) == (False, "busy")


@pytest.mark.parametrize("said", [FAILED, "not a message"])
def test_other_failures_are_not_tried_again(tmp_path: Path, said: str) -> None:
    """A model that cannot be loaded, or a node that dies without a word, fails at once."""
    gone = launch(tmp_path, said, READY)
    assert gone["ready"] is False
    assert gone["failure"] in ("no such model", "the service ended unexpectedly (status 1)")
    assert gone["left"]
