"""What the fuzzer of the Python code calls: loaders, option parsers, archives, the CLI.

Each target takes any bytes. It fails when the code under it lets out another error
than the ones that its caller turns into a line for the user, or breaks a promise.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import configs, devices, recording, steering, vmci, vmware, xen
from tests.fuzz.input import Input, damaged

from tetrarch import Machine
from tetrarch.boot import layout
from tetrarch.boot.loader import load_kernel
from tetrarch.cli.entry import run_cli
from tetrarch.console.spec import ConsoleSpec
from tetrarch.errors import BootError, ConfigError, StateError
from tetrarch.images.initramfs import Initramfs
from tetrarch.images.modules import Module, ModuleFormatError, modinfo, modules_dep
from tetrarch.machine.config import MEMORY_MAX, MEMORY_MIN, VCPUS_MAX, MachineConfig, make_config
from tetrarch.machine.saved import HEADER_BYTES, MAGIC, header
from tetrarch.testing import ScriptedVm, pvh_kernel

MIB = 1 << 20
Target = Callable[[bytes], None]


class CountingVm:
    """RAM that keeps nothing: it checks addresses and counts what is written."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written = 0

    @property
    def ram(self) -> list[tuple[int, int]]:
        low = min(self.size, layout.LOW_RAM_MAX)
        high = self.size - low
        return [(0, low)] + ([(1 << 32, high)] if high else [])

    def read_memory(self, address: int, length: int) -> bytes:
        return bytes(length)

    def write_memory(self, address: int, data: bytes) -> None:
        assert any(base <= address <= base + length - len(data) for base, length in self.ram)
        self.written += len(data)


@contextlib.contextmanager
def file_of(data: bytes, size: int | None = None) -> Iterator[str]:
    """A file with these bytes, made ``size`` bytes long; its path."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        if size is not None:
            os.truncate(descriptor, size)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def bzimage() -> bytes:
    """A bzImage that loads."""
    payload = bytes(2048)
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, len(payload) // 16)
    setup[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    setup[0x211] = 1
    struct.pack_into("<II", setup, 0x22C, 0x7FFF_FFFF, 2 * MIB)
    setup[0x234] = 1
    struct.pack_into("<HI", setup, 0x236, 3, 2047)
    struct.pack_into("<QI", setup, 0x258, MIB, 4 * MIB)
    return bytes(setup) + payload


def vmlinux() -> bytes:
    """An ELF kernel with a PVH entry that loads."""
    code = b"\xfa\xf4" * 32
    notes = struct.pack("<III4sI", 4, 4, 6, b"Lin\0", 0)
    notes += struct.pack("<III4sI", 4, 4, 18, b"Xen\0", MIB + 16)
    ident = b"\x7fELF\x02\x01\x01"
    at = 64 + 2 * 56
    return (
        struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, MIB, 64, 0, 0, 64, 56, 2, 0, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 5, at, MIB, MIB, len(code), 0x3000, 0x1000)
        + struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(notes), len(notes), 4)
        + code
        + notes
    )


def module() -> bytes:
    """An ELF file with a .modinfo section."""
    names = b"\0.shstrtab\0.modinfo\0"
    info = b"depends=a,b\0alias=pci:v*\0softdep=pre: c\0"
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01", 1, 62, 1, 0, 0, 128, 0, 64, 0, 0, 64, 3, 1
    )
    body = (names + info).ljust(64, b"\0")
    sections = bytes(64)
    for name, offset, size in ((1, 64, len(names)), (11, 64 + len(names), len(info))):
        sections += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)
    return header + body + sections


def kernel(data: bytes) -> None:
    """Kernel, initrd and command line of any content and size."""
    source = Input(data)
    choice = source.number(1)
    vm = CountingVm((source.number(2) or 1) * MIB)
    size = source.number(4) if choice & 4 else 4096
    initrd = None if choice & 8 else source.bytes(16)
    cmdline = source.text().replace("\0", "") if choice & 16 else "quiet"
    match choice & 3:
        case 0:
            image = damaged(source, bzimage())
        case 1:
            image = damaged(source, vmlinux())
        case _:
            image = source.bytes(1 << 16)
    with (
        file_of(image) as path,
        file_of(initrd or b"", max(size, 1)) as initrd_path,
        contextlib.suppress(BootError),
    ):
        load_kernel(vm, path, None if initrd is None else initrd_path, cmdline, 0xE0000)
    assert vm.written <= vm.size + (1 << 20), "more is written than there is memory"


def options(data: bytes) -> None:
    """A machine's options, as from the command line or Python."""
    source = Input(data)
    values: dict[str, object] = {}
    for key in MachineConfig.model_fields:
        match source.number(1) % 8:
            case 0 | 1 | 2:
                values[key] = source.text()
            case 3:
                values[key] = source.number(9)
            case 4:
                values[key] = "9" * source.number(2) + source.text()
            case 5:
                values[key] = [None, 1.5, True, b"x", -1, [], {}][source.number(1) % 7]
            case _:
                pass
    if source.number(1) % 8 == 7:
        # An unknown option can only come from a call, whose keywords are names.
        values["".join(filter(str.isidentifier, source.text()))] = source.text()
    refusal = None
    try:
        config = make_config(values)
    except ConfigError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        assert "sys." not in refusal, "the message is about Python"
    else:
        assert MEMORY_MIN <= config.memory <= MEMORY_MAX
        assert config.memory % 4096 == 0
        assert 1 <= config.cpus.count <= VCPUS_MAX
    text = source.text()
    spec = ConsoleSpec.parse(text)
    assert spec is None or ConsoleSpec.parse(str(spec)) == spec


def read_newc(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and data by name, as Linux's init/initramfs.c reads an archive."""
    files: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        header = archive[at : at + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name[-1:] == b"\0"
        assert b"\0" not in name[:-1]
        start = -(-(at + 110 + name_size) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert size == 0
            return files
        text = name[:-1].decode("utf-8", "surrogateescape")
        assert text not in files
        files[text] = (mode, archive[start : start + size])
        at = -(-(start + size) // 4) * 4


def archive(data: bytes) -> None:
    """An initramfs of any tree is one that a kernel reads back as it was."""
    source = Input(data)
    tree = Initramfs()
    expected: dict[str, bytes] = {}
    while source.left:
        kind, path, content = source.number(1), source.text(), source.bytes(source.number(1))
        before = set(tree.paths())
        try:
            match kind % 4:
                case 0:
                    tree.directory(path)
                    content = b""
                case 1:
                    target = content.decode("utf-8", "surrogateescape")
                    tree.symlink(path, target)
                case 2:
                    tree.character_device(path, kind, source.number(1))
                    content = b""
                case _:
                    tree.file(path, content)
        except ValueError:
            assert set(tree.paths()) == before, "refused, but there"
            continue
        new = set(tree.paths()) - before
        for name in new:
            expected[name] = b""
        # The path itself is the longest of the new ones, or one that was replaced.
        clean = "/".join(part for part in path.split("/") if part not in ("", "."))
        expected[clean] = content
    files = read_newc(tree.cpio())
    assert {name: content for name, (_, content) in files.items()} == expected
    names = list(files)
    for name in names:
        parent = name.rpartition("/")[0]
        assert not parent or names.index(parent) < names.index(name)


def modules(data: bytes) -> None:
    """Kernel modules that are damaged, or depend on each other in any way."""
    source = Input(data)
    raw = source.number(1) % 4 == 3
    image = source.bytes(4096) if raw else damaged(source, module())
    with contextlib.suppress(ModuleFormatError):
        modinfo(image)
    names = [f"m{index}" for index in range(source.number(1) % 12)]
    found = []
    for name in names:
        depends = tuple(f"m{byte % 12}" for byte in source.bytes(source.number(1) % 4))
        found.append(Module(name, f"{name}.ko", b"", depends, (), ()))
    lines = modules_dep(found).splitlines()
    assert len(lines) == len(names)


#: Nothing here may start a guest or reach the network.
WORDS = (
    "run --kernel /dev/null",
    "run --kernel /nonexistent",
    "run --kernel /",
    "--kernel",
    "--initrd",
    "--memory",
    "--cpus",
    "--engine",
    "bt",
    "kvm",
    "auto",
    "--console",
    "none",
    "file=/nonexistent/x",
    "--timeout",
    "--append",
    "--name",
    "--json",
    "--stats",
    "--debug-exit",
    "--help",
    "--version",
    "engines",
    "image ls",
    "image",
    "4M",
    "64M",
    "99999999T",
    "0",
    "-1",
    "nan",
    "inf",
    "=",
    "--",
)


def command_line(data: bytes) -> None:
    """The program with any arguments: an exit code and one line, never a traceback."""
    source = Input(data)
    words: list[str] = []
    while source.left and len(words) < 12:
        choice = source.number(1)
        if choice < 0xC0:
            words += WORDS[choice % len(WORDS)].split()
        else:
            words.append(source.text())
    if "run" in words:
        # The last one counts: no kernel but these, so no guest starts.
        words += ["--kernel", "/dev/null"]
    # Nor is the cache changed.
    if "--" in words or not {"pull", "build", "rm"}.isdisjoint(words):
        return
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_cli(words)
    assert code in (0, 1, 2), (words, code)
    assert "internal error" not in err.getvalue(), (words, err.getvalue())
    assert "Traceback" not in err.getvalue()
    if code and words and out.getvalue() == "":
        assert err.getvalue().startswith(("tetrarch: ", "Usage", "\nUsage")), err.getvalue()


@functools.cache
def saved_sections() -> tuple[tuple[bytes, int, bytes], ...]:
    """Name, version and body of each section of a machine that was saved on a stand-in."""
    with file_of(pvh_kernel(b"\xf4")) as kernel, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        with Machine(kernel=kernel, memory="16M", vm=ScriptedVm(idle)) as vm:
            vm.start()
            vm.save(path)
        image = path.read_bytes()
    sections, (at,) = [], struct.unpack_from("<Q", image, len(MAGIC))
    while at < len(image):
        name = image[at + 1 : at + 1 + image[at]]
        at += 1 + len(name)
        version, length, _ = struct.unpack_from("<HQI", image, at)
        at += struct.calcsize("<HQI")
        sections.append((name, version, image[at : at + length]))
        at += length
    return tuple(sections)


def idle(vm: ScriptedVm) -> str:
    while not vm._stop:
        vm.rest()
    return "stopped"


def damage(source: Input, value: Any) -> Any:
    """JSON with values that nobody saved."""
    odd: list[Any] = [
        None,
        True,
        -1,
        1 << 64,
        1e308,
        float("nan"),
        "",
        "\0",
        "1K",
        [],
        {},
        [1 << 65],
        "9" * 30,
    ]
    if source.number(1) % 8 == 7:
        return odd[source.number(1) % len(odd)]
    if isinstance(value, dict):
        changed = {key: damage(source, item) for key, item in value.items()}
        match source.number(1) % 16:
            case 14 if changed:
                del changed[next(iter(changed))]
            case 15:
                changed["kernel"] = "/etc/hostname"
        return changed
    return value


def saved(data: bytes) -> None:
    """A saved machine of which some sections say nonsense, under checksums that fit."""
    source = Input(data)
    image = header(HEADER_BYTES)
    for name, version, body in saved_sections():
        if source.number(1) % 4 == 3:
            if name in (b"machine", b"devices", b"attached"):
                body = json.dumps(damage(source, json.loads(body))).encode()
            elif name == b"ram":  # what is the engine's, the stand-in does not check
                body = source.bytes(source.number(1)) + body[source.number(2) :]
        head = struct.pack("B", len(name)) + name + struct.pack("<HQ", version, len(body))
        image += head + struct.pack("<I", zlib.crc32(head, zlib.crc32(body))) + body
    with file_of(image) as path:
        try:
            machine = Machine.restore(path, vm=ScriptedVm(idle))
        except StateError:
            return
        with machine, contextlib.suppress(StateError):
            machine.start()
            machine.pause()
            assert machine.vcpus[0].regs is not None


TARGETS: dict[str, Target] = {
    "kernel": kernel,
    "options": options,
    "archive": archive,
    "modules": modules,
    "command_line": command_line,
    "saved": saved,
    "ports": devices.ports,
    "functions": devices.functions,
    "vmci": vmci.vmci,
    "config_file": configs.config_file,
    "qemu": configs.qemu,
    "firecracker": configs.firecracker,
    "libvirt": configs.libvirt,
    "ovf": configs.ovf,
    "ova": configs.ova,
    "vmx": configs.vmx,
    "qmp": steering.qmp,
    "gdb": steering.gdb,
    "vnc": steering.vnc,
    "recording": recording.recording,
    "backdoor": vmware.backdoor,
    "svga": vmware.svga,
    "hypercalls": xen.hypercalls,
}
