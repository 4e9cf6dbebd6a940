"""What the start of a machine imports: what it has no use for costs time before its guest runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

LIMIT_S = 60

#: Of devices and options that the machine has not.
UNUSED = {
    "asyncio",
    "tetrarch.agent.command",
    "tetrarch.aio",
    "tetrarch.cli.command",
    "tetrarch.cli.detach",
    "tetrarch.control.server",
    "tetrarch.devices.fw_cfg",
    "tetrarch.devices.svga2",
    "tetrarch.devices.vga",
    "tetrarch.display.display",
    "tetrarch.gdb.server",
    "tetrarch.images",
    "tetrarch.machine.config_file",
    "tetrarch.machine.core_dump",
    "tetrarch.machine.firmware",
    "tetrarch.net.passt",
    "tetrarch.remote",
    "tetrarch.share.virtiofsd",
    "tetrarch.storage.ahci",
    "tetrarch.storage.ide",
    "tetrarch.storage.nvme",
    "tetrarch.storage.pvscsi",
    "tetrarch.vnc.server",
}
#: Of a machine that boots.
BOOT = {"tetrarch.boot.acpi", "tetrarch.boot.loader", "tetrarch.boot.bzimage"}
#: Of a machine from a file.
SAVED = {"tetrarch.machine.saved", "tetrarch.machine.snapshot"}

RUN = """
import sys
from tetrarch.cli.entry import run_cli

code = run_cli(["run", *sys.argv[1:]])
print("\\n" + " ".join(sys.modules))
sys.exit(code)
"""


def modules_of_run(*options: str | Path) -> set[str]:
    """Those that a run has imported when it has ended."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, options)],
        input="x",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Of a guest that switches itself off when something is typed."""
    # wait: mov edx, 0x3fd ; in al, dx ; test al, 1 ; jz wait
    typed = bytes.fromhex("bafd030000 ec a801 74f6")
    path = tmp_path / "kernel"
    path.write_bytes(pvh_kernel(guests.say(b"ready") + typed + guests.POWER_OFF))
    return path


def test_what_must_not_be_imported_is_there() -> None:
    for name in UNUSED | BOOT | SAVED:
        assert find_spec(name) is not None, name


def test_run_imports_no_more_than_its_machine_has(kernel: Path) -> None:
    found = modules_of_run("--engine", "bt", "--memory", "16M", "--kernel", kernel)
    assert "tetrarch.boot.loader" in found
    assert found & (UNUSED | SAVED) == set()


def test_restore_imports_nothing_that_boots(kernel: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with Machine(engine="bt", memory="16M", kernel=kernel) as vm:
        vm.start()
        vm.console.expect("ready", LIMIT_S)
        vm.save(saved)
    found = modules_of_run("--restore", saved)
    assert found >= SAVED
    assert found & (UNUSED | BOOT) == set()
