"""A container image on a disk: its files, our kernel, and the agent as its first program.

A system with systemd starts as it does anywhere. Any other has no first program that would start
what a machine needs: the agent is it then, runs the image's command on the console, and switches
the machine off after it (``crates/agent/src/init.rs``).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tetrarch import images
from tetrarch._files import ScratchDirectory
from tetrarch.agent import encode_run
from tetrarch.errors import ImageError
from tetrarch.images.debian_disk import AGENT_UNIT
from tetrarch.images.default_guest import agent_program
from tetrarch.images.disk import require_size, require_space
from tetrarch.images.oci import OciImage, open_layer, read_image
from tetrarch.images.partition import make_disk, partition_uuid
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DISK, INITRD, KERNEL, DiskManifest, DiskStore, InstalledDisk
from tetrarch.images.tool import find_tool
from tetrarch.images.tree import Tree

__all__ = ["ContainerRecipe", "import_container"]

_AGENT = "usr/sbin/tetrarch-agent"
_UNIT = "etc/systemd/system/tetrarch-agent.service"
_WANTS = "etc/systemd/system/multi-user.target.wants/tetrarch-agent.service"
_SYSTEMD = "lib/systemd/systemd"
#: Where the kernel's file systems are mounted, and what a shell expects.
_DIRECTORIES = {"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777}


@dataclass(frozen=True)
class ContainerRecipe:
    """``size`` in bytes."""

    directory: Path
    tag: str
    name: str
    size: int


def import_container(
    recipe: ContainerRecipe, store: DiskStore, cache: images.Cache, reporter: Reporter
) -> InstalledDisk:
    """Makes the disk. Raises ImageError; nothing is left where it fails."""
    for tool, package in (("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("sfdisk", "fdisk")):
        find_tool(tool, package)
    image = read_image(recipe.directory, recipe.tag)
    with store.making(recipe.name) as directory:
        packed = sum(layer.stat().st_size for layer in image.layers)
        require_space({directory: 3 * packed}, "a container image on a disk")
        require_size(directory / DISK, recipe.size)
        guest = images.ensure(cache, images.DEFAULT_IMAGE, reporter)
        for file, source in ((KERNEL, guest.kernel), (INITRD, guest.initrd)):
            shutil.copyfile(source, directory / file)
        with (
            reporter.step(f"Unpacking {len(image.layers)} layers") as detail,
            ScratchDirectory(prefix="tetrarch-", dir=directory) as scratch,
        ):
            tree = Tree(Path(scratch), recipe.size)
            for number, layer in enumerate(image.layers, start=1):
                detail(f"{number} of {len(image.layers)}")
                with open_layer(layer) as archive:
                    tree.add_layer(archive)
            if not tree.nodes:
                raise ImageError(f"the image in {recipe.directory} has no files", "choose another")
            init = _prepare(tree, image, recipe.name)
            detail("writing the disk")
            make_disk(tree, directory / DISK, recipe.size, recipe.name, image.time)
        root = partition_uuid(recipe.name, "root")
        append = f"root=UUID={root} rw init={init} console=ttyS0 quiet"
        origin = f"oci:{recipe.directory.name}"
        manifest = DiskManifest(
            recipe.name, append, guest.manifest.release, origin, time=image.time
        )
        store.write_manifest(directory, manifest)
    found = store.find(recipe.name)
    if found is None:
        raise ImageError(f"the disk in {store.root} cannot be read back", "check the disk")
    return found


def _prepare(tree: Tree, image: OciImage, name: str) -> str:
    """Adds what makes a system of it; the path of its first program."""
    for path, mode in _DIRECTORIES.items():
        tree.empty(path)
        tree.add_directory(path, mode)
    tree.add_file(_AGENT, agent_program(), 0o755, image.time)
    if tree.find("etc/hostname") is None:
        tree.add_file("etc/hostname", f"{name}\n".encode(), mtime=image.time)
    if tree.find("etc/hosts") is None:
        hosts = f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost\n"
        tree.add_file("etc/hosts", hosts.encode(), mtime=image.time)
    if tree.find(_SYSTEMD) is not None:
        tree.add_file(_UNIT, AGENT_UNIT.encode(), mtime=image.time)
        tree.add_link(_WANTS, f"/{_UNIT}", image.time)
        return f"/{_SYSTEMD}"
    arguments = image.arguments
    if not arguments and tree.find("bin/sh") is not None:
        arguments = ["/bin/sh"]
    if arguments:
        body = encode_run(arguments, environment=image.environment, directory=image.directory)
        tree.add_file("etc/tetrarch/command", body, mtime=image.time)
    # Where the image's commands are looked for, else where they usually are.
    paths = [entry[5:] for entry in image.environment if entry.startswith("PATH=/")]
    folders = [folder.strip("/") for folder in (paths or ["/usr/sbin"])[0].split(":")]
    for program in ("poweroff", "reboot"):
        if all(tree.find(f"{folder}/{program}") is None for folder in folders):
            tree.add_link(f"{folders[0]}/{program}", f"/{_AGENT}", image.time)
    return f"/{_AGENT}"
