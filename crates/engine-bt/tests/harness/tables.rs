//! The guest's descriptor tables, page tables and exception handlers.
//!
//! One layout serves all modes, in the first 64 KiB of RAM. Each exception
//! handler writes its vector to the port of that number, so that the machine
//! sees every exception, drops the error code, and returns.

use tetrarch_engine::{Segment, SegmentTable};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::input::Random;

pub const RAM: u64 = 1 << 20;

pub const GDT: u64 = 0x1000;
pub const IDT64: u64 = 0x2000;
pub const IDT32: u64 = 0x3000;
pub const TSS: u64 = 0x3800;
const HANDLERS64: u64 = 0x4000;
/// Turns all of XCR0 on and says so at port 0xFE.
pub const XSETBV: u64 = 0x4400;
const HANDLERS32: u64 = 0x5000;
const HANDLERS16: u64 = 0x5800;
pub const PML4: u64 = 0x6000;
/// Where all memory is once more, far from address 0.
pub const PROGRAMS: u64 = 1 << 40;
const PDPT: u64 = 0x7000;
const PD: u64 = 0x8000;
const PT: u64 = 0x9000;
const ALIASES: u64 = 0xA000;
pub const PD32: u64 = 0xB000;
const PT32: u64 = 0xC000;
pub const PDPT_PAE: u64 = 0xD000;
pub const CODE: u64 = 0x10000;
pub const STACK: u64 = 0x20000;
pub const KERNEL_STACK_END: u64 = 0x30000;
pub const DATA: u64 = 0x30000;

/// Selectors, in the order that SYSCALL and SYSRET want.
pub const CODE64: u16 = 0x08;
pub const DATA32: u16 = 0x10;
pub const CODE32: u16 = 0x18;
pub const USER_CODE32: u16 = 0x28 | 3;
pub const USER_DATA: u16 = 0x30 | 3;
pub const USER_CODE64: u16 = 0x38 | 3;
const TASK: u16 = 0x40;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;
const NX: u64 = 1 << 63;

/// Exceptions that push an error code (Intel SDM 3A, table 6-1).
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

#[derive(Clone)]
pub struct Layout {
    /// The guest starts at privilege level 3.
    pub user: bool,
    /// Guest code cannot reach the page tables.
    pub protect_tables: bool,
    /// Chooses the permissions of the data pages.
    pub seed: u64,
    /// Exceptions of level 3 may use every vector.
    pub open_gates: bool,
}

/// One flat segment as a GDT entry.
fn descriptor(segment: &Segment) -> u64 {
    let attributes = u64::from(segment.attributes) & 0xF0FF;
    let limit = if segment.attributes >> 15 & 1 != 0 { segment.limit >> 12 } else { segment.limit };
    let limit = u64::from(limit);
    let base = segment.base;
    limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | attributes << 40
        | (limit >> 16 & 0xF) << 48
        | (base >> 24 & 0xFF) << 56
}

/// The flat segments by selector, as both GDT entries and hidden parts.
pub fn segment(selector: u16) -> Segment {
    let attributes = match selector {
        CODE64 => 0xA09B,
        CODE32 => 0xC09B,
        DATA32 => 0xC093,
        USER_CODE32 => 0xC0FB,
        USER_CODE64 => 0xA0FB,
        USER_DATA => 0xC0F3,
        _ => 0x1_0000,
    };
    Segment { base: 0, limit: u32::MAX, attributes, selector }
}

pub fn task() -> Segment {
    Segment { base: TSS, limit: 0x7F, attributes: 0x8B, selector: TASK }
}

pub fn gdt() -> SegmentTable {
    SegmentTable { base: GDT, limit: 0x7F }
}

struct Writer<'a>(&'a GuestMemory);

impl Writer<'_> {
    fn bytes(&self, address: u64, bytes: &[u8]) {
        self.0.write(GuestPhys(address), bytes).expect("the layout lies in RAM");
    }

    fn u64(&self, address: u64, value: u64) {
        self.bytes(address, &value.to_le_bytes());
    }

    fn u32(&self, address: u64, value: u32) {
        self.bytes(address, &value.to_le_bytes());
    }
}

pub fn write(memory: &GuestMemory, layout: &Layout) {
    let w = Writer(memory);
    descriptors(&w);
    gates(&w, layout);
    handlers(&w);
    page_tables(&w, layout);
    let eager_xcr0 = [
        0x31, 0xC9, 0x31, 0xD2, 0xB8, 7, 0, 0, 0, 0x0F, 0x01, 0xD1, // xsetbv
        0xE6, 0xFE,
    ];
    w.bytes(XSETBV, &eager_xcr0);
}

fn descriptors(w: &Writer) {
    for selector in [CODE64, DATA32, CODE32, USER_CODE32, USER_DATA, USER_CODE64] {
        w.u64(GDT + u64::from(selector & !7), descriptor(&segment(selector)));
    }
    w.u64(GDT + u64::from(TASK), descriptor(&task()));
    // A 16-bit code and data segment and a 32-bit call gate.
    w.u64(GDT + 0x50, 0x0000_9B00_0000_FFFF);
    w.u64(GDT + 0x58, 0x0000_9300_0000_FFFF);
    w.u64(GDT + 0x60, 0x0001_EC00_0018_0000);
    // Both TSS formats: ESP0 and SS0 at 4 and 8, or RSP0 at 4 and IST1 at 0x24.
    w.u64(TSS + 4, KERNEL_STACK_END - 0x100);
    w.u64(TSS + 0x24, KERNEL_STACK_END - 0x800);
    // The I/O permission bitmap covers a few ports only.
    w.u32(TSS + 0x64, 0x68 << 16);
}

fn gates(w: &Writer, layout: &Layout) {
    for vector in 0..256u64 {
        let level = if layout.open_gates || vector == 3 || vector >= 32 { 3 } else { 0 };
        let kind = 0x8E00 | level << 13 | u64::from(vector == 8);
        let slot = vector.min(32) * 16;
        let target = HANDLERS64 + slot;
        w.u64(IDT64 + vector * 16, target & 0xFFFF | u64::from(CODE64) << 16 | kind << 32);
        let target = HANDLERS32 + slot;
        let kind = kind & !1;
        w.u64(IDT32 + vector * 8, target & 0xFFFF | u64::from(CODE32) << 16 | kind << 32);
        w.u32(vector * 4, (HANDLERS16 + slot) as u32);
    }
    // The 32-bit TSS wants a stack segment where the 64-bit one has RSP0's top.
}

fn handlers(w: &Writer) {
    for vector in 0..32u8 {
        let mut long = vec![0xE6, vector];
        let mut protected = long.clone();
        if has_error_code(vector) {
            long.extend([0x48, 0x83, 0xC4, 0x08]);
            protected.extend([0x83, 0xC4, 0x04]);
        }
        long.extend([0x48, 0xCF]);
        protected.push(0xCF);
        let slot = u64::from(vector) * 16;
        w.bytes(HANDLERS64 + slot, &long);
        w.bytes(HANDLERS32 + slot, &protected);
        w.bytes(HANDLERS16 + slot, &[0xE6, vector, 0xCF]);
    }
    w.bytes(HANDLERS64 + 32 * 16, &[0x48, 0xCF]);
    w.bytes(HANDLERS32 + 32 * 16, &[0xCF]);
    w.bytes(HANDLERS16 + 32 * 16, &[0xCF]);
}

/// What a page of the identity mapping is for.
fn flags(layout: &Layout, page: u64) -> u64 {
    let all = PRESENT | WRITE | ACCESSED | DIRTY;
    match page {
        0x6..=0xD if layout.protect_tables => 0,
        0..=0xF | 0x2F => all,
        0x10..=0x2E => all | if layout.user { USER } else { 0 },
        _ => {
            let all = all | USER;
            match Random(layout.seed ^ page << 32).next() & 31 {
                0 => 0,
                1 => all & !WRITE,
                2 => all | NX,
                3 => all & !USER,
                4 => all & !WRITE | NX,
                // Where accesses that fail for another reason leave a mark, the
                // tiers may differ.
                5 if !layout.protect_tables => all & !(ACCESSED | DIRTY),
                _ => all,
            }
        }
    }
}

fn page_tables(w: &Writer, layout: &Layout) {
    let table = PRESENT | WRITE | USER | ACCESSED;
    let page = table | DIRTY;
    // The same tables once more at 1 GiB, where programs of processes are, and in both
    // parts of the upper half.
    for top in [0, PROGRAMS >> 39, 256, 511] {
        w.u64(PML4 + top * 8, PDPT | table);
    }
    for directory in [0, 1] {
        w.u64(PDPT + directory * 8, PD | table);
    }
    // The hole below 4 GiB with both APICs, as one page.
    w.u64(PDPT + 3 * 8, 0xC000_0000 | page | LARGE);
    w.u64(PD, PT | table);
    w.u64(PD + 8, ALIASES | table);
    w.u64(PD + 16, 2 << 20 | page | LARGE);
    if !layout.protect_tables {
        // RAM in its lower half, nothing in its upper.
        w.u64(PD + 24, page | LARGE);
    }
    w.u64(PD32, PT32 | table);
    w.u64(PD32 + 4, 4 << 20 | page | LARGE);
    w.u32(PD32 + 0x3FB * 4, 0xFEC0_0000 | (page | LARGE) as u32);
    w.u64(PDPT_PAE, PD | PRESENT);
    for number in 0..256 {
        let flags = flags(layout, number);
        w.u64(PT + number * 8, number << 12 | flags);
        w.u32(PT32 + number as u32 as u64 * 4, (number << 12) as u32 | flags as u32);
        let other = alias(number);
        w.u64(ALIASES + number * 8, other << 12 | self::flags(layout, other));
    }
}

/// The page of RAM behind a page at 2 MiB: neighbours there are none in RAM.
fn alias(page: u64) -> u64 {
    0x30 + (page * 7 + 3) % 0xD0
}

/// The physical address behind a linear one, as the tables were at the start.
pub fn physical(linear: u64) -> Option<u64> {
    let offset = linear & 0x3FFF_FFFF;
    match offset >> 12 {
        0..=0xFF => Some(offset),
        page @ 0x200..=0x2FF => Some(alias(page - 0x200) << 12 | offset & 0xFFF),
        _ => None,
    }
}
