"""``tetrarch run`` with guests of a few bytes: output, exit codes, terminal."""

import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pexpect
import pytest
from tests.cli.conftest import Cli
from tests.machine import guests
from tests.terminals import kill

from tetrarch.testing import pvh_kernel


@pytest.mark.parametrize(
    ("code", "options", "exit_code"),
    [
        (guests.POWER_OFF, [], 0),
        (guests.TRIPLE_FAULT_ON_PURPOSE, ["--no-reboot"], 0),
        (guests.TRIPLE_FAULT, [], 3),
        (guests.JUMP_TO_NOWHERE, [], 3),
        (guests.ENDLESS_LOOP, ["--timeout", "0.3"], 124),
        (guests.DEBUG_EXIT_16, ["--debug-exit"], 33),
    ],
    ids=["power-off", "reset", "ud2", "nowhere", "timeout", "debug-exit"],
)
def test_exit_codes(
    cli: Cli, tmp_path: Path, code: bytes, options: list[str], exit_code: int
) -> None:
    done = cli("run", "--engine", "bt", "--kernel", write(tmp_path, code), *options)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr.startswith("tetrarch: engine bt (")


def test_standard_output_is_the_guests_alone(cli: Cli, tmp_path: Path) -> None:
    kernel = write(tmp_path, guests.say(b"hello\r\n") + guests.POWER_OFF)
    done = cli("run", "--kernel", kernel, "--stats")
    assert done.stdout == "hello\n"
    assert "exits" in done.stderr
    # A heading does not say ns where seconds are shown.
    assert "\ntime\n" in done.stderr
    assert "_ns" not in done.stderr


def test_crash_dump_goes_to_standard_error(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--kernel", write(tmp_path, guests.TRIPLE_FAULT))
    assert "tetrarch: the guest crashed: triple fault" in done.stderr
    assert "rip" in done.stderr.lower()


def test_json_report_is_the_last_line(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--kernel", write(tmp_path, guests.POWER_OFF), "--json", "--name", "one")
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["status"] == "powered-off"
    assert (report["name"], report["engine"], report["exit_code"]) == ("one", "bt", 0)


def test_console_into_a_file(cli: Cli, tmp_path: Path) -> None:
    kernel = write(tmp_path, guests.say(b"to a file") + guests.POWER_OFF)
    done = cli("run", "--kernel", kernel, "--console", f"file={tmp_path / 'log'}")
    assert done.stdout == ""
    assert (tmp_path / "log").read_bytes() == b"to a file"


def test_engines_as_json(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("engines", "--json").stdout)}
    assert rows["bt"]["available"]
    assert rows["kvm"]["available"] is (rows["kvm"]["reason"] is None)


def test_empty_cache_is_listed(cli: Cli) -> None:
    assert json.loads(cli("image", "ls", "--json").stdout) == []


def spawn_echo(tmp_path: Path) -> "pexpect.spawn[str]":
    kernel = write(tmp_path, guests.say(b"ready") + guests.ECHO)
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "run", "--kernel", str(kernel)],
        encoding="utf-8",
        timeout=30,
    )
    child.expect("ready")
    return child


def write(tmp_path: Path, code: bytes) -> Path:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(code))
    return kernel


def echoes(fd: int) -> bool:
    return bool(termios.tcgetattr(fd)[3] & termios.ECHO)


def test_leave_key_ends_the_run_and_restores_the_terminal(tmp_path: Path) -> None:
    # This end of the pseudo-terminal shows the attributes of the other.
    child = spawn_echo(tmp_path)
    assert not echoes(child.child_fd)
    child.send("a\x03b")  # Ctrl-C is the guest's
    child.expect_exact("a\x03b")
    child.send("\x1d")
    child.expect("was stopped")
    child.wait()
    assert child.exitstatus == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_terminal_is_restored_when_a_signal_ends_us(tmp_path: Path, signum: signal.Signals) -> None:
    # A shell between us and the program keeps the terminal open after its end.
    kernel = write(tmp_path, guests.say(b"ready") + guests.ECHO)
    shell = pexpect.spawn("/bin/bash", ["--norc", "-i"], encoding="utf-8", timeout=30)
    show_echo = "stty -a | tr ' ;' '\\n\\n' | grep 'echo$'"
    shell.sendline(f"{sys.executable} -m tetrarch run --kernel {kernel}; echo rc=$?; {show_echo}")
    shell.expect("ready")
    children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    os.kill(int(children[-1]), signum)
    shell.expect(r"rc=\d+")
    shell.expect(r"[^-]echo\r")
    kill(shell)


@pytest.mark.parametrize(
    ("closed", "output"),
    [("<&-", "hello"), (">&-", ""), ("2>&-", "hello"), ("<&- >&- 2>&-", "")],
)
def test_closed_standard_files_harm_nobody(tmp_path: Path, closed: str, output: str) -> None:
    # The numbers 0 to 2 must not go to files of ours: guest memory is one.
    kernel = write(tmp_path, guests.say(b"hello") + guests.POWER_OFF)
    program = f"{sys.executable} -m tetrarch run --engine bt --kernel {kernel} {closed}"
    done = subprocess.run(
        ["/bin/sh", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert done.stdout == output


def test_reset_starts_the_guest_anew_unless_that_is_to_be_the_end(cli: Cli, tmp_path: Path) -> None:
    code = guests.reset_until(3, guests.CF9_RESET, guests.say(b"up\n"))
    command = ["run", "--engine", "bt", "--json", "--kernel", write(tmp_path, code)]
    for options in ([], ["--on-reset", "restart"], ["--debug-exit", "--reboot"]):
        done = cli(*command, *options)
        assert (done.returncode, done.stdout) == (0, "up\n" * 3)
        report = json.loads(done.stderr.splitlines()[-1])
        assert (report["status"], report["resets"]) == ("powered-off", 2)
    for options in (["--no-reboot"], ["--on-reset", "end"]):
        ended = cli(*command, *options)
        assert (ended.returncode, ended.stdout) == (0, "up\n")
        assert "the guest reset the machine" not in ended.stderr
    # Who did not say what a reset is to do is told that there was one.
    for options in (["--debug-exit"], ["--record", str(tmp_path / "recording")]):
        ended = cli(*command, *options)
        assert ended.stdout == "up\n"
        assert "tetrarch: the guest reset the machine: by port 0xCF9\n" in ended.stderr
    both = cli(*command, "--no-reboot", "--on-reset", "end")
    assert "--on-reset and --[no-]reboot say the same; give one of them" in both.stderr
    wrong = cli(*command, "--on-reset", "again")
    assert wrong.returncode == 2
    assert "--on-reset: 'again' is nothing that a reset can do; there are end and restart" in (
        wrong.stderr
    )


def test_options_of_a_file_and_the_command_line_on_top(cli: Cli, tmp_path: Path) -> None:
    write(tmp_path, guests.DEBUG_EXIT_16)
    file = tmp_path / "machine.toml"
    file.write_text(
        'kernel = "kernel"\nengine = "bt"\ndebug_exit = true\nname = "one"\n'
        "[run]\njson = true\ntimeout = 60\n"
    )
    done = cli("run", "--config", file, "--name", "two")
    assert done.returncode == 33
    report = json.loads(done.stderr.splitlines()[-1])
    assert (report["name"], report["status"]) == ("two", "debug-exit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memroy = 3", "memroy: there is no such option; did you mean memory?"),
        ("[run]\nstat = true", "run.stat: there is no such option; did you mean stats?"),
        ("[run]\ntimeout = -1", "run.timeout: -1 is no time to wait"),
        ("timeout = 1", "timeout: this is an option of the command; write it in [run]"),
        ("[run]\ncpus = 2", "2: run.cpus: this is an option of the machine; write it above [run]"),
    ],
)
def test_wrong_option_of_a_file(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(text)
    done = cli("run", "--config", file)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr


def test_mistyped_option_names_the_nearest(cli: Cli) -> None:
    done = cli("run", "--memroy", "1G")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--memory" in done.stderr


def test_job_started_in_the_background_comes_to_the_foreground(tmp_path: Path) -> None:
    # The shell stops it when it makes the terminal raw; fg lets it go on from there.
    kernel = write(tmp_path, guests.say(b"ready") + guests.ECHO)
    shell = pexpect.spawn("/bin/bash", ["--norc", "-i"], encoding="utf-8", timeout=30)
    shell.sendline("PS1='prompt> '; set -b")
    shell.sendline(f"{sys.executable} -m tetrarch run --kernel {kernel} &")
    shell.expect("Stopped")
    shell.sendline("fg")
    shell.expect("ready")
    shell.send("ab")
    shell.expect_exact("ab")
    shell.send("\x1d")
    shell.expect("was stopped")
    kill(shell)


@pytest.mark.parametrize(
    ("code", "options", "exit_code"),
    [
        # mov al, 0 ; out 0xf4, al ; jmp $
        (bytes.fromhex("b000 e6f4 ebfe"), [], 1),
        (guests.TRIPLE_FAULT, [], 6),
        (guests.POWER_OFF, ["--initrd", "/dev/full"], 4),
        (guests.POWER_OFF, [], 0),
        (guests.POWER_OFF, ["--memory", "lots"], 2),
    ],
    ids=["value 0", "crash", "our error", "power-off", "bad usage"],
)
def test_codes_beside_debug_exit_are_not_the_guests(
    cli: Cli, tmp_path: Path, code: bytes, options: list[str], exit_code: int
) -> None:
    kernel = write(tmp_path, code)
    done = cli("run", "--engine", "bt", "--kernel", kernel, "--debug-exit", *options)
    assert done.returncode == exit_code


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_that_ends_us_is_named(tmp_path: Path, signum: signal.Signals) -> None:
    kernel = write(tmp_path, guests.say(b"ready") + guests.ENDLESS_LOOP)
    with subprocess.Popen(
        [sys.executable, "-m", "tetrarch", "run", "--engine", "bt", "--kernel", str(kernel)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.read(5) == b"ready"
            child.send_signal(signum)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 128 + signum
    assert errors.decode().splitlines()[-1] == f"tetrarch: ended by {signum.name}"
