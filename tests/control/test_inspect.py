"""Registers and memory by QMP."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from tests.control.conftest import Make

from tetrarch.control import Client, ControlError

LIMIT_S = 60


def test_memory_and_registers_of_a_vcpu(make: Make, socket_path: Path, tmp_path: Path) -> None:
    vm = make()
    vm.start()
    vm.console.expect("up", LIMIT_S)
    with Client(socket_path) as client:
        assert client.execute("x-ram") == [{"base": 0, "size": 16 << 20}]
        (tmp_path / "in").write_bytes(b"found again")
        given = {"val": 0x20_0000, "filename": str(tmp_path / "in")}
        assert client.execute("x-memory-write", given) == {}
        assert bytes(vm.memory[0x20_0000:0x20_000B]) == b"found again"
        out = str(tmp_path / "out")
        client.execute("pmemsave", {"val": 0x20_0000, "size": 11, "filename": out})
        assert (tmp_path / "out").read_bytes() == b"found again"
        # Without paging, as the kernel is entered, they are the same.
        client.execute("memsave", {"val": 0x20_0002, "size": 5, "filename": out})
        assert (tmp_path / "out").read_bytes() == b"und a"
        registers = client.execute("x-registers", {"cpu-index": 0, "set": {"rdi": 7}})
        assert registers["rdi"] == vm.vcpus[0].regs.rdi == 7
        image = base64.b64decode(client.execute("x-xsave", {"cpu-index": 0}))
        assert int.from_bytes(image[24:28], "little") == vm.vcpus[0].fpu.mxcsr
        assert client.execute("x-msr", {"cpu-index": 0, "index": 0x10})["value"] > 0
        assert client.execute("x-msr", {"cpu-index": 0, "index": 0x1234_5678}) == {"value": None}
        physical = client.execute("x-translate", {"cpu-index": 0, "address": 0x1234})
        assert physical == {"physical": 0x1234}


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("x-memory-write", {"val": 1 << 40, "filename": "in"}, "RAM|memory"),
    ("x-memory-write", {"val": (1 << 64) - 2, "filename": "in"}, "RAM|memory|range"),
    ("x-memory-write", {"val": -1, "filename": "in"}, "'val'"),
    ("x-memory-write", {"val": 0, "filename": "none"}, "No such file"),
    ("x-memory-write", {"val": 0, "filename": "/dev/fdset/3"}, "not found"),
    ("x-memory-write", {"val": 0, "filename": "fifo"}, "fifo: it is no regular file"),
    ("x-memory-write", {"val": 0, "filename": "."}, "Is a directory"),
    ("pmemsave", {"val": 0, "size": 1, "filename": "fifo"}, "nobody reads the FIFO yet"),
    ("pmemsave", {"val": 0, "size": 1, "filename": "."}, "^.: Is a directory$"),
    ("memsave", {"val": 0, "size": 1, "filename": "fifo"}, "nobody reads the FIFO yet"),
    ("screendump", {"filename": "fifo"}, "nobody reads the FIFO yet"),
    ("pmemsave", {"val": 0, "size": 1 << 63, "filename": "out"}, "is RAM"),
    ("pmemsave", {"val": 0, "size": -1, "filename": "out"}, "'size'"),
    ("pmemsave", {"val": 0, "size": 1, "filename": "\0"}, "null byte"),
    ("memsave", {"val": 0, "size": 1, "filename": "out", "cpu-index": 1}, "'cpu-index'"),
    ("memsave", {"val": 0xF000_0000, "size": 1, "filename": "out"}, "RAM|memory|mapped"),
    ("x-registers", {"cpu-index": 0, "set": {"none": 1}}, "none"),
    ("x-registers", {"cpu-index": 0, "set": {"rax": 1 << 64}}, "'rax'"),
    ("x-xsave", {"cpu-index": 0, "set": "?"}, "base64|Incorrect padding|data"),
    ("x-xsave", {"cpu-index": 0, "set": "AAAA"}, "XSAVE|image|bytes"),
    ("x-msr", {"cpu-index": 0, "index": 1 << 32}, "'index'"),
    ("x-msr", {"cpu-index": 0, "index": 0x1234_5678, "set": 1}, "refuses"),
    ("x-translate", {"cpu-index": 0, "address": -1}, "'address'"),
    ("x-breakpoint-add", {"id": "a", "address": -1}, "'address'"),
    ("x-breakpoint-add", {"id": "a", "address": 0, "cpu-index": 9}, "'cpu-index'"),
    ("x-breakpoint-add", {"id": "a", "address": 1, "kind": "write", "length": 2}, "'length'"),
    ("x-breakpoint-add", {"id": "a", "address": 0xF000_0000}, "map|memory|RAM"),
    ("x-breakpoint-del", {"id": "a"}, "not found"),
]


@pytest.mark.parametrize(("command", "arguments", "words"), WRONG)
def test_what_cannot_be_is_an_error_of_the_command(
    make: Make,
    socket_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(b"1234")
    os.mkfifo(tmp_path / "fifo")
    vm = make(vga=True)
    vm.start()
    vm.console.expect("up", LIMIT_S)
    with Client(socket_path) as client:
        with pytest.raises(ControlError, match=words) as told:
            client.execute(command, arguments)
        assert " failed: " not in str(told.value)
        assert client.execute("query-status")["status"] == "running"
