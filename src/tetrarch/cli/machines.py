"""The commands for machines that run, and their options; what they do is in ``life.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tetrarch.cli.options import COMMAND_WORD

__all__ = [
    "add_machine_commands",
    "attach_cpu",
    "attach_disk",
    "console",
    "cp",
    "detach",
    "exec_",
    "guestinfo",
    "kill",
    "logs",
    "pause",
    "ps",
    "reset",
    "resume",
    "screenshot",
    "snapshot",
    "stat",
    "stop",
]


def _names(incomplete: str) -> list[str]:
    from tetrarch.registry import machines

    return [about.name for about in machines() if about.name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="As ps names it.", autocompletion=_names)]
Names = Annotated[
    list[str], typer.Argument(metavar="NAME", help="As ps names them.", autocompletion=_names)
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Wait = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0, help="How long the guest may take to boot."),
]


def ps(
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names alone.")] = False,
) -> None:
    """List the machines of this user that run: those in the background, and those with a --name."""
    from tetrarch.cli.life import show_machines

    show_machines(json, quiet)


def stop(
    names: Names,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="What the guest has to switch itself off."),
    ] = 90,
) -> int:
    """Press the power button; end the machine if its guest has not switched itself off in time."""
    from tetrarch.cli.life import each, stop

    return each(names, lambda vm: stop(vm, grace))


def kill(names: Names) -> int:
    """End machines at once, as pulling their plugs would."""
    from tetrarch.cli.life import each

    return each(names, lambda vm: vm.kill())


def pause(names: Names) -> int:
    """Bring machines to rest between two instructions; their clocks stand."""
    from tetrarch.cli.life import each

    return each(names, lambda vm: vm.pause())


def resume(names: Names) -> int:
    """Let machines run on that were paused."""
    from tetrarch.cli.life import each

    return each(names, lambda vm: vm.resume())


def reset(names: Names) -> int:
    """Reset machines, as their reset buttons would: their guests start anew."""
    from tetrarch.cli.life import each

    return each(names, lambda vm: vm.reset())


def console(
    name: Name,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Watch: what is typed stays here.")
    ] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Show what the guest has said so far, and end.")
    ] = False,
    tail: Annotated[
        int | None,
        typer.Option(metavar="LINES", min=0, help="Show the last lines of that, and end."),
    ] = None,
) -> None:
    """Attach to the serial console, with what the guest has said so far. Ctrl-] detaches.

    Any number of terminals may be attached; all of them but those with --read-only type.
    """
    from tetrarch.cli.attach import attach, show_history

    if history or tail is not None:
        show_history(name, tail)
    else:
        attach(name, read_only)


def exec_(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME -- COMMAND...", help="As ps names it; COMMAND.", autocompletion=_names
        ),
    ],
    command: Annotated[list[str] | None, typer.Option(COMMAND_WORD, hidden=True)] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the command; repeatable.")
    ] = None,
    directory: Annotated[
        str, typer.Option(metavar="DIR", help="Where it runs [default: root's home].")
    ] = "",
    wait: Wait = 60,
) -> int:
    """Run a command in a guest, as if it ran here; the exit code is the command's.

    The guest needs the agent: Debian's guests and disks of tetrarch image have it.
    """
    from tetrarch.cli.life import execute

    return execute(name, command or [], env or [], directory, wait)


def cp(
    source: Annotated[str, typer.Argument(metavar="[NAME:]SOURCE", help="What is copied.")],
    target: Annotated[
        str, typer.Argument(metavar="[NAME:]TARGET", help="A directory, or the copy.")
    ],
    wait: Wait = 60,
) -> None:
    """Copy a file or a directory into a guest or out of one.

    A TARGET that is a directory gets it under its name. A path of the host that holds a colon
    is written ./PATH.
    """
    from tetrarch.cli.life import copy

    copy(source, target, wait)


def snapshot(
    name: Name,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Is replaced when the new one is whole.")
    ],
    track: Annotated[
        bool, typer.Option("--track", help="Note what is written then: it is to be a parent.")
    ] = False,
    parent: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save only what was written since that one."),
    ] = None,
    end: Annotated[
        bool, typer.Option("--end", help="The machine ends at that moment, its disks as saved.")
    ] = False,
) -> None:
    """Save a machine to a file, from which tetrarch run --restore goes on. It runs on itself."""
    from tetrarch.machine.lifecycle import Phase
    from tetrarch.remote import connect

    vm = connect(name)
    runs = end and vm.phase is Phase.RUNNING
    if runs:
        vm.pause()
    try:
        vm.save(file, parent=parent, track=track)
    except BaseException:
        if runs:
            vm.resume()
        raise
    if end:
        vm.kill()


def screenshot(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="OUT.png", help="Is replaced.")],
) -> None:
    """Write what the screen of a machine with --vga shows to a PNG file."""
    from tetrarch.cli.life import take_screenshot

    take_screenshot(name, file)


def stat(
    name: Name,
    json: Json = False,
    every: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="Again and again, with rates."),
    ] = None,
) -> None:
    """Show what a machine does: exits, translations, faults, I/O, by kind."""
    from tetrarch.cli.stat import show_stat

    show_stat(name, json, every)


def guestinfo(
    name: Name,
    action: Annotated[
        str, typer.Argument(metavar="[list|get|set]", help="What is done.", show_default=True)
    ] = "list",
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="The variable's name, for get and set.")
    ] = None,
    value: Annotated[
        str | None, typer.Argument(metavar="[VALUE]", help='For set; "" takes the variable out.')
    ] = None,
    json: Json = False,
) -> None:
    """Show or set the variables that a guest on --platform vmware shares with its host.

    The guest has them as guestinfo.KEY: vmware-rpctool "info-get guestinfo.KEY".
    """
    from tetrarch.cli.life import use_guestinfo

    use_guestinfo(name, action, key, value, json)


def logs(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="One that runs, or ran.", autocompletion=_names),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the machine ends.")
    ] = False,
) -> None:
    """Show what a machine in the background has reported, also after its end.

    For a guest that crashed the console's last lines are there too.
    """
    from tetrarch.cli.life import show_log

    show_log(name, follow)


def attach_disk(
    name: Name,
    disk: Annotated[
        str,
        typer.Argument(
            metavar="PATH[,OPTION=VALUE]...",
            help="As --disk of run: format=, bus=virtio|nvme|pvscsi, readonly, cache=.",
        ),
    ],
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="What it is called [default: made up].")
    ] = None,
) -> None:
    """Put a disk into a machine that runs, and print the name of its device."""
    from tetrarch.remote import connect

    print(connect(name).attach_disk(disk, name=device))


def attach_cpu(
    name: Name,
    number: Annotated[
        int | None, typer.Argument(metavar="[NUMBER]", help="[default: the first that is not in.]")
    ] = None,
) -> None:
    """Put a CPU into a machine that runs, and print its name.

    The machine was made with --cpus N,max=M, and its guest brings the CPU online.
    """
    from tetrarch.remote import connect

    print(f"cpu{connect(name).plug_vcpu(number)}")


def detach(
    name: Name,
    device: Annotated[
        str, typer.Argument(metavar="DEVICE", help="As attach-disk or attach-cpu printed it.")
    ],
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="What the guest has to give it up.")
    ] = 30,
) -> None:
    """Take a device or a CPU out of a machine when its guest has given it up."""
    from tetrarch.remote import connect

    connect(name).detach(device, timeout=timeout)


_COMMANDS: list[Callable[..., int | None]] = [
    ps,
    stop,
    kill,
    pause,
    resume,
    reset,
    console,
    exec_,
    cp,
    snapshot,
    screenshot,
    stat,
    guestinfo,
    logs,
    attach_disk,
    attach_cpu,
    detach,
]


def add_machine_commands(app: typer.Typer) -> None:
    for command in _COMMANDS:
        app.command(command.__name__.rstrip("_").replace("_", "-"))(command)
