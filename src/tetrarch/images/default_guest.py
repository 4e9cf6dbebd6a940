"""The default guest: a stock Debian kernel and an initramfs with a shell.

Kernel and user land come from Debian as they are: the kernel package and
busybox-static. The initramfs is built here, so that what runs in the guest is
in view: the files in guest/.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tetrarch._files import ScratchDirectory
from tetrarch.errors import ImageError
from tetrarch.images.archive import ArchiveError, unpack
from tetrarch.images.initramfs import Initramfs
from tetrarch.images.modules import (
    ModuleFormatError,
    ModuleTree,
    modules_alias,
    modules_dep,
)

__all__ = [
    "BUSYBOX_PACKAGE",
    "RECIPE_VERSION",
    "BuiltGuest",
    "agent_program",
    "build_guest",
    "build_initramfs",
    "shares_script",
]

RECIPE_VERSION = 24
"""Counts up when the initramfs changes, so that cached ones are built anew."""

BUSYBOX_PACKAGE = "busybox-static"

# What a guest can use on the machines we build: paravirtual devices and the file
# systems one mounts in a shell. Those that a kernel has built in are left out.
GUEST_MODULES = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_scsi",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "vmw_balloon",
    "virtio_rng",
    "virtio_input",
    "evdev",
    "pvpanic_mmio",
    "vmw_vsock_virtio_transport",
    "vmw_vmci",
    "vmw_vsock_vmci_transport",
    "ahci",
    "ata_piix",
    "sd_mod",
    "sr_mod",
    "nvme",
    "vmw_pvscsi",
    "vmxnet3",
    "e1000",
    "button",
    "loop",
    "floppy",
    "ext4",
    "overlay",
    "autofs4",
    "squashfs",
    "isofs",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "fuse",
    "virtiofs",
    "crc32c_intel",
)

_ETC = {
    "etc/hostname": "tetrarch\n",
    "etc/hosts": "127.0.0.1 localhost tetrarch\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
}


@dataclass(frozen=True)
class BuiltGuest:
    """What a build gives: the kernel image, the initramfs, the kernel's version."""

    kernel: bytes
    initrd: bytes
    release: str


def build_guest(kernel_deb: Path, busybox_deb: Path, overlay: Path | None = None) -> BuiltGuest:
    """Builds a guest from the two packages; ``overlay`` is a directory laid over it."""
    with ScratchDirectory(prefix="tetrarch-build-") as name:
        root = Path(name)
        unpack(kernel_deb, root)
        unpack(busybox_deb, root)
        kernel = _only(root / "boot", "vmlinuz-*", kernel_deb)
        # Debian 12 has /lib/modules, later releases /usr/lib/modules.
        modules_root = next(
            (base for base in (root / "lib/modules", root / "usr/lib/modules") if base.is_dir()),
            root / "lib/modules",
        )
        module_dir = _only(modules_root, "*", kernel_deb)
        busybox = _only(root, "**/bin/busybox", busybox_deb)
        try:
            tree = build_initramfs(busybox.read_bytes(), module_dir, overlay)
        except ModuleFormatError as error:
            raise ArchiveError(
                f"{kernel_deb.name} has a module that is broken: {error}",
                f"remove {kernel_deb} and pull again",
            ) from error
        return BuiltGuest(kernel.read_bytes(), tree.gzip(), module_dir.name)


def build_initramfs(busybox: bytes, module_dir: Path, overlay: Path | None = None) -> Initramfs:
    tree = Initramfs()
    for directory in ("dev", "proc", "sys", "run", "mnt", "var", "usr/bin", "usr/sbin"):
        tree.directory(directory)
    tree.directory("root", 0o700)
    tree.directory("tmp", 0o1777)
    # The kernel opens /dev/console for the first program before anything is mounted.
    tree.character_device("dev/console", 5, 1)
    tree.character_device("dev/null", 1, 3, 0o666)
    tree.file("bin/busybox", busybox, 0o755)
    tree.symlink("bin/sh", "busybox")
    tree.file("init", _guest_file("init"), 0o755)
    tree.file("usr/lib/tetrarch/root", _guest_file("root"))
    tree.file("usr/lib/tetrarch/shares", shares_script())
    tree.file("etc/inittab", _guest_file("inittab"))
    tree.file("etc/profile", _guest_file("profile"))
    tree.file("etc/udhcpc", _guest_file("udhcpc"), 0o755)
    tree.file("etc/acpi/PWRF/00000080", _guest_file("power-button"), 0o755)
    tree.file("usr/lib/tetrarch/hotplug", _guest_file("hotplug"), 0o755)
    tree.file("usr/sbin/tetrarch-agent", agent_program(), 0o755)
    for path, text in _ETC.items():
        tree.file(path, text.encode())
    tree.file("etc/motd", _motd(module_dir.name).encode())
    _add_modules(tree, module_dir)
    if overlay is not None:
        tree.tree(overlay)
    return tree


def _add_modules(tree: Initramfs, module_dir: Path) -> None:
    base = f"lib/modules/{module_dir.name}"
    modules = ModuleTree(module_dir).closure(GUEST_MODULES)
    tree.directory(base)
    for module in modules:
        tree.file(f"{base}/{module.path}", module.data)
    tree.file(f"{base}/modules.dep", modules_dep(modules).encode())
    tree.file(f"{base}/modules.alias", modules_alias(modules).encode())
    for name in ("modules.builtin", "modules.builtin.modinfo"):
        path = module_dir / name
        if path.is_file():
            tree.file(f"{base}/{name}", path.read_bytes())


def _motd(release: str) -> str:
    return f"Linux {release} on Tetrarch. poweroff ends the machine, Ctrl-] leaves it.\n"


def shares_script() -> bytes:
    """What a guest's shell does to mount the directories that it is given."""
    return _guest_file("shares")


def agent_program() -> bytes:
    """The program in guests that runs commands for the host (``crates/agent``)."""
    try:
        return _guest_file("tetrarch-agent")
    except FileNotFoundError as error:
        raise ImageError(
            "this installation lacks the agent of guests", "run make setup, or install it anew"
        ) from error


def _guest_file(name: str) -> bytes:
    return (resources.files("tetrarch.images") / "guest" / name).read_bytes()


def _only(directory: Path, pattern: str, package: Path) -> Path:
    found = sorted(directory.glob(pattern))
    if not found:
        raise ArchiveError(f"{package.name} has no {pattern}", "name another package")
    return found[0]
