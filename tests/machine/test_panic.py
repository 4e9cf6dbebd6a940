"""What the panic watch takes for a panic, with a guest of three functions."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.threads import busy_time

PANIC = b"[    1.5] ---[ end Kernel panic - not syncing: VFS: no root ]---\r\n"
LIMIT_S = 30


class Guest:
    """Busy or idle; ``places`` says of each look whether it was in the kernel."""

    def __init__(self, *, busy: bool, places: list[bool | None], interval: float = 0.01) -> None:
        self.places = iter(places)
        self.busy = busy
        self.looks = 0
        self.measured = threading.Semaphore(0)
        self.panics: list[str] = []
        self.panicked = threading.Event()
        self.told = 0
        self.watch = PanicWatch(
            self.cpu_time, self.in_kernel, self.on_panic, self.on_told, interval=interval
        )

    def cpu_time(self) -> float:
        self.measured.release()
        return time.monotonic() if self.busy else 0.0

    def in_kernel(self) -> bool | None:
        self.looks += 1
        return next(self.places)

    def on_told(self) -> None:
        self.told += 1

    def on_panic(self, message: str) -> None:
        self.panics.append(message)
        self.panicked.set()


@pytest.fixture
def guest(others: set[threading.Thread]) -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(*, busy: bool, places: list[bool | None], interval: float = 0.01) -> Guest:
        made.append(Guest(busy=busy, places=places, interval=interval))
        return made[-1]

    yield make
    for one in made:
        one.watch.close()
    wait_for_checks(others)


def checks() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "panic-watch"}


@pytest.fixture(autouse=True)
def others() -> set[threading.Thread]:
    """Threads of machines that other tests of this process have: a suspicion may last."""
    return checks()


def wait_for_checks(others: set[threading.Thread]) -> None:
    """Until nothing is suspected any more."""
    for thread in checks() - others:
        thread.join(LIMIT_S)


def test_guest_that_tells_of_its_panic_is_looked_at_without_a_line(
    guest: Callable[..., Guest],
) -> None:
    one = guest(busy=True, places=[True] * 4)
    one.watch.told()
    one.watch.told()
    assert one.panicked.wait(LIMIT_S)
    assert one.panics == ["a kernel panic, told by pvpanic"]
    assert one.told == 1


def test_guest_that_suspects_itself_again_and_again_costs_one_thread(
    guest: Callable[..., Guest],
    others: set[threading.Thread],
) -> None:
    one = guest(busy=False, places=[], interval=LIMIT_S)  # it looks no second time
    for _ in range(500):
        one.watch.told()
        one.watch.feed(PANIC + b"and goes on\n")
    assert len(checks() - others) == 1
    assert one.panics == []


def test_busy_kernel_after_the_line_is_a_panic(guest: Callable[..., Guest]) -> None:
    one = guest(busy=True, places=[True] * 4)
    one.watch.feed(PANIC)
    assert one.panicked.wait(LIMIT_S)
    assert one.panics == ["Kernel panic - not syncing: VFS: no root"]


def test_look_that_fails_is_no_sign_of_either(
    guest: Callable[..., Guest], others: set[threading.Thread]
) -> None:
    one = guest(busy=True, places=[True, True, True, None, True, True, True, False])
    one.watch.feed(PANIC)
    wait_for_checks(others)
    assert (one.looks, one.panics) == (8, [])


def test_program_that_prints_the_line_is_none(
    guest: Callable[..., Guest], others: set[threading.Thread]
) -> None:
    one = guest(busy=True, places=[True, True, True, False])
    one.watch.feed(PANIC)
    wait_for_checks(others)
    assert (one.looks, one.panics) == (4, [])


def test_idle_guest_that_printed_the_line_is_none(guest: Callable[..., Guest]) -> None:
    one = guest(busy=False, places=[])
    one.watch.feed(PANIC)
    for _ in range(40):  # each check measures twice; four in a row would make a panic
        assert one.measured.acquire(timeout=LIMIT_S)
    assert (one.looks, one.panics) == (0, [])


def test_more_output_ends_the_suspicion(
    guest: Callable[..., Guest], others: set[threading.Thread]
) -> None:
    one = guest(busy=False, places=[])
    one.watch.feed(PANIC + b"login: ")
    wait_for_checks(others)
    assert (one.looks, one.panics) == (0, [])


def test_thread_that_waits_for_a_cpu_is_busy() -> None:
    """On a host that is crowded, where it hardly has one."""
    cpu = min(os.sched_getaffinity(0))
    crowd = [subprocess.Popen(["taskset", "-c", str(cpu), "yes"], stdout=subprocess.DEVNULL)]
    crowd += [subprocess.Popen(crowd[0].args, stdout=subprocess.DEVNULL) for _ in range(7)]
    done, shares = threading.Event(), list[float]()

    def work() -> None:
        os.sched_setaffinity(threading.get_native_id(), {cpu})
        while not done.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)  # without the interpreter's lock

    thread = threading.Thread(target=work)
    thread.start()
    try:
        before, start = busy_time(thread), time.monotonic()
        time.sleep(1)
        shares.append((busy_time(thread) - before) / (time.monotonic() - start))
    finally:
        done.set()
        for process in crowd:
            process.kill()
            process.wait()
        thread.join()
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this host does not tell how long a thread waited for a CPU")
    assert shares[0] > 0.5


def test_thread_that_ends_while_it_is_looked_at_was_not_busy() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    thread = threading.Thread(target=time.sleep, args=(0.2,))
    thread.start()
    # Nobody has the number of a process that was waited for; the thread's own is soon another's.
    thread._native_id = process.pid  # type: ignore[attr-defined]
    assert busy_time(thread) == 0.0
    thread.join()


def test_time_of_a_thread_on_a_host_that_tells_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> object:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    me = threading.current_thread()
    before = busy_time(me)
    while time.thread_time() < before + 0.01:
        pass
    assert before + 0.01 <= busy_time(me) <= time.thread_time()
