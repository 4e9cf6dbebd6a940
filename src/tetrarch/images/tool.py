"""Programs of the system that make disks: where they are, and running them to their end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tetrarch.errors import ImageError

__all__ = ["end_group", "find_tool", "run_tool", "start_group"]

# What ends on request does so at once, or has something to clear away.
_END_S = 10
# So much of what a program says is kept to tell why it failed.
_LINES_MAX = 500

_SPACE_SIGNS = ("No space left on device", "enough free space", "Disk quota exceeded")
_NAMESPACE_SIGNS = ("newuidmap", "newgidmap", "unshare failed", "uid_map", "/etc/subuid")
_NETWORK_SIGNS = (
    "Temporary failure resolving",
    "Could not resolve",
    "Could not connect",
    "Unable to connect",
    "Connection timed out",
    "Connection failed",
    "Network is unreachable",
)


def find_tool(program: str, package: str) -> str:
    """Raises ImageError where it is missing. Users' paths often lack the sbin directories."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = shutil.which(program, path=path)
    if found is None:
        raise ImageError(f"{program} is missing", f"install it: apt-get install {package}")
    return found


def run_tool(
    command: Sequence[str],
    what: str,
    text: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] = lambda line: None,
) -> None:
    """Runs a program with ``text`` as its input. ``on_line`` hears each line that it says.

    Raises ImageError with what it complains. It ends with us, and its helpers do.
    """
    try:
        process = start_group(
            command,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ImageError(f"{what}: {error.strerror}", f"look into {command[0]}") from error
    said = deque[str](maxlen=_LINES_MAX)
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            # One that does not want it all says why.
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(text)
            process.stdin = None  # end_group looks at it
            for line in process.stdout:
                said.append(line.strip())
                on_line(line.strip())
            process.wait()
        except BaseException:
            end_group(process)
            raise
    if process.returncode != 0:
        cause = _complaint([line for line in said if line])
        raise ImageError(f"{what}: {cause or f'exit code {process.returncode}'}", _mend(said))


def _complaint(lines: list[str]) -> str:
    """The first error that apt or dpkg tell, else the last line."""
    for prefix in ("E: ", "dpkg: error"):
        for line in lines:
            if line.startswith(prefix):
                return line.removeprefix("E: ").rstrip(".")
    return lines[-1] if lines else ""


def _mend(said: Sequence[str]) -> str:
    def has(signs: Sequence[str]) -> bool:
        return any(sign in line for line in said for sign in signs)

    if has(_SPACE_SIGNS):
        return "free some space, or name another directory to unpack in: TMPDIR"
    if has(_NAMESPACE_SIGNS):
        return (
            "user namespaces are needed: apt-get install uidmap, a line for you in /etc/subuid and "
            "/etc/subgid, and sysctl kernel.unprivileged_userns_clone=1; or be root"
        )
    if has(_NETWORK_SIGNS):
        return "check the network"
    if has(["Unable to locate package", "has no installation candidate"]):
        return "see how Debian calls it: packages.debian.org"
    if any("Version '" in line and "was not found" in line for line in said):
        return "the mirror has a newer one: build without --packages-from"
    return ""


def start_group(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a program that leads a session, so that none of its helpers finds the terminal.

    On a thread of its own: what a signal raises comes up on the main one, and so not between a
    program that runs already and us.
    """
    started = list[subprocess.Popen[str]]()
    try:
        with ThreadPoolExecutor(1) as starter:
            starter.submit(
                lambda: started.append(subprocess.Popen(command, start_new_session=True, **options))
            ).result()
    except BaseException:
        for process in started:
            end_group(process)
        raise
    return started[0]


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends a program that leads a session, with its helpers, which hold its pipes: by request,
    else by force."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.communicate(timeout=_END_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return
