"""``tetrarch disk`` in a process of its own."""

import json
import os
import sys
from pathlib import Path

import pexpect
import pytest
from tests.cli.conftest import Cli


def test_image_is_made_grown_copied_and_checked(cli: Cli, tmp_path: Path) -> None:
    image, copy = tmp_path / "disk.qcow2", tmp_path / "copy.img"
    assert cli("disk", "create", image, "8M").stdout == f"{image}: a disk of 8 MiB\n"
    assert cli("disk", "resize", image, "+8M").stdout == f"{image}: 8 MiB before, 16 MiB now\n"
    info = json.loads(cli("disk", "info", "--json", image).stdout)
    assert (info["format"], info["size"]) == ("qcow2", 16 << 20)
    assert "disk            16 MiB (16777216 bytes)" in cli("disk", "info", image).stdout
    done = cli("disk", "convert", image, copy)
    assert (done.returncode, done.stderr) == (0, "Writing copy.img (16.8 MB)\n")
    assert copy.stat().st_size == 16 << 20
    checked = cli("disk", "check", image)
    assert (checked.returncode, "no errors" in checked.stdout) == (0, True)


def test_damage_is_told_by_the_exit_code_and_mended(cli: Cli, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    cli("disk", "create", image, "8M")
    data = bytearray(image.read_bytes())
    refcounts = int.from_bytes(data[65536 : 65536 + 8], "big")
    data[refcounts + 2 * 100 + 1] = 1
    image.write_bytes(data)
    checked = cli("disk", "check", image)
    assert checked.returncode == 3
    assert "cluster 100 has refcount 1, and 0 references" in checked.stdout
    data[refcounts + 1] = 0
    image.write_bytes(data)
    assert cli("disk", "check", image).returncode == 2
    assert cli("disk", "check", "--repair", image).returncode == 0
    assert cli("disk", "check", image).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("create", "NEW"), 1, "NEW: has no size; give one"),
        (("create", "NEW", "8X"), 2, "SIZE: '8X' is no size; write 8G"),
        (("create", "NEW", "8M", "--format", "vdi"), 2, "--format: 'vdi' is no format; there are"),
        (("info", "NEW"), 1, "NEW: cannot open the image: no such file or directory; give"),
        (("check", "RAW"), 1, "RAW: raw images have no refcounts; there is nothing to check"),
        (("resize", "RAW", "1M"), 2, "RAW: 1048576 bytes are less than its 2097152;"),
        (("convert", "RAW", "RAW"), 1, "RAW: is there already; give another path"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, tmp_path: Path, arguments: tuple[str, ...], code: int, line: str
) -> None:
    names = {"NEW": str(tmp_path / "new.img"), "RAW": str(tmp_path / "raw.img")}
    Path(names["RAW"]).write_bytes(b"\0" * (2 << 20))
    done = cli("disk", *(names.get(word, word) for word in arguments))
    assert done.returncode == code, done.stderr
    for name, path in names.items():
        line = line.replace(name, path)
    (error,) = [said for said in done.stderr.splitlines() if said.startswith("tetrarch: ")]
    assert line in error
    assert os.listdir(tmp_path) == ["raw.img"]


def test_copy_has_a_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    source = tmp_path / "disk.img"
    source.write_bytes(b"\1" * (32 << 20))
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "disk", "convert", str(source), str(tmp_path / "copy.qcow2")],
    )
    child.expect(r"copy\.qcow2.*33\.6/33\.6 MB", timeout=60)
    child.expect(pexpect.EOF, timeout=60)
    child.close()
    assert child.exitstatus == 0
