"""Workers and services as the harness sees them: processes to be asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.figure import Service
from benchmarks.models import folder

ROOT = Path(__file__).resolve().parents[1]
ANSWER_TIMEOUT_S = 1800.0
SERVICE_TIMEOUT_S = 300.0


class WorkerError(RuntimeError):
    """A contender failed; the message is its own, or says that its process ended or was silent."""


class Worker:
    """A process that runs contenders.

    Args:
        python: the interpreter of its environment.
        env: its environment variables.
        log: where its stderr goes.
    """

    def __init__(self, python: str, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._errors: IO[bytes] = log.open("ab")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env=dict(env),
        )
        self._unread = b""

    def ask(self, verb: str, **question: Any) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            WorkerError: the contender failed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"verb": verb, **question}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"the worker is gone ({self._last_words()})") from error
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                raise WorkerError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise WorkerError(f"the worker ended ({self._last_words()})")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = [row for row in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if row.strip()]
            return lines[-1] if lines else "it said nothing"
        return "its log cannot be read"

    def close(self) -> None:
        """Let its contenders close, and end it."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Running:
    """A service that answers.

    Attributes:
        address: what a client connects to.
        keys: account -> key; "" -> None where the service asks for none.
        pid: of its launcher.
    """

    address: str
    keys: Mapping[str, str | None]
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used so far (those that ended and were not reaped aside)."""
        from patchbay_server.serving.processes import descendants

        total = 0
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(OSError):
                fields = (
                    Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
                )
                total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(service: Service, *, threads: int, device: str, log: Path) -> Iterator[Running]:
    """``patchbay serve`` with one model, as a user starts it; ended with the block, whatever happens.

    Raises:
        WorkerError: it did not become ready; the message holds the end of its log.
    """
    from patchbay_server.demo.launcher import clean_environment, free_port, serve_command, tail
    from patchbay_server.demo.processes import Processes

    with tempfile.TemporaryDirectory(prefix="pbbench-") as home, Processes() as processes:
        keys: dict[str, str | None] = {"": None}
        env = clean_environment(Path(home))
        env["PATCHBAY_TORCH_THREADS"] = str(threads)
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        if service.accounts:
            keys = {account: _key(Path(home) / "secrets" / account) for account in service.accounts}
            env["PATCHBAY_KEYS__SECRETS_DIR"] = str(Path(home) / "secrets")
        else:
            env["PATCHBAY_INSECURE"] = "true"
        port = free_port()
        source = "demo" if service.model == "demo" else str(folder(service.model))
        with log.open("wb") as output:
            process = processes.start(
                serve_command(source, port, plain=service.plain), env=env, cwd=Path(home), output=output, follow=True
            )
        deadline = time.monotonic() + SERVICE_TIMEOUT_S
        # The last line of the snippet that is printed once every application has answered.
        while "print(top.value)" not in log.read_text(encoding="utf-8", errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise WorkerError(f"the service did not become ready. {tail(log)}")
            time.sleep(0.2)
        yield Running(f"127.0.0.1:{port}", keys, process.pid)


def _key(path: Path) -> str:
    import secrets

    key = secrets.token_urlsafe(32)
    path.parent.mkdir(exist_ok=True)
    path.write_text(key, encoding="utf-8")
    path.chmod(0o600)
    return key
