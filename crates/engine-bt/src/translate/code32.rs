//! 32-bit code: protected mode and compatibility mode (Intel SDM 3A, 3.2 and chapter 5).
//!
//! It is translated where code and stack are the whole linear space, as every
//! system of today has them ([`CpuState::flat_code32`](crate::state::CpuState::flat_code32)).
//! Other accesses are checked against their segment: none is needed through DS and
//! ES where those are flat too, which is part of the mode; elsewhere, and through
//! FS and GS always, the last byte is compared with [`reach`](crate::state::reach)
//! and the base is added. What [`reach`](crate::state::reach) leaves out, and
//! what only 32-bit code has (PUSHA, BOUND, INTO, the decimal adjustments), is
//! interpreted.
//!
//! Addresses are cut to 32 bits. The upper halves of registers are undefined here
//! (Intel SDM 1, 3.4.1.1), so an instruction that uses 64 bits of a register to
//! get at 32 may clear the others.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::block::Source;
use crate::interp::operand::{address_size, segment_index};
use crate::state::{mode, seg};

/// Short forms become those that 64-bit code, and so the copy, has as well.
pub fn use_common_form(i: &mut Instruction) {
    i.set_code(match i.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        code => code,
    });
}

impl Source<'_> {
    /// The segment whose limit and base an access through this register must mind;
    /// `None`: it has no part in it.
    pub(super) fn segment(&self, segment: Register) -> Option<usize> {
        let flat = match segment {
            Register::FS | Register::GS => false,
            _ if !self.code32() => true,
            Register::DS => self.mode & mode::FLAT_DS != 0,
            Register::ES => self.mode & mode::FLAT_ES != 0,
            _ => segment == Register::SS,
        };
        (!flat).then(|| segment_index(segment))
    }

    /// Whether the translator knows no way to the instruction's operand in memory.
    pub(super) fn is_out_of_reach(&self, i: &Instruction) -> bool {
        let in_memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
        self.code32()
            && in_memory
            && (address_size(i) == 2 || self.segment(i.memory_segment()) == Some(seg::CS))
    }
}
