"""Appliances: made here and imported again, as others write them, and as nobody should."""

import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cli.conftest import Cli

from tetrarch import block
from tetrarch.errors import ConfigError
from tetrarch.foreign.ova import Package
from tetrarch.foreign.ovf import import_ovf
from tetrarch.images.store import data_root
from tetrarch.machine.config_file import load_config

MIB = 1 << 20
Files = dict[str, bytes]

VIRTUALBOX = """<?xml version="1.0"?>
<Envelope ovf:version="1.0" xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:vbox="http://www.virtualbox.org/ovf/machine"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References><File ovf:id="file1" ovf:href="web-disk001.vmdk"/></References>
  <DiskSection><Info>Disks</Info>
    <Disk ovf:capacity="4194304" ovf:diskId="vmdisk1" ovf:fileRef="file1"/>
    <Disk ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="vmdisk2"/>
  </DiskSection>
  <VirtualSystem ovf:id="web server (1)"><Info>A machine</Info>
    <EulaSection><Info>x</Info><License>Do no harm.</License></EulaSection>
    <VirtualHardwareSection><Info>Hardware</Info>
      <System><vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType></System>
      <Item><rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits>
        <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>768</rasd:VirtualQuantity>
      </Item>
      <Item><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceType>20</rasd:ResourceType>
        <rasd:ResourceSubType>AHCI</rasd:ResourceSubType></Item>
      <Item><rasd:AddressOnParent>1</rasd:AddressOnParent><rasd:Parent>5</rasd:Parent>
        <rasd:HostResource>/disk/vmdisk2</rasd:HostResource>
        <rasd:ResourceType>17</rasd:ResourceType></Item>
      <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:Parent>5</rasd:Parent>
        <rasd:HostResource>/disk/vmdisk1</rasd:HostResource>
        <rasd:ResourceType>17</rasd:ResourceType></Item>
      <Item><rasd:Connection>NAT</rasd:Connection><rasd:ResourceSubType>E1000</rasd:ResourceSubType>
        <rasd:ElementName>Card</rasd:ElementName><rasd:ResourceType>10</rasd:ResourceType></Item>
      <Item><rasd:ElementName>sound</rasd:ElementName><rasd:ResourceType>35</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
    <vbox:Machine><Hardware><Firmware type="EFI"/></Hardware></vbox:Machine>
  </VirtualSystem>
</Envelope>
"""


def disk_bytes(size: int) -> bytes:
    data = bytearray(size)
    data[MIB : MIB + 100_000] = random.Random(1).randbytes(100_000)
    data[-512:] = b"\7" * 512
    return bytes(data)


def stream(folder: Path, data: bytes) -> bytes:
    raw, packed = folder / "made.img", folder / "made.vmdk"
    raw.write_bytes(data)
    block.convert(raw, packed, subformat="streamOptimized")
    made = packed.read_bytes()
    raw.unlink()
    packed.unlink()
    return made


def archive(
    path: Path, files: Files, change: Callable[[tarfile.TarInfo], None] = lambda member: None
) -> Path:
    with tarfile.open(path, "w") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            change(member)
            made.addfile(member, io.BytesIO(data))
    return path


def manifest(files: Files, kind: str = "SHA256") -> bytes:
    return "".join(
        f"{kind}({name})= {hashlib.new(kind, data).hexdigest()}\n" for name, data in files.items()
    ).encode()


@pytest.fixture
def virtualbox(tmp_path: Path) -> Files:
    disk = stream(tmp_path, disk_bytes(4 * MIB))
    return {"web.ovf": VIRTUALBOX.encode(), "web-disk001.vmdk": disk}


def test_appliance_of_virtualbox_becomes_a_machine(
    cli: Cli, tmp_path: Path, virtualbox: Files
) -> None:
    disks, output = tmp_path / "disks", tmp_path / "web.toml"
    disks.mkdir()
    for kind in ("SHA1", "SHA256"):
        path = archive(tmp_path / "web.ova", virtualbox | {"web.mf": manifest(virtualbox, kind)})
        done = cli("import", "ova", path, "-o", output, "--disks", disks)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        lost = [line for line in done.stderr.splitlines() if "not carried" in line]
        assert [line.partition(": line ")[2].partition(": ")[2] for line in lost] == [
            "<EulaSection>: read the licence there",
            "sound: there is nothing like it (sound card)",
        ]
        config = load_config(output)
        assert (config.name, config.memory, config.cpus.count) == ("web-server-1", 768 * MIB, 2)
        assert (config.platform, str(config.firmware)) == ("pc", "ovmf")
        one, two = disks / "web-server-1-disk1.qcow2", disks / "web-server-1-disk2.qcow2"
        assert list(map(str, config.disk)) == [f"{one},bus=ahci", f"{two},bus=ahci"]
        assert list(map(str, config.net)) == ["user,model=e1000"]
        block.convert(one, tmp_path / "back.img")
        assert (tmp_path / "back.img").read_bytes() == disk_bytes(4 * MIB)
        assert block.info(two)["size"] == 8 * MIB
        assert sorted(disks.iterdir()) == [one, two]
        again = cli("import", "ova", path, "--disks", disks)
        assert again.returncode == 2
        assert "disk1.qcow2 is there already; remove it" in again.stderr
        for made in (one, two, tmp_path / "back.img"):
            made.unlink()


def test_descriptor_beside_its_disk(cli: Cli, tmp_path: Path, virtualbox: Files) -> None:
    for name, data in virtualbox.items():
        (tmp_path / name).write_bytes(data)
    done = cli("import", "ova", tmp_path / "web.ovf", "--disks", tmp_path, "--format", "raw")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "web-server-1-disk1.img").read_bytes() == disk_bytes(4 * MIB)
    assert "web-server-1-disk2.img" in done.stdout
    (tmp_path / "web-disk001.vmdk").unlink()
    (tmp_path / "web-disk001.vmdk").symlink_to("/etc/passwd")
    done = cli("import", "ova", tmp_path / "web.ovf")
    assert (done.returncode, "is a link; put the file there" in done.stderr) == (2, True)


def test_machine_is_the_same_when_it_comes_back(cli: Cli, tmp_path: Path) -> None:
    data = disk_bytes(70 * MIB)
    (tmp_path / "root.img").write_bytes(data)
    (tmp_path / "disc.iso").write_bytes(b"\1" * 70_000)
    block.create(tmp_path / "data.qcow2", 3 << 30)
    config = tmp_path / "vm.toml"
    config.write_text(
        'name = "web"\nmemory = "768M"\ncpus = "4,sockets=2,cores=2"\nplatform = "vmware"\n'
        'firmware = "seabios"\ndisk = ["root.img", "data.qcow2,bus=nvme"]\ncdrom = "disc.iso"\n'
        'net = ["user,mac=52:54:00:00:00:01", "user,model=vmxnet3", "user,model=e1000"]\n'
        'guestinfo = ["role=a & <b>"]\nhpet = true\n'
    )
    done = cli("export", "ova", config, "-o", tmp_path / "web.ova")
    assert done.returncode == 0, done.stderr
    lost = [line for line in done.stderr.splitlines() if "not carried" in line]
    assert lost == ["tetrarch: not carried over: hpet: an appliance has no word for it"]
    with tarfile.open(tmp_path / "web.ova") as made:
        names = ["web.ovf", "web.mf", "web-disk1.vmdk", "web-disk2.vmdk", "web-disc1.iso"]
        assert made.getnames() == names
        made.extract("web-disk1.vmdk", tmp_path, filter="data")
    if (program := shutil.which("qemu-img")) is not None:
        compare = [program, "compare", "web-disk1.vmdk", "root.img"]
        subprocess.run(compare, cwd=tmp_path, check=True, timeout=60)
    folder = tmp_path / "again"
    folder.mkdir()
    done = cli("import", "ova", tmp_path / "web.ova", "-o", folder / "web.toml")
    assert done.returncode == 0, done.stderr
    assert "not carried over" not in done.stderr
    before, after = load_config(config), load_config(folder / "web.toml")
    for option in ("name", "memory", "cpus", "platform", "firmware", "net", "guestinfo"):
        assert getattr(before, option) == getattr(after, option), option
    assert list(map(str, after.disk)) == [
        f"{folder}/web-disk1.qcow2",
        f"{folder}/web-disk2.qcow2,bus=nvme",
    ]
    assert list(map(str, after.cdrom)) == [f"{folder}/web-disc1.iso"]
    block.convert(folder / "web-disk1.qcow2", folder / "back.img")
    assert (folder / "back.img").read_bytes() == data
    assert (folder / "web-disc1.iso").read_bytes() == b"\1" * 70_000


def test_installed_disk_is_exported_by_its_name(cli: Cli, tmp_path: Path) -> None:
    store = data_root() / "disks" / "box"
    here = tmp_path / "data" / store.relative_to(data_root().parent)
    here.mkdir(parents=True)
    (here / "disk.raw").write_bytes(disk_bytes(2 * MIB))
    (here / "vmlinuz").touch()
    (here / "initrd.img").touch()
    words = {"name": "box", "append": "root=/dev/vda", "release": "6.1", "suite": "bookworm"}
    (here / "disk.json").write_text(json.dumps(words))
    environment = {"XDG_DATA_HOME": str(tmp_path / "data")}
    done = cli("export", "ova", "box", "-o", tmp_path / "box.ova", **environment)
    assert done.returncode == 0, done.stderr
    assert "not carried over: kernel: an appliance has no word for it" in done.stderr
    assert "not carried over: image" not in done.stderr
    done = cli("import", "ova", tmp_path / "box.ova", "-o", tmp_path / "box.toml")
    config = load_config(tmp_path / "box.toml")
    assert (config.name, config.append_extra) == ("box", "root=auto")
    assert list(map(str, config.disk)) == [f"{tmp_path}/box-disk1.qcow2"]
    nothing = cli("export", "ova", "none", "-o", tmp_path / "none.ova", **environment)
    assert (nothing.returncode, (tmp_path / "none.ova").exists()) == (2, False)
    assert nothing.stderr.count("\n") == 1


def test_wrong_checksum_is_one_line_and_leaves_nothing(
    cli: Cli, tmp_path: Path, virtualbox: Files
) -> None:
    sums = manifest(virtualbox)
    for name in virtualbox:
        changed = dict(virtualbox)
        changed[name] = changed[name][:-1] + b"\1"
        path = archive(tmp_path / "web.ova", changed | {"web.mf": sums})
        done = cli("import", "ova", path, "--disks", tmp_path)
        assert done.returncode == 2
        said = f"'{name}' is not the file of the manifest: its SHA256 differs; get the file again"
        assert said in done.stderr
        assert [one.name for one in tmp_path.iterdir()] == ["web.ova"]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("../web.vmdk", tarfile.REGTYPE, "is no plain file name"),
        ("/etc/web.vmdk", tarfile.REGTYPE, "is no plain file name"),
        ("a\nb", tarfile.REGTYPE, "is no plain file name"),
        ("web-disk001.vmdk", tarfile.REGTYPE, "is there twice"),
        ("link", tarfile.SYMTYPE, "is no plain file"),
        ("link", tarfile.LNKTYPE, "is no plain file"),
        ("device", tarfile.BLKTYPE, "is no plain file"),
        ("folder", tarfile.DIRTYPE, "is no plain file"),
        ("other.ovf", tarfile.REGTYPE, "the archive has 2 descriptors"),
    ],
)
def test_archive_of_strange_members_is_refused(
    tmp_path: Path, virtualbox: Files, name: str, kind: bytes, said: str
) -> None:
    path = archive(tmp_path / "web.ova", virtualbox)
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(path, "a") as made:
        made.addfile(member)
    with pytest.raises(ConfigError, match=said):
        Package.open(path)


def test_archive_that_is_none_or_is_cut_is_refused(tmp_path: Path, virtualbox: Files) -> None:
    path = archive(tmp_path / "web.ova", virtualbox)
    whole = path.read_bytes()
    for data, said in (
        (whole[:-12000], "ends within 'web-disk001.vmdk'"),
        (b"", "descriptors|no archive"),
        (b"x" * 5000, "this is no archive"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=said):
            Package.open(path)
    for files, said in (
        ({"web.ovf": VIRTUALBOX.encode()}, "'web-disk001.vmdk' is not in the archive"),
        (virtualbox | {"web.mf": b"SHA256(x)= 00\n"}, "'x' is not in the archive"),
    ):
        with (
            Package.open(archive(path, files)) as package,
            pytest.raises(ConfigError, match=said),
        ):
            package.check_names(import_ovf(package.text(), tmp_path).files)
    with pytest.raises(ConfigError, match=r"web\.mf:1: it is no checksum"):
        Package.open(archive(path, virtualbox | {"web.mf": b"hello\n"}))


def test_disk_that_names_other_files_is_refused(cli: Cli, tmp_path: Path) -> None:
    text = b'# Disk DescriptorFile\nversion=1\nRW 8192 FLAT "/etc/passwd" 0\n'
    files = {"web.ovf": VIRTUALBOX.encode(), "web-disk001.vmdk": text}
    done = cli("import", "ova", archive(tmp_path / "web.ova", files), "--disks", tmp_path)
    assert done.returncode == 2
    assert "web-disk001.vmdk is no disk that an appliance can have here; make it" in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["web.ova"]


def test_disk_that_is_larger_than_the_appliance_says_is_refused(cli: Cli, tmp_path: Path) -> None:
    raw, packed = tmp_path / "large.img", tmp_path / "large.vmdk"
    block.create(raw, 2 << 30)
    block.convert(raw, packed, subformat="streamOptimized")
    files = {"web.ovf": VIRTUALBOX.encode(), "web-disk001.vmdk": packed.read_bytes()}
    raw.unlink()
    packed.unlink()
    done = cli("import", "ova", archive(tmp_path / "web.ova", files), "--disks", tmp_path)
    assert done.returncode == 2
    said = "web-disk001.vmdk is a disk of 2147483648 bytes, and the appliance says 4194304; get"
    assert said in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["web.ova"]


def test_what_is_no_machine_is_refused(tmp_path: Path) -> None:
    for text, said in (
        ('<!DOCTYPE x [<!ENTITY a "b">]><Envelope/>', "a document type is refused"),
        ("<Envelope/>", "an appliance of 0 machines"),
        ("<domain/>", "the outermost tag is <domain>, and no <Envelope>"),
        ("<Envelope><VirtualSystem/></Envelope>", "the machine has no hardware"),
        (VIRTUALBOX.replace('disk001.vmdk"', 'disk001.vmdk" ovf:chunkSize="7"'), "several parts"),
        (VIRTUALBOX.replace('1.vmdk"', '1.vmdk" ovf:compression="gzip"'), "is packed by gzip"),
    ):
        with pytest.raises(ConfigError, match=said):
            import_ovf(text, tmp_path)


def test_disk_is_had_once(tmp_path: Path) -> None:
    found = import_ovf(VIRTUALBOX.replace("/disk/vmdisk2", "/disk/vmdisk1"), tmp_path)
    assert len(found.media) == 1
    assert any("has it twice" in str(lost) for lost in found.carried.lost)
    # By another name of the same file.
    other = VIRTUALBOX.replace('ovf:diskId="vmdisk2"', 'ovf:diskId="vmdisk2" ovf:fileRef="file1"')
    found = import_ovf(other, tmp_path)
    assert len(found.media) == 1
    assert any("is another disk's already" in str(lost) for lost in found.carried.lost)


WORDS = st.sampled_from([*VIRTUALBOX.split("<"), "Item>", "9" * 21, "byte * 2^99"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 120), WORDS), max_size=8))
def test_any_descriptor_is_a_machine_or_one_line(changes: list[tuple[int, str]]) -> None:
    parts = VIRTUALBOX.split("<")
    for at, word in changes:
        parts[at % len(parts)] = word
    with suppress(ConfigError):
        found = import_ovf("<".join(parts), Path("/disks"))
        assert all(medium.path.parent == Path("/disks") for medium in found.media)
        found.carried.toml(found.carried.finish(Path("/disks")), "x")
