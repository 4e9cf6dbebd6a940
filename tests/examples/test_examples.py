"""The programs of examples/ that no other test runs: they do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.examples import ROOT

from tetrarch.images import CachedGuest

LIMIT_S = 240


VMWARE = {
    "translation": (
        "the guest's CR0 is 0x11: protected mode, no paging\n3000003 instructions were run\n"
        "6 translated, in 4 blocks\n1000000 interpreted: SMSW, each time\n"
    ),
    "shadow": (
        "read once: 64 looks at the guest's tables\nread twice: 64 looks at the guest's tables\n"
        "read twice, CR3 written: 128 looks at the guest's tables\n"
    ),
    "traces": (
        "the guest wrote 987654321 by an instruction that it changed each time\n"
        "9 times a page of code was written to\n"
    ),
    "backdoor": "on platform pc EAX is 0xffffffff\non platform vmware EAX is 0x40\n",
}


@pytest.mark.parametrize("name", VMWARE)
def test_example_of_how_vmware_works(name: str, tmp_path: Path) -> None:
    assert run_example(ROOT / f"examples/vmware/{name}.py", tmp_path) == VMWARE[name]


def test_balloon_gives_the_hosts_memory_back(tmp_path: Path, debian_guest: CachedGuest) -> None:
    printed = run_example(ROOT / "examples/vmware/balloon.py", tmp_path)
    before, after = map(int, re.findall(r": (\d+) MiB", printed))
    assert after < before - 100
    assert "balloon of 256 MiB" in printed


def test_hypercalls_of_a_boot_are_counted(tmp_path: Path, debian_guest: CachedGuest) -> None:
    printed = run_example(ROOT / "examples/xen/hypercall.py", tmp_path)
    asked, native = re.fullmatch(r"(\{.*\}) and (\d+) in Rust\n", printed).groups()  # type: ignore[union-attr]
    assert {"memory_op", "event_channel_op", "vcpu_op"} <= set(json.loads(asked.replace("'", '"')))
    assert int(native) > 20


def test_each_port_is_of_one_cpu(tmp_path: Path, debian_guest: CachedGuest) -> None:
    printed = run_example(ROOT / "examples/xen/event_channel.py", tmp_path)
    rows = re.findall(r"port \d: (\d+) on CPU 0, (\d+) on CPU 1\n", printed)
    assert all("0" in row for row in rows)
    assert sum(int(count) for row in rows for count in row) > 0


@pytest.mark.parametrize(
    "path",
    [path for name in ("vmware", "xen") for path in sorted((ROOT / "examples" / name).iterdir())],
    ids=lambda it: it.name,
)
def test_example_for_students_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 30


def run_example(path: Path, where: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=where,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (
            ["debugger.py"],
            "do_unlinkat(/tmp/one), from __x64_sys_unlink\n"
            "do_unlinkat(/tmp/two), from __x64_sys_unlink\n2 hits\n",
        ),
        (["two_machines.py"], "right answers\npowered-off powered-off\n"),
        (["-m", "pytest", "-q", "test_guest.py"], "1 passed"),
    ],
    ids=["debugger", "two-machines", "pytest"],
)
def test_example(words: list[str], printed: str, tmp_path: Path, debian_guest: CachedGuest) -> None:
    for name in ("debugger.py", "two_machines.py", "test_guest.py"):
        (tmp_path / name).write_text((ROOT / "examples" / name).read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, printed in done.stdout) == (0, True), done.stdout + done.stderr
