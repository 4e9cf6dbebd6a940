"""Saved machines, on a CPU that is a Python function."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.machine import guests

from tetrarch import ConfigError, HostError, Machine, MachineStateError, Phase, StateError
from tetrarch._native import Vm
from tetrarch.machine.cpu import GuestCpu
from tetrarch.machine.saved import HEADER_BYTES, MAGIC, header
from tetrarch.machine.selection import engines
from tetrarch.machine.snapshot import parent_of
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
        with vm.paused():
            vm.console.send("c")  # typed, and not read by the guest
            vm.save(path)
            assert vm.phase is Phase.PAUSED
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


def test_file_has_no_zeros_and_is_for_its_owner_alone(saved: Path) -> None:
    assert saved.stat().st_size < 1 << 20
    assert saved.stat().st_mode & 0o777 == 0o600


def test_every_cut_is_found(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    short = tmp_path / "short"
    for length in [0, 7, 8, 20, HEADER_BYTES, len(data) // 2, len(data) - 1]:
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


def made(path: Path, sections: Mapping[bytes, tuple[int, bytes]]) -> Path:
    """A file of such sections, name, version and body, and no RAM."""
    image = header(HEADER_BYTES)
    for name, (version, body) in sections.items():
        head = bytes([len(name)]) + name + struct.pack("<HQ", version, len(body))
        image += head + struct.pack("<I", zlib.crc32(head, zlib.crc32(body))) + body
    path.write_bytes(image)
    return path


def sections_of(path: Path) -> dict[bytes, tuple[int, bytes]]:
    image = path.read_bytes()
    (at,) = struct.unpack_from("<Q", image, len(MAGIC))
    sections = {}
    while at < len(image):
        name = image[at + 1 : at + 1 + image[at]]
        at += 1 + len(name)
        version, length, _ = struct.unpack_from("<HQI", image, at)
        at += struct.calcsize("<HQI")
        sections[name] = version, image[at : at + length]
        at += length
    return sections


def of_cpu(saved: Path, path: Path, **changes: Any) -> Path:
    """A saved machine whose CPU was another."""
    sections = sections_of(saved)
    version, body = sections[b"machine"]
    about = json.loads(body)
    about["cpu"] |= changes
    return made(path, sections | {b"machine": (version, json.dumps(about).encode())})


ABOUT: dict[str, Any] = {
    "name": "x",
    "engine": "bt",
    "platform": "pc",
    "memory": "16384K",
    "cpus": 1,
    "debug_exit": False,
    "hpet": False,
    "uptime": 1.0,
    "identity": "x",
    "parent": None,
    "cpu": {"vendor": "GenuineIntel", "signature": 0, "words": {}},
    "vcpus": {"0": "cpu0"},
    "disks": {},
    "outside": {
        "options": {
            name: []
            for name in ("disk", "cdrom", "floppy", "net", "virtio_console", "vsock", "firmware")
        },
        "later": [],
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "lots"}, "describes no machine"),
        ({"platform": "acrn"}, "has a platform of its own, 'acrn'"),
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
    body = json.dumps(ABOUT | change).encode()
    path = made(tmp_path / "made", {b"machine": (7, body)})
    with pytest.raises(StateError, match=message):
        Machine.restore(path, vm=scripted())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ((1 << 40, 4096, 4096), "RAM where the machine has none"),
        ((0, 4096, 1 << 31), "a run of RAM of absurd size"),
        ((0, 1 << 40, 4096), "cut short"),
        ((8, 4096, 4096), "begins in a page"),
        ((0, (1 << 64) - 4096, 4096), "beyond any file"),
        ((0, 1 << 63, 4096), "beyond any file"),
    ],
)
def test_ram_that_the_machine_has_not_is_refused(
    saved: Path, tmp_path: Path, run: tuple[int, int, int], message: str
) -> None:
    here = of_cpu(saved, tmp_path / "here", vendor=Vm("bt", 1 << 20).cpu_identity()[0])
    sections = sections_of(here) | {b"ram": (1, struct.pack("<QQII", *run, 0))}
    path = made(tmp_path / "made", sections)
    with pytest.raises(StateError, match=f"{path}.*{message}"):
        Machine.restore(path, engine="bt")


def test_version_that_this_program_does_not_read_is_told(saved: Path, tmp_path: Path) -> None:
    image = bytearray(saved.read_bytes())
    image[len(MAGIC) - 1] = 9
    path = tmp_path / "later"
    path.write_bytes(image)
    with pytest.raises(StateError, match="of version 9, this program reads 2; restore it with"):
        Machine.restore(path, vm=scripted())
    sections = sections_of(saved)
    sections[b"devices"] = (7, sections[b"devices"][1])
    with pytest.raises(StateError, match="version 7 of the section 'devices'"):
        Machine.restore(made(path, sections), vm=scripted())


@pytest.mark.parametrize(
    "change",
    [
        {"identity": 7},
        {"parent": {"identity": "x", "file": "../etc/passwd"}},
        {"parent": {"identity": "x", "file": ".."}},
        {"parent": 1},
        {"cpu": {"1.ECX": 1}},
        {"cpu": {"vendor": "GenuineIntel", "signature": 0, "words": {"1.ECX": "all"}}},
        {"cpu": {"vendor": "GenuineIntel", "signature": 0, "words": {"1.ECX": 1 << 32}}},
        {"cpu": {"vendor": "GenuineIntel", "signature": -1, "words": {}}},
        {"cpu": {"vendor": 7, "signature": 0, "words": {}}},
        {"vcpus": {}},
        {"vcpus": ["cpu0"]},
        {"vcpus": {"0": 1}},
        {"vcpus": {"0": "cpu0", "-1": "cpu1"}},
        {"disks": 5},
    ],
)
def test_what_names_other_files_or_says_nonsense_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = made(tmp_path / "made", {b"machine": (7, json.dumps(ABOUT | change).encode())})
    with pytest.raises(StateError, match="does not say"):
        Machine.restore(path, vm=scripted())


def test_files_of_what_was_written_since_lie_upon_each_other(kernel: Path, tmp_path: Path) -> None:
    base, second, third = (tmp_path / name for name in ("base", "second", "third"))
    with Machine(kernel=kernel, memory="16M", vm=scripted()) as vm:
        vm.start()
        vm.write_memory(0x80_0000, b"first".ljust(0x20_0000, b"x"))
        with vm.paused():
            vm.save(base, track=True)
        vm.write_memory(0x90_0000, b"second")
        vm.write_memory(0x80_0000, bytes(0x1000))
        vm.save(second, parent=base, track=True)
        vm.write_memory(0x90_0000, b"third!")
        vm.save(third, parent=second)
        with pytest.raises(MachineStateError, match="since base has not been noted"):
            vm.save(tmp_path / "other", parent=base)
        with pytest.raises(ConfigError, match="in two directories"):
            vm.save(tmp_path / "kernel" / "x", parent=base)
        with pytest.raises(ConfigError, match=f"{base} would replace a file that it lies upon"):
            vm.save(base, parent=second)
        with pytest.raises(ConfigError, match=f"{second} would replace a file that it lies upon"):
            vm.save(tmp_path / "." / "second", parent=second)
    assert second.stat().st_size < base.stat().st_size / 8
    for path, word in ((base, b"xxxxxx"), (second, b"second"), (third, b"third!")):
        with Machine.restore(path, vm=scripted()) as copy:
            assert copy.read_memory(0x90_0000, 6) == word
            assert copy.read_memory(0x80_0000, 5) == (b"first" if path == base else bytes(5))
            assert copy.read_memory(0x81_0000, 1) == b"x"
    base.rename(tmp_path / "gone")
    with pytest.raises(HostError, match=f"cannot read {base}"):
        Machine.restore(third, vm=scripted())
    second.replace(base)
    (tmp_path / "gone").rename(second)
    with pytest.raises(StateError, match=f"{second} is not the file that {third} was saved upon"):
        Machine.restore(third, vm=scripted())


def test_nothing_is_saved_upon_more_files_than_are_restored(kernel: Path, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(65)]
    with Machine(kernel=kernel, memory="16M", vm=scripted()) as vm:
        vm.start()
        with vm.paused():
            vm.save(files[0], track=True)
            for parent, child in pairwise(files[:-1]):
                vm.save(child, parent=parent, track=True)
            with pytest.raises(ConfigError, match="lies upon so many files that"):
                vm.save(files[-1], parent=files[-2])
    Machine.restore(files[-2], vm=scripted()).kill()
    assert not files[-1].exists()
    files[1].unlink()
    with pytest.raises(HostError, match=f"cannot read {files[1]}"):
        parent_of(files[3], None)


def test_damage_in_a_parent_is_found_and_named(kernel: Path, tmp_path: Path) -> None:
    base, child = tmp_path / "base", tmp_path / "child"
    with Machine(kernel=kernel, memory="16M", vm=scripted()) as vm:
        vm.start()
        vm.write_memory(0x80_0000, b"x" * 0x1000)
        with vm.paused():
            vm.save(base, track=True)
            vm.save(child, parent=base)
    image = bytearray(base.read_bytes())
    at = image.index(b"x" * 0x1000)
    image[at] ^= 1
    base.write_bytes(image)
    with pytest.raises(StateError, match=f"{base} has RAM with a wrong checksum"):
        Machine.restore(child, vm=scripted())


def test_cpu_that_lacks_what_the_guest_relies_on_is_told(saved: Path, tmp_path: Path) -> None:
    path = of_cpu(saved, tmp_path / "made", words={"7.EBX": 1 << 5 | 1 << 13})
    with pytest.raises(StateError, match=r"does not have here: avx2, 7\.EBX bit 13; restore"):
        Machine.restore(path, vm=scripted())


def test_cpu_of_another_vendor_is_told(saved: Path, tmp_path: Path) -> None:
    path = of_cpu(saved, tmp_path / "made", vendor="AuthenticAMD")
    lacking = "CPU is AMD's, and this host's is Intel's; restore it on a host with a CPU of AMD's"
    with pytest.raises(StateError, match=lacking):
        Machine.restore(path, vm=scripted())


def said_cpuid(vm: Machine) -> int:
    vm.console.send("x")
    said = vm.console.expect(re.compile("[@-O]{8}"), LIMIT_S)
    return sum((ord(four) & 15) << 4 * place for place, four in enumerate(said))


def test_guest_finds_no_more_in_its_cpu_than_before(tmp_path: Path) -> None:
    kernel, saved, fsgsbase = tmp_path / "kernel", tmp_path / "saved", 1 << 0
    kernel.write_bytes(pvh_kernel(guests.say_cpuid(7, "EBX")))
    # As on a host that has less than this one.
    less = GuestCpu(*Vm("bt", 1 << 20).cpu_identity(), {"7.EBX": 0})
    with Machine(kernel=kernel, memory="16M", engine="bt", guest_cpu=less) as vm:
        vm.start()
        had = said_cpuid(vm)
        assert not had & fsgsbase
        vm.save(saved)
    for _ in range(2):
        with Machine.restore(saved) as vm:
            vm.start()
            assert said_cpuid(vm) == had
            vm.save(saved)


def test_guest_finds_the_family_model_and_stepping_that_it_had(tmp_path: Path) -> None:
    kernel, saved = tmp_path / "kernel", tmp_path / "saved"
    kernel.write_bytes(pvh_kernel(guests.say_cpuid(1, "EAX")))
    vendor, here = Vm("bt", 1 << 20).cpu_identity()
    other = GuestCpu(vendor, here ^ 0x11, {})
    with Machine(kernel=kernel, memory="16M", engine="bt", guest_cpu=other) as vm:
        vm.start()
        assert said_cpuid(vm) == here ^ 0x11
        vm.save(saved)
    with Machine.restore(saved) as vm:
        vm.start()
        assert said_cpuid(vm) == here ^ 0x11


def test_portable_cpu_has_no_more_than_each_engine_of_the_host(tmp_path: Path) -> None:
    kernel, word = tmp_path / "kernel", "7.EBX"
    kernel.write_bytes(pvh_kernel(guests.say_cpuid(7, "EBX")))
    common = 0xFFFF_FFFF
    for engine in engines():
        if engine.available:
            common &= dict(Vm(engine.name, 1 << 20).cpu_features())[word]
    with Machine(kernel=kernel, memory="16M", engine="bt", cpu="portable") as vm:
        vm.start()
        # FDP and the selectors of x87 are no features.
        assert said_cpuid(vm) & ~(1 << 6 | 1 << 13) == common


def test_what_is_no_file_is_no_saved_machine(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", tmp_path / "fifo"):
        with pytest.raises(HostError, match="it is no regular file"):
            Machine.restore(path)
