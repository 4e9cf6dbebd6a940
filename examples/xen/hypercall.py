"""Hypercalls: what a Linux asks of Xen while it boots.

Each leaves the guest by VMCALL or VMMCALL, with its number in RAX. The rare ones are answered in
src/tetrarch/platforms/xen, a file each, the frequent ones in crates/xen/src/hypercall.rs.
"""

from collections import Counter
from dataclasses import replace

from tetrarch import Machine
from tetrarch.platforms import GuestCall
from tetrarch.platforms.xen import Xen

NAMES = {12: "memory_op", 17: "xen_version", 24: "vcpu_op", 32: "event_channel_op", 34: "hvm_op"}
asked: Counter[str] = Counter()


def count(call: GuestCall) -> int | None:
    asked[NAMES.get(call["rax"], "others")] += 1
    return calls.handler(call)


xen = Xen().platform()
assert xen.hypercalls is not None
calls = xen.hypercalls
with Machine(engine="bt", platform=replace(xen, hypercalls=replace(calls, handler=count))) as vm:
    vm.start()
    vm.console.expect("root@tetrarch", 120)
    print(dict(asked), "and", vm.stats()["exits"]["hypercall"] - asked.total(), "in Rust")
