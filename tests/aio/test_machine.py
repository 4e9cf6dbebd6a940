"""Machines in coroutines, with guests of a few bytes."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import BootError, ExpectTimeout, Machine, MachineStateError, Phase, StopReason
from tetrarch.aio import AsyncBreakpoint, AsyncConsole, AsyncMachine, AsyncRemoteMachine
from tetrarch.console import MemoryConsole
from tetrarch.machine.breakpoints import Breakpoint
from tetrarch.remote import RemoteMachine
from tetrarch.testing import pvh_kernel

LIMIT_S = 30


def make(directory: Path, code: bytes, **options: object) -> Machine:
    kernel = directory / f"kernel-{len(list(directory.iterdir()))}"
    kernel.write_bytes(pvh_kernel(code))
    return Machine(kernel=kernel, engine="bt", memory="16M", **options)  # type: ignore[arg-type]


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("sync", "twin", "without"),
    [
        # A class's own, what is about the process, and what others are told by.
        (Machine, AsyncMachine, {"restore", "aio", "seal_with"}),
        (RemoteMachine, AsyncRemoteMachine, {"aio", "close"}),
        (Breakpoint, AsyncBreakpoint, {"key", "met", "give_up"}),
        # What a back end of the machine has.
        (
            MemoryConsole,
            AsyncConsole,
            {"start", "write", "end", "close", "watch_size", "guest_terminal"}
            | {"find", "missing", "watched"},
        ),
    ],
)
def test_twin_has_all_that_its_class_has(sync: type, twin: type, without: set[str]) -> None:
    assert public(sync) - without - {"become_shadow"} <= public(twin)
    assert public(twin) <= public(sync) | {"sync", "config", "engine", "engine_reason", "vcpus"} | {
        *("memory", "confined", "dumps", "about", "kind", "address", "length", "hits")
    }


def test_two_machines_are_talked_to_at_once(tmp_path: Path) -> None:
    async def talk(word: str) -> str:
        async with make(tmp_path, guests.ECHO) as vm:
            vm.console.send(word)
            said = await vm.console.expect(word)
            assert vm.vcpus[0].regs.rip
            assert vm.phase is Phase.RUNNING
            await vm.kill()
            return said

    async def main() -> tuple[str, str]:
        return await asyncio.gather(talk("one"), talk("two"))

    assert tuple(asyncio.run(main())) == ("one", "two")


def test_loop_runs_on_while_a_machine_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with make(tmp_path, guests.ECHO) as vm:
            end = asyncio.create_task(vm.wait(LIMIT_S))
            waiting = asyncio.create_task(vm.console.expect("x", LIMIT_S))
            await asyncio.sleep(0)
            assert not end.done()
            vm.console.send("x")
            assert await waiting == "x"
            vm.request_stop()
            assert (await end).reason is StopReason.STOPPED

    asyncio.run(main())


def test_many_machines_wait_without_a_thread_each(tmp_path: Path) -> None:
    async def main() -> None:
        async with make(tmp_path, guests.ECHO) as vm:
            before = set(threading.enumerate())
            tasks = [asyncio.create_task(vm.console.expect("never")) for _ in range(50)]
            tasks += [asyncio.create_task(vm.events().__anext__()) for _ in range(50)]  # type: ignore[arg-type]
            await asyncio.sleep(0)
            assert set(threading.enumerate()) <= before
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in done)

    asyncio.run(main())


def test_cancelled_expect_has_taken_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with make(tmp_path, guests.ECHO) as vm:
            task = asyncio.create_task(vm.console.expect("abc"))
            vm.console.send("ab")
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            vm.console.send("c")
            assert await vm.console.expect("abc") == "abc"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await vm.console.expect("more")

    asyncio.run(main())


def test_errors_are_those_without_asyncio(tmp_path: Path) -> None:
    async def main() -> None:
        vm = make(tmp_path, guests.POWER_OFF).aio
        with pytest.raises(MachineStateError, match=r"call start\(\) first"):
            await vm.console.expect("x")
        with pytest.raises(MachineStateError, match="has not been started"):
            await vm.wait()
        assert (await vm.run(LIMIT_S)).reason is StopReason.POWERED_OFF
        assert (await vm.wait()).reason is StopReason.POWERED_OFF
        with pytest.raises(ExpectTimeout, match=r"the machine ended \(the guest powered off"):
            await vm.console.expect("x")
        async with make(tmp_path, guests.ENDLESS_LOOP) as other:
            with pytest.raises(ExpectTimeout, match=r"0.05 s passed without 'x'"):
                await other.console.expect("x", 0.05)
            with pytest.raises(TimeoutError, match="still runs"):
                await other.wait(0.05)
            assert (await other.finish(0.05)).reason is StopReason.TIMEOUT

    asyncio.run(main())


def test_loop_ends_though_a_call_still_waits(tmp_path: Path) -> None:
    vm = make(tmp_path, guests.ENDLESS_LOOP)

    async def main() -> None:
        await vm.aio.start()
        task = asyncio.create_task(vm.aio.finish())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert vm.wait(LIMIT_S).reason is StopReason.STOPPED


def test_events_come_to_who_iterates(tmp_path: Path) -> None:
    async def main() -> list[str]:
        machine = make(tmp_path, guests.ECHO)
        events = machine.events()
        resets = machine.events("reset")
        async with machine as vm:
            async with vm.paused():
                assert vm.phase is Phase.PAUSED
            vm.reset()
            assert (await anext(resets)).name == "reset"
            await vm.kill()
            assert [event async for event in resets] == []
            return [event.name async for event in events]

    assert asyncio.run(main()) == ["stop", "resume", "reset", "shutdown"]


def test_events_without_asyncio_are_a_loop_that_ends_with_the_machine(tmp_path: Path) -> None:
    with make(tmp_path, guests.ECHO) as vm:
        stream = vm.events("stop", "shutdown")
        vm.start()
        with pytest.raises(TimeoutError, match="no event within"):
            stream.next(0.01)

        def end() -> None:
            vm.pause()
            vm.kill()

        ending = threading.Timer(0.05, end)
        ending.start()
        names = []
        while (event := stream.next(LIMIT_S)) is not None:
            names.append(event.name)
        ending.join()
        assert names == ["stop", "shutdown"]
        assert list(stream) == []
        assert list(vm.events()) == []


def test_breakpoint_is_awaited(tmp_path: Path) -> None:
    async def main() -> None:
        twin = make(tmp_path, guests.ENDLESS_LOOP).aio
        async with await twin.breakpoint(0x10_0000, hardware=True) as point, twin as vm:
            hit = await point.wait(LIMIT_S)
            assert hit.vcpu.regs.rip == point.address == 0x10_0000
            await vm.resume()
            await vm.kill()

    asyncio.run(main())


def test_entering_starts_a_machine_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with make(tmp_path, guests.ECHO) as vm:
            await vm.start()
            assert vm.phase is Phase.RUNNING
            with pytest.raises(MachineStateError, match="already started"):
                await vm.sync.aio.start()
        async with make(tmp_path, guests.POWER_OFF) as short:
            assert (await short.run(LIMIT_S)).reason is StopReason.POWERED_OFF

    asyncio.run(main())


def test_machine_that_cannot_start_is_not_entered(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no kernel")

    async def main() -> None:
        with pytest.raises(BootError):
            async with Machine(kernel=broken, engine="bt", memory="16M"):
                pytest.fail("entered")

    asyncio.run(main())


def test_machine_whose_start_is_cancelled_ends(tmp_path: Path) -> None:
    vm = make(tmp_path, guests.ENDLESS_LOOP)
    within, go = threading.Event(), threading.Event()

    def wait() -> None:
        within.set()
        assert go.wait(LIMIT_S)

    vm.seal_with(wait)

    async def main() -> None:
        task = asyncio.create_task(vm.__aenter__())
        while not within.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.001)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert vm.phase is Phase.ENDED


def test_machine_of_a_cancelled_block_is_stopped(tmp_path: Path) -> None:
    vm = make(tmp_path, guests.ENDLESS_LOOP)

    async def block(inside: asyncio.Event) -> None:
        async with vm:
            inside.set()
            await asyncio.Event().wait()

    async def main() -> None:
        inside = asyncio.Event()
        task = asyncio.create_task(block(inside))
        await inside.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert vm.phase is Phase.ENDED


def test_methods_keep_their_names_and_documents(tmp_path: Path) -> None:
    vm = make(tmp_path, guests.ENDLESS_LOOP)
    assert inspect.iscoroutinefunction(vm.aio.start)
    assert vm.aio.save.__name__ == "save"
    assert vm.aio.save.__doc__ == Machine.save.__doc__
