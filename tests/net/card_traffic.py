"""What any card has to carry unharmed between a Linux and the host, at a tap in its namespace."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.net.namespace import ip
from tests.net.test_programs import measure

__all__ = ["carries", "copied_at", "need_ip", "takes_large_frames"]

need_ip = pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")

Ask = Callable[[str], str]


@contextmanager
def copied_at(guest: Ask, data: bytes, folder: Path) -> Iterator[str]:
    """The guest at 10.8.0.2 and servers at 10.8.0.1, from where it can have ``data``. Gives the
    SHA-256 of that."""
    folder.mkdir()
    (folder / "data").write_bytes(data)
    guest("ip link set lo up && ip addr add 10.8.0.2/24 dev eth0")
    guest("httpd -p 80 -h /tmp")
    servers = [
        subprocess.Popen(["iperf3", "-s", "-B", "10.8.0.1"], stdout=subprocess.DEVNULL),
        subprocess.Popen(
            ["python3", "-m", "http.server", "-b", "10.8.0.1", "8000"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ),
    ]
    try:
        yield hashlib.sha256(data).hexdigest()
    finally:
        for server in servers:
            server.kill()
            server.wait()


def carries(guest: Ask, features: str, digest: str) -> None:
    """With features set as ethtool's -K has them: iperf3 every way, and the copy there and back."""
    if features:
        guest(f"ethtool -K eth0 {features}")
    for way in ("", "--reverse", "--bidir"):
        end = measure(guest, f"-c 10.8.0.1 --parallel 4 {way}")
        assert end["sum_received"]["bytes"] > 1 << 20, (features, way)
    guest("wget -q -O /tmp/data http://10.8.0.1:8000/data")
    assert digest in guest("sha256sum /tmp/data")
    got = subprocess.run(["curl", "-s", "http://10.8.0.2/data"], capture_output=True, check=True)
    assert hashlib.sha256(got.stdout).hexdigest() == digest


def takes_large_frames(guest: Ask, features: str) -> None:
    """Frames of 9000 bytes, with all features on again."""
    ip("link set t0 mtu 9000")
    guest("ip link set eth0 mtu 9000")
    assert "5 packets received" in guest("ping -c 5 -s 8900 10.8.0.1")
    guest(f"ethtool -K eth0 {features}")
    assert measure(guest, "-c 10.8.0.1 --bidir")["sum_received"]["bytes"] > 1 << 20
