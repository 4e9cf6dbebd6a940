"""The way to a network, opened as it is written down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from tetrarch._files import open_to_write
from tetrarch._native import Network
from tetrarch.errors import HostError
from tetrarch.net.flow import Address, Flow, FlowFilter
from tetrarch.net.passt import Passt
from tetrarch.net.spec import NetSpec

__all__ = ["OpenNetwork", "open_network", "wrap"]


class OpenNetwork:
    """What a card is made with, until ``close``."""

    def __init__(
        self, spec: NetSpec, native: Network, undo: ExitStack, leaving: threading.Event
    ) -> None:
        self.spec = spec
        self.native = native
        self._undo = undo
        self._leaving = leaving

    def leave(self) -> None:
        """The card is about to let go of it: that it ends now is no news."""
        self._leaving.set()

    def close(self) -> None:
        """Ends what was started for it. The card has let go of it before."""
        self._undo.close()


def open_network(
    spec: NetSpec,
    ended: Callable[[str], object] = lambda cause: None,
    failed: Callable[[BaseException], object] | None = None,
) -> OpenNetwork:
    """Raises HostError where this host does not give it.

    ``ended`` hears, on any thread, what cut the network off; ``failed`` what a filter raised,
    which then has said no.
    """
    leaving = threading.Event()

    def cut_off(cause: str) -> None:
        if not leaving.is_set():
            ended(cause)

    with ExitStack() as undo:
        native = _open(spec, cut_off, undo)
        wrap(native, spec, failed)
        return OpenNetwork(spec, native, undo.pop_all(), leaving)


def wrap(
    native: Network, spec: NetSpec, failed: Callable[[BaseException], object] | None = None
) -> None:
    """Puts around a network what is written of it."""
    if spec.delay or spec.loss or spec.rate is not None:
        native.shape(delay=spec.delay, loss=spec.loss, rate=spec.rate)
    if spec.filter is not None:
        native.filter(_judge(spec.filter, failed))
    if spec.pcap is not None:
        try:
            with open_to_write(spec.pcap) as file:
                native.capture(file.fileno())
        except OSError as error:
            raise HostError(
                f"cannot write frames to {spec.pcap}: {error.strerror or error}",
                mend="name another file for pcap=",
            ) from error


def _open(spec: NetSpec, ended: Callable[[str], object], undo: ExitStack) -> Network:
    match spec.kind:
        case "user":
            passt = Passt(spec.forward, ended)
            undo.callback(passt.close)
            native = Network.stream("passt", passt.socket.fileno())
            # The card's is the only one now: passt ends with it.
            passt.socket.close()
            return native
        case "tap":
            from tetrarch.net.tap import Tap  # pyroute2 takes its time

            tap = Tap(spec.target, spec.queues, spec.bridge)
            undo.callback(tap.close)
            return Network.tap(tap.descriptors)
        case "socket":
            try:
                return Network.joined(spec.target)
            except OSError as error:
                raise HostError(
                    f"cannot join the network at {spec.target}: {error.strerror or error}",
                    mend="name a path of less than 108 bytes in a directory that you can write to",
                ) from error
        case "vhost-user":
            raise HostError(
                f"the network at {spec.target} is another process's, with queues of its own",
                mend="make a VhostUserNet of it (tetrarch.virtio.vhost_user)",
            )


def _judge(
    allows: FlowFilter, failed: Callable[[BaseException], object] | None
) -> Callable[[int, Address, Address, tuple[int, int] | None, bool], bool]:
    def judge(
        protocol: int,
        source: Address,
        destination: Address,
        ports: tuple[int, int] | None,
        outgoing: bool,
    ) -> bool:
        from_port, to_port = ports or (None, None)
        try:
            flow = Flow(protocol, source, destination, from_port, to_port, outgoing)
            return bool(allows(flow))
        except BaseException as error:
            if failed is None:
                raise
            failed(error)
            return False

    return judge
