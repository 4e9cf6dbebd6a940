"""What tests of disk controllers share."""

from pathlib import Path

import pytest

from tetrarch import block

#: Bytes of the disks below.
DISK_BYTES = 8 << 20


@pytest.fixture(params=["disk.img", "disk.qcow2"])
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / str(request.param)
    block.create(path, DISK_BYTES)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    block.create(path, DISK_BYTES)
    return path
