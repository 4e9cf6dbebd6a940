"""Where a screen is shown, as it is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetrarch import ConfigError, HostError, Machine, MachineConfig, MachineStateError
from tetrarch.errors import ValueProblem
from tetrarch.testing import ScriptedVm
from tetrarch.vnc import DisplaySpec
from tetrarch.vnc.spec import VncPlace


@pytest.mark.parametrize(
    ("text", "spec", "shown"),
    [
        ("vnc=5900", DisplaySpec(VncPlace(port=5900)), "vnc=127.0.0.1:5900"),
        ("vnc=[::1]:5900", DisplaySpec(VncPlace(host="::1", port=5900)), "vnc=[::1]:5900"),
        ("vnc=localhost:1", DisplaySpec(VncPlace(host="localhost", port=1)), "vnc=localhost:1"),
        ("vnc=a,,b", DisplaySpec(VncPlace(path=Path("a,b"))), "vnc=a,,b"),
        (
            "vnc=0.0.0.0:1,password-file=p",
            DisplaySpec(VncPlace(host="0.0.0.0", port=1), Path("p")),
            "vnc=0.0.0.0:1,password-file=p",
        ),
    ],
)
def test_places_are_ports_or_paths(text: str, spec: DisplaySpec, shown: str) -> None:
    assert DisplaySpec.parse(text) == spec
    assert str(spec) == shown
    assert DisplaySpec.parse(shown) == spec


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "is no display; write vnc=PORT"),
        ("gtk", "is no display; write vnc=PORT"),
        (5900, "is no display"),
        ("vnc=", "is no place for viewers"),
        ("vnc=1,sound", "no option of a display; there is password-file"),
        ("vnc=1,passwort-file=f", "did you mean password-file"),
        ("vnc=1,password-file", "names no file"),
        ("vnc=1,password-file=a,password-file=b", "given twice"),
        ("vnc=0.0.0.0:5900", "anybody who reaches 0.0.0.0:5900 would use the machine; add"),
        ("vnc=example.org:5900", "anybody who reaches"),
        ("vnc=[::]:5900", "anybody who reaches"),
        ("vnc=a\0b", "is no display"),
    ],
)
def test_what_is_no_display_is_refused(value: object, words: str) -> None:
    with pytest.raises(ValueProblem, match=words):
        DisplaySpec.parse(value)


def test_paths_are_of_their_file() -> None:
    spec = DisplaySpec.parse("vnc=s,password-file=p").relative_to(Path("/d"))
    assert spec == DisplaySpec(VncPlace(path=Path("/d/s")), Path("/d/p"))


def test_display_brings_a_screen_a_keyboard_and_a_pointer() -> None:
    config = MachineConfig(display=DisplaySpec.parse("vnc=0")).with_seat()
    assert config.vga
    assert config.input == ("ps2-keyboard", "ps2-mouse")
    config = MachineConfig(
        display=DisplaySpec.parse("vnc=0"), input=("tablet", "keyboard")
    ).with_seat()
    assert config.input == ("tablet", "keyboard")
    assert MachineConfig().with_seat() == MachineConfig()


def test_screen_is_what_the_platform_has() -> None:
    assert MachineConfig().drawn_by is None
    assert MachineConfig(vga=True).drawn_by == "vga"
    assert MachineConfig(screen="svga").with_seat().vga
    assert MachineConfig(vga=True, platform="vmware").with_seat().screen == "svga"
    assert MachineConfig(vga=True, platform="vmware", screen="vga").drawn_by == "vga"
    # Its memory cannot be recorded.
    assert MachineConfig(vga=True, platform="vmware", record=Path("r")).drawn_by == "vga"


def machine(**options: object) -> Machine:
    return Machine(vm=ScriptedVm(lambda vm: vm.wait_for_stop()), **options)  # type: ignore[arg-type]


def test_address_is_told_and_a_second_display_refused(tmp_path: Path) -> None:
    with machine(display=f"vnc={tmp_path / 'one'}") as vm:
        assert vm.display is not None
        assert vm.display.address == str(tmp_path / "one")
        with pytest.raises(MachineStateError, match=r"has a display, .*one"):
            vm.serve_display(f"vnc={tmp_path / 'two'}")
    assert not (tmp_path / "one").exists()
    with machine(display="vnc=0") as vm:
        assert vm.display is not None
        host, _, port = vm.display.address.partition(":")
        assert host == "127.0.0.1"
        assert int(port)


def test_machine_without_a_screen_has_no_display() -> None:
    with machine() as vm, pytest.raises(MachineStateError, match="no screen; make it with vga"):
        vm.serve_display()


def test_places_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with machine(vga=True) as vm, pytest.raises(ConfigError, match="display: 65536"):
        vm.serve_display("vnc=65536")
    with machine(vga=True) as vm, pytest.raises(HostError, match="missing"):
        vm.serve_display(f"vnc={tmp_path}/missing/socket")
    with machine(vga=True) as first, machine(vga=True) as second:
        place = first.serve_display().address
        with pytest.raises(HostError, match=f"cannot listen for viewers on {place}"):
            second.serve_display(f"vnc={place}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the password"),
        (b"", "has 0 bytes, and viewers take 1 to 8; write one into its first line"),
        (b"\nx", "has 0 bytes"),
        (b"123456789\n", "has 9 bytes, and viewers take 1 to 8; write a shorter one"),
    ],
)
def test_password_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((ConfigError, HostError), match=words):
        machine(display=f"vnc=0,password-file={file}")
