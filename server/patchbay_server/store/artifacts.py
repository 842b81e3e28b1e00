"""Tensors on disk, by a digest of their content: a folder per account, shared by every replica that sees the disk.

    <account>/<sha256>.safetensors   a tensor; the file's own SHA-256 is its name
    <account>/<sha256>.json          what its owner calls it; missing for constants that were uploaded by themselves
    <account>/uploads/               files that are being written, locked by whoever writes them
    <account>/in-use/                second links to what graphs are using, so that nothing vanishes under them

A file appears under its name when it is complete and its digest has been worked out, never before; whoever uses a file
that it did not write works the digest out again, once, and throws away what is not what it says. Its time of last
change is the time of its last use. Names on disk are digests only: nothing that a client chooses is part of a path.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import re
import secrets
import shutil
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from patchbay.errors import GraphError, InvalidRequestError, ResourceExhaustedError
from patchbay.ir.artifacts import (
    PREFIX,
    SAFETENSORS_NAMES,
    ArtifactInfo,
    KeyedTensor,
    check_form,
    digest_of,
    file_header,
    not_there,
)
from patchbay.ir.graph import TensorData
from patchbay_server.store.locks import locked, try_lock

log = logging.getLogger("patchbay.artifacts")

DATA, FACTS, UPLOADS, IN_USE = ".safetensors", ".json", "uploads", "in-use"
#: A tensor of at most so many bytes is read instead of mapped.
READ_BYTES = 2**20
#: Links of graphs that ended without removing them (a killed replica) go after this time.
IN_USE_S = 24 * 3600.0
#: How often a process looks at every account for what has expired.
SWEEP_S = 600.0
#: How often it adds up what all accounts have, where that is limited.
COUNT_S = 5.0

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_HEADER_BYTES = 4096
_WRITE_BYTES = 4 * 2**20
#: Files that a process remembers to have found whole.
_KNOWN_FILES = 65_536
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


class Upload:
    """A tensor that is being written; `finish` or `abort` ends it."""

    def __init__(self, store: ArtifactStore, folder: Path, info: ArtifactInfo, automatic: bool) -> None:
        self._store, self._folder, self._info, self._automatic = store, folder, info, automatic
        self._path = folder / UPLOADS / secrets.token_hex(16)
        self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 - `abort` closes it, and always comes
        self._lock: Any = try_lock(self._file)  # tells others that it is not left over from a crash
        header = file_header(info.dtype, info.shape)
        self._hash = hashlib.sha256(header)
        self._missing = info.nbytes
        try:
            os.truncate(self._path, len(header) + info.nbytes)  # counted against the quota from the beginning
            self._write(header)
        except BaseException:
            self.abort()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes.

        Raises:
            ResourceExhaustedError: the disk is full.
        """
        if len(data) > self._missing:
            raise InvalidRequestError("more bytes than were announced", reason="ARTIFACT_TOO_LONG")
        self._missing -= len(data)
        self._hash.update(data)
        self._write(data)

    def finish(self) -> ArtifactInfo:
        """Give it its name.

        Raises:
            InvalidRequestError: bytes are missing, or its digest is another.
            ResourceExhaustedError: the disk is full.
        """
        try:
            if self._missing:
                raise InvalidRequestError(f"{self._missing} bytes never came", reason="ARTIFACT_TOO_SHORT")
            digest = PREFIX + self._hash.hexdigest()
            if digest != self._info.digest:
                raise InvalidRequestError(
                    f"what came is {digest}, not {self._info.digest}", reason="ARTIFACT_DIGEST_MISMATCH"
                )
            if self._store.durable:
                with _disk_errors():
                    os.fsync(self._file.fileno())
            return self._store.settle(self._folder, self._path, self._info, self._automatic)
        finally:
            self.abort()

    def abort(self) -> None:
        """Leave nothing behind; after `finish`, and a second time, this does nothing."""
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        with _disk_errors():
            while rest:
                rest = rest[self._file.write(rest) :]


class ArtifactStore:
    """Artifacts under one folder. Every method blocks; a store may be used from many threads, a folder by many stores.

    Args:
        root: the folder; made when something is first stored.
        quota_bytes: bytes of one account's artifacts, those being uploaded included.
        ttl_s: seconds after its last use after which an artifact goes.
        max_bytes: bytes of one artifact.
        max_count: artifacts of one account.
        total_bytes: bytes of all accounts together; None: what the disk holds. Counted anew every few seconds, so
            several processes may together overshoot by what they store in that time.
        durable: whether a file is on the disk, and not only with the operating system, before it gets its name.
        clock: seconds since 1970; replaced in tests.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        quota_bytes: int = 32 * 2**30,
        ttl_s: float = 30 * 24 * 3600.0,
        max_bytes: int = 8 * 2**30,
        max_count: int = 10_000,
        total_bytes: int | None = None,
        durable: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = Path(root)
        self.quota_bytes, self.ttl_s, self.max_bytes, self.max_count = quota_bytes, ttl_s, max_bytes, max_count
        self.total_bytes = total_bytes
        self.durable = durable
        self._total = 0
        self._counted_at = -COUNT_S
        self._clock = clock
        self._swept_at = -SWEEP_S
        self._whole: set[tuple[int, str]] = set()  # inode and digest

    # --- storing --------------------------------------------------------------------------------------------------

    def begin(self, account: str, info: ArtifactInfo, *, automatic: bool = False) -> Upload | ArtifactInfo:
        """Make room for a tensor that is about to come.

        Args:
            account: whose it is.
            info: its digest, form and name; times are not looked at.
            automatic: a graph's own constant: it may go again where room is short.

        Returns:
            Where its bytes go; or, where it is there already, what is known of it.

        Raises:
            ResourceExhaustedError: too large, beyond the account's quota or number, or the disk is full.
        """
        if info.nbytes > self.max_bytes:
            raise _exhausted(
                "ARTIFACT_TOO_LARGE",
                f"an artifact of {info.nbytes:,} bytes; this server takes at most {self.max_bytes:,} "
                "(artifacts.max_bytes): split it",
            )
        self._sweep()
        folder = self._folder(account)
        with _disk_errors():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in (UPLOADS, IN_USE):
                (folder / part).mkdir(exist_ok=True, mode=0o700)
        with self._locked(folder):
            found = self._info(folder, info.digest)
            if found is not None:
                self._touch(folder, info.digest)
                if not automatic:
                    self._name(folder, info)
                return self._info(folder, info.digest) or found
            size = len(file_header(info.dtype, info.shape)) + info.nbytes
            self._make_room(folder, size)
            self._count_in(size)
            with _disk_errors():
                free = shutil.disk_usage(folder).free
                if free < size:
                    raise OSError(errno.ENOSPC, "no space")
                return Upload(self, folder, info, automatic)

    def put(self, account: str, tensor: TensorData, name: str = "") -> ArtifactInfo:
        """Store a tensor whose digest is worked out here.

        Raises:
            ResourceExhaustedError: as `begin`.
        """
        upload = self.begin(account, ArtifactInfo(digest_of(tensor), tensor.dtype, tensor.shape, tensor.nbytes, name))
        if isinstance(upload, ArtifactInfo):
            return upload
        data = memoryview(tensor.data)
        try:
            for offset in range(0, len(data), _WRITE_BYTES):
                upload.write(data[offset : offset + _WRITE_BYTES])
            return upload.finish()
        finally:
            upload.abort()

    def check_room(self, account: str, size: int) -> None:
        """
        Raises:
            ResourceExhaustedError: `size` bytes more would not fit.
        """
        folder = self._folder(account)
        if size > self.quota_bytes:
            raise self._full(size, 0)
        if folder.is_dir():
            with self._locked(folder):
                self._make_room(folder, size)

    def settle(self, folder: Path, path: Path, info: ArtifactInfo, automatic: bool) -> ArtifactInfo:
        """Give a complete upload its name; `Upload.finish` calls it."""
        with self._locked(folder), _disk_errors():
            now = self._clock()
            os.utime(path, (now, now))  # before it can be seen: it has just been used
            os.replace(path, folder / (info.digest.removeprefix(PREFIX) + DATA))
            self._found_whole(os.stat(folder / (info.digest.removeprefix(PREFIX) + DATA)).st_ino, info.digest)
            if not automatic:
                self._name(folder, info)
            return self._info(folder, info.digest) or replace(info, expires_at=now + self.ttl_s)

    # --- looking and using ----------------------------------------------------------------------------------------

    def stat(self, account: str, digests: Sequence[str]) -> list[ArtifactInfo]:
        """What is there of `digests`, in their order; asking counts as use."""
        folder = self._folder(account)
        found = []
        for digest in digests:
            if self._info(folder, digest) is not None:
                self._touch(folder, digest)
                info = self._info(folder, digest)
                if info is not None:
                    found.append(info)
        return found

    def list(self, account: str, *, after: str = "", limit: int = 100) -> tuple[list[ArtifactInfo], bool]:
        """Artifacts by digest, the first behind `after`; and whether there are more."""
        folder = self._folder(account)
        names = sorted(f"{PREFIX}{name.removesuffix(DATA)}" for name in _names(folder, DATA))
        found: list[ArtifactInfo] = []
        for digest in names:
            if digest > after and (info := self._info(folder, digest)) is not None:
                if len(found) == limit:
                    return found, True
                found.append(info)
        return found, False

    def open(self, account: str, digest: str) -> tuple[ArtifactInfo, KeyedTensor]:
        """A tensor to use, over a map of its file: it stays readable for as long as anybody refers to it.

        Raises:
            NotFoundError: the account has none of that digest.
        """
        folder, name = self._folder(account), digest.removeprefix(PREFIX) + DATA
        info = self._info(folder, digest)
        if info is None:
            raise not_there(digest)
        try:
            inode = os.stat(folder / name).st_ino
            data = self._readable(folder, folder / name, info.nbytes)
        except FileNotFoundError:
            raise not_there(digest) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise _exhausted("TOO_MANY_OPEN_FILES", "the server has too many artifacts open; try again") from None
            raise
        if (inode, digest) not in self._whole:
            if _digest_of_file(data) != digest:  # a bad disk, or a hand in the folder: no value is better than another
                log.error("%s is not what its name says; it is removed", folder / name)
                with self._locked(folder):
                    self._remove(folder, digest)
                raise not_there(digest)
            self._found_whole(inode, digest)
        self._touch(folder, digest)
        elements = memoryview(data)[len(file_header(info.dtype, info.shape)) :]
        return info, KeyedTensor(info.dtype, info.shape, elements, f"{folder.name}/{digest}")

    def delete(self, account: str, digest: str) -> None:
        """Remove one; whoever uses it keeps what is open.

        Raises:
            NotFoundError: the account has none of that digest.
        """
        folder = self._folder(account)
        if self._info(folder, digest) is None:
            raise not_there(digest)
        with self._locked(folder):
            self._remove(folder, digest)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _readable(self, folder: Path, path: Path, size: int) -> bytes | mmap.mmap:
        """A file's content; a second link keeps it from vanishing while it is mapped."""
        if size <= READ_BYTES:
            return path.read_bytes()
        link = folder / IN_USE / f"{int(self._clock())}-{secrets.token_hex(8)}"
        try:
            os.link(path, link)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without second links: a copy in memory cannot vanish either
            return path.read_bytes()
        try:
            with open(link, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            link.unlink(missing_ok=True)
            raise
        weakref.finalize(content, _unlink, link, os.getpid())
        return content

    def _found_whole(self, inode: int, digest: str) -> None:
        if len(self._whole) >= _KNOWN_FILES:
            self._whole.clear()
        self._whole.add((inode, digest))

    def _folder(self, account: str) -> Path:
        # A digest: whatever an account is called, it is one name of one folder, on every file system.
        return self.root / hashlib.sha256(account.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        with locked(folder / ".lock"):
            yield

    def _info(self, folder: Path, digest: str) -> ArtifactInfo | None:
        """What is known of an artifact; None where there is none, or no longer."""
        if _HEX.fullmatch(digest.removeprefix(PREFIX)) is None:
            return None
        stem = folder / digest.removeprefix(PREFIX)
        try:
            with open(f"{stem}{DATA}", "rb") as file:
                status = os.fstat(file.fileno())
                form = _form(file, status.st_size)
        except FileNotFoundError:
            return None
        if form is None:
            log.warning("%s%s is no artifact's file", stem, DATA)
            return None
        if status.st_mtime + self.ttl_s <= self._clock():
            return None
        info = replace(form, digest=digest, expires_at=status.st_mtime + self.ttl_s)
        try:
            facts = json.loads(Path(f"{stem}{FACTS}").read_text(encoding="utf-8"))
            return replace(info, name=str(facts["name"]), created_at=float(facts["created_at"]))
        except (OSError, ValueError, KeyError, TypeError):
            return info

    def _touch(self, folder: Path, digest: str) -> None:
        now = self._clock()
        with contextlib.suppress(FileNotFoundError):
            os.utime(folder / (digest.removeprefix(PREFIX) + DATA), (now, now))

    def _name(self, folder: Path, info: ArtifactInfo) -> None:
        """Write down that the owner asked for it by name."""
        path = folder / (info.digest.removeprefix(PREFIX) + FACTS)
        created = self._clock()
        name = info.name
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            created, name = float(known["created_at"]), name or str(known["name"])
        fresh = folder / UPLOADS / f"{secrets.token_hex(16)}{FACTS}"
        with _disk_errors():
            fresh.write_text(json.dumps({"name": name, "created_at": created}), encoding="utf-8")
            os.replace(fresh, path)

    def _make_room(self, folder: Path, size: int) -> None:
        """
        Raises:
            ResourceExhaustedError: `size` bytes more would exceed the account's quota or number.
        """
        used, count, _ = _held(folder)
        if used + size <= self.quota_bytes and count < self.max_count:
            return
        self._clean(folder)
        used, count, stored = _held(folder)
        named = {name.removesuffix(FACTS) for name in _names(folder, FACTS)}
        for name, status in sorted(stored, key=lambda pair: pair[1].st_mtime):
            if used + size <= self.quota_bytes and count < self.max_count:
                return
            digest = name.removesuffix(DATA)
            if digest not in named:
                self._remove(folder, digest)
                used, count = used - status.st_size, count - 1
        if used + size > self.quota_bytes:
            raise self._full(size, used)
        if count >= self.max_count:
            raise _exhausted(
                "ARTIFACT_COUNT",
                f"you have {count:,} artifacts; this server keeps at most {self.max_count:,} for an account "
                "(artifacts.max_count): delete some (client.artifacts.delete)",
            )

    def _count_in(self, size: int) -> None:
        """
        Raises:
            ResourceExhaustedError: all accounts together would have too much.
        """
        if self.total_bytes is None:
            return
        now = time.monotonic()
        if now - self._counted_at >= COUNT_S:
            self._counted_at = now
            parts = [part for folder in _folders(self.root) for part in (folder, folder / UPLOADS)]
            self._total = sum(status.st_size for part in parts for _, status in _files(part, ""))
        if self._total + size > self.total_bytes:
            raise _exhausted(
                "DISK_FULL",
                f"all artifacts on this server take {self._total:,} bytes of the {self.total_bytes:,} that they may "
                "(artifacts.total_bytes); delete some, or ask the operator",
            )
        self._total += size

    def _full(self, size: int, used: int) -> ResourceExhaustedError:
        return _exhausted(
            "ARTIFACT_QUOTA",
            f"{size:,} bytes more than the {used:,} of your artifacts; this server keeps {self.quota_bytes:,} for an "
            "account (artifacts.quota_bytes): delete some (client.artifacts.list, .delete)",
        )

    def _remove(self, folder: Path, digest: str) -> None:
        stem = folder / digest.removeprefix(PREFIX)
        for suffix in (DATA, FACTS):
            Path(f"{stem}{suffix}").unlink(missing_ok=True)

    def _sweep(self) -> None:
        """At times, look at every account for what has expired."""
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        for folder in _folders(self.root):
            with self._locked(folder):
                self._clean(folder)

    def _clean(self, folder: Path) -> None:
        """Remove what has expired, and what crashes left; the folder is locked."""
        now = self._clock()
        for name, status in _files(folder, DATA):
            if status.st_mtime + self.ttl_s <= now or not _is_artifact(folder / name):
                self._remove(folder, name.removesuffix(DATA))
        there = {name.removesuffix(DATA) for name in _names(folder, DATA)}
        for name in _names(folder, FACTS):
            if name.removesuffix(FACTS) not in there:
                (folder / name).unlink(missing_ok=True)
        for name in _names(folder / UPLOADS):
            with contextlib.suppress(OSError), open(folder / UPLOADS / name, "rb") as file:
                if try_lock(file):  # nobody is writing it
                    (folder / UPLOADS / name).unlink(missing_ok=True)
        for name in _names(folder / IN_USE):
            since = name.partition("-")[0]
            if not since.isdecimal() or int(since) + IN_USE_S <= now:
                (folder / IN_USE / name).unlink(missing_ok=True)


def _unlink(link: Path, owner: int) -> None:
    if os.getpid() == owner:  # what a fork inherits is not its own to remove
        link.unlink(missing_ok=True)


def _form(file: Any, size: int) -> ArtifactInfo | None:
    """What an artifact's file says of itself; None where it is not such a file, or not whole."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 0 < length <= _MAX_HEADER_BYTES:
        return None
    try:
        said = json.loads(file.read(length))["value"]
        shape = tuple(said["shape"])
        dtype = check_form(_DTYPES.get(said["dtype"]), shape)
    except (ValueError, KeyError, TypeError, GraphError):
        return None
    info = ArtifactInfo("", dtype, shape, int(said["data_offsets"][1]))
    header = file_header(dtype, shape)
    file.seek(0)
    if file.read(len(header)) != header or size != len(header) + info.nbytes:
        return None
    return info


def _is_artifact(path: Path) -> bool:
    """Whether a file is whole, as far as its length and its first bytes say; one that went meanwhile need not be."""
    try:
        with open(path, "rb") as file:
            return _form(file, os.fstat(file.fileno()).st_size) is not None
    except FileNotFoundError:
        return True


def _digest_of_file(data: bytes | mmap.mmap) -> str:
    state, view = hashlib.sha256(), memoryview(data)
    for offset in range(0, len(view), _WRITE_BYTES):
        state.update(view[offset : offset + _WRITE_BYTES])
    return PREFIX + state.hexdigest()


def _held(folder: Path) -> tuple[int, int, list[tuple[str, os.stat_result]]]:
    """Bytes and number of an account's artifacts, those on their way included; and those that are there."""
    stored, coming = _files(folder, DATA), _files(folder / UPLOADS, "")
    return sum(status.st_size for _, status in (*stored, *coming)), len(stored) + len(coming), stored


def _folders(root: Path) -> list[Path]:
    return [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []


def _names(folder: Path, suffix: str = "") -> list[str]:
    """Names of the files of a folder that end so."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [e.name for e in entries if e.name.endswith(suffix) and e.is_file(follow_symlinks=False)]
    return []


def _files(folder: Path, suffix: str) -> list[tuple[str, os.stat_result]]:
    """The files of a folder that end so; one that goes meanwhile is not among them."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def _exhausted(reason: str, message: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(message, reason=reason)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _raise_full(error)


def _raise_full(error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG):
        raise _exhausted(
            "DISK_FULL", "the server's disk for artifacts is full; delete some, or ask the operator"
        ) from None
    raise error
