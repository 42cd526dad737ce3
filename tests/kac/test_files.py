"""Files are published whole or not at all, what dead writers leave is removed, and nothing else is."""

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


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path) -> str:
    """A local folder, and a filesystem that is not local (as object stores are)."""
    if request.param == "local":
        yield str(tmp_path / "place")
    else:
        path = f"memory://{uuid.uuid4().hex}"
        yield path
        files.remove_tree(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing and reading


def test_what_is_written_is_read(place):
    path = files.join(place, "deep/er/file.bin")
    assert not files.exists(path)
    assert files.write_bytes(path, b"one\x00\xff")
    assert files.exists(path)
    assert files.read_bytes(path) == b"one\x00\xff"
    assert files.write_bytes(path, b"")
    assert files.read_bytes(path) == b""


def test_reading_what_is_not_there(place):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(place, "none"))


def test_if_absent_leaves_what_is_there(place):
    path = files.join(place, "file")
    assert files.write_bytes(path, b"first", if_absent=True)
    assert not files.write_bytes(path, b"second", if_absent=True)
    assert files.read_bytes(path) == b"first"
    assert files.write_bytes(path, b"third")
    assert files.read_bytes(path) == b"third"


def test_if_absent_holds_when_another_writer_comes_between(monkeypatch):
    """Where there are no hard links, looking first is not enough: the other file may appear after the look."""
    path = f"memory://{uuid.uuid4().hex}/file"
    filesystem, looks = type(files.locate(path).fs), []
    exists = filesystem.exists

    def look(self, name, **options):
        looks.append(name)
        if len(looks) > 1:
            return exists(self, name, **options)
        files.write_bytes(path, b"the other's")
        return False

    monkeypatch.setattr(filesystem, "exists", look)
    assert not files.write_bytes(path, b"late", if_absent=True)
    assert looks
    assert files.read_bytes(path) == b"the other's"
    files.remove_tree(path)


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_conditional_write_lost_a_race_only_if_the_file_is_there(monkeypatch, there):
    """Object stores word a lost race in many ways: what tells it from a failure is the file."""
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


def test_nothing_but_the_file_is_left_behind(tmp_path):
    files.write_bytes(str(tmp_path / "file"), b"first")
    files.write_bytes(str(tmp_path / "file"), b"second", if_absent=True)
    files.write_bytes(str(tmp_path / "file"), b"third")
    assert names(tmp_path) == ["file"]


def test_remove_tree(place):
    files.write_bytes(files.join(place, "folder/a"), b"")
    files.write_bytes(files.join(place, "folder/b/c"), b"")
    files.write_bytes(files.join(place, "folder-2"), b"")
    files.remove_tree(files.join(place, "folder"))
    assert not files.exists(files.join(place, "folder"))
    assert files.exists(files.join(place, "folder-2"))
    files.remove_tree(files.join(place, "folder"))  # nothing there: nothing to do


def test_sizes_are_those_of_all_files_below_the_folder(place):
    for name, data in {"a": b"1", "folder/b/c": b"123", ".hidden": b""}.items():
        files.write_bytes(files.join(files.join(place, "here"), name), data)
    files.write_bytes(files.join(place, "here-2"), b"")
    assert list(files.list_sizes(files.join(place, "here")).items()) == [(".hidden", 0), ("a", 1), ("folder/b/c", 3)]
    assert files.list_sizes(files.join(place, "nothing")) == {}


# Whole or not at all


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
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
def test_the_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch, if_absent):
    """A name that is there before its bytes would be an empty file after a power cut."""
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


def test_a_writer_killed_in_the_middle_publishes_nothing_and_is_cleaned_up_after(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    writer = run(
        """
        import os, sys, time
        from kac import files

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
        assert files.remove_orphans(str(tmp_path)) == 0  # its writer lives
        assert len(names(tmp_path)) == 2
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert len(names(tmp_path)) == 2
    assert files.remove_orphans(str(tmp_path)) == 1
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_of_many_writers_one_is_first(tmp_path):
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


def test_readers_see_one_whole_version_or_the_other(tmp_path):
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
def test_if_absent_holds_without_hard_links(tmp_path, monkeypatch, there):
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
    """What another writer's unfinished file looks like."""
    name = files.temporary_name(str(folder / "shard-000042.parquet"))
    name = name.replace(f".{os.getpid()}.", f".{os.getpid() if pid is None else pid}.")
    name = name.replace(f".{socket.gethostname()}.", f".{host or socket.gethostname()}.")
    path = Path(name)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_temporary_names_are_hidden_beside_the_file_and_never_the_same(tmp_path):
    made = {files.temporary_name(str(tmp_path / "shard-000042.parquet")) for _ in range(100)}
    assert len(made) == 100
    for name in made:
        assert Path(name).parent == tmp_path
        assert Path(name).name.startswith(".shard-000042.parquet.")
        assert files.is_temporary(Path(name).name)


@pytest.mark.parametrize("name", ["shard-000042.parquet", "manifest.json", ".hidden", "draft.tmp", "tmp", "a.tmp.b"])
def test_other_names_are_not_temporary(name):
    assert not files.is_temporary(name)


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "shard-000001.parquet").write_bytes(b"whole")
    (tmp_path / "folder").mkdir()
    dead, mine = temporary(tmp_path, dead_pid()), temporary(tmp_path)
    old_but_alive = temporary(tmp_path, age_seconds=10 * files.STALE_SECONDS)
    assert files.remove_orphans(str(tmp_path)) == 1
    assert not dead.exists()
    assert all(path.exists() for path in (mine, old_but_alive))
    assert (tmp_path / "shard-000001.parquet").read_bytes() == b"whole"
    assert files.remove_orphans(str(tmp_path)) == 0


def test_two_may_clean_up_at_once(tmp_path, monkeypatch):
    dead, unlink = temporary(tmp_path, dead_pid()), os.unlink

    def second(path, **_):
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", second)
    assert files.remove_orphans(str(tmp_path)) == 0
    assert not dead.exists()


def test_a_writer_of_another_user_is_alive(tmp_path, monkeypatch):
    theirs = temporary(tmp_path, dead_pid())

    def not_ours(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    assert files.remove_orphans(str(tmp_path)) == 0
    assert theirs.exists()


def test_files_of_other_hosts_are_orphans_when_they_are_old(tmp_path):
    """Nobody here can say whether a process of another machine lives: its number means nothing."""
    young = temporary(tmp_path, dead_pid(), host="elsewhere", age_seconds=files.STALE_SECONDS / 2)
    old = temporary(tmp_path, os.getpid(), host="elsewhere", age_seconds=files.STALE_SECONDS * 2)
    assert files.remove_orphans(str(tmp_path)) == 1
    assert young.exists()
    assert not old.exists()


@pytest.mark.parametrize("name", [".draft.tmp", ".probe-0123.tmp", ".a.b.tmp", ".notes.2024.01.tmp"])
def test_hidden_files_with_other_names_are_no_obstacle(tmp_path, name):
    (tmp_path / name).write_bytes(b"somebody's")
    dead = temporary(tmp_path, dead_pid())
    assert files.remove_orphans(str(tmp_path)) == 1
    assert not dead.exists()
    assert (tmp_path / name).exists()


def test_no_folder_has_no_orphans(place):
    assert files.remove_orphans(files.join(place, "none")) == 0


# Places


def test_a_place_that_can_be_written_to_is_left_as_it_was(place):
    files.write_bytes(files.join(place, "file"), b"")
    probes.check_writable(place)
    location = files.locate(place)
    assert [Path(name).name for name in location.fs.ls(location.path, detail=False)] == ["file"]


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    place = str(tmp_path / "file" / "store")
    with pytest.raises(DistillKacError, match="expected a place that can be written to") as error:
        probes.check_writable(place)
    assert str(error.value).startswith(f"{place}: ")
    assert "a file where a folder must be" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("use", [files.exists, files.read_bytes, probes.check_writable, files.remove_orphans])
def test_an_unknown_scheme_is_refused(use):
    with pytest.raises(DistillKacError, match="nosuchscheme://bucket/key: expected a "):
        use("nosuchscheme://bucket/key")


@pytest.mark.parametrize("path", ["s3://", "s3:///store"])
def test_s3_without_a_bucket_is_refused(path):
    with pytest.raises(DistillKacError, match=f"^{path}: expected s3://BUCKET/PREFIX, found no bucket$"):
        files.locate(path)


def test_join_and_locate_take_a_trailing_slash(tmp_path):
    assert files.join("s3://bucket/store/", "manifest.json") == "s3://bucket/store/manifest.json"
    assert files.join("store", "a/b") == "store/a/b"
    assert files.locate(f"{tmp_path}/").path == str(tmp_path)
    assert (files.locate(f"{tmp_path}/") / "a").path == f"{tmp_path}/a"
    assert files.locate("store").path == str(Path.cwd() / "store")
