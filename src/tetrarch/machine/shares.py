"""The directories that a machine's guest gets, and who serves them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tetrarch.errors import HostError
from tetrarch.machine.config import MachineConfig
from tetrarch.share.spec import share_tags

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.share.virtiofsd import Virtiofsd
    from tetrarch.virtio.vhost_user import VhostUserFs

__all__ = ["MachineShare", "machine_shares"]


class MachineShare:
    """One directory: the device, and the virtiofsd behind it."""

    def __init__(self, kind: VhostUserFs, daemon: Virtiofsd) -> None:
        self.kind = kind
        self.daemon = daemon

    def close(self) -> None:
        self.kind.close()
        self.daemon.close()


def machine_shares(vm: Vm, config: MachineConfig) -> Iterator[MachineShare]:
    """Starts them one by one. Raises HostError."""
    if config.share:
        from tetrarch.share.virtiofsd import Virtiofsd
        from tetrarch.virtio.vhost_user import VhostUserFs
    for index, (spec, tag) in enumerate(zip(config.share, share_tags(config.share), strict=True)):
        daemon = Virtiofsd(spec)
        try:
            kind = VhostUserFs(vm, daemon.socket, f"share{index}", tag, str(spec.directory))
        except HostError as error:
            raise daemon.refused(error) from error
        except BaseException:
            daemon.close()
            raise
        yield MachineShare(kind, daemon)
