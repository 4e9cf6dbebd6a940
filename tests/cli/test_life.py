"""Machines in the background, as a user has them: started, listed, steered, ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pexpect
import pytest
from tests.cli.conftest import Cli
from tests.machine import guests
from tests.terminals import kill

import tetrarch
from tetrarch.cli import stat
from tetrarch.cli.detach import _Stamped
from tetrarch.errors import HostError
from tetrarch.registry import Claim, machines
from tetrarch.remote import RemoteMachine
from tetrarch.testing import pvh_kernel

LIMIT_S = 60

Kernel = Callable[[bytes], Path]


pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    def write(code: bytes) -> Path:
        path = tmp_path / "kernel"
        path.write_bytes(pvh_kernel(code))
        return path

    return write


@pytest.fixture
def start(cli: Cli, kernel: Kernel) -> Callable[..., None]:
    """Starts a guest that says "ready" and gives back what it is sent."""

    def run(name: str, *options: str | Path, code: bytes = guests.ECHO) -> None:
        path = kernel(guests.say(b"ready") + code)
        done = cli("run", "--detach", "--name", name, "--engine", "bt", "--kernel", path, *options)
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr

    return run


def listed(cli: Cli) -> dict[str, str]:
    """Name and state of all."""
    return {row["name"]: row["state"] for row in json.loads(cli("ps", "--json").stdout)}


def starting() -> bool:
    """Whether there is one that does not run yet, and no other."""
    return [about.ready for about in machines()] == [False]


@pytest.fixture
def endless_start(tmp_path: Path, kernel: Kernel) -> Iterator[subprocess.Popen[str]]:
    """One whose machine waits for a program that never gets ready."""
    (tmp_path / "passt").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "passt").chmod(0o755)
    command = [sys.executable, "-m", "tetrarch", "run", "--detach", "--name", "web"]
    with subprocess.Popen(
        [*command, "--kernel", str(kernel(guests.ECHO)), "--net", "user"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    ) as starter:
        wait_until(starting)
        yield starter


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def open_files(pid: int) -> dict[int, str]:
    files = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            files[int(entry.name)] = os.readlink(entry)
    return files


def leftovers(runtime: Path) -> list[str]:
    return [path.name for path in (runtime / "machines").iterdir()]


def test_machine_in_the_background_is_listed_until_it_is_killed(
    cli: Cli, start: Callable[..., None], runtime: Path
) -> None:
    start("web", "--memory", "64M")
    assert cli("ps", "--quiet").stdout == "web\n"
    head, line = cli("ps").stdout.splitlines()
    assert head.split() == ["NAME", "STATE", "PROCESS", "ENGINE", "CPUS", "MEMORY", "UP", "GUEST"]
    assert re.match(r"web +running +\d+ +bt +1 +64M +\d+s +/.*kernel$", line)
    assert cli("kill", "web").returncode == 0
    assert cli("ps", "--quiet").stdout == ""
    assert leftovers(runtime) == []


def test_machine_of_firmware_alone_is_listed_with_it(
    cli: Cli, runtime: Path, tmp_path: Path
) -> None:
    firmware = tmp_path / "bios.bin"
    firmware.write_bytes(b"\xeb\xfe".rjust(65536 - 14, b"\0").ljust(65536, b"\0"))  # jmp $
    machine = ("run", "--detach", "--name", "web", "--engine", "bt", "--memory", "16M")
    assert cli(*machine, "--firmware", firmware).returncode == 0
    (row,) = json.loads(cli("ps", "--json").stdout)
    assert row["guest"] == str(firmware)


def test_machine_outlives_the_shell_that_started_it(kernel: Kernel) -> None:
    path = kernel(guests.say(b"ready") + guests.ECHO)
    shell = pexpect.spawn("/bin/bash", ["--norc", "-i"], encoding="utf-8", timeout=LIMIT_S)
    shell.sendline("PS1='prompt> '")
    program = f"{sys.executable} -m tetrarch run --engine bt --kernel {path}"
    # A pipe that the shell waits on, and a file that it has open, are not kept by the machine.
    shell.sendline(f"exec 9>/dev/zero; echo name=$({program} --detach --name web 8>&1)")
    shell.expect("name=web")
    shell.sendcontrol("d")
    shell.expect(pexpect.EOF)
    kill(shell)
    vm = tetrarch.connect("web")
    assert vm.phase == "running"
    assert os.getsid(vm.about.pid) == vm.about.pid
    files = open_files(vm.about.pid)
    assert (files[0], files[1]) == ("/dev/null", files[2])
    assert files[2].endswith("/log/web.log")
    assert not any(name.startswith("/dev/pts") for name in files.values())
    assert "/dev/zero" not in files.values()
    os.kill(vm.about.pid, signal.SIGHUP)
    vm.console.expect("ready")
    vm.console.send("x")
    vm.console.expect("x")


def test_what_would_end_the_foreground_comes_from_the_background_too(
    cli: Cli, kernel: Kernel, tmp_path: Path, runtime: Path
) -> None:
    missing = cli("run", "--detach", "--name", "web", "--kernel", tmp_path / "none")
    front = cli("run", "--kernel", tmp_path / "none")
    assert (missing.returncode, missing.stderr) == (front.returncode, front.stderr)
    assert missing.returncode == 1
    path = kernel(guests.ECHO)
    for wrong in (["--memory", "lots"], ["--console", "stdio"], ["--", "true"]):
        done = cli("run", "--detach", "--kernel", path, *wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert leftovers(runtime) == []


@pytest.mark.parametrize("what", ["fifo", "folder"])
def test_machine_that_can_have_no_log_is_not_started(
    cli: Cli, runtime: Path, kernel: Kernel, what: str
) -> None:
    log = runtime / "log" / "web.log"
    log.parent.mkdir(parents=True, mode=0o700)
    runtime.chmod(0o700)
    if what == "fifo":
        os.mkfifo(log)
    else:
        log.mkdir()
    words = ("run", "--detach", "--name", "web", "--engine", "bt", "--kernel")
    done = cli(*words, kernel(guests.ENDLESS_LOOP))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot write the machine's log {log}" in done.stderr.splitlines()[-1]
    assert cli("ps", "--quiet").stdout == ""
    shown = cli("logs", "web")
    assert (shown.returncode, len(shown.stderr.splitlines())) == (1, 1)


def test_full_disk_ends_no_machine_for_want_of_its_log() -> None:
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    print("it goes on", file=_Stamped(full), flush=True)
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_name_in_use_is_one_line(cli: Cli, start: Callable[..., None], kernel: Kernel) -> None:
    start("web")
    for options in (["--detach"], []):
        done = cli("run", "--name", "web", "--kernel", kernel(guests.POWER_OFF), *options)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert re.fullmatch(
            r"tetrarch: a machine named web runs already \(process \d+\); "
            "give another --name, or end it: tetrarch stop web",
            line,
        )
    assert listed(cli) == {"web": "running"}


def test_machines_without_a_name_get_one_in_the_background_alone(cli: Cli, kernel: Kernel) -> None:
    path = kernel(guests.ECHO)
    names = [
        cli("run", "--detach", "--engine", "bt", "--kernel", path).stdout.strip() for _ in range(2)
    ]
    assert names == ["tetrarch", "tetrarch-2"]
    assert cli("run", "--engine", "bt", "--kernel", kernel(guests.POWER_OFF)).returncode == 0


@pytest.mark.parametrize("name", ["../../etc", "", ".hidden", "a" * 65])
def test_odd_names_are_bad_usage(cli: Cli, kernel: Kernel, name: str) -> None:
    commands = [["stop", name], ["console", name], ["logs", name], ["stat", name]]
    commands.append(["run", "--detach", "--kernel", str(kernel(guests.ECHO)), "--name", name])
    for command in commands:
        done = cli(*command)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "use up to 64 letters, digits" in done.stderr


def test_commands_for_a_machine_that_is_not_there(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    for command in ("stop", "console", "stat"):
        done = cli(command, "wbe")
        assert done.returncode == 1
        assert done.stderr == "tetrarch: no machine named wbe runs; did you mean web?\n"
    # Of several, the others are seen to.
    done = cli("pause", "wbe", "web")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert listed(cli) == {"web": "paused"}


def test_pause_resume_and_reset(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    vm = tetrarch.connect("web")
    vm.console.expect("ready")
    assert cli("pause", "web").returncode == 0
    assert listed(cli) == {"web": "paused"}
    vm.console.send("a")
    assert cli("resume", "web").returncode == 0
    vm.console.expect("a")
    assert cli("reset", "web").returncode == 0
    vm.console.expect("ready")
    assert listed(cli) == {"web": "running"}


def test_stop_presses_the_power_button_then_forces(
    cli: Cli, start: Callable[..., None], runtime: Path
) -> None:
    start("deaf")
    done = cli("stop", "--grace", "0.5", "deaf")
    assert done.returncode == 0
    assert done.stderr == "tetrarch: deaf did not switch itself off in 0.5 s, and was ended\n"
    assert leftovers(runtime) == []


def test_process_that_does_not_answer_is_listed_and_can_be_killed(
    cli: Cli, start: Callable[..., None], runtime: Path
) -> None:
    start("web")
    os.kill(tetrarch.connect("web").about.pid, signal.SIGSTOP)
    assert listed(cli) == {"web": "no answer"}
    vm = tetrarch.connect("web")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tetrarch.remote.machine._END_S", 0.3)
        vm.kill()
    assert not vm.alive
    assert leftovers(runtime) == []


def test_killed_process_leaves_no_ghost(
    cli: Cli, start: Callable[..., None], runtime: Path, tmp_path: Path
) -> None:
    socket_path, gdb, net = tmp_path / "s", tmp_path / "g", tmp_path / "n"
    start("web", "--control", socket_path, "--gdb", gdb, "--net", f"socket={net}")
    vm = tetrarch.connect("web")
    assert gdb.is_socket()
    assert net.is_socket()
    os.kill(vm.about.pid, signal.SIGKILL)
    vm.wait(LIMIT_S)
    assert listed(cli) == {}
    assert leftovers(runtime) == []
    assert not socket_path.exists()
    assert not gdb.exists()
    assert [path.name for path in tmp_path.glob("n*")] == []
    with pytest.raises(HostError, match="no machine named web runs"):
        tetrarch.connect("web")
    start("web")


def test_network_of_a_killed_machine_stays_with_another_that_has_joined(
    cli: Cli, start: Callable[..., None], tmp_path: Path
) -> None:
    net = tmp_path / "n"
    for name in ("one", "other"):
        start(name, "--net", f"socket={net}")
    vm = tetrarch.connect("other")  # the first has the switch
    os.kill(vm.about.pid, signal.SIGKILL)
    vm.wait(LIMIT_S)
    assert listed(cli) == {"one": "running"}
    assert net.is_socket()
    assert cli("kill", "one").returncode == 0
    assert [path.name for path in tmp_path.glob("n*")] == []


def test_machine_of_a_file_whose_name_is_no_text_is_listed(
    cli: Cli, runtime: Path, kernel: Kernel
) -> None:
    path = kernel(guests.ENDLESS_LOOP).rename(runtime.parent / os.fsdecode(b"k\xff\nl"))
    done = cli("run", "--detach", "--name", "web", "--engine", "bt", "--kernel", path)
    assert (done.returncode, done.stdout) == (0, "web\n"), done.stderr
    assert cli("ps").stdout.splitlines()[1].endswith(r"k\udcff l")
    (shown,) = json.loads(cli("ps", "--json").stdout)
    assert shown["guest"] == str(path)
    assert cli("kill", "web").returncode == 0


def test_socket_of_a_dead_machine_is_one_line(start: Callable[..., None]) -> None:
    start("web")
    vm = tetrarch.connect("web")
    os.kill(vm.about.pid, signal.SIGKILL)
    vm.wait(LIMIT_S)
    for call in (vm.pause, vm.stats, lambda: vm.console):
        with pytest.raises(HostError, match="answers at") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert vm.stop() is True


def test_console_is_attached_and_detached_and_keeps_its_history(
    start: Callable[..., None],
) -> None:
    start("web")
    for typed in ("a", "b"):
        child = pexpect.spawn(
            sys.executable, ["-m", "tetrarch", "console", "web"], encoding="utf-8", timeout=LIMIT_S
        )
        child.expect("detaches")
        child.expect("ready")
        if typed == "b":
            child.expect("a")
        child.send(typed)
        child.expect(typed)
        child.send("\x1d")
        child.expect("web goes on")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
    assert tetrarch.connect("web").phase == "running"


def test_console_of_a_machine_that_ends(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    child = pexpect.spawn(
        sys.executable, ["-m", "tetrarch", "console", "web"], encoding="utf-8", timeout=LIMIT_S
    )
    child.expect("ready")
    cli("kill", "web")
    child.expect("web has ended")
    kill(child)


def test_watcher_types_nothing(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    vm = tetrarch.connect("web")
    vm.console.expect("ready")
    with subprocess.Popen(
        [sys.executable, "-m", "tetrarch", "console", "--read-only", "web"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        assert watcher.stdout.read(5) == b"ready"
        watcher.stdin.write(b"no")
        watcher.stdin.close()
        vm.console.send("yes")
        assert watcher.stdout.read(3) == b"yes"
        watcher.kill()
    assert cli("console", "--history", "web").stdout == "readyyes"


def test_last_lines_of_a_console(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    vm = tetrarch.connect("web")
    vm.console.expect("ready")
    vm.console.send("\none\ntwo\nthree")
    vm.console.expect("three")
    for lines, said in ((0, ""), (1, "three"), (2, "two\nthree"), (99, "ready\none\ntwo\nthree")):
        assert cli("console", "--tail", str(lines), "web").stdout == said
    assert cli("console", "--tail", "-1", "web").returncode == 2


def test_console_that_goes_elsewhere(cli: Cli, start: Callable[..., None], tmp_path: Path) -> None:
    start("web", "--console", f"file={tmp_path / 'said'}")
    done = cli("console", "web")
    assert done.returncode == 1
    assert f"the console of web is file={tmp_path / 'said'}" in done.stderr
    wait_until(lambda: (tmp_path / "said").read_bytes() == b"ready")


def test_machine_in_the_foreground_is_listed_by_its_name(cli: Cli, kernel: Kernel) -> None:
    path = kernel(guests.say(b"ready") + guests.ECHO)
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "run", "--engine", "bt", "--kernel", str(path), "--name", "front"],
        encoding="utf-8",
        timeout=LIMIT_S,
    )
    child.expect("ready")
    wait_until(lambda: [about.ready for about in machines()] == [True])
    vm = tetrarch.connect("front")
    vm.console.expect("ready")
    child.send("t")
    vm.console.expect("t")
    vm.console.send("s")
    child.expect("s")
    child.send("\x1d")
    child.expect("was stopped")
    child.wait()
    assert child.exitstatus == 0
    assert listed(cli) == {}


def test_log_tells_how_a_guest_ended_after_its_end(cli: Cli, start: Callable[..., None]) -> None:
    start("web", code=guests.say(b"\nlast words") + guests.TRIPLE_FAULT)
    follow = cli("logs", "--follow", "web")
    assert follow.returncode == 0
    assert follow.stdout == cli("logs", "web").stdout
    times, words = zip(*(line.split(" ", 1) for line in follow.stdout.splitlines()), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", at) for at in times)
    assert re.fullmatch(r"tetrarch: web runs in process \d+", words[0])
    assert words[1] == "tetrarch: the guest crashed: triple fault"
    assert words[-2:] == ("console: ready", "console: last words")
    assert cli("logs", "db").stderr.startswith("tetrarch: there is no log of db;")


def test_log_has_nothing_of_the_guest_that_a_terminal_obeys(
    cli: Cli, start: Callable[..., None]
) -> None:
    start("web", code=guests.say(b"\nred \x1b[31m\ta  b") + guests.TRIPLE_FAULT)
    said = cli("logs", "--follow", "web").stdout
    assert "\x1b" not in said
    assert re.search(r"console: red \\x1b\[31m +a  b$", said, re.MULTILINE), said


def test_guest_of_a_paused_machine_is_not_blamed(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    assert cli("pause", "web").returncode == 0
    done = cli("exec", "--wait", "0.1", "web", "--", "true")
    assert done.returncode == 1
    assert "tetrarch: web is paused; tetrarch resume web lets it run\n" in done.stderr
    assert "after 0.1 s: the machine is paused" in done.stderr


def test_usage_of_a_command_for_a_guest(cli: Cli) -> None:
    assert "tetrarch exec [OPTIONS] {NAME -- COMMAND...}" in cli("exec", "--help").stdout
    assert "tetrarch stop [OPTIONS] {NAME}..." in cli("stop", "--help").stdout


def test_log_is_followed_until_the_machine_ends(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    with subprocess.Popen(
        [sys.executable, "-m", "tetrarch", "logs", "-f", "web"], stdout=subprocess.PIPE, text=True
    ) as follower:
        try:
            assert follower.stdout is not None
            assert "web runs in process" in follower.stdout.readline()
            assert follower.poll() is None
            cli("kill", "web")
            assert "the guest was stopped" in follower.stdout.read()
            assert follower.wait(LIMIT_S) == 0
        finally:
            follower.kill()


def test_stat_shows_counters_once_and_again(cli: Cli, start: Callable[..., None]) -> None:
    start("web")
    tetrarch.connect("web").console.expect("ready")
    report = json.loads(cli("stat", "--json", "web").stdout)
    assert (report["name"], report["status"], report["engine"]) == ("web", "running", "bt")
    assert report["stats"]["exits"]["port_out"] == 5
    assert report["host"]["resident_bytes"] > 0
    text = cli("stat", "web").stdout
    assert re.search(r"\n  port_out +5\n", text)
    with subprocess.Popen(
        [sys.executable, "-m", "tetrarch", "stat", "--json", "--every", "0.1", "web"],
        stdout=subprocess.PIPE,
        text=True,
    ) as live:
        assert live.stdout is not None
        lines = [json.loads(live.stdout.readline()) for _ in range(3)]
        assert lines[2]["per_s"]["exits"]["port_in"] > 0
        assert "cpu_percent" in lines[2]["host"]
        cli("kill", "web")
        assert live.wait(LIMIT_S) == 0


def test_stat_ends_with_a_machine_that_hangs_up_before_it_is_gone(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("web")
    samples = iter([stat._sample(tetrarch.connect("web"))])

    def sample(vm: RemoteMachine) -> stat._Sample:
        for one in samples:
            return one
        killer.start()
        raise HostError("it has hung up", mend="see whether it still runs")

    killer = threading.Timer(0.2, tetrarch.connect("web").kill)
    monkeypatch.setattr(stat, "_sample", sample)
    stat.show_stat("web", as_json=True, every=0.01)
    killer.join()
    assert [about.name for about in machines()] == []


def test_timeout_counts_in_the_background(cli: Cli, start: Callable[..., None]) -> None:
    start("web", "--timeout", "0.2")
    wait_until(lambda: machines() == [])
    assert "the guest was stopped: 0.2 s passed" in cli("logs", "web").stdout


def test_command_needs_a_command_and_a_guest_with_an_agent(
    cli: Cli, start: Callable[..., None]
) -> None:
    start("web")
    done = cli("exec", "web")
    assert (done.returncode, done.stderr) == (
        2,
        "tetrarch: there is no command; write tetrarch exec web -- COMMAND\n",
    )
    done = cli("exec", "--wait", "0.1", "web", "--", "true")
    assert done.returncode == 1
    assert "no agent answers in the guest after 0.1 s" in done.stderr
    for paths in (["a", "b"], ["web:a", "web:b"]):
        assert "one of the two is to be a guest's" in cli("cp", *paths).stderr
    for paths in (["", "web:a"], ["web:a", ""]):
        assert "an empty path names nothing" in cli("cp", *paths).stderr
    assert "'=x' sets nothing" in cli("exec", "--env", "=x", "web", "--", "env").stderr


def test_completion_knows_the_names_of_machines() -> None:
    claims = [Claim("web-1"), Claim("db-1")]

    def complete(line: str) -> list[str]:
        words = line.split(" ")
        done = subprocess.run(
            [sys.executable, "-m", "tetrarch"],
            env={
                **os.environ,
                "_TETRARCH_COMPLETE": "complete_bash",
                "COMP_WORDS": line,
                "COMP_CWORD": str(len(words) - 1),
            },
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
        return done.stdout.split()

    assert complete("tetrarch stop w") == ["web-1"]
    assert complete("tetrarch kill web-1 ") == ["db-1", "web-1"]
    for claim in claims:
        claim.close()
    assert complete("tetrarch st") == ["stop", "stat"]
    assert complete("tetrarch console --r") == ["--read-only"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(cli: Cli, shell: str) -> None:
    assert "_TETRARCH_COMPLETE" in cli("completion", shell).stdout
    assert cli("completion", "csh").returncode == 2


def test_two_that_start_with_one_name_at_once(kernel: Kernel, cli: Cli) -> None:
    command = [sys.executable, "-m", "tetrarch", "run", "--detach", "--engine", "bt"]
    command += ["--name", "web", "--kernel", str(kernel(guests.ECHO))]
    starters = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [(*starter.communicate(timeout=LIMIT_S), starter.returncode) for starter in starters]
    assert sorted(code for _, _, code in ends) == [0, 1, 1]
    assert sum("runs already" in said for _, said, _ in ends) == 2
    assert listed(cli) == {"web": "running"}


def test_signal_while_it_starts_ends_it(endless_start: subprocess.Popen[str]) -> None:
    endless_start.send_signal(signal.SIGTERM)
    _, said = endless_start.communicate(timeout=LIMIT_S)
    assert endless_start.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM" in said
    assert machines() == []


def test_starting_machine_is_listed_and_can_be_killed(
    cli: Cli, endless_start: subprocess.Popen[str]
) -> None:
    assert listed(cli) == {"web": "starting"}
    assert cli("kill", "web").returncode == 0
    endless_start.communicate(timeout=LIMIT_S)
    assert endless_start.returncode == 128 + signal.SIGTERM
    assert machines() == []


def test_control_socket_speaks_to_any_client(start: Callable[..., None]) -> None:
    start("web")
    path = tetrarch.connect("web").about.control
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert b'"QMP"' in client.recv(4096)
