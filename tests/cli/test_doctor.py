"""``tetrarch doctor`` and ``tetrarch engines`` on this host, and KVM that cannot be used."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.machine import guests

from tetrarch import _native
from tetrarch.testing import pvh_kernel

DEVICE = "/dev/kvm"


def test_doctor_looks_at_all_parts(cli: Cli) -> None:
    done = cli("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    for part in (DEVICE, "bt", "engine", "huge pages", "user namespaces", "apt", "passt", "tap"):
        assert findings[part]["detail"]
    assert {finding["state"] for finding in findings.values()} <= {"good", "note", "bad"}
    assert (done.returncode == 0) == (findings["engine"]["state"] == "good")


def test_doctor_for_people_says_how_to_mend(cli: Cli) -> None:
    done = cli("doctor")
    assert "--engine auto takes" in done.stdout
    bad = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    assert done.stdout.count("->") >= len(bad)


def test_engines_tells_what_kvm_is_worth(cli: Cli) -> None:
    engines = {info["name"]: info for info in json.loads(cli("engines", "--json").stdout)}
    assert engines["kvm"]["available"] == (_native.engine_available("kvm") is None)
    if engines["kvm"]["available"]:
        assert "hardware" in engines["kvm"]["note"]
    for lack in engines["kvm"]["lacks"]:
        assert lack["name"].startswith("KVM_CAP_")
        assert lack["lost"]


def test_device_that_is_not_kvm_is_told_apart() -> None:
    probe = _native.kvm_probe("/dev/null")
    assert probe["reason"] is not None
    assert "/dev/null is not KVM" in probe["reason"]
    assert not probe["hardware"]
    assert _native.kvm_capabilities("/dev/null") == []


@pytest.fixture
def stranger() -> int:
    """A user who may not open /dev/kvm."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    if not os.path.exists(DEVICE):
        pytest.skip(f"no {DEVICE}")
    if os.stat(DEVICE).st_mode & stat.S_IWOTH:
        pytest.skip(f"everybody may open {DEVICE} here")
    return 65534


def test_no_permission_gives_one_line_with_the_mend(stranger: int, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    # Imported while still root: the sources may lie where a stranger cannot read.
    script = (
        "import os, sys; from tetrarch.cli import app, entry, run, doctor; "
        "import tetrarch.machine.kvm, tetrarch.images, typer.main, typer.exceptions; "
        f"os.setgroups([]); os.setgid({stranger}); os.setuid({stranger}); "
        "sys.exit(entry.run_cli(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "--engine", "kvm", "--kernel", kernel],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no permission to open /dev/kvm" in line
    assert "usermod -aG kvm" in line


def test_more_vcpus_than_the_host_allows_are_refused_with_the_limit(cli: Cli) -> None:
    reason = _native.engine_available("kvm")
    if reason is not None:
        pytest.skip(reason)
    limit = _native.kvm_probe()["max_vcpus"]
    with pytest.raises(_native.EngineError, match=f"1 to {limit}; use --cpus {limit}"):
        _native.Vm("kvm", 1 << 20, limit + 1)
