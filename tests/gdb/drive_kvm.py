"""Runs on the host with SVM: a guest of engine kvm, and gdb at it."""

import subprocess
import sys

from tetrarch import Machine

GDB = ("gdb", "--batch", "-nx", "-ex", "set pagination off", "-ex", "set width 0")
# QEMU's TCG has no breakpoints for nested guests: steps lead to the function.
STEP_TO = (
    "python target = int(gdb.parse_and_eval('(long)&ksys_write')) & (1 << 64) - 1; "
    "rip = lambda: int(gdb.parse_and_eval('(long)$rip')) & (1 << 64) - 1; "
    "print('steps:', next((n for n in range(5000) "
    "if gdb.execute('stepi', to_string=True) and rip() == target), None))"
)
COMMANDS = ("info threads", STEP_TO, "backtrace", "info registers rip gs_base cr3", "detach")

with Machine(
    kernel="/vmlinuz",
    initrd="/suite/writer.cpio",
    append="console=ttyS0 quiet panic=-1 nokaslr",
    memory="256M",
    cpus=2,
    engine="kvm",
) as machine:
    machine.start()
    machine.console.expect("writer: alive", timeout=300)
    server = machine.serve_gdb("/tmp/gdb")
    words = [*GDB, "-ex", f"target remote {server.address}"]
    for command in COMMANDS:
        words += ["-ex", command]
    sys.stdout.flush()
    subprocess.run([*words, "/suite/kernel.sym"], timeout=400, check=False)
    machine.console.expect("writer: alive", timeout=300)
    machine.console.expect("writer: alive", timeout=300)
    print("drive: the guest goes on")
