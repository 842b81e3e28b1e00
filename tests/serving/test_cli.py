"""The patchbay command: what it prints, and with which status it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from patchbay._version import __version__
from patchbay.saving import save_results
from patchbay_server import cli
from patchbay_server.cli import text
from patchbay_server.store.keys import KeyStore
from tests.serving_fixtures import TINY, Served, free_port, serve_plain, start_cli, stop_cli, tiny_config, wait_ready


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or touches the keys and settings of whoever runs it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("PATCHBAY_URL", "PATCHBAY_API_KEY", "PATCHBAY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A plain server without keys."""
    with serve_plain() as served:
        yield served


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints it and ends with 0."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"patchbay {__version__}\n"


def test_importing_the_cli_is_light() -> None:
    """The command itself loads none of the heavy packages, so that --help and --version are quick."""
    heavy = ("torch", "ray", "transformers", "grpc", "pydantic", "numpy")
    code = f"import sys, patchbay_server.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_models(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """One aligned line per model."""
    assert cli.main(["models", "--url", served.target]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["MODEL", "FAMILY", "PARAMS", "LAYERS", "WIDTH", "READY", "SOURCE"]
    assert line.split()[:2] == [TINY, "llama"]
    assert head.index("FAMILY") == line.index("llama")


def test_card(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """The card folds layers into one line and names what is absent; --sites lists everything, --proofs the proofs."""
    assert cli.main(["card", TINY, "--url", served.target]) == 0
    short = capsys.readouterr().out
    assert re.search(r"blocks\.\{0-1\}\.attn\.pattern +\[rows, 4, query, key\] +float32 +read, write", short)
    assert "not offered by this model" in short
    assert "module:" not in short
    assert cli.main(["card", TINY, "--sites", "--url", served.target]) == 0
    whole = capsys.readouterr().out
    assert "blocks.1.attn.pattern" in whole
    assert "module:" in whole
    assert "embed = first resid_pre" not in short + whole
    assert cli.main(["card", TINY, "--proofs", "--url", served.target]) == 0
    assert re.search(r"^  blocks\.0\.resid_pre\n    .*embed = first resid_pre", capsys.readouterr().out, re.MULTILINE)


def test_prove(capsys: pytest.CaptureFixture[str]) -> None:
    """A model is loaded in this process, and every site's proof is shown, absent ones with their reason."""
    assert cli.main(["prove", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "resid_pre + attn_out = resid_mid" in shown
    assert "not offered by this model:\n  pos_embed" in shown
    assert re.search(r"(\d{3}) sites proved, 1 absent; loaded and proved in [\d.]+ s\n$", shown)


def test_errors_are_one_kind_line(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback: a sentence on stderr and status 1."""
    for arguments, expected in (
        (["card", "tinny", "--url", served.target], "did you mean 'tiny'"),
        (["models", "--url", f"localhost:{free_port()}"], "no Patchbay server answers"),
        (["serve", "--config", "/nonexistent.yaml"], "cannot read the configuration file"),
        (["keys", "revoke", "nobody"], "no key and no account"),
    ):
        assert cli.main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("patchbay: ")
        assert expected in err
        assert "Traceback" not in err


def test_keys_live_in_the_default_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """create prints the key alone on stdout, list never shows it, revoke forgets it."""
    assert cli.main(["keys", "create", "ada"]) == 0
    key = capsys.readouterr().out.strip()
    store = KeyStore(home / "patchbay" / "keys.json")
    assert store.verify(key) == "ada"
    assert cli.main(["keys", "list"]) == 0
    listing = capsys.readouterr().out
    assert "ada" in listing
    assert key not in listing
    assert cli.main(["keys", "revoke", "ada"]) == 0
    assert KeyStore(store.path).verify(key) is None


def test_keys_follow_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --config the file is the one that the service will read."""
    file = tmp_path / "patchbay.yaml"
    file.write_text(f"keys: {{file: {tmp_path / 'mine.json'}}}")
    assert cli.main(["keys", "--config", str(file), "create", "bob"]) == 0
    assert KeyStore(tmp_path / "mine.json").verify(capsys.readouterr().out.strip()) == "bob"


def test_thin_install_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the service's packages `serve` names the extra."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve"]) == 1
    assert "pip install 'patchbay[server]'" in capsys.readouterr().err


def test_doctor_finds_a_server(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is ok, warn or FAIL; a server that answers is named with its models."""
    assert cli.main(["doctor", "--url", served.target]) == 0
    out = capsys.readouterr().out
    assert f"hosts {TINY}" in out
    lines = out.split("\n\n")[0].splitlines()
    assert len(lines) >= 8
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}


def test_doctor_says_how_to_mend(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad configuration, a readable key file and a silent server are failures, each with a remedy; status 1."""
    port = free_port()
    file = home / "bad.yaml"
    file.write_text("prot: 1")
    key = home / "patchbay" / "keys" / str(port)
    key.parent.mkdir(parents=True)
    key.write_text("pbk_x")
    key.chmod(0o644)
    assert cli.main(["doctor", "--config", str(file), "--url", f"localhost:{port}"]) == 1
    out = capsys.readouterr().out
    for remedy in ("did you mean 'port'", f"chmod 600 {key}", "check the address"):
        assert remedy in out
    assert "3 of " in out


def test_serve_plain_from_start_to_stop(tmp_path: Path) -> None:
    """--plain shows progress, announces itself with a snippet that works, makes a key, and Ctrl-C ends it with 0."""
    served = start_cli(tiny_config(torch_threads=1), tmp_path, "--plain")
    try:
        served = wait_ready(served)
        assert served.api_key is not None
        done = subprocess.run(
            [sys.executable, "-m", "patchbay_server.cli", "models", "--url", served.target],
            capture_output=True,
            text=True,
            check=False,
        )
        assert TINY in done.stdout, done.stderr
        snippet = textwrap.dedent("".join(served.log).partition("\n\n")[2])
        pasted = subprocess.run(
            [sys.executable, "-c", snippet],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path)},
        )
        assert re.fullmatch(r"\[\[( *\d+){5}\]\]\n", pasted.stdout), pasted.stderr
    finally:
        status = stop_cli(served)
    assert status == 0
    printed = "".join(served.log)
    assert f"loading {TINY}" in printed
    assert f'pb.connect("localhost:{served.config.port}")' in printed


def test_tables_and_counts() -> None:
    """Columns align, trailing spaces are gone, and counts have three digits."""
    assert text.table([("a", "b"), ("ccc", "d")], head=("X", "Y")) == "X    Y\na    b\nccc  d"
    assert text.table([]) == ""
    assert [text.count(n) for n in (7, 950_000, 1_236_000_000)] == ["7", "950k", "1.24B"]


def test_run_a_saved_graph(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The values that the graph's own trace gave, printed and kept; --show prints the graph and runs nothing."""
    import numpy as np

    import patchbay as pb

    path, out = tmp_path / "graph.pb", tmp_path / "values.npz"
    with pb.connect(served.target) as client, client.model(TINY).trace([1, 5, 9]) as run:
        run.save(h=run.blocks[0].resid_post, top=run.logits[:, -1].argmax(-1))
    pb.save_graph(run, path)
    assert cli.main(["run", str(path), "--server", served.target, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"top +int64\[1\] +\[{run.results['top'][0]}\]", printed)
    assert "1 pass over 3 tokens" in printed
    with np.load(out) as found:
        assert found["h"].tobytes() == run.results["h"].tobytes()
    assert cli.main(["run", str(path), "--show"]) == 0
    assert "run0.blocks[0].resid_post" in capsys.readouterr().out


def test_run_says_what_is_wrong(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, a file that is none, and an --out of another kind are one line on stderr."""
    noise = tmp_path / "noise.pb"
    noise.write_bytes(b"noise")
    for args, message in (([str(tmp_path / "none.pb")], "cannot read"), ([str(noise)], "not a saved graph")):
        assert cli.main(["run", *args, "--url", served.target]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_artifacts(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tensor of a file is put, listed, fetched and deleted; what is not there is one line and status 1."""
    target = ["--url", served.target]
    save_results({"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}, tmp_path / "in.safetensors")
    assert cli.main(["artifacts", "put", str(tmp_path / "in.safetensors"), "--name", "sae.", *target]) == 0
    assert "float32[2, 3]" in capsys.readouterr().out
    assert cli.main(["artifacts", "list", *target]) == 0
    listed = capsys.readouterr().out
    assert listed.splitlines()[0].split() == ["DIGEST", "TENSOR", "SIZE", "EXPIRES", "NAME"]
    assert "sae.w" in listed
    assert "2 in all" in listed
    assert cli.main(["artifacts", "get", "sae.w", str(tmp_path / "out.npz"), *target]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["sae.w"], np.ones((2, 3)))
    assert cli.main(["artifacts", "delete", "sae.w", "sae.b", *target]) == 0
    capsys.readouterr()
    assert cli.main(["artifacts", "list", *target]) == 0
    assert capsys.readouterr().out == "no artifacts\n"
    assert cli.main(["artifacts", "delete", "sae.w", *target]) == 1
    assert "you have no artifact called 'sae.w'" in capsys.readouterr().err
    assert cli.main(["artifacts", "put", str(tmp_path / "missing.safetensors"), *target]) == 1
    assert "No such file" in capsys.readouterr().err
