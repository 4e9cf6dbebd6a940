"""A PCI device in Python, plugged into a Linux guest that runs, used, and plugged out again."""

from tetrarch import Machine
from tetrarch.pci import Bar, BarPart, Identity, PciFunction

PROMPT = "root@tetrarch:~# "


class Adder:
    """Adds what is written to its register; reads back the sum."""

    def __init__(self, machine: Machine) -> None:
        self.sum = 0
        registers = Bar(index=0, size=0x1000, parts=[BarPart(0, 4, self)])
        # A vendor and device of your own; 0xff0000 is "no class".
        identity = Identity(vendor=0x1234, device=0xADD0, class_code=0xFF0000)
        self.function = PciFunction(machine.engine_vm, identity, [registers])

    def read(self, offset: int, size: int) -> int:
        return self.sum & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.sum += value


with Machine(engine="bt") as vm:
    vm.start()
    vm.console.expect(PROMPT, timeout=90)

    def shell(command: str) -> str:
        vm.console.send(command + "\n")
        return vm.console.expect(PROMPT, timeout=90).removesuffix(PROMPT).strip()

    adder = Adder(vm)
    slot = vm.attach_pci(adder)
    device = f"/sys/bus/pci/devices/0000:00:{slot:02x}.0"
    shell(f"until [ -e {device}/enable ]; do sleep 0.1; done")
    print("Linux found", shell(f"cat {device}/vendor {device}/device").split())

    shell(f"echo 1 > {device}/enable")
    address = shell(f"head -n 1 {device}/resource").split()[0]
    shell(f"devmem {address} 32 20; devmem {address} 32 22")
    print("the sum is", int(shell(f"devmem {address} 32"), 16))

    vm.detach(adder)
    print("still there:", "add0" in shell("cat /sys/bus/pci/devices/*/device"))
