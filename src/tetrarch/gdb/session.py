"""What gdb asks of a machine, packet by packet (gdb's manual, Appendix E).

All vCPUs stop and run together ("all-stop"). A vCPU is a thread; its number is the vCPU's and 1,
as gdb has no thread 0. Beside what the manual has there are QEMU's packets for physical memory
and for what a step passes over ("Advanced debugging options", QEMU's manual).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

from tetrarch._native import EngineError, GuestMemoryError
from tetrarch.gdb.inspection import Inspection
from tetrarch.gdb.packets import PACKET_MAX, escape
from tetrarch.gdb.registers import target_xml
from tetrarch.gdb.words import BadRequest, number, numbers, unhex
from tetrarch.machine.debugger import Debugger, Hardware, NoMemory, Stop, Watched
from tetrarch.machine.replay import ReplayDebugger

__all__ = ["Leave", "Session"]

_OK = b"OK"
_UNKNOWN = b""
# By the numbers of errno, which gdb shows.
_BAD_MEMORY = b"E0e"
_BAD_REQUEST = b"E16"
_FAILED = b"E05"
# Signals of gdb's own numbering, which for these are Linux's.
_SIGINT = 2
_SIGTRAP = 5

# QEMU's bits: stepping at all, without interrupts.
_SSTEP_ENABLE, _SSTEP_NOIRQ = 1, 2

_WATCHPOINTS: dict[int, tuple[Watched, str]] = {
    1: ("execute", "hwbreak"),
    2: ("write", "watch"),
    # An x86 CPU has none for reads alone; gdb passes over those that changed the value.
    3: ("access", "rwatch"),
    4: ("access", "awatch"),
}


_Answer = Callable[[bytes], bytes | None]
"""Of what follows a packet's name; None where the reply is the stop that comes later."""


class Leave(Enum):
    """How gdb ends a session."""

    DETACH = "the machine runs on"
    KILL = "the machine ends"


@dataclass(frozen=True)
class _Action:
    """What vCont asks of some threads."""

    step: bool


class Session:
    """One client. The machine is stopped when it begins."""

    def __init__(self, debugger: Debugger, monitor: Callable[[str, int], str]) -> None:
        """``monitor`` answers what is typed behind gdb's ``monitor``, with the vCPU chosen."""
        self._debugger = debugger
        self._monitor = monitor
        self._inspection = Inspection(debugger)
        self._to_run: int | None = None
        """The one that c and s are for, or all."""
        self._kinds: dict[Hardware, str] = {}
        """By what gdb calls its hardware breakpoints."""
        self._no_steps = False
        self._tells_kind = False
        self._waiting: list[Stop] = []
        self._last = self._stop_reply(_SIGTRAP)
        self.no_acks = False
        self.left: Leave | None = None
        look = self._inspection
        self._short: dict[bytes, _Answer] = {
            b"?": self._last_stop,
            b"g": look.read_registers,
            b"G": look.write_registers,
            b"p": look.read_register,
            b"P": look.write_register,
            b"m": look.read_memory,
            b"M": look.write_memory,
            b"X": look.write_binary,
            b"Z": self._insert,
            b"z": self._remove,
            b"c": self._continue,
            b"C": self._continue_with_signal,
            b"s": self._step,
            b"S": self._step_with_signal,
            b"H": self._choose,
            b"T": self._is_alive,
            b"D": self._detach,
            b"k": self._kill,
        }
        # The longer of two that begin alike goes first.
        self._long: tuple[tuple[bytes, _Answer], ...] = (
            (b"vCont?", self._can_run_threads),
            (b"vCont", self._run_threads),
            (b"vKill", self._kill),
            (b"qSupported", self._supported),
            (b"qXfer:features:read:", self._read_features),
            (b"qfThreadInfo", self._threads),
            (b"qsThreadInfo", self._no_more_threads),
            (b"qThreadExtraInfo,", self._thread_info),
            (b"qAttached", self._attached),
            (b"qRcmd,", self._ask_monitor),
            (b"qqemu.PhyMemMode", look.is_physical),
            (b"Qqemu.PhyMemMode:", look.set_physical),
            (b"qqemu.sstepbits", self._step_bits),
            (b"qqemu.sstep", self._step_flags),
            (b"Qqemu.sstep=", self._set_step_flags),
            (b"QStartNoAckMode", self._start_no_acks),
            (b"qC", self._current_thread),
        )
        if isinstance(debugger, ReplayDebugger):
            debugger.stay()
            self._short |= dict.fromkeys((b"G", b"P", b"M", b"X"), self._refuse_to_write)
            self._long += (
                (b"bs", partial(self._go_back, debugger.step_back)),
                (b"bc", partial(self._go_back, debugger.continue_back)),
            )

    # What the server calls.

    def answer(self, packet: bytes) -> bytes | None:
        """The reply; None where it is the stop that comes later."""
        try:
            return self._answer(packet)
        except (BadRequest, ValueError, IndexError, OverflowError):
            return _BAD_REQUEST
        except (NoMemory, GuestMemoryError):
            return _BAD_MEMORY
        except EngineError:
            return _FAILED

    def stopped(self) -> bytes | None:
        """The machine has been stopped because of a vCPU; the reply for the client, None where
        there was no reason after all."""
        self._waiting += self._debugger.take_stops()
        return self._next_stop()

    def interrupted(self) -> bytes:
        """The machine has been stopped because the client asked for that."""
        told = self.stopped()
        if told is None:
            self._debugger.interrupt()
            told = self._last = self._stop_reply(_SIGINT)
        return told

    # One packet.

    def _answer(self, packet: bytes) -> bytes | None:
        if not packet:
            return _UNKNOWN
        command, rest = packet[:1], packet[1:]
        if (short := self._short.get(command)) is not None:
            return short(rest)
        for prefix, answer in self._long:
            if packet.startswith(prefix):
                return answer(packet[len(prefix) :])
        return _UNKNOWN

    def _last_stop(self, rest: bytes) -> bytes:
        return self._last

    # Breakpoints.

    def _insert(self, rest: bytes) -> bytes:
        kind, address, length = numbers(rest.partition(b";")[0], b",", 3)
        if kind == 0:
            self._debugger.plant(self._inspection.chosen, address)
            return _OK
        if kind not in _WATCHPOINTS:
            return _UNKNOWN
        watched, name = _WATCHPOINTS[kind]
        wanted = (watched, address, 1 if watched == "execute" else length)
        if not self._debugger.watch(wanted):
            return b"E.a CPU has four hardware breakpoints, and all are in use"
        self._kinds[wanted] = name
        return _OK

    def _remove(self, rest: bytes) -> bytes:
        kind, address, length = numbers(rest.partition(b";")[0], b",", 3)
        if kind == 0:
            self._debugger.unplant(address)
            return _OK
        if kind not in _WATCHPOINTS:
            return _UNKNOWN
        watched, _ = _WATCHPOINTS[kind]
        wanted = (watched, address, 1 if watched == "execute" else length)
        self._debugger.unwatch(wanted)
        self._kinds.pop(wanted, None)
        return _OK

    # Running.

    def _continue(self, rest: bytes) -> bytes | None:
        self._jump(rest)
        return self._run({self._to_run: _Action(step=False)})

    def _continue_with_signal(self, rest: bytes) -> bytes | None:
        return self._continue(rest.partition(b";")[2])

    def _step(self, rest: bytes) -> bytes | None:
        self._jump(rest)
        actions: dict[int | None, _Action] = {self._inspection.chosen: _Action(step=True)}
        if self._to_run is None:
            actions[None] = _Action(step=False)
        return self._run(actions)

    def _step_with_signal(self, rest: bytes) -> bytes | None:
        return self._step(rest.partition(b";")[2])

    def _go_back(self, begin: Callable[[], None], rest: bytes) -> None:
        begin()
        self._debugger.resume()

    def _refuse_to_write(self, rest: bytes) -> bytes:
        return b"E.the machine replays: its registers and memory are the recording's"

    def _jump(self, address: bytes) -> None:
        if address:
            if isinstance(self._debugger, ReplayDebugger):
                raise BadRequest
            self._debugger.vcpus[self._inspection.chosen].set_regs({"rip": number(address)})

    def _run_threads(self, rest: bytes) -> bytes | None:
        actions: dict[int | None, _Action] = {}
        for word in rest.lstrip(b";").split(b";"):
            action, _, thread = word.partition(b":")
            if action[:1] not in (b"c", b"C", b"s", b"S"):
                raise BadRequest
            vcpu = self._thread(thread) if thread else None
            # For each thread the first action counts.
            actions.setdefault(vcpu, _Action(step=action[:1] in (b"s", b"S")))
        return self._run(actions)

    def _run(self, actions: dict[int | None, _Action]) -> bytes | None:
        waiting = self._next_stop()
        if waiting is not None:
            return waiting
        of_others = actions.get(None)
        steps, frozen = set(), set()
        for vcpu in range(len(self._debugger.vcpus)):
            action = actions.get(vcpu, of_others)
            if action is None:
                frozen.add(vcpu)
            elif action.step:
                steps.add(vcpu)
        if len(frozen) == len(self._debugger.vcpus):
            raise BadRequest
        self._debugger.resume(steps if not self._no_steps else (), frozen)
        return None

    def _next_stop(self) -> bytes | None:
        """Of several vCPUs that stopped at once one is told at a time. What comes again by
        itself is told then: the breakpoint may be gone by that time."""
        if not self._waiting:
            return None
        first, *others = self._waiting
        self._waiting = [stop for stop in others if not stop.repeats]
        self._inspection.chosen = first.vcpu
        self._last = self._stop_reply(_SIGTRAP, first)
        return self._last

    def _stop_reply(self, signal: int, stop: Stop | None = None) -> bytes:
        reasons = ""
        if stop is not None and stop.planted and self._tells_kind:
            reasons = "swbreak:;"
        elif stop is not None and stop.place in ("begin", "end"):
            reasons = f"replaylog:{stop.place};"
        elif stop is not None and stop.hardware is not None:
            name = self._kinds.get(stop.hardware, "hwbreak")
            if name != "hwbreak":
                reasons = f"{name}:{stop.hardware[1]:x};"
            elif self._tells_kind:
                reasons = "hwbreak:;"
        return f"T{signal:02x}thread:{self._inspection.chosen + 1:02x};{reasons}".encode()

    def _can_run_threads(self, rest: bytes) -> bytes:
        return b"vCont;c;C;s;S"

    # Threads.

    def _choose(self, rest: bytes) -> bytes:
        thread = self._thread(rest[1:])
        if rest[:1] == b"g":
            self._inspection.chosen = self._inspection.chosen if thread is None else thread
        elif rest[:1] == b"c":
            self._to_run = thread
        else:
            raise BadRequest
        return _OK

    def _is_alive(self, rest: bytes) -> bytes:
        self._thread(rest)
        return _OK

    def _current_thread(self, rest: bytes) -> bytes:
        return b"QC%02x" % (self._inspection.chosen + 1)

    def _threads(self, rest: bytes) -> bytes:
        return b"m" + b",".join(b"%02x" % (vcpu + 1) for vcpu in self._debugger.there())

    def _no_more_threads(self, rest: bytes) -> bytes:
        return b"l"

    def _thread_info(self, rest: bytes) -> bytes:
        vcpu = self._thread(rest)
        if vcpu is None:
            raise BadRequest
        return f"vCPU {vcpu}".encode().hex().encode()

    def _thread(self, text: bytes) -> int | None:
        """A vCPU, or None for any or all of them."""
        if text in (b"-1", b"0"):
            return None
        vcpu = number(text) - 1
        if vcpu not in self._debugger.there():
            raise BadRequest
        return vcpu

    # The session.

    def _supported(self, rest: bytes) -> bytes:
        asked = rest.lstrip(b":").split(b";")
        self._tells_kind = b"swbreak+" in asked
        kinds = ";swbreak+;hwbreak+" if self._tells_kind else ""
        if isinstance(self._debugger, ReplayDebugger):
            kinds += ";ReverseStep+;ReverseContinue+"
        return (
            f"PacketSize={PACKET_MAX:x};qXfer:features:read+;QStartNoAckMode+;vContSupported+{kinds}"
        ).encode()

    def _start_no_acks(self, rest: bytes) -> bytes:
        self.no_acks = True
        return _OK

    def _attached(self, rest: bytes) -> bytes:
        return b"1"

    def _read_features(self, rest: bytes) -> bytes:
        annex, _, place = rest.partition(b":")
        if annex != b"target.xml":
            return b"E00"
        offset, length = numbers(place, b",", 2)
        xml = target_xml().encode()
        part = xml[offset : offset + min(length, PACKET_MAX // 2)]
        more = offset + len(part) < len(xml)
        return (b"m" if more else b"l") + escape(part)

    def _ask_monitor(self, rest: bytes) -> bytes:
        text = self._monitor(unhex(rest).decode("utf-8", "replace"), self._inspection.chosen)
        return text.encode()[: PACKET_MAX // 2].hex().encode() or _OK

    def _detach(self, rest: bytes) -> bytes:
        self.left = Leave.DETACH
        return _OK

    def _kill(self, rest: bytes) -> bytes:
        self.left = Leave.KILL
        return _OK

    def _step_bits(self, rest: bytes) -> bytes:
        return b"ENABLE=%x,NOIRQ=%x" % (_SSTEP_ENABLE, _SSTEP_NOIRQ)

    def _step_flags(self, rest: bytes) -> bytes:
        noirq = _SSTEP_NOIRQ if self._debugger.block_interrupts else 0
        return b"0x%x" % (noirq | (0 if self._no_steps else _SSTEP_ENABLE))

    def _set_step_flags(self, rest: bytes) -> bytes:
        flags = int(rest, 16)
        if not 0 <= flags <= _SSTEP_ENABLE | _SSTEP_NOIRQ:
            raise BadRequest
        self._no_steps = not flags & _SSTEP_ENABLE
        self._debugger.block_interrupts = bool(flags & _SSTEP_NOIRQ)
        return _OK
