"""A libvirt domain as a configuration."""

from pathlib import Path
from typing import Any

import pytest

from tetrarch.errors import ConfigError
from tetrarch.foreign import import_libvirt
from tetrarch.foreign.xml_tree import parse_xml
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.cpus import CpusSpec

CWD = Path("/cwd")


def machine(devices: str = "", system: str = "", rest: str = "") -> tuple[MachineConfig, list[str]]:
    carried = import_libvirt(
        f"<domain type='kvm'><os><kernel>/k</kernel>{system}</os>"
        f"<devices>{devices}</devices>{rest}</domain>"
    )
    return carried.finish(CWD), list(map(str, carried.lost))


def test_domain_is_carried_over_whole() -> None:
    carried = import_libvirt(
        """<?xml version='1.0' encoding='UTF-8'?>
        <!-- as virsh dumpxml prints it -->
        <domain type='kvm' id='3'>
          <name>web</name>
          <uuid>c7a5fdbd-cdaf-9455-926a-d65c16db1809</uuid>
          <metadata><x:y xmlns:x='urn:x'/></metadata>
          <memory unit='KiB'>2097152</memory>
          <currentMemory unit='KiB'>2097152</currentMemory>
          <vcpu placement='static'>4</vcpu>
          <os>
            <type arch='x86_64' machine='pc-q35-8.2'>hvm</type>
            <kernel>/boot/vmlinuz</kernel>
            <initrd>/boot/initrd</initrd>
            <cmdline>root=/dev/vda1 console=ttyS0</cmdline>
            <boot dev='hd'/>
          </os>
          <on_poweroff>destroy</on_poweroff>
          <on_reboot>destroy</on_reboot>
          <on_crash>destroy</on_crash>
          <devices>
            <emulator>/usr/bin/qemu-system-x86_64</emulator>
            <disk type='file' device='disk'>
              <driver name='qemu' type='qcow2' cache='none' io='native' error_policy='stop'/>
              <source file='/img/web.qcow2' index='1'/>
              <backingStore/>
              <target dev='vda' bus='virtio'/>
              <iotune><total_iops_sec>500</total_iops_sec></iotune>
              <alias name='virtio-disk0'/>
              <address type='pci' slot='0x05'/>
            </disk>
            <disk type='block' device='disk'>
              <source dev='/dev/vg/data'/><target dev='sda' bus='sata'/><readonly/>
            </disk>
            <disk type='file' device='cdrom'>
              <driver name='qemu' type='raw'/>
              <source file='/iso/d.iso'/><target dev='sdb' bus='sata'/><readonly/>
            </disk>
            <disk type='file' device='floppy'>
              <source file='/iso/f.img'/><target dev='fda' bus='fdc'/><readonly/>
            </disk>
            <controller type='pci' model='pcie-root'/>
            <interface type='bridge'>
              <mac address='52:54:00:aa:bb:cc'/><source bridge='br0'/><target dev='vnet3'/>
              <model type='virtio'/><driver queues='2'/><mtu size='1400'/>
            </interface>
            <interface type='user'>
              <backend type='passt'/><model type='virtio'/>
              <portForward proto='tcp' address='127.0.0.1'>
                <range start='2222' to='22'/>
              </portForward>
            </interface>
            <serial type='file'><source path='/log'/><target port='0'/></serial>
            <console type='file'><source path='/log'/><target type='serial' port='0'/></console>
            <channel type='unix'>
              <source mode='bind' path='/run/agent'/>
              <target type='virtio' name='org.qemu.guest_agent.0'/>
            </channel>
            <filesystem type='mount' accessmode='passthrough'>
              <driver type='virtiofs'/><source dir='/srv'/><target dir='data'/>
            </filesystem>
            <input type='tablet' bus='virtio'/>
            <input type='keyboard' bus='ps2'/>
            <memballoon model='none'/>
            <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
          </devices>
          <seclabel type='dynamic'/>
        </domain>"""
    )
    config = carried.finish(CWD)
    assert carried.lost == []
    assert (config.name, config.engine, config.cpus.count, config.memory) == (
        "web",
        "kvm",
        4,
        2 << 30,
    )
    assert config.append == "root=/dev/vda1 console=ttyS0"
    assert list(map(str, config.disk)) == [
        "/img/web.qcow2,format=qcow2,iops=500,cache=none,werror=stop",
        "/dev/vg/data,bus=ahci,readonly=on",
    ]
    assert list(map(str, config.cdrom)) == ["/iso/d.iso"]
    assert list(map(str, config.floppy)) == ["/iso/f.img,readonly=on"]
    assert list(map(str, config.net)) == [
        "tap=vnet3,bridge=br0,queues=2,mac=52:54:00:aa:bb:cc,mtu=1400",
        "user,forward=127.0.0.1:2222:22",
    ]
    assert (str(config.console), config.on_reset) == ("file=/log", "end")
    assert list(map(str, config.virtio_console)) == [
        "socket=/run/agent,name=org.qemu.guest_agent.0"
    ]
    assert list(map(str, config.share)) == ["/srv:data"]
    assert (config.input, config.balloon) == (("tablet",), False)


@pytest.mark.parametrize(
    ("system", "firmware"),
    [
        ("<os firmware='efi'/>", "ovmf"),
        ("<os firmware='bios'/>", "seabios"),
        ("<os><loader type='rom'>/bios.bin</loader></os>", "/bios.bin"),
        (
            "<os firmware='efi'><loader readonly='yes' type='pflash'>/code.fd</loader>"
            "<nvram template='/vars.fd'>/web.fd</nvram></os>",
            "/code.fd,variables=/web.fd",
        ),
    ],
)
def test_firmware_boots_the_disk_as_there(system: str, firmware: str) -> None:
    disk = "<disk type='file'><source file='/x'/><target dev='vda' bus='virtio'/></disk>"
    carried = import_libvirt(f"<domain>{system}<devices>{disk}</devices></domain>")
    config = carried.finish(CWD)
    assert str(config.firmware) == firmware
    assert config.append_extra is None or "root=" not in config.append_extra
    assert not carried.lost


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("<memory unit='GiB'>1</memory>", "memory", 1 << 30),
        ("<memory>65536</memory>", "memory", 64 << 20),
        ("<memory unit='MB'>100</memory>", "memory", 100_003_840),
        ("<vcpu current='1'>8</vcpu>", "cpus", CpusSpec.parse("1,max=8")),
        (
            "<vcpu>8</vcpu><cpu><topology sockets='2' dies='1' cores='2' threads='2'/></cpu>",
            "cpus",
            CpusSpec(8, 2, 2, 2),
        ),
        ("<x/>", "on_reset", "restart"),
        ("<cpu mode='host-model' check='partial'/>", "cpu", CpuSpec()),
        (
            "<vcpu>2</vcpu><cpu mode='custom' match='exact'>"
            "<model fallback='forbid'>EPYC-Rome</model><topology cores='2'/>"
            "<feature policy='disable' name='smap'/>"
            "<feature policy='require' name='ibrs'/></cpu>",
            "cpu",
            CpuSpec.parse("EPYC-Rome,+ibrs,-smap"),
        ),
    ],
)
def test_sizes_and_counts(text: str, option: str, value: Any) -> None:
    config, _ = machine(rest=text)
    assert getattr(config, option) == value


@pytest.mark.parametrize(
    ("where", "text", "lost"),
    [
        (
            "rest",
            "<cpu><model>Haswell-noTSX</model><feature policy='require' name='vmx'/>"
            "<feature name='wings'/><numa/></cpu>",
            [
                "line 1: <cpu> Haswell-noTSX: it is Haswell",
                "line 1: <cpu> vmx: no engine shows it",
                "line 1: <cpu> wings",
                "line 1: <numa>: there",
            ],
        ),
        ("rest", "<cpu><model>Opteron_G5</model></cpu>", ["line 1: <cpu> Opteron_G5: the guest"]),
        ("rest", "<memory unit='acre'>1</memory>", ["line 1: <memory>: it is no size"]),
        ("rest", "<memory>1</memory>", ["<memory>: '4K' is too little"]),
        (
            "system",
            "<loader secure='yes'>/f</loader>",
            ["line 1: <loader secure=yes>: there is no"],
        ),
        (
            "system",
            "<loader>/f</loader><nvram format='qcow2'>/v</nvram>",
            ["line 1: <nvram>: it is no raw file"],
        ),
        ("system", "<nvram>/v</nvram>", ["line 1: <nvram>: it is no raw file"]),
        ("system", "<boot dev='cdrom'/>", ["line 1: <boot dev=cdrom>: firmware goes its own way"]),
        (
            "rest",
            "<memory>2097152</memory><currentMemory>1048576</currentMemory>",
            ["line 1: <currentMemory>: the balloon begins empty"],
        ),
        (
            "devices",
            "<video/><sound model='ich9'/>",
            ["line 1: <video>: it is a VGA", "line 1: <sound model"],
        ),
        (
            "devices",
            "<video><model type='qxl' heads='2'><resolution x='9'/></model></video><video/>",
            [
                "line 1: <video> qxl: it is a VGA",
                "line 1: <video>: heads: there is one",
                "line 1: <resolution x=9>",
                "line 1: <video>: there is one screen",
            ],
        ),
        ("devices", "<graphics type='spice'/>", ["line 1: <graphics> spice: viewers come by VNC"]),
        (
            "devices",
            "<graphics type='vnc' port='1' listen='0.0.0.0' passwd='s' websocket='3'/>",
            [
                "line 1: <graphics>: passwd: give display a password-file",
                "line 1: <graphics>: other hosts come there with a password-file alone",
                "line 1: <graphics>: websocket=3",
            ],
        ),
        (
            "devices",
            "<graphics type='vnc'><listen type='network' network='n'/></graphics>",
            ["line 1: <graphics>: listen network: it is an address or a socket"],
        ),
        (
            "devices",
            "<disk type='network'><source protocol='rbd'/><target dev='vda'/></disk>",
            ["line 1: disk vda: a network disk cannot be"],
        ),
        (
            "devices",
            "<disk device='cdrom' type='file'><target dev='sda'/></disk>",
            ["line 1: disk sda: an empty drive cannot be"],
        ),
        (
            "devices",
            "<disk type='file'><source file='/x'/><target dev='sda' bus='scsi'/></disk>",
            ["line 1: disk sda: bus=scsi: it is a virtio disk"],
        ),
        (
            "devices",
            "<interface type='network'/>",
            ["line 1: interface: a network of type network"],
        ),
        ("devices", "<interface type='bridge'/>", ["line 1: interface: its tap has no name"]),
        (
            "devices",
            "<interface type='user'><model type='e1000e'/></interface>",
            ["line 1: interface: model e1000e: it is a virtio card"],
        ),
        (
            "devices",
            "<interface type='user'><model type='vmxnet3'/><mtu size='9000'/></interface>",
            ["line 1: interface: mtu 9000: the card tells its guest none"],
        ),
        (
            "devices",
            "<interface type='user'><model type='e1000'/><mtu size='1400'/></interface>",
            ["line 1: interface: mtu 1400: the card tells its guest none"],
        ),
        (
            "devices",
            "<serial type='pty'/>\n<serial type='tcp'/>",
            ["line 2: <serial>: there is one"],
        ),
        ("devices", "<serial type='tcp'/>", ["line 1: <serial type=tcp>: it can be a file"]),
        ("devices", "<channel type='spicevmc'/>", ["line 1: <channel type=spicevmc>: there are"]),
        ("devices", "<input type='mouse' bus='usb'/>", ["line 1: <input> at usb: bus virtio"]),
        ("devices", "<vsock model='virtio'/>", ["line 1: <vsock>: the host's end is a Unix"]),
    ],
)
def test_what_is_lost_is_named(where: str, text: str, lost: list[str]) -> None:
    _, named = machine(**{where: text})
    assert len(named) == len(lost), named
    assert all(map(str.startswith, named, lost)), named


BILLION_LAUGHS = (
    '<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<domain><name>&b;</name></domain>"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is no XML"),
        ("<domain>", "this is no XML"),
        ("<domain/>", "nothing is left to run"),
        ("<network/>", "the outermost tag is <network>, and no <domain>"),
        (BILLION_LAUGHS, "a document type is refused"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain/>", "a document type is refused"),
        ("<domain>&x;</domain>", "this is no XML: undefined entity"),
        ("<a>" * 1000, "the tags are more than 64 deep"),
        ("<?xml version='1.0' encoding='klingon'?><domain/>", "this is no XML"),
        ("<?xml version='1.0' encoding='utf-7'?><domain/>", "this is no XML"),
        ("<?xml version='1.0' encoding='idna'?><domain/>", "this is no XML"),
        ("<domain>\ud800</domain>", "this is no XML"),
    ],
)
def test_what_cannot_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_libvirt(text).finish(CWD)


def test_tree_is_taken_apart() -> None:
    root = parse_xml("<a b='1'>\n<c/>t<d>u</d><c>v</c></a>")
    assert (root.attribute("b"), root.attribute("b"), root.text) == ("1", "", "t")
    assert [(one.line, one.text) for one in root.take_all("c")] == [(2, ""), (2, "v")]
    assert (root.take_text("d"), root.take_text("d"), root.children) == ("u", None, [])


@pytest.mark.parametrize(
    ("devices", "screen", "display"),
    [
        ("<video><model type='vmvga' vram='16384' heads='1' primary='yes'/></video>", "svga", ""),
        ("<video><model type='vga'/><address type='pci'/></video>", "vga", ""),
        ("<video><model type='none'/></video>", None, ""),
        (
            "<graphics type='vnc' port='5901' autoport='no' listen='127.0.0.1'>"
            "<listen type='address' address='127.0.0.1'/></graphics>",
            None,
            "vnc=127.0.0.1:5901",
        ),
        ("<graphics type='vnc' port='-1' autoport='yes'/>", None, "vnc=127.0.0.1:0"),
        (
            "<graphics type='vnc' port='5901'><listen type='address' address='::1'/></graphics>",
            None,
            "vnc=[::1]:5901",
        ),
        ("<graphics type='vnc' socket='/run/a,b'/>", None, "vnc=/run/a,,b"),
        ("<graphics type='vnc'><listen type='socket' socket='/v'/></graphics>", None, "vnc=/v"),
    ],
)
def test_screens_and_their_viewers(devices: str, screen: str | None, display: str) -> None:
    config, lost = machine(devices)
    assert lost == []
    assert config.screen == screen
    assert str(config.display or "") == display
