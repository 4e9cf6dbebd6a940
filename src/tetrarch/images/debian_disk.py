"""A Debian on a disk: packages by mmdebstrap, without root where user namespaces allow."""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tetrarch.errors import ImageError
from tetrarch.images.default_guest import agent_program
from tetrarch.images.disk import require_space
from tetrarch.images.partition import find_tool, make_disk, run_tool
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DISK, INITRD, KERNEL, DiskManifest, DiskStore, InstalledDisk

__all__ = ["DISK_MIN", "PACKAGES", "DebianRecipe", "build_debian_disk", "first_boot_files"]

SUITE = "bookworm"

#: What every disk has beside Debian's essential packages.
PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "iputils-ping",
    "less",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "openssh-server",
    "procps",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
)

#: The least that holds them, with room to work.
DISK_MIN = 2 << 30

# What the archive and the unpacked tree take meanwhile.
_SCRATCH_BYTES = 1500 << 20

_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]{0,62}$")
_USER = re.compile(r"^[a-z_][a-z0-9_-]{0,31}$")
_PACKAGE = re.compile(r"^[a-z0-9][a-z0-9+.-]+$")

_NETWORK = """\
# Every Ethernet card asks for an address.
[Match]
Type=ether
Kind=!*

[Network]
DHCP=yes
LinkLocalAddressing=ipv6

[DHCPv4]
UseDomains=yes
"""

# The drivers by which a disk is found: the initial RAM disk has these alone, and is small.
_INITRAMFS_HOOK = """\
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules virtio_pci virtio_mmio virtio_blk virtio_scsi nvme ahci ata_piix sd_mod ext4
"""

_HOST_KEYS = """\
[Unit]
Description=SSH host keys of this machine alone
Before=ssh.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key

[Install]
WantedBy=multi-user.target
"""

_AGENT = """\
[Unit]
Description=Commands of the host

[Service]
ExecStart=/usr/sbin/tetrarch-agent
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""

# mmdebstrap runs it outside of the new root, $1, in its namespace.
_CUSTOMIZE = """\
set -e
root=$1
chroot "$root" passwd --quiet --delete root
chroot "$root" systemctl --quiet enable systemd-networkd ssh tetrarch-host-keys tetrarch-agent
# Of no use on a disk without LVM, and slow to find that out.
chroot "$root" systemctl --quiet mask e2scrub_reap.service e2scrub_all.timer
if [ -n "@USER@" ]; then
    chroot "$root" useradd --create-home --shell /bin/bash --groups sudo "@USER@"
    chroot "$root" passwd --quiet --delete "@USER@"
    mkdir -m 700 "$root/home/@USER@/.ssh"
    cp "$root/root/.ssh/authorized_keys" "$root/home/@USER@/.ssh/" 2>/dev/null || true
    chroot "$root" chown -R "@USER@:@USER@" "/home/@USER@/.ssh"
fi
rm -f "$root"/etc/ssh/ssh_host_* "$root"/etc/machine-id "$root"/var/lib/dbus/machine-id
: > "$root/etc/machine-id"
"""


@dataclass(frozen=True)
class DebianRecipe:
    """What a disk is made of. ``ssh_keys`` are lines as in authorized_keys(5)."""

    name: str = "debian"
    size: int = 4 << 30
    hostname: str = "debian"
    user: str = ""
    ssh_keys: Sequence[str] = ()
    packages: Sequence[str] = ()

    def check(self) -> None:
        """Raises ImageError for what no Debian would take."""
        for value, form, what in (
            (self.name, _NAME, "name of a disk"),
            (self.hostname, _NAME, "host name"),
            (self.user or "user", _USER, "user name"),
            *((package, _PACKAGE, "name of a package") for package in self.packages),
        ):
            if not form.match(value):
                raise ImageError(f"{value!r} is no {what}", "use lower-case letters and digits")
        if self.size < DISK_MIN:
            raise ImageError(
                f"{self.size >> 20} MiB are too little for a Debian",
                f"give --size {DISK_MIN >> 30}G or more",
            )
        for key in self.ssh_keys:
            if len(key.split()) < 2 or "\n" in key or "PRIVATE" in key:
                raise ImageError(f"{key[:40]!r} is no public SSH key", "give a .pub file")


def first_boot_files(recipe: DebianRecipe) -> dict[str, tuple[int, str | bytes]]:
    """Path -> (mode, contents) of the files that are ours."""
    host = recipe.hostname
    files: dict[str, tuple[int, str | bytes]] = {
        "usr/sbin/tetrarch-agent": (0o755, agent_program()),
        "etc/hostname": (0o644, f"{host}\n"),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n127.0.1.1 {host}\n::1 localhost\n"),
        "etc/fstab": (0o644, "LABEL=root / ext4 errors=remount-ro 0 1\n"),
        "etc/systemd/network/80-ethernet.network": (0o644, _NETWORK),
        "etc/systemd/system/tetrarch-agent.service": (0o644, _AGENT),
        "etc/systemd/system/tetrarch-host-keys.service": (0o644, _HOST_KEYS),
    }
    if recipe.ssh_keys:
        keys = "".join(f"{key.strip()}\n" for key in recipe.ssh_keys)
        files["root/.ssh/authorized_keys"] = (0o600, keys)
    if recipe.user:
        files["etc/sudoers.d/tetrarch"] = (0o440, f"{recipe.user} ALL=(ALL) NOPASSWD: ALL\n")
    return files


def build_debian_disk(recipe: DebianRecipe, store: DiskStore, reporter: Reporter) -> InstalledDisk:
    """Makes the disk; takes minutes, and network. Nothing is left where it fails."""
    recipe.check()
    mmdebstrap = find_tool("mmdebstrap", "mmdebstrap")
    for tool, package in (("mke2fs", "e2fsprogs"), ("sfdisk", "fdisk")):
        find_tool(tool, package)
    if os.geteuid() != 0:
        find_tool("newuidmap", "uidmap")
    with store.making(recipe.name) as directory:
        require_space({directory: _SCRATCH_BYTES}, "a Debian disk while it is made")
        archive = directory / "root.tar"
        with reporter.step("Installing Debian's packages (mmdebstrap, some minutes)"):
            _bootstrap(mmdebstrap, recipe, archive, directory)
        with tarfile.open(archive) as tar:
            release = _take_boot_files(tar, directory)
            packages = _installed(tar)
        with reporter.step(f"Writing a disk of {recipe.size >> 30} GiB"):
            part = make_disk(archive, directory / DISK, recipe.size, recipe.name)
        archive.unlink()
        append = f"root=PARTUUID={part} ro console=ttyS0 quiet"
        manifest = DiskManifest(recipe.name, append, release, SUITE, packages)
        store.write_manifest(directory, manifest)
    found = store.find(recipe.name)
    if found is None:
        raise ImageError(f"the disk in {store.root} cannot be read back", "check the disk")
    return found


def _bootstrap(mmdebstrap: str, recipe: DebianRecipe, archive: Path, scratch: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tetrarch-") as temporary:
        # Read by another user inside of mmdebstrap's namespace.
        folder = Path(temporary)
        folder.chmod(0o755)
        early, late = folder / "early.tar", folder / "late.tar"
        hook = {"etc/initramfs-tools/hooks/tetrarch": (0o755, _INITRAMFS_HOOK)}
        modules = {"etc/initramfs-tools/conf.d/tetrarch": (0o644, "MODULES=list\n")}
        _write_tar(early, {**hook, **modules})
        _write_tar(late, first_boot_files(recipe))
        script = folder / "customize"
        script.write_text("#!/bin/sh\n" + _CUSTOMIZE.replace("@USER@", recipe.user))
        script.chmod(0o755)
        command = [
            *(mmdebstrap, "--mode=unshare", "--variant=minbase", "--format=tar", "--quiet"),
            f"--include={','.join([*PACKAGES, *recipe.packages])}",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            f"--essential-hook=tar-in {early} /",
            f"--customize-hook=tar-in {late} /",
            f"--customize-hook={script}",
            *(SUITE, str(archive)),
        ]
        run_tool(command, "mmdebstrap cannot make the system")


def _write_tar(path: Path, files: Mapping[str, tuple[int, str | bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, (mode, text) in files.items():
            for parent in reversed(Path(name).parents):
                if str(parent) in (".", "etc", "root", "usr", "usr/sbin"):
                    continue
                folder = tarfile.TarInfo(str(parent))
                folder.type = tarfile.DIRTYPE
                folder.mode = 0o700 if parent.name == ".ssh" else 0o755
                tar.addfile(folder)
            data = text if isinstance(text, bytes) else text.encode()
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = mode, len(data)
            tar.addfile(entry, io.BytesIO(data))
    path.chmod(0o644)


def _take_boot_files(tar: tarfile.TarFile, directory: Path) -> str:
    """Copies kernel and initial RAM disk out; the kernel's release."""
    release = ""
    for entry in tar.getmembers():
        folder, _, file = entry.name.removeprefix("./").rpartition("/")
        if folder != "boot" or not entry.isfile():
            continue
        for prefix, target in (("vmlinuz-", KERNEL), ("initrd.img-", INITRD)):
            if file.startswith(prefix) and (data := tar.extractfile(entry)) is not None:
                (directory / target).write_bytes(data.read())
                release = file.removeprefix(prefix)
    if not (directory / KERNEL).exists() or not (directory / INITRD).exists():
        raise ImageError("the system that was installed has no kernel", "install one: --package")
    return release


def _installed(tar: tarfile.TarFile) -> dict[str, str]:
    """Package -> version, as dpkg records them."""
    try:
        data = tar.extractfile("./var/lib/dpkg/status")
    except KeyError:
        data = None
    text = data.read().decode("utf-8", "replace") if data is not None else ""
    pairs = re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", text, re.MULTILINE | re.DOTALL)
    return dict(pairs)
