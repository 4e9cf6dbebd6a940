//! A vCPU with tables and stacks, for tests of everything privileged.

use iced_x86::{Decoder, DecoderOptions};
use tetrarch_engine::SegmentTable;
use tetrarch_memory::{GuestMemory, GuestPhys};

use crate::cpu::{Cpu, VmShared};
use crate::interp::segment::{Descriptor, null_segment};
use crate::interp::{Flow, system};
use crate::state::fault::R;
use crate::state::{cr, flag, reg, seg};

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
/// Where stacks start; they grow down.
pub const KERNEL_STACK: u64 = 0x8000;
pub const IST_STACK: u64 = 0x9000;
pub const USER_STACK: u64 = 0xA000;
/// The handler of vector v is at HANDLERS + 16 v.
pub const HANDLERS: u64 = 0x2_0000;
pub const CODE: u64 = 0x3_0000;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_DS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1B;
pub const USER_DS: u16 = 0x23;
pub const USER_CS: u16 = 0x2B;
pub const TSS_SELECTOR: u16 = 0x30;
/// Two slots, for the 16 bytes of long mode.
pub const LDT_SELECTOR: u16 = 0x40;
pub const NOT_PRESENT: u16 = 0x50;
pub const READ_ONLY: u16 = 0x58;
pub const CONFORMING: u16 = 0x60;

/// Four MiB of RAM and a vCPU after RESET.
pub fn machine() -> Cpu {
    Cpu::new(0, VmShared::alone(GuestMemory::new(4 << 20).unwrap())).unwrap()
}

pub fn poke(cpu: &Cpu, address: u64, value: u64) {
    cpu.vm.memory.write(GuestPhys(address), &value.to_le_bytes()).unwrap();
}

pub fn peek(cpu: &Cpu, address: u64, size: usize) -> u64 {
    let mut bytes = [0; 8];
    cpu.vm.memory.read(GuestPhys(address), &mut bytes[..size]).unwrap();
    u64::from_le_bytes(bytes)
}

fn load(cpu: &mut Cpu, index: usize, selector: u16) {
    let raw = peek(cpu, GDT + u64::from(selector & !7), 8);
    cpu.st.seg[index] = Descriptor(raw).segment(selector);
}

fn tables(cpu: &mut Cpu, long: bool) {
    let kernel_code = if long { 0x00AF_9A00_0000_FFFF } else { 0x00CF_9A00_0000_FFFF };
    let user_code = if long { 0x00AF_FA00_0000_FFFF } else { 0x00CF_FA00_0000_FFFF };
    let tss_type = 0x8B00_0000_0067 | TSS << 16;
    for (selector, raw) in [
        (KERNEL_CS, kernel_code),
        (KERNEL_DS, 0x00CF_9200_0000_FFFF),
        (USER_CS32, 0x00CF_FA00_0000_FFFF),
        (USER_DS, 0x00CF_F200_0000_FFFF),
        (USER_CS, user_code),
        (TSS_SELECTOR, tss_type),
        (LDT_SELECTOR, 0x8200_0000_0FFF | 0x4000 << 16),
        (NOT_PRESENT, 0x00CF_1200_0000_FFFF),
        (READ_ONLY, 0x00CF_9000_0000_FFFF),
        (CONFORMING, if long { 0x00AF_9E00_0000_FFFF } else { 0x00CF_9E00_0000_FFFF }),
    ] {
        poke(cpu, GDT + u64::from(selector & !7), raw);
    }
    // No I/O permission map: its offset is past the limit.
    poke(cpu, TSS + 0x60, 0xFFFF << 48);
    cpu.st.gdt = SegmentTable { base: GDT, limit: 0xFF };
    let gate_size = if long { 16 } else { 8 };
    cpu.st.idt = SegmentTable { base: IDT, limit: gate_size * 256 - 1 };
    for v in 0..=255u64 {
        set_gate(cpu, v as u8, KERNEL_CS, if v == 3 { 0xEE } else { 0x8E }, 0, long);
    }
    load(cpu, seg::CS, KERNEL_CS);
    load(cpu, seg::TR, TSS_SELECTOR);
    for index in [seg::SS, seg::DS, seg::ES] {
        load(cpu, index, KERNEL_DS);
    }
    cpu.st.seg[seg::LDT] = null_segment(0, 0);
    cpu.st.gpr[reg::RSP] = KERNEL_STACK;
    cpu.st.rip = CODE;
}

pub fn set_gate(cpu: &Cpu, v: u8, selector: u16, kind: u64, ist: u64, long: bool) {
    let handler = HANDLERS + u64::from(v) * 16;
    let low = handler & 0xFFFF
        | u64::from(selector) << 16
        | ist << 32
        | kind << 40
        | (handler >> 16) << 48;
    if long {
        poke(cpu, IDT + u64::from(v) * 16, low);
        poke(cpu, IDT + u64::from(v) * 16 + 8, handler >> 32);
    } else {
        poke(cpu, IDT + u64::from(v) * 8, low);
    }
}

/// In 64-bit mode at CPL 0, the first GiB mapped one to one for all.
pub fn long_mode() -> Cpu {
    let mut cpu = machine();
    poke(&cpu, 0x1_0000, 0x1_1007);
    poke(&cpu, 0x1_1000, 0x87);
    cpu.st.cr3 = 0x1_0000;
    cpu.st.cr4 = cr::CR4_PAE | cr::CR4_PGE;
    cpu.st.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_SCE | cr::EFER_NXE;
    cpu.st.cr0 = cr::CR0_PE | cr::CR0_PG | cr::CR0_ET | cr::CR0_NE | cr::CR0_WP;
    tables(&mut cpu, true);
    poke(&cpu, TSS + 4, KERNEL_STACK);
    poke(&cpu, TSS + 0x24, IST_STACK);
    cpu.update_mode();
    cpu
}

/// In 32-bit protected mode at CPL 0, without paging.
pub fn protected_mode() -> Cpu {
    let mut cpu = machine();
    cpu.st.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE;
    tables(&mut cpu, false);
    poke(&cpu, TSS + 4, KERNEL_STACK | u64::from(KERNEL_DS) << 32);
    cpu.update_mode();
    cpu
}

/// At 0:0x7C00 in real mode.
pub fn real_mode() -> Cpu {
    let mut cpu = machine();
    cpu.st.seg[seg::CS].base = 0;
    cpu.st.seg[seg::CS].selector = 0;
    cpu.st.rip = 0x7C00;
    cpu.st.gpr[reg::RSP] = 0x7000;
    cpu.st.idt = SegmentTable { base: 0, limit: 0x3FF };
    cpu
}

/// From [`long_mode`] or [`protected_mode`] to CPL 3.
pub fn to_user(cpu: &mut Cpu) {
    load(cpu, seg::CS, USER_CS);
    for index in [seg::SS, seg::DS, seg::ES] {
        load(cpu, index, USER_DS);
    }
    cpu.st.cpl = 3;
    cpu.st.gpr[reg::RSP] = USER_STACK;
    cpu.st.set_rflags(flag::FIXED | flag::IF);
    cpu.update_mode();
}

/// Executes one system instruction given by its bytes.
pub fn run(cpu: &mut Cpu, bytes: &[u8]) -> R<()> {
    cpu.replay.rewind();
    let rip = cpu.st.rip;
    let i = Decoder::with_ip(cpu.st.code_bits(), bytes, rip, DecoderOptions::NONE).decode();
    assert!(!i.is_invalid(), "{bytes:x?}");
    match system::execute(cpu, &i).expect("a system instruction")? {
        Flow::Next => cpu.st.rip = i.next_ip(),
        Flow::Jump => {}
    }
    cpu.replay.clear();
    Ok(())
}
