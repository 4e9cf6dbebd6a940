"""Runs in the outer system: a guest of VMware's on engine kvm."""

from __future__ import annotations

import time

from tetrarch import Machine, block

PROMPT = "root@tetrarch:~# "
LIMIT_S = 1200
MIB = 1 << 20
LOG = (
    "Hypervisor detected: VMware",
    "DMI: VMware, Inc. VMware Virtual Platform",
    "vmware: TSC freq read from hypervisor",
    "vmware: hypercall mode: 0x00",  # the port
)
FIO = (
    "fio --name=all --filename=/dev/sda --rw=randwrite --bsrange=4k-64k --direct=1 "
    "--ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 "
    "--output-format=terse --minimal"
)


def main() -> None:
    block.create("/tmp/disk", 8 * MIB)
    machine = Machine(
        engine="kvm",
        platform="vmware",
        memory="512M",
        kernel="/suite/vmlinuz",
        initrd="/suite/initrd",
        disk="/tmp/disk,bus=pvscsi",
    )
    with machine:
        machine.start()
        machine.console.expect(PROMPT, LIMIT_S)

        def ask(command: str) -> str:
            machine.console.send(command + "; echo status $?\n")
            said = machine.console.expect(PROMPT, LIMIT_S)
            assert "status 0" in said, said
            return said

        log = ask("dmesg")
        assert all(line in log for line in LOG), log
        print("outer: Linux has found VMware", flush=True)
        # As in tests/nodes.py.
        ask("until (: </dev/sda) 2>/dev/null; do sleep 0.1; done")
        ask("ls /sys/bus/pci/drivers/vmw_pvscsi | grep 0000")
        ask(FIO)
        print("outer: fio has found what it wrote to PVSCSI", flush=True)
        ask("ls /sys/bus/pci/drivers/vmw_vmci | grep 0000")
        end = time.monotonic() + LIMIT_S
        machine.balloon.target = 64 * MIB
        while machine.balloon.actual < 64 * MIB:
            assert time.monotonic() < end
            time.sleep(0.1)
        ask("grep -E ': +[1-9][0-9]* .*vmw_vmci' /proc/interrupts")
        print("outer: VMCI's doorbell has woken the balloon", flush=True)
        machine.console.send("poweroff -f\n")
        assert machine.wait(LIMIT_S).ok
    print("outer: the guest has powered off", flush=True)


if __name__ == "__main__":
    main()
