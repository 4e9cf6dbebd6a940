"""SeaBIOS from its first instruction to a boot sector, on each kind of drive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.firmware.media import boot_disc, boot_disk

from tetrarch import Machine, StateError, StopReason

LIMIT_S = 120

pytestmark = pytest.mark.skipif(
    not os.path.exists("/usr/share/seabios/bios-256k.bin"),
    reason="no SeaBIOS: apt-get install seabios",
)


@pytest.mark.parametrize(
    "bus",
    [
        "virtio",
        pytest.param("ahci", marks=pytest.mark.long),
        pytest.param("ide", marks=pytest.mark.long),
        pytest.param("nvme", marks=pytest.mark.long),
        pytest.param("pvscsi", marks=pytest.mark.long),
    ],
)
def test_disk_boots(tmp_path: Path, bus: str) -> None:
    disk = boot_disk(tmp_path / "disk.img", b"booted from a disk\r\n")
    with Machine(
        engine="bt", firmware="seabios", memory="64M", disk=f"{disk},format=raw,bus={bus}"
    ) as vm:
        vm.start()
        said = vm.console.expect("booted from a disk", LIMIT_S)
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
        assert vm.pc.firmware is not None
        log = vm.pc.firmware.debug_console.text
    assert "SeaBIOS (version" in said
    # What fw_cfg told: memory, ACPI and SMBIOS.
    assert "qemu/e820: addr 0x0000000000000000 len 0x0000000004000000 [RAM]" in log
    assert "ACPI: parse DSDT" in log
    assert "Copying SMBIOS 3.0" in log


@pytest.mark.parametrize("bus", ["ahci", pytest.param("ide", marks=pytest.mark.long)])
def test_disc_boots_and_a_reset_starts_anew(tmp_path: Path, bus: str) -> None:
    disc = boot_disc(tmp_path / "disc.iso", b"booted from a disc\r\n")
    with Machine(engine="bt", firmware="seabios", memory="64M", cdrom=f"{disc},bus={bus}") as vm:
        vm.start()
        vm.console.expect("SeaBIOS (version", LIMIT_S)
        vm.reset()
        vm.console.expect("SeaBIOS (version", LIMIT_S)
        vm.console.expect("booted from a disc", LIMIT_S)
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


def test_program_reads_the_keyboard_by_the_bios(tmp_path: Path) -> None:
    # mov al, '>' ; mov dx, 0x3f8 ; out dx, al
    # next: xor ah, ah ; int 0x16 ; cmp al, 13 ; je off ; mov dx, 0x3f8 ; out dx, al ; jmp next
    # off: mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
    code = bytes.fromhex("b03e baf803 ee 30e4 cd16 3c0d 7406 baf803 ee ebf2 ba0406 b80034 ef f4")
    disk = tmp_path / "disk.img"
    disk.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    with Machine(
        engine="bt",
        firmware="seabios",
        memory="64M",
        disk=f"{disk},format=raw",
        input="ps2-keyboard",
        vga=True,
    ) as vm:
        vm.start()
        vm.console.expect(">", LIMIT_S)
        (keyboard,) = vm.inputs
        keyboard.type("In real mode!")  # a BIOS keeps 15 keys
        vm.console.expect("In real mode!", LIMIT_S)
        keyboard.key("enter")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


def test_saved_in_the_firmware_goes_on_from_there(tmp_path: Path) -> None:
    disk = f"{boot_disk(tmp_path / 'disk.img', b'booted from a disk')},format=raw"
    with Machine(engine="bt", firmware="seabios", memory="64M", disk=disk) as vm:
        vm.start()
        vm.console.expect("SeaBIOS (version", LIMIT_S)
        vm.save(tmp_path / "saved")
    with pytest.raises(StateError, match="had 1 firmware, seabios; 0 given; give as many"):
        Machine.restore(tmp_path / "saved", disk=disk)
    with Machine.restore(tmp_path / "saved", disk=disk, firmware="seabios") as vm:
        vm.start()
        vm.console.expect("booted from a disk", LIMIT_S)
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
