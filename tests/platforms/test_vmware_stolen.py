"""The clocks of stolen time, as Linux's kernel asks for them (arch/x86/kernel/cpu/vmware.c)."""

from __future__ import annotations

from typing import cast

import pytest
from tests.platforms.caller import Program

from tetrarch._native import Vm
from tetrarch.errors import StateError
from tetrarch.platforms.vmware import Vmware
from tetrarch.platforms.vmware.backdoor import NO_COMMAND
from tetrarch.platforms.vmware.stolen import DISABLED, ENABLED, NOWHERE, STEALCLOCK

PLACE = 0x1_2345_6740


@pytest.fixture
def vmware() -> Vmware:
    return Vmware()


class Kernel(Program):
    """The guest's, on a machine that tells of stolen time."""

    def __init__(self, vmware: Vmware, cpl: int = 0) -> None:
        super().__init__(vmware, cpl)
        vmware.stolen.connect(cast(Vm, self.memory))

    def steal_clock(self, address: int) -> int:
        return self.call(STEALCLOCK, rsi=address >> 32, rdi=address & 0xFFFF_FFFF)["rax"]


@pytest.fixture
def kernel(vmware: Vmware) -> Kernel:
    return Kernel(vmware)


def test_clock_is_where_the_kernel_has_it(kernel: Kernel) -> None:
    clocks = kernel.memory.clocks
    assert kernel.steal_clock(NOWHERE) == DISABLED, "there is the command"
    assert (kernel.steal_clock(PLACE), clocks) == (ENABLED, {0: PLACE})
    assert (kernel.steal_clock(NOWHERE), clocks) == (DISABLED, {0: None})
    # Of the other halves of the registers nothing counts.
    done = kernel.call(STEALCLOCK, rsi=0xFFFF_FFFF << 32 | 1, rdi=0xFFFF_FFFF << 32 | 64)
    assert (done["rax"], clocks) == (ENABLED, {0: 0x1_0000_0040})


@pytest.mark.parametrize(
    "address", [PLACE + 8, PLACE + 1, 3 << 30, (3 << 30) - 64, (1 << 64) - 64, 0xFFFF_FFFF]
)
def test_clock_that_cannot_be_is_none(kernel: Kernel, address: int) -> None:
    kernel.steal_clock(PLACE)
    assert kernel.steal_clock(address) == DISABLED
    assert kernel.memory.clocks == {0: None}


def test_programs_have_no_clock(vmware: Vmware) -> None:
    program = Kernel(vmware, cpl=3)
    assert program.steal_clock(PLACE) == NO_COMMAND
    assert program.memory.clocks == {}


def test_host_that_does_not_tell_has_no_such_command(vmware: Vmware) -> None:
    kernel = Kernel(vmware)
    kernel.memory.tells = False
    vmware.stolen.connect(cast(Vm, kernel.memory))
    assert kernel.steal_clock(NOWHERE) == NO_COMMAND


def test_clocks_are_saved_and_a_reset_ends_them(vmware: Vmware, kernel: Kernel) -> None:
    kernel.steal_clock(PLACE)
    state = vmware.stolen.save()
    vmware.stolen.reset()
    assert kernel.memory.clocks == {0: None}
    vmware.stolen.load(state)
    assert kernel.memory.clocks == {0: PLACE}
    assert vmware.stolen.save() == state
    # Those of vCPUs that there are not, an odd number, and what is no RAM.
    vmware.stolen.load({**state, "clocks": [1 << 40, PLACE, 0, 3 << 30, 7]})
    assert kernel.memory.clocks == {0: None}
    with pytest.raises(StateError):
        vmware.stolen.load({**state, "clocks": None})
    other = Vmware()
    other.stolen.load(state)
    assert other.stolen.save()["clocks"] == []


def test_native_clock_is_of_ram_alone() -> None:
    vm = Vm("bt", 1 << 20, vcpus=2)
    assert not vm.set_stolen_clock(0, 0x1000)
    if not vm.tell_stolen_time():
        pytest.skip("the host tells of no waiting threads")
    assert vm.tell_stolen_time(), "asked twice"
    for vcpu, address, there in (
        (0, 0x1000, True),
        (1, (1 << 20) - 8, True),
        (1, (1 << 20) - 7, False),
        (1, (1 << 64) - 8, False),
        (2, 0x1000, False),
        (0, None, True),
    ):
        assert vm.set_stolen_clock(vcpu, address) == there
