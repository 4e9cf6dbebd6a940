"""The native module: what Python sees of a machine, on guests of a few bytes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from tetrarch import _native
from tetrarch._native import EngineError, GuestMemoryError, Latch, RustDevice, Vcpu, Vm

MIB = 1 << 20
START = 0x1000
MMIO = 0xD000_0000

CLI = b"\xfa"
HLT = b"\xf4"
ENDLESS = b"\xeb\xfe"  # jmp $
OUT_80 = b"\xb0\x5a\xe6\x80"  # mov al, 0x5a ; out 0x80, al
IN_80 = b"\xe4\x80"  # in al, 0x80


def real_mode_start(address: int) -> dict[str, int]:
    """Registers as after a reset (Intel SDM 3A, 10.1.1), but at ``address``."""
    regs = {"rip": address, "rsp": 0x800, "rflags": 2, "cr0": 0x10, "cr3": 0, "cr4": 0, "efer": 0}
    # Accessed code and data segments, a busy TSS, an LDT; all present.
    attributes = {"cs": 0x9B, "tr": 0x8B, "ldt": 0x82}
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        regs[f"{name}_selector"] = 0
        regs[f"{name}_base"] = 0
        regs[f"{name}_limit"] = 0xFFFF
        regs[f"{name}_attr"] = attributes.get(name, 0x93)
    return regs | {"gdtr_base": 0, "gdtr_limit": 0, "idtr_base": 0, "idtr_limit": 0x3FF}


class Log:
    """Keeps what is written and answers reads with ``answer``."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class Calls:
    """Does something at each access."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def read(self, offset: int, size: int) -> int:
        return cast(int, self.action())

    def write(self, offset: int, size: int, value: int) -> None:
        self.action()


def raises(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.fixture
def vm() -> Vm:
    return Vm("bt", MIB)


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    return vm.vcpu(0)


def load(vm: Vm, code: bytes, **regs: int) -> Vcpu:
    """Puts ``code`` at START, with the vCPU in front of it."""
    vm.write_memory(START, code)
    vcpu = vm.vcpu(0)
    vcpu.set_regs(real_mode_start(START) | regs)
    return vcpu


class Running:
    """A vCPU on a thread of its own, with what came of it."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.outcome: str | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(vcpu,), daemon=True)
        self._thread.start()

    def _run(self, vcpu: Vcpu) -> None:
        try:
            self.outcome = vcpu.run()
        except BaseException as error:
            self.outcome = error

    def join(self) -> str | BaseException | None:
        self._thread.join(30)
        assert not self._thread.is_alive(), "Vcpu.run does not return"
        return self.outcome


@pytest.fixture
def endless(vm: Vm) -> Iterator[Running]:
    """A guest that writes to port 0x80 once and then loops for ever."""
    entered = threading.Event()
    vm.attach_ports(0x80, 1, Calls(entered.set))
    running = Running(load(vm, OUT_80 + CLI + ENDLESS))
    assert entered.wait(30)
    yield running
    vm.request_stop()
    running.join()


# The module


def test_engine_bt_is_available_and_unknown_engine_has_a_reason() -> None:
    assert _native.engine_available("bt") is None
    reason = _native.engine_available("tcg")
    assert reason is not None
    cause, mend = reason
    assert "tcg" in cause
    assert "bt" in mend


def test_version_is_set() -> None:
    assert _native.__version__.count(".") == 2


def test_vm_with_unknown_engine_is_refused() -> None:
    with pytest.raises(EngineError, match="no engine 'tcg'"):
        Vm("tcg", MIB)


@pytest.mark.parametrize("memory", [0, 1, 4097, 1 << 60])
def test_vm_with_impossible_memory_is_refused(memory: int) -> None:
    with pytest.raises(EngineError):
        Vm("bt", memory)


def test_vm_without_vcpus_is_refused() -> None:
    with pytest.raises(EngineError, match="at least 1"):
        Vm("bt", MIB, 0)


def test_missing_vcpu_is_refused(vm: Vm) -> None:
    with pytest.raises(EngineError, match="no vCPU 1"):
        vm.vcpu(1)


# Memory


def test_ram_is_listed(vm: Vm) -> None:
    assert vm.ram == [(0, MIB)]


def test_written_memory_is_read_back(vm: Vm) -> None:
    vm.write_memory(0xFFE, b"abcd")
    assert vm.read_memory(0xFFD, 6) == b"\0abcd\0"


def test_long_memory_is_read_back(vm: Vm) -> None:
    data = bytes(range(256)) * 1024
    vm.write_memory(0, data)
    assert vm.read_memory(0, len(data)) == data


# The last length would not fit into the host's memory: it must not be tried.
@pytest.mark.parametrize(("address", "length"), [(MIB, 1), (MIB - 1, 2), (0, 1 << 62)])
def test_read_outside_of_ram_names_the_range(vm: Vm, address: int, length: int) -> None:
    with pytest.raises(GuestMemoryError) as caught:
        vm.read_memory(address, length)
    assert (caught.value.address, caught.value.length) == (address, length)


def test_write_outside_of_ram_names_the_range_and_writes_nothing(vm: Vm) -> None:
    with pytest.raises(GuestMemoryError) as caught:
        vm.write_memory(MIB - 2, b"abcd")
    assert (caught.value.address, caught.value.length) == (MIB - 2, 4)
    assert vm.read_memory(MIB - 2, 2) == b"\0\0"


# Devices


def test_out_reaches_its_device_with_offset_size_and_value(vm: Vm) -> None:
    device = Log()
    vm.attach_ports(0x7F, 4, device)
    # mov al, 0x5a ; out 0x80, al ; mov ax, 0x1234 ; out 0x81, ax ; cli ; hlt
    vcpu = load(vm, OUT_80 + b"\xb8\x34\x12\xe7\x81" + CLI + HLT)
    assert vcpu.run() == "halted"
    assert device.writes == [(1, 1, 0x5A), (2, 2, 0x1234)]


def test_in_gets_what_its_device_returns(vm: Vm) -> None:
    device = Log(0xA5)
    vm.attach_ports(0x80, 1, device)
    vcpu = load(vm, IN_80 + CLI + HLT)
    vcpu.run()
    assert device.reads == [(0, 1)]
    assert vcpu.regs()["rax"] & 0xFF == 0xA5


def test_unclaimed_port_reads_all_ones(vm: Vm) -> None:
    vcpu = load(vm, IN_80 + CLI + HLT, rax=0)
    vcpu.run()
    assert vcpu.regs()["rax"] == 0xFF


def test_access_over_the_end_of_a_range_is_cut(vm: Vm) -> None:
    device = Log(0x11)
    vm.attach_ports(0x80, 1, device)
    vcpu = load(vm, b"\xe5\x80" + CLI + HLT, rax=0)  # in ax, 0x80
    vcpu.run()
    assert device.reads == [(0, 1)]
    assert vcpu.regs()["rax"] == 0xFF11


def test_mmio_reaches_its_device(vm: Vm) -> None:
    device = Log(0xBEEF)
    vm.attach_mmio(MMIO, 0x10, device)
    # mov ax, [4] ; mov [8], al ; cli ; hlt
    vcpu = load(vm, b"\xa1\x04\x00\xa2\x08\x00" + CLI + HLT, ds_base=MMIO)
    vcpu.run()
    assert device.reads == [(4, 2)]
    assert device.writes == [(8, 1, 0xEF)]


# mov dx, 0xcf8 ; mov eax, 0x80002400 ; out dx, eax: function 4 of a device
CONFIG_ADDRESS = bytes.fromhex("baf80c 66b800240080 66ef")


def test_dword_to_0xcf8_passes_by_the_reset_register(vm: Vm) -> None:
    reset = Log()
    vm.attach_ports(0xCF9, 1, reset)
    load(vm, CONFIG_ADDRESS + CLI + HLT).run()
    assert reset.writes == []


def test_configuration_address_and_reset_register_share_ports_by_size(vm: Vm) -> None:
    host, reset = Log(), Log()
    vm.attach_ports(0xCF9, 1, reset)
    with pytest.raises(EngineError, match="overlaps Log at 0xcf9"):
        vm.attach_ports(0xCF8, 8, host)
    with pytest.raises(EngineError, match="1, 2, 4, 8"):
        vm.attach_ports(0xCF8, 8, host, sizes=(3,))
    vm.attach_ports(0xCF8, 8, host, sizes=(2, 4))
    # inc dx ; out dx, al: a byte to 0xcf9
    load(vm, CONFIG_ADDRESS + b"\x42\xee" + CLI + HLT).run()
    assert host.writes == [(0, 4, 0x8000_2400)]
    assert reset.writes == [(0, 1, 0)]


def test_bool_is_an_int(vm: Vm) -> None:
    vm.attach_ports(0x80, 1, Log(True))
    vcpu = load(vm, IN_80 + CLI + HLT, rax=0)
    vcpu.run()
    assert vcpu.regs()["rax"] == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("x", TypeError),
        (None, TypeError),
        (1.0, TypeError),
        (256, ValueError),
        (-1, ValueError),
        (1 << 80, ValueError),
    ],
)
def test_bad_answer_names_the_class_of_the_device(
    vm: Vm, answer: object, error: type[Exception]
) -> None:
    vm.attach_ports(0x80, 1, Calls(lambda: answer))
    with pytest.raises(error, match=r"^Calls\.read\(offset=0x0, size=1\) returned"):
        load(vm, IN_80 + CLI + HLT).run()


def test_object_without_read_is_no_device(vm: Vm) -> None:
    with pytest.raises(TypeError, match="object is no device"):
        vm.attach_ports(0x80, 1, object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "length", "message"),
    [
        (0x3F8, 8, "overlaps Log at 0x3f8-0x3ff"),
        (0x3FF, 1, "overlaps Log"),
        (0x20, 1, "interrupt controller"),
        (0x60, 5, "interval timer"),
        (0x80, 0, "at least 1"),
        (0xFFFF, 2, "past the last"),
    ],
)
def test_bad_port_range_is_refused(vm: Vm, base: int, length: int, message: str) -> None:
    vm.attach_ports(0x3F8, 8, Log())
    with pytest.raises(EngineError, match=message):
        vm.attach_ports(base, length, Log())


@pytest.mark.parametrize(
    ("base", "message"), [(0, "RAM"), (0xFEC0_0000, "I/O APIC"), (0xFEE0_0000, "local APIC")]
)
def test_mmio_range_of_the_engine_is_refused(vm: Vm, base: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        vm.attach_mmio(base, 0x1000, Log())


# Errors of devices


@pytest.mark.parametrize("code", [OUT_80, IN_80])
@pytest.mark.parametrize("error", [RuntimeError("burnt out"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_of_a_device_comes_out_of_run_unchanged(
    vm: Vm, code: bytes, error: BaseException
) -> None:
    vm.attach_ports(0x80, 1, Calls(raises(error)))
    with pytest.raises(type(error)) as caught:
        load(vm, code + CLI + HLT).run()
    assert caught.value is error
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "action"


def test_vcpu_can_run_on_after_an_exception(vm: Vm) -> None:
    vm.attach_ports(0x80, 1, Calls(raises(RuntimeError("once"))))
    vcpu = load(vm, IN_80 + CLI + HLT, rax=0)
    with pytest.raises(RuntimeError):
        vcpu.run()
    assert vcpu.run() == "halted"
    assert vcpu.regs()["rax"] == 0xFF


# Ends and stops


def test_triple_fault_is_a_shutdown(vm: Vm) -> None:
    # int3 with an empty interrupt table: #GP, #DF and the end.
    assert load(vm, b"\xcc", idtr_limit=0).run() == "shutdown"


def test_request_stop_ends_a_guest_in_a_loop(vm: Vm, endless: Running) -> None:
    vm.request_stop()
    assert endless.join() == "stopped"


def test_request_stop_ends_a_guest_that_waits(vm: Vm) -> None:
    running = Running(load(vm, b"\xfb" + HLT + ENDLESS))  # sti ; hlt
    time.sleep(0.05)
    vm.request_stop()
    assert running.join() == "stopped"


def test_request_stop_before_run_is_taken_once(vm: Vm) -> None:
    vcpu = load(vm, CLI + HLT)
    vm.request_stop()
    assert vcpu.run() == "stopped"
    assert vcpu.run() == "halted"


def test_request_stop_in_a_device_ends_run_after_the_access(vm: Vm) -> None:
    vm.attach_ports(0x80, 1, Calls(vm.request_stop))
    vcpu = load(vm, OUT_80 + CLI + HLT)
    assert vcpu.run() == "stopped"
    assert vcpu.regs()["rip"] == START + len(OUT_80)


@pytest.fixture
def interrupt_key() -> Iterator[None]:
    """SIGINT as at a terminal: a shell has it ignored by what it starts with '&'."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupt_key")
def test_interrupt_key_ends_run_on_the_main_thread(vm: Vm) -> None:
    vcpu = load(vm, CLI + ENDLESS)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vcpu.run()
    timer.join()


def test_interpreter_is_free_while_the_guest_runs(vm: Vm, endless: Running) -> None:
    # The guest never leaves its loop; were the interpreter not released, this
    # thread would not get here.
    assert sum(range(100_000)) == 4_999_950_000
    assert endless.outcome is None


# A machine that runs, from other threads and from its own devices


def test_device_may_use_the_whole_machine(vm: Vm) -> None:
    def action() -> int:
        vm.write_memory(0x2000, b"xyz")
        vm.irq_line(4, True)
        vm.irq_line(4, False)
        vm.msi(0xFEE0_0000, 0x40)
        vm.attach_ports(0x90, 1, late)
        assert vm.clock_ns() > 0
        assert vm.stats()["exits"]["port_in"] >= 1
        return vm.read_memory(0x2001, 1)[0]

    late = Log()
    vm.attach_ports(0x80, 1, Calls(action))
    vcpu = load(vm, IN_80 + b"\xe6\x90" + CLI + HLT)  # out 0x90, al
    running = Running(vcpu)
    assert running.join() == "halted"
    assert late.writes == [(0, 1, ord("y"))]


@pytest.mark.parametrize("kind", [Log, Latch])
def test_device_of_either_kind_is_attached_counted_moved_and_detached(
    vm: Vm, kind: type[Log] | type[Latch]
) -> None:
    device = kind()
    region = vm.attach_ports(0x80, 1, device)
    counted = "rust" if isinstance(device, RustDevice) else "python"

    def out(port: int) -> bool:
        """Whether a byte written there reached the device."""
        before = vm.stats()["accesses"][counted]
        load(vm, b"\xe6" + bytes([port]) + CLI + HLT, rax=port).run()
        return vm.stats()["accesses"][counted] == before + 1

    assert (region.base, region.length, region.mapped) == (0x80, 1, True)
    assert out(0x80)
    region.move(0x90)
    assert (out(0x80), out(0x90)) == (False, True)
    region.unmap()
    assert not out(0x90)
    region.move(0x91)
    assert not region.mapped
    region.map()
    assert (out(0x90), out(0x91)) == (False, True)
    region.detach()
    region.detach()
    assert not out(0x91)
    for use in (region.map, region.unmap, lambda: region.move(0x80), lambda: region.base):
        with pytest.raises(EngineError, match="was detached"):
            use()
    assert "detached" in repr(region)
    vm.attach_ports(0x91, 1, device)
    assert out(0x91)


def test_rust_device_can_be_called_and_checks_the_size(vm: Vm) -> None:
    latch = Latch()
    vm.attach_ports(0x80, 1, latch)
    load(vm, OUT_80 + CLI + HLT).run()
    assert (latch.value, latch.writes, latch.read(0, 1)) == (0x5A, 1, 0x5A)
    latch.write(0, 8, 1 << 63)
    assert latch.value == 1 << 63
    for call in (lambda: latch.read(0, 3), lambda: latch.write(0, 16, 0)):
        with pytest.raises(EngineError, match="1, 2, 4 or 8 bytes"):
            call()
    with pytest.raises(TypeError):
        RustDevice()


def test_device_moves_itself_in_the_middle_of_an_access(vm: Vm) -> None:
    region = vm.attach_ports(0x80, 1, Calls(lambda: region.move(0x90)))
    # The second write to 0x80 finds nobody.
    load(vm, OUT_80 * 2 + CLI + HLT).run()
    assert vm.stats()["accesses"] == {"python": 1, "rust": 0, "unclaimed": 1}


def test_detached_device_is_let_go_while_another_thread_is_inside_of_it(vm: Vm) -> None:
    entered, leave = threading.Event(), threading.Event()

    def action() -> int:
        entered.set()
        assert leave.wait(30)
        return 0x42

    device = Calls(action)
    gone = weakref.ref(device)
    region = vm.attach_ports(0x80, 1, device)
    del device
    vcpu = load(vm, IN_80 + CLI + HLT, rax=0)
    running = Running(vcpu)
    assert entered.wait(30)
    region.detach()
    assert vm.stats()["python"] == {"reads": 1, "writes": 0, "calls": 0}
    leave.set()
    assert running.join() == "halted"
    assert vcpu.regs()["rax"] == 0x42
    gc.collect()
    assert gone() is None


def test_guest_that_accesses_a_region_on_the_move_always_meets_one_owner(vm: Vm) -> None:
    # again: out 0x80, al ; out 0x81, al ; jmp again
    first, second = Latch(), Latch()
    region = vm.attach_ports(0x80, 1, first)
    vm.attach_ports(0x81, 1, second)
    running = Running(load(vm, b"\xe6\x80\xe6\x81\xeb\xfa"))
    for turn in range(2000):
        region.move(0x81 if turn % 2 else 0x80)  # onto the other, which stays the owner
        if turn % 10 == 0:
            region.unmap()
            region.map()
    region.move(0x80)
    seen = first.writes
    while first.writes == seen:
        assert running.outcome is None
    vm.request_stop()
    assert running.join() == "stopped"
    accesses = vm.stats()["accesses"]
    assert accesses["rust"] == first.writes + second.writes
    assert accesses["rust"] + accesses["unclaimed"] == vm.stats()["exits"]["port_out"]


def test_second_run_of_a_vcpu_is_refused(vm: Vm, vcpu: Vcpu, endless: Running) -> None:
    with pytest.raises(EngineError, match="vCPU 0 is running"):
        vcpu.run()
    assert endless.outcome is None


def test_registers_of_a_running_vcpu_are_read_and_set(vm: Vm, vcpu: Vcpu, endless: Running) -> None:
    loop = START + len(OUT_80 + CLI)
    while vcpu.regs()["rip"] != loop:  # the access may go on still
        time.sleep(0.001)
    vcpu.set_regs({"rbx": 0xB0B})
    assert vcpu.regs()["rbx"] == 0xB0B
    assert "<eb> fe" in vcpu.dump()
    assert not vm.held
    assert endless.outcome is None


def test_registers_set_in_a_hold_are_where_the_guest_goes_on(vm: Vm) -> None:
    entered = threading.Event()
    vm.attach_ports(0x80, 1, Calls(entered.set))
    running = Running(load(vm, OUT_80 + ENDLESS + CLI + HLT))
    assert entered.wait(30)
    vm.hold()
    vm.vcpu(0).set_regs({"rip": START + len(OUT_80 + ENDLESS)})
    vm.resume()
    assert running.join() == "halted"


def test_held_machine_stands_until_the_last_resume(vm: Vm) -> None:
    log = Log()
    vm.attach_ports(0x80, 1, log)
    running = Running(load(vm, OUT_80 + b"\xeb\xfa"))  # jmp to the start
    vm.hold()
    vm.hold()
    assert vm.held
    vm.resume()
    stood, clock = len(log.writes), vm.clock_ns()
    time.sleep(0.02)
    assert (len(log.writes), vm.clock_ns()) == (stood, clock)
    vm.resume()
    while len(log.writes) == stood:
        time.sleep(0.001)
    assert clock < vm.clock_ns() < clock + 10**12
    vm.request_stop()
    assert running.join() == "stopped"


def test_resume_without_hold_is_refused(vm: Vm) -> None:
    with pytest.raises(EngineError, match="not held; call hold"):
        vm.resume()


def test_held_machine_can_be_stopped(vm: Vm, endless: Running) -> None:
    vm.hold()
    vm.request_stop()
    assert endless.join() == "stopped"
    vm.resume()


def test_hold_names_the_device_that_does_not_return(vm: Vm) -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(Log):
        def write(self, offset: int, size: int, value: int) -> None:
            entered.set()
            assert go.wait(30)

    vm.attach_ports(0x80, 1, Slow())
    running = Running(load(vm, OUT_80 + CLI + HLT))
    assert entered.wait(30)
    with pytest.raises(
        EngineError, match=r"vCPU 0 .* port 0x80 does not return; let .*Slow return"
    ):
        vm.hold(timeout=0.05)
    assert not vm.held
    go.set()
    assert running.join() == "halted"


@pytest.mark.parametrize("use", [lambda vm: vm.hold(), lambda vm: vm.vcpu(0).regs()])
def test_device_that_holds_its_own_machine_is_refused(vm: Vm, use: Callable[[Vm], object]) -> None:
    vm.attach_ports(0x80, 1, Calls(lambda: use(vm)))
    with pytest.raises(EngineError, match=r"cannot hold its own machine; .* another thread"):
        load(vm, OUT_80 + CLI + HLT).run()
    assert not vm.held


def test_own_vcpu_is_refused_in_a_device(vm: Vm, vcpu: Vcpu) -> None:
    vm.attach_ports(0x80, 1, Calls(vcpu.run))
    with pytest.raises(EngineError, match="vCPU 0 is running"):
        load(vm, OUT_80 + CLI + HLT).run()


def test_missing_interrupt_line_is_refused(vm: Vm) -> None:
    with pytest.raises(EngineError, match="no interrupt line 24"):
        vm.irq_line(24, True)
    with pytest.raises(EngineError, match="no interrupt line 24"):
        vm.irq_source(24)


def test_interrupt_line_is_high_while_one_source_is(vm: Vm) -> None:
    """The 8259A's IRR shows the level (data sheet, "Reading the 8259A status")."""

    def requested() -> bool:
        # mov al, 0x0a ; out 0x20, al ; in al, 0x20: IRR
        vcpu = load(vm, b"\xb0\x0a\xe6\x20\xe4\x20" + CLI + HLT, rax=0)
        vcpu.run()
        return bool(vcpu.regs()["rax"] & 1 << 5)

    # mov al, 0x20 ; mov dx, 0x4d0 ; out dx, al: line 5 by level
    load(vm, b"\xb0\x20\xba\xd0\x04\xee" + CLI + HLT).run()
    first, second = vm.irq_source(5), vm.irq_source(5)
    first.set(True)
    second.set(True)
    first.set(False)
    assert requested()
    second.set(False)
    assert not requested()
    vm.irq_line(5, True)
    first.pulse()
    assert requested()
    vm.irq_line(5, False)
    assert not requested()
    first.set(True)
    del first
    assert not requested()


def test_clock_goes_on(vm: Vm) -> None:
    before = vm.clock_ns()
    time.sleep(0.002)
    assert vm.clock_ns() - before >= 2_000_000


# Registers


def test_set_registers_are_read_back_and_others_kept(vcpu: Vcpu) -> None:
    start = real_mode_start(0x1234)
    vcpu.set_regs(start | {"rax": 0xFFFF_FFFF_FFFF_FFFF, "gs_base": 0xFFF0})
    vcpu.set_regs({"r15": 15})
    regs = vcpu.regs()
    expected = start | {"rax": 0xFFFF_FFFF_FFFF_FFFF, "gs_base": 0xFFF0, "r15": 15}
    assert {name: regs[name] for name in expected} == expected


def test_all_registers_have_their_name(vcpu: Vcpu) -> None:
    names = {f"r{number}" for number in range(8, 16)}
    names |= {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "rflags"}
    names |= {"cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"}
    for segment in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        names |= {f"{segment}_{part}" for part in ("selector", "base", "limit", "attr")}
    names |= {f"{table}_{part}" for table in ("gdtr", "idtr") for part in ("base", "limit")}
    assert set(vcpu.regs()) == names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rax": 1, "eax": 2}, "no register 'eax'"),
        ({"rax": 1, "cs_selector": 0x1_0000}, "too large for register cs_selector"),
        ({"rax": 1, "idtr_limit": 0x1_0000}, "too large for register idtr_limit"),
    ],
)
def test_bad_registers_are_refused_and_none_is_set(
    vcpu: Vcpu, values: dict[str, int], message: str
) -> None:
    vcpu.set_regs({"rax": 7})
    with pytest.raises(EngineError, match=message):
        vcpu.set_regs(values)
    assert vcpu.regs()["rax"] == 7


def test_dump_shows_registers_and_code(vm: Vm) -> None:
    vcpu = load(vm, b"\x90" + CLI + HLT + b"\x12\x34", rbx=0xDEAD)
    vcpu.run()
    dump = vcpu.dump()
    assert "RBX=000000000000dead" in dump
    assert "CS=0000 base=0000000000000000 limit=0000ffff attr=0009b" in dump
    assert "90 fa f4 <12> 34" in dump


def test_dump_of_a_vcpu_in_the_void_says_so(vm: Vm) -> None:
    vcpu = load(vm, b"", cs_base=MMIO, rip=0)
    assert "0xd0000000 is not mapped" in vcpu.dump()


# Memory that comes and goes


@pytest.mark.parametrize("engine", ["bt", "kvm"])
def test_memory_comes_and_goes_while_the_guest_uses_it(engine: str) -> None:
    reason = _native.engine_available(engine)
    if reason is not None:
        pytest.skip("; ".join(reason))
    vm = Vm(engine, MIB)
    seen = Latch()
    vm.attach_ports(0x80, 1, seen)
    # again: mov al, [0] ; out 0x80, al ; jmp again
    running = Running(load(vm, b"\xa0\x00\x00\xe6\x80\xeb\xf9", ds_base=MMIO))

    def wait_for(value: int) -> None:
        deadline = time.monotonic() + 30
        while seen.value != value:
            assert running.outcome is None
            assert time.monotonic() < deadline

    for value in range(1, 6):
        wait_for(0xFF)
        vm.add_memory(MMIO, 0x1000)
        wait_for(0)
        vm.write_memory(MMIO, bytes([value]))
        wait_for(value)
        assert vm.ram == [(0, MIB), (MMIO, 0x1000)]
        with pytest.raises(EngineError, match="overlaps RAM"):
            vm.attach_mmio(MMIO, 4, Log())
        vm.remove_memory(MMIO)
        with pytest.raises(GuestMemoryError):
            vm.read_memory(MMIO, 1)
    wait_for(0xFF)
    vm.attach_mmio(MMIO, 4, Log(0x42))
    wait_for(0x42)
    with pytest.raises(EngineError, match="overlaps Log"):
        vm.add_memory(MMIO, 0x1000)
    vm.request_stop()
    assert running.join() == "stopped"


@pytest.mark.parametrize(
    ("address", "length", "message"),
    [
        (0x8_0000, 0x1000, "overlaps RAM"),
        (0xFEC0_0000, 0x1000, "I/O APIC"),
        (MMIO + 1, 0x1000, "begin on a page"),
        (MMIO, 1, "multiple of 4096"),
        (1 << 32, 1 << 50, "the host has"),
    ],
)
def test_memory_that_cannot_be_is_refused_and_leaves_nothing(
    vm: Vm, address: int, length: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        vm.add_memory(address, length)
    assert vm.ram == [(0, MIB)]
    vm.attach_mmio(MMIO, 0x1000, Log())
    with pytest.raises(EngineError, match="no memory region"):
        vm.remove_memory(MMIO)


def test_device_cannot_remove_memory_under_its_own_access(vm: Vm) -> None:
    vm.attach_ports(0x80, 1, Calls(lambda: vm.remove_memory(0)))
    with pytest.raises(EngineError, match="use another thread"):
        load(vm, OUT_80 + CLI + HLT).run()


# Limits of the process

_LIMITED = """
import resource
from tetrarch import _native
resource.setrlimit(resource.RLIMIT_WHAT, (BYTES << 20, resource.RLIM_INFINITY))
try:
    _native.Vm("bt", MEMORY << 20)
except _native.EngineError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "mib", "memory", "cause", "mend"),
    [
        ("AS", 800, 1024, "1024 MiB of guest memory go beyond this process's 800 MiB", "-v"),
        # It fits, but a machine has more to map, and would end the process in the middle.
        ("AS", 800, 512, "are left beside guest memory, and engine bt needs", "-v"),
        ("DATA", 60, 16, "MiB of data", "-d"),
        ("FSIZE", 8, 16, "16 MiB of guest memory go beyond this process's 8 MiB", "-f"),
    ],
)
def test_limit_of_the_process_is_said_in_one_line(
    limit: str, mib: int, memory: int, cause: str, mend: str
) -> None:
    program = _LIMITED.replace("WHAT", limit).replace("BYTES", str(mib))
    program = program.replace("MEMORY", str(memory))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert cause in done.stdout
    assert done.stdout.endswith(f"; raise that with ulimit {mend}, or ask for less memory\n")
    assert done.stdout.count("\n") == 1


# Counters and the end


def test_stats_count_exits_accesses_and_crossings(vm: Vm) -> None:
    vm.attach_ports(0x80, 1, Calls(lambda: time.sleep(0.002)))
    Running(load(vm, OUT_80 * 2 + b"\xe4\x90" + CLI + HLT)).join()  # in al, 0x90
    stats = vm.stats()
    exits = {"port_in": 1, "port_out": 2, "mmio_read": 0, "mmio_write": 0}
    assert exits.items() <= stats["exits"].items()
    assert stats["exits"]["halt"] == 1
    assert stats["accesses"] == {"python": 2, "rust": 0, "unclaimed": 1}
    assert stats["python"] == {"reads": 0, "writes": 2, "calls": 0}
    assert 4_000_000 <= stats["time_ns"]["python"] <= stats["time_ns"]["run"]
    assert all(isinstance(value, int) for group in stats.values() for value in group.values())


def test_machine_that_its_device_refers_to_is_freed() -> None:
    vm = Vm("bt", MIB)
    device = Log()
    device.machine = (vm, vm.vcpu(0))  # type: ignore[attr-defined]
    vm.attach_ports(0x80, 1, device)
    vm.attach_mmio(MMIO, 1, device)
    gone = weakref.ref(device)
    del vm, device
    gc.collect()
    assert gone() is None


def test_device_that_keeps_its_region_and_line_is_freed() -> None:
    vm = Vm("bt", MIB)
    device = Log()
    device.wiring = (vm.attach_ports(0x80, 1, device), vm.irq_source(5))  # type: ignore[attr-defined]
    gone = weakref.ref(device)
    del vm, device
    gc.collect()
    assert gone() is None


def test_device_lives_as_long_as_a_vcpu_that_may_call_it() -> None:
    vm = Vm("bt", MIB)
    device = Log()
    vm.attach_ports(0x80, 1, device)
    kept = weakref.ref(device)
    vcpu = load(vm, OUT_80 + CLI + HLT)
    del vm, device
    gc.collect()
    assert vcpu.run() == "halted"
    survivor = kept()
    assert survivor is not None
    assert survivor.writes == [(0, 1, 0x5A)]


# Saved state

# sti ; hlt ; inc word [0x500] ; mov ax, [0x500] ; out 0x80, ax ; jmp to the hlt
TICKS = b"\xfb\xf4\xff\x06\x00\x05\xa1\x00\x05\xe7\x80\xeb\xf5"
# The same number as a program: a timer at 1 kHz, its interrupt at vector 0x20, whose
# handler at 0x1100 only ends it.
PROGRAM = bytes.fromhex("b011e620b020e621b004e621b001e621b0fee621b034e643b0a9e640b004e640") + TICKS
HANDLER = b"\x50\xb0\x20\xe6\x20\x58\xcf"

RESTORE = """
import sys
from tetrarch._native import Vm
vm = Vm("bt", 1 << 20)
seen = []
class Port:
    def write(self, offset, size, value):
        seen.append(value)
        if len(seen) == 5:
            vm.request_stop()
    def read(self, offset, size):
        return 0
port = vm.attach_ports(0x80, 2, Port())
ram, chips, cpu = (bytes.fromhex(line) for line in sys.stdin.read().split())
vm.hold()
vm.write_memory(0, ram)
vm.load_state(chips)
vm.vcpu(0).load_state(cpu)
clock = vm.clock_ns()
vm.resume()
assert vm.vcpu(0).run() == "stopped"
print(clock, *seen)
"""


def test_saved_guest_goes_on_in_a_new_process(vm: Vm) -> None:
    enough = threading.Event()

    class Port(Log):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if value >= 5:
                enough.set()

    port = Port()
    vm.attach_ports(0x80, 2, port)
    vm.write_memory(0x1100, HANDLER)
    vm.write_memory(0x80, b"\x00\x11\x00\x00")
    running = Running(load(vm, PROGRAM))
    assert enough.wait(30)
    vm.hold()
    saved = (vm.read_memory(0, MIB), vm.save_state(), vm.vcpu(0).save_state())
    last, clock = port.writes[-1][2], vm.clock_ns()
    done = subprocess.run(
        [sys.executable, "-c", RESTORE],
        input="\n".join(part.hex() for part in saved),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    vm.request_stop()
    assert running.join() == "stopped"
    assert done.returncode == 0, done.stderr
    # The count may have been made and not written when the machine was held.
    assert [int(word) for word in done.stdout.split()] == [clock, *range(last + 1, last + 6)]


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_state_is_refused_by_name(vm: Vm, vcpu: Vcpu, which: int) -> None:
    good = (vm.save_state(), vcpu.save_state())[which]
    load_state = (vm.load_state, vcpu.load_state)[which]
    name = ("vm", "vcpu")[which]
    for bad, message in (
        (good[:-1], "ends too early"),
        (good[:-1] + bytes([good[-1] ^ 1]), "checksum"),
        ((vm.save_state(), vcpu.save_state())[1 - which], f"section '{name}' was expected"),
        (good.replace(name.encode() + b"\x01\x00", name.encode() + b"\x63\x00"), "version 99"),
    ):
        with pytest.raises(EngineError, match=message):
            load_state(bad)
    load_state(good)


def test_engine_error_has_cause_and_mend() -> None:
    with pytest.raises(EngineError) as raised:
        Vm("bt", 1 << 20, vcpus=100)
    error = raised.value
    assert "not 100" in error.cause
    assert error.mend == "ask for 64 at most"
    assert str(error) == f"{error.cause}; {error.mend}"
    assert (EngineError("of a stand-in").cause, EngineError("of a stand-in").mend) == ("", "")
