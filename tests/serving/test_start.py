"""What the configuration names is looked at before anything is loaded; what is wrong is one sentence with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from patchbay.errors import FailedPreconditionError
from patchbay_server import main
from patchbay_server.config import Config, ConfigError
from patchbay_server.models.loader import load


def config_of(folder: Path, **said: Any) -> Config:
    """A configuration that writes nowhere else."""
    base = {"keys": {"file": str(folder / "keys.json")}, "artifacts": {"path": str(folder / "artifacts")}}
    return Config.parse({**base, **said})


def test_what_is_there_is_fine(tmp_path: Path) -> None:
    """A key file and a folder that are not there yet will be made; nothing is left of trying."""
    main.check(config_of(tmp_path))
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"keys": {"file": "{folder}"}}, "keys: cannot read the key file {folder}: Is a directory"),
        ({"keys": {"file": "{file}"}}, "keys: {file} is not a Patchbay key file"),
        ({"keys": {"secrets_dir": "{folder}/none"}}, "keys: cannot read the keys in {folder}/none"),
        ({"artifacts": {"path": "{file}/below"}}, "artifacts.path: cannot write to {file}/below: Not a directory"),
    ],
    ids=["a folder as key file", "another file", "no folder of keys", "a file as folder"],
)
def test_what_is_wrong_is_named_by_its_key(tmp_path: Path, said: dict[str, Any], expected: str) -> None:
    """Each is a ConfigError before any model is loaded."""
    file = tmp_path / "notes.txt"
    file.write_text("not keys")

    def filled(text: str) -> str:
        return text.replace("{folder}", str(tmp_path)).replace("{file}", str(file))

    config = config_of(tmp_path, **{k: {name: filled(v) for name, v in part.items()} for k, part in said.items()})
    with pytest.raises(ConfigError) as caught:
        main.serve_plain(config, progress=lambda text: pytest.fail(text), ready=lambda port: pytest.fail("served"))
    assert filled(expected) in str(caught.value)


def test_tls_that_nobody_would_end_is_refused(tmp_path: Path) -> None:
    """Ray Serve's port has no TLS: a configuration that asks for it is refused, not served in the clear."""
    config = config_of(tmp_path, tls={"certificate_file": "cert.pem", "private_key_file": "key.pem"})
    with pytest.raises(ConfigError, match="tls: Ray Serve's port has no TLS; serve with --plain"):
        main.serve_on_ray(config, progress=lambda text: None, ready=lambda folder: None)


def test_tls_files_that_are_something_else(tmp_path: Path) -> None:
    """A certificate that is none is called so, and not a port that is taken."""
    file = tmp_path / "notes.txt"
    file.write_text("not a certificate")
    config = config_of(tmp_path, tls={"certificate_file": str(file), "private_key_file": str(file)})
    with pytest.raises(ConfigError, match="are not a PEM certificate chain and its key"):
        main.serve_plain(config, progress=lambda text: pytest.fail(text), ready=lambda port: pytest.fail("served"))


def test_a_device_that_is_not_there() -> None:
    """A model for a GPU that torch does not see is refused in words, before it is read."""
    with pytest.raises(FailedPreconditionError, match=r"is to run on 'cuda:99', but torch .* finds \d+ CUDA devices"):
        load("demo", device="cuda:99")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A path is not mistaken for the name of a repository."""
    with pytest.raises(FailedPreconditionError, match="there is no such folder here"):
        load(str(tmp_path / "none"))
