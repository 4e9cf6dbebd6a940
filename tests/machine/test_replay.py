"""A guest that was recorded lives again: the same memory and registers at each checkpoint, with
none of its devices."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tetrarch import Machine
from tetrarch.control import Client, ControlError
from tetrarch.errors import ConfigError, HostError, MachineStateError, StateError
from tetrarch.images import CachedGuest
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.status import StopReason
from tetrarch.testing import pvh_kernel

LIMIT_S = 120
PROMPT = "root@tetrarch:~# "
# What a replay cannot know but from the recording: time, chance, devices, the order of processes.
COMMANDS = [
    "cat /proc/uptime; date +%N; od -An -N16 -tx8 /dev/urandom",
    "for n in 1 2 3; do (sleep 0.0$n; echo $n) & done; wait",
    "dd if=/dev/vda bs=64k count=16 2>/dev/null | sha256sum",
    "sleep 0.3; cat /proc/interrupts | sha256sum",
]


def make_recording(folder: Path) -> tuple[Path, str]:
    """A recording, and what the guest said in it."""
    recording, disk = folder / "recording", folder / "disk"
    disk.write_bytes(bytes(range(256)) * 8192)
    with Machine(engine="bt", record=recording, disk=disk) as vm:
        vm.start()
        said = vm.console.expect(PROMPT, LIMIT_S)
        for command in COMMANDS:
            vm.console.send(f"{command}\n")
            said += vm.console.expect(PROMPT, LIMIT_S)
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
        end = vm.recording
    disk.unlink()
    assert end is not None
    assert (end.kind, end.written) == ("recorded", recording.stat().st_size)
    assert end.count > 1 << 30
    return recording, said


@pytest.fixture(scope="module")
def recorded(
    debian_guest: CachedGuest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    return make_recording(tmp_path_factory.mktemp("recorded"))


def test_firmware_lives_again(tmp_path: Path) -> None:
    """Its image is memory of the machine's, and no file of it is needed."""
    image, recording = tmp_path / "bios.bin", tmp_path / "recording"
    # mov dx, 0x3f8 ; mov al, '!' ; out dx, al ; mov al, 0xfe ; out 0x64, al ; jmp $
    code = bytes.fromhex("baf803 b021 ee b0fe e664 ebfe")
    reset = bytes.fromhex("e90d00")  # jmp to the image's first byte
    image.write_bytes(code.ljust(65520, b"\0") + reset.ljust(16, b"\0"))
    with Machine(engine="bt", memory="16M", firmware=image, record=recording) as vm:
        assert vm.run(LIMIT_S).reason is StopReason.RESET
    image.unlink()
    assert live_again(recording)[0] == "!"


def live_again(recording: Path) -> tuple[str, int]:
    """What the guest says, and how many checkpoints there were."""
    with Machine(replay=recording) as vm:
        status = vm.run(LIMIT_S)
        assert (status.reason, status.detail) == (StopReason.STOPPED, "the recording ends")
        end = vm.recording
        text = vm.console.text
    assert end is not None
    assert end.kind == "replayed"
    return text, end.count


def test_guest_lives_again(recorded: tuple[Path, str]) -> None:
    recording, said = recorded
    text, checkpoints = live_again(recording)
    for line in said.splitlines():
        assert line in text
    assert checkpoints > 0


def test_what_is_plugged_in_and_out_while_it_records_lives_again(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    recording, disk = tmp_path / "recording", tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * 4096)
    with Machine(engine="bt", record=recording, balloon=True, memory="512M") as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        name = vm.attach_disk(disk)
        vm.console.send("until [ -b /dev/vda ]; do sleep 0.1; done; sha256sum /dev/vda\n")
        read = vm.console.expect(PROMPT, LIMIT_S)
        assert hashlib.sha256(disk.read_bytes()).hexdigest() in read
        vm.detach(name, timeout=LIMIT_S)
        vm.balloon.target = 64 << 20
        vm.console.send("sleep 1; free; ls /dev/vda\n")
        gone = vm.console.expect(PROMPT, LIMIT_S)
        assert "No such file" in gone
        vm.press_power_button()
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
        said = vm.console.text
    disk.unlink()
    assert live_again(recording)[0] == said


def test_recording_that_was_cut_lives_to_its_last_whole_chunk(
    recorded: tuple[Path, str], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(recorded[0].read_bytes()[:-100])
    with Machine(replay=cut) as vm:
        vm.run(LIMIT_S)
        end = vm.recording
    assert end is not None
    assert end.kind == "cut"
    assert end.count > 0


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: flip(data, len(data) // 2), lambda data: flip(data, 40)]
)
def test_damaged_recording_is_refused(
    recorded: tuple[Path, str], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(damage(recorded[0].read_bytes()))
    with pytest.raises((StateError, HostError), match="damaged at byte"):
        Machine(replay=damaged)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * 100)
    with pytest.raises(StateError, match="no recording of this version"):
        Machine(replay=other)
    with pytest.raises(HostError, match="No such file"):
        Machine(replay=tmp_path / "absent")


def test_recording_without_a_start_is_made_anew(recorded: tuple[Path, str], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(recorded[0].read_bytes()[:5000])
    cause = f"cannot replay {cut}: the recording ends before the guest has begun; record again"
    with pytest.raises(HostError, match=cause):
        Machine(replay=cut)


def test_memory_is_that_of_the_recording(recorded: tuple[Path, str]) -> None:
    with Machine(replay=recorded[0]) as vm:
        had = vm.config
    Machine(had).kill()
    with pytest.raises(ConfigError, match="memory is given beside it"):
        Machine(replay=recorded[0], memory="64M")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"engine": "kvm"}, "engine kvm cannot do that"),
        ({"cpus": 2}, "a machine with 2 CPUs"),
        ({"share": "."}, "a share"),
        ({"vsock": "v"}, "a vsock device"),
        ({"input": "mouse"}, "an input device"),
        ({"cpu": "portable"}, "another CPU than the host's"),
        ({"cpu": "x86-64-v2"}, "another CPU than the host's"),
        ({"gdb": 0}, "a place for gdb"),
        ({"display": "vnc=0"}, "a display"),
        ({"screen": "svga"}, "the screen svga"),
        ({"on_reset": "restart"}, "a restart at a reset"),
        ({"net": "vhost-user=s"}, "a network card of another process"),
        ({"disk": "vhost-user=s"}, "a disk of another process"),
        ({"replay": "r"}, "it is not recorded again"),
    ],
)
def test_machine_that_cannot_be_recorded_is_refused(
    tmp_path: Path, options: dict[str, object], cause: str
) -> None:
    with pytest.raises(ConfigError, match=cause):
        Machine(record=tmp_path / "r", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "r").exists()


def test_replay_has_no_devices_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk is given beside it"):
        Machine(replay=tmp_path / "r", disk=tmp_path / "d")


def test_recording_without_room_is_refused(debian_guest: CachedGuest) -> None:
    with pytest.raises(HostError, match=r"No space left.*free the space, or"):
        Machine(engine="bt", record="/dev/full")


#: Waits until a number at 2 MiB is not 0, says "!" and halts.
WAITS = bytes.fromhex("a100002000 85c0 74f7 baf8030000 b021 ee fa f4")
FLAG = 0x20_0000


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Machine]:
    """A guest that is recorded, and runs."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(WAITS))
    with Machine(engine="bt", kernel=kernel, memory="16M", record=tmp_path / "waits") as vm:
        vm.start()
        yield vm


def set_register(vm: Machine) -> None:
    vm.vcpus[0].regs.rax = 1


def set_msr(vm: Machine) -> None:
    vm.vcpus[0].msr[0x10] = 1


def set_vector(vm: Machine) -> None:
    vm.vcpus[0].fpu.xmm0 = 1


def write_memory(vm: Machine) -> None:
    vm.memory[FLAG] = 1


CHANGES: list[Callable[[Machine], object]] = [
    Machine.reset,
    lambda vm: vm.save("snapshot"),
    set_register,
    set_msr,
    set_vector,
    lambda vm: vm.vcpus[0].set_regs(rax=1),
]
WRITES: list[Callable[[Machine], object]] = [
    write_memory,
    lambda vm: vm.write_memory(FLAG, b"1"),
    lambda vm: vm.vcpus[0].linear.__setitem__(FLAG, 1),
]
DEBUGGING: list[Callable[[Machine], object]] = [
    Machine.serve_gdb,
    lambda vm: vm.breakpoint(0x10_0000),
    lambda vm: vm.watchpoint(FLAG, 4),
]
DEVICES: list[Callable[[Machine], object]] = [
    Machine.press_power_button,
    lambda vm: vm.attach_disk("disk"),
    lambda vm: vm.attach_net("user"),
    lambda vm: vm.detach("disk"),
    lambda vm: vm.irq_line(4, True),
    lambda vm: vm.irq_source(4),
]


def test_recorded_guest_is_not_changed_by_hand(waiting: Machine) -> None:
    for change in [*CHANGES, *DEBUGGING]:
        with pytest.raises(MachineStateError, match="cannot be: the machine records; do it to a"):
            change(waiting)
    for write in WRITES:
        with pytest.raises(MachineStateError, match="the machine records, and runs; pause it"):
            write(waiting)
    with waiting.paused(), pytest.raises(MachineStateError, match="the machine records"):
        set_register(waiting)
    waiting.kill()
    assert waiting.recording is not None
    assert waiting.recording.kind == "recorded"


def test_what_is_written_while_a_recorded_machine_is_paused_lives_again(
    waiting: Machine, tmp_path: Path
) -> None:
    with waiting.paused():
        write_memory(waiting)
    waiting.wait(LIMIT_S)
    assert waiting.console.text == "!"
    with Machine(replay=tmp_path / "waits") as vm:
        vm.run(LIMIT_S)
        assert vm.console.text == "!"


def test_halt_with_interrupts_off_ends_a_recorded_guest_too(
    waiting: Machine, tmp_path: Path
) -> None:
    with waiting.paused():
        write_memory(waiting)
    assert waiting.wait(LIMIT_S).detail == "halted forever with interrupts off"


def test_guest_with_more_code_than_is_kept_lives_again(tmp_path: Path) -> None:
    """Its translations go where they went when it was recorded."""
    kernel = tmp_path / "kernel"
    # mov al, 0xf4 ; mov [0x800000], al ; mov eax, 0x1000 ; jmp 0x200000: from there on it is
    # three million times add [eax], al, and then HLT.
    code = bytes.fromhex("b0f4 a200008000 b800100000 e9efff0f00")
    kernel.write_bytes(pvh_kernel(code))
    with Machine(engine="bt", kernel=kernel, memory="16M", record=tmp_path / "long") as vm:
        assert vm.run(LIMIT_S).detail == "halted forever with interrupts off"
        recorded = vm.recording
    assert recorded is not None
    assert recorded.count == 5 + 3 * (1 << 20)
    assert live_again(tmp_path / "long") == ("", 0)


def test_guest_that_lives_again_is_not_changed(waiting: Machine, tmp_path: Path) -> None:
    waiting.kill()
    with Machine(replay=tmp_path / "waits") as vm:
        for change in [*CHANGES, *WRITES, *DEVICES]:
            with pytest.raises(MachineStateError, match="cannot be: the machine replays"):
                change(vm)


def test_qmp_refuses_what_would_change_a_recorded_guest(waiting: Machine, tmp_path: Path) -> None:
    waiting.serve_control(tmp_path / "control")
    with Client(tmp_path / "control") as client:
        with pytest.raises(ControlError, match="the machine records"):
            client.execute("system_reset")
        image = client.execute("x-xsave", {"cpu-index": 0})
        client.execute("stop")
        for command, arguments in (
            ("x-registers", {"set": {"rax": 1}}),
            ("x-xsave", {"set": image}),
            ("x-msr", {"index": 0x174, "set": 1}),
        ):
            with pytest.raises(ControlError, match="the machine records"):
                client.execute(command, {"cpu-index": 0, **arguments})
        client.execute("cont")


def test_qmp_has_no_devices_for_a_guest_that_lives_again(waiting: Machine, tmp_path: Path) -> None:
    waiting.kill()
    with Machine(replay=tmp_path / "waits", control=tmp_path / "control") as vm:
        with Client(tmp_path / "control") as client:
            for command, arguments in (
                ("system_powerdown", {}),
                ("system_reset", {}),
                ("device_add", {"driver": "virtio-rng-pci"}),
                ("netdev_add", {"type": "user", "id": "net"}),
            ):
                with pytest.raises(ControlError, match="the machine replays"):
                    client.execute(command, arguments)
        assert vm.phase is Phase.MADE
