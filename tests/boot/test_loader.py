"""What a user gets for files that are no kernels: one line with cause and mend."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetrarch.boot import load_kernel
from tetrarch.errors import BootError, TetrarchError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08" + bytes(600), "gzip"),
        (b"\xfd7zXZ\0" + bytes(600), "xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"070701" + bytes(600), "initrd"),
        (b"MZ" + bytes(600), "EFI"),
        (b"#!/bin/sh\n", "is no kernel"),
        (b"\x7fELF", "cut short"),
        (bytes(100_000), "is no kernel"),
    ],
)
def test_file_that_is_no_kernel_is_named_for_what_it_is(
    make_vm: Any, write: Any, content: bytes, message: str
) -> None:
    with pytest.raises(BootError, match=message) as error:
        load_kernel(make_vm(16 * MIB), write("file", content), None, "", 0)
    assert "\n" not in str(error.value)
    assert "file" in str(error.value)


def test_missing_kernel(make_vm: Any, tmp_path: Path) -> None:
    with pytest.raises(BootError, match="no such file"):
        load_kernel(make_vm(16 * MIB), tmp_path / "nothing", None, "", 0)


def test_directory_as_kernel(make_vm: Any, tmp_path: Path) -> None:
    with pytest.raises(BootError, match="is a directory"):
        load_kernel(make_vm(16 * MIB), tmp_path, None, "", 0)


def test_path_with_a_zero_byte(make_vm: Any) -> None:
    with pytest.raises(BootError, match="null"):
        load_kernel(make_vm(16 * MIB), "a\0b", None, "", 0)


def test_fifo_as_kernel_does_not_block(make_vm: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BootError, match="not a regular file"):
        load_kernel(make_vm(16 * MIB), tmp_path / "fifo", None, "", 0)


@pytest.mark.parametrize(("name", "message"), [("none", "no such file"), (".", "is a directory")])
def test_bad_initrd(
    make_vm: Any, make_bzimage: Any, write: Any, tmp_path: Path, name: str, message: str
) -> None:
    kernel = write("vmlinuz", make_bzimage())
    with pytest.raises(BootError, match=f"initrd .*{message}"):
        load_kernel(make_vm(32 * MIB), kernel, tmp_path / name, "", 0)


def test_empty_initrd(make_vm: Any, make_bzimage: Any, write: Any) -> None:
    kernel = write("vmlinuz", make_bzimage())
    with pytest.raises(BootError, match="is empty"):
        load_kernel(make_vm(32 * MIB), kernel, write("initrd", b""), "", 0)


def test_command_line_with_a_zero_byte(make_vm: Any, make_bzimage: Any, write: Any) -> None:
    with pytest.raises(BootError, match="zero byte"):
        load_kernel(make_vm(32 * MIB), write("vmlinuz", make_bzimage()), None, "a\0b", 0)


# The file is written anew for each example.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=4096))
def test_random_files_are_refused(make_vm: Any, write: Any, content: bytes) -> None:
    with pytest.raises(TetrarchError):
        load_kernel(make_vm(2 * MIB), write("file", content), None, "", 0)
