"""Machines with a control socket."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import Machine
from tetrarch.sockets import SocketDirectory
from tetrarch.testing import pvh_kernel

Make = Callable[..., Machine]


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Where a control socket can lie: pytest's own directories have long names."""
    with SocketDirectory() as directory:
        yield directory / "control"


@pytest.fixture
def make(tmp_path: Path, socket_path: Path) -> Iterator[Make]:
    """Makes machines that end with the test; the guest says "up" and spins."""
    with ExitStack() as stack:

        def make(
            code: bytes = guests.say(b"up\n") + guests.ENDLESS_LOOP, **options: object
        ) -> Machine:
            kernel = tmp_path / "kernel"
            kernel.write_bytes(pvh_kernel(code))
            chosen = {"engine": "bt", "memory": "16M", "control": socket_path, **options}
            return stack.enter_context(Machine(kernel=kernel, **chosen))  # type: ignore[arg-type]

        yield make
