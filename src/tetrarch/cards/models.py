"""Cards by their names; only that which is made is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.cards.card import NetworkCard
    from tetrarch.net.network import OpenNetwork

__all__ = ["make_card"]


def make_card(model: str, vm: Vm, network: OpenNetwork, name: str, mac: bytes) -> NetworkCard:
    """Of a model that is not virtio's."""
    if model == "e1000":
        from tetrarch.cards.e1000 import E1000Card

        return E1000Card(vm, network, name, mac)
    if model == "vmxnet3":
        from tetrarch.cards.vmxnet3 import Vmxnet3Card

        return Vmxnet3Card(vm, network, name, mac)
    raise ValueError(f"there is no card {model}")
