"""Linux's own commands for gdb (Documentation/dev-tools/gdb-kernel-debugging.rst) at a guest."""

from __future__ import annotations

import re

import pytest
from tests.debug_kernel import debug_kernel
from tests.gdb.debuggee import gdb_script

from tetrarch import Machine
from tetrarch.images import CachedGuest

BOOT_LIMIT_S = 120
WRITER = "while sleep 1; do echo > /dev/null; done"

# Most of it for fetching the kernel's debug symbols, once.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_lx_commands_show_the_tasks_and_the_log_of_a_guest(debian_guest: CachedGuest) -> None:
    kernel = debug_kernel(debian_guest)
    modules = "linux.utils, linux.dmesg, linux.tasks, linux.cpus"
    with Machine(engine="bt", memory="256M", append_extra="nokaslr") as machine:
        machine.start()
        machine.console.expect("# ", BOOT_LIMIT_S)
        machine.console.send(f"{WRITER} & until pidof sleep; do :; done; echo up''on\n")
        machine.console.expect("upon\r\n", BOOT_LIMIT_S)
        said = gdb_script(
            f"""
            python import sys; sys.path.insert(0, {str(kernel.scripts)!r}); import {modules}
            lx-ps
            lx-dmesg
            print $lx_task_by_pid(1).comm
            print $lx_per_cpu("current_task").pid
            break ksys_write
            continue
            backtrace
            detach
            """,
            machine.serve_gdb().address,
            kernel.vmlinux,
        )
    tasks = set(re.findall(r"^0xffff[0-9a-f]{12} +\d+ +(\S+)$", said, re.MULTILINE))
    assert {"swapper/0", "init", "kthreadd", "sh", "sleep"} <= tasks, said
    assert re.search(r"^\[ +0\.0+\] Linux version 6\.", said, re.MULTILINE), said
    assert re.search(r'= "init", ', said), said
    assert re.search(r"#\d .* in do_syscall_x64 \(.*\n#\d .* do_syscall_64 \(", said), said
