"""Fixtures of pytest for guests; a package that installs Tetrarch has them.

``tetrarch_guest`` is a guest of the test's own, booted to a shell; ``tetrarch_options`` says what
its machine is made with, and is there to be overridden. ``tetrarch_machine`` makes machines, and
ends them. Where a test fails, its report has the consoles of the machines that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tetrarch import Machine
    from tetrarch.testing.guest import Guest

__all__ = [
    "pytest_runtest_makereport",
    "tetrarch_guest",
    "tetrarch_machine",
    "tetrarch_options",
]

#: Of a console: two screens.
_SHOWN_CHARS = 4000


@pytest.fixture
def tetrarch_options() -> dict[str, Any]:
    """What ``tetrarch_guest`` is made with: keywords of ``Machine``."""
    return {}


@pytest.fixture
def tetrarch_guest(tetrarch_options: dict[str, Any]) -> Iterator[Guest]:
    """A guest of the test's own, booted to a shell: ``tetrarch_guest.run("uname -r")``."""
    from tetrarch.testing.guest import boot

    with boot(**tetrarch_options) as guest:
        yield guest


@pytest.fixture
def tetrarch_machine() -> Iterator[Callable[..., Machine]]:
    """Makes machines, with the arguments of ``Machine``; they end with the test."""
    from tetrarch import Machine
    from tetrarch.testing.guest import running

    with ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> Machine:
            vm = stack.enter_context(Machine(*arguments, **options))
            running.append(vm)
            stack.callback(running.remove, vm)
            return vm

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        from tetrarch.errors import MachineStateError
        from tetrarch.testing.guest import running

        for vm in running:
            try:
                text = vm.console.text
            except MachineStateError:  # its console goes elsewhere
                continue
            report.sections.append((f"Console of {vm.config.name}", text[-_SHOWN_CHARS:]))
    return report
