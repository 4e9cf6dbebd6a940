"""A Debian on a disk, under QEMU's TCG and under engine bt: the same kernel, disks and card.

What is measured is what a user sees: the time to the login prompt, fio on a second disk, iperf3
between guest and host over a tap, and what the process takes of the host. The two take turns, each
round with a fresh copy of the disk. Taps need root.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pexpect
from tools.bench.installed import debian_disk
from tools.bench.iperf import iperf
from tools.bench.report import BenchError, describe_host, table, version_of, write_section

from tetrarch.images.store import InstalledDisk

HELP = "a Debian on a disk against QEMU's TCG: boot, disk, network, memory"

QEMU = "qemu-system-x86_64"
TCG, BT = "QEMU TCG", "bt"
MEMORY_MIB = 1024
TAP = "tetrbench0"
HOST_ADDRESS, GUEST_ADDRESS = "10.213.7.1", "10.213.7.2"
_PROMPT = "bench-ready# "
# The second disk: larger than what fio asks for at once, small enough for the host's cache.
_SCRATCH_BYTES = 512 << 20


@dataclass(frozen=True)
class Row:
    """A figure: what it is called, its unit, and the ratio that is promised.

    A ratio is bt's figure over QEMU's, whatever is better.
    """

    name: str
    unit: str
    least: float | None = None
    most: float | None = None

    def kept(self, ratio: float) -> bool:
        return (self.least is None or ratio >= self.least) and (
            self.most is None or ratio <= self.most
        )


ROWS = {
    "boot": Row("from the start to the login prompt", "s", most=0.5),
    "randread": Row("fio, random reads of 4 KiB", "IOPS", least=2),
    "randwrite": Row("fio, random writes of 4 KiB", "IOPS", least=2),
    "read": Row("fio, reads of 1 MiB in order", "MB/s", least=2),
    "write": Row("fio, writes of 1 MiB in order", "MB/s", least=2),
    "sent": Row("iperf3, guest to host", "Mbit/s", least=2),
    "received": Row("iperf3, host to guest", "Mbit/s", least=2),
    "idle": Row("the process with an idle guest (PSS)", "MiB", most=1),
}
# What bt's process may take beside its guest's memory, in MiB, while the guest is idle.
MOST_BESIDE = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="of each program; medians [3]")
    parser.add_argument("--seconds", type=int, default=10, help="for each fio and iperf3 [10]")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one answer [600]")
    parser.add_argument("--echo", action="store_true", help="show the consoles")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    for tool, package in ((QEMU, "qemu-system-x86"), ("iperf3", "iperf3"), ("ip", "iproute2")):
        if shutil.which(tool) is None:
            raise BenchError(f"no {tool}; install it: apt-get install {package}")
    if os.geteuid() != 0:
        raise BenchError("a tap is made for the guests; run it as root")
    disk = debian_disk("bench", ("fio", "iperf3"))
    found: dict[str, list[dict[str, float]]] = {TCG: [], BT: []}
    copies: list[dict[str, float]] = []
    with _network(), tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        for number in range(1, arguments.rounds + 1):
            for program, rounds in found.items():
                print(f"bench: round {number} of {arguments.rounds}: {program}", file=sys.stderr)
                rounds.append(_round(program, disk, Path(scratch), arguments))
            copies.append(_host_copies(Path(scratch, "second.raw"), arguments.seconds))
    copy = {kind: statistics.median(values[kind] for values in copies) for kind in copies[0]}
    medians = {
        program: {key: statistics.median(values[key] for values in rounds) for key in rounds[0]}
        for program, rounds in found.items()
    }
    ratios = {key: medians[BT][key] / medians[TCG][key] for key in ROWS}
    if arguments.json:
        print(json.dumps({"figures": medians, "ratios": ratios, "copy": copy}, indent=2))
    else:
        text = _report(medians, ratios, copy, disk, arguments)
        print(text)
        write_section("debian", text)
    kept = all(ROWS[key].kept(ratio) for key, ratio in ratios.items())
    return 0 if kept and medians[BT]["beside"] <= MOST_BESIDE else 1


@contextmanager
def _network() -> Iterator[None]:
    """A tap that both programs take in turn."""
    commands = [
        ["ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"],
        ["ip", "address", "add", f"{HOST_ADDRESS}/30", "dev", TAP],
        ["ip", "link", "set", TAP, "up"],
    ]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
        yield
    finally:
        subprocess.run(["ip", "link", "delete", TAP], capture_output=True, check=False)


def _command(program: str, disk: InstalledDisk, root: Path, second: Path) -> list[str]:
    append = disk.manifest.append
    files = [str(disk.kernel), str(disk.initrd), append]
    if program == BT:
        command = [sys.executable, "-m", "tetrarch", "run", "--engine", "bt"]
        command += ["--kernel", files[0], "--initrd", files[1], "--append", files[2]]
        command += ["--memory", f"{MEMORY_MIB}M", "--net", f"tap={TAP}"]
        return [*command, "--disk", str(root), "--disk", str(second)]
    command = [QEMU, "-M", "q35", "-accel", "tcg,thread=single", "-smp", "1"]
    command += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-serial", "stdio", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"]
    command += ["-kernel", files[0], "-initrd", files[1], "-append", files[2]]
    for path in (root, second):
        command += ["-drive", f"file={path},format=raw,if=virtio,aio=io_uring"]
    command += ["-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no"]
    return [*command, "-device", "virtio-net-pci,netdev=n"]


def _round(
    program: str, disk: InstalledDisk, scratch: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    root, second = scratch / "root.raw", scratch / "second.raw"
    subprocess.run(["cp", "--sparse=always", disk.disk, root], check=True)
    # Written once, so that no figure is that of the host's allocation.
    with second.open("wb") as file:
        for _ in range(_SCRATCH_BYTES >> 20):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    command = _command(program, disk, root, second)
    begun = time.monotonic()
    child = pexpect.spawn(
        command[0], command[1:], timeout=arguments.timeout, encoding="utf-8", echo=False
    )
    if arguments.echo:
        child.logfile_read = sys.stderr
    try:
        child.expect("login: ")
        found = {"boot": time.monotonic() - begun}
        child.sendline("root")
        child.expect("# ")
        # In two parts, so that the echo of the command is no prompt.
        child.sendline("stty -echo; TERM=dumb PS1='bench-''ready# '")
        child.expect_exact(_PROMPT)
        _say(child, "systemctl is-system-running --wait")
        _say(child, "sleep 10")
        found["idle"] = _pss_mib(child.pid)
        if program == BT:
            found["beside"] = beside_ram_mib(Path(f"/proc/{child.pid}/smaps").read_text())
        for kind, size in (
            ("randread", "4k"),
            ("randwrite", "4k"),
            ("read", "1M"),
            ("write", "1M"),
        ):
            found[kind] = _fio(child, kind, size, arguments.seconds)
        card = "$(ls /sys/class/net | grep -v lo)"
        _say(child, f"ip address add {GUEST_ADDRESS}/30 dev {card}; ip link set {card} up")
        for name, option in (("sent", ""), ("received", "--reverse")):
            found[name] = iperf(partial(_say, child), HOST_ADDRESS, option, arguments.seconds)
        child.sendline("poweroff")
        child.expect(pexpect.EOF)
    except (pexpect.TIMEOUT, pexpect.EOF) as error:
        last = (child.before or "").strip().splitlines()[-1:]
        raise BenchError(f"{program} did not go on; its last line: {last}") from error
    finally:
        child.close(force=True)
    return found


def _host_copies(path: Path, seconds: float) -> dict[str, float]:
    """MB/s in order, with neither guest nor device: what the kernel's copy alone allows."""
    size, depth = 1 << 20, 32
    found = {}
    with mmap.mmap(-1, depth * size) as memory, path.open("r+b", buffering=0) as file:
        memory[:] = b"\x55" * len(memory)
        view = memoryview(memory)
        buffers = [view[at : at + size] for at in range(0, len(memory), size)]
        try:
            for kind, move in (("read", os.preadv), ("write", os.pwritev)):
                begun, done = time.monotonic(), 0
                while time.monotonic() - begun < seconds:
                    move(file.fileno(), [buffers[done % depth]], done * size % _SCRATCH_BYTES)
                    done += 1
                found[kind] = done * size / (time.monotonic() - begun) / 1e6
        finally:
            for buffer in (*buffers, view):
                buffer.release()
    return found


def _say(child: pexpect.spawn[str], command: str) -> str:
    """What a command prints, lines joined by a newline."""
    child.sendline(command)
    child.expect_exact(_PROMPT)
    return str(child.before).replace("\r", "")


def _fio(child: pexpect.spawn[str], kind: str, size: str, seconds: int) -> float:
    """Requests a second, or MB/s where they are large."""
    said = _say(
        child,
        f"fio --minimal --name=bench --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=32 "
        f"--bs={size} --rw={kind} --runtime={seconds} --time_based",
    )
    line = next((line for line in said.splitlines() if line.startswith("3;fio")), None)
    if line is None:
        raise BenchError(f"fio says no result: {said.strip()[-200:]}")
    return fio_figure(line, kind, large=size == "1M")


def fio_figure(line: str, kind: str, *, large: bool) -> float:
    """Of a line of fio's terse output, version 3: IOPS, or MB/s for ``large`` requests."""
    fields = line.split(";")
    first = 46 if kind.endswith("write") else 5
    bandwidth_kib, iops = float(fields[first + 1]), float(fields[first + 2])
    return bandwidth_kib * 1024 / 1e6 if large else iops


def _pss_mib(pid: int) -> float:
    """Of the process, its share of shared pages counted."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"/proc/{pid}/smaps_rollup has no Pss")


def beside_ram_mib(smaps: str) -> float:
    """What a process of ours takes beside its guest's memory, of its /proc/PID/smaps.

    Pages of files that it has not changed are the host's cache, and shared with all who use them.
    """
    total, counted = 0, ""
    for line in smaps.splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            # A mapping: addresses, rights, offset, device, inode and, if any, a name.
            name = values[4] if len(values) > 4 else ""
            if name == "/memfd:tetrarch-ram":
                counted = ""
            else:
                is_file = name.startswith("/") and not name.startswith("/memfd:")
                counted = "Private_Dirty:" if is_file else "Pss:"
        elif key == counted:
            total += int(values[0])
    return total / 1024


def _report(
    medians: Mapping[str, Mapping[str, float]],
    ratios: Mapping[str, float],
    copy: Mapping[str, float],
    disk: InstalledDisk,
    arguments: argparse.Namespace,
) -> str:
    rows: list[Sequence[str]] = []
    for key, row in ROWS.items():
        promised = f"≥ {row.least:g}" if row.least is not None else f"≤ {row.most:g}"
        figures = (medians[program][key] for program in (TCG, BT))
        shown = (f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in figures)
        rows.append((row.name, row.unit, *shown, f"{ratios[key]:.2f}", promised))
    facts = [
        *describe_host(),
        ("Guest kernel", disk.manifest.release),
        ("QEMU", version_of(QEMU, "--version")),
    ]
    beside = medians[BT]["beside"]
    return (
        "## A Debian on a disk\n\n"
        f"`python -m tools.bench debian`: one virtual CPU, {MEMORY_MIB} MiB, virtio disks in the "
        f"host's page cache (io_uring), a virtio card on a tap; medians of {arguments.rounds} "
        f"interleaved rounds, fio and iperf3 for {arguments.seconds} s each, 32 requests at a "
        "time. A ratio is the figure of bt over that of QEMU.\n\n"
        + table(("", ""), facts)
        + "\n\n"
        + table(("", "unit", TCG, BT, "ratio", "promised"), rows)
        + f"\n\nBeside its idle guest's memory, bt's process takes {beside:.0f} MiB, "
        f"unchanged pages of files not counted; promised are at most {MOST_BESIDE}.\n\n"
        "The host's own copy from and to its page cache, with no guest: a loop of preadv(2) and "
        f"pwritev(2) over the same file and as many buffers does {copy['read']:,.0f} and "
        f"{copy['write']:,.0f} MB/s. Requests in order are bounded by it."
    )
