"""A command of QMP as a function: its keywords are the command's arguments."""

from __future__ import annotations

import inspect
import re
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
_FORBIDDEN = re.compile("permission denied|operation not permitted", re.IGNORECASE)
_STRICT = ConfigDict(strict=True, extra="forbid")
_OPEN = ConfigDict(strict=True, extra="allow")
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Command:
    name: str
    function: Callable[..., object]
    arguments: type[BaseModel]
    open_end: str | None
    """The keyword that gets arguments which are none of these, by their names."""

    def execute(self, monitor: Monitor, arguments: Mapping[str, Any]) -> object:
        """What the command returns. Raises QmpError."""
        try:
            checked = self.arguments.model_validate(arguments)
        except ValidationError as error:
            raise wrong_argument(error) from None
        given = {name: getattr(checked, name) for name in self.arguments.model_fields}
        try:
            if self.open_end is not None:
                given[self.open_end] = checked.model_extra or {}
            return self.function(monitor, **given)
        except (TetrarchError, EngineError, GuestMemoryError, OSError, ValueError) as error:
            said = _said(error)
            if monitor.machine.confined and _FORBIDDEN.search(said):
                cause = error.cause if isinstance(error, TetrarchError) else said
                raise QmpError(f"{cause}; {_CONFINED}") from error
            raise QmpError(said) from error


def _said(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    # Without its number; a file that was opened by its descriptor has no name.
    return (
        f"{error.filename}: {error.strerror}" if isinstance(error.filename, str) else error.strerror
    )


#: All of them, once tetrarch.control.commands is imported.
COMMANDS: dict[str, Command] = {}


def command(name: str, *, open_end: str | None = None) -> Callable[[Function], Function]:
    """Makes a command of a function of a ``Monitor``.

    Its other parameters are keywords: arguments as they are typed, optional where they have
    defaults. ``node_name`` is the argument ``node-name``, ``id_`` is ``id``. The one named by
    ``open_end`` gets what else there is, as it is.
    """

    def add(function: Function) -> Function:
        fields: dict[str, Any] = {}
        for parameter in list(inspect.signature(function, eval_str=True).parameters.values())[1:]:
            if parameter.name == open_end:
                continue
            alias = parameter.name.rstrip("_").replace("_", "-")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = parameter.annotation, Field(default, alias=alias)
        config = _STRICT if open_end is None else _OPEN
        model = create_model(name, __config__=config, **fields)
        COMMANDS[name] = Command(name, function, model, open_end)
        return function

    return add
