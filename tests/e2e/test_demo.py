"""The demo as a newcomer runs it, over plain gRPC; and that it leaves no process behind, however it ends.

(The same over Ray Serve is ``make demo``.)
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]

#: In the environment of everything that a test starts, and so of everything that this starts in turn.
MARK = "PB_DEMO_TEST_MARK"

SLEEPS = "import signal\nprint('RUNNING', flush=True)\nsignal.pause()\n"
STUBBORN = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:  # a daemon: its parent and its session are gone
    os.setsid()
    if os.fork() == 0:
        print("RUNNING", flush=True)
        signal.pause()
    os._exit(0)
os.wait()
{then}
"""


class Demo:
    """Starts demos and knows which of their processes still live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *flags: str, client: str | None = None, model: str = "demo") -> subprocess.Popen[str]:
        if client is not None:
            script = self.folder / "client.py"
            script.write_text(client, encoding="utf-8")
            flags = (*flags, "--client", str(script))
        report = self.folder / "report.html"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "patchbay_server.demo",
                "--plain",
                "--model",
                model,
                "--report",
                str(report),
                *flags,
            ],
            env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        self.started.append(process)
        return process

    def living(self) -> list[str]:
        """Command lines of the processes that carry the mark, except zombies."""
        found = []
        wanted = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    demo.end()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model in a folder, for tests in which the findings do not matter."""
    from patchbay_server.models.demo import tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{chr(97 + i)}" for i in range(tiny.VOCAB - 4))]
    tiny.build("llama").save_pretrained(folder)
    tokenizer.build(words).save_pretrained(folder)
    return str(folder)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What the demo prints up to the line with `words`."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    raise AssertionError(f"the demo ended without saying {words!r}:\n{text}")


def test_the_demo_finds_what_it_claims(demo: Demo) -> None:
    """Five findings hold, each with its costs; the report holds the pictures; exit 0; no process is left."""
    process = demo.start()
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    findings = re.findall(r"^\s+\[(ok|FAILED)\] (.*?):", printed, re.MULTILINE)
    titles = ["Logit lens", "Causal tracing", "Induction heads", "Steering", "A mistake, on purpose"]
    assert findings == [("ok", title) for title in titles]
    costs = re.findall(r"sent (\S+ \S+) · received (\S+ \S+) · passes (\d+) · queued \S+ ms · run (\S+) ms", printed)
    assert len(costs) == 5
    assert all(int(passes) > 0 and float(run) > 0 for _, _, passes, run in costs[:4])
    assert costs[4] == ("0 B", "0 B", "0", "0.0")
    page = (demo.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<section") == 5
    assert page.count("data:image/png;base64,") == 4  # two heat maps, each light and dark
    assert "Paris" in page
    assert demo.living() == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting the service", signal.SIGINT),
        ("loading", signal.SIGHUP),
        ("RUNNING", signal.SIGINT),
        ("RUNNING", signal.SIGTERM),
    ],
)
def test_a_signal_leaves_nothing_behind(demo: Demo, tiny_folder: str, moment: str, number: signal.Signals) -> None:
    """Ctrl-C and its kin, while the service starts or while the client runs, end everything; the status says which."""
    process = demo.start(client=SLEEPS, model=tiny_folder)
    read_until(process, moment)
    process.send_signal(number)
    rest, _ = process.communicate()
    assert process.returncode == 128 + number
    assert f"Stopped by {number.name}; nothing is left running." in rest
    assert demo.living() == []
    assert not (demo.folder / "report.html").exists()


@pytest.mark.parametrize("then", ["", "signal.pause()"], ids=["ends", "stays"])
def test_daemons_that_ignore_the_end_are_ended(demo: Demo, tiny_folder: str, then: str) -> None:
    """A process that left its session, lost its parent and ignores SIGTERM is found and killed all the same."""
    process = demo.start(client=STUBBORN.format(then=then), model=tiny_folder)
    read_until(process, "RUNNING")
    if then:
        process.send_signal(signal.SIGINT)
        process.stdout.readline()  # the line that says that it stops
        process.send_signal(signal.SIGINT)  # a second one does not wait for the polite end
    process.communicate()
    assert process.returncode == (130 if then else 0)
    assert demo.living() == []


def test_a_reader_that_goes_away_leaves_nothing_behind(demo: Demo, tiny_folder: str) -> None:
    """When nobody reads what the demo prints any more (a closed terminal, ``| head``), it still stops everything."""
    process = demo.start(client="print('RUNNING', flush=True)", model=tiny_folder)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait()
    assert demo.living() == []


def test_a_failing_client_fails_the_demo(demo: Demo, tiny_folder: str) -> None:
    """The client's exit status is the demo's, so that a finding that does not hold is seen by `make`."""
    process = demo.start(client="raise SystemExit(3)", model=tiny_folder)
    process.communicate()
    assert process.returncode == 3
    assert demo.living() == []


def test_the_client_gets_an_address_and_a_key(demo: Demo, tiny_folder: str) -> None:
    """The client half is told nothing but where the service is and the key that it asks for."""
    client = (
        "import os, patchbay as pb\n"
        "c = pb.connect(); print('MODELS', [m.name for m in c.models()])\n"
        "try: pb.connect(api_key='pbk_wrong').models()\n"
        "except pb.errors.UnauthenticatedError: print('REFUSED')\n"
        "print(sorted(k for k in os.environ if k.startswith('PATCHBAY_')))\n"
    )
    process = demo.start(client=client, model=tiny_folder)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert f"MODELS ['{Path(tiny_folder).name}']" in printed
    assert "REFUSED" in printed
    assert "['PATCHBAY_API_KEY', 'PATCHBAY_URL']" in printed


def test_a_service_that_cannot_start_is_explained(demo: Demo) -> None:
    """When the service ends at once, the demo exits 1 and shows the end of its log."""
    process = demo.start(client=SLEEPS, model=str(demo.folder / "nothing-here"))
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "The demo cannot run: the service ended" in printed
    assert "nothing-here" in printed
    assert demo.living() == []
