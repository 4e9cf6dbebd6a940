"""OVMF to its shell, with variables that outlast the machine, and with a kernel from a file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tetrarch import BootError, ConfigError, HostError, Machine, StopReason
from tetrarch.firmware.spec import FirmwareSpec
from tetrarch.images import CachedGuest

CODE, VARIABLES = Path("/usr/share/OVMF/OVMF_CODE.fd"), Path("/usr/share/OVMF/OVMF_VARS.fd")
LIMIT_S = 120

needs_ovmf = pytest.mark.skipif(
    not CODE.exists() or not VARIABLES.exists(), reason="no OVMF: apt-get install ovmf"
)


def shell(vm: Machine) -> None:
    """To the prompt. A key keeps it from waiting for startup.nsh; not Escape, behind which a
    terminal may say more."""
    vm.console.expect("seconds to skip", LIMIT_S)
    vm.console.send("\r")
    vm.console.expect("Shell> ", LIMIT_S)


@pytest.mark.long
@pytest.mark.timeout(4 * LIMIT_S)
@needs_ovmf
def test_shell_keeps_variables_over_a_restart(tmp_path: Path) -> None:
    kept = tmp_path / "kept.vars"
    firmware = f"ovmf,variables={kept}"
    with Machine(engine="bt", firmware=firmware, memory="256M") as vm:
        assert kept.read_bytes() == VARIABLES.read_bytes()
        vm.start()
        shell(vm)
        vm.console.send("set greeting hello\r")
        vm.console.expect("Shell> ", LIMIT_S)
        with pytest.raises(HostError, match="another machine keeps its own there"):
            Machine(engine="bt", firmware=firmware)
        vm.console.send("reset -s\r")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
    assert kept.stat().st_size == VARIABLES.stat().st_size
    assert "greeting".encode("utf-16-le") in kept.read_bytes()
    with Machine(engine="bt", firmware=firmware, memory="256M") as vm:
        vm.start()
        shell(vm)
        vm.console.send("set greeting\r")
        vm.console.expect(re.compile("greeting .*= .*hello"), LIMIT_S)
        # The others are those that no firmware has written to.
        vm.console.send("reset -s\r")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


@pytest.mark.long
@pytest.mark.timeout(4 * LIMIT_S)
@needs_ovmf
def test_shell_is_on_the_screen_and_hears_the_keyboard(tmp_path: Path) -> None:
    with Machine(engine="bt", firmware="ovmf", vga=True, input="ps2-keyboard", memory="256M") as vm:
        vm.start()
        vm.console.expect("seconds to skip", LIMIT_S)
        (keyboard,) = vm.inputs
        keyboard.type("\n")
        vm.console.expect("Shell> ", LIMIT_S)
        shown = vm.screen()
        assert (shown.width, shown.height) >= (640, 480)
        points = {shown.pixels[at : at + 3] for at in range(0, len(shown.pixels), 3)}
        assert bytes(3) in points
        assert len(points) > 2  # text in colours
        keyboard.type("reset -s\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


@pytest.mark.long
@pytest.mark.timeout(4 * LIMIT_S)
@needs_ovmf
def test_confined_machine_keeps_variables(tmp_path: Path) -> None:
    kept = tmp_path / "kept.vars"
    run = [sys.executable, "-m", "tetrarch", "run", "--engine", "bt", "--memory", "256M"]
    with subprocess.Popen(
        [*run, "--firmware", f"ovmf,variables={kept}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        said = b""
        while b"Shell> " not in said:
            chunk = os.read(process.stdout.fileno(), 4096)
            assert chunk, said[-1000:]
            said += chunk
        process.terminate()
    assert kept.read_bytes() != VARIABLES.read_bytes()
    assert "BootOrder".encode("utf-16-le") in kept.read_bytes()


@pytest.mark.long
@pytest.mark.timeout(4 * LIMIT_S)
@needs_ovmf
def test_kernel_and_initrd_start_under_it(debian_guest: CachedGuest) -> None:
    with Machine(
        engine="bt",
        firmware="ovmf",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        memory="512M",
    ) as vm:
        vm.start()
        vm.console.expect("# ", LIMIT_S)
        vm.console.send("ls /sys/firmware/efi; cat /proc/cmdline\n")
        said = vm.console.expect("console=ttyS0", LIMIT_S)
        assert "systab" in said
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


def pair(directory: Path) -> Path:
    """Firmware that is none, and variables beside it; the code's path."""
    code = directory / "MINE_CODE.fd"
    code.write_bytes(b"\xf4" * (1 << 16))
    code.write_bytes(b"\xf4" * 65535 + b"\x90")
    return code


def volume(size: int, said: int | None = None) -> bytes:
    guid = bytes.fromhex("8d2bf1ff 9676 8b4c a985 2747075b4f50")
    length = (size if said is None else said).to_bytes(8, "little")
    return (bytes(16) + guid + length + b"_FVH").ljust(size, b"\xff")


def test_variables_are_made_of_what_lies_beside_the_code(tmp_path: Path) -> None:
    code, kept = pair(tmp_path), tmp_path / "kept"
    (tmp_path / "MINE_VARS.fd").write_bytes(volume(8192))
    with Machine(engine="bt", firmware=f"{code},variables={kept}", memory="16M") as vm:
        assert kept.read_bytes() == volume(8192)
        assert vm.pc.firmware is not None
        assert vm.pc.firmware.variables is not None
        assert vm.pc.firmware.variables.base == (1 << 32) - (1 << 16) - 8192
        # A byte is programmed.
        assert vm.pc.firmware.flash is not None
        for value in (0x40, 0x12):
            vm.pc.firmware.flash.write(5000, 1, value)
    assert kept.read_bytes()[5000] == 0x12
    with Machine(engine="bt", firmware=f"{code},variables={kept}", memory="16M"):
        pass


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "is empty"),
        (bytes(8192), "is no image of firmware variables"),
        (volume(8192, said=4096), "has 8192 bytes, and says to have 4096"),
        (volume(8000), "has 8000 bytes, and says to have 8000"),
        (volume(4096), "has 4096 bytes, and variables of this firmware have 8192"),
    ],
)
def test_file_that_has_no_variables_is_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    code, kept = pair(tmp_path), tmp_path / "kept"
    (tmp_path / "MINE_VARS.fd").write_bytes(volume(8192))
    kept.write_bytes(content)
    with pytest.raises(BootError, match=cause):
        Machine(engine="bt", firmware=f"{code},variables={kept}", memory="16M")
    assert kept.read_bytes() == content


def test_variables_that_cannot_be(tmp_path: Path) -> None:
    code = pair(tmp_path)
    with pytest.raises(ConfigError, match="nothing is beside"):
        Machine(engine="bt", firmware=f"{code},variables={tmp_path}/kept")
    with pytest.raises(ConfigError, match="SeaBIOS has no variables"):
        Machine(engine="bt", firmware="seabios,variables=x")
    with pytest.raises(ConfigError, match="is no option of firmware; did you mean variables"):
        Machine(engine="bt", firmware="ovmf,variable=x")
    (tmp_path / "MINE_VARS.fd").write_bytes(volume(8192))
    with pytest.raises(HostError, match="cannot write firmware variables to"):
        Machine(engine="bt", firmware=f"{code},variables={tmp_path}/none/kept")
    code.write_bytes(volume(1 << 16)[:-1] + b"\x90")
    with pytest.raises(BootError, match="has its variables in itself"):
        Machine(engine="bt", firmware=f"{code},variables={tmp_path}/kept")


def test_firmware_is_written_down_as_it_is_read() -> None:
    for text in ("ovmf", "ovmf,variables=a,,b", "x,,y.fd,variables=z", "seabios"):
        assert str(FirmwareSpec.parse(text)) == text
    spec = FirmwareSpec.parse("code.fd,variables=kept").relative_to(Path("/at"))
    assert (spec.path, spec.variables) == (Path("/at/code.fd"), Path("/at/kept"))


def test_template_is_used_by_no_machine(tmp_path: Path) -> None:
    """Without a file of its own a machine forgets them."""
    code = pair(tmp_path)
    template = tmp_path / "MINE_VARS.fd"
    template.write_bytes(volume(8192))
    os.chmod(template, 0o444)
    with Machine(engine="bt", firmware=code, memory="16M") as vm:
        assert vm.pc.firmware is not None
        assert vm.pc.firmware.flash is not None
        for value in (0x40, 0):
            vm.pc.firmware.flash.write(5000, 1, value)
        assert vm.pc.firmware.flash.read(5000, 1) == 0x80  # its status
    assert template.read_bytes() == volume(8192)
    shutil.rmtree(tmp_path)
