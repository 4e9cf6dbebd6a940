"""The block device's data path alone: random reads of 4 KiB through a virtqueue, the device
and the block layer, against an io_uring loop in C on the same file.

A driver's mock on a thread of its own fills the ring; what is measured is everything from
there to the host's kernel and back. The rounds of all rows are interleaved, and the best of each
counts: what others do on the host only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tools.bench.report import ROOT, BenchError, describe_host, table, write_section

HELP = "requests a second through the block device's data path, against io_uring in C"

_SOURCE = Path(__file__).with_name("uring_loop.c")
_FILE_BYTES = 256 << 20
_DEPTH = 32

#: The promise, past the page cache: as many requests a second as the C program, times this.
FACTOR = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=200_000, help="requests in a cached round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the file is [default: a temporary one]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _programs(scratch: Path) -> dict[str, Path]:
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("no C compiler; install gcc")
    loop = scratch / "uring_loop"
    subprocess.run([compiler, "-O2", "-o", loop, _SOURCE], check=True)
    build = ["cargo", "build", "--release", "--locked", "-p", "tetrarch-virtio"]
    subprocess.run([*build, "--example", "blk_rate"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return {"io_uring in C": loop, "virtio-blk": target / "release/examples/blk_rate"}


def _rate(program: Path, file: Path, count: int, mode: str) -> float:
    done = subprocess.run(
        [program, file, str(count), str(_DEPTH), mode], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"{program.name} failed: {done.stderr.strip() or done.returncode}")
    return float(done.stdout)


def run(arguments: argparse.Namespace) -> int:
    modes = {"direct": arguments.count // 10, "cached": arguments.count}
    with tempfile.TemporaryDirectory(dir=arguments.folder or "/var/tmp") as scratch:
        programs = _programs(Path(scratch))
        file = Path(scratch) / "disk.img"
        with file.open("wb") as disk:
            for _ in range(_FILE_BYTES >> 20):
                disk.write(os.urandom(1 << 20))
            os.fsync(disk.fileno())
        best = {(mode, name): 0.0 for mode in modes for name in programs}
        for _ in range(arguments.rounds):
            for mode, name in best:
                rate = _rate(programs[name], file, modes[mode], mode)
                best[mode, name] = max(best[mode, name], rate)
    ratios = {mode: best[mode, "virtio-blk"] / best[mode, "io_uring in C"] for mode in modes}
    if arguments.json:
        rates = {f"{mode}, {name}": rate for (mode, name), rate in best.items()}
        print(json.dumps({"rates": rates, "ratios": ratios}, indent=2))
    else:
        text = _report(best, ratios, arguments)
        print(text)
        write_section("disk", text)
    return 0 if ratios["direct"] >= FACTOR else 1


def _report(
    best: dict[tuple[str, str], float], ratios: dict[str, float], arguments: argparse.Namespace
) -> str:
    rows = []
    for mode, ratio in ratios.items():
        c, ours = best[mode, "io_uring in C"], best[mode, "virtio-blk"]
        rows.append((mode, f"{c:,.0f}", f"{ours:,.0f}", f"{ratio:.2f}"))
    host = table(("", ""), describe_host())
    return (
        "## The block device's data path\n\n"
        f"`python -m tools.bench disk`: random reads of 4 KiB, {_DEPTH} at a time, of a raw image "
        f"of {_FILE_BYTES >> 20} MiB; requests a second, the best of {arguments.rounds} "
        "interleaved rounds. A driver's mock fills a virtqueue, the device serves it on its I/O "
        f"thread; the C program has nothing around io_uring. Promised: {FACTOR} times that "
        "past the page cache (direct), where the disk is what is waited for. Out of it (cached) a "
        "read is a copy, and the row shows what the way between two threads costs beside it.\n\n"
        f"{host}\n\n" + table(("", "io_uring in C", "virtio-blk", "ratio"), rows)
    )
