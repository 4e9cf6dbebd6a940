"""A command of QMP as a function: its keywords are the command's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tetrarch._native import EngineError, GuestMemoryError
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError, wrong_argument
from tetrarch.errors import TetrarchError

__all__ = ["COMMANDS", "Command", "command"]

_CONFINED = (
    "this machine is confined to what it was started with: start it with --allow PATH, or hand a"
    " descriptor over (tetrarch attach-disk, add-fd, getfd)"
)
_STRICT = ConfigDict(strict=True, extra="forbid")
_OPEN = ConfigDict(strict=True, extra="allow")
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Command:
    name: str
    function: Callable[..., object]
    arguments: type[BaseModel]

    def execute(self, monitor: Monitor, arguments: Mapping[str, Any]) -> object:
        """What the command returns. Raises QmpError."""
        try:
            checked = self.arguments.model_validate(arguments)
        except ValidationError as error:
            raise wrong_argument(error) from None
        given = {name: getattr(checked, name) for name in self.arguments.model_fields}
        try:
            return self.function(monitor, **given, **(checked.model_extra or {}))
        except (TetrarchError, EngineError, GuestMemoryError, OSError, ValueError) as error:
            if monitor.machine.confined and "permission denied" in str(error).lower():
                cause = error.cause if isinstance(error, TetrarchError) else error
                raise QmpError(f"{cause}; {_CONFINED}") from error
            raise QmpError(str(error)) from error


#: All of them, once tetrarch.control.commands is imported.
COMMANDS: dict[str, Command] = {}


def command(name: str, *, open_ended: bool = False) -> Callable[[Function], Function]:
    """Makes a command of a function of a ``Monitor``.

    Its other parameters are keywords: arguments as they are typed, optional where they have
    defaults. ``node_name`` is the argument ``node-name``, ``id_`` is ``id``. An ``open_ended``
    one gets what else it is given as it is.
    """

    def add(function: Function) -> Function:
        fields: dict[str, Any] = {}
        for parameter in list(inspect.signature(function, eval_str=True).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            alias = parameter.name.rstrip("_").replace("_", "-")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = parameter.annotation, Field(default, alias=alias)
        config = _OPEN if open_ended else _STRICT
        model = create_model(name, __config__=config, **fields)
        COMMANDS[name] = Command(name, function, model)
        return function

    return add
