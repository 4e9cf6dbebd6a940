"""iperf3 between a guest and its host."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import suppress

from tools.bench.report import BenchError

__all__ = ["iperf", "iperf_figure"]

_TRIES = 3


def iperf(say: Callable[[str], str], host: str, option: str, seconds: int) -> float:
    """Mbit/s between a client in the guest, where ``say`` runs a command, and a server at ``host``.

    iperf3's server now and then loses its connections (select failed), so once more.
    """
    client = f"iperf3 --client {host} --time {seconds} --format m {option}"
    said = ""
    for _ in range(_TRIES):
        server = subprocess.Popen(
            ["iperf3", "--server", "--bind", host],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            said = say(f"timeout {3 * seconds + 30} {client}")
        finally:
            server.kill()
            server.wait()
        with suppress(BenchError):
            return iperf_figure(said)
    return iperf_figure(said)


def iperf_figure(said: str) -> float:
    """Mbit/s that arrived, of what iperf3 prints with ``--format m``."""
    match = re.search(r"([0-9.]+) Mbits/sec +receiver", said)
    if match is None:
        raise BenchError(f"iperf3 says no result: {said.strip()[-200:]}")
    return float(match.group(1))
