"""The engine kvm on a KVM that works: Debian's kvm-amd on the SVM of QEMU's TCG."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, INNER_APPEND, ROOT, NestedHost, nested_host

# A minute on an idle machine of two CPUs; a busy one takes its time.
BOOT_LIMIT_S = 900
# Each takes some seconds on an idle machine.
PROGRAM_LIMIT_S = 300
PLAIN = "--color never --test-threads 1"

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S + 2 * BOOT_LIMIT_S)


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    """The Rust tests that need a KVM, as programs by name; built if they are not yet."""
    built = subprocess.run(
        [
            *("cargo", "test", "--release", "--locked", "--no-run", "--message-format=json"),
            *("-p", "tetrarch-engine-kvm", "--test", "kvm"),
            *("-p", "tetrarch-machine", "--test", "contract"),
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        timeout=BUILD_LIMIT_S,
    )
    artifacts = [json.loads(line) for line in built.stdout.splitlines()]
    return {
        artifact["target"]["name"]: Path(artifact["executable"])
        for artifact in artifacts
        if artifact.get("executable") and "test" in artifact["target"]["kind"]
    }


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> NestedHost:
    return nested_host(tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="module")
def console(host: NestedHost) -> str:
    """What one boot of the outer system shows: doctor, the machine, the tests."""
    run = (
        "python3 -m tetrarch run --engine kvm --cpus 2 --memory 256M --kernel /vmlinuz "
        f'--initrd /inner.cpio --append "{INNER_APPEND}" --timeout {BOOT_LIMIT_S // 2} --stats'
    )
    suite = (
        "cd /suite && REQUIRE_KVM=1 python3 -m pytest -q -p no:cacheprovider "
        "--import-mode=importlib -o pythonpath=. --tb=short -k 'kvm or smp' tests/conformance"
    )
    commands = (
        "python3 -m tetrarch doctor",
        run,
        "echo outer: exit code $?",
        suite,
        "echo outer: conformance $?",
    )
    return host.boot("\n".join(commands), BOOT_LIMIT_S)


def test_doctor_sees_that_hardware_is_behind_it(console: str) -> None:
    assert "hardware-backed" in console, console
    assert "--engine auto takes kvm" in console, console


def test_debian_boots_on_two_vcpus(console: str) -> None:
    clocks = re.search(r"^inner: clocks (.*)$", console, re.MULTILINE)
    assert clocks is not None, console
    assert "kvm-clock" in clocks[1].split(), console
    assert "inner: processors 2\n" in console, console
    assert "outer: exit code 0\n" in console, console


def test_conformance_tests_pass(console: str) -> None:
    assert "outer: conformance 0\n" in console, console


# In some boots a vCPU of the emulated KVM does not come out of guest code in these programs, so
# they are not for every run.
@pytest.fixture(scope="module")
def programs_console(host: NestedHost, programs: dict[str, Path]) -> str:
    """What one more boot shows: the Rust tests."""
    commands = (
        f"REQUIRE_KVM=1 timeout {PROGRAM_LIMIT_S} /suite/contract {PLAIN} Kvm",
        "echo outer: contract $?",
        f"REQUIRE_KVM=1 timeout {PROGRAM_LIMIT_S} /suite/kvm {PLAIN}",
        "echo outer: engine kvm $?",
    )
    return host.boot("\n".join(commands), BOOT_LIMIT_S, programs)


@pytest.mark.long
def test_contract_holds_for_both_engines(programs_console: str) -> None:
    assert "outer: contract 0\n" in programs_console, programs_console


@pytest.mark.long
def test_doorbells_eventfds_and_dirty_log_work(programs_console: str) -> None:
    assert "outer: engine kvm 0\n" in programs_console, programs_console
