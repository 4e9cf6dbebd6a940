"""Saved machines, on a CPU that is a Python function."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetrarch import HostError, Machine, MachineStateError, Phase, StateError
from tetrarch.machine.saved import MAGIC
from tetrarch.testing import ScriptedVm, pvh_kernel

LIMIT_S = 30
COUNTER = 0x5000


def count_until_told(vm: ScriptedVm) -> str:
    """Counts in memory; a typed byte is said with the count, "q" powers off."""
    while not vm._stop:
        value = int.from_bytes(vm.read_memory(COUNTER, 4), "little") + 1
        vm.rest()
        if vm.port_in(0x3FD) & 1:
            byte = vm.port_in(0x3F8)
            if byte == ord("q"):
                vm.port_out(0x604, 0x3400, 2)
                return "stopped"
            for out in f"{chr(byte)}{value} ".encode():
                vm.port_out(0x3F8, out)
            vm.write_memory(COUNTER, value.to_bytes(4, "little"))
    return "stopped"


class Adder:
    def __init__(self) -> None:
        self.sum = 0

    def read(self, offset: int, size: int) -> int:
        return self.sum

    def write(self, offset: int, size: int, value: int) -> None:
        self.sum += value

    def save(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load(self, state: dict[str, Any]) -> None:
        self.sum = state["sum"]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(pvh_kernel(b"\xf4"))
    return path


def scripted() -> ScriptedVm:
    return ScriptedVm(count_until_told, memory=16 << 20)


@pytest.fixture
def saved(tmp_path: Path, kernel: Path) -> Path:
    path = tmp_path / "saved"
    with Machine(kernel=kernel, memory="16M", name="one", vm=scripted()) as vm:
        device = Adder()
        vm.attach_ports(0x500, 4, device, name="adder")
        vm.start()
        device.write(0, 4, 42)
        vm.console.send("ab")
        vm.console.expect("b2 ", LIMIT_S)
        vm.write_memory(0x7F_F000, b"far away")
        with vm.held():
            vm.console.send("c")  # typed, and not read by the guest
            vm.save(path)
            assert vm.phase is Phase.HELD
        vm.console.expect("c3 ", LIMIT_S)
    return path


def test_restored_machine_goes_on(saved: Path) -> None:
    with Machine.restore(saved, vm=scripted()) as vm:
        assert vm.config.name == "one"
        device = Adder()
        vm.attach_ports(0x500, 4, device, name="adder")
        assert device.sum == 42
        assert vm.read_memory(0x7F_F000, 8) == b"far away"
        before = vm.uptime
        assert before > 0
        vm.start()
        assert vm.console.expect("c3 ", LIMIT_S) == "c3 "
        vm.console.send("d")
        vm.console.expect("d4 ", LIMIT_S)
        assert vm.uptime > before
        vm.console.send("q")
        assert vm.wait(LIMIT_S).ok


def test_device_that_is_not_attached_again_is_named(saved: Path) -> None:
    with (
        Machine.restore(saved, vm=scripted()) as vm,
        pytest.raises(StateError, match="had a device 'adder'; attach it"),
    ):
        vm.start()


def test_device_without_a_state_is_named_and_no_file_is_left(kernel: Path, tmp_path: Path) -> None:
    class Plain:
        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            pass

    path = tmp_path / "saved"
    with Machine(kernel=kernel, memory="16M", vm=scripted()) as vm:
        vm.attach_ports(0x500, 4, Plain())
        vm.start()
        with pytest.raises(MachineStateError, match=r"Plain@0x500' cannot be saved"):
            vm.save(path)
        assert vm.running
    assert not path.exists()


@pytest.mark.parametrize("path", ["/nonexistent/saved", "/dev/full/saved"])
def test_place_that_cannot_be_written_is_named(kernel: Path, path: str) -> None:
    with Machine(kernel=kernel, memory="16M", vm=scripted()) as vm:
        vm.start()
        with pytest.raises(HostError, match="cannot save the machine to"):
            vm.save(path)
        assert vm.running


def test_machine_that_does_not_run_cannot_be_saved(kernel: Path, tmp_path: Path) -> None:
    with (
        Machine(kernel=kernel, memory="16M", vm=scripted()) as vm,
        pytest.raises(MachineStateError, match="not been started"),
    ):
        vm.save(tmp_path / "saved")


@pytest.mark.parametrize("name", ["", "pipe", "a\0b"])
def test_nothing_but_a_file_is_replaced(kernel: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with Machine(kernel=kernel, memory="16M", vm=scripted()) as vm:
        vm.start()
        with pytest.raises(HostError, match="is no regular file"):
            vm.save(tmp_path / name)
        assert vm.running
    assert (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"kernel", "pipe"}


def test_file_is_sparse_and_for_its_owner_alone(saved: Path) -> None:
    assert saved.stat().st_size < 1 << 20
    assert saved.stat().st_mode & 0o777 == 0o600


def test_every_cut_is_found(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    short = tmp_path / "short"
    for length in [0, 7, 8, 20, len(data) // 2, len(data) - 1]:
        short.write_bytes(data[:length])
        with pytest.raises(StateError, match=str(short)):
            Machine.restore(short, vm=scripted())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_every_flipped_bit_is_found(saved: Path, data: st.DataObject) -> None:
    image = bytearray(saved.read_bytes())
    at = data.draw(st.integers(0, len(image) - 1))
    image[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = saved.with_name("damaged")
    damaged.write_bytes(image)
    with pytest.raises(StateError):
        Machine.restore(damaged, vm=scripted())


def section(name: bytes, version: int, body: bytes) -> bytes:
    head = bytes([len(name)]) + name + struct.pack("<HQ", version, len(body))
    return head + struct.pack("<I", zlib.crc32(head, zlib.crc32(body))) + body


ABOUT: dict[str, Any] = {
    "name": "x",
    "engine": "bt",
    "platform": "pc",
    "memory": "16384K",
    "cpus": 1,
    "debug_exit": False,
    "uptime": 1.0,
    "outside": {
        "options": {
            name: [] for name in ("disk", "cdrom", "net", "virtio_console", "vsock", "firmware")
        },
        "later": [],
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "lots"}, "describes no machine"),
        ({"platform": "acrn"}, "has the platform 'acrn'"),
        ({"uptime": -1}, "how long"),
        ({"uptime": "x"}, "how long"),
        ({"outside": {}}, "had of its host"),
        ({"outside": {"options": ABOUT["outside"]["options"], "later": [1]}}, "had of its host"),
        ({"kernel": "/etc/shadow"}, "describes no machine"),
        ({"console": "file=/etc/passwd"}, "describes no machine"),
    ],
)
def test_description_of_no_machine_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "made"
    body = json.dumps(ABOUT | change).encode()
    path.write_bytes(MAGIC + section(b"machine", 2, body))
    with pytest.raises(StateError, match=message):
        Machine.restore(path, vm=scripted())


RUNS: list[tuple[Callable[[], bytes], str]] = [
    (lambda: struct.pack("<QQ", 1 << 40, 4096) + bytes(4096), "RAM where the machine has none"),
    (lambda: struct.pack("<QQ", 0, 1 << 62), "absurd size"),
    (lambda: struct.pack("<QQ", 0, 4096), "ends too early"),
]


@pytest.mark.parametrize(("run", "message"), RUNS, ids=["far", "huge", "short"])
def test_ram_that_the_machine_has_not_is_refused(
    tmp_path: Path, run: Callable[[], bytes], message: str
) -> None:
    path = tmp_path / "made"
    about = section(b"machine", 2, json.dumps(ABOUT).encode())
    path.write_bytes(MAGIC + about + section(b"ram", 1, run()))
    with pytest.raises(StateError, match=message):
        Machine.restore(path, engine="bt")
