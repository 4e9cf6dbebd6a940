"""Disks that are put into a Linux guest in the background, and taken out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.nodes import can_be_opened
from tests.remote.conftest import tetrarch_cli

from tetrarch.control import ControlError
from tetrarch.errors import ConfigError
from tetrarch.remote import RemoteMachine


@pytest.fixture
def image(images_allowed: Path) -> Path:
    path = Path(tempfile.mkdtemp(dir=images_allowed)) / "disk.raw"
    path.write_bytes(b"on the disk".ljust(1 << 20, b"\0"))
    return path


@pytest.fixture(autouse=True)
def no_disk_is_left(guest: RemoteMachine) -> Iterator[None]:
    """Also by a test that has failed: the guest is everybody's."""
    yield
    for block in guest.execute("query-block"):
        guest.detach(Path(block["qdev"]).name)


def in_guest(guest: RemoteMachine, script: str) -> bytes:
    return guest.exec(["sh", "-c", script]).stdout


@pytest.mark.parametrize(
    ("bus", "device"), [("virtio", "vda"), ("nvme", "nvme0n1"), ("pvscsi", "sda")]
)
def test_disk_comes_and_goes(guest: RemoteMachine, image: Path, bus: str, device: str) -> None:
    in_guest(guest, "true")  # it has booted, and looked for devices
    done = tetrarch_cli("attach-disk", "--device", "data", "web", f"{image},bus={bus}")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"data\n", b"")
    wait = f"n=0; until {can_be_opened(device)} || [ $((n += 1)) = 600 ]; do sleep 0.05; done"
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


def test_images_come_into_a_confined_machine_by_descriptor(
    guest: RemoteMachine, tmp_path: Path
) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"on the base".ljust(1 << 20, b"\0"))
    made = tetrarch_cli("disk", "create", top, "--format", "qcow2", "--backing", "base.raw")
    assert made.returncode == 0, made.stderr
    in_guest(guest, "true")  # it has booted
    for path in (top, base):
        # Both may open it: it is the machine's alone while it has it.
        assert tetrarch_cli("attach-disk", "--device", "handed", "web", path).returncode == 0
        assert tetrarch_cli("disk", "resize", path, "2M").returncode == 1
        (block,) = (
            block for block in guest.execute("query-block") if block["qdev"].endswith("handed")
        )
        assert block["inserted"]["file"] == str(path)
        assert block["inserted"]["backing_file_depth"] == int(path == top)
        assert guest.execute("query-fdsets") == [], "they went with the client"
        wait = f"n=0; until {can_be_opened('vda')} || [ $((n += 1)) = 600 ]; do sleep 0.05; done"
        assert in_guest(guest, f"{wait}; head -c 11 /dev/vda") == b"on the base"
        in_guest(guest, "printf written | dd of=/dev/vda bs=512 seek=1 conv=fsync")
        assert in_guest(guest, "dd if=/dev/vda bs=512 skip=1 count=1 | head -c 7") == b"written"
        guest.execute("block_resize", {"device": "handed", "size": 2 << 20})
        assert tetrarch_cli("detach", "web", "handed").returncode == 0
    assert base.read_bytes()[512:519] == b"written"
    assert base.stat().st_size == 2 << 20


def test_what_a_confined_machine_may_not_open_is_told(guest: RemoteMachine, tmp_path: Path) -> None:
    image, flat = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    image.write_bytes(bytes(1 << 20))
    flat.write_text('# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "disk.raw" 0\n')
    for words in (f"{image},cache=none", f"{flat},readonly"):
        done = tetrarch_cli("attach-disk", "web", words)
        assert (done.returncode, done.stdout) == (1, b"")
        assert f"--allow {tmp_path}".encode() in done.stderr
    node = {"driver": "file", "node-name": "x", "filename": str(image)}
    dump = {"protocol": f"file:{tmp_path}/core", "paging": False}
    for command, arguments in (("blockdev-add", node), ("dump-guest-memory", dump)):
        with pytest.raises(
            ControlError, match="ermission denied; this machine is confined"
        ) as told:
            guest.execute(command, arguments)
        assert "--allow" in str(told.value)
    with pytest.raises(ControlError, match="not permitted; this machine is confined"):
        guest.execute("netdev_add", {"type": "user", "id": "x"})
