//! Hardware task switches (Intel SDM 3A, chapter 7): by JMP, CALL, a task gate
//! and IRET, between 32-bit and 16-bit tasks. Long mode has none.
//!
//! Up to [`commit`] a fault belongs to the old task and finds it as it was. The
//! new task's segments are then checked in its own address space; what is wrong
//! with them is a fault of the new task, before its first instruction. An access
//! that the machine must answer can still be repeated from the start: nothing
//! has changed by then but the old task's TSS, which gets the same values again.

use tetrarch_engine::Segment;

use super::frame::{self, Frame};
use super::segment::{
    Descriptor, code_of, descriptor_address, fail, is_null, mark_accessed, null_segment,
    read_descriptor, system_type, table_address,
};
use crate::cpu::Cpu;
use crate::state::fault::{R, Stop, gp, vector};
use crate::state::{attr, cr, flag, seg};

/// What switches tasks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// JMP: the old task ends.
    Jump,
    /// CALL, an interrupt or an exception: the new task returns to the old one.
    Nest,
    /// IRET with NT set.
    Return,
}

/// Where the old task goes on when it is resumed.
pub struct From {
    pub rip: u64,
    pub flags: u64,
}

/// EFLAGS that a TSS can load: all but reserved bits.
const TASK_FLAGS: u64 = 0x3F_7FD7;
/// DR7.L0-L3, which a task switch clears (SDM 3B, 17.2.4).
const DR7_LOCAL: u64 = 0x55;
/// DR6.BT: the T bit of the new TSS was set (SDM 3B, 17.3.1.5).
const DR6_BT: u64 = 1 << 15;
/// Segment registers in the order of the TSS.
const SEGMENTS: [usize; 6] = [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS];

/// A TSS of either width (SDM 3A, figures 7-2 and 7-10).
#[derive(Clone, Copy)]
struct Tss {
    base: u64,
    wide: bool,
}

impl Tss {
    fn slot(self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    /// The last byte that must be inside the limit.
    fn last(self) -> u32 {
        if self.wide { 0x67 } else { 0x2B }
    }

    fn ip(self) -> u64 {
        if self.wide { 0x20 } else { 0x0E }
    }

    /// EIP, EFLAGS and the general registers follow one another.
    fn flags(self) -> u64 {
        self.ip() + self.slot() as u64
    }

    fn gpr(self, n: usize) -> u64 {
        self.flags() + ((n + 1) * self.slot()) as u64
    }

    fn selector(self, n: usize) -> u64 {
        self.gpr(8 + n)
    }

    /// A 16-bit TSS has no FS and GS.
    fn segments(self) -> usize {
        if self.wide { 6 } else { 4 }
    }

    fn ldt(self) -> u64 {
        self.selector(self.segments())
    }

    fn load(self, cpu: &mut Cpu, offset: u64, size: usize) -> R<u64> {
        cpu.load(table_address(cpu, self.base, offset), size, false)
    }

    fn store(self, cpu: &mut Cpu, offset: u64, size: usize, value: u64) -> R<()> {
        cpu.store(table_address(cpu, self.base, offset), size, value, false)
    }
}

/// The part of a TSS that a switch loads.
struct Image {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Image {
    fn load(cpu: &mut Cpu, tss: Tss) -> R<Self> {
        let slot = tss.slot();
        let paging = cpu.st.cr0 & cr::CR0_PG != 0;
        let mut image = Self {
            cr3: if tss.wide && paging { Some(tss.load(cpu, 0x1C, 4)?) } else { None },
            rip: tss.load(cpu, tss.ip(), slot)?,
            flags: tss.load(cpu, tss.flags(), slot)?,
            gpr: [0; 8],
            selectors: [0; 6],
            ldt: tss.load(cpu, tss.ldt(), 2)? as u16,
            trap: tss.wide && tss.load(cpu, 0x64, 2)? & 1 != 0,
        };
        for n in 0..8 {
            // The manuals are silent on the upper halves of registers that come
            // from a 16-bit TSS. Clear, they fit a 32-bit stack segment.
            image.gpr[n] = tss.load(cpu, tss.gpr(n), slot)?;
        }
        for n in 0..tss.segments() {
            image.selectors[n] = tss.load(cpu, tss.selector(n), 2)? as u16;
        }
        Ok(image)
    }
}

/// The descriptor of a TSS to switch to, and where it is.
struct Target {
    selector: u16,
    address: u64,
    descriptor: Descriptor,
    tss: Tss,
}

/// Finds the TSS; of IRET all faults are #TS but that of an absent one (SDM 3A,
/// table 7-1).
fn find(cpu: &mut Cpu, selector: u16, reason: Reason) -> R<Target> {
    let error = code_of(selector);
    let invalid = if reason == Reason::Return { vector::TS } else { vector::GP };
    let address = match descriptor_address(cpu, selector, 8) {
        Some(address) if selector & 4 == 0 && !is_null(selector) => address,
        _ => return fail(invalid, error),
    };
    let descriptor = Descriptor(cpu.load(address, 8, false)?);
    let wide = match (descriptor.kind(), reason == Reason::Return) {
        (system_type::TSS_AVAILABLE, false) | (system_type::TSS_BUSY, true) => true,
        (system_type::TSS16_AVAILABLE, false) | (system_type::TSS16_BUSY, true) => false,
        _ => return fail(invalid, error),
    };
    if !descriptor.is_system() {
        return fail(invalid, error);
    }
    if !descriptor.present() {
        return fail(vector::NP, error);
    }
    let tss = Tss { base: descriptor.base(), wide };
    if descriptor.limit() < tss.last() {
        return fail(vector::TS, error);
    }
    Ok(Target { selector, address, descriptor, tss })
}

/// Switches to the task of `selector`. `error` is the error code of the
/// exception that the new task handles.
pub fn switch(
    cpu: &mut Cpu,
    selector: u16,
    reason: Reason,
    from: From,
    error: Option<u32>,
) -> R<()> {
    let target = find(cpu, selector, reason)?;
    let old_tr = cpu.st.seg[seg::TR];
    let old_kind = old_tr.attributes & attr::TYPE;
    let old = Tss { base: old_tr.base, wide: old_kind & 8 != 0 };
    // The selector of the LDT and what follows it are not written.
    if u64::from(old_tr.limit) + 1 < old.ldt() {
        return fail(vector::TS, code_of(old_tr.selector));
    }
    let mut image = Image::load(cpu, target.tss)?;
    image.flags = image.flags & TASK_FLAGS | flag::FIXED;
    if reason == Reason::Nest {
        image.flags |= flag::NT;
    }

    // What is written must be writable before any of it is.
    let saved = (old.ldt() - old.ip()) as usize;
    cpu.probe_write(table_address(cpu, old.base, old.ip()), saved, false)?;
    let old_descriptor = match reason {
        Reason::Nest => {
            cpu.probe_write(table_address(cpu, target.tss.base, 0), 2, false)?;
            None
        }
        _ => descriptor_address(cpu, old_tr.selector & !4, 8),
    };
    for address in [Some(target.address), old_descriptor].into_iter().flatten() {
        cpu.probe_write(address.wrapping_add(5), 1, false)?;
    }

    save(cpu, old, &from, reason)?;
    let mut new = check_segments(cpu, &image, target.tss, error)?;
    if reason == Reason::Nest {
        target.tss.store(cpu, 0, 2, u64::from(old_tr.selector))?;
    }
    if let Some(address) = old_descriptor {
        cpu.read_modify_write(address.wrapping_add(5), 1, false, true, |byte| byte & !2)?;
    }
    if reason != Reason::Return {
        cpu.read_modify_write(target.address.wrapping_add(5), 1, false, true, |byte| byte | 2)?;
    }
    let fault = new.fault.take();
    commit(cpu, &image, &target, new);
    fault.map_or(Ok(()), |fault| Err(Stop::Fault(fault)))
}

/// Writes the state of the old task into its TSS.
fn save(cpu: &mut Cpu, old: Tss, from: &From, reason: Reason) -> R<()> {
    let slot = old.slot();
    let flags = if reason == Reason::Return { from.flags & !flag::NT } else { from.flags };
    old.store(cpu, old.ip(), slot, from.rip)?;
    old.store(cpu, old.flags(), slot, flags)?;
    for n in 0..8 {
        let value = cpu.st.gpr[n];
        old.store(cpu, old.gpr(n), slot, value)?;
    }
    for (n, index) in SEGMENTS.into_iter().enumerate().take(old.segments()) {
        let selector = u64::from(cpu.st.seg[index].selector);
        old.store(cpu, old.selector(n), 2, selector)?;
    }
    Ok(())
}

/// The new task's segment registers and stack pointer, and the first fault among
/// them. What comes after the fault is unusable.
struct Loaded {
    seg: [Segment; 6],
    ldt: Segment,
    cpl: u8,
    esp: u64,
    fault: Option<crate::state::fault::Fault>,
}

/// Checks the new task's segments in its address space, with its LDT.
fn check_segments(cpu: &mut Cpu, image: &Image, tss: Tss, error: Option<u32>) -> R<Loaded> {
    let (old_cr3, old_ldt) = (cpu.st.cr3, cpu.st.seg[seg::LDT]);
    if let Some(cr3) = image.cr3 {
        cpu.st.cr3 = cr3;
        cpu.tlb.flush(false);
    }
    let mut new = Loaded {
        seg: image.selectors.map(|selector| null_segment(selector, 0)),
        ldt: null_segment(image.ldt, 0),
        cpl: (image.selectors[seg::CS] & 3) as u8,
        esp: image.gpr[crate::state::reg::RSP],
        fault: None,
    };
    if image.flags & flag::VM != 0 {
        new.cpl = 3;
    }
    let result = load_segments(cpu, image, &mut new)
        .and_then(|()| push_error(cpu, tss, &mut new, image.rip, error));
    cpu.st.seg[seg::LDT] = old_ldt;
    if image.cr3.is_some() {
        cpu.st.cr3 = old_cr3;
        cpu.tlb.flush(false);
    }
    match result {
        Ok(()) => Ok(new),
        Err(Stop::Fault(fault)) => {
            new.fault = Some(fault);
            Ok(new)
        }
        Err(stop) => Err(stop),
    }
}

fn load_segments(cpu: &mut Cpu, image: &Image, new: &mut Loaded) -> R<()> {
    cpu.st.seg[seg::LDT] = new.ldt;
    if !is_null(image.ldt) {
        let error = code_of(image.ldt);
        if image.ldt & 4 != 0 {
            return fail(vector::TS, error);
        }
        let descriptor = read_descriptor(cpu, image.ldt, vector::TS, 0)?;
        let is_ldt = descriptor.is_system() && descriptor.kind() == system_type::LDT;
        if !is_ldt || !descriptor.present() {
            return fail(vector::TS, error);
        }
        new.ldt = descriptor.segment(image.ldt);
        cpu.st.seg[seg::LDT] = new.ldt;
    }
    if image.flags & flag::VM != 0 {
        for index in SEGMENTS {
            new.seg[index] = vm86_segment(image.selectors[index]);
        }
        return Ok(());
    }
    for index in [seg::CS, seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
        new.seg[index] = check_segment(cpu, index, image.selectors[index], new.cpl)?;
    }
    Ok(())
}

/// SDM 3A, 20.2: base from the selector, 64 KiB, read-write data of DPL 3.
fn vm86_segment(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xFFFF, attributes: 0xF3, selector }
}

/// One segment register of the new task (SDM 3A, table 7-1).
fn check_segment(cpu: &mut Cpu, index: usize, selector: u16, cpl: u8) -> R<Segment> {
    let error = code_of(selector);
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        return if index == seg::CS || index == seg::SS {
            fail(vector::TS, error)
        } else {
            Ok(null_segment(selector, 0))
        };
    }
    let descriptor = read_descriptor(cpu, selector, vector::TS, 0)?;
    let dpl = descriptor.dpl();
    let (allowed, absent) = match index {
        seg::CS => {
            let level = if descriptor.is_conforming() { dpl <= rpl } else { dpl == rpl };
            (descriptor.is_code() && level, vector::NP)
        }
        seg::SS => (descriptor.is_writable_data() && dpl == cpl && rpl == cpl, vector::SS),
        _ => {
            let level = descriptor.is_conforming() || dpl >= rpl.max(cpl);
            (descriptor.is_readable() && level, vector::NP)
        }
    };
    if !allowed {
        return fail(vector::TS, error);
    }
    if !descriptor.present() {
        return fail(absent, error);
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok(descriptor.segment(selector))
}

/// Checks EIP and pushes the error code of an exception onto the new stack, with
/// the width of the task.
fn push_error(cpu: &mut Cpu, tss: Tss, new: &mut Loaded, rip: u64, error: Option<u32>) -> R<()> {
    if rip > u64::from(new.seg[seg::CS].limit) {
        return gp(0);
    }
    if let Some(error) = error {
        let mut values = Frame::new();
        values.push(u64::from(error));
        let stack = new.seg[seg::SS];
        let sp = frame::write(cpu, &stack, new.esp, tss.slot(), &values, new.cpl == 3, 0)?;
        new.esp = if stack.attributes & attr::DB != 0 { sp } else { new.esp & !0xFFFF | sp };
    }
    Ok(())
}

/// Makes the new task the current one.
fn commit(cpu: &mut Cpu, image: &Image, target: &Target, new: Loaded) {
    let st = &mut *cpu.st;
    st.gpr[..8].copy_from_slice(&image.gpr);
    st.gpr[crate::state::reg::RSP] = new.esp;
    st.rip = image.rip;
    st.set_rflags(image.flags);
    st.cpl = new.cpl;
    st.seg[..6].copy_from_slice(&new.seg);
    st.seg[seg::LDT] = new.ldt;
    st.seg[seg::TR] = target.descriptor.segment(target.selector);
    st.seg[seg::TR].attributes |= 2;
    st.cr0 |= cr::CR0_TS;
    st.dr[7] &= !DR7_LOCAL;
    if image.trap {
        st.pending_debug |= DR6_BT;
    }
    if let Some(cr3) = image.cr3 {
        st.cr3 = cr3;
        cpu.tlb.flush(false);
    }
    cpu.update_mode();
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
