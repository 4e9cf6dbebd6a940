"""The 16550A UART: a register core and its adapter.

Register names and behaviour follow the PC16550D data sheet (National Semiconductor, June 1995).
Line speed is not modelled: a transmitted byte leaves at once, so THRE and TEMT are always set.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from tetrarch.devices import _state
from tetrarch.devices._access import read_bytes, write_bytes
from tetrarch.devices._line import IrqLine

__all__ = ["GSI", "PORTS", "PORT_BASE", "Uart16550", "UartCore"]

PORT_BASE: Final = 0x3F8
PORTS: Final = 8
GSI: Final = 4

FIFO_SIZE: Final = 16

RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IER_RLSI: Final = 0x04
IER_MSI: Final = 0x08
IER_MASK: Final = 0x0F

IIR_NONE: Final = 0x01
IIR_MSI: Final = 0x00
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RLSI: Final = 0x06
IIR_TIMEOUT: Final = 0x0C
IIR_FIFOS: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
FCR_STORED: Final = 0xC9
TRIGGER: Final = (1, 4, 8, 14)

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10
MCR_MASK: Final = 0x1F

LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40

MSR_TERI: Final = 0x04
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
#: A terminal is connected and ready.
MODEM_INPUTS: Final = MSR_CTS | MSR_DSR | MSR_DCD

#: 115200 baud from the usual 1.8432 MHz.
RESET_DIVISOR: Final = 1


class UartCore:
    """16550A register file. No bus, no threads, no I/O."""

    def __init__(self) -> None:
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._overrun = False
        self._msr_delta = 0
        self._scr = 0
        self._divisor = RESET_DIVISOR
        self._thre_pending = False
        self._rx: deque[int] = deque()
        self._tx = bytearray()
        self._dropped = bytearray()
        self._mcr_written = False

    # The side of the line.

    @property
    def irq(self) -> bool:
        # A PC's board passes the line on only while OUT2 is set; we pass it always, as other
        # VMMs do: small guests enable interrupts and forget OUT2.
        return self._interrupt() != IIR_NONE

    @property
    def capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    @property
    def room(self) -> int:
        """How many bytes the guest is ready to receive."""
        if self._mcr & MCR_LOOP:
            return 0
        # Flow control: hold input back until the guest says that it receives, by RTS or by the
        # interrupt. Linux does so when the port is opened, after its startup code has cleared the
        # FIFOs and thrown a byte away. A guest that never touched MCR may be polling.
        ready = self._mcr & MCR_RTS or self._ier & IER_RDI or not self._mcr_written
        if not ready:
            return 0
        return max(self.capacity - len(self._rx), 0)

    def receive(self, data: bytes) -> None:
        """Bytes from the line; what exceeds the FIFO is an overrun."""
        for byte in data:
            self._receive_byte(byte)

    def _receive_byte(self, byte: int) -> None:
        if len(self._rx) >= self.capacity:
            self._overrun = True
            if not self._fcr & FCR_ENABLE:
                # Without FIFO the newer byte overwrites the one in RBR; with it, the FIFO
                # stays and the byte in the shift register is lost (data sheet, 8.6.3, bit 1).
                self._rx[-1] = byte
            return
        self._rx.append(byte)

    def take_tx(self) -> bytes:
        """What the guest sent since the last call."""
        data = bytes(self._tx)
        self._tx.clear()
        return data

    def take_dropped(self) -> bytes:
        """Received bytes that the guest cleared unread since the last call."""
        data = bytes(self._dropped)
        self._dropped.clear()
        return data

    # The side of the bus.

    def read(self, offset: int) -> int:
        match offset:
            case 0 if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            case 0:
                return self._rx.popleft() if self._rx else 0
            case 1 if self._lcr & LCR_DLAB:
                return self._divisor >> 8
            case 1:
                return self._ier
            case 2:
                interrupt = self._interrupt()
                # Data sheet, table V: reading IIR resets the THRE interrupt if it is the one
                # reported.
                if interrupt == IIR_THRI:
                    self._thre_pending = False
                return interrupt | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)
            case 3:
                return self._lcr
            case 4:
                return self._mcr
            case 5:
                lsr = LSR_THRE | LSR_TEMT
                if self._rx:
                    lsr |= LSR_DR
                if self._overrun:
                    lsr |= LSR_OE
                    self._overrun = False
                return lsr
            case 6:
                msr = self._modem_inputs() | self._msr_delta
                self._msr_delta = 0
                return msr
            case 7:
                return self._scr
        return 0xFF

    def write(self, offset: int, value: int) -> None:
        value &= 0xFF
        match offset:
            case 0 if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            case 0:
                self._transmit(value)
            case 1 if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            case 1:
                # Enabling THRE while the transmitter is empty raises it at once. The data sheet
                # is silent; Linux's 8250 driver starts transmission this way and tests for it
                # (serial8250_THRE_test).
                if value & IER_THRI and not self._ier & IER_THRI:
                    self._thre_pending = True
                self._ier = value & IER_MASK
            case 2:
                self._write_fcr(value)
            case 3:
                self._lcr = value
            case 4:
                self._write_mcr(value & MCR_MASK)
            case 7:
                self._scr = value
            case _:
                pass  # LSR and MSR are read-only here: factory test bits.

    def _interrupt(self) -> int:
        """The IIR code of highest priority, or IIR_NONE."""
        if self._ier & IER_RLSI and self._overrun:
            return IIR_RLSI
        if self._ier & IER_RDI and self._rx:
            if len(self._rx) >= self._trigger():
                return IIR_RDI
            # Below the trigger level a time of four characters has to pass; without a line
            # speed it has passed.
            return IIR_TIMEOUT
        if self._ier & IER_THRI and self._thre_pending:
            return IIR_THRI
        if self._ier & IER_MSI and self._msr_delta:
            return IIR_MSI
        return IIR_NONE

    def _trigger(self) -> int:
        return TRIGGER[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1

    def _transmit(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._receive_byte(value)
        else:
            self._tx.append(value)
        self._thre_pending = True

    def _write_fcr(self, value: int) -> None:
        # Data sheet, 8.5: changing bit 0 clears both FIFOs, and the other bits are only
        # programmed while bit 0 is written as 1.
        changed = (value ^ self._fcr) & FCR_ENABLE
        if changed or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
            if not self._mcr & MCR_LOOP:
                self._dropped += bytes(self._rx)
            self._rx.clear()
        self._fcr = value & FCR_STORED if value & FCR_ENABLE else 0

    def _modem_inputs(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MODEM_INPUTS
        # Data sheet, 8.6.7, bit 4: the outputs are looped to the inputs.
        inputs = 0
        for output, signal in (
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ):
            if self._mcr & output:
                inputs |= signal
        return inputs

    def _write_mcr(self, value: int) -> None:
        before = self._modem_inputs()
        self._mcr = value
        self._mcr_written = True
        after = self._modem_inputs()
        delta = (before ^ after) >> 4
        if not before & MSR_RI or after & MSR_RI:
            delta &= ~MSR_TERI  # only the trailing edge of RI counts
        self._msr_delta |= delta

    def save(self) -> _state.State:
        return {
            "device": "uart16550",
            "version": 1,
            "ier": self._ier,
            "fcr": self._fcr,
            "lcr": self._lcr,
            "mcr": self._mcr,
            "mcr_written": self._mcr_written,
            "overrun": self._overrun,
            "msr_delta": self._msr_delta,
            "scr": self._scr,
            "divisor": self._divisor,
            "thre_pending": self._thre_pending,
            "rx": list(self._rx),
        }

    def load(self, state: _state.State) -> None:
        _state.check(state, "uart16550", 1)
        self._ier = int(state["ier"]) & IER_MASK
        self._fcr = int(state["fcr"]) & FCR_STORED
        self._lcr = int(state["lcr"]) & 0xFF
        self._mcr = int(state["mcr"]) & MCR_MASK
        self._mcr_written = bool(state["mcr_written"])
        self._overrun = bool(state["overrun"])
        self._msr_delta = int(state["msr_delta"]) & 0x0F
        self._scr = int(state["scr"]) & 0xFF
        self._divisor = int(state["divisor"]) & 0xFFFF
        self._thre_pending = bool(state["thre_pending"])
        self._rx = deque(int(b) & 0xFF for b in state["rx"][:FIFO_SIZE])
        self._tx.clear()
        self._dropped.clear()


class Uart16550:
    """The UART on a machine: ports, line, output and queued input.

    ``output`` is called without locks on the thread that wrote (a vCPU's), in order as long as
    one thread at a time writes to the port. ``receive`` may be called from any thread and never
    blocks: the FIFO is fed as the guest drains it, and nothing is lost.
    """

    def __init__(self, irq: Callable[[bool], None], output: Callable[[bytes], None]) -> None:
        self._core = UartCore()
        self._output = output
        self._lock = threading.Lock()
        self._input: deque[int] = deque()
        self._line = IrqLine(irq, self._wanted)

    def _wanted(self) -> bool:
        with self._lock:
            return self._core.irq

    @property
    def queued(self) -> int:
        """Input bytes that the guest has not taken into its FIFO."""
        with self._lock:
            return len(self._input)

    def receive(self, data: bytes) -> None:
        with self._lock:
            self._input.extend(data)
            self._feed()
        self._line.update()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            value = read_bytes(self._core.read, offset, size)
            self._feed()
        self._line.update()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            write_bytes(self._core.write, offset, size, value)
            dropped = self._core.take_dropped()
            if dropped:
                # A flow-controlled line: what the guest cleared unread it gets again, so that
                # input sent before a driver starts is not lost.
                self._input.extendleft(reversed(dropped))
            self._feed()
            sent = self._core.take_tx()
        if sent:
            self._output(sent)
        self._line.update()

    def _feed(self) -> None:
        if not self._input:
            return
        room = min(self._core.room, len(self._input))
        if room:
            self._core.receive(bytes(self._input.popleft() for _ in range(room)))

    def save(self) -> _state.State:
        with self._lock:
            return self._core.save() | {"input": list(self._input)}

    def load(self, state: _state.State) -> None:
        with self._lock:
            self._core.load(state)
            self._input = deque(int(b) & 0xFF for b in state.get("input", []))
        self._line.update()
