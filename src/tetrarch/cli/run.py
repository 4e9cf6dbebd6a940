"""``tetrarch run``: one machine between this terminal and its end."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch._native import EngineError
from tetrarch.cli import jail
from tetrarch.cli.cloud import with_seed
from tetrarch.cli.failure import FAILURE, harmless, report_error
from tetrarch.cli.registered import describe, registered
from tetrarch.cli.reports import report_end
from tetrarch.cli.resume import resumed_by_signal
from tetrarch.console import ConsoleBackend, NullConsole
from tetrarch.console.shared import SharedConsole
from tetrarch.console.spec import ConsoleSpec
from tetrarch.errors import ConfigError, HostError
from tetrarch.machine.config import MIB, MachineConfig
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.guest import check_files, resolve_guest, with_installed_disk
from tetrarch.machine.machine import Machine
from tetrarch.machine.selection import chosen
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.registry import Claim

if TYPE_CHECKING:
    from tetrarch.cli.detach import Shell
    from tetrarch.cli.options import CommandOptions
    from tetrarch.images import Reporter

__all__ = ["run_guest"]

_STDIO = ConsoleSpec("stdio")
_LAST_LINES = 20


# With --debug-exit the odd codes are the guest's. Each of ours that is odd has an even one there.
_CODES_BESIDE_DEBUG_EXIT = {FAILURE: 4, ExitStatus(StopReason.CRASHED).code: 6}


def run_guest(config: MachineConfig, options: CommandOptions) -> int:
    """Runs the guest to its end, or in the background; the exit code."""
    if options.restore is not None:
        from tetrarch.cli.restore import check_restore

        check_restore(config, options)
    if options.command and (config.record or config.replay):
        raise ConfigError(
            f"--{'record' if config.record else 'replay'} and a command do not go together:"
            " it comes by a device that cannot be recorded",
            mend="type it at the guest's console",
        )
    if not options.detach:
        return _run_registered(config, options, None)
    _check_background(config, options)
    from tetrarch.cli.detach import in_background

    return in_background(lambda shell: _run_registered(config, options, shell))


def _check_background(config: MachineConfig, options: CommandOptions) -> None:
    if options.command:
        raise ConfigError(
            "--detach and a command do not go together",
            mend="start the machine, then run the command in it with tetrarch exec",
        )
    if _STDIO in (config.console, *(port.console for port in config.virtio_console)):
        raise ConfigError(
            "a machine in the background has no stdio",
            mend="leave the console out: tetrarch console shows it",
        )


def _run_registered(config: MachineConfig, options: CommandOptions, shell: Shell | None) -> int:
    with registered(config, options.detach, options.restore) as (config, claim):
        if options.restore is not None:
            from tetrarch.cli.restore import with_own_vsock

            with with_own_vsock(options.restore, config) as config:
                return _run_to_end(config, options, claim, shell)
        folder = None if claim is None else claim.directory
        config = _with_disk(config)
        if options.snapshot:
            config = _forgetful(config)
        with with_seed(config, options, folder) as config:
            if options.command:
                from tetrarch.cli.command import run_command

                return run_command(config, options, claim)
            return _run_to_end(config, options, claim, shell)


def _with_disk(config: MachineConfig) -> MachineConfig:
    """With the disk of its image's name."""
    found = with_installed_disk(config)
    if found is not config:
        _say_if_there_are_two(str(config.image), found.disk[0].path)
    return found


def _say_if_there_are_two(name: str, disk: Path) -> None:
    from tetrarch.images.cache import Cache

    if Cache().find(name) is not None:
        _say(f"tetrarch: {name} is the disk {disk} here, and not the cached guest of that name")


def _forgetful(config: MachineConfig) -> MachineConfig:
    """With disks that lose at the end what the guest has written."""
    if not config.disk:
        what = "a guest without a disk" if config.image is None else f"the guest {config.image}"
        raise ConfigError(
            f"--snapshot: {what} keeps nothing that it writes",
            mend="leave it out, or name a disk of image build or with --disk",
        )
    for disk in config.disk:
        if disk.vhost_user:
            raise ConfigError(
                f"--snapshot: what the guest writes to {disk} is kept by who serves it",
                mend="give that process a copy, and leave --snapshot out",
            )
    disks = tuple(replace(disk, snapshot=not disk.readonly) for disk in config.disk)
    return config.model_copy(update={"disk": disks})


def _run_to_end(
    config: MachineConfig, options: CommandOptions, claim: Claim | None, shell: Shell | None
) -> int:
    if not config.debug_exit:
        return _run(config, options, claim, shell).code
    try:
        status = _run(config, options, claim, shell)
    except Exception as error:
        code = report_error(error)
    else:
        code = status.code
        if status.reason is StopReason.DEBUG_EXIT:
            return code
    return _CODES_BESIDE_DEBUG_EXIT.get(code, code)


def _run(
    config: MachineConfig, options: CommandOptions, claim: Claim | None, shell: Shell | None
) -> ExitStatus:
    # What is wrong with the options is said before anything is fetched or opened.
    chosen(config)
    check_files(config)
    if options.restore is None and config.kernel is None:
        name, config = config.image, resolve_guest(config, _reporter())
        if name is not None and config.image is None:
            _say(f"tetrarch: {name} is a cached guest (busybox in memory); no disk has that name")
    jailed = jail.prepare(config, options)
    console = _open_console(config, claim, shell is not None)
    interactive = _is_interactive(console) or (_has_port_on_stdio(config) and os.isatty(0))
    try:
        if options.restore is not None:
            from tetrarch.cli.restore import restored

            machine = restored(options.restore, config, options, console)
        else:
            machine = Machine(config, console=console)
            machine.load()
        if jailed:
            jail.seal(machine, options, claim)
        _say_start(machine, interactive)
        with resumed_by_signal(machine), machine:
            machine.start()
            if claim is not None:
                describe(claim, machine, console)
            if shell is not None and claim is not None:
                shell.release(claim)
            status = machine.finish(options.timeout)
    except EngineError as error:
        raise HostError(
            f"the engine failed: {engine_cause(error)}",
            mend=engine_mend(error, "please report it"),
        ) from error
    finally:
        console.close()
    if shell is None:
        _say_end(status, interactive)
        if status.reason is StopReason.RESET and config.on_reset is None:
            _say(f"tetrarch: {status}")
    else:
        _log_end(status, console)
    _say_recording(machine)
    report_end(machine, status, options)
    return status


def _say_recording(machine: Machine) -> None:
    end, config = machine.recording, machine.config
    if end is None:
        return
    if end.kind == "recorded":
        size = f"{end.written / MIB:.1f} MiB"
        _say(f"tetrarch: recorded {end.count} instructions in {config.record}, {size}")
        return
    cut = "; its recorder died here" if end.kind == "cut" else ""
    alike = "1 checkpoint" if end.count == 1 else f"{end.count} checkpoints"
    _say(f"tetrarch: replayed {config.replay}: {alike} alike{cut}")


def _has_port_on_stdio(config: MachineConfig) -> bool:
    return any(port.console == _STDIO for port in config.virtio_console)


def _open_console(config: MachineConfig, claim: Claim | None, background: bool) -> ConsoleBackend:
    """What a machine with a name has on this terminal, or on none, is for others to join."""
    if config.console is not None and config.console != _STDIO:
        return config.console.open()
    own = not background and (config.console is not None or not _has_port_on_stdio(config))
    inner = _STDIO.open() if own else None
    if claim is not None:
        return SharedConsole(claim.socket("console"), inner)
    return inner or NullConsole()


def _reporter() -> Reporter:
    from tetrarch.images.progress import TerminalReporter

    return TerminalReporter()


def _say_start(machine: Machine, interactive: bool) -> None:
    leave = "; Ctrl-] leaves" if interactive else ""
    _say(f"tetrarch: engine {machine.engine} ({machine.engine_reason}){leave}")
    if machine.gdb is not None:
        _say(f"tetrarch: gdb: target remote {machine.gdb.address}")
    if machine.display is not None:
        _say(f"tetrarch: display: vnc={machine.display.address}")


def _say_end(status: ExitStatus, interactive: bool) -> None:
    # A guest seldom ends its last line.
    start = "\n" if interactive else ""
    if status.reason in (StopReason.CRASHED, StopReason.TIMEOUT, StopReason.STOPPED):
        option = " (--timeout)" if status.reason is StopReason.TIMEOUT else ""
        _say(f"{start}tetrarch: {status}{option}")
    if status.dump:
        _say(status.dump.rstrip())


def _log_end(status: ExitStatus, console: ConsoleBackend) -> None:
    """A machine in the background leaves nothing else behind."""
    _say(f"tetrarch: {status}")
    if status.dump:
        _say(status.dump.rstrip())
    if not status.ok and isinstance(console, SharedConsole):
        for line in console.text.splitlines()[-_LAST_LINES:]:
            _say(f"console: {harmless(line.expandtabs())}")


def _is_interactive(console: ConsoleBackend) -> bool:
    return bool(getattr(console, "interactive", False))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
