"""Container images on a disk: the layout, the layers, and the system that is made of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pexpect
import pytest
from tests.terminals import kill

from tetrarch.errors import ImageError
from tetrarch.images import Cache, CachedGuest
from tetrarch.images.container import ContainerRecipe, import_container
from tetrarch.images.oci import open_layer, read_image
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DiskStore
from tetrarch.images.tool import find_tool
from tetrarch.images.tree import Tree

LIMIT_S = 120
MIB = 1 << 20
TIME = 1_700_000_000


Entry = tuple[str, str | bytes | None]


def layer(*entries: Entry) -> bytes:
    """A tar of files; None is a directory, text that begins with -> a link, with => a hard link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.mode, info.mtime = 0o755, TIME
            body = b""
            if data is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(data, str):
                info.type = tarfile.SYMTYPE if data.startswith("->") else tarfile.LNKTYPE
                info.linkname = data[2:]
            else:
                info.size, body = len(data), data
            tar.addfile(info, io.BytesIO(body))
    return file.getvalue()


class Layout:
    """A directory as skopeo writes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes | dict[str, Any], **more: Any) -> dict[str, Any]:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        digest = hashlib.sha256(body).hexdigest()
        (self.directory / "blobs/sha256" / digest).write_bytes(body)
        return {"digest": f"sha256:{digest}", "size": len(body), **more}

    def image(self, layers: Sequence[bytes], **config: Any) -> dict[str, Any]:
        manifest = {
            "config": self.blob({"config": config, "created": "2023-11-14T22:13:20.123456789Z"}),
            "layers": [self.blob(data) for data in layers],
        }
        return self.blob(manifest, mediaType="application/vnd.oci.image.manifest.v1+json")

    def index(self, *entries: dict[str, Any]) -> None:
        (self.directory / "index.json").write_text(json.dumps({"manifests": entries}))


def device_layer(major: int) -> bytes:
    entry = tarfile.TarInfo("sda")
    entry.type, entry.devmajor = tarfile.BLKTYPE, major
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(entry)
    return data.getvalue()


def pax_layer(**headers: str) -> bytes:
    """A file with these extended headers (pax(1))."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("file")
        entry.pax_headers = headers
        tar.addfile(entry)
    return data.getvalue()


def header_layer(kind: bytes, size: int, count: int = 1) -> bytes:
    """Headers that only say something of what follows."""
    header = tarfile.TarInfo("header")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT) * count


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def tree(tmp_path: Path, *layers: bytes) -> Tree:
    scratch = tmp_path / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    found = Tree(scratch)
    for data in layers:
        found.add_layer(io.BytesIO(data))
    return found


def test_layers_come_over_each_other_with_their_whiteouts(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        layer(("a/one", b"1"), ("a/two", b"2"), ("b/old", b"3"), ("b/sub/old", b"4"), ("c", b"5")),
        gzip.compress(
            layer(
                ("a/.wh.one", b""),
                ("a/two", b"new"),
                ("b/new", b"6"),
                ("b/.wh..wh..opq", b""),
                (".wh.c", b""),
                ("d", "=>a/two"),
            )
        ),
    )
    assert sorted(found.nodes) == ["a", "a/two", "b", "b/new", "d"]
    assert (found.read("a/two"), found.read("d")) == (b"new", b"new")
    # What a layer brings itself its own whiteouts do not hide.
    found = tree(tmp_path, layer(("a/old", b"1")), layer(("a/new", b"2"), (".wh.a", b"")))
    assert sorted(found.nodes) == ["a", "a/new"]


def test_whiteout_of_what_was_never_there_hides_nothing_later(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        layer(("a/.wh.b", b""), (".wh.a", b""), ("c/.wh..wh..opq", b"")),
        layer(("a/b/x", b"1"), ("c/y", b"2"), (".wh.a", b"")),
        layer((".wh..wh..opq", b""), ("new", b"3")),
    )
    assert sorted(found.nodes) == ["new"]


# A look at all that there is for each of them would take minutes.
@pytest.mark.timeout(120)
def test_many_whiteouts_cost_no_more_than_what_they_take_out(tmp_path: Path) -> None:
    many = 10_000
    files: list[Entry] = [("x", b""), *((f"d/{number}", "=>x") for number in range(2 * many))]
    nothing = [(f"e/.wh.{number}", b"") for number in range(many)]
    opaque = [("d/.wh..wh..opq", b"")] * many
    replaced = [("f/x", b""), ("f", b"")] * (many // 2)
    found = tree(tmp_path, layer(*files), layer(*nothing, *replaced, *opaque))
    assert sorted(found.nodes) == ["d", "f", "x"]


def test_links_are_followed_in_the_tree_alone(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        layer(("usr/lib", None), ("lib", "->usr/lib"), ("up", "->../../../usr"), ("abs", "->/usr")),
        layer(("lib/x", b"1"), ("up/y", b"2"), ("abs/z", b"3")),
    )
    assert {"usr/lib/x", "usr/y", "usr/z"} <= set(found.nodes)
    # A link in the place of a directory is no directory any more, and the other way round.
    found = tree(tmp_path, layer(("a/x", b"1")), layer(("a", "->b")), layer(("b/y", b"2")))
    assert (found.nodes["a"].target, found.read("a/y"), "a/x" in found.nodes) == ("b", b"2", False)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (layer(("../x", b"")), "has a file named"),
        (layer(("a/../../x", b"")), "has a file named"),
        (layer(("x", "=>nothing")), "is a link to nothing"),
        (layer(("a", "->b"), ("b", "->a"), ("a/x", b"")), "links that lead in a circle"),
        (layer(("x", b"1" * 4096))[:2048], "cannot be read"),
        (layer(("x" * 256, b"")), "xxx... has too long a name"),
        (layer(("x/" * 2049, None)), "has too long a name"),
        (layer(("x", "->" + "y" * 4096)), "x has too long a link"),
        (device_layer(major=1 << 12), "sda has no device number"),
        (b"no archive at all" * 100, "cannot be read"),
        (pax_layer(mtime="inf"), "cannot be read"),
        (header_layer(tarfile.XHDTYPE, 0, count=3000), "cannot be read"),
        (header_layer(tarfile.XHDTYPE, 1 << 40), "a header has 1099511627776 bytes"),
        (header_layer(tarfile.GNUTYPE_LONGNAME, 1 << 40), "a header has 1099511627776 bytes"),
        (layer(("x", b""))[:512] + header_layer(tarfile.GNUTYPE_LONGLINK, 1 << 40), "a header has"),
    ],
)
def test_layer_that_is_hostile_or_damaged_is_refused(
    tmp_path: Path, data: bytes, cause: str
) -> None:
    with pytest.raises(ImageError, match=cause):
        tree(tmp_path, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch"]


def test_layer_larger_than_the_disk_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    bomb = gzip.compress(layer(("zeros", bytes(64 * MIB))))
    with pytest.raises(ImageError, match="larger than the disk"):
        Tree(tmp_path / "scratch", 32 * MIB).add_layer(io.BytesIO(bomb))


def test_image_is_that_of_our_machine(layout: Layout) -> None:
    def named(name: str, **platform: str) -> dict[str, Any]:
        return layout.image([], Entrypoint=["/bin/x"], Cmd=["a"], Env=[f"N={name}"]) | {
            "platform": platform,
            "annotations": {"org.opencontainers.image.ref.name": name},
        }

    other = named("arm", os="linux", architecture="arm64")
    ours = named("ours", os="linux", architecture="amd64")
    layout.index(other, ours)
    found = read_image(layout.directory)
    assert (found.arguments, found.environment, found.time) == (["/bin/x", "a"], ["N=ours"], TIME)
    inner = layout.blob(
        {"manifests": [other, ours]}, mediaType="application/vnd.oci.image.index.v1+json"
    )
    layout.index(inner)
    assert read_image(layout.directory).environment == ["N=ours"]
    layout.index(ours, named("second"))
    with pytest.raises(ImageError, match="has several images: ours, second; write oci:DIR:TAG"):
        read_image(layout.directory)
    assert read_image(layout.directory, "second").environment == ["N=second"]
    with pytest.raises(ImageError, match=r"has no image 'third' for .*; it has ours, second"):
        read_image(layout.directory, "third")
    layout.index(other)
    with pytest.raises(ImageError, match="no image for Linux on amd64"):
        read_image(layout.directory)


def test_blob_is_checked_before_it_is_read(layout: Layout) -> None:
    layout.index(layout.image([layer(("x", b"1"))]))
    (path,) = read_image(layout.directory).layers
    path.write_bytes(layer(("x", b"2")))
    with pytest.raises(ImageError, match="has another digest"):
        read_image(layout.directory)
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        read_image(layout.directory)
    os.mkfifo(path)
    with pytest.raises(ImageError, match="No such file"):
        read_image(layout.directory)
    (layout.directory / "index.json").unlink()
    os.mkfifo(layout.directory / "index.json")
    with pytest.raises(ImageError, match=r"index\.json is no JSON"):
        read_image(layout.directory)
    (layout.directory / "index.json").unlink()
    layout.index({"digest": "sha256:../../../../etc/passwd"})
    with pytest.raises(ImageError, match="is no digest"):
        read_image(layout.directory)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"manifests": 1}', '{"manifests": [1]}', "[" * 100_000]
)
def test_layout_that_is_none_is_told(layout: Layout, text: str) -> None:
    (layout.directory / "index.json").write_text(text)
    with pytest.raises(ImageError, match=r"OCI image layout|no image for Linux"):
        read_image(layout.directory)


@pytest.mark.parametrize("config", [{"Cmd": "sh"}, {"Env": [1]}, {"Entrypoint": ["a\0b"]}])
def test_command_that_is_none_is_told(layout: Layout, config: dict[str, Any]) -> None:
    layout.index(layout.image([layer(("x", b"1"))], **config))
    with pytest.raises(ImageError, match="its configuration has"):
        read_image(layout.directory)


@pytest.mark.parametrize("manifest", [{}, {"config": 1, "layers": []}, {"config": {}}])
def test_manifest_that_is_none_is_told(layout: Layout, manifest: dict[str, Any]) -> None:
    layout.index(layout.blob(manifest))
    with pytest.raises(ImageError, match="is no OCI image layout"):
        read_image(layout.directory)


def test_layer_of_zstd_is_unpacked(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd")
    (tmp_path / "tar").write_bytes(layer(("x", b"1")))
    subprocess.run(["zstd", "-q", tmp_path / "tar"], check=True)
    (tmp_path / "scratch").mkdir()
    found = Tree(tmp_path / "scratch")
    with open_layer(tmp_path / "tar.zst") as archive:
        found.add_layer(archive)
    assert found.read("x") == b"1"


BUSYBOX = Path("/bin/busybox")


def make(
    layout: Layout, data: Path, debian_guest: CachedGuest, *more: bytes, **config: Any
) -> None:
    """The disk box of an image with busybox, and more layers, under XDG_DATA_HOME=data."""
    for program in ("mke2fs", "debugfs", "sfdisk"):
        try:
            find_tool(program, program)
        except ImageError:
            pytest.skip(f"needs {program} (Debian: e2fsprogs, fdisk)")
    programs = [
        (f"bin/{name}", "->busybox") for name in ("sh", "cat", "echo", "ps", "stty", "sync")
    ]
    base = layer(("bin/busybox", BUSYBOX.read_bytes()), *programs)
    layout.index(layout.image([base, layer(("etc/motto", b"on a disk\n")), *more], **config))
    recipe = ContainerRecipe(layout.directory, "", "box", 128 * MIB)
    import_container(recipe, DiskStore(data / "tetrarch/disks"), Cache(), Reporter())


def run(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tetrarch", "run", "box", "--engine", "bt", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "XDG_DATA_HOME": str(data)},
    )


def test_image_runs_its_command_and_the_machine_ends_with_it(
    layout: Layout, tmp_path: Path, debian_guest: CachedGuest
) -> None:
    script = (
        'echo "$X in $PWD: $(cat /etc/motto)"; echo kept >/kept; stty -F /dev/tty size; ps | cat'
    )
    make(
        layout,
        tmp_path,
        debian_guest,
        Cmd=["/bin/sh", "-c", script],
        Env=["X=1 2", "PATH=/bin"],
        WorkingDir="/etc",
    )
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 2 in /etc: on a disk" in done.stdout
    assert "can't open '/dev/tty'" not in done.stdout
    # Of the command itself there is one: it was not begun again.
    assert done.stdout.count("1 2 in /etc") == 1
    # With a command of the host's the image's does not run, and both have its environment.
    done = run(tmp_path, "--", "sh", "-c", 'cat /kept; echo "$X $PPID"; exit 7')
    assert (done.stdout.splitlines()[0], done.returncode, done.stderr) == ("kept", 7, "")
    assert done.stdout.splitlines()[1].startswith("1 2 ")


def test_what_a_throw_away_run_writes_is_gone_at_its_end(
    layout: Layout, tmp_path: Path, debian_guest: CachedGuest
) -> None:
    make(layout, tmp_path, debian_guest, Env=["PATH=/bin"])
    write = ("--", "sh", "-c", "echo new >/etc/motto && sync && cat /etc/motto")
    done = run(tmp_path, "--snapshot", *write)
    assert (done.stdout, done.stderr, done.returncode) == ("new\n", "", 0)
    assert run(tmp_path, "--", "cat", "/etc/motto").stdout == "on a disk\n"


def test_first_program_takes_in_orphans_and_ends_what_is_left(
    layout: Layout, tmp_path: Path, debian_guest: CachedGuest
) -> None:
    make(layout, tmp_path, debian_guest, Cmd=["/bin/sh"], Env=["PATH=/bin"])
    # One orphan ends, and has to be waited for; another is there at the end, and has to be ended.
    script = """
        (busybox true &)
        (busybox setsid busybox sleep 1000 </dev/null >/dev/null 2>&1 &)
        while busybox grep -q ') Z 1 ' /proc/[0-9]*/stat 2>/dev/null; do :; done
        cat /proc/1/comm"""
    done = run(tmp_path, "--", "sh", "-c", script)
    assert (done.stdout, done.stderr, done.returncode) == ("tetrarch-agent\n", "", 0)


def test_import_says_what_it_cannot_take_in_a_line(tmp_path: Path) -> None:
    for source, said in (
        ("docker:x", "is nothing that can be imported"),
        ("oci:", "is nothing that can be imported"),
        (f"oci:{tmp_path}", "is no OCI image layout"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tetrarch", "image", "import", source, "--name", "x"],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path / "data")},
        )
        assert (done.returncode in (1, 2), done.stderr.count("\n")) == (True, 1), done.stderr
        assert said in done.stderr


def test_image_finds_a_terminal_as_large_as_ours(
    layout: Layout, tmp_path: Path, debian_guest: CachedGuest
) -> None:
    make(layout, tmp_path, debian_guest, Cmd=["/bin/sh", "-c", "stty size"], Env=["PATH=/bin"])
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "run", "box", "--engine", "bt"],
        dimensions=(33, 111),
        timeout=LIMIT_S,
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        encoding="utf-8",
    )
    try:
        child.expect("33 111\r\n")
        child.expect(pexpect.EOF)
    finally:
        kill(child)


def test_image_has_the_network_that_it_is_given(
    layout: Layout, tmp_path: Path, debian_guest: CachedGuest
) -> None:
    if shutil.which("passt") is None:
        pytest.skip("no passt: apt-get install passt")
    # One that says another resolver, by a link that leads nowhere here.
    stale = layer(("etc/resolv.conf", "->/run/nowhere/resolv.conf"))
    make(layout, tmp_path, debian_guest, stale, Env=["PATH=/bin"])
    script = """
        busybox ip -4 route | busybox cut -d" " -f1,4,5
        busybox grep -c nameserver /etc/resolv.conf
        busybox ping -c 1 box | busybox head -1"""
    done = run(tmp_path, "--net", "user", "--", "sh", "-c", script)
    lines = done.stdout.splitlines()
    assert "default dev eth0" in lines[0], (done.stdout, done.stderr)
    assert int(lines[-2]) >= 1, done.stdout
    assert lines[-1].startswith("PING box (127.0.1.1)"), done.stdout


def test_disk_takes_the_newest_whole_kernel_that_is_installed_on_it(
    layout: Layout, tmp_path: Path, debian_guest: CachedGuest
) -> None:
    def take() -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tetrarch", "image", "kernel", "box"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path), "TETRARCH_ENGINE": "bt"},
        )
        return done.returncode, done.stdout, done.stderr.splitlines()[-1]

    # One without an initial RAM disk is not whole yet.
    old, new = "6.1.0-9-amd64", "6.1.0-10-amd64"
    kernel = debian_guest.kernel.read_bytes()
    boot = [(f"boot/vmlinuz-{old}", b"old"), (f"boot/initrd.img-{old}", b"old")]
    initrd = debian_guest.initrd.read_bytes() + bytes(4)
    boot += [(f"boot/vmlinuz-{new}", kernel), (f"boot/initrd.img-{new}", initrd)]
    boot += [("boot/vmlinuz-6.1.0-11-amd64", b"half")]
    tools = [(f"bin/{name}", "->busybox") for name in ("ls", "sed", "sort", "tar")]
    make(layout, tmp_path, debian_guest, layer(*boot, *tools), Env=["PATH=/bin"])
    store = DiskStore(tmp_path / "tetrarch/disks")
    assert take() == (
        0,
        f"box: Linux {new} from its next start on\n",
        "Starting box for its newest kernel",
    )
    found = store.find("box")
    assert found is not None
    assert found.manifest.release == new
    assert found.kernel.read_bytes() == kernel
    assert found.initrd.read_bytes() == initrd
    # It starts with them; what it has then is none.
    assert run(tmp_path, "--", "busybox", "rm", "-r", "/boot").returncode == 0
    code, said, why = take()
    assert (code, said) == (1, "")
    assert why == (
        "tetrarch: no kernel can be taken from box: sh: cd: line 0: can't cd to /boot: "
        "No such file or directory; look into its /boot"
    )
    assert sorted(path.name for path in found.directory.iterdir()) == [
        *("disk.json", "disk.raw", "initrd.img", "vmlinuz")
    ]
