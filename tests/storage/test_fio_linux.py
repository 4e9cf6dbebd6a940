"""fio writes at random through each disk controller, and finds all of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from tests.nodes import can_be_opened
from tests.programs import initrd_with
from tests.storage.linux import Linux

from tetrarch import Machine, block
from tetrarch.images import CachedGuest

SIZE = 64 << 20
# Every block of 4 to 64 KiB has a checksum and where it belongs; what was written is read back.
FIO = (
    "fio --name=all --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16 "
    "--verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse --minimal"
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("bus", "form", "device"),
    [
        ("virtio", "raw", "vda"),
        ("virtio", "qcow2", "vda"),
        ("nvme", "raw", "nvme0n1"),
        ("nvme", "qcow2", "nvme0n1"),
        ("pvscsi", "raw", "sda"),
        ("pvscsi", "qcow2", "sda"),
        ("ahci", "raw", "sda"),
        ("ide", "raw", "sda"),
    ],
)
def test_what_fio_writes_is_there(
    debian_guest: CachedGuest,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    bus: str,
    form: Literal["raw", "qcow2"],
    device: str,
) -> None:
    guest = request.getfixturevalue("standard_guest") if bus == "ahci" else debian_guest
    path = tmp_path / "disk"
    block.create(path, SIZE, image_format=form)
    machine = Machine(
        engine="bt",
        kernel=guest.kernel,
        initrd=initrd_with(guest, ["fio"], tmp_path),
        disk=f"{path},format={form},bus={bus}",
    )
    with machine:
        linux = Linux(machine)
        linux.ask(f"until {can_be_opened(device)}; do sleep 0.1; done")
        linux.ask(f"{FIO} --filename=/dev/{device}")
        # It complains of a block that somebody else has written, and of that alone.
        again = f"{FIO} --filename=/dev/{device} --verify_only=1"
        linux.ask(again)
        linux.ask(f"dd if=/dev/urandom of=/dev/{device} bs=4k count=1 seek=77 && sync")
        linux.ask(f"! {again} 2>/dev/null")
