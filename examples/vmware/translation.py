"""Binary translation: guest code is decoded once, and what was made of it runs from then on.

SMSW shows the control register to any program, so a kernel that runs as one would see the host's:
it is the kind of instruction for which x86 could not be virtualized by traps alone. Here it is
answered by the interpreter, and all else is the host's own code: crates/engine-bt/src/translate,
exec and interp.
"""

from pathlib import Path

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

ROUNDS = 1_000_000
# mov ecx, ROUNDS ; 1: smsw eax ; dec ecx ; jnz 1b ; out 0xf4, eax ; jmp $
code = b"\xb9" + ROUNDS.to_bytes(4, "little") + bytes.fromhex("0f01e0 49 75fa e7f4 ebfe")
Path("kernel").write_bytes(pvh_kernel(code))
with Machine(kernel="kernel", engine="bt", memory="16M", debug_exit=True) as vm:
    cr0 = vm.run().value
    bt = vm.stats()["bt"]
    print(f"the guest's CR0 is {cr0:#x}: protected mode, no paging")
    print(f"{3 * ROUNDS + 3} instructions were run")
    print(f"{bt['instructions_translated']} translated, in {bt['blocks']} blocks")
    print(f"{bt['interpreted']} interpreted: SMSW, each time")
