//! REP MOVS and REP STOS inside one page, and their single forms.
//!
//! A run that stays in the page of each operand becomes the host's own REP
//! instruction on checked pointers, at the host's speed for it. Longer runs go
//! to the interpreter, which works page by page and lets interrupts in.
//! Translated code runs with DF clear only (DF is part of the mode).

use std::mem::offset_of;

use iced_x86::Instruction;

use super::emit::{Address, R13, R14, RCX, RDI, RSI, cc};
use super::job::Job;
use crate::state::CpuState;

impl Job<'_> {
    pub(super) fn string(&mut self, i: &Instruction, size: u8, moves: bool) {
        self.free_flags();
        if !self.wide {
            // What is above ECX, EDI and ESI is no part of them.
            for register in [RCX, RDI, RSI] {
                self.e.mov32(register, register);
            }
        }
        let repeated = i.has_rep_prefix() || i.has_repne_prefix();
        if repeated {
            let nothing = self.e.jrcxz(false);
            let over = self.e.jmp();
            self.e.bind8(nothing);
            let done = self.e.jmp();
            self.e.bind(over);
            self.e.cmp_imm(RCX, 4096 / u32::from(size));
            self.slow_if(cc::A);
            self.run_in_page(size, moves);
            self.e.bind(done);
        } else {
            self.single(size, moves);
        }
    }

    /// Leaves for the interpreter if rcx elements at `register` cross its page.
    fn inside_page(&mut self, register: u8, size: u8) {
        self.e.mov32(R13, register);
        self.e.and32_imm(R13, 0xFFF);
        let end = Address { base: Some(R13), index: Some(RCX), scale: size, disp: 0 };
        self.e.lea(true, R13, end);
        self.e.cmp_imm(R13, 4096);
        self.slow_if(cc::A);
    }

    /// r14 := the host address of `[register]`.
    fn pointer(&mut self, register: u8, size: u32, write: bool) {
        let retry = self.e.pos();
        self.e.mov(R14, register);
        self.checked(size, write, retry);
    }

    fn run_in_page(&mut self, size: u8, moves: bool) {
        let source = offset_of!(CpuState, scratch) + 16;
        let source_end = offset_of!(CpuState, scratch) + 24;
        let end = |base| Address { base: Some(base), index: Some(RCX), scale: size, disp: 0 };
        let plain = |base| Address { base: Some(base), index: None, scale: 1, disp: 0 };
        self.inside_page(RDI, size);
        if moves {
            self.inside_page(RSI, size);
            self.pointer(RSI, 1, false);
            self.e.store(source, R14);
        }
        self.pointer(RDI, 1, true);
        if moves {
            self.e.lea(true, R13, end(RSI));
            self.e.store(source_end, R13);
            self.e.load(RSI, source);
        }
        self.e.lea(true, R13, end(RDI));
        self.e.mov(RDI, R14);
        self.e.rep_string(size, moves);
        self.e.lea(self.wide, RDI, plain(R13));
        if moves {
            self.e.load(R13, source_end);
            self.e.lea(self.wide, RSI, plain(R13));
        }
    }

    fn single(&mut self, size: u8, moves: bool) {
        let source = offset_of!(CpuState, scratch) + 16;
        let bytes = u32::from(size);
        if moves {
            self.pointer(RSI, bytes, false);
            self.e.store(source, R14);
        }
        self.pointer(RDI, bytes, true);
        let next = |base| Address { base: Some(base), index: None, scale: 1, disp: size.into() };
        if moves {
            self.e.load(R13, source);
            self.e.load_sized(R13, R13, 0, size);
            self.e.store_sized(R14, R13, size);
            self.e.lea(self.wide, RSI, next(RSI));
        } else {
            self.e.store_sized(R14, 0, size);
        }
        self.e.lea(self.wide, RDI, next(RDI));
    }
}
