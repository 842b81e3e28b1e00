"""API keys: 256 random bits each, kept only as SHA-256 digests, compared in constant time, revoked within seconds.

A plain digest is enough for keys of 256 random bits (there is nothing to guess, so no salt and no slow hash). Every
replica reads the same file, and looks at most every `reread_s` seconds whether it has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from patchbay.errors import PatchbayError

log = logging.getLogger("patchbay.keys")

KEY_PREFIX = "pbk_"
ACCOUNT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?")
REREAD_S = 5.0


class KeyStoreError(PatchbayError, ValueError):
    """The key file cannot be read or written, or an account or key id makes no sense."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key.

    Attributes:
        id: short public name of the key, for listing and revoking.
        account: whose it is.
        sha256: hexadecimal digest of the key.
        created: when, ISO 8601 in UTC.
    """

    id: str
    account: str
    sha256: str
    created: str


def config_dir() -> Path:
    """The user's folder for Patchbay: ``$XDG_CONFIG_HOME/patchbay``, or ``~/.config/patchbay``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "patchbay"


def default_key_file() -> Path:
    """Where digests are kept unless the configuration says otherwise."""
    return config_dir() / "keys.json"


def local_key_path(port: int | str) -> Path:
    """The file in which a client on this machine finds its key for the server on `port` (plain text, mode 0600)."""
    return config_dir() / "keys" / str(port)


def digest(key: str) -> str:
    """Hexadecimal SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class KeyStore:
    """Keys in a file of digests and, where one is given, in a folder of plain keys (a mounted Kubernetes Secret).

    Args:
        path: JSON file of digests; made on the first `create`.
        secrets_dir: folder with one key per file, named after its account.
        reread_s: seconds after which a change of either is seen at the latest.
        clock: monotonic seconds; replaced in tests.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        secrets_dir: str | os.PathLike[str] | None = None,
        reread_s: float = REREAD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = default_key_file() if path is None else Path(path)
        self.secrets_dir = None if secrets_dir is None else Path(secrets_dir)
        self._reread_s = reread_s
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._accounts: tuple[tuple[bytes, str], ...] = ()

    def verify(self, key: str | None) -> str | None:
        """The account that the key belongs to, or None; takes as long for a near miss as for any other."""
        if not key:
            return None
        wanted = digest(key).encode()
        found: str | None = None
        for known, account in self._current():
            if hmac.compare_digest(known, wanted):
                found = account
        return found

    def check(self) -> None:
        """Read everything once.

        Raises:
            KeyStoreError: the file or the folder cannot be read; nobody would be admitted.
        """
        for _ in self._load():
            pass

    def create(self, account: str) -> str:
        """Make a key for an account; the only moment at which the key itself is seen.

        Raises:
            KeyStoreError: the account's name makes no sense, or the file cannot be written.
        """
        if not ACCOUNT.fullmatch(account):
            raise KeyStoreError(
                f"{account!r} cannot name an account: letters, digits and . _ @ - only, at most 64, no mark at the ends"
            )
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(
            secrets.token_hex(4), account, digest(key), datetime.now(timezone.utc).isoformat("T", "seconds")
        )
        with self._exclusive():
            self._write((*self._read(), record))
        return key

    def list(self) -> tuple[KeyRecord, ...]:
        """The keys of the file, oldest first.

        Raises:
            KeyStoreError: the file cannot be read.
        """
        return self._read()

    def revoke(self, id_or_account: str) -> tuple[KeyRecord, ...]:
        """Forget the key with this id, or every key of this account; returns what was forgotten.

        Raises:
            KeyStoreError: nothing has that name, or the file cannot be written.
        """
        with self._exclusive():
            records = self._read()
            gone = tuple(r for r in records if id_or_account in (r.id, r.account))
            if not gone:
                raise KeyStoreError(f"no key and no account is called {id_or_account!r}; see `patchbay keys list`")
            self._write(tuple(r for r in records if r not in gone))
        return gone

    def _current(self) -> tuple[tuple[bytes, str], ...]:
        now = self._clock()
        with self._lock:
            if self._looked_at is None or now - self._looked_at >= self._reread_s:
                self._looked_at = now
                try:
                    self._accounts = tuple(self._load())
                except KeyStoreError as error:
                    # Fail closed: a key file that cannot be read admits nobody.
                    log.error("no key is accepted: %s", error)
                    self._accounts = ()
            return self._accounts

    def _load(self) -> Iterator[tuple[bytes, str]]:
        for record in self._read():
            yield record.sha256.encode(), record.account
        if self.secrets_dir is None:
            return
        try:
            files = sorted(p for p in self.secrets_dir.iterdir() if ACCOUNT.fullmatch(p.name) and p.is_file())
            for file in files:
                key = file.read_text(encoding="utf-8").strip()
                if key:
                    yield digest(key).encode(), file.name
        except (OSError, UnicodeDecodeError) as error:
            raise KeyStoreError(f"cannot read the keys in {self.secrets_dir}: {error}") from None

    def _read(self) -> tuple[KeyRecord, ...]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return tuple(KeyRecord(**record) for record in data["keys"])
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise KeyStoreError(f"cannot read the key file {self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise KeyStoreError(f"{self.path} is not a Patchbay key file; move it away and create keys anew") from None

    def _write(self, records: tuple[KeyRecord, ...]) -> None:
        text = json.dumps({"version": 1, "keys": [asdict(r) for r in records]}, indent=1) + "\n"
        write_private(self.path, text)
        with self._lock:
            self._looked_at = None

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep two processes from losing each other's changes (where the platform has file locks)."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise KeyStoreError(f"cannot write beside the key file {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all.

    Raises:
        KeyStoreError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error.strerror}") from None


def ensure_local_key(store: KeyStore, port: int | str, account: str = "local") -> Path:
    """Make sure that clients on this machine find a valid key for `port`; an old one that still holds is kept.

    Returns:
        The file with the key.

    Raises:
        KeyStoreError: a file cannot be written.
    """
    path = local_key_path(port)
    try:
        if store.verify(path.read_text(encoding="utf-8").strip()) is not None:
            path.chmod(0o600)
            return path
    except (OSError, UnicodeDecodeError):
        pass  # none yet, or not readable: write a new one
    write_private(path, store.create(account) + "\n")
    return path
