"""Sockets of our own have room in their directory."""

import socket
import tempfile
from pathlib import Path

import pytest

from tetrarch.sockets import socket_directory


@pytest.mark.parametrize("length", [8, 60, 150])
def test_socket_fits_whatever_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    place = tmp_path / ("x" * length)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with socket_directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/a-name-of-ours")
        assert Path(directory).stat().st_mode & 0o77 == 0
    assert not Path(directory).exists()
