"""From the shell to a command and back: arguments, errors, exit codes.

Whatever goes wrong reaches the user as one line on standard error and as the
exit code: 1 for an error of ours or of the host, 2 for bad usage, 128 + N for
signal N. What a guest's end gives is in machine/status.py. With
TETRARCH_DEBUG=1 in the environment a traceback comes before the line.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

__all__ = ["FAILURE", "Terminated", "fail", "main", "report_error", "run_cli"]

FAILURE = 1
BAD_USAGE = 2
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """A signal asked us to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


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

    from tetrarch.cli.app import app
    from tetrarch.cli.completion import answer_shells
    from tetrarch.cli.options import split_command

    answer_shells()
    command = get_command(app)
    try:
        result = command.main(split_command(arguments), prog_name="tetrarch", standalone_mode=False)
    except Exit as request:
        return request.exit_code
    return result if isinstance(result, int) else 0


def report_error(error: BaseException) -> int:
    """Says in one line what ended a command; the exit code."""
    if isinstance(error, Terminated):  # in an import, perhaps: no other before this is said
        return fail(f"ended by {signal.Signals(error.signum).name}", 128 + error.signum)
    from typer.exceptions import Abort, TyperException

    from tetrarch.errors import ConfigError, TetrarchError

    match error:
        case TyperException():
            return _usage_error(error)
        case ConfigError():
            return fail(str(error), BAD_USAGE)
        case TetrarchError():
            return fail(str(error))
        case KeyboardInterrupt() | Abort():
            return fail("ended by SIGINT", 128 + signal.SIGINT)
        case BrokenPipeError():
            return 128 + signal.SIGPIPE
        case MemoryError():
            return fail(
                "the host gives no more memory; free some, or raise the limit: ulimit -v, -d"
            )
        case RuntimeError(args=("can't start new thread",)):  # Python's own, of no kind
            return fail(f"{error}; raise the limits of processes and memory: ulimit -u, -v, -d")
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            return fail(f"{error.strerror}; raise the limit: ulimit -n")
        case OSError(errno=errno.ENOMEM | errno.EAGAIN):
            return fail(f"{error.strerror}; free memory, or raise the limits: ulimit -a shows them")
        case OSError():
            named = f"{error.filename}: " if error.filename else ""
            return fail(f"{named}{error.strerror or error}; check the file system and its rights")
        case Exception():
            return fail(
                f"internal error: {type(error).__name__}: {error}; "
                "please report it with what TETRARCH_DEBUG=1 shows"
            )
    raise error  # SystemExit and the like


class _Line(logging.Formatter):
    """One line, as ours are; that of a machine has the machine's name."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if hasattr(record, "machine") else f"tetrarch: {line}"


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Line("%(message)s"))
    logging.getLogger("tetrarch").addHandler(handler)


def fail(message: str, code: int = FAILURE) -> int:
    """Says what went wrong, in one line."""
    if os.environ.get("TETRARCH_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    print(f"tetrarch: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _usage_error(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tetrarch"
    message = getattr(error, "format_message", lambda: str(error))()
    if not message.strip():  # a bare "tetrarch": typer has printed the help
        return BAD_USAGE
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return BAD_USAGE
    return fail(f"{message.rstrip('.')}; see {command} --help", BAD_USAGE)


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Once is enough: what follows restores the terminal and must not be cut short.
    for other in _ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Terminated(signum)
