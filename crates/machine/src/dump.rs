//! The registers of a vCPU as text, for a crash report.

use std::fmt::Write;

use tetrarch_engine::{EngineError, Vcpu};

use crate::registers::{GPR, State};

/// Code bytes shown before and from RIP on: as many as Linux shows in an oops.
const BEFORE: u64 = 42;
const FROM: usize = 22;

/// EFER.LMA (Intel SDM 3A, 2.2.1) and the L bit of a segment's attributes.
const EFER_LMA: u64 = 1 << 10;
const SEGMENT_L: u32 = 1 << 13;
const SEGMENT_UNUSABLE: u32 = 1 << 16;

/// Flags of RFLAGS that have a name, by bit (Intel SDM 1, 3.4.3).
const FLAGS: [(u32, &str); 16] = [
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (8, "TF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (16, "RF"),
    (17, "VM"),
    (18, "AC"),
    (19, "VIF"),
    (20, "VIP"),
    (21, "ID"),
];

pub fn dump(vcpu: &mut dyn Vcpu) -> Result<String, EngineError> {
    let (mut text, state) = (String::new(), State::of(vcpu)?);
    // Writing to a String cannot fail.
    let _ = write_dump(&mut text, state, vcpu);
    Ok(text)
}

fn write_dump(out: &mut String, mut state: State, vcpu: &mut dyn Vcpu) -> std::fmt::Result {
    let general = state.general;
    for (index, (name, value)) in GPR.iter().zip(general.gpr).enumerate() {
        let end = if index % 4 == 3 { '\n' } else { ' ' };
        write!(out, "{:>3}={value:016x}{end}", name.to_uppercase())?;
    }
    write!(out, "RIP={:016x} RFLAGS={:08x}", general.rip, general.rflags)?;
    for (bit, name) in FLAGS {
        if general.rflags & 1 << bit != 0 {
            write!(out, " {name}")?;
        }
    }
    writeln!(out)?;
    for (name, segment) in state.segments() {
        write!(
            out,
            "{:>3}={:04x} base={:016x} limit={:08x} attr={:05x}",
            name.to_uppercase(),
            segment.selector,
            segment.base,
            segment.limit,
            segment.attributes
        )?;
        let unusable = segment.attributes & SEGMENT_UNUSABLE != 0;
        writeln!(out, "{}", if unusable { " unusable" } else { "" })?;
    }
    let system = state.system;
    writeln!(out, "GDT      base={:016x} limit={:04x}", system.gdt.base, system.gdt.limit)?;
    writeln!(out, "IDT      base={:016x} limit={:04x}", system.idt.base, system.idt.limit)?;
    writeln!(
        out,
        "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x} CR8={:x}",
        system.cr0, system.cr2, system.cr3, system.cr4, system.cr8
    )?;
    writeln!(out, "EFER={:08x} APIC_BASE={:016x}", system.efer, system.apic_base)?;

    // In 64-bit mode the base of CS is taken as 0, else addresses are 32 bits
    // wide (Intel SDM 3A, 3.4.4 and 3.3).
    let long = system.efer & EFER_LMA != 0 && system.cs.attributes & SEGMENT_L != 0;
    let rip =
        if long { general.rip } else { system.cs.base.wrapping_add(general.rip) & 0xFFFF_FFFF };
    write_code(out, vcpu, rip)
}

fn write_code(out: &mut String, vcpu: &mut dyn Vcpu, rip: u64) -> std::fmt::Result {
    write!(out, "Code:")?;
    let mut code = [0; FROM];
    let read = vcpu.peek(rip, &mut code).min(FROM);
    if read == 0 {
        return writeln!(out, " {rip:#x} is not mapped to RAM");
    }
    // One by one, since the range may begin in a page that is not mapped.
    for address in rip.saturating_sub(BEFORE)..rip {
        let mut byte = [0];
        if vcpu.peek(address, &mut byte) == 1 {
            write!(out, " {:02x}", byte[0])?;
        }
    }
    write!(out, " <{:02x}>", code[0])?;
    for byte in &code[1..read] {
        write!(out, " {byte:02x}")?;
    }
    writeln!(out)
}
