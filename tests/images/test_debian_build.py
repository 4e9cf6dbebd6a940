"""How a Debian disk is built, with a stand-in for mmdebstrap: the network is not asked."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tetrarch.errors import ImageError
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
from tetrarch.images.progress import Reporter
from tetrarch.images.store import INITRD, KERNEL, DiskStore
from tetrarch.images.tool import find_tool

LIMIT_S = 60
STATUS = "Package: bash\nStatus: install ok installed\nVersion: 5.2.15-2\n\nPackage: base-files\n"
STATUS += "Essential: yes\nVersion: 12.4+deb12u5\n"

# FAKE_DEBIAN says what goes wrong.
_MMDEBSTRAP = """#!/bin/sh
printf '%s\\n' "$@" >"{folder}/arguments"
echo "$SOURCE_DATE_EPOCH" >"{folder}/epoch"
for word; do case "$word" in --setup-hook=upload*)
    word="${{word#*upload }}"; cp "${{word%% *}}" "{folder}/pins" ;; esac; done
echo "I: automatically chosen format: tar"
echo "Unpacking bash (5.2.15-2) ..."
case "$FAKE_DEBIAN" in
unknown)
    echo "Reading package lists..."
    echo "E: Unable to locate package nonsense"
    echo "E: apt-get --yes install nonsense failed"
    exit 100 ;;
network)
    echo "E: Failed to fetch http://deb/x.deb  Temporary failure resolving 'deb'"; exit 100 ;;
hanging)
    # More than a pipe holds: it is being read.
    head -c 200000 /dev/zero | tr '\\0' '\\n'
    sleep 1000 & echo $! >"{folder}/helper"; wait ;;
esac
echo "Setting up bash (5.2.15-2) ..."
for last; do :; done
cp "{folder}/root.tar" "$last"
"""


@dataclass
class FakeDebian:
    folder: Path

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDebian:
    for needed in ("mke2fs", "debugfs", "sfdisk"):
        try:
            find_tool(needed, needed)
        except ImageError:
            pytest.skip(f"needs {needed} (Debian: e2fsprogs, fdisk)")
    folder = tmp_path / "debian"
    folder.mkdir()
    program = folder / "mmdebstrap"
    program.write_text(_MMDEBSTRAP.format(folder=folder))
    program.chmod(0o755)
    with tarfile.open(folder / "root.tar", "w") as tar:
        for name, text in (
            ("./boot/vmlinuz-6.1.0-9-cloud-amd64", "kernel"),
            ("./boot/initrd.img-6.1.0-9-cloud-amd64", "initrd"),
            ("./var/lib/dpkg/status", STATUS),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return FakeDebian(folder)


class Details(Reporter):
    def __init__(self) -> None:
        self.heard: list[str] = []

    @contextmanager
    def step(self, title: str) -> Iterator[object]:  # type: ignore[override]
        self.heard.append(title)
        yield self.heard.append


def test_disk_is_built_and_says_how_far_it_is(debian: FakeDebian, tmp_path: Path) -> None:
    details = Details()
    disk = build_debian_disk(
        DebianRecipe(size=2 << 30, time=1_700_000_000), DiskStore(tmp_path / "disks"), details
    )
    assert details.heard[1:4] == [
        "automatically chosen format: tar",
        "unpacking bash",
        "setting up bash",
    ]
    assert disk.manifest.packages == {"bash": "5.2.15-2", "base-files": "12.4+deb12u5"}
    assert (disk.manifest.time, debian.read("epoch")) == (1_700_000_000, "1700000000\n")
    assert disk.manifest.release == "6.1.0-9-cloud-amd64"
    assert ((disk.directory / KERNEL).read_text(), (disk.directory / INITRD).read_text()) == (
        "kernel",
        "initrd",
    )
    assert disk.disk.stat().st_size == 2 << 30
    assert debian.read("pins") == ""


def tetrarch(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tetrarch", "image", "build", "debian", "--size", "2G", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), **environment},
    )


def test_packages_of_a_disk_give_the_same_disk(debian: FakeDebian, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = tetrarch(first, "--package", "tcc")
    assert done.returncode == 0, done.stderr
    arguments = debian.read("arguments").replace(str(first), "").splitlines()
    include = next(word for word in arguments if word.startswith("--include="))
    assert include.endswith(",linux-image-cloud-amd64,tcc")
    manifest = first / "tetrarch/disks/debian/disk.json"
    done = tetrarch(second, "--packages-from", str(manifest))
    assert done.returncode == 0, done.stderr
    # The same are asked for, as apt keeps a record of that.
    assert include in debian.read("arguments").splitlines()
    assert "Package: bash\nPin: version 5.2.15-2\nPin-Priority: 1001\n" in debian.read("pins")
    disks = [folder / "tetrarch/disks/debian" for folder in (first, second)]
    assert (disks[0] / "disk.json").read_text() == (disks[1] / "disk.json").read_text()
    assert contents(disks[0] / "disk.raw") == contents(disks[1] / "disk.raw")


def contents(path: Path) -> dict[int, bytes]:
    """What is not zero in a file with holes."""
    found: dict[int, bytes] = {}
    with path.open("rb") as file:
        at = 0
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) >> 16 << 16
            except OSError:  # holes alone are left
                return found
            chunk = os.pread(file.fileno(), 1 << 16, at)
            if chunk.strip(b"\0"):
                found[at] = chunk
            at += 1 << 16


def test_version_that_did_not_come_is_an_error(debian: FakeDebian, tmp_path: Path) -> None:
    recipe = DebianRecipe(size=2 << 30, packages=["bash"], versions={"bash": "5.2.15-3"})
    with pytest.raises(ImageError, match=r"bash 5.2.15-3 was asked for, and 5.2.15-2 is installed"):
        build_debian_disk(recipe, DiskStore(tmp_path / "disks"), Reporter())
    assert list((tmp_path / "disks").iterdir()) == []


LIST = '{"name": "a", "append": "", "release": "", "suite": "", "asked": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"name": 1}',
        "x",
        "[" * 100_000,
        LIST % '"abc", "time": 1',
        LIST % '[], "time": -1',
    ],
)
def test_list_of_packages_that_is_none_is_told(
    debian: FakeDebian, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    done = tetrarch(tmp_path, "--packages-from", str(path))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{path} describes no disk" in done.stderr
    done = tetrarch(tmp_path, "--packages-from", str(path), "--package", "gcc")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("unknown", "Unable to locate package nonsense; see how Debian calls it"),
        ("network", "Temporary failure resolving 'deb'; check the network"),
    ],
)
def test_failure_of_mmdebstrap_is_one_line(
    debian: FakeDebian, tmp_path: Path, wrong: str, said: str
) -> None:
    done = tetrarch(tmp_path, FAKE_DEBIAN=wrong)
    _title, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith("tetrarch: mmdebstrap cannot make the system: ")
    assert said in line


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_build_that_is_ended_leaves_nothing(
    debian: FakeDebian, tmp_path: Path, signum: signal.Signals
) -> None:
    words = [sys.executable, "-m", "tetrarch", "image", "build", "debian", "--size", "2G"]
    environment = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "FAKE_DEBIAN": "hanging"}
    with subprocess.Popen(words, env={**os.environ, **environment}) as process:
        while not (debian.folder / "helper").exists() or not debian.read("helper"):
            assert process.poll() is None
        process.send_signal(signum)
        assert process.wait(LIMIT_S) == 128 + signum
    helper = int(debian.read("helper"))
    assert (
        not Path(f"/proc/{helper}/cmdline").exists()
        or b"sleep" not in Path(f"/proc/{helper}/cmdline").read_bytes()
    )
    assert list((tmp_path / "tetrarch/disks").iterdir()) == []


def test_manifest_can_be_read_as_json(debian: FakeDebian, tmp_path: Path) -> None:
    done = tetrarch(tmp_path, "--json", SOURCE_DATE_EPOCH="1700000001")
    row = json.loads(done.stdout)
    assert (row["time"], row["packages"]["bash"]) == (1_700_000_001, "5.2.15-2")
