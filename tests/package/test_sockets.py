"""Sockets of our own have room in their directory."""

import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tetrarch.sockets import SocketDirectory


@pytest.mark.parametrize("length", [8, 60, 150])
def test_socket_fits_whatever_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    place = tmp_path / ("x" * length)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with SocketDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/a-name-of-ours")
        assert directory.stat().st_mode & 0o77 == 0
    assert not directory.exists()


_HOLDS_ONE = """
import socket, sys, tempfile
from tetrarch.sockets import SocketDirectory
tempfile.tempdir = sys.argv[1]
with SocketDirectory() as directory:
    socket.socket(socket.AF_UNIX).bind(f"{directory}/vsock")
    print(directory, flush=True)
    sys.stdin.read()
"""


def holder(place: Path) -> subprocess.Popen[str]:
    """A process that has a directory until its input ends, and says which."""
    words = [sys.executable, "-c", _HOLDS_ONE, str(place)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def directory_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_directory_of_a_process_that_was_killed_goes_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # pytest's own can be too long for a socket in it.
    tmp_path = Path(tempfile.mkdtemp(dir="/tmp"))
    request.addfinalizer(lambda: shutil.rmtree(tmp_path, ignore_errors=True))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    somebodys = tmp_path / "tetrarch-somebodys"
    somebodys.mkdir()
    with holder(tmp_path) as killed, holder(tmp_path) as living:
        its, others = directory_of(killed), directory_of(living)
        killed.kill()
        killed.wait()
        assert (its / "vsock").is_socket()
        with SocketDirectory() as own:
            assert sorted(tmp_path.iterdir()) == sorted([own, others, somebodys])
            assert (others / "vsock").is_socket()
        living.communicate()
    assert list(tmp_path.iterdir()) == [somebodys]
