"""Several vCPUs, where the engine runs them: started by INIT and SIPI, told apart, stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from tests.conformance.guest import LIMIT_S, PORTS, Guest

from tetrarch._native import EngineError

VCPUS = 4
# The page that a startup IPI with vector 3 names (Intel SDM 3A, 9.4.4.1).
TRAMPOLINE = 0x3000
# mov eax, 1 ; cpuid ; shr ebx, 24 ; mov al, bl ; mov dx, 0x500 ; out dx, al ; cli ; hlt
SAY_APIC_ID = bytes.fromhex("66b801000000 0fa2 66c1eb18 88d8 ba0005 ee fa f4")
# mov ebx, 0xfee00300 ; the ICR, to all but the sender: INIT, then SIPI with vector 3
START_ALL = bytes.fromhex("bb0003e0fe c70300450c00 c70303460c00")
WAIT = bytes.fromhex("fa ebfe")  # cli ; jmp $


@pytest.fixture
def guest(engine: str) -> Iterator[Guest]:
    """A machine of four, the three others waiting on threads of their own."""
    name = "kvm" if engine == "kvm" else "bt"
    guest = Guest(name, vcpus=VCPUS, translate=engine == "translator")
    threads = [
        threading.Thread(target=guest.vm.vcpu(index).run, daemon=True) for index in range(1, VCPUS)
    ]
    for thread in threads:
        thread.start()
    yield guest
    for thread in threads:
        while thread.is_alive():
            guest.vm.request_stop()
            thread.join(0.02)


def test_init_and_sipi_start_all_others_which_know_their_number(guest: Guest) -> None:
    guest.vm.write_memory(TRAMPOLINE, SAY_APIC_ID)
    guest.protected_mode(START_ALL + WAIT)
    started = threading.Event()

    def wait_for_all() -> None:
        for _ in range(LIMIT_S * 50):
            if len(guest.events) == VCPUS - 1 or started.wait(0.02):
                break
        guest.vm.request_stop()

    waiter = threading.Thread(target=wait_for_all)
    waiter.start()
    assert guest.run() == "stopped"
    started.set()
    waiter.join()
    assert sorted(guest.events) == [("out", PORTS, 1, index) for index in range(1, VCPUS)]


def test_machine_with_all_cpus_halted_for_good_has_ended(guest: Guest) -> None:
    guest.real_mode(bytes.fromhex("fa f4"))  # cli ; hlt; the others never start
    # Whichever vCPU notices stops the others.
    assert guest.run() in ("halted", "stopped")


def test_statistics_are_kept_for_each_vcpu(guest: Guest, engine: str) -> None:
    # out 0x500, al through dx ; stop
    guest.real_mode(bytes.fromhex("ba0005 ee baff05 ee"))
    assert guest.run() == "stopped"
    stats = guest.vm.stats()
    assert stats["vcpu0.exits"]["port_out"] == 2
    assert stats["vcpu1.exits"]["port_out"] == 0
    assert stats["exits"]["port_out"] == 2
    if engine == "kvm":
        assert stats["vcpu0.kvm"]["exits_io"] == 2
    assert stats["vcpu0.time_ns"]["port_out"] > 0


def test_engine_bt_refuses_more_than_it_runs() -> None:
    with pytest.raises(EngineError, match="ask for 64 at most"):
        Guest("bt", vcpus=65)
