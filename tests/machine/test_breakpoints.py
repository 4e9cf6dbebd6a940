"""Breakpoints and watchpoints of a program, at guests of a few bytes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetrarch import ConfigError, Machine, MachineStateError, Phase, _native
from tetrarch.machine.breakpoints import Hit
from tetrarch.testing import pvh_kernel

LIMIT_S = 30
START = 0x10_0000
# mov ecx, 0 ; mov esi, 0x100100
# loop: inc ecx ; mov [esi], ecx ; mov eax, [esi] ; jmp loop
COUNTER = bytes.fromhex("b900000000 be00011000 41 890e 8b06 ebf9")
INC, STORE, LOAD, JUMP = START + 10, START + 11, START + 13, START + 15
CELL = 0x10_0100


@pytest.fixture(params=["bt", "kvm"])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    name: str = request.param
    reason = _native.engine_available(name)
    if reason is not None:
        pytest.skip("; ".join(reason))
    if name == "kvm" and not _native.kvm_probe()["hardware"]:
        pytest.skip("breakpoints of KVM need hardware behind it; tests/gdb has them in a guest")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(COUNTER))
    with Machine(kernel=kernel, engine=name, memory="16M") as vm:  # type: ignore[arg-type]
        yield vm


@pytest.mark.parametrize("hardware", [False, True], ids=["planted", "hardware"])
def test_listener_is_called_at_each_execution(vm: Machine, hardware: bool) -> None:
    vm.load()
    seen: list[int] = []

    def listener(hit: Hit) -> None:
        assert hit.vcpu.regs.rip == STORE
        seen.append(hit.vcpu.regs.rcx)
        if len(seen) == 5:
            vm.kill()

    point = vm.breakpoint(STORE, listener, hardware=hardware)
    vm.start()
    vm.wait(LIMIT_S)
    assert seen == [1, 2, 3, 4, 5]
    assert point.hits == 5


def test_listener_changes_registers_and_where_the_guest_goes_on(vm: Machine) -> None:
    vm.load()
    steps: list[int] = []

    def skip(hit: Hit) -> None:
        steps.append(hit.vcpu.regs.rcx)
        if len(steps) == 1:
            hit.vcpu.regs.update(rip=JUMP, rcx=100)
        else:
            vm.kill()

    vm.breakpoint(STORE, skip)
    vm.start()
    vm.wait(LIMIT_S)
    assert steps == [1, 101]
    assert vm.read_memory(CELL, 4) == bytes(4)  # the store was skipped


def test_watchpoint_is_behind_the_write(vm: Machine) -> None:
    vm.load()
    seen: list[tuple[int, bytes]] = []

    def listener(hit: Hit) -> None:
        seen.append((hit.vcpu.regs.rip, bytes(vm.memory[CELL : CELL + 4])))
        if len(seen) == 3:
            vm.kill()

    vm.watchpoint(CELL, 4, listener)
    vm.start()
    vm.wait(LIMIT_S)
    assert seen == [(LOAD, n.to_bytes(4, "little")) for n in (1, 2, 3)]


def test_watchpoint_of_access_is_behind_the_read_too(vm: Machine) -> None:
    vm.load()
    with vm.watchpoint(CELL, 4, access="access") as point:
        vm.start()
        where = []
        for _ in range(4):
            where.append(point.wait(LIMIT_S).vcpu.regs.rip)
            vm.resume()
    assert where == [LOAD, JUMP, LOAD, JUMP]


def test_without_a_listener_the_machine_is_held_at_each_hit(vm: Machine) -> None:
    vm.load()
    point = vm.breakpoint(INC)
    vm.start()
    for count in range(3):
        hit = point.wait(LIMIT_S)
        assert vm.phase is Phase.PAUSED
        assert (hit.vcpu.regs.rip, hit.vcpu.regs.rcx) == (INC, count)
        assert hit.breakpoint is point
        vm.resume()
    point.wait(LIMIT_S)
    point.remove()
    vm.resume()
    with pytest.raises(MachineStateError, match="gave up"):
        point.wait(LIMIT_S)
    with vm.watchpoint(CELL, 4) as watched:
        watched.wait(LIMIT_S)
        vm.resume()
    # Nothing of it is left in the guest.
    assert vm.read_memory(START, len(COUNTER)) == COUNTER
    assert vm.running


def test_two_breakpoints_of_one_address_are_both_met(vm: Machine) -> None:
    vm.load()
    met: list[str] = []
    vm.breakpoint(INC, lambda hit: met.append("first"))
    second = vm.breakpoint(INC)
    vm.start()
    second.wait(LIMIT_S)
    second.remove()
    vm.watchpoint(CELL, 4, lambda hit: vm.kill() if len(met) > 3 else None)
    vm.resume()
    vm.wait(LIMIT_S)
    assert set(met) == {"first"}


def test_breakpoint_next_to_another_is_not_passed_over(vm: Machine) -> None:
    vm.load()
    order: list[int] = []
    for address in (INC, STORE, LOAD, JUMP):
        vm.breakpoint(address, lambda hit: order.append(hit.breakpoint.address))
    vm.breakpoint(JUMP, lambda hit: vm.kill() if len(order) >= 12 else None)
    vm.start()
    vm.wait(LIMIT_S)
    assert order[:12] == [INC, STORE, LOAD, JUMP] * 3


def test_listener_sets_and_removes_breakpoints(vm: Machine) -> None:
    vm.load()
    rips: list[int] = []

    def first(hit: Hit) -> None:
        rips.append(hit.vcpu.regs.rip)
        hit.breakpoint.remove()
        vm.breakpoint(JUMP, second)

    def second(hit: Hit) -> None:
        rips.append(hit.vcpu.regs.rip)
        vm.kill()

    vm.breakpoint(STORE, first)
    vm.start()
    vm.wait(LIMIT_S)
    assert rips == [STORE, JUMP]


def test_what_a_listener_raises_comes_out_of_wait(vm: Machine) -> None:
    vm.load()
    error = RuntimeError("of a listener")

    def listener(hit: Hit) -> None:
        raise error

    vm.breakpoint(INC, listener)
    vm.start()
    with pytest.raises(RuntimeError, match="of a listener") as caught:
        vm.wait(LIMIT_S)
    assert caught.value is error


def test_fifth_hardware_breakpoint_is_refused(vm: Machine) -> None:
    points = [vm.breakpoint(STORE + n, hardware=True) for n in range(4)]
    with pytest.raises(MachineStateError, match="all are in use; remove one"):
        vm.watchpoint(CELL, 4)
    points[0].remove()
    vm.watchpoint(CELL, 4)
    for bad in ((CELL + 1, 4), (CELL, 3)):
        points.pop().remove()
        with pytest.raises(ConfigError, match="watchpoint:"):
            vm.watchpoint(*bad)


def test_wait_ends_with_the_machine_or_the_time(vm: Machine) -> None:
    point = vm.breakpoint(0x1234, hardware=True)
    vm.start()
    with pytest.raises(TimeoutError, match="no hit within"):
        point.wait(0.05)
    vm.kill()
    with pytest.raises(MachineStateError, match="the machine ended"):
        point.wait(LIMIT_S)
    point.remove()
    with pytest.raises(MachineStateError, match="has ended"):
        vm.breakpoint(INC, hardware=True)


def test_gdb_and_a_program_are_not_both_at_it(vm: Machine) -> None:
    server = vm.serve_gdb(0)
    vm.start()
    host, _, port = server.address.rpartition(":")
    point = vm.breakpoint(INC, hardware=True)
    point.wait(LIMIT_S)
    with socket.create_connection((host, int(port))) as client:
        assert client.recv(1) == b""  # hung up on
    point.remove()
    vm.resume()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"$?#3f")
        said = b""
        while len(said) < 3:
            said += client.recv(100)
        assert said.startswith(b"+$T")
        with pytest.raises(MachineStateError, match="debugged already, by gdb"):
            vm.breakpoint(INC, hardware=True)
    vm.kill()


def test_machine_with_a_breakpoint_that_is_held_can_be_stopped(vm: Machine) -> None:
    point = vm.breakpoint(INC, hardware=True)
    vm.start()
    point.wait(LIMIT_S)
    vm.kill()
    assert vm.phase is Phase.ENDED
