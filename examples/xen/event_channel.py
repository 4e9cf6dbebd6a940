"""Event channels: how one CPU of a guest has another one do something.

An event is a bit in a page that guest and hypervisor share, and an interrupt at one vector for all
of them: crates/xen/src/domain.rs. Linux makes of each port an interrupt of its own.
"""

from tetrarch import Machine


def calls(vm: Machine) -> list[list[int]]:
    """Events that were to make each CPU call a function: of each port, on each CPU."""
    table = vm.exec(["grep", "callfunc", "/proc/interrupts"]).stdout.decode()
    return [[int(count) for count in row.split()[1:3]] for row in table.splitlines()]


with Machine(engine="bt", platform="xen", cpus=2, agent=True) as vm:
    vm.start()
    before = calls(vm)
    # Programs begin and end on either CPU, and what one kernel thread knows the other has to hear.
    vm.exec(["sh", "-c", "for cpu in 1 2 1 2; do taskset $cpu sleep 0.01; done"])
    for port, (was, now) in enumerate(zip(before, calls(vm), strict=True)):
        grown = [more - less for less, more in zip(was, now, strict=True)]
        print(f"port {port}: {grown[0]} on CPU 0, {grown[1]} on CPU 1")
    vm.kill()
