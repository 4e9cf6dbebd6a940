"""A network namespace for one test: an empty network of the host's own kernel."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import pytest

P = ParamSpec("P")

_CLONE_NEWNET = 0x4000_0000
_CAP_NET_ADMIN = 12
_CAPABILITY_VERSION_3 = 0x2008_0522
_libc = ctypes.CDLL(None, use_errno=True)

need_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(),
    reason="a network of its own takes root, and taps take /dev/net/tun",
)


def in_namespace(test: Callable[P, None]) -> Callable[P, None]:
    """Runs a test on a thread of its own that has a network namespace of its own: it is gone with
    the thread and those that it has started."""

    @functools.wraps(test)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        raised: list[BaseException] = []

        def body() -> None:
            try:
                _check(_libc.unshare(_CLONE_NEWNET))
                ip("link set lo up")
                test(*arguments, **options)
            except BaseException as error:  # for the thread that waits
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return run


def ip(command: str) -> str:
    """ip(8) in the namespace of the calling thread."""
    done = subprocess.run(
        ["ip", *command.split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def drop_net_admin() -> None:
    """The calling thread loses CAP_NET_ADMIN (capset(2)): effective and permitted."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, sets))
    for one in (0, 1):
        sets[one] &= ~(1 << _CAP_NET_ADMIN)
    _check(_libc.capset(header, sets))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
