"""Images made here and by QEMU, each as the other sees them."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tetrarch import block
from tetrarch._native import Disk
from tetrarch.errors import ConfigError, ImageError, TetrarchError

MIB = 1 << 20

Tool = Callable[..., str]


@pytest.fixture
def qemu_img(tmp_path: Path) -> Tool:
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed: apt-get install qemu-utils")

    def run(*arguments: object, code: int = 0) -> str:
        done = subprocess.run(
            [program, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def qemu_io(tmp_path: Path) -> Tool:
    program = shutil.which("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed: apt-get install qemu-utils")

    def run(image: str, *commands: str) -> str:
        arguments = [part for command in commands for part in ("-c", command)]
        done = subprocess.run(
            [program, *arguments, image],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def disk_bytes(size: int, seed: int = 0) -> bytes:
    """A disk with data, zeroes and holes."""
    source = random.Random(seed)
    data = bytearray(size)
    for _ in range(12):
        start = source.randrange(size - 70_000)
        data[start : start + 70_000] = source.randbytes(70_000)
    return bytes(data)


@pytest.mark.parametrize("cluster", [None, 512, 2 * MIB])
def test_copy_into_qcow2_is_the_same_disk_for_qemu(
    tmp_path: Path, qemu_img: Tool, cluster: int | None
) -> None:
    raw, qcow2 = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    raw.write_bytes(disk_bytes(8 * MIB))
    steps: list[tuple[int, int]] = []
    if cluster is None:
        block.convert(raw, qcow2, progress=lambda done, total: steps.append((done, total)))
        assert steps[-1] == (8 * MIB, 8 * MIB)
    else:
        # What QEMU has made, with clusters of any size, is read here.
        qemu_img("convert", "-O", "qcow2", "-o", f"cluster_size={cluster}", raw, qcow2)
    assert "Images are identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, qcow2)
    assert "No errors were found" in qemu_img("check", qcow2)
    back = tmp_path / "back.img"
    block.convert(qcow2, back)
    assert back.read_bytes() == raw.read_bytes()
    assert back.stat().st_blocks * 512 < 2 * MIB
    assert block.check(qcow2)["errors"] == block.check(qcow2)["leaks"] == 0


@pytest.mark.parametrize("options", ["-c", "-o compat=0.10", "-o lazy_refcounts=on"])
def test_images_of_qemu_are_read(tmp_path: Path, qemu_img: Tool, options: str) -> None:
    raw, qcow2, back = tmp_path / "disk.img", tmp_path / "disk.qcow2", tmp_path / "back.img"
    raw.write_bytes(disk_bytes(4 * MIB).replace(b"\x00\x01", b"\x00\x00"))
    qemu_img("convert", "-O", "qcow2", *options.split(), raw, qcow2)
    block.convert(qcow2, back)
    assert back.read_bytes() == raw.read_bytes()
    report = block.check(qcow2)
    assert (report["errors"], report["leaks"]) == (0, 0)


def test_chain_of_qemu_and_ours_is_one_disk(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> None:
    (tmp_path / "base.img").write_bytes(disk_bytes(4 * MIB))
    block.create(tmp_path / "one.qcow2", backing="base.img", backing_format="raw")
    qemu_io("one.qcow2", "write -P 7 1M 100k")
    qemu_img("create", "-f", "qcow2", "-b", "one.qcow2", "-F", "qcow2", "two.qcow2", "6M")
    qemu_io("two.qcow2", "write -P 9 2M 4k", "write -z 3M 64k", "write -P 3 5M 512")
    block.convert(tmp_path / "two.qcow2", tmp_path / "ours.img")
    qemu_img("convert", "-O", "raw", "two.qcow2", "theirs.img")
    assert (tmp_path / "ours.img").read_bytes() == (tmp_path / "theirs.img").read_bytes()
    info = block.info(tmp_path / "two.qcow2")
    assert (info["size"], info.get("backing"), info.get("backing_format")) == (
        6 * MIB,
        "one.qcow2",
        "qcow2",
    )


VMDK_KINDS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")


@pytest.mark.parametrize("kind", VMDK_KINDS)
def test_vmdk_of_qemu_is_read_and_written(
    tmp_path: Path, qemu_img: Tool, qemu_io: Tool, kind: str
) -> None:
    raw, vmdk, back = tmp_path / "disk.img", tmp_path / "disk.vmdk", tmp_path / "back.img"
    raw.write_bytes(disk_bytes(70 * MIB))
    qemu_img("convert", "-O", "vmdk", "-o", f"subformat={kind}", raw, vmdk)
    assert block.info(vmdk).get("subformat") == kind
    assert block.info(vmdk)["size"] == 70 * MIB
    block.convert(vmdk, back)
    assert back.read_bytes() == raw.read_bytes()
    image = bytearray(raw.read_bytes())
    disk = Disk(vmdk)
    access = disk.access()
    # Into a grain that is there, into holes, over grains' ends, and at the disk's end.
    for offset in (0, 65536 - 512, 40 * MIB + 1024, 69 * MIB, 70 * MIB - 70000):
        data = random.Random(offset).randbytes(70000)
        access.write(offset, data)
        image[offset : offset + len(data)] = data
        assert access.read(offset, len(data)) == data
    disk.flush()
    access.close()
    disk.close()
    raw.write_bytes(image)
    assert "Images are identical" in qemu_img("compare", vmdk, raw)
    if "Sparse" in kind:
        assert "No errors" in qemu_img("check", vmdk)
    # What QEMU writes next is found here.
    qemu_io("disk.vmdk", "write -P 7 30M 200k")
    image[30 * MIB : 30 * MIB + 200 * 1024] = b"\7" * (200 * 1024)
    back.unlink()
    block.convert(vmdk, back)
    assert back.read_bytes() == image


def test_vmdk_of_several_extents_is_one_disk(tmp_path: Path, qemu_img: Tool) -> None:
    size = (4 << 30) + MIB
    for kind in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        path = tmp_path / f"{kind}.vmdk"
        qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", path, size)
        disk = Disk(path)
        access = disk.access()
        assert disk.size == size
        at = 2 << 30
        # VMware's extents end before 2 GiB: one of these writes is over an end.
        for offset in (0, at - 40 * MIB, size - 5000, *range(at - 4 * MIB, at + MIB, MIB // 2)):
            access.write(offset, random.Random(offset).randbytes(5000))
        disk.flush()
        access.close()
        disk.close()
    theirs, ours = tmp_path / "twoGbMaxExtentSparse.vmdk", tmp_path / "twoGbMaxExtentFlat.vmdk"
    assert "Images are identical" in qemu_img("compare", theirs, ours)


def test_stream_optimized_vmdk_of_qemu_and_ours(tmp_path: Path, qemu_img: Tool) -> None:
    raw, theirs, ours = (tmp_path / name for name in ("disk.img", "theirs.vmdk", "ours.vmdk"))
    raw.write_bytes(disk_bytes(70 * MIB))
    options = ("-O", "vmdk", "-o", "subformat=streamOptimized")
    qemu_img("convert", *options, raw, theirs)
    block.convert(raw, ours, subformat="streamOptimized")
    assert "Images are identical" in qemu_img("compare", ours, raw)
    assert "No errors" in qemu_img("check", ours)
    for path in (theirs, ours):
        info = block.info(path)
        assert (info["format"], info.get("subformat")) == ("vmdk", "streamOptimized")
        with pytest.raises(ImageError, match=r"not written to; add readonly or snapshot=on, or"):
            opened(path)
        block.convert(path, tmp_path / "back.qcow2")
        assert "Images are identical" in qemu_img("compare", tmp_path / "back.qcow2", raw)
        (tmp_path / "back.qcow2").unlink()
    # Of an image with holes, and over the ends of tables.
    block.convert(raw, tmp_path / "sparse.vmdk")
    block.convert(tmp_path / "sparse.vmdk", tmp_path / "again.vmdk", subformat="streamOptimized")
    assert "Images are identical" in qemu_img("compare", "again.vmdk", raw)
    # Where there is nothing there is no grain.
    empty = tmp_path / "empty.img"
    block.create(empty, 3 << 30)
    block.convert(empty, tmp_path / "empty.vmdk", subformat="streamOptimized")
    assert (tmp_path / "empty.vmdk").stat().st_size < 128 * 1024
    assert "Images are identical" in qemu_img("compare", "empty.vmdk", "empty.img")
    with pytest.raises(ConfigError, match="a qcow2 image has no streamOptimized"):
        block.convert(raw, tmp_path / "x.qcow2", subformat="streamOptimized")


def test_vmdk_that_is_made_here_is_one_for_qemu(tmp_path: Path, qemu_img: Tool) -> None:
    raw, vmdk = tmp_path / "disk.img", tmp_path / "disk.vmdk"
    raw.write_bytes(disk_bytes(4 * MIB))
    block.convert(raw, vmdk)
    assert "Images are identical" in qemu_img("compare", vmdk, raw)
    assert "No errors" in qemu_img("check", vmdk)
    assert block.create(tmp_path / "large.vmdk", 2 << 40) == 2 << 40
    assert (tmp_path / "large.vmdk").stat().st_blocks * 512 < 2 * MIB
    described = json.loads(qemu_img("info", "--output=json", "large.vmdk"))
    assert described["virtual-size"] == 2 << 40
    with pytest.raises(ImageError, match="give at most 2T, or --format qcow2"):
        block.create(tmp_path / "larger.vmdk", (2 << 40) + 512)
    with pytest.raises(ImageError, match="are not resized; convert it to qcow2"):
        block.resize(vmdk, 8 * MIB)
    # A machine that throws its writes away has it as it is.
    block.create(tmp_path / "over.qcow2", backing="disk.vmdk", backing_format="vmdk")
    assert "Images are identical" in qemu_img("compare", "over.qcow2", "disk.img")


def test_unclosed_image_is_refused_until_it_is_repaired(
    tmp_path: Path, qemu_img: Tool, qemu_io: Tool
) -> None:
    path = tmp_path / "lazy.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    # As QEMU leaves it when it is killed.
    with pytest.raises(AssertionError):
        qemu_io("lazy.qcow2", "write -P 5 1M 3M", "flush", "sigraise 9")
    assert block.info(path).get("dirty")
    with pytest.raises(ImageError, match=r"was not closed, .*tetrarch disk check --repair"):
        opened(path)
    report = block.check(path, repair=True)
    assert report["errors"] == report["leaks"] == 0
    assert report["repaired"] > 40
    assert "No errors were found" in qemu_img("check", path)
    assert not block.info(path).get("dirty")
    opened(path)
    assert "pattern" not in qemu_io("lazy.qcow2", "read -P 5 1M 3M")


def opened(path: Path) -> Disk:
    return block.open_disk(block.DiskSpec(path))


def test_leaks_and_errors_are_found_and_mended_as_qemu_sees_them(
    tmp_path: Path, qemu_img: Tool
) -> None:
    raw, path = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    raw.write_bytes(disk_bytes(4 * MIB))
    block.convert(raw, path)
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    refcounts = int.from_bytes(data[table : table + 8], "big")
    # A cluster that is in use counts as free; one behind all others as used.
    data[refcounts + 2 * 5 : refcounts + 2 * 5 + 2] = b"\0\0"
    last = len(data) // 65536 + 3
    data[refcounts + 2 * last : refcounts + 2 * last + 2] = b"\0\1"
    path.write_bytes(data)
    report = block.check(path)
    assert (report["errors"] > 0, report["leaks"]) == (True, 1)
    assert any("cluster 5 has refcount 0, and 1 references" in line for line in report["problems"])
    qemu_img("check", path, code=2)
    report = block.check(path, repair=True)
    assert (report["errors"], report["leaks"], report["repaired"] > 1) == (0, 0, True)
    assert "No errors were found" in qemu_img("check", path)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)


def test_image_in_use_is_locked_for_qemu_and_by_qemu(tmp_path: Path, qemu_img: Tool) -> None:
    for name in ("disk.img", "disk.qcow2"):
        path = tmp_path / name
        block.create(path, MIB)
        copy = ("convert", "-O", "raw", path, tmp_path / "copy")
        disk = opened(path)
        assert 'Failed to get shared "write" lock' in qemu_img(*copy, code=1)
        del disk
        qemu_img(*copy)
        nbd = shutil.which("qemu-nbd")
        if nbd is None:
            pytest.skip("qemu-nbd is not installed: apt-get install qemu-utils")
        socket, pid = tmp_path / f"{name}.socket", tmp_path / f"{name}.pid"
        subprocess.run(
            [
                nbd,
                "--fork",
                "-k",
                socket,
                "--pid-file",
                pid,
                "-f",
                block.info(path)["format"],
                path,
            ],
            check=True,
            timeout=60,
        )
        server = int(pid.read_text())
        try:
            with pytest.raises(ImageError, match="the image is in use; stop the machine"):
                opened(path)
        finally:
            subprocess.run(["kill", str(server)], check=True)


def test_resize_is_seen_by_qemu_and_shrinking_is_meant(tmp_path: Path, qemu_img: Tool) -> None:
    for name in ("disk.img", "disk.qcow2"):
        path = tmp_path / name
        block.create(path, 4 * MIB)
        assert block.resize(path, 8 * MIB) == 4 * MIB
        shown = json.loads(qemu_img("info", "--output=json", path))
        assert shown["virtual-size"] == 8 * MIB
        with pytest.raises(ConfigError, match="would be lost; add --shrink"):
            block.resize(path, MIB)
        block.resize(path, MIB, shrink=True)
        assert block.info(path)["size"] == MIB
    assert "No errors were found" in qemu_img("check", tmp_path / "disk.qcow2")


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    def refused(message: str, make: Callable[[], object]) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(TetrarchError, match=message):
            make()
        assert sorted(tmp_path.iterdir()) == before

    new, there = tmp_path / "new.qcow2", tmp_path / "there.img"
    there.write_bytes(b"kept")
    refused("has no size; give one", lambda: block.create(new))
    refused("a disk of 1000 bytes; give a multiple", lambda: block.create(new, 1000))
    refused("is there already; give another path", lambda: block.create(there, MIB))
    refused("no such file", lambda: block.create(new, MIB, backing="missing"))
    refused("clusters of 1000 bytes", lambda: block.create(new, MIB, cluster_size=1000))
    refused(
        "raw image has no backing file",
        lambda: block.create(new, MIB, image_format="raw", backing="there.img"),
    )
    refused(
        "vmdk image has no backing file",
        lambda: block.create(new, MIB, image_format="vmdk", backing="there.img"),
    )
    refused("is there already", lambda: block.convert(there, there))
    assert there.read_bytes() == b"kept"


def test_copy_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    source.write_bytes(b"\1" * (20 * MIB))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block.convert(source, target, progress=interrupt)
    assert not target.exists()
