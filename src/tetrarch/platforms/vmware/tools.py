"""What the host knows of the guest's tools, and asks of them: open-vm-tools' service, ``vmtoolsd``.

The tools say what they are by RPCI, and do what TCLO asks (open-vm-tools, services/vmtoolsd and
services/plugins).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from tetrarch.errors import StateError
from tetrarch.platforms.vmware.guestinfo import PREFIX, GuestInfo
from tetrarch.platforms.vmware.rpci import RpcRefused
from tetrarch.platforms.vmware.tclo import Tclo, ToolsError

__all__ = ["Tools", "ToolsStatus"]

_LOG: Final = logging.getLogger(__name__)
#: Lines of the guest's that go to the log in a minute; the rest is lost.
_LINES_A_MINUTE: Final = 100
_LONGEST_LINE: Final = 512
#: Facts and capabilities that a guest can leave here.
_MOST: Final = 256
_LONGEST: Final = 4096

#: The option of the tools, and its bit in what GETGUIOPTIONS says (VMWARE_GUI_SYNC_TIME,
#: lib/include/vmware/guestrpc/tclodefs.h).
SYNCTIME: Final = "synctime"
GUI_SYNC_TIME: Final = 0x400
#: Once and only forward.
_CATCH_UP: Final = "Time_Synchronize 0"

#: Numbers of ``SetGuestInfo`` whose value is a line of text (lib/include/guestInfo.h).
_FACTS: Final = {
    "1": "hostname",
    "4": "build",
    "5": "os",
    "6": "os-family",
    "7": "uptime",
    "11": "os-detailed",
}


@dataclass(frozen=True)
class ToolsStatus:
    """The guest's tools as they are now."""

    running: bool
    heartbeat_s: float | None
    """Seconds since they came last to ask what there is to do."""
    version: str
    """As VMware counts: 12352 is 12.2.0, in steps of 1024, 32 and 1. Empty: they have not said."""
    capabilities: Mapping[str, str]
    facts: Mapping[str, str]
    """Of the guest: ``hostname``, ``os``, ``uptime`` and others, as far as it has said."""
    keeps_time: bool = False
    """The tools set the guest's clock by the host's once a minute: ``vmware-toolbox-cmd timesync
    enable`` in the guest."""


@dataclass
class _Said:
    version: str = ""
    capabilities: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


class Tools:
    """What is asked of the guest waits for its tools, and raises ToolsError where they are not
    there, do not answer or refuse."""

    def __init__(self, guestinfo: GuestInfo) -> None:
        self._guestinfo = guestinfo
        self._said = _Said()
        self._keeps_time = False
        self._minute = (0.0, 0)
        self.tclo = Tclo(self._came)

    @property
    def status(self) -> ToolsStatus:
        age = self.tclo.last_seen
        said = self._said
        capabilities, facts = dict(said.capabilities), dict(said.facts)
        return ToolsStatus(
            age is not None, age, said.version, capabilities, facts, self._keeps_time
        )

    def halt(self, timeout: float = 30.0) -> None:
        """The guest shuts down and switches off. Raises ToolsError."""
        self.tclo.ask("OS_Halt", timeout)

    def reboot(self, timeout: float = 30.0) -> None:
        self.tclo.ask("OS_Reboot", timeout)

    def synchronize_time(self, timeout: float = 30.0) -> None:
        """The guest sets its clock, now, to the host's."""
        self.tclo.ask("Time_Synchronize 1", timeout)

    def catch_up(self) -> None:
        """The guest's clock has stood with the machine: tools that are there set it, and never
        back."""
        with suppress(ToolsError):
            self.tclo.post(_CATCH_UP)

    def set_resolution(self, width: int, height: int, timeout: float = 30.0) -> None:
        """Of the guest's screen, where a program there draws one."""
        self.tclo.ask(f"Resolution_Set {width} {height}", timeout)

    def requests(self) -> Mapping[str, Callable[[str], str]]:
        """What the guest's programs may ask for by RPCI."""
        return {
            "info-get": self._info_get,
            "info-set": self._info_set,
            "log": self._log,
            "SetGuestInfo": self._fact,
            "vmx.set_option": self._set_option,
            "tools.set.version": self._version,
            "tools.set.versiontype": self._version,
            "tools.capability.*": lambda rest: "",
            "tools.os.statechange.*": lambda rest: "",
            "vmx.capability.*": lambda rest: "",
        } | {
            f"tools.capability.{name}": self._capability(name)
            for name in (
                "auto_upgrade",
                "guest_conf_directory",
                "guest_temp_directory",
                "hgfs_server",
                "printer_set",
                "resolution_set",
                "resolution_server",
                "statechange",
                "softpowerop_retry",
                "update_service",
            )
        }

    def _came(self) -> None:
        """As VMware does when the service has started, or goes on in a restored machine
        (services/plugins/timeSync/timeSync.c)."""
        for text in (
            "Capabilities_Register",
            # What is less than a second slow or fast is slewed.
            "Set_Option time.synchronize.tools.slewCorrection 1",
            self._synctime,
            # From now on also at once when it is switched on.
            "Set_Option time.synchronize.tools.enable 1",
            _CATCH_UP,
            "OS_PowerOn",
        ):
            with suppress(ToolsError):  # it has gone again
                self.tclo.post(text)

    @property
    def _synctime(self) -> str:
        return f"Set_Option {SYNCTIME} {int(self._keeps_time)}"

    def gui_options(self) -> int:
        """What GETGUIOPTIONS says."""
        return GUI_SYNC_TIME if self._keeps_time else 0

    def _set_option(self, rest: str) -> str:
        """``synctime OLD NEW``: the guest's administrator switches it; it outlives resets."""
        name, _, values = rest.strip().partition(" ")
        new = values.rpartition(" ")[2]
        if name != SYNCTIME or new not in ("0", "1"):
            raise RpcRefused("Unknown option")
        self._keeps_time = new == "1"
        with suppress(ToolsError):
            self.tclo.post(self._synctime)
        return ""

    def _info_get(self, rest: str) -> str:
        name = rest.strip()
        value = self._guestinfo.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if value is None:
            raise RpcRefused("No value found")
        return value

    def _info_set(self, rest: str) -> str:
        name, _, value = rest.lstrip().partition(" ")
        if not name.startswith(PREFIX):
            raise RpcRefused("Permission denied")
        try:
            self._guestinfo[name.removeprefix(PREFIX)] = value
        except ValueError as error:
            raise RpcRefused(str(error)) from None
        return ""

    def _log(self, rest: str) -> str:
        begun, lines = self._minute
        now = time.monotonic()
        if now - begun > 60:
            begun, lines = now, 0
        self._minute = begun, lines + 1
        if lines < _LINES_A_MINUTE:
            text = rest[:_LONGEST_LINE].encode(errors="replace").decode(errors="replace")
            _LOG.info("guest: %s", "".join(c if c.isprintable() else "?" for c in text))
        return ""

    def _fact(self, rest: str) -> str:
        number, _, value = rest.strip().partition(" ")
        if (name := _FACTS.get(number)) is not None:
            self._said.facts[name] = value.strip()[:_LONGEST]
        return ""

    def _version(self, rest: str) -> str:
        self._said.version = rest.split(" ")[0][:16]
        return ""

    def _capability(self, name: str) -> Callable[[str], str]:
        def keep(rest: str) -> str:
            self._said.capabilities[name] = rest[:_LONGEST]
            return ""

        return keep

    def reset(self) -> None:
        self._said = _Said()

    def save(self) -> dict[str, Any]:
        said = self._said
        return {
            "device": "vmware-tools",
            "version": 1,
            "tools": said.version,
            "capabilities": dict(said.capabilities),
            "facts": dict(said.facts),
            "keeps_time": self._keeps_time,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        tables = [state.get(name) for name in ("capabilities", "facts")]
        version, keeps_time = state.get("tools"), state.get("keeps_time", False)
        known = isinstance(version, str) and isinstance(keeps_time, bool)
        if not known or not all(_is_texts(table) for table in tables):
            raise StateError("saved state of 'vmware-tools' is none", mend="save it again")
        self._said = _Said(str(version), *(dict(table) for table in tables if table is not None))
        self._keeps_time = bool(keeps_time)


def _is_texts(table: object) -> bool:
    return (
        isinstance(table, dict)
        and len(table) <= _MOST
        and all(
            isinstance(text, str) and len(text) <= _LONGEST
            for pair in table.items()
            for text in pair
        )
    )
