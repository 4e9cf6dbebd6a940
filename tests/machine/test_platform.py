"""What a guest finds beside the CPU, from the machine's side."""

from pathlib import Path

import pytest
from tests.machine.guests import POWER_OFF

from tetrarch import HostError, Machine, StopReason, _native
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.platforms import Hypercalls, Platform, TrapHook
from tetrarch.testing import pvh_kernel

# mov eax, 12345 ; vmcall ; mov [0x500], eax
UNKNOWN_CALL = bytes.fromhex("b839300000 0f01c1 a300050000") + POWER_OFF
# mov [0x500], esi
KEEP_ESI = bytes.fromhex("893500050000") + POWER_OFF
KEPT = 0x500
LIMIT_S = 30


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return tmp_path / "kernel"


def test_plain_pc_answers_hypercalls_as_kvm_does(kernel: Path) -> None:
    kernel.write_bytes(pvh_kernel(UNKNOWN_CALL))
    with Machine(kernel=kernel, memory="16M", engine="bt") as vm:
        assert vm.run(LIMIT_S).reason is StopReason.POWERED_OFF
        assert int.from_bytes(vm.read_memory(KEPT, 4), "little", signed=True) == -1000


def test_platform_changes_what_the_guest_starts_with(kernel: Path) -> None:
    def start(vm: EngineVm, registers: dict[str, int]) -> dict[str, int]:
        assert registers["rbx"] != 0  # PVH: the start info
        vm.write_memory(registers["rbx"] + 0x100, b"mark")
        return {"rsi": 0x1234_5678}

    kernel.write_bytes(pvh_kernel(KEEP_ESI))
    platform = Platform(name="test", start=start)
    with Machine(kernel=kernel, memory="16M", engine="bt", platform=platform) as vm:
        assert vm.run(LIMIT_S).reason is StopReason.POWERED_OFF
        assert vm.read_memory(KEPT, 4) == bytes.fromhex("78563412")


def test_exception_of_a_handler_comes_out_of_the_machine(kernel: Path) -> None:
    error = LookupError("no such call")

    def fail(call: object) -> int:
        raise error

    kernel.write_bytes(pvh_kernel(UNKNOWN_CALL))
    platform = Platform(name="test", hypercalls=Hypercalls(fail))
    with Machine(kernel=kernel, memory="16M", engine="bt", platform=platform) as vm:
        with pytest.raises(LookupError) as raised:
            vm.run(LIMIT_S)
        assert raised.value is error


def test_platform_that_the_engine_cannot_have_is_refused_with_the_mend() -> None:
    reason = _native.engine_available("kvm")
    if reason is not None:
        pytest.skip("; ".join(reason))
    platform = Platform(name="test", trap_hook=TrapHook(print, frozenset({13})))
    with pytest.raises(HostError, match="use engine bt") as raised:
        Machine(memory="16M", engine="kvm", platform=platform)
    assert len(str(raised.value).splitlines()) == 1
