"""CPU models: as they are written down, what a guest finds of one, and what is refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from tests.boot.conftest import build_bzimage
from tests.machine import guests

from tetrarch import ConfigError, HostError, Machine
from tetrarch._native import Vm
from tetrarch.errors import ValueProblem
from tetrarch.machine.config import EngineName, make_config
from tetrarch.machine.cpu import cpu_for, lacking
from tetrarch.machine.cpu_models import (
    cpu_models,
    feature_named,
    needing,
    optional_features,
    roots,
    with_needs,
    words_of,
)
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.selection import engines
from tetrarch.platforms.pc import PC
from tetrarch.testing import pvh_kernel

LIMIT_S = 60
ENGINES: list[EngineName] = ["bt", "kvm"]
#: OSXSAVE, HTT and others that are the machine's own, as crates/engine/src/features.rs has them.
NO_FEATURES = {
    "1.ECX": 1 << 27,
    "1.EDX": 1 << 28,
    "7.EBX": 1 << 6 | 1 << 13,
    "7.ECX": 1 << 4,
    "80000001.ECX": 1 << 1,
    "80000008.EBX": 1 << 26 | 1 << 29,
    "80000021.EAX": 1 << 0 | 1 << 6 | 1 << 29 | 1 << 30,
}


class Told:
    """Takes what the guest writes."""

    def __init__(self) -> None:
        self.words: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.words.append(value)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    (info,) = (info for info in engines() if info.name == name)
    if not info.available:
        pytest.skip(f"engine {name}: {info.reason}")
    if info.slow:
        pytest.skip("a KVM without hardware may show its guests the host's own CPUID")
    return name


def leaves_seen(
    leaves: list[tuple[int, int]], engine: EngineName, cpu: str, directory: Path
) -> dict[tuple[int, int], list[int]]:
    """What CPUID tells a guest: EAX to EDX of each leaf and subleaf."""
    kernel, told = directory / "kernel", Told()
    kernel.write_bytes(pvh_kernel(guests.tell_cpuid(leaves)))
    with Machine(kernel=kernel, memory="16M", engine=engine, cpu=cpu) as vm:
        vm.attach_ports(0x500, 4, told)
        vm.run(timeout=LIMIT_S)
    return {at: told.words[4 * index : 4 * index + 4] for index, at in enumerate(leaves)}


def words_seen(engine: EngineName, cpu: str, directory: Path) -> dict[str, int]:
    """The words that hold features, as a guest sees them."""
    places = {}
    for word in words_of(frozenset(), "GenuineIntel"):
        leaf, *subleaf, register = word.split(".")
        at = (int(leaf, 16), int(subleaf[0]) if subleaf else 0)
        places[word] = at, ("EAX", "EBX", "ECX", "EDX").index(register)
    seen = leaves_seen(sorted({at for at, _ in places.values()}), engine, cpu, directory)
    return {
        word: seen[at][register] & ~NO_FEATURES.get(word, 0)
        for word, (at, register) in places.items()
    }


def vendor_of(engine: str) -> str:
    return Vm(engine, 1 << 20).cpu_identity()[0]


def possible(name: str, engine: str) -> CpuSpec:
    """The model without what cannot be had here."""
    lacks = lacking(CpuSpec(name), engine, PC)
    return CpuSpec(name, (), tuple(roots(frozenset((*lacks.host, *lacks.engine)))))


@pytest.mark.parametrize(
    "text", ["host", "portable", "x86-64-v3", "Haswell,-pcid", "EPYC-Rome,+ibrs,-smap", "host,-avx"]
)
def test_a_cpu_is_written_as_it_is_read(text: str) -> None:
    spec = CpuSpec.parse(text)
    assert str(spec) == text
    assert make_config({"cpu": spec}).cpu == spec


@pytest.mark.parametrize(
    ("written", "spec"),
    [
        ("host,+sse4.1,+sse4-2", CpuSpec("host", ("sse4_1", "sse4_2"))),
        ("host,-tsc-deadline", CpuSpec("host", (), ("tsc_deadline_timer",))),
        ("host,+lzcnt,+AVX512VNNI", CpuSpec("host", ("abm", "avx512_vnni"))),
        ("host,-pcid,-pcid", CpuSpec("host", (), ("pcid",))),
    ],
)
def test_features_are_known_by_their_other_names(written: str, spec: CpuSpec) -> None:
    assert CpuSpec.parse(written) == spec


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("haswell", "cpu: 'haswell' is no CPU model; did you mean Haswell?"),
        ("Icelake-Servr", "'Icelake-Servr' is no CPU model; did you mean Icelake-Server?"),
        ("help", "'help' is no CPU model; tetrarch cpu-models lists them"),
        ("", "'' is no CPU model"),
        (7, "7 is no CPU model; give host, or a name"),
        ("host,-avx5", "'avx5' is no feature of a CPU; did you mean avx"),
        ("host,+wings", "'wings' is no feature of a CPU"),
        ("host,avx", "'avx' is no change of a CPU; write +NAME or -NAME"),
        ("host,", "'' is no change of a CPU"),
        ("host,+avx,-avx", "avx is added and removed; give one of both"),
        ("host,+avx2,-xsave", "avx2 is added, and xsave, which it needs, is removed; leave -xsave"),
    ],
)
def test_what_is_no_cpu_is_refused_with_what_is_near(written: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config({"cpu": written})


def test_the_file_of_models_is_sound() -> None:
    known = dict(Vm("bt", 1 << 20).cpu_features()).keys()
    assert words_of(frozenset(), "GenuineIntel").keys() == known
    for model in cpu_models().values():
        assert all(feature_named(name) == name for name in model.features), model.name
        assert with_needs(model.features) == model.features, model.name
    assert all(feature_named(name) == name for name in optional_features())


@pytest.mark.parametrize(
    ("name", "signature"),
    # As family, model and stepping stand in EAX of leaf 1 of these processors.
    [
        ("Haswell", 0x306C1),
        ("SapphireRapids", 0x806F4),
        ("EPYC", 0x800F12),
        ("EPYC-Rome", 0x830F10),
    ],
)
def test_family_model_and_stepping_are_packed_as_cpuid_has_them(name: str, signature: int) -> None:
    assert cpu_models()[name].signature == signature


def test_what_needs_a_feature_goes_with_it() -> None:
    assert {"avx2", "fma", "avx512vl", "vaes"} <= needing(["avx"])
    assert "aes" not in needing(["avx"])
    for needed in ("xsave", "sse2", "sse"):
        assert "avx" in needing([needed])
    with pytest.raises(ValueProblem):
        feature_named("no such")


@pytest.mark.parametrize("feature", ["lm", "pae"])
def test_kernel_that_starts_in_a_mode_which_its_cpu_lacks_is_refused(
    tmp_path: Path, feature: str
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(build_bzimage())
    with (
        Machine(kernel=kernel, engine="bt", memory="64M", cpu=f"host,-{feature}") as vm,
        pytest.raises(ConfigError, match=f"64-bit mode.*leave -{feature} out"),
    ):
        vm.load()
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    with Machine(kernel=kernel, engine="bt", memory="16M", cpu=f"host,-{feature}") as vm:
        assert vm.run(LIMIT_S).ok


def test_guest_finds_what_a_model_has_and_no_more(engine: EngineName, tmp_path: Path) -> None:
    spec = possible("x86-64-v3", engine)
    vendor = vendor_of(engine)
    model = with_needs(cpu_models()[spec.name].features) - needing(spec.removed)
    least, most = words_of(model, vendor), words_of(model | optional_features(), vendor)
    seen = words_seen(engine, str(spec), tmp_path)
    assert {word: bits & least[word] for word, bits in seen.items()} == least
    assert {word: bits & ~most[word] for word, bits in seen.items()} == dict.fromkeys(most, 0)


def test_guest_finds_the_family_of_a_model(engine: EngineName, tmp_path: Path) -> None:
    vendor = vendor_of(engine)
    name = {"GenuineIntel": "Nehalem", "AuthenticAMD": "EPYC"}.get(vendor)
    if name is None:
        pytest.skip(f"there is no model of {vendor}'s")
    leaves = [(0, 0), (1, 0), (0x8000_0001, 0)]
    seen = leaves_seen(leaves, engine, str(possible(name, engine)), tmp_path)
    assert struct.pack("<III", *(seen[0, 0][at] for at in (1, 3, 2))).decode() == vendor
    assert seen[1, 0][0] == cpu_models()[name].signature
    assert seen[0x8000_0001, 0][0] in (0, cpu_models()[name].signature)


def test_guest_does_not_find_what_was_removed(engine: EngineName, tmp_path: Path) -> None:
    whole, less = (words_seen(engine, cpu, tmp_path) for cpu in ("host", "host,-avx"))
    gone = words_of(needing(["avx"]), "GenuineIntel")
    assert less == {word: bits & ~gone[word] for word, bits in whole.items()}


def test_what_the_engine_lacks_is_named_and_what_is_given_instead_works(tmp_path: Path) -> None:
    # No tier of it has ZMM registers.
    with pytest.raises(HostError) as refused:
        cpu_for(CpuSpec("x86-64-v4"), "bt", PC)
    assert re.search(r"cpu x86-64-v4: .* has no .*avx512f", refused.value.cause)
    instead = re.search(r"give (x86-64-v4,\S+)", refused.value.mend)
    assert instead is not None
    assert "-avx512f" in instead[1]
    assert "avx512bw" not in instead[1], "it goes with the other"
    seen = words_seen("bt", instead[1], tmp_path)
    assert seen["7.EBX"] & words_of(frozenset({"avx512f"}), "GenuineIntel")["7.EBX"] == 0


def test_an_added_feature_that_cannot_be_is_named() -> None:
    with pytest.raises(HostError, match=r"has no vmx; give host$"):
        cpu_for(CpuSpec.parse("host,+vmx"), "bt", PC)


def test_a_model_of_another_vendor_is_refused() -> None:
    vendor = vendor_of("bt")
    other = "EPYC" if vendor == "GenuineIntel" else "Haswell"
    with pytest.raises(HostError, match=rf"cpu {other}: it is a CPU of .*'s, and this host's is"):
        cpu_for(CpuSpec(other), "bt", PC)
