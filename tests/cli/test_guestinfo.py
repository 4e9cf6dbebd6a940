"""The variables of a guest on VMware's platform, from the command line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.machine import guests

import tetrarch
from tetrarch import TetrarchError
from tetrarch.testing import pvh_kernel

pytestmark = pytest.mark.usefixtures("runtime")


def start(cli: Cli, tmp_path: Path, *options: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.ECHO))
    words = ["run", "--detach", "--name", "web", "--engine", "bt", "--kernel", str(kernel)]
    done = cli(*words, *options)
    assert done.returncode == 0, done.stderr


def test_variables_are_listed_got_and_set(cli: Cli, tmp_path: Path) -> None:
    start(cli, tmp_path, "--platform", "vmware")
    assert cli("guestinfo", "web").stdout == ""
    done = cli("guestinfo", "web", "set", "color", "deep blue")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert cli("guestinfo", "web", "get", "color").stdout == "deep blue\n"
    assert cli("guestinfo", "web").stdout == "color = deep blue\n"
    assert json.loads(cli("guestinfo", "web", "list", "--json").stdout) == {"color": "deep blue"}
    vm = tetrarch.connect("web")
    assert dict(vm.guestinfo) == {"color": "deep blue"}
    assert not vm.tools.status.running
    with pytest.raises(TetrarchError, match="tools are not there; install and start open-vm-tools"):
        vm.tools.halt()
    del vm.guestinfo["color"]
    assert dict(vm.guestinfo) == {}


def test_variables_are_there_from_the_start(cli: Cli, tmp_path: Path) -> None:
    start(cli, tmp_path, "--platform", "vmware", "--guestinfo", "a=1=2, 3", "--guestinfo", "b.c=")
    assert json.loads(cli("guestinfo", "web", "list", "--json").stdout) == {"a": "1=2, 3"}
    (tmp_path / "vm.toml").write_text('platform = "vmware"\nguestinfo = ["x=y z"]\n')
    shown = cli("config", "--config", tmp_path / "vm.toml", "--guestinfo", "more=1")
    assert tomllib.loads(shown.stdout)["guestinfo"] == ["more=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guestinfo", "a=b"], "a guest on platform pc has no guestinfo; give platform vmware"),
        (["--guestinfo", "a"], "--guestinfo: 'a' is no variable; write KEY=VALUE"),
        (["--guestinfo", "=b"], "--guestinfo: '' is no name of a variable"),
        (
            ["--platform", "vmwear"],
            "--platform: 'vmwear' is no platform; there are pc, vmware and xen",
        ),
    ],
)
def test_wrong_options_are_told_in_a_line(
    cli: Cli, tmp_path: Path, options: list[str], message: str
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    done = cli("run", "--engine", "bt", "--kernel", kernel, *options)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["get", "color"], "guestinfo.color of web is not set; set it: tetrarch guestinfo web set"),
        (["get"], "guestinfo: get takes KEY; 0 words were given"),
        (["set", "color"], "guestinfo: set takes KEY and VALUE; 1 words were given"),
        (["list", "color"], "guestinfo: list takes nothing; 1 words were given"),
        (["put"], "guestinfo: 'put' is no action; there are list, get and set"),
        (["set", "a b", "c"], "'a b' is no name of a variable"),
    ],
)
def test_wrong_words_are_told_in_a_line(
    cli: Cli, tmp_path: Path, words: list[str], message: str
) -> None:
    start(cli, tmp_path, "--platform", "vmware")
    done = cli("guestinfo", "web", *words)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_machines_have_none(cli: Cli, tmp_path: Path) -> None:
    start(cli, tmp_path)
    done = cli("guestinfo", "web")
    assert done.returncode != 0
    assert "the machine's platform, pc, has nothing of VMware's" in done.stderr
