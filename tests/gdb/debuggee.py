"""The kernel of kernel.c, and stock gdb at it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = (
    *("-g", "-O0", "-ffreestanding", "-fno-pic", "-no-pie", "-static", "-nostdlib"),
    *("-mno-red-zone", "-fno-stack-protector", "-fcf-protection=none", "-w"),
    "-Wl,-N,-e,entry,-Ttext=0x100000,--build-id=none,--no-warn-rwx-segments",
)
_LIMIT_S = 120


def build_kernel(directory: Path) -> Path:
    kernel = directory / "kernel"
    subprocess.run(["gcc", *_FLAGS, "-o", kernel, _SOURCE], check=True, timeout=_LIMIT_S)
    return kernel


def require_gdb() -> str:
    program = shutil.which("gdb")
    if program is None:
        pytest.skip("no gdb on this host: tools/test-packages")
    return program


def attempt(command: str) -> str:
    """A command of gdb's that may be refused; then it says "refused:" and why."""
    code = f"try: gdb.execute({command!r})\nexcept gdb.error as error: print('refused:', error)"
    return f"python exec({code!r})"


def gdb_script(commands: str, address: str, symbols: Path | None = None) -> str:
    """What gdb says in a batch session at ``address``; fails where a command does."""
    words = [require_gdb(), "--batch", "-nx", "-iex", "set style enabled off"]
    words += ["-iex", "set debuginfod enabled off", "-iex", "set confirm off"]
    words += ["-ex", "set pagination off", "-ex", "set width 0", "-ex", "set tcp auto-retry off"]
    words += ["-ex", f"target remote {address}"]
    for command in commands.strip().splitlines():
        words += ["-ex", command.strip()]
    if symbols is not None:
        words.append(str(symbols))
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_LIMIT_S,
        check=False,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
