"""Disks that are put into a Linux guest in the background, and taken out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from tests.remote.conftest import tetrarch_cli

from tetrarch.control import ControlError
from tetrarch.errors import ConfigError
from tetrarch.remote import RemoteMachine


@pytest.fixture
def image(images_allowed: Path) -> Path:
    path = Path(tempfile.mkdtemp(dir=images_allowed)) / "disk.raw"
    path.write_bytes(b"on the disk".ljust(1 << 20, b"\0"))
    return path


def in_guest(guest: RemoteMachine, script: str) -> bytes:
    return guest.exec(["sh", "-c", script]).stdout


@pytest.mark.parametrize(("bus", "device"), [("virtio", "vda"), ("nvme", "nvme0n1")])
def test_disk_comes_and_goes(guest: RemoteMachine, image: Path, bus: str, device: str) -> None:
    in_guest(guest, "true")  # it has booted, and looked for devices
    done = tetrarch_cli("attach-disk", "--device", "data", "web", f"{image},bus={bus}")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"data\n", b"")
    wait = f"n=0; until [ -b /dev/{device} ] || [ $((n += 1)) = 600 ]; do sleep 0.05; done"
    assert in_guest(guest, f"{wait}; head -c 11 /dev/{device}") == b"on the disk"
    in_guest(guest, f"printf written | dd of=/dev/{device} conv=notrunc,fsync")
    done = tetrarch_cli("detach", "web", "data")
    assert (done.returncode, done.stderr) == (0, b"")
    assert in_guest(guest, f"[ -b /dev/{device} ] || echo gone") == b"gone\n"
    assert image.read_bytes()[:11] == b"writtendisk"
    # Nobody has the image any more.
    assert tetrarch_cli("disk", "resize", image, "2M").returncode == 0


def test_disk_that_cannot_come_later(guest: RemoteMachine, image: Path, tmp_path: Path) -> None:
    for option in ("bus=ahci", "iops=5", "werror=stop"):
        with pytest.raises(ConfigError):
            guest.attach_disk(f"{image},{option}")
    assert tetrarch_cli("attach-disk", "web", tmp_path / "none").returncode == 1
    with pytest.raises(ControlError):
        guest.detach("nothing")
    name = guest.attach_disk(image)
    with pytest.raises(ControlError):
        guest.attach_disk(image, name=name)
    guest.detach(name)


def test_image_that_the_machine_may_not_open(guest: RemoteMachine, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    done = tetrarch_cli("attach-disk", "web", path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"--allow" in done.stderr
