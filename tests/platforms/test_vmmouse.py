"""VMware's pointer, by a driver that knows no more than Linux's."""

from __future__ import annotations

import pytest
from tests.platforms.caller import Program

from tetrarch.devices.input_user import ABS_MAX
from tetrarch.platforms.vmware import Vmware
from tetrarch.platforms.vmware.backdoor import NO_COMMAND

DATA, STATUS, COMMAND, RESTRICT = 39, 40, 41, 86
ENABLE, DISABLE, RELATIVE, ABSOLUTE = 0x45414552, 0xF5, 0x4C455252, 0x53424152
ERROR, VERSION = 0xFFFF0000, 0x3442554A
NAMES = ("rax", "rbx", "rcx", "rdx")


@pytest.fixture
def vmware() -> Vmware:
    return Vmware()


def started(vmware: Vmware) -> Program:
    """As Linux's driver starts it."""
    vmware.mouse.connect(lambda: None)
    program = Program(vmware, cpl=0)
    program.call(COMMAND, rbx=ENABLE)
    assert program.call(STATUS)["rax"] == 1
    assert program.call(DATA, rbx=1)["rax"] == VERSION
    program.call(RESTRICT, rbx=1)
    program.call(COMMAND, rbx=ABSOLUTE)
    assert program.call(STATUS)["rax"] == 0
    return program


def test_place_buttons_and_wheel_are_told(vmware: Vmware) -> None:
    program, said = started(vmware), []
    vmware.mouse.connect(lambda: said.append(1))
    assert vmware.mouse.point(ABS_MAX, 0, 0b101, 1)
    assert vmware.mouse.point(0, ABS_MAX, 0b010, -1)
    assert said == [1, 1]
    assert program.call(STATUS)["rax"] == 8
    got = program.call(DATA, rbx=4)
    assert [got[name] for name in NAMES] == [0x30, 0xFFFF, 0, 0xFFFF_FFFF]
    got = program.call(DATA, rbx=4)
    assert [got[name] for name in NAMES] == [0x08, 0, 0xFFFF, 1]
    assert program.call(STATUS)["rax"] == 0


def test_guest_that_wants_no_places_gets_none(vmware: Vmware) -> None:
    assert not vmware.mouse.point(0, 0, 0, 0)
    program = started(vmware)
    program.call(COMMAND, rbx=RELATIVE)
    assert not vmware.mouse.point(0, 0, 0, 0)
    program.call(COMMAND, rbx=ABSOLUTE)
    assert vmware.mouse.point(0, 0, 0, 0)
    program.call(COMMAND, rbx=DISABLE)
    assert program.call(STATUS)["rax"] == ERROR
    assert not vmware.mouse.point(0, 0, 0, 0)


@pytest.mark.parametrize("count", [0, 2, 5, 0xFFFF_FFFF])
def test_who_asks_for_what_is_not_there_is_told(vmware: Vmware, count: int) -> None:
    program = started(vmware)
    assert program.call(DATA, rbx=count)["rax"] == ERROR
    assert program.call(STATUS)["rax"] & ERROR == ERROR
    program.call(COMMAND, rbx=ENABLE)
    assert program.call(STATUS)["rax"] == 1


def test_programs_of_the_guest_see_nothing_of_it(vmware: Vmware) -> None:
    program = started(vmware)
    vmware.mouse.point(1, 1, 0, 0)
    other = Program(vmware, cpl=3)
    assert other.call(DATA, rbx=4)["rax"] == NO_COMMAND
    assert program.call(STATUS)["rax"] == 4


def test_reports_are_kept_within_bounds(vmware: Vmware) -> None:
    program = started(vmware)
    for _ in range(10_000):
        assert vmware.mouse.point(1, 1, 0, 0)
    assert program.call(STATUS)["rax"] == 1024


def test_machine_without_a_mouse_has_no_pointer(vmware: Vmware) -> None:
    program = Program(vmware, cpl=0)
    assert program.call(COMMAND, rbx=ENABLE)["rax"] == NO_COMMAND
    assert program.call(STATUS)["rax"] == NO_COMMAND


def test_state_goes_on_in_another(vmware: Vmware) -> None:
    started(vmware)
    vmware.mouse.point(ABS_MAX, 0, 1, 0)
    other = Vmware()
    other.mouse.connect(lambda: None)
    other.mouse.load(vmware.mouse.save())
    program = Program(other, cpl=0)
    assert program.call(DATA, rbx=4)["rbx"] == 0xFFFF
    assert other.mouse.point(0, 0, 0, 0)
    other.mouse.reset()
    assert not other.mouse.point(0, 0, 0, 0)
