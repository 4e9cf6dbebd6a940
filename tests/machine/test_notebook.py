"""What a notebook shows of a machine, with a stand-in for IPython's display."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from tests.machine import guests

from tetrarch import Machine, Phase
from tetrarch.notebook import show_console
from tetrarch.testing import pvh_kernel


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Machine]:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.ECHO))
    with Machine(kernel=kernel, engine="bt", memory="16M", name="shown") as vm:
        vm.start()
        yield vm


def test_cell_shows_a_machine_and_the_end_of_its_console(vm: Machine) -> None:
    assert "<td>shown</td>" in vm._repr_html_()
    assert "<td>running</td>" in vm._repr_html_()
    vm.console.send("<script>")
    vm.console.expect("<script>")
    assert vm.console._repr_html_() == "<pre>&lt;script&gt;</pre>"
    vm.kill()
    assert "<th>ended</th>" in vm._repr_html_()


def test_console_is_renewed_until_the_machine_has_ended(
    vm: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: SimpleQueue[str] = SimpleQueue()
    module = types.ModuleType("IPython.display")

    class Handle:
        def update(self, text: str) -> None:
            shown.put(text)

    def display(text: str, *, display_id: bool) -> Handle:
        shown.put(text)
        return Handle()

    module.__dict__.update(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    show_console(vm)
    assert shown.get(timeout=30) == "<pre></pre>"
    vm.console.send("hello")
    while "hello" not in shown.get(timeout=30):
        pass
    vm.kill()
    for thread in threading.enumerate():
        if thread.name == "notebook-console":
            thread.join(30)
            assert not thread.is_alive()


def test_interrupt_ends_the_wait_and_not_the_machine(vm: Machine) -> None:
    # As a kernel is interrupted: a signal to the main thread, which waits inside of a running loop
    # or awaits.
    async def waits() -> None:
        vm.console.expect("never")

    async def awaits() -> None:
        await vm.aio.console.expect("never")

    def in_a_running_loop() -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(waits())
        finally:
            loop.close()

    for wait in (vm.wait, in_a_running_loop, lambda: asyncio.run(awaits())):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
    assert vm.phase is Phase.RUNNING
    vm.console.send("on")
    assert vm.console.expect("on") == "on"
