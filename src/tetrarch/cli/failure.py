"""What a command that fails says, and its exit code.

Whatever goes wrong reaches the user as one line on standard error and as the
exit code: 1 for an error of ours or of the host, 2 for bad usage, 128 + N for
signal N. What a guest's end gives is in machine/status.py. With
TETRARCH_DEBUG=1 in the environment a traceback comes before the line.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

__all__ = ["FAILURE", "Terminated", "fail", "harmless", "in_one_line", "report_error"]

FAILURE = 1
BAD_USAGE = 2


class Terminated(BaseException):
    """A signal asked us to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


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
        case SystemExit(__context__=BrokenPipeError()):  # typer's of it has code 1
            return 128 + signal.SIGPIPE
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


def fail(message: str, code: int = FAILURE) -> int:
    """Says what went wrong, in one line."""
    if os.environ.get("TETRARCH_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    print(f"tetrarch: {in_one_line(message)}", file=sys.stderr, flush=True)
    return code


def in_one_line(message: str) -> str:
    """Without what a terminal obeys: names and words in it may be a guest's."""
    return harmless(" ".join(message.split()))


def harmless(line: str) -> str:
    """What a terminal would obey is spelled."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


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
