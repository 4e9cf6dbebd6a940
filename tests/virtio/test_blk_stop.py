"""A host whose file system is full under a running machine, with werror=stop."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tetrarch.images import CachedGuest

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def test_machine_is_held_until_there_is_room_and_resumed_by_signal(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host gives no user namespaces, which a small file system needs")
    # The disk is on 4 MiB of memory, of which a file takes all but a little.
    script = (
        'mount -t tmpfs -o size=4M tmpfs "$0" && truncate -s 16M "$0/disk.img" && '
        'head -c 3M /dev/zero > "$0/blocker" && exec "$@"'
    )
    run = [sys.executable, "-m", "tetrarch", "run", "--engine", "bt"]
    run += ["--kernel", str(debian_guest.kernel), "--initrd", str(debian_guest.initrd)]
    run += ["--disk", f"{tmp_path}/host/disk.img,werror=stop"]
    host = tmp_path / "host"
    host.mkdir()
    with subprocess.Popen(
        [*UNSHARE, "sh", "-c", script, host, *run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stderr is not None
        watchdog = threading.Timer(200, program.kill)
        watchdog.start()
        try:
            program.stdin.write(
                b"dd if=/dev/zero of=/dev/vda bs=64k count=40 conv=fsync && echo w''ritten; "
                b"poweroff -f\n"
            )
            program.stdin.flush()
            for line in program.stderr:
                if b"held" in line:
                    break
            assert re.search(
                rb"disk0 \(.*disk\.img\): the host's file system is full; the machine is held: ",
                line,
            ), line
            Path(f"/proc/{program.pid}/root{host}/blocker").unlink()
            program.send_signal(signal.SIGCONT)
            said = program.stdout.read()
            more = program.stderr.read()
            assert program.wait() == 0, more
        finally:
            watchdog.cancel()
            program.kill()
    assert b"written" in said
    # There was room for all that was to be written: it was held once, and said so once.
    assert b"held" not in more
    assert b"error" not in said.lower()
