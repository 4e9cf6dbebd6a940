"""``tetrarch run NAME -- COMMAND``: one command in a guest, and then the guest ends."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch.agent import AgentError, connect
from tetrarch.agent.command import run_here, run_quietly
from tetrarch.cli import jail
from tetrarch.cli.registered import describe
from tetrarch.cli.reports import report_end
from tetrarch.cli.resume import resumed_by_signal
from tetrarch.console import MemoryConsole
from tetrarch.errors import ConfigError, HostError
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.guest import check_files, resolve_guest
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.machine import Machine
from tetrarch.machine.selection import chosen
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.registry import Claim
from tetrarch.sockets import SocketDirectory

if TYPE_CHECKING:
    from tetrarch.cli.options import CommandOptions

__all__ = ["run_command"]

#: How long a guest may take until its agent answers, and to switch itself off.
_BOOT_S = 300.0
_POWER_OFF_S = 90.0
_LAST_LINES = 12


def run_command(config: MachineConfig, options: CommandOptions, claim: Claim | None) -> int:
    """The exit code of the command; ours where the guest does not come so far."""
    from tetrarch.images.progress import TerminalReporter

    if config.console is not None:
        raise ConfigError(
            "with a command the guest's console is not shown", mend="leave --console out"
        )
    chosen(config)
    check_files(config)
    config = resolve_guest(config, TerminalReporter())
    # A confined process could not remove a directory that has none of its sockets.
    with SocketDirectory() if config.vsock is None else nullcontext(Path()) as folder:
        path = config.vsock or folder / "vsock"
        # For a container image on a disk: its own command is not to run (crates/agent/src/init.rs).
        words = f"{config.append_extra} tetrarch.command".strip()
        # A guest that resets itself has lost the command.
        ends = config.on_reset or "end"
        config = config.model_copy(update={"vsock": path, "append_extra": words, "on_reset": ends})
        console = MemoryConsole()
        jailed = jail.prepare(config, options)
        with Machine(config, console=console) as machine, resumed_by_signal(machine):
            if jailed:
                jail.seal(machine, options, claim)
            machine.start()
            if claim is not None:
                describe(claim, machine, console)
            try:
                status, code = _run(machine, path, options)
            except AgentError as error:
                if (end := _ended(machine)) is not None and end.code != 0:
                    raise AgentError(f"{error.cause} ({end})", _last_words(console)) from error
                raise AgentError(error.cause, _last_words(console) or error.mend) from error
            report_end(machine, status, options, code)
            return code


def _run(machine: Machine, path: Path, options: CommandOptions) -> tuple[ExitStatus, int]:
    """How the machine ended, and the exit code."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        machine.request_stop()

    timer = threading.Timer(options.timeout or threading.TIMEOUT_MAX, stop)
    timer.daemon = True
    if options.timeout is not None:
        timer.start()
    try:
        with connect(path, _BOOT_S, lambda: machine.phase is not Phase.ENDED) as stream:
            code = run_here(stream, options.command)
    except AgentError:
        if not late.is_set():
            raise
        status = ExitStatus(StopReason.TIMEOUT, f"{options.timeout:g} s passed")
        print(f"tetrarch: {status} (--timeout)", file=sys.stderr)
        return status, status.code
    except (OSError, HostError):
        # Nobody takes the output any more: no reason to lose what the guest has in memory.
        _power_off(machine, path)
        raise
    finally:
        timer.cancel()
    _power_off(machine, path)
    return machine.wait(), code


def _power_off(machine: Machine, path: Path) -> None:
    """As its user would: what the guest has in memory goes to its disks."""
    try:
        with connect(path, 10, lambda: machine.phase is not Phase.ENDED) as stream:
            run_quietly(stream, ["poweroff"])
    except AgentError:
        pass  # it is on its way
    try:
        machine.wait(_POWER_OFF_S)
    except TimeoutError:
        print("tetrarch: the guest does not switch itself off, and is stopped", file=sys.stderr)
        machine.kill()


def _ended(machine: Machine) -> ExitStatus | None:
    try:
        return machine.wait(2)
    except TimeoutError:
        return None


def _last_words(console: MemoryConsole) -> str:
    lines = [line.strip() for line in console.read().splitlines() if line.strip()]
    return f"its console said: {' / '.join(lines[-_LAST_LINES:])}" if lines else ""
