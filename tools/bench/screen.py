"""A console that scrolls, at a viewer: one guest on engine bt, on each kind of screen.

A program in the guest writes lines to the console as fast as it takes them, while a viewer asks for
update after update. How often the screen is looked at has an end (tetrarch/display/display.py), so
what is left of the guest's speed beside a viewer is a figure of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal

from tools.bench.report import ROOT, BenchError, describe_host, table, write_section

from tetrarch import Machine, images
from tetrarch.display.font import VGA_BIOS
from tetrarch.images import CachedGuest, Initramfs
from tetrarch.images.archive import unpack
from tetrarch.images.modules import ModuleTree, modules_dep

HELP = "updates of a scrolling console at a VNC viewer, of a VGA's text and by vmwgfx"

_PROMPT = "root@tetrarch:~# "
_BOOT_S = 120
_GUEST: Final = "debian-amd64"
_DRIVER: Final = "vmwgfx"
#: Where the guest has the driver's modules.
_MODULES: Final = "bench"
LOAD: Final = f"sh /{_MODULES}/load"

Kind = Literal["vga", "svga"]
#: Kind of screen -> what a column is called.
SCREENS: Final[Mapping[Kind, str]] = {"vga": "VGA text, 80 by 25", "svga": "vmwgfx, 1280 by 800"}
UPDATES, WATCHED, ALONE, BYTES = "updates", "watched", "alone", "bytes"
#: Figure -> what a row is called.
ROWS: Final[Mapping[str, str]] = {
    UPDATES: "updates a second, at the viewer",
    BYTES: "KiB a second, at the viewer",
    WATCHED: "lines a second, watched",
    ALONE: "lines a second, with no viewer",
}

#: 100 lines at a time, by the shell alone; it says how many, and from when to when.
_SCROLL: Final = (
    "text=$(seq 1 100 | sed 's/$/ The quick brown fox jumps over the lazy dog and back./'); "
    "n=0; read -r from _ </proc/uptime; now=$from; "
    'while [ ${{now%.*}} -lt $((${{from%.*}} + {seconds})) ]; do echo "$text" >/dev/tty1; '
    "n=$((n + 100)); read -r now _ </proc/uptime; done; echo lines $n $from $now"
)

Figures = Mapping[tuple[str, str], float]
"""By the figure and the kind of screen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="of each; medians [5]")
    parser.add_argument("--seconds", type=int, default=4, help="for each [4]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    if not VGA_BIOS.exists():
        raise BenchError("no font for a VGA's text; install seabios")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        figures = _measure(Path(scratch), arguments.rounds, arguments.seconds)
    if arguments.json:
        rates = {f"{name}, {screen}": figure for (name, screen), figure in figures.items()}
        print(json.dumps({"rates": rates}, indent=2))
    else:
        text = _report(figures, arguments)
        print(text)
        write_section("screen", text)
    return 0


def _measure(folder: Path, rounds: int, seconds: int) -> Figures:
    cache = images.Cache()
    guest = images.ensure(cache, _GUEST, images.TerminalReporter())
    initrd = with_driver(cache, guest, folder)
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        machines = {
            screen: stack.enter_context(_booted(guest.kernel, initrd, screen)) for screen in SCREENS
        }
        for number in range(1, rounds + 1):
            print(f"bench: round {number} of {rounds}", file=sys.stderr)
            for screen, machine in machines.items():
                figures = _scrolled(machine, seconds)
                for name, figure in figures.items():
                    found.setdefault((name, screen), []).append(figure)
    return {key: statistics.median(figures) for key, figures in found.items()}


def with_driver(cache: images.Cache, guest: CachedGuest, folder: Path) -> Path:
    """The guest's initramfs, and behind it the driver's modules, which ``LOAD`` loads."""
    (package,) = (name for name in guest.manifest.packages if name.startswith("linux-image-"))
    kernel = folder / "kernel"
    kernel.mkdir()
    unpack(cache.packages / package, kernel)
    modules = ModuleTree(kernel / "lib/modules" / guest.manifest.release).closure([_DRIVER])
    tree = Initramfs()
    for module in modules:
        tree.file(f"{_MODULES}/{module.path}", module.data)
    (line,) = (line for line in modules_dep(modules).splitlines() if f"/{_DRIVER}.ko:" in line)
    # Each behind those that it needs.
    order = reversed(line.replace(":", "").split())
    commands = "".join(f"insmod /{_MODULES}/{module}\n" for module in order)
    tree.file(f"{_MODULES}/load", f"set -e\n{commands}".encode())
    both = folder / "initrd.gz"
    both.write_bytes(guest.initrd.read_bytes() + tree.gzip())
    return both


@contextmanager
def _booted(kernel: Path, initrd: Path, screen: Kind) -> Iterator[Machine]:
    with Machine(
        engine="bt",
        platform="vmware",
        kernel=kernel,
        initrd=initrd,
        memory="512M",
        append="console=tty0 console=ttyS0 quiet",
        vga=True,
        screen=screen,
        display="vnc=0",
    ) as machine:
        machine.start()
        machine.console.expect(_PROMPT, _BOOT_S)
        if screen == "svga":
            machine.console.send(f"{LOAD}\n")
            machine.console.expect(_PROMPT, _BOOT_S)
        # A cursor that blinks would be an update of its own.
        machine.console.send("echo 0 >/sys/class/graphics/fbcon/cursor_blink; cat /proc/fb\n")
        said = machine.console.expect(_PROMPT, _BOOT_S)
        if (_DRIVER in said.partition("\n")[2]) != (screen == "svga"):
            raise BenchError(f"the guest has another screen than {screen}: {said.strip()[-200:]}")
        yield machine


def _scrolled(machine: Machine, seconds: int) -> dict[str, float]:
    def scroll(longer: int = 0) -> None:
        machine.console.send(_SCROLL.format(seconds=seconds + longer) + "\n")

    def lines() -> float:
        return lines_a_second(machine.console.expect(_PROMPT, _BOOT_S + seconds))

    scroll()
    alone = lines()
    if machine.display is None:
        raise BenchError("the machine shows nothing")
    with subprocess.Popen(
        [sys.executable, "-m", "tools.bench.viewer", machine.display.address, str(seconds)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as viewer:
        try:
            assert viewer.stdout is not None
            if viewer.stdout.readline() != "ready\n":
                raise BenchError("the viewer does not get a picture")
            # It looks while the console scrolls.
            scroll(longer=1)
            said, _ = viewer.communicate("go\n", timeout=_BOOT_S)
        finally:
            viewer.kill()
    updates, taken = map(float, said.split())
    return {UPDATES: updates, BYTES: taken / 1024, WATCHED: lines(), ALONE: alone}


def lines_a_second(said: str) -> float:
    """Of what the guest says at the end."""
    match = re.search(r"^lines (\d+) ([0-9.]+) ([0-9.]+)\r?$", said, re.MULTILINE)
    if match is None:
        raise BenchError(f"the guest says no lines: {said.strip()[-200:]}")
    count, begun, ended = (float(text) for text in match.groups())
    return count / (ended - begun)


def _report(figures: Figures, arguments: argparse.Namespace) -> str:
    rows = [
        (name, *(f"{figures[row, screen]:,.{int(row == UPDATES)}f}" for screen in SCREENS))
        for row, name in ROWS.items()
    ]
    host = table(("", ""), describe_host())
    return (
        "## Screens\n\n"
        "`python -m tools.bench screen`: a guest on engine bt for each kind of screen, one virtual "
        "CPU, 512 MiB, whose console scrolls as fast as it can, and a viewer in a process of its "
        "own that asks for update after update (ZRLE, nothing decoded); medians of "
        f"{arguments.rounds} interleaved rounds of {arguments.seconds} s. The screen is looked at "
        "25 times a second at most.\n\n"
        f"{host}\n\n" + table(("", *SCREENS.values()), rows)
    )
