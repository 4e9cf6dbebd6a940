"""Traces: the translator finds out that the guest writes to code which it has translated.

The pages that code was read from are noted; a write to one, by a vCPU or a device, takes what was
made of it away: crates/engine-bt/src/memory. Shadow page tables are kept true in the same way.
"""

from pathlib import Path

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

# mov ecx, 9 ; 1: mov [0x10000c], cl, the operand of: mov al, 0 ; add al, '0' ;
# mov edx, 0x3f8 ; out dx, al ; dec ecx ; jnz 1b ; power off by ACPI
code = bytes.fromhex("b909000000 880d0c001000 b000 0430 baf8030000 ee 49 75ed")
code += bytes.fromhex("ba04060000 b800340000 66ef ebfe")
Path("kernel").write_bytes(pvh_kernel(code))
with Machine(kernel="kernel", engine="bt", memory="16M") as vm:
    vm.run()
    bt = vm.stats()["bt"]
    print(f"the guest wrote {vm.console.text} by an instruction that it changed each time")
    print(f"{bt['invalidated_pages']} times a page of code was written to")
