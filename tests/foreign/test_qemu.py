"""A command line of QEMU as a configuration: what is carried over, and what is named."""

from pathlib import Path
from typing import Any

import pytest

from tetrarch.errors import ConfigError
from tetrarch.foreign import import_qemu, words_of_script
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.cpus import CpusSpec

CWD = Path("/cwd")
ICELAKE = CpuSpec.parse("Icelake-Server,-avx512_vpopcntdq")


def machine(*words: str) -> tuple[MachineConfig, list[str]]:
    carried = import_qemu(["qemu-system-x86_64", "-kernel", "k", *words])
    return carried.finish(CWD), list(map(str, carried.lost))


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        ([], "memory", 128 << 20),
        ([], "on_reset", "restart"),
        (["-m", "2G,slots=2"], "memory", 2 << 30),
        (["-m", "size=96"], "memory", 96 << 20),
        (["-smp", "4"], "cpus", CpusSpec.parse(4)),
        (["-smp", "sockets=2,cores=3,threads=2"], "cpus", CpusSpec(12, 2, 3, 2)),
        (["-smp", "8,sockets=2,dies=1,cores=2,threads=2"], "cpus", CpusSpec(8, 2, 2, 2)),
        (["-smp", "2,maxcpus=2"], "cpus", CpusSpec.parse(2)),
        (["-smp", "2,maxcpus=4,sockets=4"], "cpus", CpusSpec(2, 4, 1, 1)),
        (["-cpu", "max"], "cpu", CpuSpec()),
        (["-cpu", "host,migratable=on,+x2apic"], "cpu", CpuSpec()),
        (["-cpu", "Haswell"], "cpu", CpuSpec("Haswell")),
        (["-cpu", "Skylake-Server-noTSX-IBRS,-pcid"], "cpu", CpuSpec.parse("Skylake-Server,-pcid")),
        (["-cpu", "EPYC-v4,ibrs=on,smap=off"], "cpu", CpuSpec.parse("EPYC,+ibrs,-smap")),
        (["-cpu", "Icelake-Server,-vmx,avx512-vpopcntdq=off"], "cpu", ICELAKE),
        (["-cpu", "Penryn,-pcid"], "cpu", CpuSpec.parse("host,-pcid")),
        (["-enable-kvm"], "engine", "kvm"),
        (["-vga", "std"], "screen", "vga"),
        (["-vga", "vmware"], "screen", "svga"),
        (["-vnc", "127.0.0.1:2"], "display", "vnc=127.0.0.1:5902"),
        (["-vnc", ":0"], "display", "vnc=127.0.0.1:5900"),
        (["-display", "vnc=[::1]:1"], "display", "vnc=[::1]:5901"),
        (["-vnc", "unix:v.sock"], "display", "vnc=/cwd/v.sock"),
        (["-accel", "tcg"], "engine", "bt"),
        (["-accel", "kvm", "-accel", "tcg"], "engine", "auto"),
        (["-machine", "q35,accel=kvm:tcg"], "engine", "auto"),
        (["-M", "microvm"], "virtio", "mmio"),
        (["--name", "web,process=x"], "name", "web"),
        (["-no-reboot"], "on_reset", "end"),
        (["-action", "reboot=shutdown"], "on_reset", "end"),
        (["-append", "console=ttyS0 quiet"], "append", "console=ttyS0 quiet"),
        (["-initrd", "i"], "initrd", CWD / "i"),
        (["-device", "isa-debug-exit,iobase=0xf4,iosize=4"], "debug_exit", True),
        (["-serial", "mon:stdio"], "console", "stdio"),
        (["-serial", "file:log"], "console", "file=/cwd/log"),
        (["-serial", "unix:/s,server=on,wait=off"], "console", "socket=/s"),
        (["-serial", "chardev:c", "-chardev", "file,id=c,path=/l"], "console", "file=/l"),
        (["-drive", "file=a,,b.img,if=virtio"], "disk", "/cwd/a,,b.img"),
        (["-drive", "file=/a,format=raw,readonly=on"], "disk", "/a,format=raw,bus=ide,readonly=on"),
        (["-hda", "/a", "-machine", "q35"], "disk", "/a,bus=ahci"),
        (["/a", "-snapshot"], "disk", "/a,bus=ide,snapshot=on"),
        (
            ["-device", "nvme,drive=d", "-drive", "id=d,if=none,file=/a,iops=9,cache=none"],
            "disk",
            "/a,bus=nvme,iops=9,cache=none",
        ),
        (
            [
                *("-blockdev", '{"driver": "qcow2", "node-name": "q", "file": "f"}'),
                *("-blockdev", "driver=file,node-name=f,filename=/a,cache.direct=on"),
                *("-device", '{"driver": "virtio-blk-pci", "drive": "q"}'),
            ],
            "disk",
            "/a,format=qcow2,cache=none",
        ),
        (
            ["-chardev", "socket,id=c,path=/s", "-device", "vhost-user-blk-pci,chardev=c"],
            "disk",
            "vhost-user=/s",
        ),
        (["-cdrom", "/c"], "cdrom", "/c,bus=ide"),
        (["-fda", "/f"], "floppy", "/f"),
        (["-drive", "file=/f,if=floppy,format=raw,readonly=on"], "floppy", "/f,readonly=on"),
        (
            ["-drive", "file=/f,if=none,id=f,format=raw", "-device", "floppy,drive=f"],
            "floppy",
            "/f",
        ),
        (["-qmp", "unix:/q,server,wait=off"], "control", Path("/q")),
        (["-s"], "gdb", "127.0.0.1:1234"),
        (["-gdb", "tcp::9000"], "gdb", "127.0.0.1:9000"),
        (["-gdb", "unix:/g,server=on"], "gdb", "/g"),
        (["-drive", "file=/c,media=cdrom,if=ide", "-M", "q35"], "cdrom", "/c"),
        (
            [
                *("-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=:80-:80"),
                *("-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01"),
            ],
            "net",
            "user,forward=127.0.0.1:2222:22,forward=0.0.0.0:80:80,mac=52:54:00:00:00:01",
        ),
        (["-nic", "tap,ifname=tap0,script=no,downscript=no"], "net", "tap=tap0"),
        (["-nic", "user,model=vmxnet3"], "net", "user,model=vmxnet3"),
        (["-nic", "tap,ifname=t0,queues=2,model=e1000"], "net", "tap=t0,model=e1000"),
        (
            ["-netdev", "user,id=n", "-device", "e1000-82545em,netdev=n"],
            "net",
            "user,model=e1000",
        ),
        (
            ["-netdev", "user,id=n", "-device", "vmxnet3,netdev=n,mac=52:54:00:00:00:01"],
            "net",
            "user,model=vmxnet3,mac=52:54:00:00:00:01",
        ),
        (["-net", "nic,macaddr=52:54:00:00:00:01", "-net", "user"], "net", "user,mac=52:54:00:00:"),
        (
            ["-nic", "stream,server=off,addr.type=unix,addr.path=/s"],
            "net",
            "socket=/s",
        ),
        (["-virtfs", "local,path=/d,mount_tag=t,security_model=none"], "share", "/d:t"),
        (["-device", "virtio-tablet-pci"], "input", "tablet"),
        (
            [
                *("-chardev", "socket,id=c,path=/s,server=on", "-device", "virtio-serial"),
                *("-device", "virtserialport,chardev=c,name=org.a"),
            ],
            "virtio_console",
            "socket=/s,name=org.a",
        ),
    ],
)
def test_what_is_carried_over(words: list[str], option: str, value: Any) -> None:
    config, _ = machine(*words)
    found = getattr(config, option)
    found = found[0] if isinstance(found, tuple) else found
    if isinstance(value, str):
        assert str(found).startswith(value)
    else:
        assert found == value


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        (["-nographic", "-nodefaults", "-display", "none", "-device", "virtio-rng-pci"], []),
        (["-vga", "none", "-vnc", "none"], []),
        (["-vga", "qxl"], ["-vga qxl: there is nothing like it"]),
        (["-display", "gtk"], ["-display gtk: there is nothing like it"]),
        (["-vnc", "localhost:1,share=ignore"], ["-vnc localhost:1,share=ignore: share=ignore: it"]),
        (["-vnc", ":1"], ["-vnc :1: other hosts come there with a password-file alone"]),
        (["-vnc", ":x"], ["-vnc :x: it is no place for viewers"]),
        (["-vnc", "localhost:60000"], ["-vnc localhost:60000: 65900 is no TCP port"]),
        (
            ["-foo", "bar", "-S"],
            ["-foo bar: there is nothing like it", "-S: add gdb_wait, which needs gdb"],
        ),
        (["-qmp", "tcp:h:1,server"], ["-qmp tcp:h:1,server: the control socket is a Unix socket"]),
        (["-boot", "d"], ["-boot d: firmware goes its own way"]),
        (
            ["-drive", "if=pflash,format=qcow2,file=x"],
            ["-drive if=pflash,format=qcow2,file=x: firmware and its variables are raw files"],
        ),
        (["-M", "microvm", "-bios", "x"], ["-bios x: it finds no virtio by MMIO"]),
        (["-pflash", "a", "-pflash", "b", "-pflash", "c"], ["-pflash c: there is one image of"]),
        (
            ["-drive", "file=nbd://h/x,if=virtio"],
            ["-drive file=nbd://h/x,if=virtio: an image is a"],
        ),
        (["-drive", "file=x,if=virtio,format=qed"], ["-drive file=x,if=virtio,format=qed: format"]),
        (["-drive", "file=x,if=none,id=d"], ["-drive file=x,if=none,id=d: no device has it"]),
        (["-device", "virtio-blk-pci,drive=d"], ["-device virtio-blk-pci,drive=d: its drive is"]),
        (["-device", "e1000,netdev=n"], ["-device e1000,netdev=n: its netdev is missing"]),
        (["-nic", "user,model=e1000e"], ["-nic user,model=e1000e: e1000e: it is a virtio card"]),
        (["-nic", "bridge,br=br0"], ["-nic bridge,br=br0: its tap has no name"]),
        (["-nic", "user,restrict=on"], ["-nic user,restrict=on: restrict=on"]),
        (["-nic", "user,hostfwd=udp::1-:2"], ["-nic user,hostfwd=udp::1-:2: hostfwd=udp::1-:2: o"]),
        (["-m", "1G,slots=2"], ["-m: slots=2: memory is not plugged in"]),
        (["-m", "lots"], ["-m lots: 'lots' is no size"]),
        (["-kernel", "$KERNEL"], ["-kernel $KERNEL: a variable of the shell is not known"]),
        (["-serial", "stdio", "-serial", "pty"], ["-serial pty: there is one serial line"]),
        (["-device", "usb-tablet"] * 3, ["-device usb-tablet (3 times): there is no such device"]),
        (["-m"], ["-m: '' is no size"]),
    ],
)
def test_what_is_lost_is_named(words: list[str], lost: list[str]) -> None:
    _, named = machine(*words)
    assert len(named) == len(lost)
    assert all(map(str.startswith, named, lost)), named


@pytest.mark.parametrize(
    ("words", "firmware"),
    [
        (["-bios", "bios-256k.bin"], "seabios"),
        (["-bios", "/usr/share/ovmf/OVMF.fd"], "/usr/share/ovmf/OVMF.fd"),
        (["-pflash", "code"], f"{CWD}/code"),
        (
            [
                *("-drive", "if=pflash,unit=1,format=raw,file=a,,b"),
                *("-drive", "if=pflash,unit=0,format=raw,readonly=on,file=code"),
            ],
            f"{CWD}/code,variables={CWD}/a,,b",
        ),
    ],
)
def test_firmware_boots_the_disk_as_there(words: list[str], firmware: str) -> None:
    carried = import_qemu(["kvm", "-hda", "x", *words])
    config = carried.finish(CWD)
    assert str(config.firmware) == firmware
    assert config.append_extra is None or "root=" not in config.append_extra
    assert not carried.lost


def test_disk_without_a_kernel_is_booted_by_the_default_guests() -> None:
    carried = import_qemu(["kvm", "-hda", "x", "-append", "quiet"])
    config = carried.finish(CWD)
    assert (config.kernel, config.append, config.append_extra) == (None, None, "root=auto")
    assert [lost.what for lost in carried.lost] == ["firmware", "-append"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qemu-system-x86_64", "-m", "1G"], "nothing is left to run"),
        (["ls", "-l"], "no word is a program of QEMU's"),
        ([], "no word is a program of QEMU's"),
        (["/usr/bin/qemu-system-aarch64", "-kernel", "k"], "qemu-system-aarch64 runs guests of an"),
    ],
)
def test_what_cannot_run_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_qemu(words).finish(CWD)


@pytest.mark.parametrize(
    "script",
    [
        "qemu-system-x86_64 -m 1G -kernel 'a b'",
        "#!/bin/sh\n# qemu-system-x86_64 -m 2G\ncd /tmp; exec sudo /usr/bin/qemu-system-x86_64 \\\n"
        "  -m 1G \\\n  -kernel 'a b' >log 2>&1 &\necho -m 3G\n",
        "qemu-system-x86_64\n  -m 1G\n  -kernel 'a b'\necho done\n",
        "-m 1G\n-kernel 'a b' # -m 2G\n",
    ],
)
def test_command_line_in_a_file(script: str) -> None:
    words = words_of_script(script)

    config = import_qemu(words).finish(CWD)
    assert (config.memory, config.kernel) == (1 << 30, CWD / "a b")


def test_file_with_quotes_that_do_not_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no command line: No closing quotation"):
        words_of_script("qemu-system-x86_64 -append 'x")
