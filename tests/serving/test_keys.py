"""API keys: how they are kept, checked, shared and revoked."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from patchbay_server.store.keys import KeyStore, KeyStoreError, ensure_local_key, local_key_path


class Clock:
    """Seconds that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_opens_its_account(tmp_path: Path) -> None:
    """A created key verifies as its account; anything else as nobody."""
    store = KeyStore(tmp_path / "keys.json")
    key = store.create("ada")
    assert store.verify(key) == "ada"
    for wrong in (None, "", key[:-1], key + "x", key.upper(), "é\ud800"):
        assert store.verify(wrong) is None


def test_keys_have_256_bits_and_differ(tmp_path: Path) -> None:
    """Each key carries 32 random bytes (43 base64 characters)."""
    store = KeyStore(tmp_path / "keys.json")
    keys = {store.create("ada") for _ in range(20)}
    assert len(keys) == 20
    assert all(len(key.removeprefix("pbk_")) == 43 for key in keys)


def test_only_digests_reach_the_disk(tmp_path: Path) -> None:
    """The file never holds a key, and only its owner may read it."""
    store = KeyStore(tmp_path / "deep" / "keys.json")
    key = store.create("ada")
    text = store.path.read_text()
    assert key not in text
    assert key.removeprefix("pbk_") not in text
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_revocation_reaches_other_processes_within_a_minute(tmp_path: Path) -> None:
    """Another store on the same file (a replica) refuses a revoked key as soon as it rereads, seconds later."""
    clock = Clock()
    launcher, replica = KeyStore(tmp_path / "k.json"), KeyStore(tmp_path / "k.json", clock=clock)
    key, other = launcher.create("ada"), launcher.create("bob")
    assert replica.verify(key) == "ada"
    launcher.revoke("ada")
    assert launcher.verify(key) is None
    clock.now += 59.0
    assert replica.verify(key) is None
    assert replica.verify(other) == "bob"


def test_revoking_by_id_spares_the_accounts_other_keys(tmp_path: Path) -> None:
    """An id revokes one key; an unknown name is an error."""
    store = KeyStore(tmp_path / "k.json")
    old, new = store.create("ada"), store.create("ada")
    first = store.list()[0]
    assert [r.id for r in store.revoke(first.id)] == [first.id]
    assert store.verify(old) is None
    assert store.verify(new) == "ada"
    with pytest.raises(KeyStoreError, match="no key and no account"):
        store.revoke("eve")


def test_mounted_secret(tmp_path: Path) -> None:
    """A folder of plain keys, as Kubernetes mounts a Secret, opens accounts named after its files, hidden ones not."""
    clock = Clock()
    secret = tmp_path / "secret"
    (secret / "..data").mkdir(parents=True)
    (secret / "ada").write_text("one\n")
    store = KeyStore(tmp_path / "none.json", secrets_dir=secret, clock=clock)
    assert store.verify("one") == "ada"
    (secret / "ada").write_text("two\n")
    clock.now += 59.0
    assert store.verify("one") is None
    assert store.verify("two") == "ada"
    assert store.verify("") is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"keys": [{"id": "x"}]}', "\x00"])
def test_a_damaged_file_admits_nobody(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """A key file that cannot be understood closes the door, and the log says why."""
    clock = Clock()
    store = KeyStore(tmp_path / "k.json", clock=clock)
    key = store.create("ada")
    assert store.verify(key) == "ada"
    store.path.write_text(text)
    clock.now += 59.0
    assert store.verify(key) is None
    assert "no key is accepted" in caplog.text
    with pytest.raises(KeyStoreError, match="not a Patchbay key file"):
        store.create("bob")


@pytest.mark.parametrize("account", ["", "../x", "a b", "-a", "a" * 65, "a/b"])
def test_account_names(tmp_path: Path, account: str) -> None:
    """Names that could be paths or confuse a listing are refused."""
    with pytest.raises(KeyStoreError, match="cannot name an account"):
        KeyStore(tmp_path / "k.json").create(account)


def test_local_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving twice on a port keeps the local key; a key that was revoked or spoilt is replaced."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    store = KeyStore()
    path = ensure_local_key(store, 9000)
    assert path == local_key_path(9000) == tmp_path / "patchbay" / "keys" / "9000"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_text()
    assert store.verify(key.strip()) == "local"
    assert ensure_local_key(store, 9000).read_text() == key
    store.revoke("local")
    assert ensure_local_key(store, 9000).read_text() != key
    assert store.verify(path.read_text().strip()) == "local"


def test_file_is_json_with_a_version(tmp_path: Path) -> None:
    """The file names its version, so that a later one can tell."""
    store = KeyStore(tmp_path / "k.json")
    store.create("ada")
    data = json.loads(store.path.read_text())
    assert data["version"] == 1
    assert data["keys"][0]["account"] == "ada"
