//! Where everything of the machine of several vCPUs lies, and its descriptor and page tables.
//!
//! The low 2 MiB are mapped as they are, once more at [`ALIAS`], and both at [`HIGH`]. All is open
//! to user mode.

use tetrarch_engine::{Registers, RunState, Segment, SegmentTable, SystemRegisters, Vcpu};
use tetrarch_memory::{GuestMemory, GuestPhys, PAGE_SIZE};

pub const RAM: u64 = 2 << 20;
pub const MAX_VCPUS: usize = 4;

/// The same memory by other linear pages.
pub const ALIAS: u64 = 1 << 30;

/// Where the programs of processes are, whose translations know no address.
pub const HIGH: u64 = 1 << 40;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
/// The page table whose entries the guest changes.
pub const SLOT_PT: u64 = 0x5000;
const APIC_PD: u64 = 0x6000;
const REGION_PT: u64 = 0x7000;
pub const GDT: u64 = 0x8000;
const TSS: u64 = 0x8800;
const IDTS: u64 = 0x9000;
/// Where a start-up IPI begins, in real mode.
pub const TRAMPOLINE: u64 = 0xE000;
const STACKS: u64 = 0x1_0000;
const STACK_SIZE: u64 = 0x4000;
/// What belongs to one vCPU, a page each.
const BLOCKS: u64 = 0x2_0000;
/// Words for LOCK, whose last crosses into the next page.
pub const COUNTED: [u64; 4] = [0x2_8100, 0x2_8203, 0x2_833C, 0x2_8FFC];
pub const LOCKS: u64 = 0x2_A000;
/// Flags of the channels, and further down their data, which goes on in the next page.
pub const FLAGS: u64 = 0x2_B000;
pub const CHANNEL_DATA: u64 = 0x2_C000;
/// What was sent to whom.
pub const SENT: u64 = 0x2_E000;
pub const SHARED: u64 = 0x2_F000;
/// A function of each vCPU, and the host's, whose immediate changes.
pub const FUNCTIONS: u64 = 0x3_0000;
/// Functions that are rewritten under a lock.
pub const LOCKED_FUNCTIONS: u64 = 0x3_8000;
const FRAMES: u64 = 0x4_0000;
const CODE: u64 = 0x8_0000;
const CODE_SIZE: u64 = 0x1_0000;
/// Code of the handlers, in a vCPU's part of the code.
pub const HANDLERS: u64 = 0xC000;

/// The pages that move between frames.
pub const SLOTS: u64 = 2;
pub const SLOT_AT: u64 = 2 << 20;
pub const REGION_AT: u64 = 4 << 20;
pub const REGION: u64 = 0x1000_0000;
pub const REGION_LEN: u64 = 2 * PAGE_SIZE;

pub const CODE64: u16 = 0x08;
pub const DATA: u16 = 0x10;
pub const USER_DATA: u16 = 0x18 | 3;
pub const USER_CODE64: u16 = 0x20 | 3;
const TASKS: u16 = 0x30;

const TABLE: u64 = 7;
/// Present, writable, user, accessed and dirty.
pub const PAGE: u64 = 0x67;
pub const GLOBAL: u64 = 0x100;

pub const MAGIC: u32 = 0x600D_600D;
pub const POISON: u32 = 0x0BAD_0BAD;

pub fn block(id: usize) -> u64 {
    BLOCKS + id as u64 * PAGE_SIZE
}

pub fn stack_top(id: usize) -> u64 {
    STACKS + (id as u64 + 1) * STACK_SIZE
}

pub fn code(id: usize) -> u64 {
    CODE + id as u64 * CODE_SIZE
}

pub fn idt(id: usize) -> SegmentTable {
    SegmentTable { base: IDTS + id as u64 * PAGE_SIZE, limit: 0xFFF }
}

/// The first of the two frames of a slot.
pub fn frames(slot: u64) -> u64 {
    FRAMES + slot * 2 * PAGE_SIZE
}

pub fn task(id: usize) -> u16 {
    TASKS + id as u16 * 16
}

fn tss(id: usize) -> u64 {
    TSS + id as u64 * 0x80
}

/// The words of a slot's page, as offsets, that vCPUs write: theirs, and those at its ends.
pub fn slot_words(vcpus: usize) -> Vec<u64> {
    let own = (0..vcpus as u64).flat_map(|id| [0x400 + id * 64, 0x404 + id * 64]);
    [0, 0xFFC].into_iter().chain(own).collect()
}

/// Whether the page is valid, and the immediate of its function, as offsets.
pub const SLOT_MAGIC: u64 = 0xFF0;
pub const SLOT_FUNCTION: u64 = 0x103;

pub fn put(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    memory.write(GuestPhys(at), bytes).expect("the layout lies in RAM");
}

pub fn put64(memory: &GuestMemory, at: u64, value: u64) {
    put(memory, at, &value.to_le_bytes());
}

pub fn put32(memory: &GuestMemory, at: u64, value: u32) {
    put(memory, at, &value.to_le_bytes());
}

pub fn get32(memory: &GuestMemory, at: u64) -> u32 {
    let mut bytes = [0; 4];
    memory.read(GuestPhys(at), &mut bytes).expect("the layout lies in RAM");
    u32::from_le_bytes(bytes)
}

/// `mov eax, value; ret`
pub fn returning(value: u32) -> Vec<u8> {
    [&[0xB8][..], &value.to_le_bytes(), &[0xC3]].concat()
}

pub fn write_tables(memory: &GuestMemory, vcpus: usize, global: bool) {
    put64(memory, PML4, PDPT | TABLE);
    put64(memory, PML4 + (HIGH >> 39) * 8, PDPT | TABLE);
    put64(memory, PDPT, PD | TABLE);
    put64(memory, PDPT + 8, PD | TABLE);
    put64(memory, PDPT + 3 * 8, APIC_PD | TABLE);
    put64(memory, APIC_PD + 0x1F7 * 8, 0xFEE0_0000 | 0x83);
    put64(memory, PD, PT | TABLE);
    put64(memory, PD + 8, SLOT_PT | TABLE);
    put64(memory, PD + 16, REGION_PT | TABLE);
    for page in 0..512 {
        put64(memory, PT + page * 8, page << 12 | PAGE);
    }
    for page in 0..REGION_LEN / PAGE_SIZE {
        put64(memory, REGION_PT + page * 8, (REGION + page * PAGE_SIZE) | PAGE);
    }
    for slot in 0..SLOTS {
        let frame = frames(slot);
        let global = if global { GLOBAL } else { 0 };
        put64(memory, SLOT_PT + slot * 8, frame | PAGE | global);
        for (frame, value) in [(frame, MAGIC), (frame + PAGE_SIZE, POISON)] {
            put32(memory, frame + SLOT_MAGIC, value);
            put(memory, frame + SLOT_FUNCTION, &returning(value));
        }
        for word in slot_words(vcpus) {
            put32(memory, frame + PAGE_SIZE + word, POISON);
        }
    }
    let descriptors: [u64; 5] = [
        0,
        0x00AF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0x00CF_F300_0000_FFFF,
        0x00AF_FB00_0000_FFFF,
    ];
    for (number, descriptor) in (0..).zip(descriptors) {
        put64(memory, GDT + number * 8, descriptor);
    }
    for id in 0..vcpus {
        let base = tss(id);
        let low = 0x67 | (base & 0xFF_FFFF) << 16 | 0x89 << 40;
        put64(memory, GDT + u64::from(task(id)), low);
        // RSP0: below what the kernel has on its stack meanwhile.
        put64(memory, base + 4, stack_top(id) - 0x800);
        put32(memory, base + 0x64, 0x68 << 16);
    }
}

/// The functions that are changed, each as it is before that.
pub fn write_functions(memory: &GuestMemory) {
    for owner in 0..=MAX_VCPUS as u64 {
        put(memory, FUNCTIONS + owner * 0x1000 + 3, &returning(0));
    }
    for page in [0, 0x2000] {
        for offset in [0x10, 0x3E, 0x800, 0xFFD] {
            put(memory, LOCKED_FUNCTIONS + page + offset, &returning(0));
        }
    }
}

/// A gate to `target`, for user mode too.
pub fn put_gate(memory: &GuestMemory, id: usize, vector: u8, target: u64) {
    let gate =
        target & 0xFFFF | u64::from(CODE64) << 16 | 0xEE00 << 32 | (target >> 16 & 0xFFFF) << 48;
    put64(memory, idt(id).base + u64::from(vector) * 16, gate);
}

/// Has a vCPU begin at its code, in 64-bit mode, running.
pub fn start(vcpu: &mut dyn Vcpu, id: usize, x2apic: bool) {
    let mut state = vcpu.save().expect("a new vCPU can be saved");
    let data = Segment { base: 0, limit: u32::MAX, attributes: 0xC093, selector: DATA };
    let system = SystemRegisters {
        cs: Segment { attributes: 0xA09B, selector: CODE64, ..data },
        ss: data,
        ds: data,
        es: data,
        tr: Segment { base: tss(id), limit: 0x67, attributes: 0x8B, selector: task(id) },
        gdt: SegmentTable { base: GDT, limit: 0xFF },
        idt: idt(id),
        cr0: 0x8001_0033,
        cr3: PML4,
        cr4: 0x6A0,
        efer: 0xD00,
        ..state.system
    };
    let mut registers = Registers { rip: code(id), rflags: 2, ..Registers::default() };
    registers.gpr[4] = stack_top(id);
    state.run = RunState::Runnable;
    (state.system, state.registers) = (system, registers);
    vcpu.load(&state).expect("a running vCPU");
    if x2apic {
        let base = state.system.apic_base | 0xC00;
        assert!(vcpu.set_msr(0x1B, base).expect("an MSR"), "x2APIC mode");
    }
}

/// Addresses that the trampoline needs.
pub const TABLES: u64 = PML4;
