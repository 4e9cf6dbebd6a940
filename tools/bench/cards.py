"""Network cards other than virtio's: one guest with a card of each model, on engine bt.

iperf3 runs over them in turns, in one run of the guest. What differs is the card and the guest's
driver of it: taps, the network's layers and the I/O thread are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tools.bench.buses import initrd_with
from tools.bench.iperf import iperf
from tools.bench.report import BenchError, describe_host, table, write_section

from tetrarch import Machine, images

HELP = "iperf3 by virtio's card, VMware's and Intel's, in one guest"

_PROMPT = "root@tetrarch:~# "
_BOOT_S = 120

#: Models; the first is what others are measured by.
MODELS = ("virtio", "vmxnet3", "e1000")
#: Those with a goal. An e1000 takes no frame longer than the network has, and is there for guests
#: that have no other driver.
GOAL = ("vmxnet3",)
#: iperf3's option -> what a row is called.
WAYS = {"": "guest to host", "--reverse": "host to guest"}
#: The goal: so many times what virtio has, over all rows.
FACTOR = 0.9

Figures = Mapping[tuple[str, str], float]
"""By iperf3's option and the model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="of each; medians [5]")
    parser.add_argument("--seconds", type=int, default=4, help="for each iperf3 [4]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise BenchError("taps are made for the guest; run it as root")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        figures = _measure(Path(scratch), arguments.rounds, arguments.seconds)
    ratio = mean_ratio(figures)
    if arguments.json:
        rates = {f"{model}, {WAYS[way]}": figure for (way, model), figure in figures.items()}
        print(json.dumps({"rates": rates, "ratio": ratio}, indent=2))
    else:
        text = _report(figures, ratio, arguments)
        print(text)
        write_section("cards", text)
    return 0 if ratio >= FACTOR else 1


def _tap(number: int) -> str:
    return f"bench{number}"


def _host(number: int) -> str:
    return f"10.87.{number}.1"


@contextmanager
def _tap_up(number: int) -> Iterator[None]:
    commands = [
        ["ip", "tuntap", "add", _tap(number), "mode", "tap", "vnet_hdr"],
        ["ip", "address", "add", f"{_host(number)}/30", "dev", _tap(number)],
        ["ip", "link", "set", _tap(number), "up"],
    ]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
        yield
    finally:
        subprocess.run(["ip", "link", "delete", _tap(number)], capture_output=True, check=False)


def _measure(folder: Path, rounds: int, seconds: int) -> Figures:
    guest = images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        for number in range(len(MODELS)):
            stack.enter_context(_tap_up(number))
        machine = stack.enter_context(
            Machine(
                engine="bt",
                kernel=guest.kernel,
                initrd=initrd_with("iperf3", guest.initrd, folder),
                memory="512M",
                net=[f"tap={_tap(number)},model={model}" for number, model in enumerate(MODELS)],
            )
        )
        machine.start()
        machine.console.expect(_PROMPT, _BOOT_S)

        def say(command: str) -> str:
            machine.console.send(f"{command}\n")
            return machine.console.expect(_PROMPT, _BOOT_S + 3 * seconds)

        for number, model in enumerate(MODELS):
            # By the card's driver: which is found first is the kernel's affair.
            driver = "virtio_net" if model == "virtio" else model
            say(
                f"for card in /sys/class/net/eth*; do readlink $card/device/driver | grep -q "
                f"'/{driver}$' && ip addr add 10.87.{number}.2/30 dev ${{card##*/}} && "
                "ip link set ${card##*/} up; done"
            )
        for round_number in range(1, rounds + 1):
            print(f"bench: round {round_number} of {rounds}", file=sys.stderr)
            for way in WAYS:
                for number, model in enumerate(MODELS):
                    figure = iperf(say, _host(number), way, seconds)
                    found.setdefault((way, model), []).append(figure)
    return {key: statistics.median(figures) for key, figures in found.items()}


def mean_ratio(figures: Figures) -> float:
    """The geometric mean, over the rows, of the figure of each card with a goal over that of the
    first."""
    first = MODELS[0]
    ratios = [figures[way, model] / figures[way, first] for way in WAYS for model in GOAL]
    return statistics.geometric_mean(ratios)


def _report(figures: Figures, ratio: float, arguments: argparse.Namespace) -> str:
    first, *others = MODELS
    rows = []
    for way, name in WAYS.items():
        values = [figures[way, model] for model in MODELS]
        ratios = [f"{figures[way, model] / figures[way, first]:.2f}" for model in others]
        rows.append((f"iperf3, {name}, Mbit/s", *(f"{value:,.0f}" for value in values), *ratios))
    host = table(("", ""), describe_host())
    header = ("", *MODELS, *("ratio" for _ in others))
    return (
        "## Networks by their card\n\n"
        "`python -m tools.bench cards`: one guest on engine bt, one virtual CPU, 512 MiB, a card "
        f"of each model on a tap of its own; medians of {arguments.rounds} interleaved rounds, "
        f"iperf3 for {arguments.seconds} s each, one connection. The goal of {', '.join(GOAL)} is "
        f"{FACTOR} times what virtio has, in the geometric mean of the rows; it is {ratio:.2f} "
        "here.\n\n"
        f"{host}\n\n" + table(header, rows)
    )
