"""Debian's kernels with an initramfs of a stranger, as a user of ``tetrarch run`` boots them."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import pytest
from tests.cli.conftest import Cli
from tests.initrds import shell_tree

from tetrarch import Machine, StopReason, images
from tetrarch.boot.vmlinux import extract_vmlinux
from tetrarch.images import CachedGuest

APPEND = "console=ttyS0 quiet reboot=t panic=-1"
POWER_OFF = "echo in ''init; poweroff -f"

Done = subprocess.CompletedProcess[str]


class Run(Protocol):
    def __call__(
        self, script: str, *options: str | Path, kernel: Path | None = None, append: str = APPEND
    ) -> Done: ...


@pytest.fixture
def run(cli: Cli, debian_guest: CachedGuest, tmp_path: Path) -> Run:
    """``tetrarch run`` of the cloud kernel, or another one, with ``script`` as its init."""

    def run(
        script: str, *options: str | Path, kernel: Path | None = None, append: str = APPEND
    ) -> Done:
        initrd = tmp_path / "initrd.gz"
        initrd.write_bytes(shell_tree(script).gzip())
        start = ("run", "--engine", "bt", "--kernel", kernel or debian_guest.kernel)
        return cli(*start, "--initrd", initrd, "--append", append, *options)

    return run


@pytest.mark.parametrize(
    ("script", "append", "code"),
    [
        (POWER_OFF, APPEND, 0),
        ("reboot -f", APPEND, 0),
        ("exit 5", APPEND, 0),  # the kernel panics, and resets at once as it is told to
        ("reboot -f", "console=ttyS0 quiet reboot=acpi", 0),
        ("reboot -f", "console=ttyS0 quiet reboot=kbd", 0),
    ],
    ids=["power-off", "reboot", "panic", "reboot-acpi", "reboot-keyboard"],
)
def test_the_guests_own_end(run: Run, script: str, append: str, code: int) -> None:
    done = run(script, "--json", "--no-reboot", append=append)
    assert done.returncode == code
    engine, report = done.stderr.splitlines()
    assert engine == "tetrarch: engine bt (as asked)"
    assert json.loads(report)["status"] == ("powered-off" if script == POWER_OFF else "reset")


def test_panic_with_reboot_off_is_a_crash_with_a_dump(run: Run) -> None:
    done = run("exit 5", append="console=ttyS0 quiet")
    assert done.returncode == 3
    line, *dump = done.stderr.splitlines()[1:]
    assert line.startswith("tetrarch: the guest crashed: Kernel panic - not syncing: Attempted")
    assert "rip" in "\n".join(dump).lower()


def test_damaged_kernel_is_a_crash_with_a_dump(
    run: Run, debian_guest: CachedGuest, tmp_path: Path
) -> None:
    # Inside the compressed part: the kernel's own loader finds it and halts forever.
    damaged = bytearray(debian_guest.kernel.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 4096] = bytes(4096)
    kernel = tmp_path / "damaged"
    kernel.write_bytes(damaged)
    done = run(POWER_OFF, "--timeout", "50", kernel=kernel)
    assert done.returncode == 3
    assert "tetrarch: the guest crashed" in done.stderr
    assert "rip" in done.stderr.lower()


@pytest.mark.parametrize("part", [1, 600, 20_000, 1 << 20, -(1 << 16)])
def test_truncated_kernel(run: Run, debian_guest: CachedGuest, tmp_path: Path, part: int) -> None:
    kernel = tmp_path / "truncated"
    kernel.write_bytes(debian_guest.kernel.read_bytes()[:part])
    done = run(POWER_OFF, kernel=kernel)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


def test_debug_exit(cli: Cli, debian_guest: CachedGuest, tmp_path: Path) -> None:
    # ioperm(0xf4, 1, 1); outb(21, 0xf4); pause()
    program = """
        .globl _start
        _start: mov $173, %eax; mov $0xf4, %edi; mov $1, %esi; mov $1, %edx; syscall
        mov $21, %al; out %al, $0xf4
        mov $34, %eax; syscall
    """
    binary = tmp_path / "debug-exit"
    subprocess.run(
        ["gcc", "-nostdlib", "-static", "-x", "assembler", "-", "-o", binary],
        input=program.encode(),
        check=True,
    )
    tree = shell_tree("exec debug-exit")
    tree.file("bin/debug-exit", binary.read_bytes(), 0o755)
    initrd = tmp_path / "initrd.gz"
    initrd.write_bytes(tree.gzip())
    guest = ("run", "--kernel", debian_guest.kernel, "--initrd", initrd, "--append", APPEND)
    assert cli(*guest, "--debug-exit").returncode == 43


def test_timeout(run: Run) -> None:
    start = time.monotonic()
    done = run("sleep 1000", "--timeout", "2")
    assert done.returncode == 124
    assert done.stderr.splitlines()[1] == "tetrarch: the guest was stopped: 2 s passed (--timeout)"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("memory", "mib"), [("128M", 128), ("256", 256), ("1G", 1024), ("3500M", 3500), ("5G", 5120)]
)
def test_memory_sizes(run: Run, memory: str, mib: int) -> None:
    done = run("cat /proc/meminfo /proc/iomem; poweroff -f", "--memory", memory)
    assert done.returncode == 0, done.stderr
    total_kib = int(done.stdout.partition("MemTotal:")[2].split()[0])
    # The kernel keeps some for itself: its own image, and a page structure for each page.
    assert mib * 1024 * 0.94 - 36 * 1024 < total_kib < mib * 1024
    assert ("100000000-" in done.stdout) == (mib > 3072)


@pytest.mark.parametrize(
    "name",
    ["debian", *(pytest.param(n, marks=pytest.mark.long) for n in ("debian-amd64", "debian-rt"))],
)
def test_memory_that_is_advised_is_enough(cli: Cli, name: str) -> None:
    guest = images.ensure(images.Cache(), name, images.TerminalReporter())
    files: dict[str, Any] = {"kernel": guest.kernel, "initrd": guest.initrd, "engine": "bt"}
    advice = set()
    for too_little in ("32M", "64M"):
        done = cli(
            "run", "--kernel", guest.kernel, "--initrd", guest.initrd, "--memory", too_little
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        advice |= set(re.findall(r"give (?:it|the machine) (\d+M)", done.stderr))
    (enough,) = advice
    with Machine(memory=enough, **files) as vm:
        vm.start()
        vm.console.expect("# ", timeout=60)
        vm.console.send("poweroff\n")
        assert vm.wait(60).reason is StopReason.POWERED_OFF


def test_memory_that_is_hardly_enough_is_taken_with_a_warning(
    cli: Cli, debian_guest: CachedGuest
) -> None:
    guest = ("--kernel", debian_guest.kernel, "--initrd", debian_guest.initrd)
    done = cli("run", "--engine", "bt", *guest, "--memory", "72M", "--timeout", "0.01")
    assert done.returncode == 124
    (warning,) = (line for line in done.stderr.splitlines() if "unpacks to" in line)
    assert warning.startswith(f"tetrarch: initrd {debian_guest.initrd}: ")
    assert re.search(r"; give the machine \d+M$", warning)


def test_json_and_stats(run: Run) -> None:
    done = run(POWER_OFF, "--json", "--stats", "--name", "judged")
    report = json.loads(done.stderr.splitlines()[-1])
    assert (report["name"], report["status"], report["exit_code"]) == ("judged", "powered-off", 0)
    assert report["stats"]["bt"]["blocks"] > 1000
    assert report["stats"]["bt"]["interrupts"] > 0
    assert report["stats"]["exits"]["port_out"] > 0
    times = report["stats"]["time_ns"]
    assert 0 < times["translated_code"] < times["run"] <= report["uptime_s"] * 1e9
    assert "ran for" in done.stderr


def test_linux_finds_kvm_and_uses_what_it_offers(run: Run) -> None:
    clocks = "/sys/devices/system/clocksource/clocksource0"
    # A second of sleep: timer interrupts, each ended by the guest.
    script = f"dmesg; echo clock: $(cat {clocks}/current_clocksource); sleep 1; {POWER_OFF}"
    done = run(script, "--json", "--stats")
    assert done.returncode == 0, done.stderr
    for line in (
        "Hypervisor detected: KVM",
        "kvm-clock: Using msrs 4b564d01 and 4b564d00",
        "Booting paravirtualized kernel on KVM",
        "clocksource: Switched to clocksource kvm-clock",
        "x2apic enabled",
    ):
        assert line in done.stdout
    assert "\nclock: kvm-clock\n" in done.stdout
    stats = json.loads(done.stderr.splitlines()[-1])["stats"]["bt"]
    assert stats["quiet_eois"] > stats["interrupts"] // 2


@pytest.mark.parametrize("kind", ["stdio", "file", "none"])
def test_consoles(run: Run, tmp_path: Path, kind: str) -> None:
    log = tmp_path / "log"
    done = run(POWER_OFF, "--console", f"file={log}" if kind == "file" else kind)
    assert done.returncode == 0
    assert ("in init" in done.stdout) == (kind == "stdio")
    assert kind == "stdio" or done.stdout == ""
    assert log.exists() == (kind == "file")
    assert kind != "file" or b"in init\r\n" in log.read_bytes()


def test_console_on_a_socket(debian_guest: CachedGuest, tmp_path: Path) -> None:
    path = tmp_path / "console"
    (tmp_path / "initrd").write_bytes(
        shell_tree("echo name?; read name; echo hello $name; poweroff -f").gzip()
    )
    guest = ("--kernel", debian_guest.kernel, "--initrd", tmp_path / "initrd", "--append", APPEND)
    with subprocess.Popen(
        [sys.executable, "-m", "tetrarch", "run", *guest, "--console", f"socket={path}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stderr is not None
            process.stderr.readline()  # printed when the console is there
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(os.fspath(path))
                seen = b""
                while b"name?" not in seen:
                    seen += client.recv(4096)
                client.sendall(b"socket\n")
                while data := client.recv(4096):
                    seen += data
            assert b"hello socket" in seen
            assert process.communicate(timeout=60)[0] == b""
            assert process.returncode == 0
        finally:
            process.kill()
    assert not path.exists()


def test_vmlinux_by_pvh(run: Run, debian_guest: CachedGuest, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(extract_vmlinux(debian_guest.kernel.read_bytes()))
    done = run(POWER_OFF, kernel=kernel)
    assert done.returncode == 0, done.stderr
    assert "in init" in done.stdout


@pytest.mark.long
def test_large_initrd(cli: Cli, debian_guest: CachedGuest, tmp_path: Path) -> None:
    block = os.urandom(1 << 20)
    data = block * 300
    tree = shell_tree("sha256sum /data; poweroff -f")
    tree.file("data", data)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(tree.cpio())
    guest = ("run", "--kernel", debian_guest.kernel, "--initrd", initrd, "--append", APPEND)
    done = cli(*guest, "--memory", "1G")
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(data).hexdigest() in done.stdout
    # Too little to hold it twice, packed and unpacked: that is for the kernel to say.
    done = cli(*guest, "--memory", "512M", "--no-reboot")
    assert "panic" in done.stdout
    done = cli(*guest, "--memory", "256M")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["debian-amd64", "debian-rt"])
@pytest.mark.parametrize("form", ["bzimage", "vmlinux"])
def test_debians_other_kernels(run: Run, tmp_path: Path, name: str, form: str) -> None:
    guest = images.ensure(images.Cache(), name, images.TerminalReporter())
    kernel = guest.kernel
    if form == "vmlinux":
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(extract_vmlinux(guest.kernel.read_bytes()))
    done = run(f"uname -r; {POWER_OFF}", kernel=kernel)
    assert done.returncode == 0, done.stderr
    assert guest.manifest.release in done.stdout
    assert "in init" in done.stdout
    assert run("reboot -f", "--no-reboot", kernel=kernel).returncode == 0
    assert run("exit 1", "--no-reboot", kernel=kernel).returncode == 0
    assert run("exit 1", kernel=kernel, append="console=ttyS0 quiet").returncode == 3


@pytest.mark.long
@pytest.mark.parametrize("name", ["debian", "debian-amd64", "debian-rt"])
def test_kernel_address_is_random(run: Run, name: str) -> None:
    guest = images.ensure(images.Cache(), name, images.TerminalReporter())
    script = "grep ' _text$' /proc/kallsyms; cd /sys/devices/system/cpu; grep . vulnerabilities/*"
    seen = [run(f"{script}; poweroff -f", kernel=guest.kernel).stdout for _ in range(3)]
    addresses = {line.split()[0] for text in seen for line in text.splitlines() if "_text" in line}
    assert len(addresses) == 3, seen
    assert all("Mitigation:" in text and "Vulnerable" not in text for text in seen)
