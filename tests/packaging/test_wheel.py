"""The wheel, in an environment that has neither Rust nor the sources."""

import os
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import __version__
from tetrarch.testing import pvh_kernel

ROOT = Path(__file__).resolve().parents[2]
# Where Debian has its own programs, and rustup never puts any.
SYSTEM_PATH = "/usr/bin:/bin"
# Building takes minutes on two CPUs; everything else takes seconds.
BUILD_LIMIT_S = 1200
LIMIT_S = 120

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + 10 * LIMIT_S)]


@pytest.fixture(scope="module")
def wheel() -> Path:
    # Not the outer make's jobs and variables.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MAKE")}
    before = set((ROOT / "dist").glob("*.whl"))
    for old in before:
        old.unlink()
    subprocess.run(["make", "wheel"], cwd=ROOT, env=environment, check=True, timeout=BUILD_LIMIT_S)
    (built,) = (ROOT / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the programs of a clean environment with the wheel."""
    assert shutil.which("cargo", path=SYSTEM_PATH) is None, "this host has Debian's own cargo"
    root = tmp_path_factory.mktemp("clean")
    venv.create(root, with_pip=True)
    programs = root / "bin"
    pip: list[str | Path] = [programs / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [*pip, "--only-binary", ":all:", "--disable-pip-version-check", wheel],
        cwd=root,
        env=clean_environment(),
        check=True,
        timeout=LIMIT_S,
    )
    return programs


def clean_environment() -> dict[str, str]:
    return {"PATH": SYSTEM_PATH, "HOME": os.environ.get("HOME", "/root")}


def run(programs: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [programs / "tetrarch", *arguments],
        cwd=programs,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


def test_wheel_serves_every_python_from_3_11_on_and_has_its_data(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name
    assert wheel.name.endswith("_x86_64.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "tetrarch/py.typed",
        "tetrarch/_native.pyi",
        "tetrarch/images/guest/init",
        "tetrarch/images/guest/inittab",
        "tetrarch/images/guest/profile",
        "tetrarch/images/guest/udhcpc",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "crates/"))]


def test_installed_program_has_its_man_pages_and_completes(installed: Path) -> None:
    share = installed.parent / "share"
    assert (share / "man" / "man1" / "tetrarch-run.1").read_text().startswith(".TH TETRARCH-RUN 1")
    for path in (
        "bash-completion/completions/tetrarch",
        "zsh/site-functions/_tetrarch",
        "fish/vendor_completions.d/tetrarch.fish",
    ):
        assert "_TETRARCH_COMPLETE" in (share / path).read_text()


def test_installed_program_says_its_version(installed: Path) -> None:
    done = run(installed, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tetrarch {__version__}\n", "")


def test_installed_program_runs_a_guest(installed: Path, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.say(b"hello from the guest\n") + guests.POWER_OFF))
    done = run(installed, "run", "--engine", "bt", "--kernel", kernel, "--memory", "16M")
    assert done.returncode == 0, done.stderr
    assert "hello from the guest" in done.stdout
