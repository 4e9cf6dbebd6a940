//! Segment registers: descriptors, loads, and the instructions that look at
//! descriptors (Intel SDM 3A, chapters 3 and 5).

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use tetrarch_engine::Segment;

use super::Flow;
use super::operand;
use crate::cpu::Cpu;
use crate::state::address::canonical;
use crate::state::fault::{Fault, R, Stop, gp, ud, vector};
use crate::state::{attr, cr, flag, seg, shadow};

/// System descriptor types (SDM 3A, table 3-2).
pub mod system_type {
    pub const TSS16_AVAILABLE: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INTERRUPT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS_AVAILABLE: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
    pub const INTERRUPT_GATE: u32 = 14;
    pub const TRAP_GATE: u32 = 15;
}

/// The eight bytes of a GDT or LDT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    pub fn base(self) -> u64 {
        self.0 >> 16 & 0xFF_FFFF | self.0 >> 32 & 0xFF00_0000
    }

    /// The last offset in bytes.
    pub fn limit(self) -> u32 {
        let raw = (self.0 & 0xFFFF | self.0 >> 32 & 0xF_0000) as u32;
        if self.attributes() & attr::G != 0 { raw << 12 | 0xFFF } else { raw }
    }

    /// In the layout of [`Segment::attributes`].
    pub fn attributes(self) -> u32 {
        (self.0 >> 40) as u32 & 0xF0FF
    }

    pub fn kind(self) -> u32 {
        self.attributes() & attr::TYPE
    }

    pub fn dpl(self) -> u8 {
        (self.attributes() >> attr::DPL_SHIFT & 3) as u8
    }

    pub fn present(self) -> bool {
        self.attributes() & attr::P != 0
    }

    pub fn is_system(self) -> bool {
        self.attributes() & attr::S == 0
    }

    pub fn is_code(self) -> bool {
        !self.is_system() && self.attributes() & attr::CODE != 0
    }

    pub fn is_conforming(self) -> bool {
        self.is_code() && self.attributes() & attr::DC != 0
    }

    pub fn is_readable(self) -> bool {
        !self.is_system()
            && (self.attributes() & attr::CODE == 0 || self.attributes() & attr::RW != 0)
    }

    pub fn is_writable_data(self) -> bool {
        !self.is_system() && self.attributes() & (attr::CODE | attr::RW) == attr::RW
    }

    /// The segment register that this descriptor makes.
    pub fn segment(self, selector: u16) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes() | if self.is_system() { 0 } else { attr::ACCESSED },
            selector,
        }
    }
}

/// A segment register that holds a null selector.
pub fn null_segment(selector: u16, dpl: u8) -> Segment {
    let attributes = attr::UNUSABLE | u32::from(dpl) << attr::DPL_SHIFT;
    Segment { base: 0, limit: 0, attributes, selector }
}

pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Error code of a selector; bit 0 is for EXT.
pub fn code_of(selector: u16) -> u32 {
    u32::from(selector & !3)
}

pub fn fail<T>(vector: u8, error: u32) -> R<T> {
    Err(Fault::with_error(vector, error).into())
}

/// Whether `size` bytes at `offset` are inside the segment's limit.
pub fn inside(s: &Segment, offset: u64, size: usize) -> bool {
    let last = offset + size as u64 - 1;
    let limit = u64::from(s.limit);
    if s.attributes & (attr::S | attr::CODE | attr::DC) == attr::S | attr::DC {
        let top = if s.attributes & attr::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

/// Where the descriptor is, if `len` bytes of it are inside its table.
pub fn descriptor_address(cpu: &Cpu, selector: u16, len: u32) -> Option<u64> {
    let offset = u32::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        let ldt = &cpu.st.seg[seg::LDT];
        if ldt.attributes & attr::UNUSABLE != 0 || ldt.attributes & attr::P == 0 {
            return None;
        }
        (ldt.base, ldt.limit)
    } else {
        (cpu.st.gdt.base, u32::from(cpu.st.gdt.limit))
    };
    (offset + len - 1 <= limit).then(|| table_address(cpu, base, u64::from(offset)))
}

/// An address in a system table: 32 bits outside of long mode.
pub fn table_address(cpu: &Cpu, base: u64, offset: u64) -> u64 {
    let address = base.wrapping_add(offset);
    if cpu.st.long_mode() { address } else { address & 0xFFFF_FFFF }
}

/// The descriptor, or `None` where the selector is outside its table.
pub fn find_descriptor(cpu: &mut Cpu, selector: u16) -> R<Option<Descriptor>> {
    match descriptor_address(cpu, selector, 8) {
        Some(address) => Ok(Some(Descriptor(cpu.load(address, 8, false)?))),
        None => Ok(None),
    }
}

/// The descriptor; outside its table `vector` with the selector and `ext`.
pub fn read_descriptor(cpu: &mut Cpu, selector: u16, vector: u8, ext: u32) -> R<Descriptor> {
    match find_descriptor(cpu, selector)? {
        Some(descriptor) => Ok(descriptor),
        None => fail(vector, code_of(selector) | ext),
    }
}

/// Sets the accessed bit of a code or data descriptor.
pub fn mark_accessed(cpu: &mut Cpu, selector: u16, descriptor: Descriptor) -> R<()> {
    if descriptor.attributes() & attr::ACCESSED == 0
        && let Some(address) = descriptor_address(cpu, selector, 8)
    {
        cpu.read_modify_write(address.wrapping_add(5), 1, false, true, |byte| byte | 1)?;
    }
    Ok(())
}

/// Bits 63:32 of the base or offset, from the upper half of a 16-byte descriptor.
pub fn upper_half(cpu: &mut Cpu, selector: u16) -> R<u64> {
    let Some(address) = descriptor_address(cpu, selector, 16) else {
        return gp(code_of(selector));
    };
    let high = cpu.load(address.wrapping_add(8), 8, false)?;
    // The type field of the upper half must be 0 (SDM 3A, figures 5-8 and 8-11).
    if high >> 40 & 0x1F != 0 {
        return gp(code_of(selector));
    }
    Ok(high & 0xFFFF_FFFF)
}

/// Real and virtual-8086 mode: the selector is the base.
pub fn real_segment(cpu: &Cpu, index: usize, selector: u16) -> Segment {
    let base = u64::from(selector) << 4;
    if cpu.st.vm86() {
        // Present, DPL 3, read-write data (SDM 3A, 21.2.1).
        return Segment { base, limit: 0xFFFF, attributes: 0xF3, selector };
    }
    let old = cpu.st.seg[index];
    if old.attributes & attr::UNUSABLE != 0 {
        // Left so by protected mode.
        let code = if index == seg::CS { attr::CODE } else { 0 };
        let attributes = attr::P | attr::S | attr::RW | attr::ACCESSED | code;
        return Segment { base, limit: 0xFFFF, attributes, selector };
    }
    // Limit and attributes stay: what is called "unreal mode".
    Segment { base, selector, ..old }
}

/// Loads ES, SS, DS, FS or GS with all checks (SDM 2B, "MOV").
pub fn load_segment(cpu: &mut Cpu, index: usize, selector: u16) -> R<()> {
    if !cpu.st.protected() || cpu.st.vm86() {
        cpu.st.seg[index] = real_segment(cpu, index, selector);
        return Ok(());
    }
    let new = if index == seg::SS {
        check_stack_segment(cpu, selector)?
    } else {
        check_data_segment(cpu, selector)?
    };
    cpu.st.seg[index] = new;
    if !cpu.st.code64() {
        // What accesses through it need is part of the mode.
        cpu.update_mode();
    }
    Ok(())
}

fn check_stack_segment(cpu: &mut Cpu, selector: u16) -> R<Segment> {
    let cpl = cpu.st.cpl;
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        if cpu.st.code64() && cpl < 3 && rpl == cpl {
            return Ok(null_segment(selector, cpl));
        }
        return gp(0);
    }
    let code = code_of(selector);
    let descriptor = read_descriptor(cpu, selector, vector::GP, 0)?;
    if rpl != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
        return gp(code);
    }
    if !descriptor.present() {
        return fail(vector::SS, code);
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok(descriptor.segment(selector))
}

fn check_data_segment(cpu: &mut Cpu, selector: u16) -> R<Segment> {
    if is_null(selector) {
        return Ok(null_segment(selector, 0));
    }
    let code = code_of(selector);
    let rpl = (selector & 3) as u8;
    let descriptor = read_descriptor(cpu, selector, vector::GP, 0)?;
    if !descriptor.is_readable() {
        return gp(code);
    }
    let privileged = rpl.max(cpu.st.cpl) > descriptor.dpl();
    if privileged && !descriptor.is_conforming() {
        return gp(code);
    }
    if !descriptor.present() {
        return fail(vector::NP, code);
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok(descriptor.segment(selector))
}

/// Nulls the data segments that the new, outer privilege level may not keep, and
/// the selectors that were null already, whatever their RPL (SDM 2A, "IRET",
/// RETURN-TO-OUTER-PRIVILEGE-LEVEL).
///
/// The hidden base stays, unlike that of a null selector that is loaded: FS and
/// GS of 64-bit programs live on with it.
pub fn drop_inner_segments(cpu: &mut Cpu, cpl: u8) {
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = &mut cpu.st.seg[index];
        let dpl = (s.attributes >> attr::DPL_SHIFT & 3) as u8;
        let conforming = s.attributes & (attr::CODE | attr::DC) == attr::CODE | attr::DC;
        if s.attributes & attr::UNUSABLE != 0 || dpl < cpl && !conforming {
            *s = Segment { base: s.base, ..null_segment(0, 0) };
        }
    }
}

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let result = match i.code() {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            store_selector(cpu, i, u64::from(selector_of(cpu, i.op1_register())))
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => mov_to(cpu, i),
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => {
            pop(cpu, i, 2)
        }
        Code::Popd_ES | Code::Popd_SS | Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => {
            pop(cpu, i, 4)
        }
        Code::Popq_FS | Code::Popq_GS => pop(cpu, i, 8),
        Code::Pushw_ES
        | Code::Pushw_CS
        | Code::Pushw_SS
        | Code::Pushw_DS
        | Code::Pushw_FS
        | Code::Pushw_GS => push(cpu, i, 2),
        Code::Pushd_ES
        | Code::Pushd_CS
        | Code::Pushd_SS
        | Code::Pushd_DS
        | Code::Pushd_FS
        | Code::Pushd_GS => push(cpu, i, 4),
        Code::Pushq_FS | Code::Pushq_GS => push(cpu, i, 8),
        _ => match i.mnemonic() {
            Mnemonic::Lds => load_far_pointer(cpu, i, seg::DS),
            Mnemonic::Les => load_far_pointer(cpu, i, seg::ES),
            Mnemonic::Lfs => load_far_pointer(cpu, i, seg::FS),
            Mnemonic::Lgs => load_far_pointer(cpu, i, seg::GS),
            Mnemonic::Lss => load_far_pointer(cpu, i, seg::SS),
            Mnemonic::Lar => inspect(cpu, i, lar),
            Mnemonic::Lsl => inspect(cpu, i, lsl),
            Mnemonic::Verr => verify(cpu, i, false),
            Mnemonic::Verw => verify(cpu, i, true),
            Mnemonic::Arpl => arpl(cpu, i),
            Mnemonic::Sldt => store_table(cpu, i, seg::LDT),
            Mnemonic::Str => store_table(cpu, i, seg::TR),
            Mnemonic::Lldt => load_table(cpu, i, load_ldt),
            Mnemonic::Ltr => load_table(cpu, i, load_tr),
            _ => return None,
        },
    };
    Some(result)
}

fn selector_of(cpu: &Cpu, register: Register) -> u16 {
    cpu.st.seg[operand::segment_index(register)].selector
}

/// To memory a selector is 16 bits whatever the operand size; to a register it
/// is zero-extended to it.
fn store_selector(cpu: &mut Cpu, i: &Instruction, selector: u64) -> R<Flow> {
    if i.op0_kind() == OpKind::Register {
        operand::write_reg(cpu, i.op0_register(), selector);
    } else {
        operand::store_mem(cpu, i, 2, selector)?;
    }
    Ok(Flow::Next)
}

/// A 16-bit operand in a register of any width or in memory.
fn read_word(cpu: &mut Cpu, i: &Instruction, op: u32) -> R<u16> {
    let value = if i.op_kind(op) == OpKind::Register {
        operand::read_reg(cpu, i.op_register(op))
    } else {
        operand::load_mem(cpu, i, 2)?
    };
    Ok(value as u16)
}

fn mov_to(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let target = i.op0_register();
    if target == Register::CS {
        return ud();
    }
    let selector = read_word(cpu, i, 1)?;
    load_segment(cpu, operand::segment_index(target), selector)?;
    if target == Register::SS {
        cpu.st.shadow = shadow::MOV_SS;
    }
    Ok(Flow::Next)
}

fn push(cpu: &mut Cpu, i: &Instruction, size: usize) -> R<Flow> {
    let selector = u64::from(selector_of(cpu, i.op0_register()));
    operand::push(cpu, selector, size)?;
    Ok(Flow::Next)
}

fn pop(cpu: &mut Cpu, i: &Instruction, size: usize) -> R<Flow> {
    let sp = cpu.st.gpr[crate::state::reg::RSP] & operand::stack_mask(cpu);
    // Only 16 bits need be there, but a whole slot is what CPUs read or may read.
    let selector = operand::stack_load(cpu, sp, size)? as u16;
    let target = i.op0_register();
    // The stack pointer moves by the width that the old SS had.
    let mask = operand::stack_mask(cpu);
    load_segment(cpu, operand::segment_index(target), selector)?;
    let rsp = &mut cpu.st.gpr[crate::state::reg::RSP];
    let moved = sp.wrapping_add(size as u64) & mask;
    *rsp = if mask == 0xFFFF { *rsp & !mask | moved } else { moved };
    if target == Register::SS {
        cpu.st.shadow = shadow::MOV_SS;
    }
    Ok(Flow::Next)
}

fn load_far_pointer(cpu: &mut Cpu, i: &Instruction, index: usize) -> R<Flow> {
    if i.op1_kind() == OpKind::Register {
        return ud();
    }
    let (offset, selector) = read_far_pointer(cpu, i)?;
    load_segment(cpu, index, selector)?;
    operand::write_reg(cpu, i.op0_register(), offset);
    Ok(Flow::Next)
}

/// A far pointer in memory: offset, then selector.
pub fn read_far_pointer(cpu: &mut Cpu, i: &Instruction) -> R<(u64, u16)> {
    let total = i.memory_size().size();
    let size = total - 2;
    let address = operand::mem_linear(cpu, i, total, false)?;
    let user = cpu.user();
    let mut bytes = [0; 10];
    cpu.load_bytes(address, &mut bytes[..total], user)?;
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    Ok((u64::from_le_bytes(offset), u16::from_le_bytes([bytes[size], bytes[size + 1]])))
}

fn needs_protected(cpu: &Cpu) -> R<()> {
    if cpu.st.protected() && !cpu.st.vm86() { Ok(()) } else { ud() }
}

fn visible(cpu: &Cpu, selector: u16, descriptor: Descriptor) -> bool {
    let level = ((selector & 3) as u8).max(cpu.st.cpl);
    descriptor.is_conforming() || level <= descriptor.dpl()
}

/// LAR: the second doubleword of the descriptor, masked.
fn lar(cpu: &Cpu, selector: u16, descriptor: Descriptor) -> Option<u32> {
    use system_type as t;
    if descriptor.is_system() {
        let legacy = [t::TSS16_AVAILABLE, t::TSS16_BUSY, t::CALL_GATE16, t::TASK_GATE];
        let valid = [t::LDT, t::TSS_AVAILABLE, t::TSS_BUSY, t::CALL_GATE];
        let kind = descriptor.kind();
        if !valid.contains(&kind) && (cpu.st.long_mode() || !legacy.contains(&kind)) {
            return None;
        }
    }
    visible(cpu, selector, descriptor).then_some((descriptor.0 >> 32) as u32 & 0x00FF_FF00)
}

/// LSL: the limit in bytes; gates have none.
fn lsl(cpu: &Cpu, selector: u16, descriptor: Descriptor) -> Option<u32> {
    use system_type as t;
    if descriptor.is_system() {
        let kind = descriptor.kind();
        let legacy = [t::TSS16_AVAILABLE, t::TSS16_BUSY];
        let valid = [t::LDT, t::TSS_AVAILABLE, t::TSS_BUSY];
        if !valid.contains(&kind) && (cpu.st.long_mode() || !legacy.contains(&kind)) {
            return None;
        }
    }
    visible(cpu, selector, descriptor).then(|| descriptor.limit())
}

fn inspect(
    cpu: &mut Cpu,
    i: &Instruction,
    what: fn(&Cpu, u16, Descriptor) -> Option<u32>,
) -> R<Flow> {
    needs_protected(cpu)?;
    let selector = read_word(cpu, i, 1)?;
    let descriptor = if is_null(selector) { None } else { find_descriptor(cpu, selector)? };
    let value = descriptor.and_then(|descriptor| what(cpu, selector, descriptor));
    if let Some(value) = value {
        operand::write_reg(cpu, i.op0_register(), u64::from(value));
    }
    cpu.st.update_flags(flag::ZF, if value.is_some() { flag::ZF } else { 0 });
    Ok(Flow::Next)
}

fn verify(cpu: &mut Cpu, i: &Instruction, write: bool) -> R<Flow> {
    needs_protected(cpu)?;
    let selector = read_word(cpu, i, 0)?;
    let descriptor = if is_null(selector) { None } else { find_descriptor(cpu, selector)? };
    let allowed = descriptor.is_some_and(|d| {
        let kind = if write { d.is_writable_data() } else { d.is_readable() };
        kind && visible(cpu, selector, d)
    });
    cpu.st.update_flags(flag::ZF, if allowed { flag::ZF } else { 0 });
    Ok(Flow::Next)
}

fn arpl(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    needs_protected(cpu)?;
    let source = read_word(cpu, i, 1)? & 3;
    let target = read_word(cpu, i, 0)?;
    let adjust = target & 3 < source;
    if adjust {
        let value = u64::from(target & !3 | source);
        if i.op0_kind() == OpKind::Register {
            // 16 bits, whatever name the decoder gives the register.
            let index = operand::gpr_index(i.op0_register());
            operand::write_gpr(cpu, index, 2, value);
        } else {
            operand::store_mem(cpu, i, 2, value)?;
        }
    }
    cpu.st.update_flags(flag::ZF, if adjust { flag::ZF } else { 0 });
    Ok(Flow::Next)
}

fn store_table(cpu: &mut Cpu, i: &Instruction, index: usize) -> R<Flow> {
    needs_protected(cpu)?;
    umip(cpu)?;
    let selector = u64::from(cpu.st.seg[index].selector);
    store_selector(cpu, i, selector)
}

fn load_table(cpu: &mut Cpu, i: &Instruction, load: fn(&mut Cpu, u16) -> R<()>) -> R<Flow> {
    needs_protected(cpu)?;
    if cpu.st.cpl != 0 {
        return gp(0);
    }
    let selector = read_word(cpu, i, 0)?;
    load(cpu, selector)?;
    Ok(Flow::Next)
}

fn load_ldt(cpu: &mut Cpu, selector: u16) -> R<()> {
    if is_null(selector) {
        cpu.st.seg[seg::LDT] = null_segment(selector, 0);
        return Ok(());
    }
    cpu.st.seg[seg::LDT] = system_segment(cpu, selector, &[system_type::LDT])?.1;
    Ok(())
}

fn load_tr(cpu: &mut Cpu, selector: u16) -> R<()> {
    if is_null(selector) {
        return gp(0);
    }
    let kinds: &[u32] = if cpu.st.long_mode() {
        &[system_type::TSS_AVAILABLE]
    } else {
        &[system_type::TSS_AVAILABLE, system_type::TSS16_AVAILABLE]
    };
    let (address, mut segment) = system_segment(cpu, selector, kinds)?;
    cpu.read_modify_write(address.wrapping_add(5), 1, false, true, |byte| byte | 2)?;
    segment.attributes |= 2;
    cpu.st.seg[seg::TR] = segment;
    Ok(())
}

/// A TSS or LDT of the GDT; 16 bytes in long mode.
fn system_segment(cpu: &mut Cpu, selector: u16, kinds: &[u32]) -> R<(u64, Segment)> {
    let code = code_of(selector);
    if selector & 4 != 0 {
        return gp(code);
    }
    let Some(address) = descriptor_address(cpu, selector, 8) else { return gp(code) };
    let descriptor = Descriptor(cpu.load(address, 8, false)?);
    if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
        return gp(code);
    }
    if !descriptor.present() {
        return fail(vector::NP, code);
    }
    let mut segment = descriptor.segment(selector);
    if cpu.st.long_mode() {
        segment.base |= upper_half(cpu, selector)? << 32;
        if !canonical(segment.base) {
            return gp(code);
        }
    }
    Ok((address, segment))
}

/// Puts EXT into the error code of a fault met during delivery of an event.
pub fn with_ext(stop: Stop, ext: u32) -> Stop {
    match stop {
        Stop::Fault(mut fault) if fault.vector != vector::PF => {
            fault.error = fault.error.map(|code| code | ext);
            Stop::Fault(fault)
        }
        other => other,
    }
}

/// Whether code in `segment` is 64-bit code.
pub fn is_code64(cpu: &Cpu, segment: &Segment) -> bool {
    cpu.st.long_mode() && segment.attributes & attr::L != 0
}

/// #GP(0) where RIP would leave the code segment or canonical form.
pub fn check_target(cpu: &Cpu, code: &Segment, offset: u64) -> R<()> {
    let inside =
        if is_code64(cpu, code) { canonical(offset) } else { offset <= u64::from(code.limit) };
    if inside { Ok(()) } else { gp(0) }
}

/// The last checks of a code segment, and the segment register with `cpl`.
pub fn usable_code(cpu: &mut Cpu, selector: u16, descriptor: Descriptor, cpl: u8) -> R<Segment> {
    let both = attr::L | attr::DB;
    if cpu.st.long_mode() && descriptor.attributes() & both == both {
        return gp(code_of(selector));
    }
    if !descriptor.present() {
        return fail(vector::NP, code_of(selector));
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok(descriptor.segment(selector & !3 | u16::from(cpl)))
}

/// CR4.UMIP: #GP(0) of what shows the system's tables to user code (SDM 3A, 2.5).
pub fn umip(cpu: &Cpu) -> R<()> {
    if cpu.st.cr4 & cr::CR4_UMIP != 0 && cpu.st.cpl != 0 { gp(0) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_descriptor() {
        let d = Descriptor(0x00CF_9B00_0000_FFFF);
        assert_eq!((d.base(), d.limit()), (0, 0xFFFF_FFFF));
        assert!(d.is_code() && d.is_readable() && d.present() && !d.is_conforming());
        assert_eq!(d.segment(8).attributes, attr::G | attr::DB | 0x9B);
    }

    #[test]
    fn fields_are_put_together() {
        let d = Descriptor(0x1240_F234_5678_9ABC);
        assert_eq!(d.base(), 0x1234_5678);
        assert_eq!(d.limit(), 0x9ABC);
        assert_eq!(d.dpl(), 3);
        assert!(d.is_writable_data());
        assert_eq!(d.segment(0x23).attributes & attr::ACCESSED, attr::ACCESSED);
    }
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod rights_tests;
