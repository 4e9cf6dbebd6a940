"""Signals of the process that runs a machine: engine bt lets guest code fault on the host CPU."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch.testing import pvh_kernel

LIMIT_S = 60

# mov eax, 0x600 ; mov cr4, eax (OSFXSR, OSXMMEXCPT) ; ldmxcsr [0x100020] ; xorps xmm0, xmm0
# divps xmm0, xmm0 ; ud2, and at 0x100020 an MXCSR that masks nothing: an invalid operation,
# which the host CPU raises as SIGFPE
SIMD_FAULT = bytes.fromhex("b800060000 0f22e0 0fae1520001000 0f57c0 0f5ec0 0f0b").ljust(
    0x20, b"\x90"
) + (0).to_bytes(4, "little")

MACHINE = """
import faulthandler, os, signal, sys
from tetrarch import Machine
{before}
vm = Machine(kernel=sys.argv[1], engine="bt", memory="16M", console="none")
{after}
"""


def run(
    tmp_path: Path, code: bytes, after: str, before: str = ""
) -> subprocess.CompletedProcess[str]:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(code))
    script = MACHINE.format(before=before, after=after)
    return subprocess.run(
        [sys.executable, "-c", script, str(kernel)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("enable", ["before", "after"])
def test_a_guest_faults_in_a_process_with_faulthandler(tmp_path: Path, enable: str) -> None:
    handler = {enable: "faulthandler.enable()"}
    show = f"\nstatus = vm.run({LIMIT_S / 2})\nprint(status.reason, status.code)"
    done = run(tmp_path, SIMD_FAULT, handler.get("after", "") + show, handler.get("before", ""))
    # Without an IDT the guest's exception is its triple fault.
    assert (done.returncode, done.stdout) == (0, "crashed 3\n"), done.stderr


def test_faulthandler_reports_faults_of_the_process(tmp_path: Path) -> None:
    crash = "import ctypes; faulthandler.enable(); vm.start(); ctypes.string_at(8)"
    done = run(tmp_path, guests.ENDLESS_LOOP, crash)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


@pytest.mark.parametrize("name", ["SIGFPE", "SIGSEGV", "SIGBUS", "SIGILL"])
def test_a_signal_sent_to_the_process_ends_it(tmp_path: Path, name: str) -> None:
    kill = f"vm.start(); os.kill(os.getpid(), signal.{name}); signal.pause()"
    done = run(tmp_path, guests.ENDLESS_LOOP, kill)
    assert done.returncode == -getattr(signal, name)


def test_a_signal_that_the_process_ignores_changes_nothing(tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGFPE, signal.SIG_IGN)"
    kill = f"""
os.kill(os.getpid(), signal.SIGFPE)
os.kill(os.getpid(), signal.SIGFPE)
status = vm.run({LIMIT_S / 2})
print(status.reason, status.code)
"""
    done = run(tmp_path, SIMD_FAULT, kill, ignore)
    assert (done.returncode, done.stdout) == (0, "crashed 3\n"), done.stderr
