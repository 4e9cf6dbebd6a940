"""Networks: how they are written down, and what is behind a network card."""

from tetrarch.net.flow import Flow, FlowFilter
from tetrarch.net.network import OpenNetwork, open_network
from tetrarch.net.spec import Forward, NetSpec

__all__ = ["Flow", "FlowFilter", "Forward", "NetSpec", "OpenNetwork", "open_network"]
