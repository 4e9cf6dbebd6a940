"""virtiofsd: who serves a directory to the guest, by vhost-user.

There are two: QEMU's, in C, up to version 7.2, and the one in Rust that followed it. Either is
given a socket to listen at, and ends when the device hangs up.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from tetrarch.errors import HostError
from tetrarch.share.spec import ShareSpec
from tetrarch.sockets import SocketDirectory

__all__ = ["Virtiofsd"]

#: Where distributions put it, beside PATH: Debian 13 and Fedora, Arch, Debian 12.
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
_CONFINED = Path(__file__).with_name("confined.py")
_CAP_SYS_ADMIN = 21
_END_S = 5.0


class Virtiofsd:
    """One that runs, and the socket to it."""

    def __init__(self, share: ShareSpec) -> None:
        """Raises HostError where there is none, or no such directory."""
        directory = _directory(share.directory)
        program = _find()
        self._directory = directory
        self._words: deque[str] = deque(maxlen=20)
        # In a directory of its own nobody else can connect; it is needed for a moment.
        with SocketDirectory() as private:
            path = f"{private}/virtiofsd"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(1)
                self.socket = socket.socket(socket.AF_UNIX)
                try:
                    self.socket.connect(path)
                    self._process = _start(program, directory, share.readonly, listener.fileno())
                except BaseException:
                    self.socket.close()
                    raise
        self._listener = threading.Thread(target=self._listen, name="virtiofsd", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def refused(self, cause: HostError) -> HostError:
        """The error of one that did not come to serve, in its own words if it had any."""
        self.close()
        said = self._words[-1] if self._words else f"{cause.cause} ({self._end()})"
        return HostError(
            f"cannot share {self._directory}: virtiofsd did not start: {said}",
            mend="name a directory below it"
            if self._directory == Path("/")
            else "give it what it asks for: where the user is not root, user namespaces, and for "
            "QEMU's virtiofsd newgidmap (apt-get install uidmap) and an entry in /etc/subgid",
        )

    def _end(self) -> str:
        code = self._process.returncode
        if code is None:
            return "it does not end either"
        return f"it ended by signal {-code}" if code < 0 else f"it ended with code {code}"

    def close(self) -> None:
        """Ends it. The device has hung up before."""
        self.socket.close()
        if not self._ended_soon():
            self._process.terminate()
            if not self._ended_soon():
                self._process.kill()
                self._ended_soon()
        self._listener.join(_END_S)

    def _ended_soon(self) -> bool:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _listen(self) -> None:
        """Keeps the last of what it says, to its end."""
        assert self._process.stderr is not None
        with self._process.stderr as said:
            for line in said:
                if text := line.strip():
                    self._words.append(text)


def _directory(path: Path) -> Path:
    try:
        directory = path.resolve(strict=True)
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(directory, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError as error:
        raise HostError(f"cannot share {path}: no such directory", mend="name one") from error
    except (OSError, RuntimeError) as error:  # the latter for links in a circle, before 3.13
        reason = error.strerror if isinstance(error, OSError) else os.strerror(errno.ELOOP)
        raise HostError(
            f"cannot share {path}: {reason}", mend="name a directory that you can read"
        ) from error
    return directory


def _find() -> str:
    for program in (shutil.which("virtiofsd"), *_PLACES):
        if program is not None and os.access(program, os.X_OK):
            return program
    raise HostError(
        "this host has no virtiofsd, which shares need",
        mend="install it (Debian 12: apt-get install qemu-system-common, later: virtiofsd)",
    )


def _start(program: str, directory: Path, readonly: bool, listener: int) -> subprocess.Popen[str]:
    arguments = [program, *_arguments(program, directory, listener)]
    if readonly or os.geteuid() != 0:
        confined = [sys.executable, "-I", str(_CONFINED), str(directory)]
        arguments = [*confined, "ro" if readonly else "rw", "--", *arguments]
    try:
        return subprocess.Popen(
            arguments,
            pass_fds=[listener],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd="/",
            # A terminal's Ctrl-C is for the guest.
            start_new_session=True,
        )
    except OSError as error:
        raise HostError(
            f"virtiofsd cannot be started: {error.strerror or error}", mend="install it anew"
        ) from error


def _arguments(program: str, directory: Path, listener: int) -> Sequence[str]:
    sandbox = "namespace" if os.geteuid() != 0 or _may_unshare() else "chroot"
    if _is_rust(program):
        return [
            f"--fd={listener}",
            f"--shared-dir={directory}",
            f"--sandbox={sandbox}",
            "--log-level=error",
        ]
    # Its options are separated by commas.
    source = str(directory).replace("\\", "\\\\").replace(",", "\\,")
    options = f"source={source},sandbox={sandbox},log_level=err"
    return ["-f", f"--fd={listener}", "-o", options]


def _is_rust(program: str) -> bool:
    try:
        said = subprocess.run(
            [program, "--help"], capture_output=True, text=True, errors="replace", timeout=_END_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no answer in {_END_S:g} s"
        raise HostError(f"{program} does not run: {reason}", mend="install it anew") from error
    return "--shared-dir" in said.stdout + said.stderr


def _may_unshare() -> bool:
    """Root in a container may not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False
