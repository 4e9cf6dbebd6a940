"""A debugger of a few lines: stops in a function of a stock kernel, and shows who calls it."""

import sys
from pathlib import Path

from tetrarch import Machine
from tetrarch.gdb.symbols import read_symbols
from tetrarch.machine.breakpoints import Hit

FUNCTION = sys.argv[1] if len(sys.argv) > 1 else "do_unlinkat"

with Machine(engine="bt", agent=True) as vm:
    vm.start()
    listed = vm.exec(["cat", "/proc/kallsyms"]).stdout.decode()
    symbols = read_symbols(listed, Path("/proc/kallsyms"))
    address = {symbol.name: symbol.address for symbol in symbols}

    def show(hit: Hit) -> None:
        # Arguments are in RDI, RSI and so on (System V ABI); a struct filename begins with a
        # pointer to the name.
        regs = hit.vcpu.regs
        (name,) = memoryview(hit.vcpu.linear[regs.rsi : regs.rsi + 8]).cast("Q")
        caller = int.from_bytes(hit.vcpu.linear[regs.rsp : regs.rsp + 8], "little")
        near = max((s for s in symbols if s.address <= caller), key=lambda s: s.address)
        print(f"{FUNCTION}({hit.vcpu.linear.text(name)}), from {near.name}")

    with vm.breakpoint(address[FUNCTION], show) as point:
        vm.exec(["sh", "-c", "touch /tmp/one /tmp/two; rm /tmp/one /tmp/two"])
        print(point.hits, "hits")
    vm.kill()
