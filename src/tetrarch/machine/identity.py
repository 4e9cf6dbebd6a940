"""What two machines from one file must not have in common: addresses of network cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tetrarch.net.mac import random_mac
from tetrarch.virtio.vhost_user import VhostUserNet

if TYPE_CHECKING:
    from tetrarch.machine.pc import Pc

__all__ = ["renew_cards"]


def renew_cards(pc: Pc) -> None:
    """New addresses, to be called before the cards' states are loaded: a driver finds them when it
    starts anew."""
    later = pc.hotplug.nets if pc.hotplug is not None else []
    for net in (*pc.nets, *later):
        if not isinstance(net, VhostUserNet):
            net.change_mac(random_mac())
