"""The commands and their options. What they do is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tetrarch.cli.machines import add_machine_commands
from tetrarch.cli.options import effective, take_options, with_options

__all__ = [
    "app",
    "completion",
    "config",
    "cpu_models",
    "disk_check",
    "disk_convert",
    "disk_create",
    "disk_info",
    "disk_resize",
    "doctor",
    "engines",
    "export_ova",
    "image_build",
    "image_import",
    "image_info",
    "image_kernel",
    "image_ls",
    "image_pull",
    "image_rm",
    "import_firecracker",
    "import_libvirt",
    "import_ova",
    "import_qemu",
    "import_vmx",
    "man",
    "root",
    "run",
    "symbols",
]

app = typer.Typer(
    help="Virtual machines for x86-64 Linux guests, with or without hardware virtualization.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
image_app = typer.Typer(
    help="Guests to run: fetch, build, list, remove.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(image_app, name="image")
disk_app = typer.Typer(
    help="Disk images: make, look at, check, copy, resize.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(disk_app, name="disk")

ImageName = Annotated[
    str,
    typer.Argument(
        metavar="[NAME]",
        help="debian (cloud kernel), debian-amd64, debian-rt, or a linux-image package.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from tetrarch import __version__

        print(f"tetrarch {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Virtual machines for x86-64 Linux guests, with or without hardware virtualization."""


@app.command()
@with_options
def run(**typed: Any) -> int:
    """Run a guest; without --kernel, a Debian kernel to a shell.

    Exit codes: 0 the guest powered off, reset itself or was left; 1 an error of ours;
    2 bad usage; 3 the guest crashed; 124 the timeout passed. With --debug-exit the
    odd codes are the guest's: 4 an error of ours, 6 the guest crashed.
    """
    from tetrarch.cli.run import run_guest

    return run_guest(*take_options(typed))


import_app = typer.Typer(
    help="Make a file for --config of what another monitor runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(import_app, name="import")
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE.toml", help="[default: standard output]"),
]


@import_app.command("qemu")
def import_qemu(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE | -- qemu-system-x86_64 OPTION...",
            help="A command line of QEMU, or a file or shell script that has one.",
        ),
    ],
    output: Output = None,
) -> None:
    """Import a command line of QEMU. What cannot be carried over is named, a line each."""
    from tetrarch.cli.imports import qemu

    qemu(words, output)


@import_app.command("firecracker")
def import_firecracker(
    path: Annotated[Path, typer.Argument(metavar="FILE.json", help="As for its --config-file.")],
    output: Output = None,
) -> None:
    """Import a Firecracker configuration. What cannot be carried over is named, a line each."""
    from tetrarch.cli.imports import firecracker

    firecracker(path, output)


@import_app.command("libvirt")
def import_libvirt(
    path: Annotated[Path, typer.Argument(metavar="DOMAIN.xml", help="From virsh dumpxml.")],
    output: Output = None,
) -> None:
    """Import a libvirt domain. What cannot be carried over is named, a line each."""
    from tetrarch.cli.imports import libvirt

    libvirt(path, output)


@import_app.command("ova")
def import_ova(
    path: Annotated[Path, typer.Argument(metavar="FILE.ova", help="Or FILE.ovf beside its disks.")],
    output: Output = None,
    disks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where its disks are made [default: beside the output, or here]."
        ),
    ] = None,
    image_format: Annotated[
        str, typer.Option("--format", metavar="raw|qcow2", help="What its disks are to be.")
    ] = "qcow2",
) -> None:
    """Import an appliance, with its disks. What cannot be carried over is named, a line each."""
    from tetrarch.cli.imports import ova

    ova(path, output, disks, image_format)


@import_app.command("vmx")
def import_vmx(
    path: Annotated[Path, typer.Argument(metavar="FILE.vmx", help="Of Workstation or ESXi.")],
    output: Output = None,
) -> None:
    """Import a virtual machine of VMware's. What cannot be carried over is named, a line each."""
    from tetrarch.cli.imports import vmx

    vmx(path, output)


export_app = typer.Typer(
    help="Make of a machine what other monitors take.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(export_app, name="export")


@export_app.command("ova")
def export_ova(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="MACHINE", help="FILE.toml, FILE.vmx, or the NAME of an installed disk."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.ova", help="The appliance to make.")
    ],
) -> None:
    """Export a machine and its disks as an appliance. What is not in it is named, a line each."""
    from tetrarch.cli.imports import export

    export(path, output)


@app.command()
@with_options
def config(**typed: Any) -> int:
    """Show the configuration that tetrarch run would take, with where each value came from.

    Options are those of run. What is printed is a file for --config that means the same.
    """
    from tetrarch.cli.config import show_config

    return show_config(effective(typed))


@app.command()
def engines(json: Json = False) -> None:
    """Show what can run guests on this host, and why the rest cannot."""
    from tetrarch.cli.reports import show_engines

    show_engines(json)


@app.command()
def cpu_models(json: Json = False) -> None:
    """List the CPU models for --cpu, and what each engine of this host lacks for them."""
    from tetrarch.cli.cpu_models import show_cpu_models

    show_cpu_models(json)


@app.command()
def doctor(json: Json = False) -> int:
    """Explain what this host has for virtual machines, and how to mend what it lacks.

    The exit code is 0 where some engine can run, 1 where none can.
    """
    from tetrarch.cli.doctor import show_doctor

    return show_doctor(json)


@app.command()
def symbols(
    names: Annotated[
        Path,
        typer.Argument(metavar="KALLSYMS", help="/proc/kallsyms of the guest, or a System.map."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file for gdb.")
    ],
    kernel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The guest's vmlinuz: lets gdb unwind its stack."),
    ] = None,
) -> None:
    """Make a symbol file for gdb of a guest's Linux kernel; docs/gdb.md."""
    from tetrarch.cli.symbols import make_symbols

    make_symbols(names, output, kernel)


add_machine_commands(app)


@app.command()
def man(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Is made if need be.")],
) -> None:
    """Write the man pages of all commands: man -M DIR tetrarch shows them."""
    from tetrarch.cli.man import write_pages

    write_pages(app, directory)


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="Which shell.")],
) -> None:
    """Print what makes a shell complete commands, options and names of machines.

    For bash: source <(tetrarch completion bash)
    """
    from tetrarch.cli.completion import show_script

    show_script(shell)


@image_app.command("pull")
def image_pull(name: ImageName = "debian", json: Json = False) -> None:
    """Fetch the newest version by apt, without root, and build the guest."""
    from tetrarch.cli.images import pull

    pull(name, json)


@image_app.command("ls")
def image_ls(json: Json = False) -> None:
    """List the cached guests, and the disks that were built."""
    from tetrarch.cli.images import show

    show(json)


@image_app.command("info")
def image_info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As image ls names it.")],
    json: Json = False,
) -> None:
    """Show what a disk that was built is, or a cached guest: files and packages."""
    from tetrarch.cli.images import info

    info(name, json)


@image_app.command("rm")
def image_rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As image ls names it.")],
    json: Json = False,
) -> None:
    """Remove a disk that was built; or a guest from the cache, with what no other needs."""
    from tetrarch.cli.images import remove

    remove(name, json)


@image_app.command("kernel")
def image_kernel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A disk, as image ls names it.")],
    json: Json = False,
) -> None:
    """Let a disk start with the newest kernel that is installed on it, after an upgrade there."""
    from tetrarch.cli.images import take_kernel

    take_kernel(name, json)


@image_app.command("build")
def image_build(
    name: ImageName = "debian",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the initramfs there [default: the cache]."),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Files to lay over it; needs --output."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Build a disk of that size: a whole Debian 12."),
    ] = None,
    called: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The disk's name [default: debian]."),
    ] = None,
    hostname: Annotated[
        str | None, typer.Option(metavar="NAME", help="[default: the disk's name]")
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="NAME", help="A user beside root, who may use sudo.")
    ] = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.pub", help="Who may log in by ssh [default: ~/.ssh/id_*.pub]; repeatable."
        ),
    ] = None,
    package: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One more package; repeatable.")
    ] = None,
    packages_from: Annotated[
        Path | None,
        typer.Option(
            metavar="disk.json", help="Those of a disk that was built, in the same versions."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Build a guest: with --size a disk with Debian 12 on it, by mmdebstrap.

    Without --size the initramfs of a cached guest, from its packages, without network.
    """
    from tetrarch.cli.images import build, build_disk

    if size is None:
        build(name, output, overlay, json)
    else:
        build_disk(
            name,
            size,
            called=called,
            hostname=hostname,
            user=user,
            ssh_keys=ssh_key,
            packages=package,
            packages_from=packages_from,
            as_json=json,
        )


@image_app.command("import")
def image_import(
    source: Annotated[
        str, typer.Argument(metavar="oci:DIR[:TAG]", help="A container image, as skopeo writes it.")
    ],
    size: Annotated[str, typer.Option(metavar="SIZE", help="Of the disk [default: 2G].")] = "2G",
    called: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The disk's name [default: DIR's]."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a disk of a container image: its layers, the default guest's kernel, an agent."""
    from tetrarch.cli.images import import_disk

    import_disk(source, size, called, json)


DiskImage = Annotated[Path, typer.Argument(metavar="IMAGE", help="A file or block device.")]
GivenFormat = Annotated[
    str | None,
    typer.Option("--format", metavar="raw|qcow2|vmdk", help="[default: by its first bytes]"),
]
NewFormat = Annotated[
    str | None,
    typer.Option("--format", metavar="raw|qcow2|vmdk", help="[default: by its name, else raw]"),
]


@disk_app.command("create")
def disk_create(
    path: Annotated[Path, typer.Argument(metavar="IMAGE", help="The file to make.")],
    size: Annotated[
        str | None,
        typer.Argument(metavar="[SIZE]", help="8G, 512M or bytes [default: the backing file's]."),
    ] = None,
    image_format: NewFormat = None,
    backing: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="An image under it, relative to the new one's folder."),
    ] = None,
    backing_format: Annotated[
        str | None, typer.Option(metavar="raw|qcow2|vmdk", help="[default: by its first bytes]")
    ] = None,
    cluster_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of qcow2 [default: 64K].")
    ] = None,
) -> None:
    """Make a disk image."""
    from tetrarch.cli.disks import create

    create(path, size, image_format, backing, backing_format, cluster_size)


@disk_app.command("info")
def disk_info(path: DiskImage, image_format: GivenFormat = None, json: Json = False) -> None:
    """Show what an image is. It may be in use."""
    from tetrarch.cli.disks import show

    show(path, image_format, json)


@disk_app.command("check")
def disk_check(
    path: DiskImage,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    json: Json = False,
) -> int:
    """Check a qcow2 image's refcounts.

    Exit codes, as qemu-img check has them: 0 nothing is wrong; 2 errors, data may be lost;
    3 clusters are lost space. 1 is an error of ours.
    """
    from tetrarch.cli.disks import check

    return check(path, repair, json)


@disk_app.command("convert")
def disk_convert(
    source: DiskImage,
    target: Annotated[Path, typer.Argument(metavar="NEW", help="The file to make.")],
    image_format: NewFormat = None,
    source_format: Annotated[
        str | None, typer.Option(metavar="raw|qcow2|vmdk", help="[default: by its first bytes]")
    ] = None,
    subformat: Annotated[
        str | None,
        typer.Option(
            metavar="monolithicSparse|streamOptimized", help="Of vmdk [default: the first]."
        ),
    ] = None,
) -> None:
    """Copy a disk, with its backing files, into a new image."""
    from tetrarch.cli.disks import convert

    convert(source, target, image_format, source_format, subformat)


@disk_app.command("resize")
def disk_resize(
    path: DiskImage,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="8G, or +2G.")],
    image_format: GivenFormat = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="A smaller size is meant: the end is lost.")
    ] = False,
) -> None:
    """Give an image's disk another size. It must not be in use."""
    from tetrarch.cli.disks import resize

    resize(path, size, image_format, shrink)
