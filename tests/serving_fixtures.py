"""Starts each kind of server for tests: in-process, plain grpc.aio, and Ray Serve as `patchbay serve` runs it.

Each function is a context manager; `shared_ray` starts one Ray service per test session, on first use, for every room
that wants one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from patchbay_server.config import Config
from patchbay_server.serving import processes

#: Words that the tiny model's tokenizer knows; ids 0 and 1 are <bos> and <unk>.
WORDS = tuple("the capital of france italy spain is paris rome madrid when mary and john went to a store gave".split())
TINY = "tiny"
D_MODEL, N_LAYERS, N_CTX = 256, 2, 64
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        target: what a client connects to.
        api_key: a key that it accepts; None when it asks for none.
        model: name of the tiny model there.
        config: its configuration.
        process: the launcher, when the server is another process.
        config_home: the ``XDG_CONFIG_HOME`` that it was given.
        log: what the launcher printed so far.
        lines: what it printed and nobody has waited for yet; "" at its end.
    """

    target: str
    api_key: str | None
    model: str
    config: Config
    process: subprocess.Popen[str] | None = None
    config_home: Path | None = None
    log: list[str] = field(default_factory=list)
    lines: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def pids(self, name: str = "") -> list[int]:
        """Ids of the processes of this service, the launcher first, whose command line contains `name`."""
        assert self.process is not None
        found = []
        for pid in (self.process.pid, *processes.descendants(self.process.pid)):
            with contextlib.suppress(OSError):
                if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


def tiny_model() -> transformers.PreTrainedModel:
    """A random Llama, wide enough that 1024 rows of 64 tokens are 64 MiB at one site."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {"<bos>": 0, "<unk>": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")


@functools.cache
def tiny_folder() -> Path:
    """The tiny model saved as a checkpoint would be; made once per session."""
    holder = tempfile.TemporaryDirectory(prefix="patchbay-tiny-")
    atexit.register(holder.cleanup)
    folder = Path(holder.name) / TINY
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_config(**overrides: Any) -> Config:
    """A configuration that hosts the tiny model."""
    base = {
        "models": [{"name": TINY, "source": str(tiny_folder())}],
        "port": free_port(),
        "artifacts": {"path": tempfile.mkdtemp(prefix="artifacts-", dir=tiny_folder().parent)},
    }
    return Config.load(env={}, overrides={**base, **overrides})


@contextlib.contextmanager
def serve_plain(config: Config | None = None) -> Iterator[Served]:
    """A plain grpc.aio server in a thread of this process; insecure unless the configuration has keys."""
    from patchbay_server.models.loader import load
    from patchbay_server.serving.local import LocalCatalog, backends_of
    from patchbay_server.serving.plain import serve_grpc
    from patchbay_server.serving.replica import servicer_of

    config = tiny_config(host="127.0.0.1", port=0, insecure=True, torch_threads=1) if config is None else config
    hosted = [load(m.source, name=m.name, dtype=m.dtype, device=m.device) for m in config.models]
    backends = backends_of(config, hosted, exit_on_device_failure=False)
    ports: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    async def run() -> None:
        try:
            server = await serve_grpc(servicer_of(config, LocalCatalog(backends)), config)
        except BaseException as error:
            ports.put(error)
            raise
        ports.put(server.port)
        await asyncio.get_running_loop().run_in_executor(None, stop.wait)
        await server.stop(grace_s=0)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="patchbay-test-server")
    thread.start()
    try:
        port = ports.get(timeout=60)
        if isinstance(port, BaseException):
            raise port
        yield Served(f"127.0.0.1:{port}", None, config.models[0].name, config)
    finally:
        stop.set()
        thread.join(timeout=60)
        for backend in backends.values():
            backend.close()


def start_cli(config: Config, home: Path, *flags: str, env: Mapping[str, str] | None = None) -> Served:
    """Start ``patchbay serve`` as a user would; returns at once, see `wait_ready`.

    Args:
        config: its configuration.
        home: a folder for its configuration file, keys and key file.
        flags: further flags of the command.
        env: further environment.
    """
    file = home / "patchbay.yaml"
    file.write_text(yaml.safe_dump(config.dump()), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "patchbay_server.cli", "serve", "--config", str(file), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **(env or {})},
    )
    served = Served(f"localhost:{config.port}", None, config.models[0].name, config, process, home)
    threading.Thread(target=_read, args=(served,), daemon=True).start()
    return served


def wait_for_line(served: Served, text: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Read what the launcher prints until a line contains `text`.

    Raises:
        AssertionError: it ended, or was silent for too long, before; the message has what it printed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            line = served.lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            line = ""
        if text in line and line:
            return
        assert line, f"no line with {text!r}; the launcher printed:\n{''.join(served.log)}"


def wait_ready(served: Served) -> Served:
    """Wait until the service has announced itself, snippet included; returns it with the local client's key."""
    wait_for_line(served, " serves ")
    wait_for_line(served, "print(top.value)")
    assert served.config_home is not None
    key = served.config_home / "patchbay" / "keys" / str(served.config.port)
    api_key = key.read_text(encoding="utf-8").strip() if key.exists() else None
    return Served(**{**served.__dict__, "api_key": api_key})


def _read(served: Served) -> None:
    """Take every line as it comes: select cannot see those that a text stream has buffered, and a full pipe blocks."""
    assert served.process is not None
    assert served.process.stdout is not None
    with contextlib.suppress(ValueError):
        for line in served.process.stdout:
            served.log.append(line)
            served.lines.put(line)
    served.lines.put("")


def stop_cli(served: Served, sig: int = signal.SIGINT, timeout_s: float = 60.0) -> int:
    """Ask the launcher to stop and wait until it has; returns its exit status."""
    process = served.process
    assert process is not None
    if process.poll() is None:
        process.send_signal(sig)
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        processes.end_all(served.pids())
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def patchbay_serve(source: str | Path, *, name: str, home: Path, **overrides: Any) -> Iterator[Served]:
    """``patchbay serve`` on Ray with one model, in processes of its own, with keys; stopped by SIGINT at the end.

    Args:
        source: the model, as ``--model`` takes it.
        name: name to serve it under.
        home: folder for its configuration, keys and key file.
        overrides: further keys of the configuration.
    """
    overrides = {"models": [{"name": name, "source": str(source)}], "torch_threads": 1, **overrides}
    served = start_cli(tiny_config(**overrides), home)
    try:
        yield wait_ready(served)
    finally:
        stop_cli(served)


@contextlib.contextmanager
def serve_ray() -> Iterator[Served]:
    """``patchbay serve`` on Ray with the tiny model and the embedded one."""
    both = [{"name": TINY, "source": str(tiny_folder())}, {"name": "demo", "source": "demo"}]
    with (
        tempfile.TemporaryDirectory(prefix="patchbay-home-") as home,
        patchbay_serve(tiny_folder(), name=TINY, home=Path(home), models=both) as served,
    ):
        yield served


@functools.cache
def _started() -> Served | Exception:
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    try:
        return stack.enter_context(serve_ray())
    except Exception as error:
        return error


def shared_ray() -> Served:
    """One Ray service for the whole session, started on first use (once, also when that fails), stopped at exit."""
    served = _started()
    if isinstance(served, Exception):
        raise served
    return served


def why_no_ray() -> str | None:
    """Why Ray cannot start here, or None when it can be tried."""
    import importlib.util

    if sys.platform == "win32":
        return "patchbay serve runs Ray on Linux and macOS only"
    if importlib.util.find_spec("ray") is None:
        return "ray is not installed (extra: server)"
    return None


def wait_gone(pids: list[int], timeout_s: float) -> list[int]:
    """Wait until the processes have ended; returns those that have not."""
    deadline = time.monotonic() + timeout_s
    left = []
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
        finally:
            os.close(handle)
        if not ended:
            left.append(pid)
    return left
