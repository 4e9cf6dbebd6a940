"""Which machine this is: the UUID, which the backdoor and SMBIOS tell alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

from tetrarch.errors import StateError
from tetrarch.platforms.platform import SystemIdentity

__all__ = ["Identity"]


class Identity:
    """Drawn when the machine is made, and saved with it."""

    def __init__(self) -> None:
        self.uuid = uuid4()

    def system(self) -> SystemIdentity:
        """As VMware's own machines have it; drivers go by vendor and serial number."""
        octets = self.uuid.hex
        serial = " ".join(octets[at : at + 2] for at in range(0, 16, 2))
        serial += "-" + " ".join(octets[at : at + 2] for at in range(16, 32, 2))
        return SystemIdentity(
            vendor="VMware, Inc.",
            product="VMware Virtual Platform",
            version="None",
            serial=f"VMware-{serial}",
            uuid=self.uuid,
        )

    def reset(self) -> None:
        pass

    def save(self) -> dict[str, Any]:
        return {"device": "vmware-identity", "version": 1, "uuid": str(self.uuid)}

    def load(self, state: Mapping[str, Any]) -> None:
        try:
            self.uuid = UUID(state["uuid"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise StateError(
                "saved state of 'vmware-identity' has no UUID", mend="save it again"
            ) from None
