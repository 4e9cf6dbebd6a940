"""crash(8), the analyser of Linux's kernel dumps, at a dump of a guest."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.debug_kernel import debug_kernel

from tetrarch import Machine
from tetrarch.images import CachedGuest

LIMIT_S = 120

# Most of it for fetching the kernel's debug symbols, once.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_crash_opens_a_dump_and_lists_the_processes(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    if shutil.which("crash") is None:
        pytest.skip("no crash on this host: tools/test-packages long")
    kernel = debug_kernel(debian_guest)
    with Machine(engine="bt", memory="256M") as vm:
        vm.start()
        vm.console.expect("# ", LIMIT_S)
        # It is a shell until it has become another program.
        vm.console.send("sleep 1000 & until grep -q sleep /proc/$!/comm; do :; done; echo up''on\n")
        vm.console.expect("upon\r\n", LIMIT_S)
        vm.dump_core(tmp_path / "core")
    # crash 8.0.2 knows struct pid with one number in it alone: its ps shows the tasks of the CPUs
    # where the kernel is newer, of QEMU's dumps too. Their list needs no struct pid.
    tasks = "list task_struct.tasks -s task_struct.comm -h init_task"
    done = subprocess.run(
        ["crash", "-s", kernel.vmlinux, tmp_path / "core"],
        input=f"sys\nps\n{tasks}\nlog\nhelp -D\nquit\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    said = done.stdout
    assert re.search(rf"RELEASE: {re.escape(debian_guest.manifest.release)}$", said, re.MULTILINE)
    assert re.search(r"NODENAME: tetrarch$", said, re.MULTILINE), said
    assert re.search(r"^> +0 +0 +0 +[0-9a-f]{16} +RU .*\[swapper/0\]$", said, re.MULTILINE), said
    names = set(re.findall(r'comm = "([^"\\]+)', said))
    assert {"init", "kthreadd", "sh", "sleep"} <= names, said
    assert re.search(r"^\[ +0\.0+\] Linux version 6\.", said, re.MULTILINE), said
    assert "num_qemu_notes: 1" in said
