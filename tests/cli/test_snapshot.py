"""Machines in files, as a user has them: a snapshot of one that runs, and one that goes on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from tests.cli.conftest import Cli
from tests.machine import guests
from tests.terminals import kill

import tetrarch
from tetrarch import Machine
from tetrarch.registry import machines
from tetrarch.testing import pvh_kernel

LIMIT_S = 30


pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture
def start(cli: Cli, tmp_path: Path) -> Callable[..., None]:
    """Starts a guest that says "ready", then gives back what it is sent, each with a digit that
    counts."""

    def run(name: str, *options: str | Path) -> None:
        path = tmp_path / "kernel"
        path.write_bytes(pvh_kernel(guests.say(b"ready") + guests.COUNTING_ECHO))
        base = ["run", "--detach", "--name", name, "--engine", "bt", "--memory", "16M"]
        done = cli(*base, "--kernel", path, *options)
        assert done.returncode == 0, done.stderr
        vm = tetrarch.connect(name)
        vm.console.expect("ready", LIMIT_S)
        vm.console.send("a")
        vm.console.expect("a1", LIMIT_S)

    return run


def test_snapshot_of_a_machine_in_the_background_goes_on_beside_it(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    start("web")
    saved = tmp_path / "web.snapshot"
    done = cli("snapshot", "web", saved)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = cli("run", "--restore", saved, "--detach", "--name", "other")
    assert (done.returncode, done.stdout) == (0, "other\n"), done.stderr
    for name in ("web", "other"):
        vm = tetrarch.connect(name)
        vm.console.send("b")
        vm.console.expect("b2", LIMIT_S)


def test_restored_machine_has_this_terminal(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    start("web")
    saved = tmp_path / "web.snapshot"
    assert cli("snapshot", "web", saved).returncode == 0
    words = ["-m", "tetrarch", "run", "--restore", str(saved)]
    terminal = pexpect.spawn(sys.executable, words, encoding="utf-8", timeout=LIMIT_S)
    try:
        terminal.expect("Ctrl-] leaves")
        terminal.send("b")
        terminal.expect("b2")
        terminal.send("\x1d")
        terminal.expect(pexpect.EOF)
    finally:
        kill(terminal)


def test_machine_from_the_library_reads_a_snapshot_of_the_program(
    start: Callable[..., None], tmp_path: Path
) -> None:
    start("web")
    vm = tetrarch.connect("web")
    vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved", vsock=tmp_path / "vsock") as copy:
        copy.start()
        copy.console.send("b")
        copy.console.expect("b2", LIMIT_S)


def test_what_stands_in_the_way_is_one_line_and_no_file_is_left(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    start("web")
    kept = tmp_path / "kept"
    kept.write_bytes(b"as it was")
    for target, cause in ((tmp_path / "none" / "x", "No such file"), (tmp_path, "no regular file")):
        done = cli("snapshot", "web", target)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert cause in done.stderr
    assert cli("snapshot", "wbe", kept).returncode == 1
    assert kept.read_bytes() == b"as it was"
    assert {path.name for path in tmp_path.iterdir()} <= {"kernel", "kept", "cache", "data"}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--memory", "64M"), "--memory and --restore do not go together"),
        (("--kernel", "x"), "--kernel and --restore"),
        (("--hostname", "x"), "--hostname and --restore"),
        (("--", "true"), "--restore and a command"),
        (("debian",), "--image and --restore"),
    ],
)
def test_options_that_a_saved_machine_cannot_have(
    cli: Cli, tmp_path: Path, options: tuple[str, ...], cause: str
) -> None:
    done = cli("run", "--restore", tmp_path / "saved", *options)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert cause in done.stderr


def test_disks_are_given_anew_as_many_at_the_same_bus(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    (tmp_path / "disk.raw.2").write_bytes(bytes(1 << 20))
    start("web", "--disk", f"{disk},bus=nvme")
    saved = tmp_path / "web.snapshot"
    assert cli("snapshot", "web", saved).returncode == 0
    tetrarch.connect("web").kill()
    one = ("--disk", f"{disk},bus=nvme")
    refused: list[tuple[tuple[str | Path, ...], str]] = [
        ((), f"had 1 disk, {disk},bus=nvme; 0 given; give as many of disk"),
        ((*one, "--disk", f"{disk}.2"), f"had 1 disk, {disk},bus=nvme; 2 given"),
        (("--disk", disk), f"had {disk},bus=nvme at nvme, and is given {disk} at virtio"),
    ]
    for given, cause in refused:
        done = cli("run", "--restore", saved, *given)
        assert done.returncode == 1
        assert cause in done.stderr
    done = cli("run", "--detach", "--restore", saved, *one)
    assert done.returncode == 0, done.stderr


def test_networks_are_given_anew_at_the_same_card(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    net = f"socket={tmp_path / 'net'}"
    start("web", "--net", f"{net},model=vmxnet3")
    saved = tmp_path / "web.snapshot"
    assert cli("snapshot", "web", saved).returncode == 0
    tetrarch.connect("web").kill()
    done = cli("run", "--restore", saved, "--net", net)
    assert done.returncode == 1
    assert f"had a vmxnet3 card with {net},model=vmxnet3, and is given a virtio one" in done.stderr
    done = cli("run", "--detach", "--restore", saved, "--net", f"{net},model=vmxnet3")
    assert done.returncode == 0, done.stderr


def test_disk_that_has_changed_since_is_refused(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    start("web", "--disk", disk)
    saved = tmp_path / "web.snapshot"
    assert cli("snapshot", "--end", "web", saved).returncode == 0
    assert machines() == []
    copy = tmp_path / "copy.raw"
    shutil.copy2(disk, copy)
    disk.write_bytes(bytes(1 << 20))
    done = cli("run", "--restore", saved, "--disk", disk)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"tetrarch: disk0 ({disk}) has changed since the machine was saved; give"
    )
    for name, given in (("one", (copy,)), ("two", (disk, "--allow-changed-disks"))):
        done = cli("run", "--detach", "--restore", saved, "--name", name, "--disk", *given)
        assert done.returncode == 0, done.stderr


def test_files_with_what_was_written_since(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    start("web")
    base, second = tmp_path / "0.snapshot", tmp_path / "1.snapshot"
    done = cli("snapshot", "web", second, "--parent", base)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert cli("snapshot", "web", base).returncode == 0
    done = cli("snapshot", "web", second, "--parent", base)
    assert "what was written since 0.snapshot has not been noted" in done.stderr
    assert not second.exists()
    assert cli("snapshot", "--track", "web", base).returncode == 0
    vm = tetrarch.connect("web")
    vm.console.send("b")
    vm.console.expect("b2", LIMIT_S)
    done = cli("snapshot", "web", second, "--parent", base)
    assert done.returncode == 0, done.stderr
    assert second.stat().st_size < base.stat().st_size
    assert cli("run", "--detach", "--restore", second, "--name", "other").returncode == 0
    other = tetrarch.connect("other")
    other.console.send("c")
    other.console.expect("c3", LIMIT_S)


def test_snapshot_that_fails_leaves_a_machine_as_it_was(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    start("web")
    vm = tetrarch.connect("web")
    nowhere = tmp_path / "none" / "x"
    assert cli("snapshot", "--end", "web", nowhere).returncode == 1
    assert vm.phase.value == "running"
    vm.pause()
    assert cli("snapshot", "--end", "web", nowhere).returncode == 1
    assert vm.phase.value == "paused"
    assert cli("snapshot", "--end", "web", tmp_path / "saved").returncode == 0
    assert machines() == []
