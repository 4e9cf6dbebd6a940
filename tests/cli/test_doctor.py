"""``tetrarch doctor`` and ``tetrarch engines`` on this host, and KVM that cannot be used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.machine import guests

from tetrarch import _native
from tetrarch.cli.reports import show_engines
from tetrarch.machine import selection
from tetrarch.machine.selection import EngineInfo
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


def test_cpu_models_are_listed_with_what_each_engine_lacks(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("cpu-models", "--json").stdout)}
    available = {
        info["name"] for info in json.loads(cli("engines", "--json").stdout) if info["available"]
    }
    assert rows["x86-64-v4"]["lacks"].keys() == available
    assert "avx512f" in rows["x86-64-v4"]["lacks"]["bt"]
    assert {"avx2", "sse4_2"} <= set(rows["Haswell"]["features"])
    assert rows["Haswell"]["vendor"] == "GenuineIntel"
    strange = "EPYC" if rows["EPYC"]["lacks"]["bt"] is None else "Haswell"
    shown = cli("cpu-models").stdout
    assert re.search(rf"^{strange} +for hosts with a CPU of (AMD|Intel)'s$", shown, re.MULTILINE)
    assert re.search(r"engine bt lacks .*avx512f", shown)


def test_cpu_that_cannot_be_is_one_line(cli: Cli, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    done = cli("run", "--engine", "bt", "--kernel", kernel, "--cpu", "x86-64-v4")
    assert done.returncode == 1
    assert re.fullmatch(
        r"tetrarch: cpu x86-64-v4: .*avx512f.*; .*give x86-64-v4,\S+\n", done.stderr
    )


def test_device_that_is_not_kvm_is_told_apart() -> None:
    probe = _native.kvm_probe("/dev/null")
    assert probe["reason"] is not None
    assert "/dev/null is not KVM" in probe["reason"][0]
    assert not probe["hardware"]
    assert _native.kvm_capabilities("/dev/null") == []


def test_kvm_that_no_hardware_is_behind_is_not_just_available(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crawling = EngineInfo("kvm", "KVM", None, note="1/2,208 of the CPU", slow=True)
    monkeypatch.setattr(selection, "engines", lambda: [crawling])
    show_engines(as_json=False)
    shown = capsys.readouterr().out
    assert "works, but slowly; bt is faster here" in shown
    assert "available" not in shown


# A user of no account and no group, and what lets it read this clone and its Python, which may lie
# where only root looks, but write nothing.
STRANGER = 65534
_READS_ALL = "dac_read_search"


@pytest.fixture
def stranger() -> list[str]:
    """The start of a command line that may not open /dev/kvm."""
    if not os.path.exists(DEVICE):
        pytest.skip(f"no {DEVICE}")
    if os.geteuid() != 0:
        if os.access(DEVICE, os.R_OK | os.W_OK):
            pytest.skip("this user may open it, and only root can become somebody else")
        return []
    drop = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    reads_all = [f"--inh-caps=+{_READS_ALL}", f"--ambient-caps=+{_READS_ALL}"]
    look = "import tetrarch.cli.app, tetrarch.machine"
    for command in ([*drop, *reads_all], drop):
        if subprocess.run([*command, "test", "-w", DEVICE], check=False).returncode == 0:
            pytest.skip(f"everybody may open {DEVICE} here")
        tried = subprocess.run(
            [*command, sys.executable, "-c", look], check=False, capture_output=True
        )
        if tried.returncode == 0:
            return command
    pytest.skip(f"root may not hand on cap_{_READS_ALL} here, and others cannot read this clone")


def as_stranger(stranger: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*stranger, sys.executable, "-m", "tetrarch", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_no_permission_gives_one_line_with_the_mend(stranger: list[str], tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    done = as_stranger(stranger, "run", "--engine", "kvm", "--kernel", kernel)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no permission to open /dev/kvm" in line
    assert any(tool in line for tool in ("setfacl", "usermod -aG kvm", "log in anew"))


def test_doctor_says_once_what_grants_the_device_and_never_root(stranger: list[str]) -> None:
    done = as_stranger(stranger, "doctor")
    assert "may not open it" in done.stdout
    assert "-aG root" not in done.stdout
    mends = [line for line in done.stdout.splitlines() if "->" in line and DEVICE in line]
    assert len(mends) <= 1
    assert done.stdout.count("usermod") <= 1


def test_more_vcpus_than_the_host_allows_are_refused_with_the_limit(cli: Cli) -> None:
    reason = _native.engine_available("kvm")
    if reason is not None:
        pytest.skip("; ".join(reason))
    limit = _native.kvm_probe()["max_vcpus"]
    with pytest.raises(_native.EngineError, match=f"1 to {limit}; ask for at most {limit} CPUs"):
        _native.Vm("kvm", 1 << 20, limit + 1)
