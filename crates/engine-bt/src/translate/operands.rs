//! Operands: guest registers in host registers, checked memory.

use std::mem::offset_of;

use iced_x86::{Instruction, OpAccess, OpKind, Register};

use super::classify::keeps_flags_sometimes;
use super::emit::{Address, R13, R14, R15, cc, gpr_offset};
use super::job::{Cold, Flags, Job};
use super::liveness::FlagUse;
use crate::cpu::fpu;
use crate::state::CpuState;

/// The guest register number of a general register of any width.
pub(super) fn number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register().number() as u8)
}

pub(super) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

pub(super) fn gpr_of(width: usize, number: u8) -> Register {
    let first = match width {
        1 => Register::AL as u32,
        2 => Register::AX as u32,
        4 => Register::EAX as u32,
        _ => Register::RAX as u32,
    };
    // AL..BL, then AH..BH, then SPL..R15L: skip the high bytes.
    let skip = if width == 1 && number >= 4 { 4 } else { 0 };
    Register::try_from((first + u32::from(number) + skip) as usize).unwrap_or(Register::RAX)
}

pub(super) fn base_offset(segment: usize) -> usize {
    offset_of!(CpuState, seg) + segment * size_of::<tetrarch_engine::Segment>()
}

/// A slot for an operand that flags are made from again.
pub(super) fn flag_operand(slot: u8) -> usize {
    offset_of!(CpuState, flag_operands) + usize::from(slot) * 8
}

/// Makes [r14 + disp] the memory operand.
pub(super) fn replace_memory(copy: &mut Instruction, disp: i32) {
    copy.set_memory_base(Register::R14);
    copy.set_memory_index(Register::None);
    copy.set_memory_index_scale(1);
    copy.set_memory_displacement64(disp as i64 as u64);
    copy.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
    copy.set_segment_prefix(Register::None);
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

impl Job<'_> {
    /// Loads a guest register that lives in memory into `scratch`; otherwise
    /// tells where it lives.
    pub(super) fn host_register(&mut self, guest: u8, scratch: u8) -> u8 {
        match guest {
            4 => R15,
            13..=15 => {
                self.e.load(scratch, gpr_offset(guest));
                scratch
            }
            _ => guest,
        }
    }

    /// base + index * scale + displacement with host registers. Uses r13, r14.
    pub(super) fn address(&mut self, i: &Instruction) -> Address {
        let base = number(i.memory_base()).map(|guest| self.host_register(guest, R14));
        let index = number(i.memory_index()).map(|guest| self.host_register(guest, R13));
        let scale = i.memory_index_scale() as u8;
        Address { base, index, scale, disp: i.memory_displacement64() as i32 }
    }

    /// The linear address, where it is a constant.
    fn constant_address(&self, i: &Instruction) -> Option<u64> {
        let plain = self.source.segment(i.memory_segment()).is_none();
        if i.is_ip_rel_memory_operand() {
            let known = plain && !self.source.relative();
            return known.then(|| i.ip_rel_memory_address());
        }
        let absolute = i.memory_base() == Register::None && i.memory_index() == Register::None;
        (absolute && plain).then(|| i.memory_displacement64())
    }

    /// `to` := a linear address that is `offset` from the page of this relative code.
    /// Leaves the flags.
    pub(super) fn relative_address(&mut self, to: u8, offset: u64) {
        self.e.load(to, offset_of!(CpuState, code_page));
        let mut rest = offset as i64;
        while rest != 0 {
            let disp = rest.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
            self.e.lea(true, to, Address { base: Some(to), index: None, scale: 1, disp });
            rest -= i64::from(disp);
        }
    }

    /// r14 := the linear address of the memory operand, of `size` bytes. Flags must be free.
    pub(super) fn linear(&mut self, i: &Instruction, size: u32) {
        if i.is_ip_rel_memory_operand() {
            if self.source.relative() {
                self.relative_address(R14, i.ip_rel_memory_address());
            } else {
                self.e.mov_imm(R14, i.ip_rel_memory_address());
            }
        } else {
            let wide = self.wide && i.memory_base().size() != 4 && i.memory_index().size() != 4;
            let address = self.address(i);
            self.e.lea(wide, R14, address);
        }
        let Some(segment) = self.source.segment(i.memory_segment()) else { return };
        if self.wide {
            self.e.add_state(R14, base_offset(segment));
            return;
        }
        let end = Address { base: Some(R14), index: None, scale: 1, disp: size as i32 };
        self.e.lea(true, R13, end);
        self.e.cmp_state(R13, offset_of!(CpuState, reach) + segment * 8);
        self.slow_if(cc::A);
        self.e.add_state(R14, base_offset(segment));
        self.e.mov32(R14, R14);
    }

    /// Checks the memory operand and leaves a host pointer to it: returns the
    /// displacement from r14. Clobbers r13 and the host's flags.
    pub(super) fn operand(&mut self, i: &Instruction, size: u32, write: bool) -> i32 {
        if let Some(linear) = self.constant_address(i) {
            if (linear & 0xFFF) + u64::from(size) <= 4096 {
                return self.constant(linear, write);
            }
            let retry = self.e.pos();
            self.e.mov_imm(R14, linear);
            self.checked(size, write, retry);
            return 0;
        }
        let plain = self.source.segment(i.memory_segment()).is_none();
        let stack_pointer = if self.wide { Register::RSP } else { Register::ESP };
        if plain && i.memory_base() == stack_pointer && i.memory_index() == Register::None {
            self.stack(i.memory_displacement64() as i32, size, write);
            return 0;
        }
        let retry = self.e.pos();
        self.linear(i, size);
        self.checked(size, write, retry);
        0
    }

    pub(super) fn constant(&mut self, linear: u64, write: bool) -> i32 {
        let retry = self.e.pos();
        let miss = self.e.check_constant(linear & !0xFFF, self.user, write);
        let stub = self.stubs.fill_address[usize::from(self.user) * 2 + usize::from(write)];
        let instruction = self.current;
        self.cold.push(Cold::FillConstant { miss, retry, stub, instruction, linear });
        (linear & 0xFFF) as i32
    }

    pub(super) fn checked(&mut self, size: u32, write: bool, retry: u32) {
        let miss = self.e.check(size, self.user, write);
        let stub = self.stubs.fill[usize::from(self.user) * 2 + usize::from(write)];
        self.cold.push(Cold::Fill { miss, retry, stub, instruction: self.current });
    }

    /// Checks `size` bytes at rsp + `disp`.
    pub(super) fn stack(&mut self, disp: i32, size: u32, write: bool) {
        let miss = self.e.check_stack(self.wide, disp, size, self.user);
        let resume = self.e.pos();
        let stub = self.stubs.stack[usize::from(self.user) * 2 + usize::from(write)];
        let instruction = self.current;
        self.cold.push(Cold::Stack { miss, resume, stub, instruction, limit: 4096 - size });
    }

    /// The guest's x87 state comes into the host CPU when it is first wanted: the
    /// interpreter runs the block's first x87 instruction then, and loads it.
    fn need_x87(&mut self) {
        if !self.x87_loaded {
            self.free_flags();
            self.e.cmp32_imm(offset_of!(CpuState, fpu_loaded), 0);
            self.slow_if(cc::E);
            if self.source.relative() {
                self.e.load(R13, offset_of!(CpuState, code_page));
                self.e.store(offset_of!(CpuState, x87_page), R13);
            }
            self.x87_loaded = true;
        }
    }

    /// Copies an instruction with its operands replaced. False if it cannot be.
    pub(super) fn copy(&mut self, i: &Instruction) -> bool {
        let flags = FlagUse::of(i, self.source.counted());
        let read = i.rflags_read() | flags.read;
        let written = i.rflags_modified();
        let memory = (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory);
        let (accesses, memory_write) = {
            let info = self.info.info(i);
            let accesses: Vec<OpAccess> = (0..i.op_count()).map(|op| info.op_access(op)).collect();
            let write = memory.is_some_and(|op| writes(accesses[op as usize]));
            (accesses, write)
        };

        if fpu::touches_x87(i) {
            self.need_x87();
        }
        let mut copy = *i;
        let Some(spills) = rename(&mut copy, &accesses, memory.is_some()) else { return false };
        // A 32-bit register written only conditionally still zero-extends, and
        // the copy does that by itself in the scratch register.

        if memory.is_some() {
            self.free_flags();
            let size = i.memory_size().size() as u32;
            let disp = self.operand(i, size, memory_write);
            match (memory, self.memory_kept()) {
                (Some(op), Some(slot)) => {
                    self.e.load_sized(R14, R14, disp, size as u8);
                    self.e.store(flag_operand(slot), R14);
                    copy.set_op_kind(op, OpKind::Register);
                    copy.set_op_register(op, gpr_of(size as usize, R14));
                    copy.set_segment_prefix(Register::None);
                }
                _ => replace_memory(&mut copy, disp),
            }
        }
        let sometimes = if keeps_flags_sometimes(i) { self.live_after() } else { 0 };
        self.need_flags(read | sometimes, written);
        for spill in spills.iter().filter(|spill| spill.load) {
            self.e.load(spill.scratch, gpr_offset(spill.guest));
        }
        let start = self.e.pos();
        if !self.e.instruction(&copy) {
            return false;
        }
        if written != 0 && self.before_patched_branch() {
            self.e.align_before_branch(start);
        }
        for spill in spills.iter().filter(|spill| spill.store) {
            self.e.store(gpr_offset(spill.guest), spill.scratch);
        }
        if written != 0 {
            self.flags = Flags::Host;
        }
        true
    }
}

/// A guest register that is in memory, and the scratch register which has its place for
/// one instruction.
#[derive(Clone, Copy)]
struct Spill {
    guest: u8,
    scratch: u8,
    /// It is loaded before, and stored behind.
    load: bool,
    store: bool,
}

/// At most one for each scratch register.
#[derive(Default)]
struct Spills([Option<Spill>; 2]);

impl Spills {
    fn iter(&self) -> impl Iterator<Item = &Spill> {
        self.0.iter().flatten()
    }

    /// The scratch register for an operand in a guest register; `None` if all are taken.
    fn take(&mut self, guest: u8, free: &[u8], load: bool, store: bool) -> Option<u8> {
        let of_guest = |spill: &Option<Spill>| spill.is_none_or(|spill| spill.guest == guest);
        let slot = self.0.iter().position(of_guest).filter(|&slot| slot < free.len())?;
        let fresh = Spill { guest, scratch: free[slot], load: false, store: false };
        let spill = self.0[slot].get_or_insert(fresh);
        spill.load |= load;
        spill.store |= store;
        Some(spill.scratch)
    }
}

/// Puts host registers in the place of the guest's. `None` if that cannot be.
fn rename(copy: &mut Instruction, accesses: &[OpAccess], has_memory: bool) -> Option<Spills> {
    let mut spills = Spills::default();
    let free: &[u8] = if has_memory { &[R13] } else { &[R13, R14] };
    for op in 0..copy.op_count() {
        if copy.op_kind(op) != OpKind::Register {
            continue;
        }
        let register = copy.op_register(op);
        let Some(guest) = number(register) else { continue };
        if is_high_byte(register) && has_memory {
            return None;
        }
        let host = match guest {
            4 => R15,
            13..=15 => {
                let access = accesses[op as usize];
                let load = access != OpAccess::Write || register.size() < 4;
                spills.take(guest, free, load, writes(access))?
            }
            _ => continue,
        };
        copy.set_op_register(op, gpr_of(register.size(), host));
    }
    Some(spills)
}
