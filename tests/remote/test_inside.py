"""A look into a confined guest of another process, with the words of one of this process."""

from __future__ import annotations

import asyncio
import inspect
import queue
from pathlib import Path

import pytest
from tests.remote.conftest import tetrarch_cli

import tetrarch
from tetrarch import EngineError, GuestMemoryError, Machine
from tetrarch.aio import AsyncMachine
from tetrarch.control import ControlError
from tetrarch.errors import ConfigError, HostError
from tetrarch.remote import RemoteMachine
from tetrarch.testing import pvh_kernel

LIMIT_S = 60


def address_of(guest: RemoteMachine, symbol: str) -> int:
    done = guest.exec(["grep", "-w", symbol, "/proc/kallsyms"])
    return int(done.stdout.split()[0], 16)


def test_words_are_those_of_a_machine_of_this_process() -> None:
    own = {"about", "name", "alive", "execute", "logs", "close"}
    for name in vars(RemoteMachine).keys() - own:
        if name.startswith("_"):
            continue
        there = getattr(RemoteMachine, name)
        if callable(there):
            taken = inspect.signature(getattr(Machine, name)).parameters.keys()
            assert inspect.signature(there).parameters.keys() <= taken, name
        else:
            assert hasattr(Machine, name) or hasattr(AsyncMachine, name), name


def test_registers_are_read_and_set(guest: RemoteMachine) -> None:
    guest.exec(["true"])
    with guest.paused():
        assert guest.phase == "paused"
        (vcpu,) = guest.vcpus
        regs = vcpu.regs
        assert regs.cr0 & 1
        assert regs["cr3"] != 0
        before = regs.r15
        regs.r15 = (1 << 64) - 1
        assert guest.vcpus[0].regs.r15 == (1 << 64) - 1
        vcpu.set_regs(r15=before)
        with pytest.raises(EngineError):
            vcpu.set_regs(none=1)
        assert vcpu.fpu.mxcsr > 0
        xmm15 = vcpu.fpu.xmm15
        vcpu.fpu.xmm15 = 1 << 127
        assert vcpu.fpu.xmm15 == 1 << 127
        vcpu.fpu.xmm15 = xmm15
        assert vcpu.msr[0xC000_0082] == address_of_syscall(vcpu.msr[0xC000_0082])
        with pytest.raises(KeyError):
            vcpu.msr[0x1234_5678]
        assert "rip" in vcpu.dump().lower()
    assert guest.phase == "running"
    assert guest.exec(["echo", "goes on"]).stdout == b"goes on\n"


def address_of_syscall(value: int) -> int:
    assert value >> 47 == (1 << 17) - 1, "it is the kernel's"
    return value


def test_memory_is_read_and_written(guest: RemoteMachine) -> None:
    guest.exec(["true"])
    guest.memory[0x500:0x504] = b"\1\2\3\4"
    assert guest.memory[0x500:0x504].tobytes() == b"\1\2\3\4"
    assert guest.memory[0x503] == 4
    ram = max(guest.memory.ranges, key=len)
    assert guest.memory[ram.start : ram.stop].nbytes == len(ram), "all of it, and no text"
    banner = address_of(guest, "linux_banner")
    linear = guest.vcpus[0].linear
    assert linear.text(banner).startswith("Linux version")
    assert linear[banner : banner + 13] == b"Linux version"
    for wrong in (slice(1 << 50, (1 << 50) + 1), slice(ram.stop - 1, ram.stop + 1)):
        with pytest.raises(GuestMemoryError):
            guest.memory[wrong]
    with pytest.raises(GuestMemoryError):
        guest.memory[1 << 50] = 0
    with pytest.raises(GuestMemoryError):
        linear[0:1]


def test_events_are_told(guest: RemoteMachine) -> None:
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    guest.on("stop", lambda event: heard.put(event.name))
    events = guest.events("stop", "resume")
    with guest.paused():
        pass
    told = [events.next(LIMIT_S), events.next(LIMIT_S)]
    assert [event.name for event in told if event] == ["stop", "resume"]
    assert heard.get(timeout=LIMIT_S) == "stop"
    guest.close()
    assert events.next(LIMIT_S) is None


def test_breakpoint_calls_a_listener_and_goes_with_its_client(guest: RemoteMachine) -> None:
    address = address_of(guest, "do_unlinkat")
    seen = []
    remove = ["sh", "-c", "touch /tmp/file; rm /tmp/file"]
    with guest.breakpoint(address, lambda hit: seen.append(hit.vcpu.regs.rip)) as point:
        guest.exec(remove)
        assert point.hits == 1
    assert seen == [address]
    guest.exec(remove)
    assert len(seen) == 1
    guest.breakpoint(address, lambda hit: seen.append(0))
    guest.close()
    guest.exec(remove)
    assert len(seen) == 1


def test_breakpoint_without_a_listener_pauses(guest: RemoteMachine) -> None:
    address = address_of(guest, "do_unlinkat")

    async def main() -> None:
        vm = guest.aio
        async with await vm.breakpoint(address, hardware=True) as point:
            removing = asyncio.create_task(vm.exec(["sh", "-c", "touch /tmp/file; rm /tmp/file"]))
            hit = await point.wait(LIMIT_S)
            assert vm.phase == "paused"
            assert hit.vcpu.regs.rip == address
            await vm.resume()
            assert (await removing).code == 0

    asyncio.run(main())


def test_core_log_and_clock(guest: RemoteMachine, tmp_path: Path) -> None:
    guest.exec(["true"])
    guest.dump_core(tmp_path / "core", begin=0, length=4096)
    assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"
    assert isinstance(guest.logs(), str)
    assert guest.uptime > 0
    assert guest.resets == 0


def test_network_card_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a machine that may open sockets: what is confined opens none of another directory."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xfb\xf4\xeb\xfd"))  # sti; hlt; jmp
    command = ["run", "--detach", "--name", "net", "--engine", "bt", "--jail", "off"]
    started = tetrarch_cli(*command, "--kernel", kernel)
    assert started.returncode == 0, started.stderr
    vm = tetrarch.connect("net")
    try:
        card = vm.attach_net(f"socket={tmp_path}/switch,mac=52:54:00:01:02:03", name="card")
        assert card == "card"
        shown = {"command-line": "info network"}
        assert "card" in vm.execute("human-monitor-command", shown)
        with pytest.raises(ControlError, match="card"):
            vm.attach_net(f"socket={tmp_path}/switch", name="card")
        with pytest.raises(ConfigError, match="comes later"):
            vm.attach_net(f"socket={tmp_path}/switch,mtu=1400")
        with pytest.raises(HostError, match="has not given card up"):
            vm.detach("card", timeout=0.1)  # this guest has no driver for PCI's hot-plug
    finally:
        vm.kill()
    assert vm.phase == "ended"
