"""Linux finds the PC's own keyboard, mouse port and event timers, and uses them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from tests.virtio.driver import wait_until

from tetrarch import Machine
from tetrarch.images import CachedGuest

PROMPT = "root@tetrarch:~# "
LIMIT_S = 90


def ask(vm: Machine, command: str) -> str:
    vm.console.send(command + "\n")
    return vm.console.expect(PROMPT, LIMIT_S)


def keys(vm: Machine, count: int) -> list[tuple[int, int]]:
    """The next keys that Linux's driver tells, and whether they are down."""
    form = """'24/1 "%02x" "\\n"'"""
    said = ask(vm, f"dd bs=24 count={count} <&3 2>/dev/null | hexdump -ve {form}")
    found = re.findall(r"^([0-9a-f]{48})\r?$", said, re.MULTILINE)
    events = [struct.unpack("<16xHHi", bytes.fromhex(event)) for event in found]
    return [(code, value) for kind, code, value in events if kind == 1]


def test_linux_reads_the_keyboard_and_tells_time_by_the_timers(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        input=["ps2-keyboard", "ps2-mouse"],
        hpet=True,
    ) as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        assert "serio1" in ask(vm, "ls /sys/bus/serio/devices")  # the mouse's port
        found = ask(vm, "grep -l 'AT Translated Set 2' /sys/class/input/event*/device/name")
        event = re.search(r"input/(event\d+)/device", found)
        assert event is not None, found
        ask(vm, f"exec 3< /dev/input/{event[1]}")
        keyboard, mouse = vm.inputs
        assert (keyboard.model, mouse.model) == ("ps2-keyboard", "ps2-mouse")
        keyboard.key("leftctrl", "delete")
        # Each with its scan code and a report's end.
        assert keys(vm, 12) == [(29, 1), (111, 1), (111, 0), (29, 0)]
        ask(vm, "echo 1 > $(echo /sys/class/leds/input*::capslock/brightness)")
        wait_until(lambda: "caps" in keyboard.leds, "the LED", LIMIT_S)

        sources = "/sys/devices/system/clocksource/clocksource0"
        assert " hpet " in ask(vm, f"cat {sources}/available_clocksource")
        ask(vm, f"echo hpet > {sources}/current_clocksource")
        assert ask(vm, f"cat {sources}/current_clocksource").startswith("hpet")
        assert "over" in ask(vm, "sleep 0.2; echo ov''er")
        vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as vm:
        vm.start()
        vm.inputs[0].key("b")
        assert keys(vm, 6) == [(48, 1), (48, 0)]
        assert "over" in ask(vm, "sleep 0.2; echo ov''er")
