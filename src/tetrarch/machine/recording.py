"""Recordings: what a machine needs to be recorded, and what one that lives again is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tetrarch import __version__
from tetrarch._files import open_regular, open_to_write
from tetrarch._native import EngineError, recorded_configuration
from tetrarch.errors import ConfigError, HostError, StateError
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.lifecycle import LifeCycle, Phase
from tetrarch.platforms.named import PLATFORMS

if TYPE_CHECKING:
    from tetrarch.machine.config import MachineConfig
    from tetrarch.machine.engine_vm import EngineVm

__all__ = [
    "Recording",
    "RecordingEnd",
    "check_recorded",
    "firmware_bytes",
    "forbid_untrue",
    "opened",
    "replayed",
]

#: About a second of a busy guest.
_CHECKPOINT_EVERY: Final = 1 << 30
#: Of a machine that lives again all else is in the recording.
_OWN: Final = {
    *("console", "control", "gdb", "gdb_wait", "name", "replay"),
    *("engine", "rng", "balloon", "memory"),
}

#: By both: the guest would be another one from then on.
_CHANGE_THE_GUEST: Final = {"reset", "save", "attach_virtio"}
_DEBUG: Final = {"serve_gdb", "breakpoint", "watchpoint"}
#: Nothing that devices do comes to a guest that lives again.
_ARE_DEVICES: Final = {
    "attach_disk",
    "attach_mmio",
    "attach_net",
    "attach_pci",
    "attach_ports",
    "detach",
    "irq_line",
    "irq_source",
    "plug_vcpu",
    "press_power_button",
}


@dataclass(frozen=True)
class RecordingEnd:
    """What became of a recording."""

    kind: str
    """recorded; replayed; or cut: replayed to where its recorder died."""
    count: int
    """recorded: instructions. Else checkpoints at which the machine was what it had been."""
    written: int
    """recorded: bytes."""


class Recording:
    """Ends what a machine records, or replays."""

    def __init__(self, vm: EngineVm) -> None:
        self._vm = vm
        self.end: RecordingEnd | None = None

    def finish(self) -> None:
        try:
            end = self._vm.end_recording()
        except EngineError as error:
            raise HostError(
                f"the recording is not whole: {engine_cause(error)}",
                mend=engine_mend(error, "record again"),
            ) from error
        self.end = None if end is None else RecordingEnd(*end)


def check_recorded(config: MachineConfig) -> None:
    """Raises ConfigError for what cannot be recorded, or replayed."""
    if config.record is None and config.replay is None:
        return
    option = "record" if config.replay is None else "replay"
    if config.record is not None and config.replay is not None:
        raise ConfigError("replay: it is not recorded again", mend="leave record out")
    if config.engine == "kvm":
        raise ConfigError(f"{option}: engine kvm cannot do that", mend="use engine bt")
    if config.replay is not None:
        given = sorted(config.model_fields_set - _OWN)
        changed = [name for name in given if _is_changed(config, name)]
        if changed:
            raise ConfigError(
                f"replay: {changed[0]} is given beside it, and all comes from the recording",
                mend=f"leave {changed[0]} out",
            )
        return
    for present, what in (
        (config.cpus.max > 1, f"{config.cpus.max} CPUs"),
        (config.chaos is not None, "chaos"),
        (any(disk.vhost_user for disk in config.disk), "a disk of another process"),
        (any(net.kind == "vhost-user" for net in config.net), "a network card of another process"),
        (bool(config.share), "a share, which is another process"),
        (config.vsock is not None, "a vsock device"),
        (bool(config.input), "an input device"),
        (str(config.cpu) != "host", "another CPU than the host's"),
        (config.gdb is not None, "a place for gdb"),
        (config.drawn_by == "svga", "the screen svga"),
        (config.display is not None, "a display"),
        (config.on_reset == "restart", "a restart at a reset"),
    ):
        if present:
            raise ConfigError(
                f"record: a machine with {what} cannot be recorded", mend="leave that out"
            )


def forbid_untrue(config: MachineConfig, life: LifeCycle) -> None:
    """Of a machine that records or replays: what would make the recording another's.

    Memory that is written while a machine that records is paused is part of the recording.
    """
    another = "do it to a machine that does not"
    begun = (Phase.RUNNING, Phase.PAUSED)
    if config.record is not None:
        life.forbid(_CHANGE_THE_GUEST | _DEBUG, "the machine records", another, tuple(Phase))
        life.forbid({"set_regs"}, "the machine records", another, begun)
        pause = "pause it meanwhile"
        life.forbid({"write_memory"}, "the machine records, and runs", pause, (Phase.RUNNING,))
    elif config.replay is not None:
        forbidden = _CHANGE_THE_GUEST | _ARE_DEVICES | {"set_regs", "write_memory"}
        life.forbid(forbidden, "the machine replays", another, tuple(Phase))


def _is_changed(config: MachineConfig, name: str) -> bool:
    return bool(getattr(config, name) != type(config).model_fields[name].default)


def replayed(config: MachineConfig) -> MachineConfig:
    """``config`` with what the recording says of its machine.

    Raises StateError where it is none of this version, HostError where it cannot be read,
    ConfigError for other memory than it has.
    """
    if config.replay is None:
        return config
    memory, platform, _ = _read(config.replay)
    if "memory" in config.model_fields_set and config.memory != memory:
        # Not among what cannot be given: a configuration that has been replayed has it.
        raise ConfigError(
            "replay: memory is given beside it, and all comes from the recording",
            mend="leave memory out",
        )
    changes: dict[str, Any] = {"engine": "bt", "memory": memory, "rng": False, "balloon": False}
    changes["platform"] = platform
    return config.model_copy(update=changes)


def firmware_bytes(config: MachineConfig) -> int:
    """How much of its firmware's image a machine that lives again has in memory."""
    return 0 if config.replay is None else _read(config.replay)[2]


def _read(path: Path) -> tuple[int, str, int]:
    """Bytes of memory, platform, and bytes of firmware of a recorded machine."""
    descriptor = _open(path, open_regular, "replay")
    try:
        about = json.loads(recorded_configuration(descriptor))
        memory, firmware = int(about["memory"]), int(about.get("firmware", 0))
        platform = about.get("platform", "pc")
        if platform not in PLATFORMS:
            raise ValueError(f"it has the platform {str(platform)[:64]!r}")
        if not 0 <= firmware < 1 << 32:
            raise ValueError(f"it has {firmware} bytes of firmware")
    except (
        EngineError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        RecursionError,
    ) as error:
        raise StateError(
            f"cannot replay {path}: {engine_cause(error)}",
            mend="name a file that --record has written",
        ) from error
    finally:
        os.close(descriptor)
    return memory, platform, firmware


@contextmanager
def opened(config: MachineConfig) -> Iterator[dict[str, Any]]:
    """What an engine's VM is made with to record or to replay; the files are open meanwhile."""
    if config.record is not None:
        # Its image is memory beside the machine's own, which a replay has to make.
        firmware = 0
        if config.firmware is not None:
            from tetrarch.firmware.image import FirmwareImage

            firmware = len(FirmwareImage.read(config.firmware).data)
        about = json.dumps(
            {
                "tetrarch": __version__,
                "memory": config.memory,
                "platform": config.platform,
                "firmware": firmware,
            }
        )
        # Of a machine that is gone: another's memory shall not be left behind it.
        descriptor = _open(config.record, _open_to_record, "record to")
        arguments: dict[str, Any] = {"record": (descriptor, about, _CHECKPOINT_EVERY)}
    elif config.replay is not None:
        descriptor = _open(config.replay, open_regular, "replay")
        arguments = {"replay": descriptor}
    else:
        yield {}
        return
    try:
        yield arguments
    finally:
        os.close(descriptor)


def _open_to_record(path: Path) -> int:
    with open_to_write(path, 0o600) as file:
        return os.dup(file.fileno())


def _open(path: Path, opener: Callable[[Path], int], what: str) -> int:
    try:
        return opener(path)
    except OSError as error:
        raise HostError(
            f"cannot {what} {path}: {error.strerror}", mend="name another file"
        ) from error
