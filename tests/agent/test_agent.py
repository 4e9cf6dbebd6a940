"""Commands in a guest, by its agent over the socket device."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pexpect
import pytest

import tetrarch
from tetrarch import Machine
from tetrarch.agent import AgentError, AgentStream, connect, encode_run
from tetrarch.agent.client import ERROR, EXIT, INPUT, INPUT_WINDOW, OUTPUT, RUN
from tetrarch.errors import HostError, StateError
from tetrarch.images import CachedGuest
from tetrarch.sockets import SocketDirectory
from tetrarch.vsock import listen

LIMIT_S = 90


@pytest.fixture(scope="module")
def path(debian_guest: CachedGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a guest that runs."""
    path = tmp_path_factory.mktemp("agent") / "vsock"
    with Machine(
        engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd, vsock=path
    ) as vm:
        vm.start()
        connect(path, LIMIT_S).close()
        yield path
    assert not path.exists()


class Done:
    """A command that has ended."""

    def __init__(self, stream: AgentStream) -> None:
        self.output, self.errors = bytearray(), bytearray()
        while True:
            kind, data = stream.read()
            if kind == EXIT:
                self.code = int.from_bytes(data, "little")
                return
            {OUTPUT: self.output, ERROR: self.errors}[kind].extend(data)


def begin(path: Path, *arguments: str, **options: object) -> AgentStream:
    stream = connect(path, LIMIT_S)
    stream.send(RUN, encode_run(arguments, **options))  # type: ignore[arg-type]
    return stream


def run(path: Path, *arguments: str, **options: object) -> Done:
    with begin(path, *arguments, **options) as stream:
        with suppress(BrokenPipeError):  # it may have ended already
            stream.send_input(b"")
        return Done(stream)


def wait_until(path: Path, script: str) -> None:
    """Until a script in the guest ends well."""
    deadline = time.monotonic() + LIMIT_S
    while run(path, "sh", "-c", script).code:
        assert time.monotonic() < deadline, script


def test_guest_that_ends_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It has taken the connection, and never says a word.
    monkeypatch.setattr("tetrarch.agent.client._ANSWER_S", 3600)
    with listen(tmp_path / "vsock"):
        alive = iter([True, True, True])
        with pytest.raises(AgentError, match="the guest ended before its agent answered"):
            connect(tmp_path / "vsock", 3600, lambda: next(alive, False))


def test_output_error_output_and_exit_code_are_the_commands(path: Path) -> None:
    done = run(path, "sh", "-c", "echo one; echo two >&2; exit 7")
    assert (bytes(done.output), bytes(done.errors), done.code) == (b"one\n", b"two\n", 7)
    assert run(path, "true").code == 0


def test_command_has_its_arguments_directory_and_environment(path: Path) -> None:
    script = 'echo "$#:$2:$PWD:$X"'
    # The last byte of it is no UTF-8, as a file's name may be.
    words = ["a b", "ü\n\udcff"]
    done = run(path, "sh", "-c", script, "0", *words, directory="/tmp", environment=["X=1 2"])
    assert bytes(done.output) == "2:ü\n".encode() + b"\xff:/tmp:1 2\n"


def test_command_that_is_missing_or_none_says_so(path: Path) -> None:
    done = run(path, "no-such-program")
    assert done.code == 127
    assert done.errors == b"no-such-program: No such file or directory\n"
    assert run(path, "/etc/hostname").code == 126


def test_megabytes_go_in_and_out_whole(path: Path) -> None:
    data = os.urandom(8 << 20)

    def send() -> None:
        stream.send_input(data)
        stream.send_input(b"")

    with begin(path, "cat") as stream:
        sender = threading.Thread(target=send)
        sender.start()
        done = Done(stream)
        sender.join(LIMIT_S)
    assert hashlib.sha256(done.output).digest() == hashlib.sha256(data).digest()


def test_many_commands_run_at_once(path: Path) -> None:
    streams = [begin(path, "sh", "-c", f"read x; echo ${{x}}{n}") for n in range(20)]
    for stream in streams:
        stream.send_input(b"line\n")
    for n, stream in enumerate(streams):
        assert Done(stream).output == b"line%d\n" % n
        stream.close()


def test_signals_reach_all_of_the_command(path: Path) -> None:
    with begin(
        path, "sh", "-c", "trap 'echo caught; exit 3' USR1; echo up; while :; do sleep 1; done"
    ) as stream:
        assert stream.read() == (OUTPUT, b"up\n")
        stream.send_signal(signal.SIGUSR1)
        done = Done(stream)
        assert (bytes(done.output), done.code) == (b"caught\n", 3)
    with begin(path, "sleep", "1000") as stream:
        stream.send_signal(signal.SIGKILL)
        assert Done(stream).code == 128 + signal.SIGKILL


def test_signals_that_were_delivered_are_told(path: Path) -> None:
    script = "exec 2>/dev/null; trap 'echo caught' USR1; echo up; while :; do sleep 1; done"
    with begin(path, "sh", "-c", script) as stream:
        assert stream.read() == (OUTPUT, b"up\n")
        while not stream.signalled:
            stream.send_signal(signal.SIGUSR1)
            assert stream.read() == (OUTPUT, b"caught\n")


def test_command_ends_when_the_host_hangs_up(path: Path) -> None:
    with begin(path, "sh", "-c", "echo $$ >/tmp/left; echo up; exec sleep 1000") as stream:
        # Not before its number is told.
        assert stream.read() == (OUTPUT, b"up\n")
    wait_until(path, "[ -s /tmp/left ] && ! kill -0 $(cat /tmp/left) 2>/dev/null")


def test_command_that_reads_no_input_has_its_signals(path: Path) -> None:
    def send() -> None:
        with suppress(OSError):
            stream.send_input(bytes(4 << 20))

    with begin(path, "sh", "-c", "echo up; exec sleep 1000") as stream:
        sender = threading.Thread(target=send)
        sender.start()
        assert stream.read() == (OUTPUT, b"up\n")
        # More than the pipe in the guest holds is under way.
        deadline = time.monotonic() + LIMIT_S
        while stream.room > INPUT_WINDOW - (64 << 10):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stream.send_signal(signal.SIGTERM)
        assert Done(stream).code == 128 + signal.SIGTERM
    sender.join(LIMIT_S)
    assert not sender.is_alive()


def test_hang_up_reaches_a_command_that_reads_no_input(path: Path) -> None:
    with begin(path, "sh", "-c", "echo $$ >/tmp/deaf; echo up; exec sleep 1000") as stream:
        assert stream.read() == (OUTPUT, b"up\n")
        stream.send_input(bytes(INPUT_WINDOW))
    wait_until(path, "[ -s /tmp/deaf ] && ! kill -0 $(cat /tmp/deaf) 2>/dev/null")


def test_signals_reach_what_a_command_left_running(path: Path) -> None:
    with begin(path, "sh", "-c", "sleep 1000 & echo $$; exit 5") as stream:
        _, leader = stream.read()
        # It has ended, and is not waited for: its number is nobody else's.
        wait_until(path, f"grep -q '^State:.Z' /proc/{int(leader)}/status")
        stream.send_signal(signal.SIGTERM)
        assert Done(stream).code == 5


def test_input_that_the_agent_has_no_room_for_ends_the_command(path: Path) -> None:
    with begin(path, "sleep", "1000") as stream:
        # The agent may hang up before the last of it is sent.
        with suppress(BrokenPipeError):
            for _ in range(8):
                stream.send(INPUT, bytes(64 << 10))
        assert Done(stream).code == 128 + signal.SIGHUP


def test_command_on_a_terminal_knows_its_size_and_changes_of_it(path: Path) -> None:
    with begin(path, "sh", "-c", "stty size; read x; stty size", terminal=(24, 80)) as stream:
        seen = b""
        while b"24 80" not in seen:
            seen += stream.read()[1]
        stream.send_window(50, 132)
        stream.send_input(b"go\r")
        assert b"50 132" in Done(stream).output


@pytest.mark.parametrize("body", [b"", b"\0" * 5, b"\xff" * 64, encode_run(["x"])[:-1]])
def test_nonsense_ends_its_own_connection_alone(path: Path, body: bytes) -> None:
    with connect(path, LIMIT_S) as stream:
        stream.send(RUN, body)
        with pytest.raises(AgentError):
            stream.read()
    assert run(path, "true").code == 0


def test_restored_machine_has_its_agent_at_another_socket(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with Machine(
        engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd, vsock=one
    ) as vm:
        vm.start()
        left = begin(one, "sh", "-c", "echo up; exec sleep 1000")
        with left:
            assert left.read() == (OUTPUT, b"up\n")
            assert run(one, "touch", "/tmp/mine").code == 0
            vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved", engine="bt", vsock=two) as vm:
        vm.start()
        wait_until(two, "[ -e /tmp/mine ] && ! pidof sleep")
    with pytest.raises(StateError, match=r"1 vsock socket, .*; 0 given; give as many of vsock"):
        Machine.restore(tmp_path / "saved", engine="bt")


def test_guest_without_agent_is_told_after_the_time(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"no agent answers .* after 0.2 s"):
        connect(tmp_path / "nothing", 0.2)
    with pytest.raises(AgentError, match="the guest ended"):
        connect(tmp_path / "nothing", LIMIT_S, lambda: False)


def test_agent_that_is_silent_is_waited_for_no_longer_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(AgentError, match=r"after 0\.2 s: the machine is paused"):
            connect(path, 0.2, paused=lambda: True)
        assert time.monotonic() - began < 3


def test_socket_that_is_in_use_is_refused_and_one_left_behind_replaced(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with listen(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(HostError, match="another program listens"):
            listen(path)
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    with pytest.raises(HostError, match="108 bytes"):
        listen(tmp_path / ("x" * 120))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HostError, match="cannot make the socket"):
        listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def command(guest: CachedGuest, *words: str) -> list[str]:
    return [
        *(sys.executable, "-m", "tetrarch", "run", "--engine", "bt"),
        *("--kernel", str(guest.kernel), "--initrd", str(guest.initrd), *words),
    ]


def test_run_with_a_command_is_as_the_command_is(debian_guest: CachedGuest) -> None:
    with SocketDirectory() as folder:
        # A place of the user's own: the confined machine takes its socket away from there.
        vsock = folder / "vsock"
        script = ("sh", "-c", "cat; echo no >&2; exit 7")
        done = subprocess.run(
            command(debian_guest, "--vsock", str(vsock), "--", *script),
            input=b"through\n",
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert not vsock.exists()
    assert (done.stdout, done.stderr, done.returncode) == (b"through\n", b"no\n", 7)


def test_output_that_nobody_takes_costs_the_guest_nothing(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    script = "echo kept >/dev/vda; echo a line; sleep 1000"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(debian_guest, "--disk", str(disk), "--", "sh", "-c", script),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    said = "the command's output cannot be written: No space left on device; open it to a file"
    assert (done.returncode, done.stderr.startswith(f"tetrarch: {said}")) == (1, True), done.stderr
    # It was in the guest's memory, and the guest was switched off.
    assert disk.read_bytes().startswith(b"kept\n")


@pytest.mark.long
@pytest.mark.timeout(10 * LIMIT_S)
def test_a_gibibyte_comes_back_as_it_went(debian_guest: CachedGuest, tmp_path: Path) -> None:
    data, sent = tmp_path / "data", hashlib.sha256()
    with data.open("wb") as file:
        for _ in range(64):
            piece = os.urandom(16 << 20)
            sent.update(piece)
            file.write(piece)
    received = hashlib.sha256()
    with (
        data.open("rb") as source,
        subprocess.Popen(
            command(debian_guest, "--", "cat"), stdin=source, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        while piece := process.stdout.read(1 << 20):
            received.update(piece)
        assert process.wait(LIMIT_S) == 0
    assert received.digest() == sent.digest()


def test_run_with_a_command_that_reads_nothing_is_ended_by_a_signal(
    debian_guest: CachedGuest,
) -> None:
    words = command(debian_guest, "--", "sh", "-c", "echo up; exec sleep 1000")
    endless = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    with endless, subprocess.Popen(words, stdin=endless.stdout, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 128 + signal.SIGINT
        endless.kill()


def test_run_with_a_command_on_a_terminal(debian_guest: CachedGuest) -> None:
    words = command(debian_guest, "--", "sh")
    child = pexpect.spawn(words[0], words[1:], timeout=LIMIT_S, dimensions=(33, 99))
    child.expect("# ")
    child.sendline("stty size")
    child.expect("33 99")
    child.expect("# ")
    child.setwinsize(40, 120)
    child.sendline('until [ "$(stty size)" = "40 120" ]; do sleep 0.1; done; echo fol""lows')
    child.expect("follows")
    child.sendline("exit 4")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 4


def test_terminal_is_not_lost_to_a_guest_that_hangs(
    debian_guest: CachedGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    words = command(debian_guest, "--name", "hangs", "--", "sh")
    child = pexpect.spawn(words[0], words[1:], timeout=LIMIT_S)
    child.expect("# ")
    # Where it takes what is typed, it has each of them, and goes on.
    for _ in range(4):
        child.sendintr()
        child.expect("# ")
    tetrarch.connect("hangs").pause()
    child.send("x")
    time.sleep(4)  # it hangs for longer than a slow one is waited for
    for _ in range(3):
        child.sendintr()
    child.expect("the guest has taken nothing for 3 s, and is left")
    child.expect(pexpect.EOF)
    assert child.wait() == 1


def test_run_with_a_command_ends_after_its_time(debian_guest: CachedGuest) -> None:
    done = subprocess.run(
        command(debian_guest, "--timeout", "15", "--json", "--", "sleep", "1000"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 124
    said, report = done.stderr.splitlines()[-2:]
    assert said.endswith("15 s passed (--timeout)")
    assert json.loads(report)["status"] == "timeout"


def test_run_with_a_command_reports_on_standard_error(debian_guest: CachedGuest) -> None:
    done = subprocess.run(
        command(debian_guest, "--stats", "--json", "--", "sh", "-c", "echo out; exit 7"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("out\n", 7)
    *counters, last = done.stderr.splitlines()
    assert counters[0].startswith("ran for ")
    report = json.loads(last)
    assert (report["status"], report["exit_code"], report["engine"]) == ("powered-off", 7, "bt")
