"""Whatever a user does wrong gives one clear line and the right exit code."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.machine import guests

from tetrarch.cli.entry import run_cli
from tetrarch.testing import pvh_kernel


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--engine", "tcg"], 2, "'tcg' is no engine"),
        (["--bogus"], 2, "--bogus"),
        (["extra"], 2, "extra"),
        (["--memory", "lots"], 2, "'lots' is no size"),
        (["--memory", "0"], 2, "too little"),
        (["--cpus", "256"], 2, "give 255 or less"),
        (["--cpus", "65", "--engine", "bt"], 1, "engine kvm"),
        (["--timeout", "0"], 2, "no time to wait"),
        (["--timeout", "nan"], 2, "no time to wait"),
        (["--timeout", "soon"], 2, "--timeout"),
        (["--console", "tape"], 2, "'tape' is no console"),
        (["--console", "file="], 2, "is no console"),
        (["--image", "debian", "--kernel", "x"], 2, "give one of them"),
        (["--kernel", "/nonexistent"], 1, "/nonexistent"),
        (["--kernel", "/"], 1, "is a directory"),
        (["--kernel", "/dev/zero"], 1, "/dev/zero"),
        (["--disk", "/nonexistent"], 1, "/nonexistent: cannot open the image: no such file"),
        (["--disk", "/"], 1, "/: is a directory; give the path of an image"),
        (["--disk", "d.img", "--disk", "e.img,sanpshot=on"], 2, "did you mean snapshot?"),
        (["--disk", "/etc/hostname,format=qcow2"], 1, "is not a qcow2 image; give"),
        (["--net", "usr"], 2, "--net: 'usr' is no network; there are none, user, tap=NAME, socket"),
        (["--net", "user,forward=22"], 2, "--net: forward is '22'; write [HOST:]PORT:GUEST"),
        (["--net", "none", "--net", "user"], 2, "none is given beside others"),
        (
            ["--snapshot"],
            2,
            "--snapshot: a guest without a disk keeps nothing that it writes; leave",
        ),
        (["--snapshot", "--image", "debian"], 2, "the guest debian keeps nothing that it writes"),
        (["--snapshot", "--disk", "vhost-user=/s"], 2, "is kept by who serves it"),
        (["--allow", "x", "--allow", ""], 2, "--allow: '' is no file name"),
        (["--restore", ""], 2, "--restore: '' is no file name"),
        (["--snapshot", "--restore", "x"], 2, "--snapshot and --restore do not go together"),
        (["--image", "nope"], 2, "no image is called 'nope'"),
        (["--record", "x", "--", "true"], 2, "--record and a command do not go together"),
        (["--replay", "x", "--", "true"], 2, "--replay and a command do not go together"),
    ],
)
def test_bad_run_option(cli: Cli, arguments: list[str], code: int, message: str) -> None:
    done = cli("run", *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("user", "this host has no passt, which a user network needs; install it"),
        ("socket=/nonexistent/net", "cannot join the network at /nonexistent/net: No such file"),
        ("tap=lo", "lo is no tap device but a network device; name another"),
        ("tap=tetrarch0,bridge=tetrarch1", "there is no bridge tetrarch1; make it"),
    ],
)
def test_network_that_cannot_be(cli: Cli, tmp_path: Path, net: str, message: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    (tmp_path / "bin").mkdir()
    done = cli("run", "--kernel", kernel, "--net", net, PATH=str(tmp_path / "bin"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tetrarch: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_throw_away_run_of_a_file_needs_a_disk_as_one_that_is_typed(
    cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "machine.toml"
    file.write_text("[run]\nsnapshot = true\n")
    done = cli("run", "--config", file)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--snapshot: a guest without a disk keeps nothing" in done.stderr


def test_unknown_command(cli: Cli) -> None:
    done = cli("fly")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 1 << 20])
def test_random_file_as_kernel(cli: Cli, tmp_path: Path, size: int) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(random.Random(size).randbytes(size))
    done = cli("run", "--kernel", kernel)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_initrd_larger_than_memory(cli: Cli, tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    with initrd.open("wb") as file:
        file.truncate(64 << 20)
    done = cli("run", "--kernel", kernel, "--initrd", initrd, "--memory", "16M")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "initrd" in done.stderr


def test_memory_that_no_host_has(cli: Cli, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    done = cli("run", "--kernel", kernel, "--memory", "60T")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "less memory" in done.stderr


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What stands beside the lines on progress."""
    return [line for line in done.stderr.splitlines() if line.startswith("tetrarch: ")]


def test_no_apt_and_no_cached_guest(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", PATH=str(tmp_path))
    assert (done.returncode, len(errors(done))) == (1, 1)
    assert "no apt-get" in errors(done)[0]


def test_no_network_and_no_cached_guest(cli: Cli) -> None:
    proxy = "http://127.0.0.1:9"  # nobody listens on the discard port
    done = cli("run", http_proxy=proxy, https_proxy=proxy)
    assert (done.returncode, done.stdout, len(errors(done))) == (1, "", 1)
    assert "check the network" in errors(done)[0]


@pytest.mark.parametrize("initrd", ["/nonexistent", "/"])
def test_initrd_that_is_no_file(cli: Cli, tmp_path: Path, initrd: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    done = cli("run", "--kernel", kernel, "--initrd", initrd)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"initrd {initrd}" in done.stderr


def test_command_line_that_no_kernel_takes(cli: Cli, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    done = cli("run", "--kernel", kernel, "--append", "x" * 70_000)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "--append" in done.stderr


@pytest.mark.parametrize("output", [">&-", ">/dev/full"])
@pytest.mark.parametrize("command", ["image ls", "engines", "doctor --json", "--version"])
def test_report_that_cannot_be_written_is_an_error(command: str, output: str) -> None:
    program = f"{sys.executable} -m tetrarch {command} {output}"
    done = subprocess.run(
        ["/bin/sh", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert any(text in done.stderr for text in ("standard output", "No space left"))


def test_closed_standard_input_is_an_empty_one() -> None:
    program = (
        "import sys; from tetrarch.cli.entry import _open_standard_files as o; o(); "
        "print(sys.stdin.isatty(), repr(sys.stdin.read()))"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" <&-', sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False ''\n", "")


def test_reader_that_has_gone_ends_a_command_as_the_signal_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*words: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("tetrarch.cli.life.show_log", write)
    monkeypatch.setattr("tetrarch.cli.entry._log_to_standard_error", lambda: None)
    for name in ("stdout", "stderr"):  # what typer puts in their place goes again
        monkeypatch.setattr(sys, name, getattr(sys, name))
    assert run_cli(["logs", "web"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_cache_in_a_place_that_cannot_be(cli: Cli) -> None:
    done = cli("image", "pull", XDG_CACHE_HOME=os.devnull)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
