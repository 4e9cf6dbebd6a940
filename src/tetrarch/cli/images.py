"""``tetrarch image``: the cache of guests from the command line."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from tetrarch import images
from tetrarch._files import replaced_when_whole
from tetrarch.errors import ConfigError, ImageError, ValueProblem
from tetrarch.images.names import public_keys
from tetrarch.images.store import DiskStore, InstalledDisk, read_manifest

__all__ = ["build", "build_disk", "import_disk", "info", "pull", "remove", "show", "take_kernel"]


def pull(name: str, as_json: bool) -> None:
    guest = images.pull(images.Cache(), name, images.TerminalReporter())
    _show_one(guest, as_json)


def show(as_json: bool) -> None:
    cache = images.Cache()
    guests, disks = cache.list(), DiskStore().list()
    if as_json:
        rows = [*map(_row, guests), *map(_disk_row, disks)]
        print(json.dumps(rows, indent=2))
        return
    for disk in disks:
        used = disk.disk.stat().st_blocks * 512 / 1e6
        print(
            f"{disk.manifest.name}  disk of {disk.disk.stat().st_size / 2**30:.0f} GiB, "
            f"{used:.0f} MB used, Linux {disk.manifest.release}  {disk.directory}"
        )
    if not guests and not disks:
        print(f"no guest is cached in {cache.root}; run: tetrarch image pull")
        return
    width = max((len(guest.manifest.name) for guest in guests), default=0)
    for guest in guests:
        size = sum(guest.manifest.sizes.values()) / 1e6
        print(
            f"{guest.manifest.name:<{width}}  {guest.manifest.package} "
            f"{guest.manifest.version}  {size:.1f} MB  {guest.kernel.parent}"
        )


def info(name: str, as_json: bool) -> None:
    disk, guest = DiskStore().find(name), images.Cache().find(name)
    if disk is not None:
        row = _disk_row(disk)
    elif guest is not None:
        row = _row(guest)
    else:
        raise _unknown(name)
    if as_json:
        print(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, what in value.items():
                print(f"  {name} {what}")
        else:
            print(f"{key}: {value}")


def remove(name: str, as_json: bool) -> None:
    disks = DiskStore()
    if disks.find(name) is not None:
        disk = disks.remove(name)
        if as_json:
            print(json.dumps(_disk_row(disk), indent=2))
            return
        cached = images.Cache().find(name) is not None
        print(
            f"removed the disk {name}" + ("; the cached guest of that name stays" if cached else "")
        )
        return
    if images.Cache().find(name) is None:
        raise _unknown(name)
    guest = images.remove(images.Cache(), name)
    if as_json:
        print(json.dumps(_row(guest), indent=2))
    else:
        print(f"removed {guest.manifest.name}: {guest.manifest.package} {guest.manifest.version}")


def _unknown(name: str) -> ImageError:
    names = [disk.manifest.name for disk in DiskStore().list()]
    names += [guest.manifest.name for guest in images.Cache().list()]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    mend = f"did you mean {near[0]}?" if near else "see tetrarch image ls"
    return ImageError(f"there is no disk and no cached guest {name}", mend)


def build(name: str, output: Path | None, overlay: Path | None, as_json: bool) -> None:
    cache = images.Cache()
    reporter = images.TerminalReporter()
    if output is None:
        if overlay is not None:
            raise ConfigError("--overlay changes the guest", "say with --output where it goes")
        with reporter.step(f"Building {name} from the cached packages"):
            guest = images.rebuild(cache, name)
        _show_one(guest, as_json)
        return
    try:
        with replaced_when_whole(output) as file:
            with reporter.step(f"Building {name} from the cached packages"):
                built = images.build(cache, name, overlay)
            file.write(built.initrd)
    except OSError as error:
        raise ImageError(f"cannot write {output}: {error.strerror}", "name another file") from error
    if as_json:
        print(json.dumps({"initrd": str(output), "release": built.release}))
    else:
        print(f"{output}: initramfs for Linux {built.release}")


def build_disk(
    what: str,
    size: str,
    *,
    called: str | None,
    hostname: str | None,
    user: str | None,
    ssh_keys: list[Path] | None,
    packages: list[str] | None,
    packages_from: Path | None,
    as_json: bool,
) -> None:
    from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
    from tetrarch.machine.config import parse_size

    if what != "debian":
        raise ConfigError(f"no disk of {what!r} can be built", mend="there is debian")
    try:
        length = parse_size(size)
    except ValueProblem as problem:
        raise ConfigError(f"--size: {problem.cause}", mend=problem.mend) from None
    name = called or what
    versions, time = dict[str, str](), None
    if packages_from is not None:
        if packages:
            raise ConfigError(
                "--packages-from names all packages there are", mend="leave --package out"
            )
        manifest = read_manifest(packages_from)
        packages, versions, time = manifest.asked, manifest.packages, manifest.time
    recipe = DebianRecipe(
        name=name,
        size=length,
        hostname=hostname or name,
        user=user or "",
        ssh_keys=public_keys(ssh_keys),
        packages=packages or (),
        versions=versions,
        time=time,
    )
    disk = build_debian_disk(recipe, DiskStore(), images.TerminalReporter())
    if as_json:
        print(json.dumps(_disk_row(disk), indent=2))
    else:
        print(f"{name}: Debian with Linux {disk.manifest.release} on {disk.disk}")
        print(f"  run it: tetrarch run {name}")


def import_disk(source: str, size: str, called: str | None, as_json: bool) -> None:
    from tetrarch.images.container import ContainerRecipe, import_container
    from tetrarch.images.names import disk_name
    from tetrarch.machine.config import parse_size

    kind, colon, rest = source.partition(":")
    if kind != "oci" or not colon or not rest:
        raise ConfigError(
            f"{source!r} is nothing that can be imported",
            "write oci:DIR[:TAG]; skopeo copy docker://NAME oci:DIR makes one",
        )
    directory, tag = Path(rest), ""
    if not directory.is_dir() and ":" in rest:
        path, _, tag = rest.rpartition(":")
        directory = Path(path)
    try:
        name = disk_name(called or directory.resolve().name.lower())
        length = parse_size(size)
    except ValueProblem as problem:
        raise ConfigError(problem.cause, mend=problem.mend) from None
    recipe = ContainerRecipe(directory, tag, name, length)
    reporter = images.TerminalReporter()
    disk = import_container(recipe, DiskStore(), images.Cache(), reporter)
    if as_json:
        print(json.dumps(_disk_row(disk), indent=2))
    else:
        print(f"{name}: {source} on {disk.disk}")
        print(f"  run it: tetrarch run {name}")


def take_kernel(name: str, as_json: bool) -> None:
    from tetrarch.images.new_kernel import take_newest_kernel

    with images.TerminalReporter().step(f"Starting {name} for its newest kernel"):
        disk = take_newest_kernel(DiskStore(), name)
    if as_json:
        print(json.dumps(_disk_row(disk), indent=2))
    else:
        print(f"{name}: Linux {disk.manifest.release} from its next start on")


def _disk_row(disk: InstalledDisk) -> dict[str, Any]:
    manifest = disk.manifest
    return {
        "name": manifest.name,
        "disk": str(disk.disk),
        "release": manifest.release,
        "suite": manifest.suite,
        "kernel": str(disk.kernel),
        "initrd": str(disk.initrd),
        "append": manifest.append,
        "packages": manifest.packages,
        "asked": manifest.asked,
        "time": manifest.time,
        "bytes": disk.disk.stat().st_size,
    }


def _show_one(guest: images.CachedGuest, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_row(guest), indent=2))
    else:
        print(f"{guest.manifest.name}: {guest.manifest.package} {guest.manifest.version}")
        print(f"  kernel {guest.kernel}")
        print(f"  initrd {guest.initrd}")


def _row(guest: images.CachedGuest) -> dict[str, Any]:
    manifest = guest.manifest
    return {
        "name": manifest.name,
        "package": manifest.package,
        "version": manifest.version,
        "release": manifest.release,
        "kernel": str(guest.kernel),
        "initrd": str(guest.initrd),
        "sha256": manifest.sha256,
        "bytes": sum(manifest.sizes.values()),
    }
