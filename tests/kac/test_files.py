"""Writes are atomic, and only the temporary files of dead writers are removed."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest

from kac.util import files, probes
from kac.util.errors import DistillKacError


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / os.fsdecode(b"cat\xff")).mkdir()
    with pytest.raises(DistillKacError, match="not UTF-8"):
        list(files.walk(str(tmp_path)))


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> str:
    """A local folder, or a folder on a filesystem that is not local, like an object store."""
    if request.param == "local":
        yield str(tmp_path / "folder")
    else:
        path = f"memory://{uuid.uuid4().hex}"
        yield path
        files.remove_tree(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing and reading


def test_read_bytes_returns_what_was_written(folder):
    path = files.join(folder, "deep/er/file.bin")
    assert not files.exists(path)
    assert files.write_bytes(path, b"one\x00\xff")
    assert files.exists(path)
    assert files.read_bytes(path) == b"one\x00\xff"
    assert files.write_bytes(path, b"")
    assert files.read_bytes(path) == b""


def test_a_missing_file_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(folder, "none"))


def test_if_absent_keeps_an_existing_file(folder):
    path = files.join(folder, "file")
    assert files.write_bytes(path, b"first", if_absent=True)
    assert not files.write_bytes(path, b"second", if_absent=True)
    assert files.read_bytes(path) == b"first"
    assert files.write_bytes(path, b"third")
    assert files.read_bytes(path) == b"third"


def test_if_absent_keeps_a_file_that_appears_during_the_write(monkeypatch):
    """Without hard links, a check before the write is not enough, because the other file can appear after it."""
    path = f"memory://{uuid.uuid4().hex}/file"
    filesystem, checks = type(files.locate(path).fs), []
    exists = filesystem.exists

    def check(self, name, **options):
        checks.append(name)
        if len(checks) > 1:
            return exists(self, name, **options)
        files.write_bytes(path, b"the other's")
        return False

    monkeypatch.setattr(filesystem, "exists", check)
    assert not files.write_bytes(path, b"late", if_absent=True)
    assert checks
    assert files.read_bytes(path) == b"the other's"
    files.remove_tree(path)


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_conditional_write_is_an_error_unless_the_file_exists(monkeypatch, there):
    """Object stores report a lost race by various errors. Only the file's existence shows that the race was lost."""
    path = f"memory://{uuid.uuid4().hex}/file"
    filesystem = type(files.locate(path).fs)
    write = filesystem.pipe_file

    def fails(self, name, data, **_):
        if there:
            write(self, name, b"the other's")
        raise OSError("409 ConditionalRequestConflict")

    monkeypatch.setattr(filesystem, "pipe_file", fails)
    if there:
        assert not files.write_bytes(path, b"late", if_absent=True)
        assert files.read_bytes(path) == b"the other's"
    with pytest.raises(OSError, match="409"):
        files.write_bytes(path, b"late", if_absent=False)
    if not there:
        with pytest.raises(OSError, match="409"):
            files.write_bytes(path, b"late", if_absent=True)
    files.remove_tree(path)


def test_writes_leave_only_the_file(tmp_path):
    files.write_bytes(str(tmp_path / "file"), b"first")
    files.write_bytes(str(tmp_path / "file"), b"second", if_absent=True)
    files.write_bytes(str(tmp_path / "file"), b"third")
    assert names(tmp_path) == ["file"]


def test_remove_tree(folder):
    files.write_bytes(files.join(folder, "folder/a"), b"")
    files.write_bytes(files.join(folder, "folder/b/c"), b"")
    files.write_bytes(files.join(folder, "folder-2"), b"")
    files.remove_tree(files.join(folder, "folder"))
    assert not files.exists(files.join(folder, "folder"))
    assert files.exists(files.join(folder, "folder-2"))
    files.remove_tree(files.join(folder, "folder"))  # nothing to remove


def test_list_sizes_includes_all_files_below_the_folder(folder):
    for name, data in {"a": b"1", "folder/b/c": b"123", ".hidden": b""}.items():
        files.write_bytes(files.join(files.join(folder, "here"), name), data)
    files.write_bytes(files.join(folder, "here-2"), b"")
    assert list(files.list_sizes(files.join(folder, "here")).items()) == [(".hidden", 0), ("a", 1), ("folder/b/c", 3)]
    assert files.list_sizes(files.join(folder, "nothing")) == {}


# Atomic writes


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_bytes(str(path), b"old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(str(path), b"new")
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("if_absent", [False, True])
def test_the_data_are_synced_before_the_file_gets_its_name(tmp_path, monkeypatch, if_absent):
    """Otherwise a power cut could leave an empty file."""
    events, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "link")}

    def recording(name):
        def call(*args):
            synced = os.fstat(args[0]).st_size if name == "fsync" else None
            events.append((name, synced))
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, recording(name))
    files.write_bytes(str(tmp_path / "file"), b"12345", if_absent)
    assert events == [("fsync", 5), ("link" if if_absent else "replace", None)]


def run(code: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *args], stdout=subprocess.PIPE)


def test_a_killed_writer_publishes_nothing_and_its_temporary_file_is_removed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    writer = run(
        """
        import os, sys, time
        from kac.util import files

        def stuck(_):
            print("syncing", flush=True)
            time.sleep(600)

        os.fsync = stuck
        files.write_bytes(sys.argv[1], b"new")
        """,
        str(path),
    )
    try:
        assert writer.stdout.readline() == b"syncing\n"
        assert path.read_bytes() == b"old"
        assert len(names(tmp_path)) == 2
        assert files.remove_orphans(str(tmp_path)) == 0  # the file's writer is still alive
        assert len(names(tmp_path)) == 2
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert len(names(tmp_path)) == 2
    assert files.remove_orphans(str(tmp_path)) == 1
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_exactly_one_of_many_conditional_writers_succeeds(tmp_path):
    path, won = str(tmp_path / "file"), []
    barrier = threading.Barrier(8)

    def write(k: int) -> None:
        barrier.wait()
        if files.write_bytes(path, bytes([k]) * 1000, if_absent=True):
            won.append(k)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert files.read_bytes(path) == bytes(won) * 1000
    assert names(tmp_path) == ["file"]


def test_readers_always_see_a_complete_version(tmp_path):
    path, versions, seen = str(tmp_path / "file"), [bytes([k]) * 200_000 for k in range(2)], set()
    files.write_bytes(path, versions[0])
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(files.read_bytes(path))

    reader = threading.Thread(target=read)
    reader.start()
    for k in range(40):
        files.write_bytes(path, versions[k % 2])
    done.set()
    reader.join()
    assert seen <= set(versions)


@pytest.mark.parametrize("there", [False, True])
def test_if_absent_works_without_hard_links(tmp_path, monkeypatch, there):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"first")

    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert files.write_bytes(str(path), b"second", if_absent=True) is not there
    assert path.read_bytes() == (b"first" if there else b"second")
    assert names(tmp_path) == ["file"]


# Temporary names and orphans


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def temporary(folder: Path, pid: int | None = None, host: str | None = None, age_seconds: float = 0) -> Path:
    """Create the unfinished file of another writer."""
    name = files.temporary_name(str(folder / "shard-000042.parquet"))
    name = name.replace(f".{os.getpid()}.", f".{os.getpid() if pid is None else pid}.")
    name = name.replace(f".{socket.gethostname()}.", f".{host or socket.gethostname()}.")
    path = Path(name)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_temporary_names_are_hidden_next_to_the_file_and_unique(tmp_path):
    unique = {files.temporary_name(str(tmp_path / "shard-000042.parquet")) for _ in range(100)}
    assert len(unique) == 100
    for name in unique:
        assert Path(name).parent == tmp_path
        assert Path(name).name.startswith(".shard-000042.parquet.")
        assert files.is_temporary(Path(name).name)


@pytest.mark.parametrize("name", ["shard-000042.parquet", "manifest.json", ".hidden", "draft.tmp", "tmp", "a.tmp.b"])
def test_other_names_are_not_temporary(name):
    assert not files.is_temporary(name)


def test_only_files_of_dead_writers_are_removed(tmp_path):
    (tmp_path / "shard-000001.parquet").write_bytes(b"whole")
    (tmp_path / "folder").mkdir()
    dead, mine = temporary(tmp_path, dead_pid()), temporary(tmp_path)
    old_but_alive = temporary(tmp_path, age_seconds=10 * files.STALE_SECONDS)
    assert files.remove_orphans(str(tmp_path)) == 1
    assert not dead.exists()
    assert all(path.exists() for path in (mine, old_but_alive))
    assert (tmp_path / "shard-000001.parquet").read_bytes() == b"whole"
    assert files.remove_orphans(str(tmp_path)) == 0


def test_two_processes_can_clean_up_at_the_same_time(tmp_path, monkeypatch):
    dead, unlink = temporary(tmp_path, dead_pid()), os.unlink

    def second(path, **_):
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", second)
    assert files.remove_orphans(str(tmp_path)) == 0
    assert not dead.exists()


def test_a_process_of_another_user_is_alive(tmp_path, monkeypatch):
    theirs = temporary(tmp_path, dead_pid())

    def not_ours(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    assert files.remove_orphans(str(tmp_path)) == 0
    assert theirs.exists()


def test_files_from_other_hosts_are_orphans_when_they_are_old(tmp_path):
    """A process id from another host says nothing about this host."""
    young = temporary(tmp_path, dead_pid(), host="elsewhere", age_seconds=files.STALE_SECONDS / 2)
    old = temporary(tmp_path, os.getpid(), host="elsewhere", age_seconds=files.STALE_SECONDS * 2)
    assert files.remove_orphans(str(tmp_path)) == 1
    assert young.exists()
    assert not old.exists()


@pytest.mark.parametrize("name", [".draft.tmp", ".probe-0123.tmp", ".a.b.tmp", ".notes.2024.01.tmp"])
def test_other_hidden_files_are_kept(tmp_path, name):
    (tmp_path / name).write_bytes(b"a user's")
    dead = temporary(tmp_path, dead_pid())
    assert files.remove_orphans(str(tmp_path)) == 1
    assert not dead.exists()
    assert (tmp_path / name).exists()


def test_a_missing_folder_has_no_orphans(folder):
    assert files.remove_orphans(files.join(folder, "none")) == 0


# Paths


def test_check_writable_leaves_nothing_behind(folder):
    files.write_bytes(files.join(folder, "file"), b"")
    probes.check_writable(folder)
    location = files.locate(folder)
    assert [Path(name).name for name in location.fs.ls(location.path, detail=False)] == ["file"]


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    folder = str(tmp_path / "file" / "store")
    with pytest.raises(DistillKacError, match="is a file") as error:
        probes.check_writable(folder)
    assert str(error.value).startswith(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("use", [files.exists, files.read_bytes, probes.check_writable, files.remove_orphans])
def test_an_unknown_scheme_is_refused(use):
    with pytest.raises(DistillKacError, match=r"^nosuchscheme://bucket/key: "):
        use("nosuchscheme://bucket/key")


@pytest.mark.parametrize("path", ["s3://", "s3:///store"])
def test_s3_without_a_bucket_is_refused(path):
    with pytest.raises(DistillKacError, match=f"^{path}: .*bucket"):
        files.locate(path)


def test_join_and_locate_accept_a_slash_at_the_end(tmp_path):
    assert files.join("s3://bucket/store/", "manifest.json") == "s3://bucket/store/manifest.json"
    assert files.join("store", "a/b") == "store/a/b"
    assert files.locate(f"{tmp_path}/").path == str(tmp_path)
    assert (files.locate(f"{tmp_path}/") / "a").path == f"{tmp_path}/a"
    assert files.locate("store").path == str(Path.cwd() / "store")
