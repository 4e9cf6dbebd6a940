"""Networks: how they are written down, and what is behind a network card."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.net.flow import Flow, FlowFilter
    from tetrarch.net.network import OpenNetwork, open_network
    from tetrarch.net.spec import Forward, NetSpec

__all__ = ["Flow", "FlowFilter", "Forward", "NetSpec", "OpenNetwork", "open_network"]

_HOMES = {
    "Flow": "tetrarch.net.flow",
    "FlowFilter": "tetrarch.net.flow",
    "Forward": "tetrarch.net.spec",
    "NetSpec": "tetrarch.net.spec",
    "OpenNetwork": "tetrarch.net.network",
    "open_network": "tetrarch.net.network",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
