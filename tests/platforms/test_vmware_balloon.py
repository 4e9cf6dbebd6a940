"""VMware's balloon: as the guest's kernel meets it, and as Linux uses it."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.platforms.caller import Access, Registers, StandIn
from tests.virtio.driver import wait_until
from tests.virtio.test_balloon_linux import BALLOON, LIMIT_S, MEMORY, Guest, down_and_up, started

from tetrarch import Machine
from tetrarch.errors import ConfigError, StateError
from tetrarch.images import CachedGuest
from tetrarch.platforms import GuestCall, RegisterPortAccess
from tetrarch.platforms.vmware import VmwareBalloon
from tetrarch.platforms.vmware.balloon import BALLOON_PORT, MAGIC

START, GET_TARGET, LOCK, UNLOCK, GUEST_ID = range(5)
BATCHED_LOCK, BATCHED_UNLOCK, BATCHED_2M_LOCK, BATCHED_2M_UNLOCK, DOORBELL = range(6, 11)
OK, INVALID, PAGE_INVALID, LOCKED, UNLOCKED, RESET = 0, 1, 2, 3, 4, 7
PAGE, LARGE = 4096, 512
PAGES = (64 << 20) // PAGE
LIST = 5
"""The page that lists pages."""


class Memory(StandIn):
    ram: tuple[tuple[int, int], ...] = ((0, PAGES * PAGE),)

    def __init__(self) -> None:
        self.listed = bytearray(PAGE)
        self.discarded: list[tuple[int, int]] = []

    def read_memory(self, address: int, length: int) -> bytes:
        assert address == LIST * PAGE
        return bytes(self.listed[:length])

    def write_memory(self, address: int, data: bytes) -> None:
        assert address == LIST * PAGE
        self.listed[: len(data)] = data

    def discard_memory(self, address: int, length: int) -> int:
        self.discarded.append((address // PAGE, length // PAGE))
        return length


class Kernel:
    def __init__(self) -> None:
        self.memory, self.told = Memory(), list[int]()
        self.balloon = VmwareBalloon()
        self.balloon.connect(PAGES * PAGE, self.told.append)

    def call(self, command: int, first: int = 0, second: int = 0, **more: int) -> Registers:
        values = {"rax": MAGIC, "rdx": BALLOON_PORT, "rsi": second} | more
        registers = Registers(values.pop("cpl", 0), rcx=command, rbx=first, **values)
        registers.vm = self.memory
        access = cast(RegisterPortAccess, Access())
        eax = self.balloon.port(cast(GuestCall, registers), access)
        assert eax is not None
        registers["rax"] = eax
        return registers

    def batch(self, command: int, pages: list[int]) -> list[int]:
        """The states of all."""
        form = struct.Struct(f"<{len(pages)}Q")
        self.memory.write_memory(LIST * PAGE, form.pack(*(page << 12 for page in pages)))
        assert self.call(command, LIST, len(pages))["rax"] == OK
        entries = form.unpack(self.memory.read_memory(LIST * PAGE, form.size))
        assert [entry >> 12 for entry in entries] == pages
        return [entry & 0xFFF for entry in entries]


@pytest.fixture
def kernel() -> Kernel:
    kernel = Kernel()
    begun = kernel.call(START, 0x7E)
    # One by one, in lists, of 2 MiB, targets of 64 bits; no doorbell.
    assert (begun["rax"], begun["rcx"]) == (0x03000000, 0x2E)
    assert kernel.call(GUEST_ID, 1)["rax"] == OK
    return kernel


def test_target_is_told_with_every_answer(kernel: Kernel) -> None:
    kernel.balloon.target = 100 * PAGE + 5
    assert kernel.balloon.target == 100 * PAGE
    for command in (GET_TARGET, LOCK, UNLOCK):
        done = kernel.call(command, 7)
        assert (done["rax"], done["rbx"]) == (OK, 100)
    with pytest.raises(ConfigError, match="a balloon of"):
        kernel.balloon.target = PAGES * PAGE + 1


def test_pages_go_in_and_come_out(kernel: Kernel) -> None:
    assert kernel.batch(BATCHED_LOCK, [9, 7, 8, 20, 7]) == [OK, OK, OK, OK, LOCKED]
    assert kernel.memory.discarded == [(7, 3), (20, 1)]
    assert kernel.balloon.actual == 4 * PAGE
    assert kernel.batch(BATCHED_UNLOCK, [8, 8, 21]) == [OK, UNLOCKED, UNLOCKED]
    assert kernel.batch(BATCHED_2M_LOCK, [0, LARGE, 2 * LARGE]) == [LOCKED, OK, OK]
    assert kernel.memory.discarded[-1] == (LARGE, 2 * LARGE)
    assert kernel.call(LOCK, LARGE + 3)["rax"] == LOCKED
    assert kernel.batch(BATCHED_2M_UNLOCK, [LARGE, 0]) == [OK, UNLOCKED]
    assert kernel.told == [size * PAGE for size in (4, 3, 3 + 2 * LARGE, 3 + LARGE)]
    kernel.call(START)
    assert kernel.balloon.actual == 0


@pytest.mark.parametrize(
    ("command", "page", "state"),
    [
        (LOCK, PAGES, PAGE_INVALID),
        (LOCK, (1 << 64) - 1, PAGE_INVALID),
        (BATCHED_LOCK, PAGES, PAGE_INVALID),
        (DOORBELL, 0, INVALID),
        (5, 0, INVALID),
        (99, 0, INVALID),
    ],
)
def test_what_cannot_be_is_refused(kernel: Kernel, command: int, page: int, state: int) -> None:
    assert kernel.call(command, page, 1)["rax"] == state
    assert kernel.memory.discarded == []
    assert kernel.balloon.actual == 0


def test_lists_are_of_ram_and_whole(kernel: Kernel) -> None:
    assert kernel.call(BATCHED_LOCK, LIST, 0)["rax"] == PAGE_INVALID
    assert kernel.call(BATCHED_LOCK, LIST, 513)["rax"] == PAGE_INVALID
    # Large pages begin where they can, and end in RAM.
    assert kernel.batch(BATCHED_2M_LOCK, [1, PAGES - LARGE, PAGES]) == [
        *(PAGE_INVALID, OK, PAGE_INVALID),
    ]


def test_programs_and_machines_without_a_balloon_find_none(kernel: Kernel) -> None:
    assert kernel.call(GET_TARGET, cpl=3)["rax"] == 0xFFFFFFFF
    assert kernel.call(GET_TARGET, rax=7)["rax"] == 0xFFFFFFFF
    kernel.balloon = VmwareBalloon()
    assert kernel.call(START, 0x7E)["rax"] == 0xFFFFFFFF


def test_doorbell_is_rung_with_each_target(kernel: Kernel) -> None:
    rung: list[tuple[int, int]] = []
    kernel.balloon.connect(PAGES * PAGE, kernel.told.append, rung.append)
    assert kernel.call(START, 0x7E)["rcx"] == 0x3E
    kernel.balloon.target = PAGE
    assert rung == []
    assert kernel.call(DOORBELL, 3, 1024)["rax"] == OK
    kernel.balloon.target = 2 * PAGE
    assert rung == [(3, 1024)]
    kernel.call(DOORBELL, 0xFFFFFFFF, 0xFFFFFFFF)  # taken back
    kernel.balloon.target = 3 * PAGE
    kernel.call(DOORBELL, 3, 1024)
    kernel.balloon.reset()
    kernel.balloon.target = PAGE
    assert rung == [(3, 1024)]


def test_driver_of_a_restored_machine_begins_anew(kernel: Kernel) -> None:
    kernel.balloon.target = 10 * PAGE
    kernel.batch(BATCHED_LOCK, [7, 8])
    state = kernel.balloon.save()
    other = Kernel()
    other.balloon.load(state)
    assert other.balloon.target == 10 * PAGE
    assert other.call(GET_TARGET)["rax"] == RESET
    assert other.call(LOCK, 9)["rax"] == RESET
    other.call(START, 0x7E)
    assert other.batch(BATCHED_LOCK, [7]) == [OK]
    for damaged in (-1, PAGES + 1, None):
        with pytest.raises(StateError, match="vmware-balloon"):
            other.balloon.load({"target": damaged})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 11),
            st.sampled_from([0, LIST, 7, LARGE, PAGES - 1, PAGES]) | st.integers(0, (1 << 64) - 1),
            st.integers(0, 600) | st.integers(0, (1 << 64) - 1),
            st.binary(max_size=64),
        ),
        max_size=30,
    )
)
def test_any_calls_leave_a_balloon_within_the_memory(
    calls: list[tuple[int, int, int, bytes]],
) -> None:
    kernel = Kernel()
    for command, first, second, listed in calls:
        batch = BATCHED_LOCK <= command <= BATCHED_2M_UNLOCK
        page: Any = LIST if batch and first * PAGE < PAGES * PAGE else first
        kernel.memory.listed[: len(listed)] = listed
        kernel.call(command, page, second)
        assert 0 <= kernel.balloon.actual <= PAGES * PAGE
    for page, pages in kernel.memory.discarded:
        assert page + pages <= PAGES


def test_memory_of_the_host_follows_linux_driver(debian_guest: CachedGuest, tmp_path: Path) -> None:
    guest = started(debian_guest, "vmware")
    with guest.vm as vm:
        assert "vmw_balloon" in guest.ask("lsmod")
        down_and_up(guest, 2)
        # It was woken: vectors are of datagrams, of doorbells, and of transfers that have ended.
        interrupts = guest.ask("grep vmw_vmci /proc/interrupts")
        counts = [int(count) for count in re.findall(r": +(\d+) .* vmw_vmci", interrupts)]
        assert [count > 0 for count in counts] == [False, True, False], interrupts
        guest.go_to(BALLOON)
        vm.save(tmp_path / "saved")
    guest = Guest(lambda: Machine.restore(tmp_path / "saved"))
    with guest.vm as vm:
        vm.start()
        assert vm.balloon.target == BALLOON
        wait_until(lambda: vm.balloon.actual == BALLOON, "the balloon once more", LIMIT_S)
        assert guest.resident() <= MEMORY - BALLOON
        guest.go_to(0)
        guest.fill()
