"""Network cards on the PCI bus for guests without virtio."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.cards.card import NetworkCard
    from tetrarch.cards.e1000 import E1000Card
    from tetrarch.cards.models import make_card
    from tetrarch.cards.vmxnet3 import Vmxnet3Card

__all__ = ["E1000Card", "NetworkCard", "Vmxnet3Card", "make_card"]

_HOMES = {
    "E1000Card": "tetrarch.cards.e1000",
    "NetworkCard": "tetrarch.cards.card",
    "Vmxnet3Card": "tetrarch.cards.vmxnet3",
    "make_card": "tetrarch.cards.models",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
