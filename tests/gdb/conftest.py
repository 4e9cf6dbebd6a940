from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

import pytest
from tests.gdb.debuggee import build_kernel

from tetrarch import Machine
from tetrarch.machine.config import MachineOptions, make_config

Make = Callable[..., Machine]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_kernel(tmp_path_factory.mktemp("debuggee"))


@pytest.fixture
def debuggee(kernel: Path) -> Iterator[Make]:
    """Makes machines of engine bt with the kernel, and ends them."""
    machines: list[Machine] = []

    def make(**options: Unpack[MachineOptions]) -> Machine:
        config = make_config(
            {"kernel": kernel, "memory": "64M", "engine": "bt", "debug_exit": True, **options}
        )
        machine = Machine(config, console="none")
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.kill()
