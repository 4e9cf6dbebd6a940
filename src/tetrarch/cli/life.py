"""What the commands do with machines that run."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tetrarch._files import open_regular, write_all
from tetrarch.agent.command import run_here
from tetrarch.cli.failure import FAILURE, in_one_line, report_error
from tetrarch.errors import ConfigError, HostError, TetrarchError
from tetrarch.registry import About, machines
from tetrarch.registry.claim import check_name, log_path
from tetrarch.registry.listing import alive
from tetrarch.remote import RemoteMachine, connect
from tetrarch.remote.machine import is_paused, replays

__all__ = [
    "copy",
    "each",
    "execute",
    "show_log",
    "show_machines",
    "stop",
    "take_screenshot",
    "use_guestinfo",
]

#: A machine that does not answer is listed all the same.
_ANSWER_S = 2.0
_ASKED_AT_ONCE = 16
_FOLLOW_S = 0.2
#: Where a machine's name is, docker's and scp's way.
_IN_GUEST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*):(.*)", re.DOTALL)


def show_machines(as_json: bool, names_alone: bool) -> None:
    found = machines()
    if names_alone:
        print("".join(f"{about.name}\n" for about in found), end="")
        return
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        asked = list(pool.map(_asked, found))
    # What has ended since is gone.
    rows = [(about, state) for about, state in asked if state]
    if as_json:
        print(json.dumps([_as_json(*row) for row in rows], indent=2, default=os.fspath))
        return
    heads = ("NAME", "STATE", "PROCESS", "ENGINE", "CPUS", "MEMORY", "UP", "GUEST")
    lines = [heads, *(_row(about, state) for about, state in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _asked(about: About) -> tuple[About, str]:
    """With the CPUs that are there now, and the state as QMP names it, which is empty where the
    machine has ended meanwhile."""
    if not about.ready:
        return about, "starting"
    vm = RemoteMachine(about)
    try:
        state = vm.execute("query-status", timeout=_ANSWER_S)["status"]
        cpus = len(vm.execute("query-cpus-fast", timeout=_ANSWER_S))
        return about.model_copy(update={"cpus": cpus}), str(state)
    except (TetrarchError, TimeoutError):
        return about, "no answer" if alive(about.name) else ""


def _as_json(about: About, state: str) -> dict[str, Any]:
    row = about.model_dump(exclude={"ready", "sockets", "networks", "socket_folder"})
    return {**row, "state": state, "up_s": round(time.time() - about.started, 3)}


def _row(about: About, state: str) -> tuple[str, ...]:
    return (
        about.name,
        state,
        str(about.pid),
        about.engine or "-",
        str(about.cpus or "-"),
        f"{about.memory >> 20}M" if about.memory else "-",
        _duration(time.time() - about.started),
        in_one_line(about.guest) or "-",
    )


def _duration(seconds: float) -> str:
    """In its two largest units."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])


def each(names: Sequence[str], act: Callable[[RemoteMachine], object]) -> int:
    """Does it with all of them, side by side, whatever comes of one; the exit code."""

    def one(name: str) -> BaseException | None:
        try:
            act(connect(name))
        except Exception as error:
            return error
        return None

    if len(names) == 1:
        act(connect(names[0]))
        return 0
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        errors = [error for error in pool.map(one, names) if error is not None]
    for error in errors:
        report_error(error)
    return FAILURE if errors else 0


def stop(machine: RemoteMachine, grace: float) -> None:
    heard = not replays(machine)
    if not machine.stop(grace) and heard:
        print(
            f"tetrarch: {machine.name} did not switch itself off in {grace:g} s, and was ended",
            file=sys.stderr,
        )


def execute(
    name: str, command: Sequence[str], env: Sequence[str], directory: str, wait: float
) -> int:
    if not command:
        raise ConfigError("there is no command", mend=f"write tetrarch exec {name} -- COMMAND")
    for entry in env:
        if entry.find("=") < 1:
            raise ConfigError(f"--env: {entry!r} sets nothing", mend="write NAME=VALUE")
    with _guest_of(name).agent(wait) as stream:
        return run_here(stream, command, environment=env, directory=directory)


def copy(source: str, target: str, wait: float) -> None:
    if not source or not target:
        # As a path it would be the directory where the command was typed.
        raise ConfigError("an empty path names nothing", mend="name a file or a directory")
    here, there = _IN_GUEST.fullmatch(source), _IN_GUEST.fullmatch(target)
    if (here is None) == (there is None):
        raise ConfigError(
            "one of the two is to be a guest's", mend="write NAME:PATH for it, the other as PATH"
        )
    if there is not None:
        _guest_of(there[1]).copy_in(source, there[2], timeout=wait)
    elif here is not None:
        left_out = _guest_of(here[1]).copy_out(here[2], Path(target), timeout=wait)
        for link in left_out:
            what = in_one_line(f"{link} leads out of what was copied: left out")
            print(f"tetrarch: {what}", file=sys.stderr)


def use_guestinfo(
    name: str, action: str, key: str | None, value: str | None, as_json: bool
) -> None:
    given = sum(word is not None for word in (key, value))
    if (wanted := {"list": 0, "get": 1, "set": 2}.get(action)) is None:
        raise ConfigError(f"guestinfo: {action!r} is no action", mend="there are list, get and set")
    if given != wanted:
        words = {"list": "nothing", "get": "KEY", "set": "KEY and VALUE"}[action]
        raise ConfigError(f"guestinfo: {action} takes {words}", mend=f"{given} words were given")
    variables = connect(name).guestinfo
    if key is not None and value is not None:
        variables[key] = value
    elif key is not None:
        try:
            found = variables[key]
        except KeyError:
            raise HostError(
                f"guestinfo.{key} of {name} is not set",
                mend=f"set it: tetrarch guestinfo {name} set {key} VALUE",
            ) from None
        print(json.dumps(found) if as_json else found)
    elif as_json:
        print(json.dumps(dict(variables), indent=2))
    else:
        for variable, text in variables.items():
            print(f"{variable} = {text}")


def _guest_of(name: str) -> RemoteMachine:
    """The machine, for something that its guest is to do."""
    machine = connect(name)
    if is_paused(machine):
        print(f"tetrarch: {name} is paused; tetrarch resume {name} lets it run", file=sys.stderr)
    return machine


def take_screenshot(name: str, file: Path) -> None:
    picture = base64.b64decode(connect(name).execute("x-screen")["png"])
    try:
        write_all(file, picture)
    except OSError as error:
        raise HostError(
            f"{file}: cannot be written: {error.strerror}", mend="name another file"
        ) from error


def show_log(name: str, follow: bool) -> None:
    check_name(name)
    path = log_path(name)
    try:
        log = open_regular(path)
    except FileNotFoundError:
        raise HostError(
            f"there is no log of {name}", mend="machines in the background write one"
        ) from None
    try:
        for data in _log_parts(name, log, follow):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    finally:
        os.close(log)


def _log_parts(name: str, descriptor: int, follow: bool) -> Iterator[bytes]:
    while True:
        lives = alive(name)  # before what it wrote last is read
        while data := os.read(descriptor, 1 << 16):
            yield data
        if not follow or not lives:
            return
        time.sleep(_FOLLOW_S)
