"""The options of ``tetrarch run``: those of a machine, and a few of the command's own.

Names, descriptions and checks are the fields of the models; nothing is said twice.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import typer
from pydantic import BaseModel, BeforeValidator, ConfigDict

from tetrarch.errors import ConfigError
from tetrarch.machine.config import (
    FilePath,
    FilePaths,
    MachineConfig,
    ValueProblem,
    check_options,
    option,
    option_names,
    several,
)

__all__ = [
    "COMMAND_WORD",
    "CommandOptions",
    "Effective",
    "effective",
    "split_command",
    "take_options",
    "with_options",
]

#: How the words behind ``--`` get through the parser, which would take the first for a NAME.
COMMAND_WORD = "--command-word"


# Longer runs need no timeout; far larger numbers overflow the host's clock.
_TIMEOUT_S_MAX = 366 * 24 * 3600.0


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _TIMEOUT_S_MAX:
        raise ValueProblem(f"{value!r} is no time to wait", mend="give seconds above 0")
    return seconds


def _user(value: object) -> str:
    from tetrarch.images.names import user_name

    return user_name(value)


def _host(value: object) -> str:
    from tetrarch.images.names import host_name

    return host_name(value)


Jail = Literal["auto", "off"]


def _jail(value: object) -> object:
    if value not in get_args(Jail):
        raise ValueProblem(f"{value!r} is no jail", mend="there are auto and off")
    return value


Value = TypeVar("Value")
Several: TypeAlias = Annotated[tuple[Value, ...], BeforeValidator(several)]


class CommandOptions(BaseModel):
    """What ``tetrarch run`` takes beside the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: Annotated[float | None, BeforeValidator(_timeout)] = option(
        None, "Stop the guest then; exit code 124.", "SECONDS"
    )
    detach: bool = option(False, "Run it in the background, and print its name.")
    restore: FilePath | None = option(
        None, "A machine that was saved, to go on from there; docs/snapshots.md.", "FILE"
    )
    fresh_identity: bool = option(
        False, "With --restore: go on as another machine than the one that was saved."
    )
    allow_changed_disks: bool = option(False, "With --restore: take disks that have changed since.")
    snapshot: bool = option(
        False, "What the guest writes to its disks is gone at the end; docs/disks.md."
    )
    stats: bool = option(False, "Show counters on standard error at the end.")
    command: Several[str] = ()
    """What stands behind ``--``: words of a command for the guest."""
    user: Annotated[str, BeforeValidator(_user)] = option(
        "", "For cloud-init in the guest: a user, who may use sudo.", "NAME"
    )
    ssh_key: FilePaths = option(
        (), "For cloud-init: who may log in [default: ~/.ssh/id_*.pub]; repeatable.", "FILE.pub"
    )
    hostname: Annotated[str, BeforeValidator(_host)] = option(
        "", "For cloud-init: the guest's name.", "NAME"
    )
    run: Several[str] = option(
        (), "For cloud-init: a shell's command at the first boot; repeatable.", "COMMAND"
    )
    jail: Annotated[Jail, BeforeValidator(_jail)] = option(
        "auto",
        "What the process gives up before the guest runs; docs/confinement.md [default: auto].",
        "auto|off",
    )
    allow: FilePaths = option(
        (), "A path that a jailed machine may open later; repeatable.", "PATH"
    )
    report: bool = option(
        False, "A last line on standard error with status and counters.", name="json"
    )


def with_options(command: Callable[..., int]) -> Callable[..., int]:
    """Gives ``command`` all options as keywords, as they were typed; None was not given."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, keyword, default=None, annotation=annotation)
        for name, annotation in _annotations()
    ]
    signature = inspect.Signature(parameters, return_annotation=int)
    command.__signature__ = signature  # type: ignore[attr-defined]
    return command


def _annotations() -> Iterator[tuple[str, Any]]:
    file = typer.Option(
        metavar="FILE.toml", help="A file with options; those of the command line come on top."
    )
    yield "config", Annotated[str | None, file]
    guest = typer.Argument(
        metavar="[NAME] [-- COMMAND...]",
        help="A disk of image build, a cached guest, or FILE.vmx; COMMAND runs in it, and then it"
        " ends.",
        show_default=False,
    )
    yield "guest", Annotated[str | None, guest]
    yield "command", Annotated[list[str] | None, typer.Option(COMMAND_WORD, hidden=True)]
    reboot = typer.Option("--reboot/--no-reboot", help="Short for --on-reset restart, or end.")
    yield "reboot", Annotated[bool | None, reboot]
    for model in (MachineConfig, CommandOptions):
        for field_name, field in model.model_fields.items():
            if field_name == "command":
                continue
            name = field.alias or field_name
            extra = field.json_schema_extra
            metavar = extra.get("metavar") if isinstance(extra, dict) else None
            if field.annotation is bool:
                both = f"{_spelled(name)}/--no-{_spelled(name)[2:]}"
                yield name, Annotated[bool | None, typer.Option(both, help=field.description)]
            else:
                shown = typer.Option(
                    _spelled(name), metavar=str(metavar or "TEXT"), help=field.description
                )
                many = isinstance(field.default, tuple)
                yield name, Annotated[list[str] | None if many else str | None, shown]


def split_command(arguments: Sequence[str]) -> list[str]:
    """``run NAME -- COMMAND...`` (or ``config``, ``exec``) with each word of COMMAND as an option's
    value."""
    words = list(arguments)
    if words[:1] not in (["run"], ["config"], ["exec"]) or "--" not in words:
        return words
    at = words.index("--")
    return words[:at] + [f"{COMMAND_WORD}={word}" for word in words[at + 1 :]]


class Effective(NamedTuple):
    """The options that count, and where they came from."""

    config: MachineConfig
    command: CommandOptions
    origins: dict[str, str]
    """Of those that are not the default; of the command's with ``run.`` before the name."""


def take_options(typed: dict[str, Any]) -> tuple[MachineConfig, CommandOptions]:
    """The options that count: see ``effective``."""
    return effective(typed)[:2]


def effective(typed: dict[str, Any]) -> Effective:
    """What was typed counts most, then TETRARCH_NAME of the environment, then the file."""
    given = {name: value for name, value in typed.items() if value is not None}
    origins = {name: f"option {_spelling(name)}" for name in given}
    if (reboot := given.pop("reboot", None)) is not None:
        if "on_reset" in given:
            raise ConfigError("--on-reset and --[no-]reboot say the same", mend="give one of them")
        given["on_reset"], origins["on_reset"] = "restart" if reboot else "end", origins["reboot"]
    if (guest := given.pop("guest", None)) is not None:
        if "image" in given or "kernel" in given:
            raise ConfigError(
                f"{guest}, --image and --kernel name a guest each", mend="give one of them"
            )
        if _is_vmx(guest):
            if "config" in given:
                raise ConfigError(
                    f"{guest} and --config name a machine each", mend="give one of them"
                )
            given["config"] = guest
        else:
            given["image"], origins["image"] = guest, "argument"
    machine = {name: given.pop(name) for name in list(given) if name in MachineConfig.model_fields}
    variables = _environment(given, machine)
    file = variables.pop("config", None)
    config, run, sources = _of_file(given.pop("config", file))
    sources |= {name: f"environment {_variable(name)}" for name in variables}
    sources |= {name: origins[name] for name in machine}
    sources |= {f"run.{name}": origins[name] for name in given}
    config = config.updated(variables, lambda name, item: f"{_variable(name)}: " if name else "")
    config = config.updated(machine, _spelled_error)
    return Effective(config, check_options(CommandOptions, run | given, _spelled_error), sources)


def _is_vmx(name: str) -> bool:
    """Whether it names a virtual machine of VMware's."""
    return name.lower().endswith(".vmx")


def _of_file(path: str | None) -> tuple[MachineConfig, dict[str, Any], dict[str, str]]:
    """Machine, command and where each option of them is, of a file if there is one."""
    if path is None:
        return MachineConfig(), {}, {}
    if _is_vmx(path):
        from tetrarch.cli.imports import vmx_machine

        machine = vmx_machine(Path(path))
        return machine, {}, dict.fromkeys(machine.model_fields_set, path)
    from tetrarch.machine.config_file import RUN_TABLE, ConfigFile

    file = ConfigFile.read(Path(path), option_names(CommandOptions))
    run = dict(file.run)
    check_options(CommandOptions, run, file.spelled_run)
    for name in ("ssh_key", "allow"):
        if name in run:
            run[name] = [file.path.parent / str(path) for path in several(run[name])]
    if "restore" in run:
        run["restore"] = file.path.parent / str(run["restore"])
    sources = {name: file.place(name) for name in file.config.model_fields_set}
    return file.config, run, sources | {f"run.{name}": file.place(RUN_TABLE, name) for name in run}


def _environment(given: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, str]:
    """The options that the environment gives and nobody has typed."""
    names = {"config"} | {
        name for name, field in MachineConfig.model_fields.items() if field.default != ()
    }
    if "image" in machine or "kernel" in machine:
        names -= {"image", "kernel"}
    return {
        name: os.environ[_variable(name)]
        for name in sorted(names - given.keys() - machine.keys())
        if os.environ.get(_variable(name))
    }


def _variable(name: str) -> str:
    return f"TETRARCH_{name.upper()}"


def _spelled_error(name: str, item: int | None) -> str:
    return f"{_spelling(name)}: " if name else ""


def _spelling(name: str) -> str:
    return "--" if name == "command" else _spelled(name)


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"
