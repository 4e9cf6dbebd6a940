"""``tetrarch run``: one machine between this terminal and its end."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tetrarch._native import EngineError
from tetrarch.cli.cloud import with_seed
from tetrarch.cli.command import run_command
from tetrarch.cli.entry import FAILURE, report_error
from tetrarch.cli.reports import report_end
from tetrarch.cli.resume import resumed_by_signal
from tetrarch.console import ConsoleBackend
from tetrarch.console.spec import ConsoleSpec
from tetrarch.errors import HostError
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.engine_vm import engine_cause, engine_mend
from tetrarch.machine.guest import check_files, resolve_guest, with_installed_disk
from tetrarch.machine.machine import Machine
from tetrarch.machine.selection import choose
from tetrarch.machine.status import ExitStatus, StopReason

if TYPE_CHECKING:
    from tetrarch.cli.options import CommandOptions
    from tetrarch.images import Reporter

__all__ = ["run_guest"]

_STDIO = ConsoleSpec("stdio")


# With --debug-exit the odd codes are the guest's. Each of ours that is odd has an even one there.
_CODES_BESIDE_DEBUG_EXIT = {FAILURE: 4, ExitStatus(StopReason.CRASHED).code: 6}


def run_guest(config: MachineConfig, options: CommandOptions) -> int:
    """Runs the guest to its end; the exit code."""
    with with_seed(with_installed_disk(config), options) as config:
        return run_command(config, options) if options.command else _run_to_end(config, options)


def _run_to_end(config: MachineConfig, options: CommandOptions) -> int:
    if not config.debug_exit:
        return _run(config, options).code
    try:
        status = _run(config, options)
    except Exception as error:
        code = report_error(error)
    else:
        code = status.code
        if status.reason is StopReason.DEBUG_EXIT:
            return code
    return _CODES_BESIDE_DEBUG_EXIT.get(code, code)


def _run(config: MachineConfig, options: CommandOptions) -> ExitStatus:
    # What is wrong with the options is said before anything is fetched or opened.
    choose(config.engine, config.cpus)
    check_files(config)
    config = resolve_guest(config, _reporter())
    on_stdio = any(port.console == _STDIO for port in config.virtio_console)
    console = (config.console or (ConsoleSpec("none") if on_stdio else _STDIO)).open()
    interactive = (on_stdio and os.isatty(0)) or _is_interactive(console)
    try:
        machine = Machine(config, console=console)
        machine.load()
        _say_start(machine, interactive)
        with resumed_by_signal(machine):
            status = machine.run(options.timeout)
    except EngineError as error:
        raise HostError(
            f"the engine failed: {engine_cause(error)}",
            mend=engine_mend(error, "please report it"),
        ) from error
    finally:
        console.close()
    _say_end(status, interactive)
    report_end(machine, status, options)
    return status


def _reporter() -> Reporter:
    from tetrarch.images.progress import TerminalReporter

    return TerminalReporter()


def _say_start(machine: Machine, interactive: bool) -> None:
    leave = "; Ctrl-] leaves" if interactive else ""
    _say(f"tetrarch: engine {machine.engine} ({machine.engine_reason}){leave}")
    if machine.gdb is not None:
        _say(f"tetrarch: gdb: target remote {machine.gdb.address}")


def _say_end(status: ExitStatus, interactive: bool) -> None:
    # A guest seldom ends its last line.
    start = "\n" if interactive else ""
    if status.reason in (StopReason.CRASHED, StopReason.TIMEOUT, StopReason.STOPPED):
        option = " (--timeout)" if status.reason is StopReason.TIMEOUT else ""
        _say(f"{start}tetrarch: {status}{option}")
    if status.dump:
        _say(status.dump.rstrip())


def _is_interactive(console: ConsoleBackend) -> bool:
    return bool(getattr(console, "interactive", False))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
