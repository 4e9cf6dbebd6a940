"""A Linux guest for tests: booted to a shell, and told what to run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tetrarch.machine.machine import Machine

__all__ = ["Guest", "boot", "running"]

_PROMPT = "# "
_BOOT_S = 120.0
#: Machines whose consoles are shown when a test fails.
running: list[Machine] = []


class Guest:
    """A machine whose guest has booted; ``vm`` is the machine."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm

    def run(self, command: str, *, check: bool = True) -> str:
        """Runs a line of shell in the guest; what it prints. Raises CalledProcessError where it
        fails, with all that it said, unless ``check`` is false."""
        done = self.vm.exec(["sh", "-c", command])
        output, error = (data.decode("utf-8", "replace") for data in (done.stdout, done.stderr))
        if check and done.code != 0:
            failure = subprocess.CalledProcessError(done.code, command, output, error)
            if error:
                failure.add_note(error.rstrip())
            raise failure
        return output


@contextmanager
def boot(**options: Any) -> Iterator[Guest]:
    """Makes a machine with ``options`` of ``Machine``, by default of the default guest, boots it to
    its shell's prompt, and ends it."""
    with Machine(**{"agent": True, "memory": "512M", **options}) as vm:
        running.append(vm)
        try:
            vm.start()
            vm.console.expect(_PROMPT, _BOOT_S)
            yield Guest(vm)
        finally:
            running.remove(vm)
