"""Warnings of a machine: through Python's logging, with the machine's name."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

__all__ = ["MachineLog"]


class MachineLog(logging.LoggerAdapter[logging.Logger]):
    """The logger "tetrarch"; each message begins with the machine's name."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger("tetrarch"), {"machine": name})
        self._machine = name

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        kwargs["extra"] = self.extra
        return f"{self._machine}: {msg}", kwargs
