"""A Debian on a disk: packages by mmdebstrap, without root where user namespaces allow.

What a build gives follows from its recipe, the versions of the packages, and one time, which all
files of the build's own have (SOURCE_DATE_EPOCH, reproducible-builds.org). Both stand in disk.json,
so that the same disk can be made again.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tetrarch._files import ScratchDirectory
from tetrarch.errors import ImageError, ValueProblem
from tetrarch.images.default_guest import agent_program, shares_script
from tetrarch.images.disk import require_size, require_space
from tetrarch.images.names import disk_name, host_name, public_key, user_name
from tetrarch.images.partition import make_disk
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DISK, INITRD, KERNEL, DiskManifest, DiskStore, InstalledDisk
from tetrarch.images.tool import find_tool, run_tool
from tetrarch.images.tree import Tree

__all__ = [
    "AGENT_UNIT",
    "PACKAGES",
    "DebianRecipe",
    "build_debian_disk",
    "first_boot_files",
    "take_boot_files",
]

SUITE = "bookworm"

#: What every disk has beside Debian's essential packages.
PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "iputils-ping",
    "less",
    "libpam-systemd",
    "openssh-server",
    "procps",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
)

#: And this one, unless another is named.
KERNEL_PACKAGE = "linux-image-cloud-amd64"

#: The least that holds them, with room to work.
DISK_MIN = 2 << 30

#: The most that ext4 has with blocks of 4 KiB and no larger numbers of them.
DISK_MAX = 16 << 40

# What the archive and the unpacked tree take meanwhile.
_SCRATCH_BYTES = 2 << 30

# Debian Policy, 5.6.7 and 5.6.12.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+:~-]*")
# Users and groups that are there already (base-passwd, and what is always installed).
_TAKEN = """
root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc _apt nobody
adm tty disk kmem dialout fax voice cdrom floppy tape sudo audio dip operator src shadow utmp
video sasl plugdev staff users nogroup messagebus sshd _ssh systemd-journal systemd-network
systemd-resolve systemd-timesync input sgx kvm render crontab
"""

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
manual_add_modules vmw_pvscsi
"""

# No serial line tells this. Later changes are not told: stty(1).
_TERMINAL = """\
# The size that the host's terminal had when the machine started.
case "$(tty)" in
/dev/ttyS0)
\tfor word in $(cat /proc/cmdline); do
\t\tcase "$word" in
\t\ttetrarch.tty=*x*)
\t\t\tword="${word#*=}"
\t\t\tstty rows "${word%x*}" cols "${word#*x}"
\t\t\t;;
\t\tesac
\tdone
\tunset word
\t;;
esac
"""

# The host starts the kernel that lies beside the disk.
_NEW_KERNEL = """\
#!/bin/sh
echo "tetrarch: Linux $1 is started after this command on the host: tetrarch image kernel {}"
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

#: The agent as a service of systemd.
AGENT_UNIT = """\
[Unit]
Description=Commands of the host

[Service]
ExecStart=/usr/sbin/tetrarch-agent
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""

#: Directories of the host, as the kernel's command line names them.
_SHARES = """\
[Unit]
Description=Directories of the host
ConditionKernelCommandLine=tetrarch.share

[Service]
Type=oneshot
ExecStart=/bin/sh /usr/lib/tetrarch/shares
RemainAfterExit=yes

[Install]
WantedBy=multi-user.target
"""

# mmdebstrap runs it outside of the new root, $1, in its namespace.
_CUSTOMIZE = """\
set -e
root=$1
# Of the host, as mmdebstrap leaves it; the resolver's own is what a guest needs.
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
chroot "$root" passwd --quiet --delete root
chroot "$root" systemctl --quiet enable systemd-networkd ssh
chroot "$root" systemctl --quiet enable tetrarch-host-keys tetrarch-agent tetrarch-shares
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
# What tells when and how it was made.
rm -f "$root"/etc/apt/preferences.d/tetrarch "$root"/var/cache/ldconfig/aux-cache
find "$root/var/log" -type f -delete
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
    """Beside those that every disk has; with ``versions``, all that are asked for."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version, of all that is to be installed; empty: the newest of what is needed."""
    time: int | None = None
    """When the disk was made, in seconds since 1970; None: SOURCE_DATE_EPOCH, or now."""

    def check(self) -> None:
        """Raises ImageError for what no Debian would take."""
        for value, form, what in (
            *((package, _PACKAGE, "name of a package") for package in self.packages),
            *((package, _PACKAGE, "name of a package") for package in self.versions),
            *((version, _VERSION, "version of a package") for version in self.versions.values()),
        ):
            if not form.fullmatch(value):
                raise ImageError(f"{value!r} is no {what}", "use lower-case letters and digits")
        try:
            disk_name(self.name)
            host_name(self.hostname)
            user_name(self.user or "user")
            for key in self.ssh_keys:
                public_key(key)
        except ValueProblem as problem:
            raise ImageError(problem.cause, problem.mend) from None
        if self.user in _TAKEN.split():
            raise ImageError(f"{self.user} is a user or group of Debian's own", "choose another")
        if self.size < DISK_MIN:
            raise ImageError(
                f"{self.size >> 20} MiB are too little for a Debian",
                f"give --size {DISK_MIN >> 30}G or more",
            )
        if self.size > DISK_MAX:
            raise ImageError(
                f"{self.size >> 30} GiB are too much for one file system",
                f"give --size {DISK_MAX >> 40}T or less",
            )

    @property
    def wanted(self) -> list[str]:
        """The packages that are asked for, a kernel among them; the others are for their sake."""
        if self.versions:
            return list(self.packages)
        named = any(package.startswith("linux-image-") for package in self.packages)
        return [*PACKAGES, *([] if named else [KERNEL_PACKAGE]), *self.packages]


def first_boot_files(recipe: DebianRecipe) -> dict[str, tuple[int, str | bytes]]:
    """Path -> (mode, contents) of the files that are ours."""
    host = recipe.hostname
    files: dict[str, tuple[int, str | bytes]] = {
        "usr/sbin/tetrarch-agent": (0o755, agent_program()),
        "etc/hostname": (0o644, f"{host}\n"),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n127.0.1.1 {host}\n::1 localhost\n"),
        "etc/fstab": (0o644, "LABEL=root / ext4 errors=remount-ro,x-systemd.growfs 0 1\n"),
        # A disk that was made larger: systemd-repart(8), and then systemd-growfs(8).
        "etc/repart.d/50-root.conf": (0o644, "[Partition]\nType=root\n"),
        "etc/systemd/network/80-ethernet.network": (0o644, _NETWORK),
        "etc/systemd/system/tetrarch-agent.service": (0o644, AGENT_UNIT),
        "etc/systemd/system/tetrarch-shares.service": (0o644, _SHARES),
        "usr/lib/tetrarch/shares": (0o644, shares_script()),
        "etc/systemd/system/tetrarch-host-keys.service": (0o644, _HOST_KEYS),
        "etc/profile.d/tetrarch.sh": (0o644, _TERMINAL),
        "etc/kernel/postinst.d/zz-tetrarch": (0o755, _NEW_KERNEL.format(recipe.name)),
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
    for tool, package in (("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("sfdisk", "fdisk")):
        find_tool(tool, package)
    if os.geteuid() != 0:
        find_tool("newuidmap", "uidmap")
    made = recipe.time if recipe.time is not None else _now()
    with store.making(recipe.name) as directory:
        require_space({directory: _SCRATCH_BYTES}, "a Debian disk while it is made")
        require_size(directory / DISK, recipe.size)
        archive = directory / "root.tar"
        with reporter.step("Installing Debian's packages, some minutes") as detail:
            _bootstrap(mmdebstrap, recipe, archive, made, detail)
        with (
            reporter.step(f"Writing a disk of {recipe.size >> 30} GiB"),
            ScratchDirectory(prefix="tetrarch-", dir=directory) as scratch,
        ):
            tree = Tree(Path(scratch))
            with archive.open("rb") as file:
                tree.add_tar(file)
            archive.unlink()
            # The kernel has its own (devtmpfs).
            tree.empty("dev")
            packages = _installed(tree)
            _require_versions(recipe.versions, packages)
            release = take_boot_files(tree, directory)
            part = make_disk(tree, directory / DISK, recipe.size, recipe.name, made)
        append = f"root=PARTUUID={part} ro console=ttyS0 quiet"
        manifest = DiskManifest(recipe.name, append, release, SUITE, packages, recipe.wanted, made)
        store.write_manifest(directory, manifest)
    found = store.find(recipe.name)
    if found is None:
        raise ImageError(f"the disk in {store.root} cannot be read back", "check the disk")
    return found


def _now() -> int:
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(given) if given.isdecimal() else int(time.time())


def _bootstrap(
    mmdebstrap: str, recipe: DebianRecipe, archive: Path, made: int, detail: Callable[[str], object]
) -> None:
    with ScratchDirectory(prefix="tetrarch-") as temporary:
        # Read by another user inside of mmdebstrap's namespace.
        folder = Path(temporary)
        folder.chmod(0o755)
        early, late = folder / "early.tar", folder / "late.tar"
        first = {
            "etc/initramfs-tools/hooks/tetrarch": (0o755, _INITRAMFS_HOOK),
            "etc/initramfs-tools/conf.d/tetrarch": (0o644, "MODULES=list\n"),
        }
        _write_tar(early, first, made)
        _write_tar(late, first_boot_files(recipe), made)
        script = folder / "customize"
        script.write_text("#!/bin/sh\n" + _CUSTOMIZE.replace("@USER@", recipe.user))
        script.chmod(0o755)
        pins = folder / "pins"
        pins.write_text(_preferences(recipe.versions))
        pins.chmod(0o644)
        check = folder / "check"
        check.write_text(_check(recipe.versions))
        check.chmod(0o755)
        command = [
            *(mmdebstrap, "--mode=unshare", "--variant=minbase", "--format=tar", "--verbose"),
            f"--include={','.join(recipe.wanted)}",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            f"--setup-hook=upload {pins} /etc/apt/preferences.d/tetrarch",
            f"--essential-hook={check}",
            f"--essential-hook=tar-in {early} /",
            f"--customize-hook=tar-in {late} /",
            f"--customize-hook={script}",
            *(SUITE, str(archive)),
        ]
        run_tool(
            command,
            "mmdebstrap cannot make the system",
            environment={"SOURCE_DATE_EPOCH": str(made)},
            on_line=_told(detail),
        )


def _told(detail: Callable[[str], object]) -> Callable[[str], None]:
    """Of all that mmdebstrap, apt and dpkg say, what tells how far they are."""
    kinds = re.compile(r"(Unpacking|Setting up) ([^ :]+)|I: (.*?)\.*$|(update-initramfs): ")

    def hear(line: str) -> None:
        if (match := kinds.match(line)) is not None:
            verb, package, step, program = match.groups()
            detail(step or program or f"{verb.lower()} {package}")

    return hear


def _preferences(versions: Mapping[str, str]) -> str:
    """apt_preferences(5) by which no other version is taken, even in place of a newer."""
    entries = (
        f"Package: {name}\nPin: version {version}\nPin-Priority: 1001\n"
        for name, version in sorted(versions.items())
    )
    return "\n".join(entries)


def _check(versions: Mapping[str, str]) -> str:
    """A hook that fails, before much is installed, where the mirror lacks one of the versions."""
    if not versions:
        return "#!/bin/sh\n"
    names = " ".join(f"{name}={version}" for name, version in sorted(versions.items()))
    install = f"apt-get --quiet --simulate --yes install {names}"
    return f'#!/bin/sh\nAPT_CONFIG="$MMDEBSTRAP_APT_CONFIG" {install} >/dev/null\n'


def _require_versions(wanted: Mapping[str, str], installed: Mapping[str, str]) -> None:
    for name, version in wanted.items():
        if installed.get(name) != version:
            raise ImageError(
                f"{name} {version} was asked for, and {installed.get(name, 'none')} is installed",
                "build from a list of a system with the same --package options",
            )


def _write_tar(path: Path, files: Mapping[str, tuple[int, str | bytes]], made: int) -> None:
    with tarfile.open(path, "w") as tar:
        for name, (mode, text) in files.items():
            for parent in reversed(Path(name).parents):
                if str(parent) in (".", "etc", "root", "usr", "usr/sbin"):
                    continue
                folder = tarfile.TarInfo(str(parent))
                folder.type, folder.mtime = tarfile.DIRTYPE, made
                folder.mode = 0o700 if parent.name == ".ssh" else 0o755
                tar.addfile(folder)
            data = text if isinstance(text, bytes) else text.encode()
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size, entry.mtime = mode, len(data), made
            tar.addfile(entry, io.BytesIO(data))
    path.chmod(0o644)


def take_boot_files(tree: Tree, directory: Path) -> str:
    """Copies kernel and initial RAM disk of the newest kernel that has both; its release."""
    prefixes = {KERNEL: "boot/vmlinuz-", INITRD: "boot/initrd.img-"}
    kernels, initrds = (
        {path.removeprefix(prefix) for path in tree.nodes if path.startswith(prefix)}
        for prefix in prefixes.values()
    )
    if not kernels & initrds:
        raise ImageError("the system that was installed has no kernel", "install one: --package")
    release = max(kernels & initrds, key=_version_order)
    for file, prefix in prefixes.items():
        (directory / file).write_bytes(tree.read(prefix + release))
    return release


def _version_order(release: str) -> list[tuple[int, str]]:
    """Numbers as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", release)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _installed(tree: Tree) -> dict[str, str]:
    """Package -> version, as dpkg records them."""
    text = tree.read("var/lib/dpkg/status").decode("utf-8", "replace")
    pairs = re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", text, re.MULTILINE | re.DOTALL)
    return dict(pairs)
