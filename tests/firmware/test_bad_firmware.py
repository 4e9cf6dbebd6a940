"""What is no firmware, or goes with no firmware, gives one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tetrarch import BootError, ConfigError, Machine


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "is empty"),
        (b"\xf4" * 100, "has 100 bytes: an image has 64 KiB to 16 MiB, in whole pages"),
        (b"\xf4" * (65536 + 1), "has 65537 bytes"),
        (b"\xf4" * 65520 + b"\xff" * 16, "has no code where a processor begins"),
    ],
)
def test_file_that_is_no_firmware(tmp_path: Path, data: bytes, cause: str) -> None:
    path = tmp_path / "bios.bin"
    path.write_bytes(data)
    with pytest.raises(BootError, match=cause):
        Machine(engine="bt", firmware=path)


@pytest.mark.skipif(
    not os.path.exists("/usr/share/seabios/bios-256k.bin"),
    reason="no SeaBIOS: apt-get install seabios",
)
@pytest.mark.parametrize("data", [b"text", bytes(1 << 20)])
def test_disc_that_is_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "disc.iso"
    path.write_bytes(data)
    with pytest.raises(BootError, match="is no image of a disc: it has no volume descriptor"):
        Machine(engine="bt", firmware="seabios", cdrom=path)


def test_firmware_and_what_it_does_not_find(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on the PCI bus alone; leave virtio at pci"):
        Machine(engine="bt", firmware="seabios", virtio="mmio")
    for option in ("initrd", "append"):
        with pytest.raises(ConfigError, match=f"has no kernel that {option} could be for"):
            Machine(engine="bt", firmware="seabios", **{option: "x"})  # type: ignore[arg-type]
    with pytest.raises(BootError, match=r"firmware .*/none.bin: no such file"):
        Machine(engine="bt", firmware=tmp_path / "none.bin")
