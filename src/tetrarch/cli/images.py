"""``tetrarch image``: the cache of guests from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tetrarch import images
from tetrarch.errors import ConfigError, ImageError

__all__ = ["build", "pull", "remove", "show"]


def pull(name: str, as_json: bool) -> None:
    guest = images.pull(images.Cache(), name, images.TerminalReporter())
    _show_one(guest, as_json)


def show(as_json: bool) -> None:
    cache = images.Cache()
    guests = cache.list()
    if as_json:
        print(json.dumps([_row(guest) for guest in guests], indent=2))
        return
    if not guests:
        print(f"no guest is cached in {cache.root}; run: tetrarch image pull")
        return
    width = max(len(guest.manifest.name) for guest in guests)
    for guest in guests:
        size = sum(guest.manifest.sizes.values()) / 1e6
        print(
            f"{guest.manifest.name:<{width}}  {guest.manifest.package} "
            f"{guest.manifest.version}  {size:.1f} MB  {guest.kernel.parent}"
        )


def remove(name: str, as_json: bool) -> None:
    guest = images.remove(images.Cache(), name)
    if as_json:
        print(json.dumps(_row(guest), indent=2))
    else:
        print(f"removed {guest.manifest.name}: {guest.manifest.package} {guest.manifest.version}")


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
    with reporter.step(f"Building {name} from the cached packages"):
        built = images.build(cache, name, overlay)
    try:
        output.write_bytes(built.initrd)
    except OSError as error:
        raise ImageError(f"cannot write {output}: {error.strerror}", "name another file") from error
    if as_json:
        print(json.dumps({"initrd": str(output), "release": built.release}))
    else:
        print(f"{output}: initramfs for Linux {built.release}")


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
