"""VMware's interface, as its Linux drivers and open-vm-tools use it. See docs/vmware.md.

One file each: the backdoor, what it says of the machine, messages over it, the requests of the
guest and of the host, and the variables that both share.
"""

from __future__ import annotations

from typing import Final

from tetrarch.platforms.platform import Hypercalls, Platform, RegisterPort
from tetrarch.platforms.vmware.backdoor import HIGH_BANDWIDTH_PORT, PORT, Backdoor
from tetrarch.platforms.vmware.balloon import BALLOON_PORT, VmwareBalloon
from tetrarch.platforms.vmware.facts import Facts
from tetrarch.platforms.vmware.guestinfo import GuestInfo
from tetrarch.platforms.vmware.guestlib import GuestLib
from tetrarch.platforms.vmware.identity import Identity
from tetrarch.platforms.vmware.messages import MESSAGE, STRING_MESSAGE, Channels
from tetrarch.platforms.vmware.mouse import VmMouse
from tetrarch.platforms.vmware.rpci import RPCI, Rpci
from tetrarch.platforms.vmware.stolen import StolenTime
from tetrarch.platforms.vmware.tclo import TCLO, ToolsError
from tetrarch.platforms.vmware.tools import Tools, ToolsStatus

__all__ = ["GuestInfo", "Tools", "ToolsError", "ToolsStatus", "VmMouse", "Vmware", "VmwareBalloon"]

#: The leaf where Linux looks for how to call (arch/x86/kernel/cpu/vmware.c), and what it finds
#: there in ECX: VMCALL, or nothing, and then it is the port. Of two bits it takes neither.
FEATURES_LEAF: Final = 0x4000_0010
VMCALL: Final = 1 << 1


class Vmware:
    """What one machine on this platform has beside its devices."""

    def __init__(self) -> None:
        self.identity = Identity()
        self.guestinfo = GuestInfo()
        self.balloon = VmwareBalloon()
        self.mouse = VmMouse()
        self.stolen = StolenTime()
        self.tools = Tools(self.guestinfo)
        self.guestlib = GuestLib(self.balloon)
        requests = {**self.tools.requests(), **self.guestlib.requests()}
        self.channels = Channels({RPCI: Rpci(requests), TCLO: self.tools.tclo})
        facts = Facts(lambda: self.identity.uuid, self.tools.gui_options)
        self._backdoor = Backdoor(
            {
                **facts.commands(),
                **self.mouse.commands(),
                **self.stolen.commands(),
                MESSAGE: self.channels.command,
            },
            {STRING_MESSAGE: self.channels.string},
        )

    def platform(self, *, hypercalls: bool, any_privilege: bool) -> Platform:
        """``hypercalls``: the engine hands all of them over. ``any_privilege``: programs of the
        guest reach the port too."""
        backdoor = self._backdoor
        # What hands over all hypercalls hands over strings too: engine bt.
        self.channels.high_bandwidth = hypercalls
        return Platform(
            name="vmware",
            cpuid={
                0x4000_0000: (FEATURES_LEAF, *_words(b"VMwareVMware")),
                FEATURES_LEAF: (0, 0, VMCALL if hypercalls else 0, 0),
            },
            hypercalls=Hypercalls(backdoor.hypercall, user_mode=True) if hypercalls else None,
            ports={
                PORT: RegisterPort(backdoor.port, any_privilege=any_privilege),
                HIGH_BANDWIDTH_PORT: RegisterPort(
                    backdoor.string_port, any_privilege=any_privilege
                ),
                BALLOON_PORT: RegisterPort(self.balloon.port),
            },
            identity=self.identity.system,
            devices={
                "vmware-identity": self.identity,
                "guestinfo": self.guestinfo,
                "vmware-tools": self.tools,
                "vmware-channels": self.channels,
                "vmware-balloon": self.balloon,
                "vmware-mouse": self.mouse,
                "vmware-stolen-time": self.stolen,
            },
            vmware=self,
        )


def _words(text: bytes) -> tuple[int, int, int]:
    first, second, third = (int.from_bytes(text[at : at + 4], "little") for at in (0, 4, 8))
    return first, second, third
