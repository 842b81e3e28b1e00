"""The store of artifacts: content-addressed, owner only, bounded, and whole whatever happens in between."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from patchbay.errors import InvalidRequestError, NotFoundError, ResourceExhaustedError
from patchbay.ir.artifacts import ArtifactInfo, KeyedTensor, digest_of
from patchbay.ir.dtypes import bfloat16, float32, int8
from patchbay.ir.graph import TensorData
from patchbay_server.store import artifacts
from patchbay_server.store.artifacts import ArtifactStore, Upload

MIB = 2**20


class Clock:
    """Seconds since 1970 that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., ArtifactStore]:
    def store(**options: Any) -> ArtifactStore:
        return ArtifactStore(tmp_path / "store", **{"quota_bytes": 64 * MIB, "clock": clock, **options})

    return store


@pytest.fixture
def store(make: Callable[..., ArtifactStore]) -> ArtifactStore:
    return make()


def tensor(seed: int = 0, size: int = 1_000) -> TensorData:
    return TensorData(float32, (size,), np.random.default_rng(seed).standard_normal(size).astype(np.float32).tobytes())


def announced(value: TensorData, name: str = "") -> ArtifactInfo:
    return ArtifactInfo(digest_of(value), value.dtype, value.shape, value.nbytes, name)


def begun(store: ArtifactStore, value: TensorData, **options: Any) -> Upload:
    upload = store.begin("ada", announced(value), **options)
    assert isinstance(upload, Upload)
    return upload


def automatic(store: ArtifactStore, value: TensorData) -> None:
    upload = begun(store, value, automatic=True)
    upload.write(value.data)
    upload.finish()


def files(store: ArtifactStore, suffix: str = "") -> list[Path]:
    return [p for p in store.root.rglob(f"*{suffix}") if p.is_file() and p.name != ".lock"]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (600, 700)])
@pytest.mark.parametrize("dtype", [float32, bfloat16, int8])
def test_what_is_put_comes_back(store: ArtifactStore, dtype: Any, shape: tuple[int, ...]) -> None:
    """Every form comes back with its bytes, from memory or from a map of its file."""
    count = int(np.prod(shape))
    value = TensorData(dtype, shape, os.urandom(count * dtype.itemsize))
    info = store.put("ada", value, "mine")
    told, back = store.open("ada", info.digest)
    assert (back.dtype, back.shape, bytes(back.data)) == (dtype, shape, value.data)
    assert (told.name, info.name, info.nbytes, info.created_at) == ("mine", "mine", value.nbytes, 1_800_000_000.0)


def test_the_file_is_safetensors_and_its_digest_is_its_name(store: ArtifactStore) -> None:
    """Other programs read the file, and sha256sum gives the digest."""
    info = store.put("ada", tensor())
    (file,) = files(store, ".safetensors")
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(file)["value"], np.frombuffer(tensor().data, dtype=np.float32)
    )
    assert "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest() == info.digest
    assert file.stem == info.digest.removeprefix("sha256:")


def test_a_digest_stands_for_the_form_too() -> None:
    """The same bytes in another shape or of another type are another tensor."""
    data = bytes(64)
    forms = [(float32, (16,)), (float32, (4, 4)), (int8, (64,)), (bfloat16, (32,))]
    assert len({digest_of(TensorData(dtype, shape, data)) for dtype, shape in forms}) == 4


def test_others_cannot_tell_that_it_is_there(store: ArtifactStore) -> None:
    """For another account every answer is the one about a digest that was never there, to the letter."""
    digest = store.put("ada", tensor()).digest
    never = digest_of(tensor(1))
    for call in (store.open, store.delete):
        said = []
        for wanted in (digest, never):
            with pytest.raises(NotFoundError) as error:
                call("bob", wanted)
            said.append(str(error.value).replace(wanted, "DIGEST"))
        assert said[0] == said[1]
    assert store.stat("bob", [digest]) == []
    assert store.list("bob") == ([], False)
    assert store.stat("ada", [digest, never])[0].digest == digest


@pytest.mark.parametrize("account", ["../../etc", "a/b", "..", "ADA", "x" * 5_000, "\udcff", "nul\0byte", ""])
def test_no_account_leaves_the_folder(store: ArtifactStore, account: str) -> None:
    """Whatever an account is called, its files are in a folder of its own below the root."""
    store.put("ada", tensor())
    store.put(account, tensor())
    folders = [p for p in store.root.iterdir() if p.is_dir()]
    assert len(folders) == 2
    assert all(f.resolve().parent == store.root.resolve() for f in folders)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "x", ""])
def test_a_name_that_is_no_digest_is_not_there(store: ArtifactStore, digest: str) -> None:
    """Nothing but 64 hexadecimal digits ever becomes part of a path."""
    store.put("ada", tensor())
    with pytest.raises(NotFoundError):
        store.open("ada", digest)
    with pytest.raises(NotFoundError):
        store.delete("ada", digest)


def test_what_comes_must_have_the_digest_and_the_length(store: ArtifactStore) -> None:
    """Other bytes, too few and too many are refused, and leave no file."""
    value, other = tensor(0), tensor(1)
    upload = begun(store, value)
    upload.write(other.data)
    with pytest.raises(InvalidRequestError) as wrong:
        upload.finish()
    assert wrong.value.reason == "ARTIFACT_DIGEST_MISMATCH"
    upload = begun(store, value)
    upload.write(value.data[:-4])
    with pytest.raises(InvalidRequestError, match="4 bytes never came"):
        upload.finish()
    upload = begun(store, value)
    with pytest.raises(InvalidRequestError, match="more bytes"):
        upload.write(value.data + b"1234")
    upload.abort()
    assert files(store) == []
    assert store.list("ada") == ([], False)


def test_a_quota_is_checked_before_bytes_come_and_counts_those_on_their_way(
    make: Callable[..., ArtifactStore],
) -> None:
    """Two uploads that together would not fit: the second is refused at its header, and fits once the first is gone."""
    store = make(quota_bytes=3 * MIB)
    first, second = tensor(0, 500_000), tensor(1, 500_000)
    upload = begun(store, first)
    with pytest.raises(ResourceExhaustedError) as error:
        store.begin("ada", announced(second))
    assert error.value.reason == "ARTIFACT_QUOTA"
    theirs = store.begin("bob", announced(second))  # quotas are each account's own
    assert isinstance(theirs, Upload)
    theirs.abort()
    upload.abort()
    begun(store, second).abort()
    with pytest.raises(ResourceExhaustedError):
        store.check_room("ada", 3 * MIB + 1)
    store.check_room("ada", 3 * MIB)


def test_all_accounts_together_have_a_limit_too(make: Callable[..., ArtifactStore]) -> None:
    """A disk that is shared by many accounts is not filled by their quotas' sum."""
    store = make(total_bytes=3 * MIB)
    store.put("ada", tensor(0, 500_000))
    with pytest.raises(ResourceExhaustedError, match="total_bytes"):
        store.put("bob", tensor(1, 500_000))
    with pytest.raises(ResourceExhaustedError, match="total_bytes"):
        make(total_bytes=3 * MIB).put("bob", tensor(1, 500_000))  # another process counts what is there
    store.put("bob", tensor(1, 1_000))


def test_a_gigantic_declaration_takes_nothing(store: ArtifactStore) -> None:
    """A terabyte that is only announced is refused before a file is made."""
    with pytest.raises(ResourceExhaustedError) as error:
        store.begin("ada", ArtifactInfo("sha256:" + "0" * 64, float32, (2**38,), 2**40))
    assert error.value.reason == "ARTIFACT_TOO_LARGE"
    assert files(store) == []


def test_tiny_artifacts_meet_a_limit_on_their_number(make: Callable[..., ArtifactStore]) -> None:
    """A flood of tiny artifacts stops at the limit; deleting one makes room for one."""
    store = make(max_count=40)
    digests = [store.put("ada", TensorData(int8, (), bytes([i]))).digest for i in range(40)]
    with pytest.raises(ResourceExhaustedError) as error:
        store.put("ada", TensorData(int8, (), b"\xff"))
    assert error.value.reason == "ARTIFACT_COUNT"
    store.delete("ada", digests[0])
    store.put("ada", TensorData(int8, (), b"\xff"))


def test_constants_of_graphs_give_way_to_what_was_asked_for(make: Callable[..., ArtifactStore], clock: Clock) -> None:
    """Where room is short, automatic uploads go, the one unused for longest first; named ones stay."""
    store = make(quota_bytes=5 * MIB)
    named = store.put("ada", tensor(0, 250_000), "mine")
    constants = [tensor(i, 250_000) for i in (1, 2, 3)]
    for value in constants:
        clock.now += 1
        automatic(store, value)
    clock.now += 1
    assert store.stat("ada", [digest_of(constants[0])])  # used: now it is the newest
    store.put("ada", tensor(4, 500_000))
    left = {info.digest for info in store.list("ada")[0]}
    assert left == {named.digest, *map(digest_of, (constants[0], constants[2], tensor(4, 500_000)))}


def test_what_is_put_by_name_is_no_longer_automatic(make: Callable[..., ArtifactStore]) -> None:
    """Asking for a constant that a graph had uploaded makes it stay."""
    store = make(quota_bytes=3 * MIB)
    value = tensor(0, 500_000)
    automatic(store, value)
    assert store.put("ada", value, "mine").name == "mine"
    with pytest.raises(ResourceExhaustedError):
        store.put("ada", tensor(1, 500_000))
    assert store.stat("ada", [digest_of(value)])[0].name == "mine"


def test_unused_artifacts_expire_and_use_puts_it_off(make: Callable[..., ArtifactStore], clock: Clock) -> None:
    """What is asked about or opened lives on; the rest is gone after its time, for every call and on disk."""
    store = make(ttl_s=100.0)
    asked, opened, unused = (store.put("ada", tensor(i)).digest for i in range(3))
    clock.now += 60
    assert store.stat("ada", [asked])[0].expires_at == clock.now + 100
    store.open("ada", opened)
    clock.now += 60
    assert [info.digest for info in store.list("ada")[0]] == sorted([asked, opened])
    with pytest.raises(NotFoundError):
        store.open("ada", unused)
    assert store.stat("ada", [unused]) == []
    make(ttl_s=100.0).put("bob", tensor(9))  # another replica that starts to store sweeps everybody's folder
    assert unused.removeprefix("sha256:") not in {p.stem for p in files(store, ".safetensors")}


def test_what_a_graph_uses_does_not_vanish(store: ArtifactStore, clock: Clock) -> None:
    """Deleted and swept while in use, an artifact stays readable; its second link goes with the last reference."""
    value = tensor(0, 500_000)
    digest = store.put("ada", value).digest
    _, used = store.open("ada", digest)
    elements = used.data
    store.delete("ada", digest)
    with pytest.raises(NotFoundError):
        store.open("ada", digest)
    assert bytes(elements) == value.data
    assert len(files(store)) == 1  # the second link
    del used
    assert len(files(store)) == 1
    del elements
    gc.collect()
    assert files(store) == []
    kept = store.put("ada", value).digest
    left_by_a_killed_replica = store.open("ada", kept)[1]
    clock.now += 25 * 3600
    ArtifactStore(store.root, clock=clock).put("bob", tensor(1))
    assert not any("in-use" in str(p) for p in files(store))
    assert bytes(left_by_a_killed_replica.data) == value.data


def test_without_second_links_a_copy_is_used(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems that have none, the tensor is read into memory instead."""
    value = tensor(0, 500_000)
    digest = store.put("ada", value).digest

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    _, used = store.open("ada", digest)
    store.delete("ada", digest)
    assert bytes(used.data) == value.data
    assert files(store) == []


def test_a_full_disk_is_said(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room on the disk is RESOURCE_EXHAUSTED at the header, and in the middle of an upload; nothing is left."""
    usage = shutil.disk_usage(store.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ResourceExhaustedError) as error:
        store.put("ada", tensor())
    assert error.value.reason == "DISK_FULL"
    monkeypatch.undo()
    upload = begun(store, tensor())

    class Full:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "full")

        def close(self) -> None:
            file.close()

    file, upload._file = upload._file, Full()  # type: ignore[assignment]
    with pytest.raises(ResourceExhaustedError):
        upload.write(tensor().data)
    upload.abort()
    assert files(store) == []


def test_a_crash_in_the_middle_leaves_no_half_file_and_gives_its_room_back(
    make: Callable[..., ArtifactStore], tmp_path: Path
) -> None:
    """A process killed while it uploads leaves nothing under a name, and the next upload reclaims its room."""
    script = """
import os, sys, signal
from patchbay.ir.artifacts import ArtifactInfo, digest_of
from patchbay.ir.dtypes import float32
from patchbay.ir.graph import TensorData
from patchbay_server.store.artifacts import ArtifactStore
value = TensorData(float32, (500_000,), bytes(2_000_000))
store = ArtifactStore(sys.argv[1], quota_bytes=3 * 2**20)
upload = store.begin("ada", ArtifactInfo(digest_of(value), float32, (500_000,), 2_000_000))
upload.write(value.data[:1_000_000])
os.kill(os.getpid(), signal.SIGKILL)
"""
    store = make(quota_bytes=3 * MIB)
    killed = subprocess.run([sys.executable, "-c", script, str(store.root)], check=False, timeout=120)
    assert killed.returncode == -9
    assert len(files(store)) == 1
    assert files(store, ".safetensors") == []
    assert store.put("ada", tensor(0, 500_000)).nbytes == 2_000_000
    assert len(files(store)) == 2  # the tensor and what it is called


def test_many_at_once_put_the_same(make: Callable[..., ArtifactStore]) -> None:
    """Replicas that store one tensor at the same time leave one file, whole, and nothing else."""
    value, results, problems = tensor(0, 300_000), [], []

    def put() -> None:
        try:
            results.append(make().put("ada", value, "same").digest)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=put) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert set(results) == {digest_of(value)}
    store = make()
    assert len(files(store, ".safetensors")) == 1
    assert len(files(store)) == 2
    assert bytes(store.open("ada", results[0])[1].data) == value.data


def test_lists_are_paged(store: ArtifactStore) -> None:
    """Pages follow one another in the order of digests, whatever comes and goes meanwhile."""
    digests = sorted(store.put("ada", TensorData(int8, (), bytes([i]))).digest for i in range(7))
    first, more = store.list("ada", limit=3)
    assert [info.digest for info in first] == digests[:3]
    assert more
    store.delete("ada", digests[2])
    second, more = store.list("ada", after=digests[2], limit=10)
    assert [info.digest for info in second] == digests[3:]
    assert not more


@pytest.mark.parametrize("harm", ["truncated", "header", "empty", "other"])
def test_a_file_that_is_not_whole_is_not_there(store: ArtifactStore, harm: str) -> None:
    """A file that something else cut short or wrote is passed over, and can be put again."""
    value = tensor(0, 400_000)
    digest = store.put("ada", value).digest
    (file,) = files(store, ".safetensors")
    data = file.read_bytes()
    changed = {"truncated": data[:-1], "header": data[:4] + b"\xff" * 8 + data[12:], "empty": b"", "other": b"x" * 99}
    file.write_bytes(changed[harm])
    with pytest.raises(NotFoundError):
        store.open("ada", digest)
    assert store.list("ada") == ([], False)
    store.put("ada", value)
    assert bytes(store.open("ada", digest)[1].data) == value.data


@pytest.mark.parametrize("size", [1_000, 400_000], ids=["read", "mapped"])
def test_elements_that_changed_on_the_disk_are_nobodys_values(make: Callable[..., ArtifactStore], size: int) -> None:
    """A process that did not write a file finds out that its elements are others: then it is not there."""
    value = tensor(0, size)
    writer, reader = make(), make()
    digest = writer.put("ada", value).digest
    (file,) = files(writer, ".safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(NotFoundError):
        reader.open("ada", digest)
    assert reader.list("ada") == ([], False)
    reader.put("ada", value)
    for each in (reader, make()):
        assert bytes(each.open("ada", digest)[1].data) == value.data


def test_a_file_is_worked_through_once(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Who wrote a file, or has used it, does not work out its digest again."""
    digest, reader = store.put("ada", tensor()).digest, make()
    asked = []
    monkeypatch.setattr(artifacts, "_digest_of_file", lambda data: asked.append(len(data)) or digest)
    for each in (store, store, reader, reader, reader):
        each.open("ada", digest)
    assert len(asked) == 1


def test_files_that_are_not_whole_make_room(make: Callable[..., ArtifactStore]) -> None:
    """What nobody can list, use or delete does not fill an account's quota for ever."""
    store = make(quota_bytes=10_000)
    store.put("ada", tensor(0, 2_000))
    (file,) = files(store, ".safetensors")
    file.write_bytes(b"x" * 8_000)
    store.put("ada", tensor(1, 2_000))
    (left,) = files(store, ".safetensors")
    assert left != file


def test_only_the_service_can_read_the_folder(store: ArtifactStore) -> None:
    """Other users of the machine see nothing of an account's folder."""
    store.put("ada", tensor())
    (folder,) = [p for p in store.root.iterdir() if p.is_dir()]
    assert folder.stat().st_mode & 0o077 == 0


def test_tensors_with_a_key_are_compared_by_it() -> None:
    """The planner tells mapped tensors apart without reading them."""
    a = KeyedTensor(float32, (1,), b"abcd", "x")
    assert a == KeyedTensor(float32, (1,), b"efgh", "x")
    assert a != KeyedTensor(float32, (1,), b"abcd", "y")
    assert hash(a) == hash(KeyedTensor(float32, (1,), b"efgh", "x"))
    assert a != TensorData(float32, (1,), b"abcd")
