"""The tools of a guest on VMware's platform, in coroutines."""

from __future__ import annotations

from tetrarch.aio.bridge import Twin, on_thread
from tetrarch.platforms.vmware.tools import Tools, ToolsStatus
from tetrarch.remote.vmware import RemoteTools

__all__ = ["AsyncTools"]


class AsyncTools(Twin[Tools | RemoteTools]):
    """As ``Tools``: what waits for the guest is awaited."""

    @property
    def status(self) -> ToolsStatus:
        """As ``Tools.status``."""
        return self.sync.status

    async def halt(self, timeout: float = 30.0) -> None:
        """As ``Tools.halt``."""
        await on_thread(self.sync.halt, timeout)

    async def reboot(self, timeout: float = 30.0) -> None:
        """As ``Tools.reboot``."""
        await on_thread(self.sync.reboot, timeout)

    async def synchronize_time(self, timeout: float = 30.0) -> None:
        """As ``Tools.synchronize_time``."""
        await on_thread(self.sync.synchronize_time, timeout)

    async def set_resolution(self, width: int, height: int, timeout: float = 30.0) -> None:
        """As ``Tools.set_resolution``."""
        await on_thread(self.sync.set_resolution, width, height, timeout)
