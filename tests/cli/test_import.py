"""``tetrarch import``: files for --config, and what is not in them."""

import json
import tomllib
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.firmware.media import boot_disk
from tests.machine import guests

from tetrarch.block import tools
from tetrarch.testing import pvh_kernel


def test_qemus_command_line_runs_here(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(pvh_kernel(guests.say(b"up") + guests.POWER_OFF))
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/sh\nexec qemu-system-x86_64 -nographic -m 64 \\\n  -kernel kernel\n")
    done = cli("import", "qemu", script, "-o", tmp_path / "sub.toml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    ran = cli("run", "--engine", "bt", "--config", tmp_path / "sub.toml")
    assert (ran.returncode, ran.stdout) == (0, "up")


def test_words_behind_two_dashes(cli: Cli) -> None:
    done = cli(
        "import", "qemu", "--", "qemu-system-x86_64", "-kernel", "/k", "-m", "1G", "-vga", "x"
    )
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["memory"] == "1024M"
    assert '"/k" # -kernel' in done.stdout
    assert done.stderr == "tetrarch: not carried over: -vga x: there is nothing like it\n"


def test_hundred_unknown_things_are_a_line_each(cli: Cli, tmp_path: Path) -> None:
    odd = {f"thing\x1b[{index}m\n": {"x": "y" * 300} for index in range(100)}
    file = tmp_path / "vm.json"
    file.write_text(json.dumps({"boot-source": {"kernel_image_path": "k"}} | odd))
    done = cli("import", "firecracker", file)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (0, 100)
    assert all(line.startswith("tetrarch: not carried over: thing") for line in lines)
    assert all(len(line) < 200 and line.isprintable() for line in lines)
    assert tomllib.loads(done.stdout)["kernel"] == str(tmp_path / "k")


def test_any_number_of_disks_takes_a_moment(cli: Cli, tmp_path: Path) -> None:
    disk = '<disk type="file"><source file="x"/></disk>'
    file = tmp_path / "d.xml"
    file.write_text(f"<domain><devices>{disk * 14_000}</devices></domain>")
    done = cli("import", "libvirt", file)
    assert done.returncode == 0
    assert len(tomllib.loads(done.stdout)["disk"]) == 256
    assert "13744 more things" in done.stderr or "13744 times" in done.stderr


def test_what_was_lost_is_said_also_where_nothing_is_left(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "d.xml"
    file.write_text("<domain>\n<devices>\n<sound/></devices></domain>")
    done = cli("import", "libvirt", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "tetrarch: not carried over: line 3: <sound>: there is nothing like it",
        f"tetrarch: {file}: nothing is left to run: neither a kernel nor a disk was carried over; "
        "name one there",
    ]


@pytest.mark.parametrize("kind", ["qemu", "firecracker", "libvirt"])
def test_what_is_no_such_file_is_one_line(cli: Cli, tmp_path: Path, kind: str) -> None:
    for path in ("/nonexistent", "/", "/dev/zero", tmp_path / "empty"):
        (tmp_path / "empty").write_bytes(b"")
        done = cli("import", kind, path)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert str(path) in done.stderr


def test_machine_of_vmware_is_imported(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "web.vmx"
    file.write_text(
        'config.version = "8"\ndisplayName = "web"\nmemsize = "64"\nide0:0.present = "TRUE"\n'
        'ide0:0.fileName = "web.raw"\nguestinfo.role = "db"\nsound.present = "TRUE"\n'
    )
    done = cli("import", "vmx", file)
    assert done.stderr == "tetrarch: not carried over: sound: there is nothing like it\n"
    values = tomllib.loads(done.stdout)
    assert (values["platform"], values["guestinfo"]) == ("vmware", ["role=db"])
    assert values["disk"] == [f"{tmp_path}/web.raw,bus=ide"]
    (tmp_path / "none.vmx").write_text("<xml/>")
    none = cli("import", "vmx", tmp_path / "none.vmx")
    assert (none.returncode != 0, none.stderr.count("\n")) == (True, 1)
    assert f"{tmp_path}/none.vmx: this is no virtual machine of VMware's" in none.stderr


@pytest.mark.parametrize("kind", ["sparse", "stream", "extents", "flat"])
def test_machine_of_vmware_runs_from_each_kind_of_its_disks(
    cli: Cli, tmp_path: Path, kind: str
) -> None:
    boot_disk(tmp_path / "web-flat.vmdk", b"from the disk")
    if kind == "flat":
        extent = 'RW 2048 VMFS "web-flat.vmdk"'
    else:
        stream = kind == "stream"
        name = "web-s001.vmdk" if kind == "extents" else "web.vmdk"
        subformat: tools.Subformat = "streamOptimized" if stream else "monolithicSparse"
        tools.convert(
            tmp_path / "web-flat.vmdk", tmp_path / name, source_format="raw", subformat=subformat
        )
        extent = f'RW 2048 SPARSE "{name}"'
    if kind in ("flat", "extents"):
        text = f"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n{extent}\n"
        (tmp_path / "web.vmdk").write_text(text)
    file = tmp_path / "web.vmx"
    file.write_text(
        'config.version = "8"\nmemsize = "64"\nide0:0.present = "TRUE"\n'
        'ide0:0.fileName = "web.vmdk"\n'
    )
    options = ["--engine", "bt", "--timeout", "50"]
    if kind == "stream":
        refused = cli("run", file, *options)
        assert "streamOptimized vmdk images are not written to; add readonly" in refused.stderr
        options.append("--snapshot")
    done = cli("run", file, *options)
    assert "from the disk" in done.stdout, done.stderr


def test_machine_of_vmware_runs_as_it_is(cli: Cli, tmp_path: Path) -> None:
    """A disk whose boot sector says so, from the BIOS to the serial line."""
    boot_disk(tmp_path / "web.raw", b"from the disk")
    file = tmp_path / "web.vmx"
    file.write_text(
        'config.version = "8"\nmemsize = "64"\nide0:0.present = "TRUE"\n'
        'ide0:0.fileName = "web.raw"\nsound.present = "TRUE"\n'
    )
    done = cli("run", file, "--engine", "bt", "--timeout", "50")
    assert "from the disk" in done.stdout, done.stderr
    assert "tetrarch: not carried over: sound: there is nothing like it\n" in done.stderr
    both = cli("run", file, "--config", "x.toml")
    assert "web.vmx and --config name a machine each" in both.stderr
