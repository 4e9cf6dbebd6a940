"""Machines and processes: forks, children of multiprocessing, and machines that are forgotten."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

LIMIT_S = 60
# The parent's machine echoes what is typed, before and after; the child says what it met.
BEGIN = """
import gc, multiprocessing, os, sys, threading, warnings
from tetrarch import Machine, MachineStateError

def make(name="parents"):
    return Machine(kernel="kernel", engine="bt", memory="16M", name=name)

def echoes(vm, word):
    vm.console.send(word)
    return vm.console.expect(word)

def run_one(word, queue):
    with make("childs") as vm:
        vm.start()
        queue.put(echoes(vm, word))
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "kernel").write_bytes(pvh_kernel(guests.ECHO))
    return tmp_path


def run(directory: Path, script: str) -> str:
    (directory / "script.py").write_text(BEGIN + script)
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "script.py"],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_of_multiprocessing_runs_a_machine_of_its_own(directory: Path, method: str) -> None:
    script = f"""
if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    with make() as vm:
        vm.start()
        echoes(vm, "one")
        queue = context.SimpleQueue()
        child = context.Process(target=run_one, args=("two", queue))
        child.start()
        print(queue.get())
        child.join()
        print(child.exitcode, echoes(vm, "three"))
"""
    assert run(directory, script) == "two\n0 three\n"


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)"])
def test_fork_has_a_shadow_that_harms_nobody(directory: Path, end: str) -> None:
    script = f"""
vm = make()
vm.start()
echoes(vm, "one")
vcpu = vm.vcpus[0]
if (pid := os.fork()) == 0:
    attempts = [
        vm.pause, vm.wait, lambda: vm.vcpus[0].regs, lambda: vm.memory[0], vm.stats,
        lambda: vm.write_memory(0x100000, bytes(16)), lambda: vm.console.send("x"),
        lambda: vm.save("saved"), lambda: vm.breakpoint(0), lambda: vm.exec(["true"]),
    ]
    for attempt in attempts:
        try:
            attempt()
            print("it did")
        except MachineStateError as error:
            assert "forked" in str(error), error
    vm.kill()
    del vm
    gc.collect()
    print("shadow", flush=True)
    {end}
_, status = os.waitpid(pid, 0)
print(status, echoes(vm, "two"))
vm.kill()
"""
    assert run(directory, script) == "shadow\n0 two\n"


def test_forgotten_machine_is_named_and_gives_all_back(directory: Path) -> None:
    script = """
def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

def forget():
    vm = make("forgotten")
    vm.start()
    echoes(vm, "one")

with make() as first:
    first.run(0.1)  # what a process opens once
before = held()
forget()
for _ in range(200):
    gc.collect()  # devices and their machine refer to each other
    if held() == before:
        break
    threading.Event().wait(0.05)
print(held() == before, held(), before)
"""
    said = run(directory, script)
    assert "ResourceWarning: <Machine 'forgotten' on bt, running> was forgotten" in said
    assert said.splitlines()[-1].startswith("True"), said


def test_process_that_ends_takes_its_machine_with_it(directory: Path) -> None:
    script = 'vm = make()\nvm.start()\nprint(echoes(vm, "one"))\n'
    assert run(directory, script).startswith("one\n")


def test_machine_is_not_pickled_but_its_config_is(directory: Path) -> None:
    with Machine(kernel=directory / "kernel", engine="bt", memory="16M") as vm:
        with pytest.raises(TypeError, match="cannot be pickled: make it in the other process"):
            pickle.dumps(vm)
        assert pickle.loads(pickle.dumps(vm.config)) == vm.config
