//! The stack of an inner privilege level and the frames that interrupts and call
//! gates push (Intel SDM 3A, 5.8.5, 6.12.1 and 6.14.2).

use tetrarch_engine::Segment;

use super::segment::{
    code_of, fail, inside, is_null, mark_accessed, read_descriptor, system_type, table_address,
};
use crate::cpu::Cpu;
use crate::state::address::canonical;
use crate::state::fault::{R, gp, vector};
use crate::state::{attr, reg, seg};

/// The most slots of a frame, that of a call gate: SS:ESP, 31 parameters, CS:EIP.
const MAX_SLOTS: usize = 35;

/// Values for a stack, in the order of their pushes.
pub struct Frame {
    values: [u64; MAX_SLOTS],
    len: usize,
}

impl Frame {
    pub fn new() -> Self {
        Self { values: [0; MAX_SLOTS], len: 0 }
    }

    pub fn push(&mut self, value: u64) {
        self.values[self.len] = value;
        self.len += 1;
    }

    fn values(&self) -> &[u64] {
        &self.values[..self.len]
    }
}

fn slot(stack: &Segment, sp: u64, size: usize, n: usize) -> u64 {
    let mask = if stack.attributes & attr::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
    sp.wrapping_sub((size * (n + 1)) as u64) & mask
}

/// The stack pointer below `frame` on a segmented stack; #SS(`error`) where there
/// is no room.
pub fn check(stack: &Segment, sp: u64, size: usize, frame: &Frame, error: u32) -> R<u64> {
    if (0..frame.len).any(|n| !inside(stack, slot(stack, sp, size, n), size)) {
        return fail(vector::SS, error);
    }
    Ok(slot(stack, sp, size, frame.len.wrapping_sub(1)))
}

/// Writes `frame` below `sp` of a segmented stack and returns the new stack
/// pointer. Faults before anything is written.
pub fn write(
    cpu: &mut Cpu,
    stack: &Segment,
    sp: u64,
    size: usize,
    frame: &Frame,
    user: bool,
    error: u32,
) -> R<u64> {
    let top = check(stack, sp, size, frame, error)?;
    let linear = |n: usize| stack.base.wrapping_add(slot(stack, sp, size, n)) & 0xFFFF_FFFF;
    for n in 0..frame.len {
        cpu.probe_write(linear(n), size, user)?;
    }
    for (n, &value) in frame.values().iter().enumerate() {
        cpu.store(linear(n), size, value, user)?;
    }
    Ok(top)
}

/// As [`write()`], on the flat stack of 64-bit mode. `target` is where execution
/// goes on, #GP(0) if that cannot be.
pub fn write64(cpu: &mut Cpu, top: u64, frame: &Frame, user: bool, target: u64) -> R<u64> {
    let len = frame.len * 8;
    let rsp = top.wrapping_sub(len as u64);
    if !canonical(rsp) || !canonical(top.wrapping_sub(1)) {
        return fail(vector::SS, 0);
    }
    if !canonical(target) {
        return gp(0);
    }
    let mut bytes = [0; MAX_SLOTS * 8];
    for (slot, value) in bytes.chunks_exact_mut(8).zip(frame.values().iter().rev()) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    if let Err(stop) = cpu.store_bytes(rsp, &bytes[..len], user) {
        // CR2 tells of the first push that fails, from the top down.
        for n in 1..=frame.len as u64 {
            cpu.probe_write(top.wrapping_sub(8 * n), 8, user)?;
        }
        return Err(stop);
    }
    Ok(rsp)
}

/// Sets the part of RSP that a stack of this segment uses.
pub fn set_sp(cpu: &mut Cpu, stack: &Segment, sp: u64) {
    let rsp = &mut cpu.st.gpr[reg::RSP];
    *rsp = if stack.attributes & attr::DB != 0 { sp } else { *rsp & !0xFFFF | sp & 0xFFFF };
}

/// Loads a field of the TSS; #TS with the selector of the TSS if it is too short.
pub fn load_tss(cpu: &mut Cpu, offset: u64, size: usize) -> R<u64> {
    let tr = cpu.st.seg[seg::TR];
    if offset + size as u64 - 1 > u64::from(tr.limit) {
        return fail(vector::TS, code_of(tr.selector));
    }
    let address = table_address(cpu, tr.base, offset);
    cpu.load(address, size, false)
}

/// SS:ESP of `cpl` in a 32-bit or 16-bit TSS, and the loaded segment.
pub fn inner_stack(cpu: &mut Cpu, cpl: u8) -> R<(Segment, u64)> {
    let level = u64::from(cpl);
    let kind = cpu.st.seg[seg::TR].attributes & attr::TYPE;
    let (sp, selector) = if kind == system_type::TSS_BUSY {
        (load_tss(cpu, 4 + level * 8, 4)?, load_tss(cpu, 8 + level * 8, 2)?)
    } else {
        (load_tss(cpu, 2 + level * 4, 2)?, load_tss(cpu, 4 + level * 4, 2)?)
    };
    let selector = selector as u16;
    if is_null(selector) {
        return fail(vector::TS, code_of(selector));
    }
    let code = code_of(selector);
    let descriptor = read_descriptor(cpu, selector, vector::TS, 0)?;
    if (selector & 3) as u8 != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
        return fail(vector::TS, code);
    }
    if !descriptor.present() {
        return fail(vector::SS, code);
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok((descriptor.segment(selector), sp))
}

/// RSP of `cpl` in the 64-bit TSS.
pub fn inner_stack64(cpu: &mut Cpu, cpl: u8) -> R<u64> {
    load_tss(cpu, 4 + u64::from(cpl) * 8, 8)
}
