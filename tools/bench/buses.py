"""Disks at other controllers than virtio's: one guest with a disk at each, on engine bt.

fio works on them in turns, in one run of the guest. What differs is the controller and the
guest's driver of it: the files, the block layer and the I/O thread are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tools.bench.debian import fio_figure
from tools.bench.report import BenchError, describe_host, table, write_section

from tetrarch import Machine, block, images
from tetrarch.images import Initramfs

HELP = "fio on disks at virtio and at VMware's paravirtual SCSI controller, in one guest"

_PROMPT = "root@tetrarch:~# "
_FILE_BYTES = 128 << 20
_DEPTH = 32
_BOOT_S = 120

#: Bus and what Linux calls its disk; the first is what others are measured by.
BUSES = {"virtio": "vda", "pvscsi": "sda"}
#: fio's name and the size of requests -> what a row is called, and its unit.
KINDS = {
    ("randread", "4k"): ("random reads of 4 KiB", "IOPS"),
    ("randwrite", "4k"): ("random writes of 4 KiB", "IOPS"),
    ("read", "1M"): ("reads of 1 MiB in order", "MB/s"),
    ("write", "1M"): ("writes of 1 MiB in order", "MB/s"),
}
#: The goal: so many times what virtio has, over all rows.
FACTOR = 0.9

Figures = Mapping[tuple[str, str], float]
"""By fio's name and the bus."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="of each; medians [5]")
    parser.add_argument("--seconds", type=int, default=4, help="for each fio [4]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        figures = _measure(Path(scratch), arguments.rounds, arguments.seconds)
    ratio = mean_ratio(figures)
    if arguments.json:
        rates = {f"{kind}, {bus}": figure for (kind, bus), figure in figures.items()}
        print(json.dumps({"rates": rates, "ratio": ratio}, indent=2))
    else:
        text = _report(figures, ratio, arguments)
        print(text)
        write_section("buses", text)
    return 0 if ratio >= FACTOR else 1


def _measure(folder: Path, rounds: int, seconds: int) -> Figures:
    guest = images.ensure(images.Cache(), "debian", images.TerminalReporter())
    disks = []
    for bus in BUSES:
        block.create(folder / bus, _FILE_BYTES, image_format="raw")
        disks.append(f"{folder / bus},format=raw,bus={bus}")
    found: dict[tuple[str, str], list[float]] = {}
    with Machine(
        engine="bt",
        kernel=guest.kernel,
        initrd=initrd_with("fio", guest.initrd, folder),
        memory="512M",
        disk=disks,
    ) as machine:
        machine.start()
        machine.console.expect(_PROMPT, _BOOT_S)

        def say(command: str) -> str:
            machine.console.send(f"{command}\n")
            return machine.console.expect(_PROMPT, _BOOT_S + seconds)

        for device in BUSES.values():
            say(f"dd if=/dev/urandom of=/dev/{device} bs=1M oflag=direct 2>/dev/null")
        for number in range(1, rounds + 1):
            print(f"bench: round {number} of {rounds}", file=sys.stderr)
            for kind, size in KINDS:
                for bus, device in BUSES.items():
                    said = say(
                        f"fio --minimal --name=bench --filename=/dev/{device} --direct=1 "
                        f"--ioengine=libaio --iodepth={_DEPTH} --bs={size} --rw={kind} "
                        f"--runtime={seconds} --time_based"
                    )
                    line = re.search(r"^3;fio.*$", said, re.MULTILINE)
                    if line is None:
                        raise BenchError(f"fio says no result: {said.strip()[-200:]}")
                    figure = fio_figure(line[0], kind, large=size == "1M")
                    found.setdefault((kind, bus), []).append(figure)
    return {key: statistics.median(figures) for key, figures in found.items()}


def initrd_with(name: str, initrd: Path, folder: Path) -> Path:
    """The guest's initramfs, and behind it a program of the host's with the libraries that it
    loads."""
    program = shutil.which(name)
    if program is None:
        raise BenchError(f"no {name}; install {name}")
    tree = Initramfs()
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in (program, *re.findall(r"(/\S+) \(0x", said)):
        place = f"bin/{name}" if path == program else path
        tree.file(place, Path(os.path.realpath(path)).read_bytes(), 0o755)
    both = folder / f"initrd-with-{name}.gz"
    both.write_bytes(initrd.read_bytes() + tree.gzip())
    return both


def mean_ratio(figures: Figures) -> float:
    """The geometric mean, over the rows, of each other bus's figure over that of the first."""
    first, *others = BUSES
    ratios = [figures[kind, bus] / figures[kind, first] for kind, _ in KINDS for bus in others]
    return statistics.geometric_mean(ratios)


def _report(figures: Figures, ratio: float, arguments: argparse.Namespace) -> str:
    first, *others = BUSES
    rows = []
    for (kind, _), (name, unit) in KINDS.items():
        values = [figures[kind, bus] for bus in BUSES]
        ratios = [f"{figures[kind, bus] / figures[kind, first]:.2f}" for bus in others]
        rows.append((f"fio, {name}, {unit}", *(f"{value:,.0f}" for value in values), *ratios))
    host = table(("", ""), describe_host())
    header = ("", *BUSES, *("ratio" for _ in others))
    return (
        "## Disks by their controller\n\n"
        "`python -m tools.bench buses`: one guest on engine bt, one virtual CPU, 512 MiB, a raw "
        f"disk of {_FILE_BYTES >> 20} MiB at each controller, in the host's page cache; medians of "
        f"{arguments.rounds} interleaved rounds, fio for {arguments.seconds} s each, {_DEPTH} "
        f"requests at a time. The goal is {FACTOR} times what virtio has, in the geometric mean of "
        f"the rows; it is {ratio:.2f} here.\n\n"
        f"{host}\n\n" + table(header, rows)
    )
