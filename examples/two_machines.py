"""Two machines at a time, in asyncio: one pings the other over a network of their own."""

import asyncio
import tempfile
from pathlib import Path

from tetrarch import Machine
from tetrarch.aio import AsyncMachine


def machine(name: str, switch: Path) -> Machine:
    return Machine(name=name, engine="bt", agent=True, net=f"socket={switch}")


async def join(vm: AsyncMachine, address: str) -> None:
    await vm.exec(["sh", "-c", f"ip addr add {address}/24 dev eth0; ip link set eth0 up"])


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        switch = Path(directory, "switch")
        async with machine("left", switch) as left, machine("right", switch) as right:
            await asyncio.gather(join(left, "10.0.0.1"), join(right, "10.0.0.2"))
            ping = await left.exec(["ping", "-c", "1", "-W", "10", "10.0.0.2"])
            print("right answers" if ping.code == 0 else ping.stdout.decode())
            await asyncio.gather(left.stop(), right.stop())
            print(*(vm.status and vm.status.reason for vm in (left, right)))


asyncio.run(main())
