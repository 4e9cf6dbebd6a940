"""CPUs and their topology as they are written down."""

from __future__ import annotations

import pytest

from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.machine.config import make_config
from tetrarch.machine.cpus import CpusSpec


@pytest.mark.parametrize(
    ("written", "spec"),
    [
        (3, CpusSpec(3, 1, 3, 1)),
        ("8,sockets=2,cores=2,threads=2", CpusSpec(8, 2, 2, 2)),
        ("8,threads=2", CpusSpec(8, 1, 4, 2)),
        ("8,sockets=2", CpusSpec(8, 2, 4, 1)),
        ("8,cores=2,threads=2", CpusSpec(8, 2, 2, 2)),
        ("8,sockets=2,cores=2", CpusSpec(8, 2, 2, 2)),
        ("1,max=4", CpusSpec(1, 1, 4, 1)),
        ("2,max=8,sockets=2,threads=2", CpusSpec(2, 2, 2, 2)),
        ("4,max=4", CpusSpec(4, 1, 4, 1)),
    ],
)
def test_what_is_not_given_follows(written: object, spec: CpusSpec) -> None:
    assert CpusSpec.parse(written) == spec
    assert CpusSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "'' is no number of CPUs"),
        (True, "True is no number of CPUs"),
        ("8,sockets=3", "8 CPUs are no multiple of 3 sockets; give numbers whose product is 8"),
        ("8,sockets=2,cores=2,threads=1", "8 CPUs are no 2 sockets times 2 cores times 1 threads"),
        ("8,cores=16", "8 CPUs are no multiple of 16 cores"),
        ("8,cores=0", "cores is '0'; give a number from 1 on"),
        ("8,cores", "cores is nothing; give a number from 1 on"),
        ("8,dies=2", "'dies=2' is no option of CPUs; there are sockets, cores, threads, max"),
        ("4,max=2", "4 CPUs are more than the 2 of max; give max=4 or more"),
        ("1,max=256", "256 CPUs are more than a machine can have; give 255 or less"),
        ("2,max=6,sockets=4", "6 CPUs are no multiple of 4 sockets"),
        ("1,max=250,cores=5", "needs APIC IDs up to 396, and 254 is the last"),
        ("250,cores=5", "'250,cores=5' needs APIC IDs up to 396, and 254 is the last"),
        ("256", "256 CPUs are more than a machine can have; give 255 or less"),
    ],
)
def test_what_cannot_be_is_one_line(written: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"cpus": written})
    assert message in str(caught.value)


def test_a_spec_made_by_hand_is_checked() -> None:
    with pytest.raises(ValueProblem, match="8 CPUs are more than the 3 of max"):
        CpusSpec.parse(CpusSpec(8, 3, 1, 1))


def test_apic_ids_leave_gaps_where_a_count_is_no_power_of_two() -> None:
    assert CpusSpec.parse("12,sockets=2,cores=3,threads=2").apic_ids == [
        *range(6),
        *range(8, 14),
    ]
    assert CpusSpec.parse(5).apic_ids == list(range(5))


@pytest.mark.parametrize("seed", ["-1", "x", 1 << 64, True])
def test_chaos_takes_a_seed(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"is no seed; give a number of up to 64 bits"):
        make_config({"chaos": seed})


def test_chaos_is_not_kvms() -> None:
    with pytest.raises(ConfigError, match="engine kvm has no chaos; use engine bt"):
        make_config({"chaos": 1, "engine": "kvm"})
