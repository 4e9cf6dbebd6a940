"""A machine that was held goes on by SIGCONT."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tetrarch import Machine
from tetrarch.cli.resume import resumed_by_signal
from tetrarch.testing import ScriptedVm, pvh_kernel


def test_signal_resumes_whoever_else_has_a_handler(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    before = signal.getsignal(signal.SIGCONT)
    with Machine(kernel=kernel, vm=ScriptedVm(ScriptedVm.spin_until_stop)) as vm:
        with resumed_by_signal(vm):
            os.kill(os.getpid(), signal.SIGCONT)  # a machine that was not started
            vm.start()
            os.kill(os.getpid(), signal.SIGCONT)  # one that runs
            # As a terminal in raw mode does.
            signal.signal(signal.SIGCONT, lambda signum, frame: None)
            for _ in range(3):
                vm.pause()
                os.kill(os.getpid(), signal.SIGCONT)
                while not vm.running:
                    time.sleep(0.001)
        assert signal.getsignal(signal.SIGCONT) == before
        assert signal.set_wakeup_fd(-1) == -1
