"""Every command of the control socket on a Linux guest, by the public client qemu.qmp."""

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from tests.control.test_session import connected
from tests.nodes import can_be_opened

from tetrarch import Machine, StopReason
from tetrarch.images import CachedGuest

LIMIT_S = 120
MIB = 1 << 20


class Session:
    """A client, and the guest's shell."""

    def __init__(self, client: QMPClient, vm: Machine) -> None:
        self.client = client
        self._vm = vm

    async def run(self, command: str, **arguments: object) -> Any:
        named = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
        return await self.client.execute(command, named or None)

    async def refused(self, command: str, **arguments: object) -> tuple[str, str]:
        with pytest.raises(ExecuteError) as raised:
            await self.run(command, **arguments)
        return raised.value.error.error.class_, str(raised.value)

    async def event(self, name: str) -> Any:
        """The next event of that name."""
        while True:
            message = await self.client.events.get()
            if message["event"] == name:
                return message.get("data")

    async def shell(self, line: str) -> str:
        """What the guest's shell prints."""

        def ask() -> str:
            self._vm.console.send(f"{line}; echo DO''NE\n")
            return self._vm.console.expect("DONE", LIMIT_S)

        return await asyncio.to_thread(ask)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 16 * MIB)
    return path


def test_linux_guest_under_every_command(
    debian_guest: CachedGuest, socket_path: Path, tmp_path: Path, image: Path
) -> None:
    more = tmp_path / "more.img"
    more.touch()
    os.truncate(more, 8 * MIB)
    with Machine(engine="bt", memory="256M", disk=image, control=socket_path) as vm:
        vm.start()
        vm.console.expect("# ", LIMIT_S)

        async def talk() -> None:
            async with asyncio.timeout(LIMIT_S), connected(socket_path) as client:
                session = Session(client, vm)
                await machine(session)
                await disks(session, image)
                await plugging(session, more)
                await networks(session, socket_path.with_name("net"))
                await failing_disk(session, image)
                await memory(session, tmp_path / "core")
                await panic(session, vm)

        asyncio.run(talk())


async def machine(session: Session) -> None:
    (cpu,) = await session.run("query-cpus-fast")
    assert Path(f"/proc/self/task/{cpu['thread-id']}").exists()
    assert cpu["cpu-index"] == 0
    assert await session.run("query-target") == {"arch": "x86_64"}
    assert await session.refused("system_wakeup") == (
        "GenericError",
        "Unable to wake up: guest is not in suspended state",
    )

    words = "There is no console to take a screendump from"
    assert await session.refused("screendump", filename="/x") == ("GenericError", words)

    async def shown(line: str) -> str:
        text = await session.run("human-monitor-command", command_line=line)
        assert isinstance(text, str)
        return text.replace("\r\n", "\n")

    assert re.search(r"RIP=[0-9a-f]{16}", await shown("info registers"))
    assert re.search(r"^ffff[0-9a-f]{12}-.* -rw$", await shown("info mem"), re.MULTILINE)
    assert "(prio 0, ram): pc.ram" in await shown("info mtree -f")
    assert 'id "disk0"' in await shown("info pci")
    assert "disk0: " in await shown("info block")
    assert await shown("info network") == ""
    assert re.match(r"0{10}100000: (0x[0-9a-f]{2} ?){4}\n", await shown("xp /4xb 0x100000"))
    assert "Cannot access memory" in await shown("xp /1xg 0xfffffffffffffff0")
    assert "unknown command" in await shown("info fly")
    for line in (await shown("help")).splitlines():
        assert "unknown command" not in await shown(line.replace("/COUNTxSIZE ADDRESS", "/1xb 0"))


async def disks(session: Session, image: Path) -> None:
    await session.shell("dd if=/dev/zero of=/dev/vda bs=4k count=16 conv=fsync 2>/dev/null")
    (block,) = await session.run("query-block")
    assert block["qdev"].endswith("disk0")
    assert block["inserted"]["file"] == str(image)
    assert block["inserted"]["image"]["virtual-size"] == 16 * MIB
    (counted,) = await session.run("query-blockstats")
    stats = counted["stats"]
    assert stats["wr_bytes"] >= 65536
    assert stats["wr_operations"] >= 1
    assert stats["flush_operations"] >= 1
    assert stats["wr_highest_offset"] >= 65536
    assert await session.run("block_resize", device="disk0", size=32 * MIB) == {}
    assert "65536" in await session.shell("cat /sys/block/vda/size")
    _, words = await session.refused("block_resize", device="disk0", size=-1)
    assert "'size'" in words
    assert (await session.refused("block_resize", device="nope", size=512))[0] == "DeviceNotFound"
    await stopped_under_load(session)


async def stopped_under_load(session: Session) -> None:
    """Nothing is read while the machine stands, and all that was asked for after it."""

    async def read() -> int:
        (disk,) = await session.run("query-blockstats")
        return int(disk["stats"]["rd_bytes"])

    before = await read()
    copy = "while dd if=/dev/vda of=/dev/null bs=16k iflag=direct 2>/dev/null; do :; done"
    await session.shell(f"{copy} & true")
    for _ in range(3):
        while await read() < before + MIB:
            await asyncio.sleep(0.01)
        await session.run("stop")
        before = await read()
        assert (await session.run("query-status"))["status"] == "paused"
        await asyncio.sleep(0.05)
        assert await read() == before
        await session.run("cont")
    assert "DONE" in await session.shell("kill $!; wait; dd if=/dev/vda of=/dev/null bs=1M")


async def plugging(session: Session, image: Path) -> None:
    file = {"driver": "file", "filename": str(image)}
    await session.run("blockdev-add", driver="raw", node_name="more", file=file)
    await session.run("device_add", driver="virtio-blk-pci", drive="more", id="plugged")
    looked = f"until {can_be_opened('vdb')}; do sleep 0.1; done; ls /sys/block"
    assert "vdb" in await session.shell(looked)
    await session.shell("echo kept | dd of=/dev/vdb conv=fsync 2>/dev/null")
    assert (await session.refused("blockdev-del", node_name="more"))[1].startswith(
        "Node more is in"
    )
    assert (
        "already in use"
        in (await session.refused("device_add", driver="nvme", drive="more", id="other"))[1]
    )
    assert (
        "Duplicate"
        in (await session.refused("device_add", driver="virtio-rng-pci", id="plugged"))[1]
    )
    await session.run("device_del", id="plugged")
    assert (await session.event("DEVICE_DELETED"))["device"] == "plugged"
    assert "vdb" not in await session.shell("ls /sys/block")
    await session.run("blockdev-del", node_name="more")
    assert image.read_bytes()[:5] == b"kept\n"

    assert await session.refused("device_del", id="nope") == (
        "DeviceNotFound",
        "Device 'nope' not found",
    )
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"driver": "fly"}, "not a valid device model name"),
        ({"driver": "nvme"}, "drive property not set"),
        ({"driver": "nvme", "drive": "nope"}, "can't find value 'nope'"),
        ({"driver": "virtio-rng-pci", "speed": 1}, "'virtio-rng-pci.speed' not found"),
        ({"driver": "virtio-rng-pci", "addr": "x"}, "doesn't take value 'x'"),
        ({}, "'driver' is missing"),
    ]
    for arguments, words in refusals:
        assert words in (await session.refused("device_add", **arguments))[1]
    assert (
        "'file' is missing"
        in (await session.refused("blockdev-add", driver="raw", node_name="x"))[1]
    )
    assert (
        "does not accept value 'qed'"
        in (await session.refused("blockdev-add", driver="qed", node_name="x"))[1]
    )
    missing = {"driver": "file", "filename": "/nonexistent"}
    assert (
        "/nonexistent"
        in (await session.refused("blockdev-add", driver="raw", node_name="x", file=missing))[1]
    )


async def networks(session: Session, path: Path) -> None:
    addr = {"type": "unix", "path": str(path)}
    await session.run("netdev_add", type="stream", id="lan", addr=addr)
    for driver in ("vmxnet3", "e1000", "virtio-net-pci"):
        mac = "52:54:00:12:34:99"
        await session.run("device_add", driver=driver, netdev="lan", id="card", mac=mac)
        said = await session.run("human-monitor-command", command_line="info network")
        assert f"card: index=0,type=nic,model={driver}" in said
        assert "in use" in (await session.refused("netdev_del", id="lan"))[1]
        await session.run("device_del", id="card")
        assert (await session.event("DEVICE_DELETED"))["device"] == "card"
    await session.run("netdev_del", id="lan")
    assert (await session.refused("netdev_del", id="lan"))[0] == "DeviceNotFound"
    assert "'ifname' is missing" in (await session.refused("netdev_add", type="tap", id="t"))[1]


async def failing_disk(session: Session, image: Path) -> None:
    os.truncate(image, 4096)
    await session.shell("dd if=/dev/vda of=/dev/null bs=4k skip=2000 count=1 iflag=direct")
    data = await session.event("BLOCK_IO_ERROR")
    assert (data["node-name"], data["operation"], data["action"]) == ("disk0", "read", "report")
    assert "shorter" in data["reason"]


async def memory(session: Session, core: Path) -> None:
    assert await session.run("query-balloon") == {"actual": 256 * MIB}
    await session.run("balloon", value=200 * MIB)
    while (await session.event("BALLOON_CHANGE"))["actual"] != 200 * MIB:
        pass
    assert await session.run("query-balloon") == {"actual": 200 * MIB}
    _, words = await session.refused("balloon", value="much")
    assert "'value', expected: integer" in words
    await session.run("dump-guest-memory", paging=False, protocol=f"file:{core}")
    assert core.read_bytes()[:4] == b"\x7fELF"
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"protocol": "tape:x"}, "'protocol'"),
        ({"protocol": "fd:nope"}, "'nope' not found"),
        ({"protocol": "file:/nonexistent/x"}, "/nonexistent/x"),
        ({"protocol": f"file:{core}", "paging": 1}, "'paging', expected: boolean"),
        ({"protocol": f"file:{core}", "begin": 0}, "'length' is missing"),
        ({"protocol": f"file:{core}", "begin": 1 << 50, "length": 1}, "no RAM"),
    ]
    for arguments, words in refusals:
        given = {"paging": False, **arguments}
        assert words in (await session.refused("dump-guest-memory", **given))[1]
    part = {"protocol": f"file:{core}", "begin": 1 << 20, "length": 1 << 20}
    await session.run("dump-guest-memory", paging=True, **part)
    assert 1 << 20 < core.stat().st_size < 3 << 20
    assert (await session.run("query-dump"))["completed"] == 1 << 20
    assert (await session.run("query-dump-guest-memory-capability")) == {"formats": ["elf"]}


async def panic(session: Session, vm: Machine) -> None:
    vm.console.send("echo c > /proc/sysrq-trigger\n")
    # By the guest's driver for pvpanic, then since it stays so.
    assert await session.event("GUEST_PANICKED") == {"action": "run"}
    assert await session.event("GUEST_PANICKED") == {"action": "poweroff"}
    assert await session.event("SHUTDOWN") == {"guest": True, "reason": "guest-panic"}
    status = await asyncio.to_thread(vm.wait, LIMIT_S)
    assert status.reason is StopReason.CRASHED
    assert status.detail == "Kernel panic - not syncing: sysrq triggered crash"
