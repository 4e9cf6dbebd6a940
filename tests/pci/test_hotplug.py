"""Functions that come and go while Linux runs, and what the registers promise."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from tests.nodes import can_be_opened
from tests.pci.device import Device
from tests.pci.guest import Guest

from tetrarch import Machine, block
from tetrarch._native import Vm
from tetrarch.devices.acpi_pm import GPE0, PCI_HOTPLUG_EVENT, PORT_BASE
from tetrarch.errors import ConfigError, MachineStateError
from tetrarch.images import CachedGuest
from tetrarch.machine import map as machine_map
from tetrarch.machine.config import EngineName
from tetrarch.pci.hotplug import EJECT, GONE, NEW
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.rng import RngKind

PROMPT = "root@tetrarch:~# "
LIMIT_S = 90
REGISTERS = machine_map.PCI_HOTPLUG
STATUS, ENABLE = PORT_BASE + GPE0, PORT_BASE + GPE0 + 2
EVENT = 1 << PCI_HOTPLUG_EVENT


class Linux:
    """The default guest at its prompt."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.console.expect(PROMPT, LIMIT_S)

    def ask(self, command: str) -> str:
        self.machine.console.send(command + "\n")
        return self.machine.console.expect(PROMPT, LIMIT_S)

    def wait_for(self, condition: str) -> None:
        assert "there" in self.ask(f"until {condition}; do sleep 0.05; done; echo there")

    def functions(self) -> set[str]:
        return set(self.ask("ls /sys/bus/pci/devices").split()) - {PROMPT.strip()}


def test_device_appears_and_works_and_goes_while_linux_runs(debian_guest: CachedGuest) -> None:
    kernel, initrd = debian_guest.kernel, debian_guest.initrd
    with Machine(engine="bt", kernel=kernel, initrd=initrd) as vm:
        vm.start()
        linux = Linux(vm)
        before = linux.functions()
        device = Device(vm.engine_vm)
        slot = vm.attach_pci(device, slot=5)
        here = f"/sys/bus/pci/devices/0000:00:{slot:02x}.0"
        linux.wait_for(f"[ -e {here}/enable ]")
        assert linux.functions() == before | {f"0000:00:{slot:02x}.0"}
        assert "0x1b36" in linux.ask(f"cat {here}/vendor")
        linux.ask(f"echo 1 > {here}/enable")
        address = device.function.address(device.function.bars[0])
        assert f"0x{address:016x}" in linux.ask(f"cat {here}/resource")
        assert "0xABABABAB" in linux.ask(f"devmem {address:#x} 32")
        linux.ask(f"devmem {address:#x} 32 0xcafe")
        assert device.registers.data[:4].hex() == "feca0000"
        vm.detach(device, timeout=LIMIT_S)
        assert linux.functions() == before
        assert device.function.address(device.function.bars[0]) == 0


def test_virtio_device_serves_by_messages_20_times_plugged_in_and_out(
    debian_guest: CachedGuest,
) -> None:
    kernel, initrd = debian_guest.kernel, debian_guest.initrd
    # The first one brings the drivers, which the guest loads once.
    with Machine(engine="bt", kernel=kernel, initrd=initrd, balloon=False) as vm:
        vm.start()
        linux = Linux(vm)
        assert isinstance(vm.engine_vm, Vm)
        misc = "/sys/class/misc/hw_random"
        for number in range(1, 21):
            vm.attach_pci(VirtioPci(vm.engine_vm, RngKind(vm.engine_vm, "second")), name="second")
            linux.wait_for(f"grep -q virtio_rng.1 {misc}/rng_available")
            linux.ask(f"echo virtio_rng.1 > {misc}/rng_current")
            assert "5000" in linux.ask("head -c 5000 /dev/hwrng | wc -c"), number
            interrupts = linux.ask("awk '/PCI-MSI.*virtio1-input/ {print $2}' /proc/interrupts")
            assert int(interrupts.split()[0]) > 0, interrupts
            vm.detach("second", timeout=LIMIT_S)
            assert "rng.1" not in linux.ask(f"cat {misc}/rng_available")
        # Also the one that the machine began with.
        vm.detach("rng", timeout=LIMIT_S)
        assert linux.functions() == {"0000:00:00.0"}
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S)


def test_disk_comes_with_its_data_and_goes_with_what_was_written(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    kernel, initrd, image = debian_guest.kernel, debian_guest.initrd, tmp_path / "disk.img"
    first = tmp_path / "first.img"
    block.create(first, 1 << 20, image_format="raw")
    # The first disk brings the driver, which the guest loads once; it is the load as well.
    with Machine(engine="bt", kernel=kernel, initrd=initrd, disk=str(first)) as vm:
        vm.start()
        linux = Linux(vm)
        assert isinstance(vm.engine_vm, Vm)
        linux.ask("(while :; do dd if=/dev/urandom of=/dev/vda bs=64k; done) 2>/dev/null &")
        for number in range(10):
            image.write_bytes(b"from the host %d\n" % number + bytes(1 << 20))
            os.truncate(image, 1 << 20)
            disk = block.open_disk(block.DiskSpec.parse(f"{image},format=raw"))
            vm.attach_pci(
                VirtioPci(vm.engine_vm, BlkKind(vm.engine_vm, disk, "more", 1)), name="more"
            )
            linux.wait_for(can_be_opened("vdb"))
            assert f"from the host {number}" in linux.ask("head -n 1 /dev/vdb")
            linux.ask(f"echo from the guest {number} | dd of=/dev/vdb conv=fsync 2>/dev/null")
            vm.detach("more", timeout=LIMIT_S)
            assert image.read_bytes().startswith(b"from the guest %d\n" % number)
            # The lock on the image is gone with the device.
            block.open_disk(block.DiskSpec.parse(f"{image},format=raw")).close()
            linux.wait_for("[ ! -e /dev/vdb ]")
        # The one that the machine began with, while it is written to.
        vm.detach("disk0", timeout=LIMIT_S)
        linux.wait_for("[ ! -e /sys/block/vda ]")
        with vm.paused():
            block.open_disk(block.DiskSpec.parse(f"{first},format=raw")).close()


def test_guest_is_told_by_an_event_that_stays_until_it_has_looked(guest: Guest) -> None:
    guest.machine.start()
    guest.port_out(STATUS, EVENT, 2)
    assert guest.port_in(STATUS, 2) == 0
    guest.machine.attach_pci(Device(guest.machine.engine_vm), slot=7)
    guest.port_out(STATUS, EVENT, 2)
    assert guest.port_in(STATUS, 2) == EVENT, "still driven"
    assert guest.port_in(REGISTERS + NEW) == 1 << 7
    guest.port_out(REGISTERS + NEW, 1 << 7)
    guest.port_out(STATUS, EVENT, 2)
    assert guest.port_in(STATUS, 2) == 0


def eject_when_asked(guest: Guest, slot: int) -> None:
    while not guest.port_in(REGISTERS + GONE) >> slot & 1:
        pass
    guest.port_out(REGISTERS + EJECT, 1 << slot)


def test_unplug_returns_when_the_guest_has_given_the_device_up(guest: Guest) -> None:
    closed = threading.Event()

    class Closing(Device):
        def close(self) -> None:
            closed.set()

    device = Closing(guest.machine.engine_vm)
    guest.machine.start()
    guest.machine.attach_pci(device, slot=7)
    config = machine_map.ECAM[0] + (7 << 15)
    guest.write(config + 4, 2, 2)
    where = guest.read(config + 0x10)
    assert guest.read(where) == 0xABAB_ABAB
    with pytest.raises(TimeoutError, match="has not given"):
        guest.machine.detach(device, timeout=0.01)
    assert guest.read(where) == 0xABAB_ABAB
    # The request of before is seen: the driver ejects for the next one, which is waited for.
    guest.port_out(REGISTERS + GONE, 1 << 7)
    driver = threading.Thread(target=eject_when_asked, args=(guest, 7))
    driver.start()
    guest.machine.detach(device, timeout=float("inf"))
    driver.join()
    assert closed.is_set()
    assert guest.read(where) == 0xFFFF_FFFF
    assert guest.read(config) == 0xFFFF_FFFF
    # The slot is free, and so is the device.
    assert guest.machine.attach_pci(device, slot=7) == 7
    assert guest.read(config) & 0xFFFF == 0x1B36


def test_reset_takes_out_what_the_guest_was_asked_to_give_up(guest: Guest) -> None:
    device = Device(guest.machine.engine_vm)
    guest.machine.attach_pci(device, slot=7)
    guest.machine.start()
    with pytest.raises(TimeoutError):
        guest.machine.detach(device, timeout=0.01)
    guest.reset()
    assert guest.read(machine_map.ECAM[0] + (7 << 15)) == 0xFFFF_FFFF
    assert guest.port_in(REGISTERS + GONE) == 0


def test_unplug_does_not_wait_for_a_machine_that_has_ended(guest: Guest) -> None:
    device = Device(guest.machine.engine_vm)
    guest.machine.attach_pci(device)
    guest.machine.start()
    stopper = threading.Thread(target=guest.machine.kill)
    stopper.start()
    # Before or after the wait has begun: it does not last.
    with pytest.raises(MachineStateError, match="ended"):
        guest.machine.detach(device, timeout=None)
    stopper.join()


def test_eject_of_empty_slots_and_of_the_bridge_is_nothing(guest: Guest) -> None:
    guest.machine.start()
    guest.port_out(REGISTERS + EJECT, 0xFFFF_FFFF)
    assert guest.read(machine_map.ECAM[0]) == 0x0008_1B36
    for size in (1, 2):
        guest.port_out(REGISTERS + EJECT, 0xFF, size)
        assert guest.port_in(REGISTERS, size) == (1 << 8 * size) - 1


def test_request_and_slots_are_saved(engine: EngineName, guest: Guest, tmp_path: Path) -> None:
    guest.machine.start()
    guest.machine.attach_pci(Device(guest.machine.engine_vm), slot=9, name="kept")
    guest.machine.attach_pci(Device(guest.machine.engine_vm), slot=7, name="leaves")
    with pytest.raises(TimeoutError):
        guest.machine.detach("leaves", timeout=0.01)
    guest.machine.save(tmp_path / "saved")
    with Guest(engine, tmp_path / "saved") as restored:
        for name, slot in (("leaves", 7), ("kept", 9)):
            assert (
                restored.machine.attach_pci(Device(restored.machine.engine_vm), name=name) == slot
            )
        restored.machine.start()
        assert restored.port_in(REGISTERS + NEW) == 1 << 7 | 1 << 9
        assert restored.port_in(REGISTERS + GONE) == 1 << 7
        assert restored.port_in(STATUS, 2) == EVENT
        restored.port_out(REGISTERS + NEW, 1 << 7 | 1 << 9)
        restored.port_out(REGISTERS + EJECT, 1 << 7)
        restored.port_out(STATUS, EVENT, 2)
        assert restored.port_in(STATUS, 2) == 0


def test_device_that_was_unplugged_is_not_in_the_restored_machine(
    engine: EngineName, tmp_path: Path
) -> None:
    with Guest(engine, rng=True) as guest:
        guest.machine.start()
        assert guest.read(machine_map.ECAM[0] + (1 << 15)) == 0x1044_1AF4
        guest.port_out(REGISTERS + EJECT, 1 << 1)
        guest.machine.save(tmp_path / "saved")
    with Guest(engine, tmp_path / "saved") as restored:
        restored.machine.start()
        assert restored.read(machine_map.ECAM[0] + (1 << 15)) == 0xFFFF_FFFF


def test_what_cannot_be_is_refused(guest: Guest) -> None:
    machine = guest.machine
    device = Device(machine.engine_vm)
    machine.attach_pci(device, slot=3)
    with pytest.raises(ConfigError, match="there is a device 'Device' already"):
        machine.attach_pci(Device(machine.engine_vm))
    with pytest.raises(ConfigError, match="in a slot already"):
        machine.attach_pci(device, name="again")
    with pytest.raises(ConfigError, match="slot 3 is taken"):
        machine.attach_pci(Device(machine.engine_vm), slot=3, name="other")
    with pytest.raises(MachineStateError, match="no PCI device 'disk'"):
        machine.detach("disk")
    machine.detach(device)  # at once: no guest runs
    assert machine.attach_pci(device) == 1
