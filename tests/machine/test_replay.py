"""A guest that was recorded lives again: the same memory and registers at each checkpoint, with
none of its devices."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tetrarch import Machine
from tetrarch.errors import ConfigError, HostError, StateError
from tetrarch.images import CachedGuest
from tetrarch.machine.status import StopReason

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


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"engine": "kvm"}, "engine kvm cannot do that"),
        ({"cpus": 2}, "a machine with 2 CPUs"),
        ({"share": "."}, "a share"),
        ({"vsock": "v"}, "a vsock device"),
        ({"input": "mouse"}, "an input device"),
        ({"gdb": 0}, "a place for gdb"),
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
    with pytest.raises(HostError, match="No space left"):
        Machine(engine="bt", record="/dev/full")
