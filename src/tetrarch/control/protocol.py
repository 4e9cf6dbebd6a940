"""The messages of QMP (QEMU, docs/interop/qmp-spec.rst), as they are written and checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tetrarch._native import __version__
from tetrarch.control.json_stream import NotJson

__all__ = [
    "ErrorClass",
    "QmpError",
    "Request",
    "encode",
    "error_reply",
    "event_message",
    "greeting",
    "parse_request",
    "reply",
    "version",
    "wrong_argument",
]

ErrorClass = Literal["GenericError", "CommandNotFound", "DeviceNotFound", "DeviceNotActive"]
Message = dict[str, Any]


class QmpError(Exception):
    """The answer to a command that cannot be."""

    def __init__(self, description: str, error_class: ErrorClass = "GenericError") -> None:
        super().__init__(description)
        self.error_class = error_class


class Request(BaseModel):
    """One command."""

    model_config = ConfigDict(strict=True, extra="forbid")

    execute: str
    arguments: dict[str, Any] = {}
    id: Any = None

    @property
    def tag(self) -> Message:
        """What its reply begins with: also a null is an id."""
        return {"id": self.id} if "id" in self.model_fields_set else {}


def encode(message: Message) -> bytes:
    """On the wire: ASCII, ended by CRLF."""
    return json.dumps(message).encode("ascii") + b"\r\n"


def version() -> Message:
    """VersionInfo (qapi/control.json); the numbers are Tetrarch's own."""
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    numbers = {"major": major, "minor": minor, "micro": micro}
    return {"qemu": numbers, "package": f"tetrarch {__version__}"}


def greeting() -> Message:
    return {"QMP": {"version": version(), "capabilities": []}}


def reply(value: object) -> Message:
    """A command that gives nothing gives an empty object."""
    return {"return": {} if value is None else value}


def error_reply(error: QmpError) -> Message:
    # Names of files may hold line ends.
    return {"error": {"class": error.error_class, "desc": " ".join(str(error).splitlines())}}


def event_message(name: str, data: Mapping[str, Any], time: float) -> Message:
    """``time`` is in seconds since 1970."""
    seconds, microseconds = divmod(int(time * 1_000_000), 1_000_000)
    message: Message = {"event": name.upper().replace("-", "_")}
    if data:
        message["data"] = dict(data)
    message["timestamp"] = {"seconds": seconds, "microseconds": microseconds}
    return message


def parse_request(text: bytes | NotJson) -> Request:
    """Raises QmpError where it is none."""
    if isinstance(text, NotJson):
        raise QmpError(f"JSON parse error, {text}")
    try:
        value = json.loads(text.decode(), parse_constant=_no_number)
    except ValueError as error:  # also bytes that are no UTF-8, numbers without end
        raise QmpError(f"JSON parse error, {error}") from None
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    try:
        return Request.model_validate(value)
    except ValidationError as error:
        raise _explained(error, _INPUT) from None


def wrong_argument(error: ValidationError) -> QmpError:
    """Names the first argument that is wrong."""
    return _explained(error, _ARGUMENT)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


_Phrases = Mapping[str, Callable[[str], str]]
_INPUT: _Phrases = {
    "missing": lambda name: f"QMP input lacks member '{name}'",
    "extra_forbidden": lambda name: f"QMP input member '{name}' is unexpected",
    "type": lambda name: f"QMP input member '{name}' must be",
}
_ARGUMENT: _Phrases = {
    "missing": lambda name: f"Parameter '{name}' is missing",
    "extra_forbidden": lambda name: f"Parameter '{name}' is unexpected",
    "type": lambda name: f"Invalid parameter type for '{name}', expected:",
}
# Types as JSON names them, by pydantic's names of what went wrong.
_TYPES = {
    "bool_type": "boolean",
    "dict_type": "object",
    "float_type": "number",
    "int_type": "integer",
    "list_type": "array",
    "model_type": "object",
    "string_type": "string",
}


def _explained(error: ValidationError, phrases: _Phrases) -> QmpError:
    first = error.errors(include_url=False, include_context=False)[0]
    name, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind in phrases:
        return QmpError(phrases[kind](name))
    if kind in _TYPES:
        return QmpError(f"{phrases['type'](name)} {_TYPES[kind]}")
    if kind == "literal_error":
        return QmpError(f"Parameter '{name}' does not accept value '{first['input']}'")
    return QmpError(f"Parameter '{name}': {first['msg']}")
