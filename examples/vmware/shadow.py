"""Shadowed page tables: the host never walks the guest's tables while guest code runs.

What translated code goes by is filled from them at a miss, and emptied where the guest says that it
has changed them: crates/engine-bt/src/memory. Here a guest maps 64 pages and reads each.
"""

from pathlib import Path

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

PAGES, TABLES, P, W, LARGE = 64, 0x20_0000, 1, 2, 1 << 7
# mov eax, cr4 ; or al, PSE ; mov cr4, eax ; mov eax, TABLES ; mov cr3, eax ; mov eax, cr0 ;
# or eax, PG ; mov cr0, eax
PAGING = "0f20e0 0c10 0f22e0 b800002000 0f22d8 0f20c0 0d00000080 0f22c0"
# mov ecx, PAGES ; mov esi, 0x400000 ; 1: mov eax, [esi] ; add esi, 4096 ; dec ecx ; jnz 1b
READ_ALL = "b940000000 be00004000 8b06 81c600100000 49 75f5"
RELOAD = "0f20d8 0f22d8"  # mov eax, cr3 ; mov cr3, eax
OFF = "ba04060000 b800340000 66ef ebfe"
for what, body in {"once": "", "twice": READ_ALL, "twice, CR3 written": RELOAD + READ_ALL}.items():
    Path("kernel").write_bytes(pvh_kernel(bytes.fromhex(PAGING + READ_ALL + body + OFF)))
    with Machine(kernel="kernel", engine="bt", memory="16M") as vm:
        vm.load()
        directory = (LARGE | P, TABLES + 4096 | P | W)  # 4 MiB as they are; the 64 pages
        vm.memory[TABLES : TABLES + 8] = b"".join(it.to_bytes(4, "little") for it in directory)
        table = b"".join((0x80_0000 + n * 4096 | P | W).to_bytes(4, "little") for n in range(PAGES))
        vm.memory[TABLES + 4096 : TABLES + 4096 + len(table)] = table
        vm.run()
        print(f"read {what}: {vm.stats()['bt']['tlb_misses']} looks at the guest's tables")
