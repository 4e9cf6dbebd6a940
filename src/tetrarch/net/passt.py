"""passt(1): a network of the host's own connections, without rights.

The guest's frames go to passt over a pair of sockets, and passt speaks TCP and UDP to the
network as any program of the user. Its end is ours: it ends when the card closes the socket.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tetrarch._files import ScratchDirectory
from tetrarch.errors import HostError
from tetrarch.net.spec import Forward

__all__ = ["Passt"]

# It starts within milliseconds; a host that swaps takes longer.
_START_S = 30.0
_END_S = 5.0
# What it says on every start as root, or where the host has no syslog, tells nothing.
_NOISE = ("Failed to send", "Don't run as root", "Started as root")


class Passt:
    """One that runs. ``ended`` is called, on a thread of its own, if it ends before ``close``."""

    def __init__(self, forwards: Iterable[Forward], ended: Callable[[str], object]) -> None:
        """Raises HostError where there is none, or it cannot do what is asked."""
        forwards = tuple(forwards)
        program = shutil.which("passt")
        if program is None:
            raise HostError(
                "this host has no passt, which a user network needs",
                mend="install it (Debian: apt-get install passt), or use tap=NAME",
            )
        _check_ports(forwards)
        self._ended = ended
        self._closing = False
        self._words: deque[str] = deque(maxlen=20)
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _start(program, theirs, forwards, self._words)
        except BaseException:
            self.socket.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="passt", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """Ends it. The card has closed its end before."""
        self._closing = True
        self.socket.close()
        self._process.terminate()
        self._keeper.join(_END_S)
        if self._keeper.is_alive():
            self._process.kill()
            self._keeper.join(_END_S)

    def _keep(self) -> None:
        with self._process as process:
            _listen(process, self._words)
            code = process.wait()
        if not self._closing:
            self._ended(f"passt has ended {_how(code)}{_saying(self._words)}")


def _start(
    program: str, theirs: socket.socket, forwards: Iterable[Forward], words: deque[str]
) -> subprocess.Popen[str]:
    """It is ready when it has written its number to a file (passt(1), --pid): to a pipe."""
    with ScratchDirectory(prefix="tetrarch-") as name:
        # As root it changes to nobody before.
        os.chmod(name, 0o711)
        ready = Path(name) / "ready"
        os.mkfifo(ready)
        ready.chmod(0o622)
        reader = os.open(ready, os.O_RDONLY | os.O_NONBLOCK)
        try:
            arguments = ["--foreground", "--quiet", "--stderr", "--pid", str(ready)]
            arguments += ["--fd", str(theirs.fileno())]
            for forward in forwards:
                arguments += ["--tcp-ports", f"{forward.host}/{forward.port}:{forward.guest}"]
            process = subprocess.Popen(
                [program, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # A terminal's Ctrl-C is for the guest.
                start_new_session=True,
            )
            try:
                if _is_ready(process, reader):
                    return process
                code = process.poll()
                _kill(process)
                _listen(process, words)
                process.wait()
            except BaseException:
                _kill(process)
                process.wait()
                raise
        except OSError as error:
            raise HostError(
                f"passt cannot be started: {error.strerror or error}", mend="install it anew"
            ) from error
        finally:
            os.close(reader)
    why = f" within {_START_S:g} s" if code is None else f": it ended {_how(code)}"
    raise HostError(
        f"passt did not start{_saying(words) or why}",
        mend="give what it asks for, or use tap=NAME; passt(1) describes it",
    )


def _kill(process: subprocess.Popen[str]) -> None:
    """With what it has started, where it is a script around the program."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _is_ready(process: subprocess.Popen[str], reader: int) -> bool:
    """False: it has ended, or took too long."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    end = os.pidfd_open(process.pid)
    try:
        poll.register(end, select.POLLIN)
        # Ends with either; a writer that opens the pipe and goes is one that has ended.
        events = dict(poll.poll(_START_S * 1000))
        return bool(events.get(reader, 0) & select.POLLIN)
    finally:
        os.close(end)


def _listen(process: subprocess.Popen[str], words: deque[str]) -> None:
    """Keeps the last of what it says, to its end."""
    assert process.stderr is not None
    for line in process.stderr:
        if (text := line.strip()) and not text.startswith(_NOISE):
            words.append(text)
    process.stderr.close()


def _how(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with code {code}"


def _saying(words: deque[str]) -> str:
    return f": {words[-1]}" if words else ""


def _check_ports(forwards: Iterable[Forward]) -> None:
    """passt itself is content with one of several."""
    for forward in forwards:
        family = socket.AF_INET6 if ":" in forward.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((forward.host, forward.port))
                probe.listen(1)
            except OSError as error:
                raise HostError(
                    f"cannot forward port {forward.port} of {forward.host}: {error.strerror}",
                    mend=_MENDS.get(error.errno or 0, "forward another"),
                ) from error


_MENDS = {
    errno.EADDRINUSE: "another program has it: forward another, as in forward=2223:22",
    errno.EACCES: "forward one from 1024 on",
    errno.EADDRNOTAVAIL: "name an address of this host, or 0.0.0.0 for all",
}
