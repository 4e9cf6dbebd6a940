"""A Debian guest that is saved, and goes on in another process as if nothing had been."""

import subprocess
import sys
import time
from pathlib import Path

from tetrarch import Machine
from tetrarch.images import CachedGuest

LIMIT_S = 90
PROMPT = "root@tetrarch:~# "
CLOCKS = "cat /proc/uptime; date +%s"
RESTORE = f"""
import sys
from tetrarch import Machine

with Machine.restore(sys.argv[1]) as vm:
    vm.start()
    # What was typed before, a variable of the shell, a clock that goes on, a timer.
    print(vm.console.expect({PROMPT!r}, {LIMIT_S}))
    vm.console.send("echo $kept; {CLOCKS}; sleep 1; {CLOCKS}\\n")
    print(vm.console.expect({PROMPT!r}, {LIMIT_S}))
    print("ran", vm.uptime)
    vm.console.send("poweroff\\n")
    print(vm.wait({LIMIT_S}).reason)
"""


def clocks(text: str) -> list[float]:
    """Uptime and date, by turns."""
    return [float(line.split()[0]) for line in text.splitlines() if line[:1].isdigit()]


def test_debian_guest_goes_on_in_another_process(debian_guest: CachedGuest, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with Machine(engine="bt") as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        vm.console.send(f"kept=seven; {CLOCKS}\n")
        uptime, date = clocks(vm.console.expect(PROMPT, LIMIT_S))
        with vm.paused():
            ran = vm.uptime
            vm.console.send("echo typed\n")
            vm.save(saved)
    # The host's time goes on, the guest's does not; it would see this much.
    time.sleep(3)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RESTORE, str(saved)],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("typed\n")
    assert "seven\n" in done.stdout
    assert done.stdout.endswith("powered-off\n")
    first_uptime, first_date, second_uptime, second_date = clocks(done.stdout)
    ran_on = float(done.stdout.partition("ran ")[2].split()[0]) - ran
    # Two decimals and whole seconds are what the guest shows.
    assert -0.02 <= first_uptime - uptime <= ran_on + 0.02
    assert -1 <= first_date - date <= ran_on + 1
    assert 1 <= second_uptime - first_uptime <= ran_on + 0.02
    assert 0 <= second_date - first_date <= ran_on + 1
