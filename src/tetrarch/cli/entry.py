"""From the shell to a command and back: arguments, signals, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from copy import copy
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tetrarch.cli.failure import Terminated, fail, report_error

if TYPE_CHECKING:
    from typer import Typer

__all__ = ["main", "run_cli"]

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> NoReturn:
    """The console script."""
    _open_standard_files()
    for signum in _ENDING_SIGNALS:
        # A job in the background has SIGINT ignored, and nohup SIGHUP.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _terminate)
    code = run_cli(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # else whoever read us has gone, and knows
            code = code or fail(
                f"standard output cannot be written: {error.strerror}; open it to a file with room"
            )
        # The interpreter would complain at its exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _open_standard_files() -> None:
    """Gives a closed standard input, output or error to /dev/null.

    Else the next file that is opened gets its number, guest memory for one, and
    what is meant for the terminal would go there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    # Python leaves None for a closed one, and print(file=None) is standard output. A report that
    # nobody can read is an error, as with the closed one: this file cannot be written.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def run_cli(arguments: Sequence[str]) -> int:
    """Runs one command; the exit code."""
    # Imports take a while, in which a signal may come too.
    try:
        _log_to_standard_error()
        return _run_command(arguments)
    except BaseException as error:
        return report_error(error)


def _run_command(arguments: Sequence[str]) -> int:
    from typer.exceptions import Exit
    from typer.main import get_command

    from tetrarch.cli.completion import answer_shells
    from tetrarch.cli.options import split_command

    answer_shells()
    command = get_command(_app_for(arguments[:1]))
    try:
        result = command.main(split_command(arguments), prog_name="tetrarch", standalone_mode=False)
    except Exit as request:
        return request.exit_code
    return result if isinstance(result, int) else 0


def _app_for(words: Sequence[str]) -> Typer:
    """With the command alone that the first word names, if it names one: typer takes longer to
    make all of them than a machine takes to be restored."""
    from typer.main import get_command_name

    from tetrarch.cli.app import app

    for info in app.registered_commands:
        if info.callback is not None:
            name = info.name or get_command_name(info.callback.__name__)
            if [name] == list(words):
                alone = copy(app)
                alone.registered_commands, alone.registered_groups = [info], []
                return alone
    return app


class _Line(logging.Formatter):
    """One line, as ours are; that of a machine has the machine's name."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if hasattr(record, "machine") else f"tetrarch: {line}"


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Line("%(message)s"))
    logging.getLogger("tetrarch").addHandler(handler)


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Once is enough: what follows restores the terminal and must not be cut short.
    for other in _ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Terminated(signum)
