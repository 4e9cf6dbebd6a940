"""``tetrarch run``: one machine between this terminal and its end."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrarch._native import EngineError
from tetrarch.console import ConsoleBackend, NullConsole
from tetrarch.errors import ConfigError, HostError
from tetrarch.machine import ExitStatus, Machine, StopReason
from tetrarch.machine.config import make_config
from tetrarch.machine.selection import choose

__all__ = ["RunOptions", "open_console", "run_guest"]

# Longer runs need no timeout; far larger numbers overflow the host's clock.
_TIMEOUT_S_MAX = 366 * 24 * 3600.0


@dataclass(frozen=True)
class RunOptions:
    """The command line, as it was typed."""

    engine: str
    kernel: str | None
    initrd: str | None
    append: str | None
    image: str | None
    memory: str
    cpus: str
    console: str
    timeout: float | None
    debug_exit: bool
    name: str
    stats: bool
    json: bool


def run_guest(options: RunOptions) -> int:
    """Runs the guest to its end; the exit code."""
    timeout = options.timeout
    if timeout is not None and not 0 < timeout <= _TIMEOUT_S_MAX:
        raise ConfigError(f"--timeout: {timeout:g} is no time to wait", mend="give seconds above 0")
    if options.image is not None and options.kernel is not None:
        raise ConfigError("--image and --kernel both name a kernel", mend="give one of them")
    # What is wrong with the options is said before anything is fetched or opened.
    config = make_config(_machine_values(options))
    choose(config.engine, config.cpus)
    kind, path = parse_console(options.console)
    kernel, initrd = _guest_files(options)
    console = open_console(kind, path)
    try:
        machine = Machine(
            **{**_machine_values(options), "kernel": kernel, "initrd": initrd}, console=console
        )
        machine.load()
        _say_start(machine, console)
        status = machine.run(timeout)
    except EngineError as error:
        raise HostError(
            f"the engine failed: {error}", mend="if that does not help, please report it"
        ) from error
    finally:
        console.close()
    _say_end(status, console)
    if options.stats:
        from tetrarch.cli.reports import show_stats

        show_stats(machine.stats(), machine.uptime)
    if options.json:
        _say(json.dumps(_report(machine, status)))
    return status.code


def parse_console(text: str) -> tuple[str, Path | None]:
    """The kind of console and its path, from the option's value."""
    kind, equals, path = text.partition("=")
    if kind in ("stdio", "none") and not equals:
        return kind, None
    if kind in ("file", "socket") and path:
        return kind, Path(path)
    raise ConfigError(
        f"--console: {text!r} is no console",
        mend="there are stdio, none, file=PATH and socket=PATH",
    )


def open_console(kind: str, path: Path | None) -> ConsoleBackend:
    if path is not None:
        from tetrarch.console.files import FileConsole, SocketConsole

        return FileConsole(path) if kind == "file" else SocketConsole(path)
    if kind == "none":
        return NullConsole()
    from tetrarch.console.stdio import StdioConsole

    return StdioConsole()


def _machine_values(options: RunOptions) -> dict[str, Any]:
    return {
        "kernel": options.kernel,
        "initrd": options.initrd,
        "append": options.append,
        "memory": options.memory,
        "cpus": options.cpus,
        "engine": options.engine,
        "debug_exit": options.debug_exit,
        "name": options.name,
    }


def _guest_files(options: RunOptions) -> tuple[str | Path, str | Path | None]:
    if options.kernel is not None:
        return options.kernel, options.initrd
    from tetrarch import images

    name = options.image or images.DEFAULT_IMAGE
    guest = images.ensure(images.Cache(), name, images.TerminalReporter())
    return guest.kernel, options.initrd or guest.initrd


def _say_start(machine: Machine, console: ConsoleBackend) -> None:
    leave = "; Ctrl-] leaves" if _is_interactive(console) else ""
    _say(f"tetrarch: engine {machine.engine} ({machine.engine_reason}){leave}")


def _say_end(status: ExitStatus, console: ConsoleBackend) -> None:
    # A guest seldom ends its last line.
    start = "\n" if _is_interactive(console) else ""
    match status.reason:
        case StopReason.CRASHED:
            _say(f"{start}tetrarch: the guest crashed: {status.detail}")
            if status.dump:
                _say(status.dump.rstrip())
        case StopReason.TIMEOUT:
            _say(f"{start}tetrarch: the guest was stopped: {status.detail} (--timeout)")
        case StopReason.STOPPED:
            _say(f"{start}tetrarch: the guest was stopped: {status.detail}")
        case StopReason.DEBUG_EXIT | StopReason.POWERED_OFF | StopReason.RESET:
            pass


def _is_interactive(console: ConsoleBackend) -> bool:
    return bool(getattr(console, "interactive", False))


def _report(machine: Machine, status: ExitStatus) -> dict[str, Any]:
    return {
        "name": machine.config.name,
        "engine": machine.engine,
        "status": status.reason.value,
        "detail": status.detail,
        "exit_code": status.code,
        "uptime_s": round(machine.uptime, 6),
        "stats": machine.stats(),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
