"""Files that make a program wait for ever, and signals at any time: one line, and an end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.machine import guests

from tetrarch.testing import pvh_kernel

SIGNALLED_WHILE_IT_IMPORTS = """
import os, signal, sys

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Hook())
sys.argv = ["tetrarch", "engines"]
from tetrarch.cli import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "pydantic", "tetrarch.cli.reports"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_command_begins(module: str, signum: signal.Signals) -> None:
    program = SIGNALLED_WHILE_IT_IMPORTS.format(module=module, signal=signum.name)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 128 + signum
    assert (done.stdout, done.stderr) == ("", f"tetrarch: ended by {signum.name}\n")


@pytest.fixture
def run(cli: Cli, tmp_path: Path) -> Cli:
    """``tetrarch run`` of a kernel that ends at once, in a directory with a FIFO."""
    kernel, disk = tmp_path / "kernel", tmp_path / "disk"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    disk.write_bytes(bytes(1 << 20))
    os.mkfifo(tmp_path / "fifo")
    common = ("run", "--engine", "bt", "--kernel", kernel, "--memory", "16M")
    return lambda *words: cli(
        *common, *(str(word).format(here=tmp_path) for word in words), TMPDIR=str(tmp_path)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--console", "file={here}/fifo"], "fifo: nobody reads the FIFO yet; name another file"),
        (["--virtio-console", "file={here}/fifo"], "nobody reads the FIFO yet; name another file"),
        (["--config", "{here}/fifo"], None),
        (["--disk", "{here}/disk", "--ssh-key", "{here}/fifo"], "fifo: '' is no public SSH key"),
        (["--disk", "{here}/disk", "--ssh-key", "/dev/zero"], "it has more than 1 MiB; give a"),
        (["--disk", "{here}/fifo"], "is neither a file nor a block device"),
        (["--record", "{here}/fifo"], "cannot record to {here}/fifo: nobody reads the FIFO yet"),
        (["--share", "{here}/fifo"], "fifo: Not a directory; name a directory that you can"),
    ],
)
def test_nothing_is_waited_for(
    run: Cli, tmp_path: Path, words: list[str], message: str | None
) -> None:
    before = sorted(tmp_path.iterdir())
    done = run(*words)
    # An empty file of options has none.
    assert done.returncode == (0 if message is None else 1), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message is None or message.format(here=tmp_path) in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--restore", "{fifo}"], "cannot read {fifo}: it is no regular file"),
        (["run", "--replay", "{fifo}"], "cannot replay {fifo}: it is no regular file"),
        (["symbols", "{fifo}", "-o", "out"], "{fifo} has no address of a kernel"),
        (["symbols", "{names}", "-o", "{fifo}"], "{fifo}: nobody reads the FIFO yet"),
    ],
)
def test_fifo_that_nobody_writes_is_not_waited_for(
    cli: Cli, tmp_path: Path, words: list[str], message: str
) -> None:
    fifo, names = tmp_path / "fifo", tmp_path / "names"
    os.mkfifo(fifo)
    names.write_text("ffffffff81000000 T _stext\nffffffff81000100 T _etext\n")
    done = cli(*(word.format(fifo=fifo, names=names) for word in words))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert message.format(fifo=fifo) in done.stderr


def test_frames_go_to_no_fifo_that_nobody_reads(run: Cli, tmp_path: Path) -> None:
    done = run("--net", f"socket={tmp_path}/net,pcap={tmp_path}/fifo")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "fifo: nobody reads the FIFO yet; name another file for pcap=" in done.stderr
    assert not (tmp_path / "net").exists()


def test_links_in_a_circle_are_no_directory(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    done = run("--share", "{here}/loop")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "loop: Too many levels of symbolic links; name a directory" in done.stderr


@pytest.mark.parametrize(
    ("nets", "message"),
    [
        (["user,forward=2222:22,forward=2222:23"], "port 2222 is forwarded twice"),
        (["user,forward=2222:22,forward=0.0.0.0:2222:23"], "port 2222 is forwarded twice"),
        (["user,mac=52:54:00:00:00:01", "none"], "none is given beside others"),
        (
            ["tap=a,mac=52:54:00:00:00:01", "tap=b,mac=52:54:00:00:00:01"],
            "two cards have mac=52:54:00:00:00:01; give one of them",
        ),
        (["tap=a", "tap=a"], "two cards are at tap=a; give each its own"),
        (["tap=a%d"], "none of them a space, '/', ':' or '%'"),
    ],
)
def test_cards_that_get_in_each_others_way(run: Cli, nets: list[str], message: str) -> None:
    done = run(*(word for net in nets for word in ("--net", net)))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("debain", "did you mean debian?"),
        ("Debian-RT", "did you mean debian-rt?"),
        ("my-dsik", "did you mean my-disk?"),
        ("nothing-like-it", "there are debian, debian-amd64, debian-rt, and any linux-image"),
        ("", "there are debian"),
    ],
)
def test_nearest_name_of_a_guest_is_said(cli: Cli, tmp_path: Path, name: str, mend: str) -> None:
    disk = tmp_path / "data" / "tetrarch" / "disks" / "my-disk"
    disk.mkdir(parents=True)
    for file in ("disk.raw", "vmlinuz", "initrd.img"):
        (disk / file).write_bytes(b"x")
    (disk / "disk.json").write_text(
        '{"name": "my-disk", "append": "", "release": "6", "suite": "bookworm"}'
    )
    done = cli("run", "--engine", "bt", name)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"no image is called {name!r}; {mend}" in done.stderr


@pytest.mark.parametrize("command", ["rm", "info"])
def test_nearest_name_of_a_disk_is_said(cli: Cli, command: str) -> None:
    done = cli("image", command, "alpine")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "tetrarch: there is no disk and no cached guest alpine; see tetrarch image ls\n"
    )


def test_initramfs_that_cannot_be_written_takes_nothing_away(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "initrd"
    target.write_bytes(b"kept")
    # Nothing is cached, so that the build fails when the file is open.
    done = cli("image", "build", "debian", "--output", target)
    assert done.returncode == 1
    assert target.read_bytes() == b"kept"
    assert [path.name for path in tmp_path.iterdir() if "initrd" in path.name] == ["initrd"]
    missing = cli("image", "build", "debian", "--output", tmp_path / "no" / "initrd")
    assert missing.stderr.splitlines() == [
        f"tetrarch: cannot write {tmp_path}/no/initrd: No such file or directory; name another file"
    ]


def test_no_name_of_a_file_is_no_file_of_options(cli: Cli) -> None:
    done = cli("run", "--config", "")
    assert (done.returncode, done.stderr) == (
        2,
        "tetrarch: .: Is a directory; name a readable file\n",
    )


def test_place_that_cannot_be_written_to_is_named_by_its_variable(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, variable in (
        (("image", "pull"), "XDG_CACHE_HOME"),
        (("image", "build", "debian", "--size", "4G"), "XDG_DATA_HOME"),
    ):
        done = cli(*words, **{variable: str(tmp_path / "file")})
        (line,) = done.stderr.splitlines()
        if "is missing; install it" in line:
            pytest.skip(line)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"Not a directory; give yourself the right to write there, or set {variable}" in line


def test_socket_that_cannot_be_is_said_in_the_hosts_words(run: Cli) -> None:
    done = run("--net", "socket={here}/none/net")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "/none/net: No such file or directory; name a path" in done.stderr
