"""gdb at Debian's kernel, with a symbol file that is made of /proc/kallsyms."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host
from tests.gdb.debuggee import gdb_script
from tests.initrds import shell_tree

from tetrarch import Machine
from tetrarch.cli.symbols import make_symbols
from tetrarch.images import CachedGuest, Initramfs

LIMIT_S = 600
BOOT_LIMIT_S = 900

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + 2 * BOOT_LIMIT_S)]


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    """An initramfs whose first program does nothing but write()."""
    source = Path(__file__).with_name("writer.c")
    flags = ("-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-w")
    subprocess.run(["gcc", *flags, "-o", tmp_path / "init", source], check=True, timeout=LIMIT_S)
    tree = Initramfs()
    tree.character_device("dev/console", 5, 1)
    tree.file("init", (tmp_path / "init").read_bytes(), 0o755)
    initrd = tmp_path / "writer.cpio"
    initrd.write_bytes(tree.cpio())
    return initrd


def symbols_of(kernel: Path, directory: Path) -> Path:
    """A symbol file of a kernel, as a boot of it without KASLR tells."""
    initrd = directory / "kallsyms.cpio"
    script = "stty raw 2>/dev/null; cat /proc/kallsyms; sync; poweroff -f"
    initrd.write_bytes(shell_tree(script).cpio())
    names = directory / "kallsyms"
    with Machine(
        kernel=kernel,
        initrd=initrd,
        append="console=ttyS0 quiet panic=-1 nokaslr loglevel=0",
        console=f"file={names}",
        engine="bt",
    ) as machine:
        assert machine.run(LIMIT_S).ok
    lines = names.read_text("ascii", "replace").replace("\r", "").splitlines()
    listed = [line for line in lines if re.match(r"[0-9a-f]{16} ", line)]
    names.write_text("\n".join(listed) + "\n")
    make_symbols(names, directory / "kernel.sym", kernel)
    return directory / "kernel.sym"


def test_break_by_symbol_backtrace_and_watch_on_bt(
    debian_guest: CachedGuest, writer: Path, tmp_path: Path
) -> None:
    symbols = symbols_of(debian_guest.kernel, tmp_path)
    with Machine(
        kernel=debian_guest.kernel,
        initrd=writer,
        append="console=ttyS0 quiet panic=-1 nokaslr",
        engine="bt",
    ) as machine:
        machine.start()
        machine.console.expect("writer: alive", timeout=LIMIT_S)
        said = gdb_script(
            """
            break ksys_write
            continue
            backtrace
            stepi
            stepi
            backtrace 2
            delete
            hbreak __x64_sys_write
            continue
            delete
            watch *(long *)&jiffies_64
            continue
            backtrace
            detach
            """,
            machine.serve_gdb().address,
            symbols,
        )
        in_call = r" in ksys_write \(\)\n#1 .* in (__x64_sys_write|do_syscall_64) \(\)"
        assert len(re.findall(in_call, said)) == 2, said
        assert re.search(r" in do_syscall_64 \(\)\n#\d+ .* in entry_SYSCALL_64_\w+ \(\)", said), (
            said
        )
        assert re.search(r"Breakpoint 2, .* in __x64_sys_write \(\)", said), said
        old, new = re.findall(r"(?:Old|New) value = (\d+)", said)
        assert int(new) == int(old) + 1, said
        # Through the frame of an interrupt, into what it came upon.
        assert re.search(r" in asm_sysvec_apic_timer_interrupt \(\)\n#", said), said
        machine.console.expect("writer: alive", timeout=LIMIT_S)


def test_threads_steps_and_backtrace_on_kvm(writer: Path, tmp_path: Path) -> None:
    host = nested_host(tmp_path / "nested", "gdb")
    console = host.boot(
        "cd /suite && python3 drive_kvm.py",
        BOOT_LIMIT_S,
        {
            "drive_kvm.py": Path(__file__).with_name("drive_kvm.py"),
            "writer.cpio": writer,
            "kernel.sym": symbols_of(host.kernel, tmp_path),
        },
    )
    assert re.search(r"2 +Thread 2 \(vCPU 1\)", console), console
    assert re.search(r" in do_syscall_64 \(\)\n#\d+ .* in entry_SYSCALL_64_\w+ \(\)", console), (
        console
    )
    assert console.count("stepped: True") == 3, console
    assert "drive: the guest goes on" in console, console
