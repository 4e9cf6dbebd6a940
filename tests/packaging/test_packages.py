"""What the tests need of the system is installed without a terminal, and never in silence."""

import os
import re
import shutil
from pathlib import Path

import pexpect
import pytest
from tests.terminals import kill

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "test-packages"
LIMIT_S = 60

# As dpkg and debconf do: sets the terminal's attributes where there is a terminal. A program in
# the background is stopped by that (termios(3), SIGTTOU).
_APT_GET = """#!/bin/sh
echo "$*" >>"{log}"
(stty sane </dev/tty) 2>/dev/null || :
case "$*" in *" install "*) : >"{programs}/cpio"; chmod +x "{programs}/cpio" ;; esac
"""
_TOOLS = ("sh", "setsid", "timeout", "stty", "chmod")
# The script's own list of program:package, in its lines needed="…" and wanted="…".
_ASKED_FOR = [
    item.partition(":")[0]
    for line in re.findall(r'^(?:needed|wanted)="(.*)"$', SCRIPT.read_text(), re.MULTILINE)
    for item in line.split()
]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A Debian host where cpio is missing; its programs, and what apt-get was asked for."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in _TOOLS:
        found = shutil.which(name)
        assert found is not None, f"this test needs {name}, of every Debian system"
        (programs / name).symlink_to(found)
    assert "cpio" in _ASKED_FOR
    texts = {name: "#!/bin/sh\n" for name in _ASKED_FOR if name != "cpio"}
    texts["id"] = "#!/bin/sh\necho 0\n"
    texts["apt-get"] = _APT_GET.format(log=tmp_path / "log", programs=programs)
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return programs


def shell(programs: Path) -> "pexpect.spawn[str]":
    return pexpect.spawn(
        "/bin/bash",
        ["--norc", "-i"],
        encoding="utf-8",
        timeout=LIMIT_S,
        env={**os.environ, "PATH": str(programs), "TERM": "dumb"},
    )


@pytest.mark.parametrize("form", ["{} & wait $!", "timeout 50 {}"], ids=["background", "timeout"])
def test_packages_are_installed_in_the_background_of_a_terminal(host: Path, form: str) -> None:
    child = shell(host)
    child.sendline(f"{form.format(SCRIPT)}; echo r''c=$?")
    child.expect_exact("apt-get install cpio")
    child.expect(r"rc=(\d+)")
    assert child.match.group(1) == "0"
    kill(child)
    asked = (host.parent / "log").read_text()
    assert "install cpio" in asked
    assert "DPkg::Lock::Timeout=" in asked


def test_nothing_is_said_or_done_where_nothing_is_missing(host: Path) -> None:
    (host / "cpio").write_text("#!/bin/sh\n")
    (host / "cpio").chmod(0o755)
    child = shell(host)
    child.sendline(f"echo s''tart; {SCRIPT}; echo r''c=$?")
    child.expect(r"start\r\n(.*)rc=0")
    assert "tetrarch" not in child.match.group(1)
    kill(child)
    assert not (host.parent / "log").exists()
