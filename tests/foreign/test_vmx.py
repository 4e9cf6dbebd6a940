"""A virtual machine of VMware's as one of ours."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrarch.errors import ConfigError
from tetrarch.foreign import import_vmx
from tetrarch.machine.config import MachineConfig

CWD = Path("/cwd")

WORKSTATION = """\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
pciBridge0.present = "TRUE"
pciBridge4.present = "TRUE"
pciBridge4.virtualDev = "pcieRootPort"
pciBridge4.functions = "8"
vmci0.present = "TRUE"
hpet0.present = "TRUE"
nvram = "web server.nvram"
virtualHW.productCompatibility = "hosted"
powerType.powerOff = "soft"
displayName = "web server (old)"
guestOS = "debian11-64"
tools.syncTime = "FALSE"
numvcpus = "4"
cpuid.coresPerSocket = "2"
memsize = "2048"
scsi0.virtualDev = "lsilogic"
scsi0.present = "TRUE"
scsi0:0.fileName = "web|20server.vmdk"
scsi0:0.present = "TRUE"
scsi0:1.fileName = "data.vmdk"
scsi0:1.mode = "independent-nonpersistent"
scsi0:1.present = "TRUE"
ide1:0.deviceType = "cdrom-image"
ide1:0.fileName = "/iso/debian.iso"
ide1:0.present = "TRUE"
sata0.present = "TRUE"
sata0:1.deviceType = "cdrom-raw"
sata0:1.fileName = "auto detect"
sata0:1.present = "TRUE"
usb.present = "TRUE"
ehci.present = "TRUE"
sound.present = "TRUE"
sound.fileName = "-1"
ethernet0.connectionType = "nat"
ethernet0.addressType = "generated"
ethernet0.virtualDev = "e1000"
ethernet0.present = "TRUE"
ethernet0.pciSlotNumber = "33"
ethernet0.generatedAddress = "00:0c:29:aa:bb:cc"
ethernet0.generatedAddressOffset = "0"
floppy0.present = "FALSE"
uuid.bios = "56 4d 11 22 33 44 55 66-77 88 99 aa bb cc dd ee"
uuid.location = "56 4d 11 22 33 44 55 66-77 88 99 aa bb cc dd ee"
guestinfo.Role = "database"
"""


def machine(text: str) -> tuple[MachineConfig, list[str]]:
    carried = import_vmx(text)
    return carried.finish(CWD), list(map(str, carried.lost))


def test_machine_of_workstation() -> None:
    config, lost = machine(WORKSTATION)
    assert (config.name, config.platform, config.memory) == ("web-server-old", "vmware", 2 << 30)
    assert (config.cpus.count, config.cpus.sockets, config.cpus.cores) == (4, 2, 2)
    assert list(map(str, config.disk)) == [
        "/cwd/web server.vmdk,bus=pvscsi",
        "/cwd/data.vmdk,bus=pvscsi,snapshot=on",
    ]
    assert list(map(str, config.cdrom)) == ["/iso/debian.iso,bus=ide"]
    assert list(map(str, config.net)) == ["user,model=e1000,mac=00:0c:29:aa:bb:cc"]
    assert config.firmware is not None
    assert (str(config.firmware), config.hpet, config.floppy) == ("seabios", True, ())
    assert config.append_extra == ""
    assert config.guestinfo == ("Role=database",)
    assert lost == [
        "uuid.bios: a machine draws its own",
        "scsi0.virtualDev=lsilogic: its disks are at a PVSCSI controller",
        "sata0:1.deviceType=cdrom-raw: a drive of the host",
        "usb: there is nothing like it",
        "ehci: there is nothing like it",
        "sound: there is nothing like it",
    ]


def test_scsi_disks_and_discs_are_at_vmwares_own_controller() -> None:
    config, lost = machine(
        'memsize = "64"\nscsi0.present = "TRUE"\nscsi0.virtualDev = "pvscsi"\n'
        'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "a.vmdk"\n'
        'scsi0:5.present = "TRUE"\nscsi0:5.deviceType = "cdrom-image"\n'
        'scsi0:5.fileName = "c.iso"\nscsi1.present = "TRUE"\n'
        'scsi1:0.present = "TRUE"\nscsi1:0.fileName = "b.vmdk"\n'
    )
    assert list(map(str, config.disk)) == ["/cwd/a.vmdk,bus=pvscsi", "/cwd/b.vmdk,bus=pvscsi"]
    assert list(map(str, config.cdrom)) == ["/cwd/c.iso,bus=pvscsi"]
    assert lost == ["scsi1.virtualDev=lsilogic: its disks are at a PVSCSI controller"]


def test_machine_of_esxi_with_uefi_and_nvme() -> None:
    config, lost = machine(
        'displayName = "a"\nfirmware = "efi"\nuefi.secureBoot.enabled = "TRUE"\nmemSize = "512"\n'
        'nvme0.present = "TRUE"\nnvme0:0.present = "TRUE"\nnvme0:0.fileName = "a.vmdk"\n'
        'ethernet0.present = "TRUE"\nethernet0.networkName = "VM Network"\n'
        'ethernet0.virtualDev = "vmxnet3"\nethernet0.addressType = "static"\n'
        'ethernet0.address = "00:50:56:00:00:01"\n'
        'floppy0.fileType = "file"\nfloppy0.fileName = "boot.flp"\n'
        'floppy1.present = "TRUE"\nfloppy1.fileName = "A:"\n'
        'nvme0:0.mode = "undoable"\nide1:0.present = "TRUE"\nide1:0.deviceType = "atapi-cdrom"\n'
    )
    assert str(config.firmware) == "ovmf"
    assert list(map(str, config.disk)) == ["/cwd/a.vmdk,bus=nvme"]
    assert list(map(str, config.net)) == ["user,model=vmxnet3,mac=00:50:56:00:00:01"]
    assert list(map(str, config.floppy)) == ["/cwd/boot.flp"]
    assert lost == [
        "uefi.secureBoot.enabled: there is no secure boot",
        "ide1:0.deviceType=atapi-cdrom: a drive of the host",
        "nvme0:0.mode=undoable: what the guest writes is kept",
        "floppy1.fileType=device: a drive of the host",
        "ethernet0.connectionType=bridged VM Network: the guest is behind the host's address; "
        "give it a tap",
    ]


DISK = 'memsize = "64"\nide0:0.present = "TRUE"\nide0:0.fileName = "d.vmdk"\n'


def test_screen_and_its_viewers_are_carried_over() -> None:
    config, lost = machine(
        f'{DISK}svga.present = "TRUE"\nsvga.vramSize = "8388608"\nsvga.autodetect = "TRUE"\n'
        'RemoteDisplay.maxConnections = "-1"\nRemoteDisplay.vnc.enabled = "TRUE"\n'
        'RemoteDisplay.vnc.ip = "127.0.0.1"\nRemoteDisplay.vnc.port = "5987"\n'
    )
    assert (config.screen, str(config.display), lost) == ("svga", "vnc=127.0.0.1:5987", [])
    # Any host of the network.
    config, lost = machine(f'{DISK}RemoteDisplay.vnc.enabled = "TRUE"\n')
    assert (config.screen, str(config.display)) == (None, "vnc=127.0.0.1:5900")
    assert lost == ["RemoteDisplay.vnc: other hosts come there with a password-file alone"]


def test_screen_behind_a_password_is_not_opened_without() -> None:
    config, lost = machine(
        f'{DISK}RemoteDisplay.vnc.enabled = "TRUE"\nRemoteDisplay.vnc.port = "5901"\n'
        'RemoteDisplay.vnc.password = "secret"\n'
    )
    assert config.display is None
    assert lost == [
        "RemoteDisplay.vnc.password: no display; give --display vnc=5901,password-file=FILE"
    ]


@pytest.mark.parametrize(("cpus", "cores"), [("1" * 5000, "2"), ("4", "1" * 5000)])
def test_numbers_of_any_length_are_no_error_of_ours(cpus: str, cores: str) -> None:
    config, lost = machine(f'{DISK}numvcpus = "{cpus}"\ncpuid.coresPerSocket = "{cores}"\n')
    assert config.cpus.count == (4 if cpus == "4" else 1)
    assert [line.partition(":")[0] for line in lost] == ([] if cpus == "4" else ["numvcpus"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('svga.vramSize = "134217728"', "svga.vramSize=134217728: the screen has 16 MiB of memory"),
        ('svga.maxWidth = "8192"', "svga.maxWidth=8192: it has at most 2560 points in a line"),
        ('svga.maxHeight = "4320"', "svga.maxHeight=4320: it has at most 1600 lines"),
        ('svga.numDisplays = "2"', "svga.numDisplays=2: there is one screen"),
        ('mks.enable3d = "TRUE"', "mks.enable3d: the screen has two dimensions"),
        ('RemoteDisplay.vnc.enabled = "TRUE"\nRemoteDisplay.vnc.port = "x"', "RemoteDisplay.vnc: "),
    ],
)
def test_what_the_screen_has_not_is_named(line: str, said: str) -> None:
    config, lost = machine(f"{DISK}{line}\n")
    assert lost[0].startswith(said)
    assert (config.screen, config.display) == (None, None)


def test_screen_that_is_not_there_is_none() -> None:
    config, lost = machine(
        f'{DISK}svga.present = "FALSE"\nRemoteDisplay.vnc.enabled = "FALSE"\n'
        'RemoteDisplay.vnc.port = "5901"\nRemoteDisplay.vnc.password = "x"\n'
    )
    assert (config.screen, config.display, lost) == (None, None, [])


def test_what_is_not_there_is_not_carried_over() -> None:
    config, lost = machine(
        'memsize = "64"\nscsi0.present = "FALSE"\nscsi0:0.present = "TRUE"\n'
        'scsi0:0.fileName = "x"\n'
        'ide0:0.present = "TRUE"\nide0:0.fileName = "disk.vmdk"\nide0:1.present = "FALSE"\n'
        'ide0:1.fileName = "y"\nethernet0.present = "FALSE"\nethernet0.virtualDev = "e1000"\n'
        'ide1:0.present = "TRUE"\nide1:0.deviceType = "cdrom-image"\nide1:0.fileName = "c.iso"\n'
        'ide1:0.startConnected = "FALSE"\nserial0.present = "FALSE"\nserial0.fileType = "file"\n'
    )
    assert list(map(str, config.disk)) == ["/cwd/disk.vmdk,bus=ide"]
    assert (config.cdrom, config.net, lost) == ((), (), [])


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "this is no virtual machine of VMware's"),
        ("<domain/>", "this is no virtual machine of VMware's"),
        ('a = "b"\n', "this is no virtual machine of VMware's"),
        ('memsize = "64"\n', "nothing is left to run"),
        ('memsize = "lots"\nide0:0.present = "TRUE"\n', "nothing is left to run"),
    ],
)
def test_what_is_no_machine_is_told_in_a_line(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        import_vmx(text).finish(CWD)


def test_values_that_cannot_be_are_named_and_the_rest_is_a_machine() -> None:
    config, lost = machine(
        'memsize = "lots"\nnumvcpus = "900"\ndisplayName = "***"\nwhat is this\n'
        'ide0:0.present = "TRUE"\nide0:0.fileName = "d.raw"\n'
        'ethernet0.present = "TRUE"\nethernet0.connectionType = "nat"\n'
        'ethernet0.address = "nonsense"\n'
    )
    assert [str(disk) for disk in config.disk] == ["/cwd/d.raw,bus=ide"]
    assert any(line.startswith('line 4: what is this: it is not name = "value"') for line in lost)
    assert any(line.startswith("memsize: ") for line in lost)
    assert any(line.startswith("numvcpus: ") for line in lost)
    assert any(line.startswith("ethernet0: ") for line in lost)


WORDS = st.sampled_from([*WORKSTATION.splitlines(), 'memsize = "1|00|ff|2"', "= ", '"', 'x = "|"'])


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS | st.text(max_size=40), max_size=40))
def test_any_text_is_a_machine_or_one_line(lines: list[str]) -> None:
    with suppress(ConfigError):
        carried = import_vmx("\n".join(lines))
        config = carried.finish(CWD)
        carried.toml(config, "x")
