"""Images that are cut, empty, of other formats or none: each is refused, and stays as it is."""

import socket
import struct
from pathlib import Path

import pytest

from tetrarch import Machine, block
from tetrarch.errors import ConfigError, ImageError, TetrarchError
from tetrarch.testing import pvh_kernel

MIB = 1 << 20
SECTORS = MIB // 512


def opened(path: Path) -> None:
    block.open_disk(block.DiskSpec(path)).close()


def full_image(path: Path) -> bytes:
    """A qcow2 image whose clusters all have data."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(b"\1" * (4 * MIB))
    block.convert(raw, path)
    return path.read_bytes()


def test_image_that_was_cut_short_is_no_disk_with_zeroes_at_its_end(tmp_path: Path) -> None:
    path, copy = tmp_path / "disk.qcow2", tmp_path / "copy.img"
    whole = full_image(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="its file ends before its data do; get the file again"):
        opened(path)
    with pytest.raises(ImageError, match="its file ends before its data do"):
        block.convert(path, copy)
    assert not copy.exists()
    assert block.check(path)["errors"]
    path.write_bytes(whole)
    opened(path)


def test_space_that_is_lost_behind_the_end_cuts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    data = bytearray(full_image(path))
    (table,) = struct.unpack_from(">Q", data, 48)
    (counts,) = struct.unpack_from(">Q", data, table)
    # As a program leaves it that is killed between a count and the data.
    struct.pack_into(">H", data, counts + 2 * (len(data) // 65536 + 3), 1)
    path.write_bytes(data)
    assert block.check(path)["leaks"] == 1
    opened(path)


def test_snapshots_beyond_the_file_are_damage_and_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    data = bytearray(full_image(path))
    struct.pack_into(">IQ", data, 60, 3, 1 << 50)
    path.write_bytes(data)
    report = block.check(path)
    assert report["errors"]
    assert any("table of snapshots at 0x4000000000000" in line for line in report["problems"])


def test_vmdk_lacks_an_extent_or_the_end_of_one(tmp_path: Path) -> None:
    path, extent = tmp_path / "disk.vmdk", tmp_path / "disk-flat.vmdk"
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW {SECTORS} FLAT "disk-flat.vmdk" 0\n'
    )
    spec = block.DiskSpec(path, readonly=True)
    with pytest.raises(ImageError) as refused:
        block.open_disk(spec)
    assert refused.value.cause.startswith(f"{extent}: cannot open the image: no such file")
    assert refused.value.cause.endswith(f"(an extent of {path})")
    extent.write_bytes(b"\1" * (MIB - 1))
    with pytest.raises(ImageError, match=rf"has {MIB - 1} of the {MIB} bytes that .* says"):
        block.open_disk(spec)
    extent.write_bytes(b"\1" * MIB)
    block.convert(path, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == extent.read_bytes()
    with pytest.raises(ImageError, match="is not a vmdk image; give the image's format"):
        block.info(extent, "vmdk")


def test_what_is_no_image_is_refused_by_its_kind(tmp_path: Path) -> None:
    page, folder, path = tmp_path / "disk.qcow2", tmp_path / "folder", tmp_path / "socket"
    page.write_text("<html>Not found</html>")
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        for file, said in (
            (page, "is no qcow2 image, as its name says; get the file again"),
            (folder, "is a directory; give the path of an image"),
            (path, "is neither a file nor a block device; give the path of an image"),
            (page / "x", "not a directory; give the path of an image"),
            (tmp_path / ("x" * 300), "file name too long; give the path of an image"),
        ):
            with pytest.raises(ImageError, match=said):
                block.info(file)
    assert page.read_text() == "<html>Not found</html>"


@pytest.mark.parametrize("size", [0, -1, 1, 513, 1 << 63, 1 << 80])
@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
def test_size_that_no_disk_has(tmp_path: Path, name: str, size: int) -> None:
    path, there = tmp_path / name, tmp_path / f"there-{name}"
    block.create(there, MIB)
    with pytest.raises(ConfigError, match=f"a disk of {size} bytes; give a multiple of 512"):
        block.create(path, size)
    with pytest.raises(ConfigError, match=f"a disk of {size} bytes"):
        block.resize(there, size, shrink=True)
    assert not path.exists()
    assert block.info(there)["size"] == MIB


def test_what_an_image_cannot_have_is_refused(tmp_path: Path) -> None:
    def refused(message: str, path: Path, **options: object) -> None:
        with pytest.raises(TetrarchError, match=message):
            block.create(path, **options)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []

    for name in ("disk.vdi", "disk.QED", "disk.vhdx"):
        refused("images are not written; name it", tmp_path / name, size=MIB)
    raw = tmp_path / "disk.img"
    refused("a raw image has no clusters", raw, size=MIB, cluster_size=65536)
    refused("its backing file has no name", raw, size=MIB, backing_format="raw")
    refused("its folder is not there; make that", tmp_path / "no" / "disk.img", size=MIB)
    large = {"size": 1 << 62, "cluster_size": 65536}
    refused("give a smaller size, or larger clusters", tmp_path / "disk.qcow2", **large)


def machine(tmp_path: Path, *disks: str) -> Machine:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    return Machine(engine="bt", kernel=kernel, memory="16M", disk=disks)


def test_machine_gets_no_empty_disk_and_no_image_twice(tmp_path: Path) -> None:
    image, empty, link = tmp_path / "disk.img", tmp_path / "empty.img", tmp_path / "link.img"
    block.create(image, MIB)
    empty.touch()
    link.symlink_to(image)
    with pytest.raises(ImageError, match=r"empty\.img: is empty; get the file again"):
        machine(tmp_path, str(empty))
    for disks in ([image, link], [image, f"{link},readonly"], [f"{image},snapshot=on", link]):
        with pytest.raises(ConfigError, match=r"link\.img: two disks of the machine have this"):
            machine(tmp_path, *map(str, disks))
    machine(tmp_path, f"{image},readonly", f"{link},readonly").kill()
    # Nothing holds it.
    opened(image)


def test_user_of_an_image_is_told_apart_by_what_it_does(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    block.create(path, MIB)
    for readonly, said in ((True, "reads it, or add snapshot=on"), (False, "writes to it")):
        other = block.open_disk(block.DiskSpec(path, readonly=readonly))
        with pytest.raises(ImageError, match=f"the image is in use; stop .* that {said}$"):
            opened(path)
        other.close()
    opened(path)


def test_backing_file_with_a_colon_in_its_name(tmp_path: Path) -> None:
    block.create(tmp_path / "a:b.img", MIB)
    overlay = tmp_path / "disk.qcow2"
    with pytest.raises(ImageError, match=r"is not a file; write it as \./a:b\.img: what stands"):
        block.create(overlay, backing="a:b.img", backing_format="raw")
    assert block.create(str(overlay), backing="./a:b.img", backing_format="raw") == MIB


def test_folder_that_takes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # sysfs takes no files, whoever asks.
    with pytest.raises(ImageError, match="permission denied; give a path in a folder that you"):
        block.create(Path("/sys/tetrarch.img"), MIB)
    block.create(tmp_path / "disk.img", MIB)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ImageError, match="no such file or directory; set TMPDIR to a folder"):
        block.open_disk(block.DiskSpec(tmp_path / "disk.img", snapshot=True))
