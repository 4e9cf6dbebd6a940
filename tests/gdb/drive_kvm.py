"""Runs on the host with SVM: a guest of engine kvm, and gdb at it until it comes upon a system
call. QEMU's TCG has no breakpoints for nested guests, and a step over SYSRET, which loads
flags without TF, does not end: so steps are made only where none is near."""

import subprocess
from pathlib import Path

from tetrarch import Machine

LOOK = """
for thread in gdb.selected_inferior().threads():
    thread.switch()
    frames = gdb.execute("backtrace", to_string=True)
    if "in do_syscall_64 ()" in frames:
        print("in a call of thread", thread.num)
        print(frames)
        for _ in range(3):
            before = int(gdb.selected_frame().pc())
            gdb.execute("stepi", to_string=True)
            print("stepped:", int(gdb.selected_frame().pc()) != before)
        break
"""
GDB = ("gdb", "--batch", "-nx", "-ex", "set pagination off", "-ex", "set width 0")
ATTEMPTS = 20

Path("/tmp/look.py").write_text(LOOK)
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
    words = [*GDB, "-ex", f"target remote {server.address}", "-ex", "info threads"]
    words += ["-ex", "source /tmp/look.py", "-ex", "detach", "/suite/kernel.sym"]
    for _ in range(ATTEMPTS):
        said = subprocess.run(words, timeout=120, check=False, capture_output=True, text=True)
        if "in a call" in said.stdout:
            break
    print(said.stdout, said.stderr)
    machine.console.expect("writer: alive", timeout=300)
    machine.console.expect("writer: alive", timeout=300)
    print("drive: the guest goes on")
