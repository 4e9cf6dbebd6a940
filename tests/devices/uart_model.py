"""A model of the 16550A in Python, which the one in Rust is compared with.

Register names and behaviour follow the PC16550D data sheet (National Semiconductor, June 1995).
"""

from collections.abc import Callable
from typing import Final

from tetrarch.devices._access import read_bytes, write_bytes
from tetrarch.devices._adapter import Adapter
from tetrarch.devices.uart16550 import (
    FCR_STORED,
    FIFO_SIZE,
    IER_MASK,
    LSR_BI,
    LSR_FE,
    MCR_MASK,
    UartState,
)

RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IER_RLSI: Final = 0x04
IER_MSI: Final = 0x08

IIR_NONE: Final = 0x01
IIR_MSI: Final = 0x00
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RLSI: Final = 0x06
IIR_TIMEOUT: Final = 0x0C
IIR_FIFOS: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
TRIGGER: Final = (1, 4, 8, 14)

LCR_BREAK: Final = 0x40
LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10
#: Reads of LSR one after the other that are of a guest which waits for input.
POLLS: Final = 16

LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40
LSR_FIFO_ERROR: Final = 0x80

MSR_TERI: Final = 0x04
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
#: A terminal is connected and ready.
MODEM_INPUTS: Final = MSR_CTS | MSR_DSR | MSR_DCD


class UartCore:
    """What the registers do. No bus, no threads, no I/O."""

    def __init__(self) -> None:
        self.state = UartState()
        self._tx = bytearray()

    # The side of the line.

    @property
    def irq(self) -> bool:
        return self._interrupt() != IIR_NONE

    @property
    def capacity(self) -> int:
        return FIFO_SIZE if self.state.fcr & FCR_ENABLE else 1

    @property
    def room(self) -> int:
        """How many bytes the guest is ready to receive."""
        if self.state.mcr & MCR_LOOP:
            return 0
        # Flow control: hold input back until the guest says that it receives, by RTS or by the
        # interrupt. Linux does so when the port is opened, after its startup code has cleared the
        # FIFOs and thrown a byte away. A guest that never touched MCR may be polling, and one
        # that does nothing but read LSR is.
        polls = not self.state.mcr_written or self.state.polls >= POLLS
        if not (self.state.mcr & MCR_RTS or self.state.ier & IER_RDI or polls):
            return 0
        return max(self.capacity - len(self.state.rx), 0)

    def receive(self, data: bytes) -> None:
        """Bytes from the line; what exceeds the FIFO is an overrun."""
        for byte in data:
            self._receive_byte(byte)

    def offer(self, data: bytes) -> None:
        """Bytes from a flow-controlled line: they come as fast as the guest takes them."""
        self.state.line.extend(data)
        self.feed()

    def feed(self) -> None:
        """Moves into the FIFO what the guest is ready for."""
        line = self.state.line
        for _ in range(min(self.room, len(line))):
            self._receive_byte(line.popleft())

    def _receive_byte(self, byte: int) -> None:
        if len(self.state.rx) >= self.capacity:
            self.state.overrun = True
            if not self.state.fcr & FCR_ENABLE:
                # Without FIFO the newer byte overwrites the one in RBR; with it, the FIFO
                # stays and the byte in the shift register is lost (data sheet, 8.6.3, bit 1).
                self.state.rx[-1] = byte
            return
        self.state.rx.append(byte)

    def take_tx(self) -> bytes:
        """What the guest sent since the last call."""
        data = bytes(self._tx)
        self._tx.clear()
        return data

    # The side of the bus.

    def read(self, offset: int) -> int:
        match offset:
            case 0 if self.state.lcr & LCR_DLAB:
                return self.state.divisor & 0xFF
            case 0:
                return self.state.rx.popleft() & 0xFF if self.state.rx else 0
            case 1 if self.state.lcr & LCR_DLAB:
                return self.state.divisor >> 8
            case 1:
                return self.state.ier
            case 2:
                interrupt = self._interrupt()
                # Data sheet, table V: reading IIR resets the THRE interrupt if it is the one
                # reported.
                if interrupt == IIR_THRI:
                    self.state.thre_pending = False
                return interrupt | (IIR_FIFOS if self.state.fcr & FCR_ENABLE else 0)
            case 3:
                return self.state.lcr
            case 4:
                return self.state.mcr
            case 5:
                self.state.polls = min(self.state.polls + 1, POLLS)
                return self._read_lsr()
            case 6:
                msr = self._modem_inputs() | self.state.msr_delta
                self.state.msr_delta = 0
                return msr
            case 7:
                return self.state.scr
        return 0xFF

    def write(self, offset: int, value: int) -> None:
        value &= 0xFF
        self.state.polls = 0
        match offset:
            case 0 if self.state.lcr & LCR_DLAB:
                self.state.divisor = self.state.divisor & 0xFF00 | value
            case 0:
                self._transmit(value)
            case 1 if self.state.lcr & LCR_DLAB:
                self.state.divisor = self.state.divisor & 0xFF | value << 8
            case 1:
                # Enabling THRE while the transmitter is empty raises it at once. The data sheet
                # is silent; Linux's 8250 driver starts transmission this way and tests for it
                # (serial8250_THRE_test).
                if value & IER_THRI and not self.state.ier & IER_THRI:
                    self.state.thre_pending = True
                self.state.ier = value & IER_MASK
            case 2:
                self._write_fcr(value)
            case 3:
                self._set_controls(value, self.state.mcr)
            case 4:
                self.state.mcr_written = True
                self._set_controls(self.state.lcr, value & MCR_MASK)
            case 7:
                self.state.scr = value
            case _:
                pass  # LSR and MSR are read-only here: factory test bits.

    def _errors(self) -> int:
        """What LSR says of the byte that is read next (data sheet, 8.4)."""
        return self.state.rx[0] >> 8 if self.state.rx else 0

    def _read_lsr(self) -> int:
        rx = self.state.rx
        lsr = LSR_THRE | LSR_TEMT
        if rx:
            lsr |= LSR_DR | self._errors()
            if self.state.fcr & FCR_ENABLE and any(item >> 8 for item in rx):
                lsr |= LSR_FIFO_ERROR
            rx[0] &= 0xFF  # reading clears the errors
        if self.state.overrun:
            lsr |= LSR_OE
            self.state.overrun = False
        return lsr

    def _interrupt(self) -> int:
        """The IIR code of highest priority, or IIR_NONE."""
        if self.state.ier & IER_RLSI and (self.state.overrun or self._errors()):
            return IIR_RLSI
        if self.state.ier & IER_RDI and self.state.rx:
            if len(self.state.rx) >= self._trigger():
                return IIR_RDI
            # Below the trigger level a time of four characters has to pass; without a line
            # speed it has passed.
            return IIR_TIMEOUT
        if self.state.ier & IER_THRI and self.state.thre_pending:
            return IIR_THRI
        if self.state.ier & IER_MSI and self.state.msr_delta:
            return IIR_MSI
        return IIR_NONE

    def _trigger(self) -> int:
        return TRIGGER[self.state.fcr >> 6] if self.state.fcr & FCR_ENABLE else 1

    def _transmit(self, value: int) -> None:
        if self.state.mcr & MCR_LOOP:
            self._receive_byte(value)
        else:
            self._tx.append(value)
        self.state.thre_pending = True

    def _write_fcr(self, value: int) -> None:
        # Data sheet, 8.5: changing bit 0 clears both FIFOs, and the other bits are only
        # programmed while bit 0 is written as 1.
        changed = (value ^ self.state.fcr) & FCR_ENABLE
        if changed or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
            if not self.state.mcr & MCR_LOOP:
                # A flow-controlled line: what the guest cleared unread it gets again, so that
                # input sent before a driver starts is not lost.
                self.state.line.extendleft(item & 0xFF for item in reversed(self.state.rx))
            self.state.rx.clear()
        self.state.fcr = value & FCR_STORED if value & FCR_ENABLE else 0

    def _loops_break(self) -> bool:
        """SOUT, which the loop leads to SIN, is held at 0 (data sheet, 8.6.7, bit 4)."""
        return bool(self.state.mcr & MCR_LOOP and self.state.lcr & LCR_BREAK)

    def _modem_inputs(self) -> int:
        if not self.state.mcr & MCR_LOOP:
            return MODEM_INPUTS
        # Data sheet, 8.6.7, bit 4: the outputs are looped to the inputs.
        inputs = 0
        for output, signal in (
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ):
            if self.state.mcr & output:
                inputs |= signal
        return inputs

    def _set_controls(self, lcr: int, mcr: int) -> None:
        breaking = self._loops_break()
        before = self._modem_inputs()
        self.state.lcr, self.state.mcr = lcr, mcr
        after = self._modem_inputs()
        if self._loops_break() and not breaking:
            # Data sheet, 8.4, bits 3 and 4: one zero character is loaded for a break of any
            # length, without a stop bit.
            self._receive_byte(0 | (LSR_BI | LSR_FE) << 8)
        delta = (before ^ after) >> 4
        if not before & MSR_RI or after & MSR_RI:
            delta &= ~MSR_TERI  # only the trailing edge of RI counts
        self.state.msr_delta |= delta


class ModelUart(Adapter[UartCore]):
    """The model with lock and line, as a device."""

    def __init__(self, irq: Callable[[bool], None]) -> None:
        super().__init__(UartCore(), irq)

    @property
    def queued(self) -> int:
        with self._lock:
            return len(self._core.state.line)

    def receive(self, data: bytes) -> None:
        with self._lock:
            self._core.offer(data)
        self._line.update()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            value = read_bytes(self._core.read, offset, size)
            self._core.feed()
        self._line.update()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            write_bytes(self._core.write, offset, size, value)
            self._core.feed()
        self._line.update()

    def take_output(self) -> bytes:
        with self._lock:
            return self._core.take_tx()
