//! SYSCALL, SYSRET and the other system instructions that guests run often.
//!
//! A guest system call is a change of a few bytes of state and a branch: it
//! needs no leave. What is rare (a trace flag, an alignment-check flag, a wild
//! address) goes to the interpreter, which does the whole instruction.

use std::mem::offset_of;

use iced_x86::{Instruction, OpKind, Register};

use super::block::{PortAccess, What};
use super::emit::{Address, IRQ_WAIT, R11, R13, R14, RAX, RCX, cc};
use super::job::{Flags, Job};
use super::operands::{base_offset, number};
use crate::interp::syscall::{SYSRET_FLAGS, flat_code64, flat_stack};
use crate::state::block::branch_offset;
use crate::state::mode;
use crate::state::{CpuState, flag, seg};
use tetrarch_engine::Segment;

fn segment_field(segment: usize, field: usize) -> usize {
    offset_of!(CpuState, seg) + segment * size_of::<Segment>() + field
}

impl Job<'_> {
    /// A conditional leave for the interpreter at the current instruction.
    pub(super) fn interpret_if(&mut self, condition: u8) {
        let place = self.e.jcc(condition);
        self.interpret_from(place);
    }

    /// `to` := RFLAGS, from the flags put aside and the rest. Uses r13.
    pub(super) fn compose_rflags(&mut self, to: u8) {
        let saved = offset_of!(CpuState, saved_flags);
        self.e.load8(to, saved + 1);
        self.e.load8(R13, saved);
        self.e.shl_imm(R13, 11);
        self.e.or(to, R13);
        self.e.load8(R13, offset_of!(CpuState, iflag));
        self.e.shl_imm(R13, 9);
        self.e.or(to, R13);
        self.e.load32(R13, offset_of!(CpuState, flags));
        // Pushed and saved images have RF and VM clear (SDM 2B, PUSHF, SYSCALL).
        self.e.and32_imm(R13, !(flag::ARITH | flag::RF | flag::VM) as u32);
        self.e.or(to, R13);
    }

    /// RFLAGS := r13, whose TF, DF and AC are as the mode word says. Uses r14.
    fn set_rflags(&mut self) {
        self.e.mov32(R14, R13);
        self.e.shr_imm(R14, 9);
        self.e.and32_imm(R14, 1);
        self.e.store8(offset_of!(CpuState, iflag), R14);
        self.e.movzx8(R14, R13);
        self.e.shl_imm(R14, 8);
        self.e.raw(&[0x41, 0x0F, 0xBA, 0xE5, 11]); // bt r13d, 11
        self.e.raw(&[0x41, 0x83, 0xD6, 0]); // adc r14d, 0
        self.e.store32(offset_of!(CpuState, saved_flags), R14);
        self.e.and32_imm(R13, !flag::IF as u32);
        self.e.or32_imm(R13, flag::FIXED as u32);
        self.e.store(offset_of!(CpuState, flags), R13);
        self.flags = Flags::Saved;
    }

    /// Loads CS and SS as these instructions do: flat, without descriptors. The
    /// selectors are in r14 and, by `stack`, 8 more or less.
    fn set_segments(&mut self, cpl: u8, stack: i32) {
        let (code, data) = (flat_code64(0, cpl), flat_stack(0, cpl));
        for (segment, flat) in [(seg::CS, code), (seg::SS, data)] {
            let field = |field| segment_field(segment, field);
            self.e.store64_imm(field(offset_of!(Segment, base)), 0);
            self.e.store32_imm(field(offset_of!(Segment, limit)), flat.limit);
            self.e.store32_imm(field(offset_of!(Segment, attributes)), flat.attributes);
        }
        let selector = offset_of!(Segment, selector);
        self.e.store16(segment_field(seg::CS, selector), R14);
        let other = Address { base: Some(R14), index: None, scale: 1, disp: stack };
        self.e.lea(false, R14, other);
        self.e.store16(segment_field(seg::SS, selector), R14);
        self.e.store8_imm(offset_of!(CpuState, cpl), cpl);
        self.e.store32_imm(offset_of!(CpuState, mode), self.mode_at(cpl == 3));
    }

    /// The mode of 64-bit code on the other side of SYSCALL and SYSRET.
    fn mode_at(&self, user: bool) -> u32 {
        let word = self.source.mode & !(mode::USER | mode::RELATIVE);
        if user { word | mode::USER } else { word }
    }

    /// Leaves for the interpreter if the branch targets known there are of another mode: of
    /// 32-bit code.
    fn check_branch_mode(&mut self, user: bool) {
        let known = offset_of!(CpuState, branch_modes) + usize::from(user) * size_of::<u32>();
        self.e.cmp32_imm(known, self.mode_at(user));
        self.interpret_if(cc::NE);
    }

    /// SYSCALL from 64-bit code (SDM 2B; AMD APM 3).
    pub(super) fn syscall(&mut self, i: &Instruction) {
        self.free_flags();
        self.check_branch_mode(false);
        if self.source.relative() {
            self.relative_address(RCX, i.next_ip());
        } else {
            self.e.mov_imm(RCX, i.next_ip());
        }
        self.compose_rflags(R11);
        self.e.load(R13, offset_of!(CpuState, sfmask));
        self.e.raw(&[0x49, 0xF7, 0xD5]); // not r13
        self.e.raw(&[0x4D, 0x21, 0xDD]); // and r13, r11
        self.set_rflags();
        self.e.load32(R14, offset_of!(CpuState, star) + 4);
        self.e.and32_imm(R14, 0xFFFC);
        self.set_segments(0, 8);
        self.e.load(R13, offset_of!(CpuState, lstar));
        self.indirect_to(branch_offset(false));
    }

    /// SYSRET to 64-bit code. It replaces every flag, so none is kept.
    pub(super) fn sysret(&mut self) {
        let special = (flag::TF | flag::DF | flag::AC) as u32;
        self.e.raw(&[0x41, 0xF7, 0xC3]); // test r11d, special
        self.e.raw(&special.to_le_bytes());
        self.interpret_if(cc::NE);
        self.e.mov(R13, RCX);
        self.e.shl_imm(R13, 16);
        self.e.raw(&[0x49, 0xC1, 0xFD, 16]); // sar r13, 16
        self.e.raw(&[0x49, 0x39, 0xCD]); // cmp r13, rcx
        self.interpret_if(cc::NE);
        self.check_branch_mode(true);
        self.e.cmp8_imm(IRQ_WAIT, 0);
        self.interpret_if(cc::NE);
        self.e.mov32(R13, R11);
        self.e.and32_imm(R13, (SYSRET_FLAGS & !flag::RF) as u32);
        self.set_rflags();
        self.e.load32(R14, offset_of!(CpuState, star) + 4);
        self.e.shr_imm(R14, 16);
        let code = Address { base: Some(R14), index: None, scale: 1, disp: 16 };
        self.e.lea(false, R14, code);
        self.e.or32_imm(R14, 3);
        self.set_segments(3, -8);
        self.e.mov(R13, RCX);
        self.indirect_to(branch_offset(true));
    }

    pub(super) fn pushf(&mut self) {
        // PUSHF reads every flag, so all of them are put aside here.
        self.free_flags();
        let word = self.word();
        let scratch = offset_of!(CpuState, scratch) + 16;
        self.compose_rflags(R14);
        self.e.store(scratch, R14);
        // The store can fault on the host, and must find the guest's registers as they are.
        self.stack(-word, word as u32, true);
        self.e.load(R13, scratch);
        self.e.store_at(self.wide, R14, 0, R13);
        self.move_rsp(-word);
    }

    /// With an interrupt waiting, STI is the interpreter's, shadow and all.
    pub(super) fn sti(&mut self) {
        self.free_flags();
        self.e.cmp8_imm(IRQ_WAIT, 0);
        self.interpret_if(cc::NE);
        self.e.store8_imm(offset_of!(CpuState, iflag), 1);
    }

    pub(super) fn swapgs(&mut self) {
        let (base, kernel) = (base_offset(seg::GS), offset_of!(CpuState, kernel_gs_base));
        self.e.load(R13, base);
        self.e.load(R14, kernel);
        self.e.store(kernel, R13);
        self.e.store(base, R14);
    }

    pub(super) fn rdtsc(&mut self, with_aux: bool) {
        self.free_flags();
        let rdx = 2;
        if self.source.counted() {
            let call = self.e.call();
            self.e.bind_outward(call, self.stubs.tsc);
            self.e.mov(RAX, R14);
        } else {
            self.e.raw(&[0x0F, 0x31]); // rdtsc
            self.e.shl_imm(rdx, 32);
            self.e.or(RAX, rdx);
            self.e.add_state(RAX, offset_of!(CpuState, tsc_offset));
        }
        self.e.mov(rdx, RAX);
        self.e.shr_imm(rdx, 32);
        self.e.mov32(RAX, RAX);
        if with_aux {
            self.e.load32(RCX, offset_of!(CpuState, tsc_aux));
        }
    }

    /// IN and OUT: the port is known, or in a register, so that the access can be
    /// made without a look at the instruction. Rights are checked there.
    pub(super) fn port(&mut self, i: &Instruction, out: bool) {
        let (port, register) = if out { (0, 1) } else { (1, 0) };
        let port = (i.op_kind(port) != OpKind::Register).then(|| i.immediate8());
        let access = PortAccess { instruction: *i, port, register: i.op_register(register), out };
        let place = self.e.jmp();
        let what = What::Port(self.built.ports.len() as u32);
        self.built.ports.push(access);
        self.leave(place, self.stubs.leave_port, what);
    }

    /// Stores what `load` brings into a register of the guest.
    fn set_register(&mut self, register: Register, load: impl FnOnce(&mut Self, u8)) {
        let guest = number(register).unwrap_or(0);
        let host = Self::destination(guest);
        load(self, host);
        self.store_spilled(guest, host);
    }

    /// RDFSBASE, RDGSBASE.
    pub(super) fn read_base(&mut self, i: &Instruction, segment: usize) {
        let wide = i.op0_register().size() == 8;
        self.set_register(i.op0_register(), |job, host| {
            if wide {
                job.e.load(host, base_offset(segment));
            } else {
                job.e.load32(host, base_offset(segment));
            }
        });
    }

    /// MOV r32 or r64, Sreg: the selector, zero-extended.
    pub(super) fn read_selector(&mut self, i: &Instruction, segment: usize) {
        let at = segment_field(segment, offset_of!(Segment, selector));
        self.set_register(i.op0_register(), |job, host| job.e.load16(host, at));
    }

    /// MOV m16, Sreg.
    pub(super) fn store_selector(&mut self, i: &Instruction, segment: usize) {
        self.free_flags();
        let disp = self.operand(i, 2, true);
        self.e.load16(R13, segment_field(segment, offset_of!(Segment, selector)));
        self.e.store16_at(R14, disp, R13);
    }

    /// MOV from CRn for the registers that are plain state.
    pub(super) fn read_control(&mut self, i: &Instruction, offset: usize) {
        let wide = i.op0_register().size() == 8;
        self.set_register(i.op0_register(), |job, host| {
            if wide {
                job.e.load(host, offset);
            } else {
                job.e.load32(host, offset);
            }
        });
    }
}
