"""Commands and files in a Linux guest that runs in the background."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.remote.conftest import tetrarch_cli

from tetrarch import Phase
from tetrarch.errors import HostError
from tetrarch.remote import RemoteMachine


def test_command_in_the_guest_has_our_pipes_and_its_exit_code(guest: RemoteMachine) -> None:
    done = tetrarch_cli(
        *("exec", "--env", "WORD=hello", "--directory", "/etc", "web", "--"),
        *("sh", "-c", "echo $WORD; pwd; cat; echo no >&2; exit 7"),
        data=b"input",
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"hello\n/etc\ninput", b"no\n")
    captured = guest.exec(["cat"], b"bytes")
    assert (captured.code, captured.stdout, captured.stderr) == (0, b"bytes", b"")
    with pytest.raises(TypeError, match=r"the words of a command: \['ls'\]"):
        guest.exec("ls")


def test_files_go_in_and_come_back(guest: RemoteMachine, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(os.urandom(300_000))
    (tree / "run").write_text("#!/bin/sh\necho ran\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("sub/data")
    (tree / "-odd name\n").write_text("odd")
    done = tetrarch_cli("cp", tree, "web:/tmp")
    assert (done.returncode, done.stderr) == (0, b"")
    assert guest.exec(["/tmp/tree/run"]).stdout == b"ran\n"
    assert guest.exec(["stat", "-c", "%u:%g", "/tmp/tree/run"]).stdout == b"0:0\n"
    # Into a directory that is there under its name, else as what is named.
    for target, place in ((tmp_path / "new", "new"), (tmp_path, "tree")):
        (tree / "sub" / "data").touch()
        assert tetrarch_cli("cp", "web:/tmp/tree", target).returncode == 0
        back = tmp_path / place
        assert (back / "sub" / "data").read_bytes() == (tree / "sub" / "data").read_bytes()
        assert (back / "link").readlink() == Path("sub/data")
        assert (back / "-odd name\n").read_text() == "odd"
        assert os.access(back / "run", os.X_OK)


def test_one_file_under_another_name(guest: RemoteMachine, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    guest.copy_in(tmp_path / "a", "b")
    assert guest.exec(["cat", "b"]).stdout == b"text"
    guest.copy_out("b", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "text"


def test_links_that_lead_out_are_left_out(guest: RemoteMachine, tmp_path: Path) -> None:
    guest.exec(["sh", "-c", "mkdir /tmp/l; ln -s /etc/passwd /tmp/l/out; echo in > /tmp/l/in"])
    done = tetrarch_cli("cp", "web:/tmp/l", tmp_path / "l")
    assert done.stderr == b"tetrarch: l/out leads out of what was copied: left out\n"
    assert sorted(path.name for path in (tmp_path / "l").iterdir()) == ["in"]


def test_paths_that_cannot_be(guest: RemoteMachine, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(HostError, match=r"the guest cannot copy: .*nothing"):
        guest.copy_out("/nothing", tmp_path)
    with pytest.raises(HostError, match="names no file"):
        guest.copy_out("/", tmp_path)
    with pytest.raises(HostError, match="there is no directory"):
        guest.copy_out("/etc/passwd", tmp_path / "no" / "such")
    with pytest.raises(HostError, match=r"cannot copy .*: No such file"):
        guest.copy_in(tmp_path / "none", "/tmp")
    with pytest.raises(HostError, match="the guest has no directory /none/"):
        guest.copy_in(tmp_path / "a", "/none/")
    with pytest.raises(HostError, match="the guest cannot copy"):
        guest.copy_in(tmp_path / "a", "/none/such")


def test_machine_of_another_process_is_awaited(guest: RemoteMachine) -> None:
    async def main() -> None:
        async with guest as vm:
            one, two = await asyncio.gather(vm.exec(["echo", "1"]), vm.exec(["echo", "2"]))
            assert (one.stdout, two.stdout) == (b"1\n", b"2\n")
            await vm.pause()
            assert vm.phase is Phase.PAUSED
            await vm.resume()
            vm.console.send("echo $((40 + 2))\n")
            await vm.console.expect("\n42")
        assert guest.alive

    asyncio.run(main())
