"""The registry: one process a name, and nothing left of those that died."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetrarch.errors import ConfigError, HostError
from tetrarch.registry import Claim, find, machines
from tetrarch.registry.place import registry_directory

#: Claims a name, says so, and stays until its input ends.
HOLD = """
import sys
from tetrarch.registry import Claim
try:
    claim = Claim(sys.argv[1])
except Exception as error:
    print(error, flush=True)
    sys.exit(1)
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Paths of sockets fit there, as in a user's.
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        yield Path(place) / "tetrarch"


def hold(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    with hold("web") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_name_is_taken_until_it_is_given_back(registry: Path) -> None:
    with Claim("web") as claim:
        assert [about.name for about in machines()] == ["web"]
        assert find("web").pid == os.getpid()
        with pytest.raises(HostError, match=rf"web runs already \(process {os.getpid()}\)"):
            Claim("web")
        with Claim("db"):
            assert [about.name for about in machines()] == ["db", "web"]
        assert claim.directory.is_dir()
    assert machines() == []
    assert list((registry / "machines").iterdir()) == []


def test_what_clears_old_files_passes_over_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its sockets lie elsewhere: the path here is too long for them.
    place = tmp_path / ("x" * 100)
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    with Claim("web") as claim:
        folders = [claim.directory, claim.socket("control").parent]
        for folder in folders:
            descriptor = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):  # as systemd-tmpfiles asks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(descriptor)
        assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("name", ["lock", "machine.json"])
def test_fifo_in_an_entry_is_not_waited_for(registry: Path, name: str) -> None:
    entry = registry_directory() / "machines" / "web"
    entry.mkdir(parents=True)
    os.mkfifo(entry / name)
    assert machines() == []
    with Claim("web"):
        assert find("web").pid == os.getpid()


def test_death_gives_the_name_back(holder: subprocess.Popen[str], registry: Path) -> None:
    assert find("web").pid == holder.pid
    holder.kill()
    holder.wait()
    assert (registry / "machines" / "web" / "machine.json").exists()
    assert machines() == []
    assert list((registry / "machines").iterdir()) == []


def test_what_a_dead_process_left_is_no_name_in_use(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with Claim("web"):
        assert find("web").pid == os.getpid()


def test_stopped_process_still_lives(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    try:
        assert [about.pid for about in machines()] == [holder.pid]
        with pytest.raises(HostError, match="runs already"):
            Claim("web")
    finally:
        holder.send_signal(signal.SIGCONT)


def test_child_of_the_process_does_not_keep_the_name() -> None:
    with Claim("web"), subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert find("web").pid == os.getpid()
    assert child.returncode == 0
    assert machines() == []


def test_of_several_that_start_at_once_one_has_the_name() -> None:
    processes = [hold("web") for _ in range(4)]
    said = []
    for process in processes:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    assert said.count("claimed\n") == 1
    assert sum("a machine named web runs already" in line for line in said) == 3
    for process in processes:
        process.communicate()
    assert machines() == []


@pytest.mark.parametrize("cut", ["machine.json", "lock"])
def test_half_made_entry_is_removed(registry: Path, cut: str) -> None:
    # As a process leaves it that is killed while it claims a name.
    entry = registry / "machines" / "web"
    entry.mkdir(parents=True)
    registry.chmod(0o700)
    if cut == "machine.json":
        (entry / "lock").touch()
        (entry / "machine.json.new").write_text("{")
    assert machines() == []
    assert not entry.exists()


def test_sockets_elsewhere_go_with_what_is_left(
    holder: subprocess.Popen[str], registry: Path
) -> None:
    dead, alive, file = registry / "dead", registry / "alive", registry / "file"
    file.touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(alive))
        listener.listen()
        entry = registry / "machines" / "web" / "machine.json"
        paths = ", ".join(f'"{path}"' for path in (dead, alive, file))
        entry.write_text(f'{{"name": "web", "pid": {holder.pid}, "sockets": [{paths}]}}')
        holder.kill()
        holder.wait()
        assert machines() == []
        assert [dead.exists(), alive.exists(), file.exists()] == [False, True, True]


def test_sockets_lie_where_their_paths_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with Claim("n" * 64) as claim, socket.socket(socket.AF_UNIX) as listener:
        path = claim.socket("console")
        listener.bind(str(path))
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.parent.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../web", "a/b", "-x", "a\n", "a\0b", "n" * 65])
def test_odd_names_are_refused(name: str) -> None:
    for look in (Claim, find):
        with pytest.raises(ConfigError, match="no name of a machine; use up to 64"):
            look(name)


def test_name_that_nobody_has_is_told_with_the_nearest() -> None:
    with pytest.raises(HostError, match=r"no machine named wbe runs; tetrarch ps"):
        find("wbe")
    with Claim("web"), pytest.raises(HostError, match="did you mean web"):
        find("wbe")


def test_directory_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "tetrarch").mkdir(mode=0o777)
    (tmp_path / "tetrarch").chmod(0o777)
    with pytest.raises(HostError, match="not a directory of yours alone"):
        registry_directory()
    (tmp_path / "tetrarch").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tetrarch").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="not a directory of yours alone"):
        registry_directory()


def test_entry_of_a_newer_version_is_read(registry: Path) -> None:
    with Claim("web") as claim:
        path = claim.directory / "machine.json"
        path.write_text(path.read_text().replace("{", '{"colour": "blue",', 1))
        assert find("web").pid == os.getpid()
