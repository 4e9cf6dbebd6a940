"""The backdoor: a guest asks its hypervisor by an IN from port 0x5658, with a magic number in EAX.

Who answers: src/tetrarch/platforms/vmware/backdoor.py and, for this command, facts.py.
"""

from pathlib import Path

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

# mov eax, "hXMV" ; mov ecx, GETMEMSIZE ; mov edx, 0x5658 ; in eax, dx ; out 0xf4, eax ; jmp $
code = bytes.fromhex("b868584d56 b914000000 ba58560000 ed e7f4 ebfe")
Path("kernel").write_bytes(pvh_kernel(code))
for platform in ("pc", "vmware"):
    with Machine(
        kernel="kernel", engine="bt", memory="64M", platform=platform, debug_exit=True
    ) as vm:
        print(f"on platform {platform} EAX is {vm.run().value:#x}")
