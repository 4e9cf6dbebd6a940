//! Instructions with a sequence of their own.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::classify::Kind;
use super::emit::{Address, R13, R14, R15, gpr_offset};
use super::job::{Flags, Job};
use super::liveness::FlagUse;
use super::operands::{number, replace_memory};
use crate::state::CpuState;

impl Job<'_> {
    /// Emits what [`stack_run`](super::classify::stack_run) found with one check for all its accesses.
    pub(super) fn stack_run(&mut self, instructions: &[Instruction], kinds: &[Kind]) {
        self.free_flags();
        let (wide, word) = (self.wide, self.word());
        let bytes = instructions.len() as i32 * word;
        if kinds[0] == Kind::Push {
            self.stack(-bytes, bytes as u32, true);
            for (place, i) in instructions.iter().rev().enumerate() {
                let guest = number(i.op0_register()).unwrap_or(0);
                let host = self.host_register(guest, R13);
                self.e.store_at(wide, R14, place as i32 * word, host);
            }
            self.move_rsp(-bytes);
            return;
        }
        self.stack(0, bytes as u32, false);
        for (place, (i, kind)) in instructions.iter().zip(kinds).enumerate() {
            if *kind == Kind::Ret {
                self.e.load_at(wide, R13, R14, place as i32 * word);
                let extra = if i.op_count() == 1 { i.immediate16() } else { 0 };
                self.move_rsp(bytes + i32::from(extra));
                // The branch is the return's, not that of the run's first pop.
                self.current += place;
                self.indirect();
                return;
            }
            let guest = number(i.op0_register()).unwrap_or(0);
            let host = Self::destination(guest);
            self.e.load_at(wide, host, R14, place as i32 * word);
            self.store_spilled(guest, host);
        }
        self.move_rsp(bytes);
    }

    pub(super) fn lea(&mut self, i: &Instruction) {
        let to = i.op0_register();
        let guest = number(to).unwrap_or(0);
        let host = match guest {
            4 => R15,
            13..=15 => R14,
            _ => guest,
        };
        if i.is_ip_rel_memory_operand() {
            let value = i.ip_rel_memory_address();
            if self.source.relative() {
                self.relative_address(host, value);
                if to.size() == 4 {
                    self.e.mov32(host, host);
                }
                if host == R14 {
                    self.e.store(gpr_offset(guest), R14);
                }
                return;
            }
            let value = if to.size() == 4 { value & 0xFFFF_FFFF } else { value };
            self.e.mov_imm(host, value);
        } else {
            let address32 = i.memory_base().size() == 4 || i.memory_index().size() == 4;
            let address = self.address(i);
            self.e.lea(to.size() == 8 && !address32, host, address);
        }
        if host == R14 {
            self.e.store(gpr_offset(guest), R14);
        }
    }

    /// Bytes of what is pushed and popped here.
    pub(super) fn word(&self) -> i32 {
        if self.wide { 8 } else { 4 }
    }

    pub(super) fn push(&mut self, i: &Instruction) {
        self.free_flags();
        let (wide, word) = (self.wide, self.word());
        if i.op0_kind() == OpKind::Memory {
            let disp = self.operand(i, word as u32, false);
            self.e.load_at(wide, R13, R14, disp);
            self.e.store(offset_of!(CpuState, scratch) + 16, R13);
            self.stack(-word, word as u32, true);
            self.e.load(R13, offset_of!(CpuState, scratch) + 16);
            self.e.store_at(wide, R14, 0, R13);
        } else {
            self.stack(-word, word as u32, true);
            if i.op0_kind() == OpKind::Register {
                let guest = number(i.op0_register()).unwrap_or(0);
                let host = self.host_register(guest, R13);
                self.e.store_at(wide, R14, 0, host);
            } else {
                self.e.store_imm_at(wide, R14, 0, i.immediate(0) as i32);
            }
        }
        self.move_rsp(-word);
    }

    pub(super) fn move_rsp(&mut self, by: i32) {
        self.e.lea(self.wide, R15, Address { base: Some(R15), index: None, scale: 1, disp: by });
    }

    pub(super) fn pop(&mut self, i: &Instruction) {
        self.free_flags();
        let (wide, word) = (self.wide, self.word());
        self.stack(0, word as u32, false);
        match number(i.op0_register()).unwrap_or(0) {
            4 => {
                self.e.load_at(wide, R15, R14, 0);
                return;
            }
            guest @ 13..=15 => {
                self.e.load_at(wide, R13, R14, 0);
                self.e.store(gpr_offset(guest), R13);
            }
            guest => self.e.load_at(wide, guest, R14, 0),
        }
        self.move_rsp(word);
    }

    pub(super) fn leave_frame(&mut self) {
        self.free_flags();
        let retry = self.e.pos();
        let (wide, word) = (self.wide, self.word());
        self.e.lea(wide, R14, Address { base: Some(5), index: None, scale: 1, disp: 0 });
        self.checked(word as u32, false, retry);
        self.e.load_at(wide, R13, R14, 0);
        self.e.lea(wide, R15, Address { base: Some(5), index: None, scale: 1, disp: word });
        self.e.mov(5, R13);
    }

    /// BT, BTS, BTR, BTC with the bit offset in a register: the offset reaches
    /// outside the operand, which moves by whole words (SDM 2A, 3.1.1.9).
    pub(super) fn bit_string(&mut self, i: &Instruction) -> bool {
        let register = i.op1_register();
        let size = register.size();
        let Some(guest) = number(register) else { return false };
        if size < 4 {
            return false;
        }
        self.free_flags();
        let write = i.mnemonic() != Mnemonic::Bt;
        let retry = self.e.pos();
        self.linear(i, size as u32);
        let offset = self.host_register(guest, R13);
        let word_bits = if size == 8 { 6 } else { 5 };
        if size == 8 {
            self.e.mov(R13, offset);
        } else {
            self.e.movsxd(R13, offset);
        }
        self.e.sar_imm(R13, word_bits);
        let word = Address { base: Some(R14), index: Some(R13), scale: size as u8, disp: 0 };
        self.e.lea(self.wide, R14, word);
        self.checked(size as u32, write, retry);
        // The offset in the word is made before the flags come back.
        let scratch = offset_of!(CpuState, scratch) + 16;
        let offset = self.host_register(guest, R13);
        self.e.mov(R13, offset);
        self.e.and32_imm(R13, size as u32 * 8 - 1);
        self.e.store(scratch, R13);
        let flags = FlagUse::of(i, self.source.counted());
        self.need_flags(flags.read, i.rflags_modified());
        self.e.load(R13, scratch);
        let mut copy = *i;
        copy.set_op1_register(if size == 8 { Register::R13 } else { Register::R13D });
        replace_memory(&mut copy, 0);
        if !self.e.instruction(&copy) {
            return false;
        }
        self.flags = Flags::Host;
        true
    }

    /// Where a guest register is to be written: [`Job::store_spilled`] follows.
    pub(super) fn destination(guest: u8) -> u8 {
        match guest {
            4 => R15,
            13..=15 => R13,
            _ => guest,
        }
    }

    pub(super) fn store_spilled(&mut self, guest: u8, host: u8) {
        if host == R13 {
            self.e.store(gpr_offset(guest), R13);
        }
    }
}
