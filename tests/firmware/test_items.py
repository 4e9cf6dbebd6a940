"""What fw_cfg hands to firmware of a kernel and its initrds."""

from contextlib import ExitStack
from pathlib import Path

from tests.fuzz.targets import bzimage

from tetrarch.devices.fw_cfg import Key
from tetrarch.firmware.items import FileItem, kernel_items


def test_firmware_gets_several_initrds_behind_each_other(tmp_path: Path) -> None:
    kernel, first, second = (tmp_path / name for name in ("kernel", "first", "second"))
    kernel.write_bytes(bzimage())
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    whole = b"first\0\0\0second"
    with ExitStack() as files:
        items = kernel_items(kernel, Path(f"{first},{second}"), "", files)
        data = items[Key.INITRD_DATA]
        assert isinstance(data, FileItem)
        assert items[Key.INITRD_SIZE] == len(whole).to_bytes(4, "little")
        assert data.size == len(whole)
        assert data.read(0, len(whole)) == whole
        assert data.read(3, 7) == whole[3:10]
