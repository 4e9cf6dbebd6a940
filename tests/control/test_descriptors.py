"""Files that a client has opened, and what is made of them."""

import os
import re
import select
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from tests.control.conftest import Make
from tests.control.test_session import session, started

LIMIT_S = 60
FILE = {"driver": "file", "filename": "/dev/fdset/3"}


async def send(client: QMPClient, path: Path, flags: int = os.O_RDWR, **arguments: object) -> Any:
    descriptor = os.open(path, flags)
    client.send_fd_scm(descriptor)
    os.close(descriptor)
    named: dict[str, Any] = {name.replace("_", "-"): value for name, value in arguments.items()}
    return await client.execute("add-fd", named)


async def refused(client: QMPClient, command: str, **arguments: object) -> str:
    named: dict[str, Any] = {name.replace("_", "-"): value for name, value in arguments.items()}
    with pytest.raises(ExecuteError) as raised:
        await client.execute(command, named)
    return str(raised.value)


def test_image_of_a_set_is_a_disk(make: Make, socket_path: Path, tmp_path: Path) -> None:
    started(make)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))

    async def talk(client: QMPClient) -> None:
        added = await send(client, image, fdset_id=3, opaque="an image")
        assert added["fdset-id"] == 3
        listed = [{"fdset-id": 3, "fds": [{"fd": added["fd"], "opaque": "an image"}]}]
        assert await client.execute("query-fdsets") == listed
        assert (await send(client, image))["fdset-id"] == 0
        image.unlink()
        await client.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": FILE})
        await client.execute("device_add", {"driver": "nvme", "id": "d", "drive": "disk"})
        blocks: Any = await client.execute("query-block")
        assert blocks[0]["inserted"]["file"] == "an image"
        await client.execute("remove-fd", {"fdset-id": 3})
        await client.execute("remove-fd", {"fdset-id": 0})
        assert await client.execute("query-fdsets") == []

    session(socket_path, talk)


def test_descriptors_that_are_of_no_use(make: Make, socket_path: Path, tmp_path: Path) -> None:
    make()
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))

    async def talk(client: QMPClient) -> None:
        assert "No file descriptor supplied" in await refused(client, "add-fd")
        assert "No file descriptor supplied" in await refused(client, "getfd", fdname="x")
        assert "'fdset-id:9' not found" in await refused(client, "remove-fd", fdset_id=9)
        assert "'fdset-id'" in await refused(client, "add-fd", fdset_id=-1)
        node = {"node_name": "disk", "driver": "raw"}
        await send(client, image, os.O_RDONLY, fdset_id=3)
        assert "is not for both" in await refused(client, "blockdev-add", **node, file=FILE)
        nowhere = {**FILE, "filename": "/dev/fdset/x"}
        assert "not found" in await refused(client, "blockdev-add", **node, file=nowhere)
        below = {"driver": "raw", "file": FILE}
        path = {**FILE, "filename": str(image)}
        words = await refused(client, "blockdev-add", **node, file=path, backing=below)
        assert "'backing'" in words
        words = await refused(
            client, "blockdev-add", **node, read_only=True, file=FILE, backing=below
        )
        assert "fewer backing files" in words
        await send(client, tmp_path, os.O_RDONLY, fdset_id=4)
        folder = {**FILE, "filename": "/dev/fdset/4"}
        words = await refused(client, "blockdev-add", **node, read_only=True, file=folder)
        assert "is a directory" in words
        await client.execute(
            "blockdev-add", {"driver": "raw", "node-name": "x", "read-only": True, "file": FILE}
        )

    session(socket_path, talk)


@pytest.mark.parametrize("command", ["x-save", "dump-guest-memory"])
@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        (".", os.O_RDONLY, "'f' is not open for that"),
        ("new", os.O_RDONLY | os.O_CREAT, "'f' is not open for that"),
        ("new", os.O_PATH, "'f' is not open for that"),
        ("full", os.O_WRONLY, "No space left on device; free the space|no empty file"),
    ],
)
def test_what_cannot_be_written_is_not_kept_open(
    make: Make, socket_path: Path, tmp_path: Path, command: str, name: str, flags: int, words: str
) -> None:
    started(make)
    (tmp_path / "new").touch()
    (tmp_path / "full").symlink_to("/dev/full")

    async def talk(client: QMPClient) -> None:
        for _ in range(2):
            descriptor = os.open(tmp_path / name, flags)
            client.send_fd_scm(descriptor)
            os.close(descriptor)
            await client.execute("getfd", {"fdname": "f"})
            before = len(os.listdir("/proc/self/fd"))
            assert re.search(words, await refused(client, command, protocol="fd:f"))
            assert len(os.listdir("/proc/self/fd")) < before

    session(socket_path, talk)


def test_machine_is_saved_to_an_empty_file_alone(
    make: Make, socket_path: Path, tmp_path: Path
) -> None:
    started(make)
    (tmp_path / "old").write_bytes(b"something")

    async def talk(client: QMPClient) -> None:
        flags = os.O_WRONLY | os.O_CREAT
        for path, how in (
            (tmp_path / "old", flags),
            (tmp_path / "new", flags | os.O_APPEND),
            (Path(os.devnull), flags),
        ):
            descriptor = os.open(path, how)
            client.send_fd_scm(descriptor)
            os.close(descriptor)
            await client.execute("getfd", {"fdname": "f"})
            assert "no empty file" in await refused(client, "x-save", protocol="fd:f")

    session(socket_path, talk)
    assert (tmp_path / "old").read_bytes() == b"something"


def test_command_takes_what_came_with_it(make: Make, socket_path: Path, tmp_path: Path) -> None:
    make()

    async def talk(client: QMPClient) -> None:
        for name in "ab":
            descriptor = os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT)
            client.send_fd_scm(descriptor)
            os.close(descriptor)
            if name == "a":
                assert "'fdname'" in await refused(client, "getfd", fdname=1)
        await client.execute("add-fd", {"fdset-id": 1})
        arguments = {"val": 0, "size": 7, "filename": "/dev/fdset/1"}
        await client.execute("pmemsave", arguments)
        assert "No file descriptor supplied" in await refused(client, "add-fd")

    session(socket_path, talk)
    assert [(tmp_path / name).stat().st_size for name in "ab"] == [0, 7]


def test_what_a_client_has_sent_goes_with_it(make: Make, socket_path: Path, tmp_path: Path) -> None:
    make()
    reader, writer = os.pipe()

    async def talk(client: QMPClient) -> None:
        for command in ("add-fd", "getfd", "query-name"):
            client.send_fd_scm(writer)
            await client.execute(command, {"fdname": "x"} if command == "getfd" else None)
        os.close(writer)

    session(socket_path, talk)

    assert select.select([reader], [], [], LIMIT_S)[0], "somebody has it still"
    assert os.read(reader, 1) == b""
    os.close(reader)
