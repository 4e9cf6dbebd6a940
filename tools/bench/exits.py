"""The cost of an exit: ports and device memory of a guest, read and written, with a
device in Rust and with one in Python behind them.

The guest is 64-bit code, so engine bt translates it. What is measured is the whole way: guest
instruction, engine, bus, device, and back. On KVM the base is a C program that writes to a port
with bare ioctls. The rounds of all rows are interleaved, and the best of each counts: what
others do on the host only adds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.bench.report import BenchError, describe_host, table, write_section

from tetrarch import _native
from tetrarch.boot.cpustate import long_mode_state

HELP = "the cost of an exit to devices in Rust and in Python, per engine"

_SOURCE = Path(__file__).with_name("exit_loop.c")
_MEMORY = 16 << 20
_CODE = 0x10_0000
_PORT = 0x500
_LAST_PORT = 0xFF
_MMIO = 0xD000_0000
# dec rcx ; jnz the instruction ; out 0xff, al ; jmp $
_LOOP = "48ffc9 75{back:02x} e6ff ebfe"


@dataclass(frozen=True)
class Access:
    """One instruction that leaves the guest, and the counter of its exits."""

    code: bytes
    counter: str

    def guest(self) -> bytes:
        back = -(len(self.code) + 5) & 0xFF
        return self.code + bytes.fromhex(_LOOP.format(back=back))


ACCESSES = {
    "port out": Access(bytes.fromhex("ee"), "port_out"),  # out dx, al
    "port in": Access(bytes.fromhex("ec"), "port_in"),  # in al, dx
    "memory write": Access(bytes.fromhex("8906"), "mmio_write"),  # mov [rsi], eax
    "memory read": Access(bytes.fromhex("8b06"), "mmio_read"),  # mov eax, [rsi]
}

#: The promises. On kvm a write to a port: times the C program with a device in Rust; over it with
#: one in Python. On bt each access to a device in Rust.
RUST_FACTOR = 1.15
PYTHON_OVER_NS = 3000.0
BT_RUST_NS = 300.0


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
    parser.add_argument(
        "--engine", choices=("bt", "kvm"), help="one engine alone; the report is then not kept"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def measure(engine: str, access: Access, device: _native.Device, count: int) -> float:
    """Nanoseconds an exit, on a machine of its own."""
    vm = _native.Vm(engine, _MEMORY)
    vm.write_memory(_CODE, access.guest())
    vm.attach_ports(_PORT, 1, device)
    vm.attach_mmio(_MMIO, 0x1000, device)
    vm.attach_ports(_LAST_PORT, 1, _Stop(vm))
    vcpu = vm.vcpu(0)
    vcpu.set_regs(
        long_mode_state(vm, _CODE) | {"rcx": count, "rdx": _PORT, "rsi": _MMIO, "rsp": _CODE}
    )
    start = time.perf_counter_ns()
    end = vcpu.run()
    took = time.perf_counter_ns() - start
    exits = vm.stats()["exits"][access.counter]
    stop = 1 if access.counter == "port_out" else 0
    if end != "stopped" or exits != count + stop:
        raise BenchError(f"the guest ended as {end!r} after {exits} accesses; report this")
    return took / count


def _bare(program: Path, count: int) -> float:
    done = subprocess.run([program, str(count)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"the C program failed: {done.stderr.strip()}")
    return float(done.stdout)


def _rows(scratch: Path, count: int, engines: list[str]) -> dict[str, Callable[[], float]]:
    rows: dict[str, Callable[[], float]] = {}
    if "kvm" in engines:
        compiler = shutil.which("cc")
        if compiler is None:
            raise BenchError("no C compiler; install gcc")
        program = scratch / "exit_loop"
        subprocess.run([compiler, "-O2", "-o", program, _SOURCE], check=True)
        rows["kvm, port out, bare ioctls in C"] = lambda: _bare(program, count)
    makers: dict[str, Callable[[], _native.Device]] = {
        "Rust": _native.NullPort,
        "Python": _Nothing,
    }
    for engine in engines:
        for name, access in ACCESSES.items():
            for language, make in makers.items():

                def row(
                    engine: str = engine,
                    access: Access = access,
                    make: Callable[[], _native.Device] = make,
                ) -> float:
                    return measure(engine, access, make(), count)

                rows[f"{engine}, {name}, {language}"] = row
    return rows


def _report(best: dict[str, float], base: float | None, arguments: argparse.Namespace) -> str:
    rows = []
    for name, ns in best.items():
        beside = ("", "")
        if base is not None and name.startswith("kvm, port out, "):
            beside = (f"{ns / base:.2f}", f"{ns - base:+.0f}")
        rows.append((name, f"{ns:.0f}", *beside))
    host = table(("", ""), describe_host())
    return (
        "## The cost of an exit\n\n"
        f"`python -m tools.bench exits`: a 64-bit guest makes {arguments.count:,} accesses to a "
        f"device that does nothing; the best of {arguments.rounds} interleaved rounds, per "
        "access. Promised on bt: a device in Rust answers within "
        f"{BT_RUST_NS:.0f} ns. Promised on kvm, for port out: a device in Rust within "
        f"{RUST_FACTOR} times the C program, one in Python within {PYTHON_OVER_NS / 1000:.0f} µs "
        "over it. Where no hardware is behind /dev/kvm, the kernel's instruction emulator is most "
        "of each kvm row.\n\n"
        f"{host}\n\n" + table(("", "ns", "times C", "ns over C"), rows)
    )


def _kept(best: dict[str, float], base: float | None) -> bool:
    """Whether the promises hold for what was measured."""
    kept = all(
        ns <= BT_RUST_NS
        for name, ns in best.items()
        if name.startswith("bt, ") and name.endswith(", Rust")
    )
    if base is not None:
        kept &= best["kvm, port out, Rust"] <= RUST_FACTOR * base
        kept &= best["kvm, port out, Python"] <= base + PYTHON_OVER_NS
    return kept


def run(arguments: argparse.Namespace) -> int:
    engines = [arguments.engine] if arguments.engine else ["kvm", "bt"]
    if "kvm" in engines and (reason := _native.engine_available("kvm")) is not None:
        if arguments.engine:
            raise BenchError(f"engine kvm is not available: {reason}")
        engines.remove("kvm")
    with tempfile.TemporaryDirectory() as scratch:
        rows = _rows(Path(scratch), arguments.count, engines)
        best = dict.fromkeys(rows, float("inf"))
        for _ in range(arguments.rounds):
            for name, measured in rows.items():
                best[name] = min(best[name], measured())
    base = best.get("kvm, port out, bare ioctls in C")
    if arguments.json:
        print(json.dumps(best, indent=2))
    else:
        text = _report(best, base, arguments)
        print(text)
        if not arguments.engine:
            write_section("exits", text)
    return 0 if _kept(best, base) else 1
