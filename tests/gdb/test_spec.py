"""Where gdb finds a machine, as it is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetrarch import Machine, MachineConfig
from tetrarch.errors import ConfigError, HostError, MachineStateError, ValueProblem
from tetrarch.gdb import GdbSpec
from tetrarch.testing import ScriptedVm


@pytest.mark.parametrize(
    ("text", "spec", "shown"),
    [
        ("1234", GdbSpec(port=1234), "127.0.0.1:1234"),
        (1234, GdbSpec(port=1234), "127.0.0.1:1234"),
        (":1234", GdbSpec(port=1234), "127.0.0.1:1234"),
        ("0.0.0.0:1", GdbSpec(host="0.0.0.0", port=1), "0.0.0.0:1"),
        ("[::1]:1", GdbSpec(host="::1", port=1), "[::1]:1"),
        ("gdb.sock", GdbSpec(path=Path("gdb.sock")), "gdb.sock"),
        ("./1234", GdbSpec(path=Path("1234")), "./1234"),
        (Path("100000"), GdbSpec(path=Path("100000")), "./100000"),
        (Path("1234"), GdbSpec(path=Path("1234")), "./1234"),
    ],
)
def test_places_are_ports_or_paths(text: object, spec: GdbSpec, shown: str) -> None:
    assert GdbSpec.parse(text) == spec
    assert str(spec) == shown
    assert GdbSpec.parse(shown) == spec


@pytest.mark.parametrize(
    "text",
    ["", "65536", 100000, -1, "-1", "h:100000", "9" * 5000, "a\0b", True, None, 1.5],
    ids=lambda text: repr(text)[:8],
)
def test_what_is_no_place_is_refused(text: object) -> None:
    with pytest.raises(ValueProblem):
        GdbSpec.parse(text)


def test_relative_path_is_of_its_file() -> None:
    assert GdbSpec.parse("s").relative_to(Path("/d")) == GdbSpec(path=Path("/d/s"))
    assert GdbSpec.parse("1").relative_to(Path("/d")) == GdbSpec(port=1)


def test_waiting_needs_a_place() -> None:
    with pytest.raises(ValueError, match="gdb_wait"):
        MachineConfig(gdb_wait=True)


def machine(**options: object) -> Machine:
    return Machine(vm=ScriptedVm(lambda vm: vm.wait_for_stop()), **options)  # type: ignore[arg-type]


def test_second_place_is_refused(tmp_path: Path) -> None:
    with machine(gdb=tmp_path / "one") as vm:
        with pytest.raises(MachineStateError, match="one"):
            vm.serve_gdb(tmp_path / "two")
        assert vm.gdb is not None
        assert vm.gdb.address == str(tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_places_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with machine() as vm, pytest.raises(ConfigError, match="65536"):
        vm.serve_gdb(65536)
    with machine() as vm, pytest.raises(HostError, match="missing"):
        vm.serve_gdb(tmp_path / "missing/socket")
    with machine() as first, machine() as second:
        place = first.serve_gdb().address
        with pytest.raises(HostError, match=place):
            second.serve_gdb(place)
