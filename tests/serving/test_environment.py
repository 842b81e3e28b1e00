"""What is prepared before Ray starts: ports, folders, variables; and the cleaning up after it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from patchbay_server.config import Config, ConfigError
from patchbay_server.serving import environment, launcher

FOLDER = Path("/tmp/patchbay-12345678")


def ports(config: Config | None = None) -> environment.NodePorts:
    return environment.find_ports(Config(port=9) if config is None else config)


def test_ports_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every port of a node is its own, and the replicas' ranges leave room for replacements."""
    monkeypatch.setattr(environment, "_is_free", lambda port: True)
    found = ports(Config.load(env={}, overrides={"models": [{"source": "demo", "replicas": 3}]}))
    singles = {found.grpc, found.http, found.stats, found.metrics, found.fallback_grpc, found.fallback_http}
    replica_ports = {*range(found.replica_grpc, found.replica_grpc + found.span)}
    replica_ports |= {*range(found.replica_http, found.replica_http + found.span)}
    assert len(singles) == 6
    assert len(replica_ports) == 2 * found.span
    assert not singles & replica_ports
    assert found.span > 3


def test_a_taken_port_is_named() -> None:
    """The public port must be free; the message says which flag chooses another."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken .*--port"):
            ports(Config(port=port))


def test_blocks_with_a_taken_port_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of ports is only used when all of it is free; with none free there is an error, not a loop."""
    monkeypatch.setattr(environment, "_is_free", lambda port: port == 9000)
    with pytest.raises(ConfigError, match="no block of"):
        ports(Config(port=9000))


def test_the_longest_socket_path_fits() -> None:
    """Under the default folder, HAProxy's and Ray's Unix sockets stay within 107 characters."""
    node_id, pid = "f" * 56, "4194304"
    assert len(str(FOLDER)) <= environment.MAX_FOLDER_LENGTH
    assert len(f"{FOLDER}/h/{node_id}/a.sock.{pid}.tmp") <= 107
    assert len(f"{FOLDER}/session_2026-11-20_09-58-15_211399_{pid}/sockets/plasma_store") <= 107


def test_nothing_is_shared_with_another_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths lie in the node's folder, ports are the chosen ones, and the token is the node's own."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(environment, "_is_free", lambda port: True)
    found = environment.node_environment(ports(), FOLDER, "/bin/true")
    paths = {name: value for name, value in found.items() if value.startswith("/")}
    assert all(value.startswith(str(FOLDER)) for value in paths.values())
    assert found["RAY_AUTH_MODE"] == "token"
    assert paths["RAY_AUTH_TOKEN_PATH"]
    assert found.items() >= environment.RAY_ENVIRONMENT.items()


@pytest.mark.parametrize(("drain_s", "wanted"), [(5.0, 120), (300.5, 301)])
def test_an_ingress_that_was_replaced_ends_with_its_calls(
    monkeypatch: pytest.MonkeyPatch, drain_s: float, wanted: int
) -> None:
    """HAProxy of before a change may finish its calls for as long as stopping may take, and its ports stay unused."""
    monkeypatch.setattr(environment, "_is_free", lambda port: True)
    found = environment.node_environment(ports(), FOLDER, "/bin/true", drain_s=drain_s)
    assert int(found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == wanted
    assert int(found["RAY_SERVE_PORT_QUARANTINE_S"]) > wanted


def test_the_operators_own_ray_authentication_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RAY_AUTH_MODE is set, it stays."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(environment, "_is_free", lambda port: True)
    assert "RAY_AUTH_MODE" not in environment.node_environment(ports(), FOLDER, None)


def test_without_haproxy_serves_own_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both switches that would bypass Serve's proxy are off."""
    monkeypatch.setattr(environment, "_is_free", lambda port: True)
    found = environment.node_environment(ports(), FOLDER, None)
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == found["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_haproxy_script_moves_all_but_grpc_to_loopback(tmp_path: Path) -> None:
    """The rendered configuration's HTTP, stats and metrics ports become local; the gRPC port and the rest stay."""
    chosen = environment.NodePorts(9000, 20000, 20001, 20002, 20003, 20004, 20005, 20025, 20)
    environment.prepare_folder(tmp_path, chosen, "/bin/echo")
    config = tmp_path / "a.cfg"
    config.write_text("f\n    bind *:20000\n    bind *:9000 proto h2\n  bind *:20001\n    bind :20002\n  x 20000\n")
    done = subprocess.run([tmp_path / "haproxy", "-f", config], capture_output=True, text=True, check=True)
    assert done.stdout == f"-f {config}\n"
    lines = config.read_text().splitlines()
    assert lines == [
        "f",
        "    bind 127.0.0.1:20000",
        "    bind *:9000 proto h2",
        "  bind 127.0.0.1:20001",
        "    bind 127.0.0.1:20002",
        "  x 20000",
    ]
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_long_temp_dirs_are_refused(tmp_path: Path) -> None:
    """A folder in which Unix sockets would not fit is refused by its key."""
    config = Config.load(env={}, overrides={"ray": {"temp_dir": str(tmp_path / ("x" * 40))}})
    with pytest.raises(ConfigError, match=r"ray\.temp_dir: .* too long"):
        launcher.run(config, progress=print, ready=print)


ORPHAN = """
import os, subprocess, sys
from patchbay_server.serving import processes
assert processes.adopt_orphans()
# A child that starts a grandchild and dies: the grandchild comes to us.
read, write = os.pipe()
child = subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & echo $! >&%d" % write], pass_fds=[write])
grandchild = int(os.read(read, 20))
child.wait()
assert grandchild in processes.descendants(os.getpid()), processes.descendants(os.getpid())
assert processes.end_descendants() == 1
assert processes.descendants(os.getpid()) == []
print("gone" if not os.path.exists(f"/proc/{grandchild}") else "there")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a child subreaper")
def test_orphans_are_adopted_and_ended() -> None:
    """A process whose parent died is found, killed and reaped."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
    )
    assert (done.stdout, done.returncode) == ("gone\n", 0), done.stderr


DEVICE_FAILURE = """
from patchbay_server.serving import local
local.EXIT_GRACE_S = 0.0
local.exit_replica(RuntimeError("CUDA error: device-side assert triggered"))
import threading
threading.Event().wait(30)
print("still here")
"""


def test_a_replica_with_a_failed_device_ends_its_process() -> None:
    """The process exits with the status for it, whatever else it does."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICE_FAILURE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 70
    assert "still here" not in done.stdout
    assert "unrecoverable device error" in done.stderr
