"""Network cards on the PCI bus for guests without virtio."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.cards.card import NetworkCard
    from tetrarch.cards.vmxnet3 import Vmxnet3Card

__all__ = ["NetworkCard", "Vmxnet3Card"]

_HOMES = {
    "NetworkCard": "tetrarch.cards.card",
    "Vmxnet3Card": "tetrarch.cards.vmxnet3",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
