"""Machines in asyncio: ``async with Machine(...) as vm: await vm.console.expect("login:")``.

What waits is awaited, under the name and with the arguments that it has without asyncio.
"""

from tetrarch.aio.console import AsyncConsole
from tetrarch.aio.debugging import AsyncBreakpoint
from tetrarch.aio.machine import AsyncMachine
from tetrarch.aio.remote import AsyncRemoteMachine

__all__ = ["AsyncBreakpoint", "AsyncConsole", "AsyncMachine", "AsyncRemoteMachine"]
