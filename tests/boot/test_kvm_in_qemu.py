"""The engine kvm on a KVM that works: Debian's kvm-amd on the SVM of QEMU's TCG."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.boot.nested import INNER_APPEND, NestedHost

ROOT = Path(__file__).resolve().parents[2]
BUILD_LIMIT_S = 1200
# Some forty seconds on an idle machine of two CPUs; a busy one takes its time.
BOOT_LIMIT_S = 900

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + 2 * BOOT_LIMIT_S)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel named by TETRARCH_WHEEL, or one that is built now."""
    if named := os.environ.get("TETRARCH_WHEEL"):
        return Path(named)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        ["maturin", "build", "--release", "--strip", "--locked", "--out", out],
        cwd=ROOT,
        check=True,
        timeout=BUILD_LIMIT_S,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def host(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> NestedHost:
    assert shutil.which("qemu-system-x86_64"), "install qemu-system-x86; make packages does it"
    return NestedHost(wheel, tmp_path_factory.mktemp("nested"))


def test_debian_boots_on_two_vcpus_of_a_working_kvm(host: NestedHost) -> None:
    run = (
        "python3 -m tetrarch run --engine kvm --cpus 2 --memory 256M --kernel /vmlinuz "
        f'--initrd /inner.cpio --append "{INNER_APPEND}" --timeout {BOOT_LIMIT_S - 60} --stats'
    )
    console = host.boot(
        f"python3 -m tetrarch doctor\n{run}\necho outer: exit code $?", BOOT_LIMIT_S
    )
    clocks = re.search(r"^inner: clocks (.*)$", console, re.MULTILINE)
    assert clocks is not None and "kvm-clock" in clocks[1].split(), console
    assert "inner: processors 2\n" in console, console
    assert "outer: exit code 0\n" in console, console
    # Hardware stands behind this one: the probe's loop runs at the host's speed.
    assert "hardware-backed" in console, console
