"""Linux reads the events that a program sends."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from tests.virtio.driver import wait_until

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.config import InputOption, VirtioTransport

PROMPT = "root@tetrarch:~# "
LIMIT_S = 90
MODELS: tuple[InputOption, ...] = ("keyboard", "mouse", "tablet")


def ask(vm: Machine, command: str) -> str:
    vm.console.send(command + "\n")
    return vm.console.expect(PROMPT, LIMIT_S)


def open_devices(vm: Machine) -> None:
    """As descriptors 3, 4 and 5 of the shell: Linux keeps their events from then on."""
    for descriptor, model in enumerate(MODELS, start=3):
        found = ask(vm, f"grep -l 'Tetrarch {model}' /sys/class/input/event*/device/name")
        event = re.search(r"input/(event\d+)/device", found)
        assert event is not None, found
        ask(vm, f"exec {descriptor}<> /dev/input/{event[1]}")


def read(vm: Machine, model: InputOption, count: int) -> list[tuple[int, int, int]]:
    """The next events, as (type, code, value): struct input_event without its time."""
    descriptor = 3 + MODELS.index(model)
    form = """'24/1 "%02x" "\\n"'"""
    said = ask(vm, f"dd bs=24 count={count} <&{descriptor} 2>/dev/null | hexdump -ve {form}")
    found = re.findall(r"^([0-9a-f]{48})\r?$", said, re.MULTILINE)
    return [struct.unpack("<16xHHi", bytes.fromhex(event)) for event in found]


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_linux_reads_the_very_events(
    debian_guest: CachedGuest, virtio: VirtioTransport, tmp_path: Path
) -> None:
    syn = (0, 0, 0)
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        virtio=virtio,
        input=MODELS,
    ) as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        open_devices(vm)
        keyboard, mouse, tablet = vm.inputs
        keyboard.type("A")
        shifted = [(1, 42, 1), syn, (1, 30, 1), syn, (1, 30, 0), syn, (1, 42, 0), syn]
        assert read(vm, "keyboard", 8) == shifted
        mouse.move(3, -4)
        mouse.key("right")
        mouse.scroll(1)
        moved = [(2, 0, 3), (2, 1, -4), syn]
        clicked = [(1, 0x111, 1), syn, (1, 0x111, 0), syn]
        assert read(vm, "mouse", 9) == [*moved, *clicked, (2, 8, 1), syn]
        tablet.move(100, 32767)
        assert read(vm, "tablet", 3) == [(3, 0, 100), (3, 1, 32767), syn]
        # A program of the guest lights LED_CAPSL, by two of struct input_event.
        ask(vm, r"head -c 16 /dev/zero > /tmp/led; printf '\021\0\1\0\1\0\0\0' >> /tmp/led")
        ask(vm, "head -c 24 /dev/zero >> /tmp/led; dd bs=48 if=/tmp/led >&3")
        wait_until(lambda: keyboard.leds == {"caps"}, "the LED", LIMIT_S)
        assert read(vm, "keyboard", 2) == [(0x11, 1, 1), syn]
        vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as vm:
        vm.start()
        assert [device.model for device in vm.inputs] == list(MODELS)
        assert vm.inputs[0].leds == {"caps"}
        vm.inputs[0].key("b")
        assert read(vm, "keyboard", 4) == [(1, 48, 1), syn, (1, 48, 0), syn]
