"""The cost of an exit: port writes of a guest to a device in Rust and to one in Python.

On KVM the base is a C program that does the same with bare ioctls. The rounds of all
rows are interleaved, and the best of each counts: what others do on the host only adds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools.bench.report import BenchError, describe_host, table, write_section

from tetrarch import _native

HELP = "the cost of an exit to devices in Rust and in Python, per engine"

_SOURCE = Path(__file__).with_name("exit_loop.c")
# mov dx, 0x500 ; again: out dx, al ; dec ecx ; jnz again ; out 0xff, al ; jmp $
_GUEST = bytes.fromhex("ba0005 ee 6649 75fb e6ff ebfe")
_CODE = 0x1000
_PORT = 0x500
_LAST_PORT = 0xFF

#: The promises: times the C program with a device in Rust; over it with one in Python.
RUST_FACTOR = 1.15
PYTHON_OVER_NS = 3000.0


class _Nothing:
    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class _Stop(_Nothing):
    def __init__(self, vm: _native.Vm) -> None:
        self._vm = vm

    def write(self, offset: int, size: int, value: int) -> None:
        self._vm.request_stop()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=20_000, help="exits in a round")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def measure(engine: str, device: _native.Device, count: int) -> float:
    """Nanoseconds an exit, on a machine of its own."""
    vm = _native.Vm(engine, 1 << 20)
    vm.write_memory(_CODE, _GUEST)
    vm.attach_ports(_PORT, 1, device)
    vm.attach_ports(_LAST_PORT, 1, _Stop(vm))
    vcpu = vm.vcpu(0)
    vcpu.set_regs(
        {"rip": _CODE, "rcx": count, "rflags": 2, "cs_base": 0, "cs_selector": 0, "cs_attr": 0x9B}
    )
    start = time.perf_counter_ns()
    end = vcpu.run()
    took = time.perf_counter_ns() - start
    exits = vm.stats()["exits"]["port_out"]
    if end != "stopped" or exits != count + 1:
        raise BenchError(f"the guest ended as {end!r} after {exits} writes; report this")
    return took / count


def _bare(program: Path, count: int) -> float:
    done = subprocess.run([program, str(count)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"the C program failed: {done.stderr.strip()}")
    return float(done.stdout)


def _rows(scratch: Path, count: int) -> dict[str, Callable[[], float]]:
    rows: dict[str, Callable[[], float]] = {}
    if _native.engine_available("kvm") is None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise BenchError("no C compiler; install gcc")
        program = scratch / "exit_loop"
        subprocess.run([compiler, "-O2", "-o", program, _SOURCE], check=True)
        rows["kvm, bare ioctls in C"] = lambda: _bare(program, count)
        rows["kvm, device in Rust"] = lambda: measure("kvm", _native.NullPort(), count)
        rows["kvm, device in Python"] = lambda: measure("kvm", _Nothing(), count)
    rows["bt, device in Rust"] = lambda: measure("bt", _native.NullPort(), count)
    rows["bt, device in Python"] = lambda: measure("bt", _Nothing(), count)
    return rows


def _report(best: dict[str, float], base: float | None, arguments: argparse.Namespace) -> str:
    rows = []
    for name, ns in best.items():
        beside = ("", "")
        if base is not None and name.startswith("kvm, device"):
            beside = (f"{ns / base:.2f}", f"{ns - base:+.0f}")
        rows.append((name, f"{ns:.0f}", *beside))
    host = table(("", ""), describe_host())
    return (
        "## The cost of an exit\n\n"
        f"`python -m tools.bench exits`: a real-mode guest writes {arguments.count:,} bytes to a "
        f"port; the best of {arguments.rounds} interleaved rounds, per write. Promised on kvm: a "
        f"device in Rust within {RUST_FACTOR} times the C program, one in Python within "
        f"{PYTHON_OVER_NS / 1000:.0f} µs over it. Where no hardware is behind /dev/kvm, the "
        "kernel's instruction emulator is most of each kvm row. Engine bt interprets real mode.\n\n"
        f"{host}\n\n" + table(("", "ns", "times C", "ns over C"), rows)
    )


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        rows = _rows(Path(scratch), arguments.count)
        best = dict.fromkeys(rows, float("inf"))
        for _ in range(arguments.rounds):
            for name, measured in rows.items():
                best[name] = min(best[name], measured())
    base = best.get("kvm, bare ioctls in C")
    if arguments.json:
        print(json.dumps(best, indent=2))
    else:
        text = _report(best, base, arguments)
        print(text)
        write_section("exits", text)
    if base is None:
        return 0
    kept = best["kvm, device in Rust"] <= RUST_FACTOR * base
    kept &= best["kvm, device in Python"] <= base + PYTHON_OVER_NS
    return 0 if kept else 1
