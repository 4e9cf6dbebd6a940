//! A tiny 64-bit guest whose tables the test makes.
//!
//! Everything of its own lies in the upper half at [`BASE`] + physical address;
//! the lower half belongs to the test. Each vector has a handler that is one HLT
//! with interrupts off, on a stack of its own, so an exception ends the run and
//! where it ended tells the vector.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use tetrarch_engine::{
    DebugStop, Exit, GuestDebug, Kick, Platform, Registers, Reply, Segment, SegmentTable,
    SystemRegisters, Vcpu, Vm,
};
use tetrarch_engine_bt::{Config, create_vm};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::case::{
    CODE, CODE_PAGES, Case, DATA, DATA_BYTES, DATA_HIGH, Fault, Fpu, GS_BASE, HOLE, Outcome, PAGE,
    READ_ONLY, State,
};

pub const RAM: u64 = 8 << 20;
/// Where the guest's physical memory is mapped for its kernel.
pub const BASE: u64 = 0xFFFF_8000_0000_0000;

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
pub const G: u64 = 0x100;
pub const NX: u64 = 1 << 63;

pub const CR0: u64 = 0x8005_0033; // PG AM WP NE ET MP PE
pub const WP: u64 = 1 << 16;
pub const CR4: u64 = 0x506A0; // OSXSAVE FSGSBASE OSXMMEXCPT OSFXSR PGE PAE
pub const SMEP: u64 = 1 << 20;
pub const EFER: u64 = 0xD01; // NXE LMA LME SCE

/// Selectors are Linux's, so that what reads them gives the host's result.
pub const CS0: u16 = 0x10;
pub const DS0: u16 = 0x18;
pub const DS3: u16 = 0x28 | 3;
pub const CS3: u16 = 0x30 | 3;
/// Of 32-bit code.
pub const CS32_0: u16 = 0x08;
pub const CS32_3: u16 = 0x20 | 3;
const TSS: u16 = 0x40;

const PML4: u64 = 0x1000;
const TABLES_END: u64 = 0x5_0000;
pub const GDT_AT: u64 = 0x5_0000;
pub const IDT_AT: u64 = 0x5_1000;
pub const TSS_AT: u64 = 0x5_2000;
const HANDLERS: u64 = 0x5_3000;
/// The stack of every handler (IST 1) grows down from here.
pub const STACK: u64 = 0x5_8000;
/// RSP0, for gates that a test makes without IST.
pub const STACK0: u64 = 0x5_C000;
/// Code for the kernel that needs no page of the test.
pub const KERNEL_CODE: u64 = 0x5_D000;
pub const CODE_AT: u64 = 0x6_0000;
pub const DATA_AT: u64 = 0x7_0000;
/// From here on physical memory is the test's.
pub const FREE: u64 = 0x10_0000;

const VECTORS: u64 = 64;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// In the handler of an exception or interrupt.
    Fault(Fault),
    /// With an exit that is none of those.
    Exit(Exit),
}

/// The frame that an exception pushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub vm: Arc<dyn Vm>,
    pub vcpu: Box<dyn Vcpu>,
    next_table: u64,
    watch: Arc<Watch>,
    /// The frame of the last exception.
    pub frame: Frame,
}

/// Kicks a vCPU that runs for a minute: an engine that hangs is a failed test.
struct Watch {
    runs: AtomicU64,
    running: AtomicU64,
}

fn watch(watch: &Arc<Watch>, kicker: Arc<dyn Kick>) {
    let weak: Weak<Watch> = Arc::downgrade(watch);
    std::thread::spawn(move || {
        let (mut seen, mut times) = (0, 0);
        while let Some(watch) = weak.upgrade() {
            let run = watch.runs.load(Ordering::Relaxed);
            let same = run == seen && watch.running.load(Ordering::Relaxed) != 0;
            times = if same { times + 1 } else { 0 };
            seen = run;
            // A minute: the host may be busy with other things.
            if times >= 600 {
                kicker.kick();
            }
            drop(watch);
            std::thread::sleep(Duration::from_millis(100));
        }
    });
}

impl Guest {
    /// A guest with its tables and nothing in the lower half.
    pub fn new(translate: bool) -> Self {
        Self::on_platform(translate, Platform::default())
    }

    /// The same, with what a platform adds.
    pub fn on_platform(translate: bool, platform: Platform) -> Self {
        Self::of(Config { translate, platform, ..Config::default() })
    }

    /// The first vCPU of a machine.
    pub fn of(config: Config) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).unwrap());
        let vm = create_vm(Arc::clone(&memory), config).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let state = Arc::new(Watch { runs: AtomicU64::new(0), running: AtomicU64::new(0) });
        watch(&state, vcpu.kicker());
        let mut guest = Self {
            memory,
            vm,
            vcpu,
            next_table: PML4 + PAGE,
            watch: state,
            frame: Frame::default(),
        };
        for page in 0..RAM / PAGE {
            guest.map(BASE + page * PAGE, page * PAGE, P | W | A | D);
        }
        guest.make_tables();
        guest.enable_avx();
        guest
    }

    /// One with the pages that cases use.
    pub fn for_cases(translate: bool) -> Self {
        let mut guest = Self::new(translate);
        for page in 0..CODE_PAGES {
            guest.map(CODE + page * PAGE, CODE_AT + page * PAGE, P | W | U);
        }
        for base in [DATA, DATA_HIGH] {
            for page in (0..DATA_BYTES as u64 / PAGE).filter(|&page| page != HOLE) {
                let rights = if page == READ_ONLY { P | U | NX } else { P | W | U | NX };
                guest.map(base + page * PAGE, DATA_AT + page * PAGE, rights);
            }
        }
        guest
    }

    pub fn write64(&self, physical: u64, value: u64) {
        self.memory.write(GuestPhys(physical), &value.to_le_bytes()).unwrap();
    }

    pub fn read64(&self, physical: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(GuestPhys(physical), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, physical: u64, bytes: &[u8]) {
        self.memory.write(GuestPhys(physical), bytes).unwrap();
    }

    /// The physical address of the entry for `linear` at a level (0: PTE).
    pub fn slot(&mut self, linear: u64, level: u32) -> u64 {
        let mut table = PML4;
        for above in (level + 1..4).rev() {
            let slot = table + (linear >> (12 + 9 * above) & 511) * 8;
            let mut entry = self.read64(slot);
            if entry & P == 0 {
                assert!(self.next_table < TABLES_END, "out of page tables");
                entry = self.next_table | P | W | U | A;
                self.next_table += PAGE;
                self.write64(slot, entry);
            }
            table = entry & 0x000F_FFFF_FFFF_F000;
        }
        table + (linear >> (12 + 9 * level) & 511) * 8
    }

    pub fn map(&mut self, linear: u64, physical: u64, bits: u64) {
        self.map_level(linear, physical, bits, 0);
    }

    /// Maps a page of 4 KiB, 2 MiB or 1 GiB (level 0, 1, 2).
    pub fn map_level(&mut self, linear: u64, physical: u64, bits: u64, level: u32) {
        let slot = self.slot(linear, level);
        self.write64(slot, physical | bits | if level > 0 { PS } else { 0 });
    }

    pub fn unmap(&mut self, linear: u64) {
        let slot = self.slot(linear, 0);
        self.write64(slot, 0);
    }

    fn make_tables(&mut self) {
        let code = |dpl: u64| 0x00AF_9B00_0000_FFFF | dpl << 45;
        let data = |dpl: u64| 0x00CF_9300_0000_FFFF | dpl << 45;
        let code32 = |dpl: u64| 0x00CF_9B00_0000_FFFF | dpl << 45;
        for (selector, entry) in [
            (CS0, code(0)),
            (DS0, data(0)),
            (DS3, data(3)),
            (CS3, code(3)),
            (CS32_0, code32(0)),
            (CS32_3, code32(3)),
        ] {
            self.write64(GDT_AT + u64::from(selector & !7), entry);
        }
        let base = BASE + TSS_AT;
        let low = 0x67 | (base & 0xFF_FFFF) << 16 | 0x8B << 40 | (base >> 24 & 0xFF) << 56;
        self.write64(GDT_AT + u64::from(TSS), low);
        self.write64(GDT_AT + u64::from(TSS) + 8, base >> 32);
        self.write64(TSS_AT + 4, BASE + STACK0);
        self.write64(TSS_AT + 0x24, BASE + STACK);
        // No I/O permission bitmap: it would start past the limit.
        self.write(TSS_AT + 0x66, &0x68u16.to_le_bytes());
        for vector in 0..VECTORS {
            self.gate(vector as u8, BASE + HANDLERS + vector * 16, 1, 3);
            self.write(HANDLERS + vector * 16, &[0xF4]);
        }
    }

    /// An interrupt gate (Intel SDM 3A, 6.14.1).
    pub fn gate(&mut self, vector: u8, handler: u64, ist: u64, dpl: u64) {
        let at = IDT_AT + u64::from(vector) * 16;
        let low = handler & 0xFFFF
            | u64::from(CS0) << 16
            | ist << 32
            | (0x8E | dpl << 5) << 40
            | (handler >> 16 & 0xFFFF) << 48;
        self.write64(at, low);
        self.write64(at + 8, handler >> 32);
    }

    /// Marks the gate of a vector as not present.
    pub fn no_gate(&mut self, vector: u8) {
        let at = IDT_AT + u64::from(vector) * 16;
        self.write64(at, self.read64(at) & !(1 << 47));
    }

    fn enable_avx(&mut self) {
        if !std::arch::is_x86_feature_detected!("avx") {
            return;
        }
        // xor ecx,ecx ; xor edx,edx ; mov eax,7 ; xsetbv ; hlt
        let code = [0x31, 0xC9, 0x31, 0xD2, 0xB8, 7, 0, 0, 0, 0x0F, 0x01, 0xD1, 0xF4];
        self.write(KERNEL_CODE, &code);
        self.set_system(&system(true));
        self.set_registers(&Registers { rip: BASE + KERNEL_CODE, rflags: 2, ..Default::default() });
        assert_eq!(
            self.run_raw(),
            Exit::Halt,
            "XSETBV: {:?}",
            self.vcpu.registers().expect("state")
        );
        assert_eq!(
            self.vcpu.registers().expect("state").rip,
            BASE + KERNEL_CODE + code.len() as u64
        );
    }

    pub fn set_system(&mut self, registers: &SystemRegisters) {
        let mut registers = *registers;
        registers.apic_base = self.vcpu.system_registers().expect("state").apic_base;
        self.vcpu.set_system_registers(&registers).unwrap();
    }

    pub fn set_registers(&mut self, registers: &Registers) {
        self.vcpu.set_registers(registers).expect("registers");
    }

    /// Runs to the next exit.
    pub fn run_raw(&mut self) -> Exit {
        self.watch.runs.fetch_add(1, Ordering::Relaxed);
        self.watch.running.store(1, Ordering::Relaxed);
        let exit = self.vcpu.run().unwrap();
        self.watch.running.store(0, Ordering::Relaxed);
        exit
    }

    /// Runs until an exception reaches its handler, or to any other exit.
    pub fn run(&mut self) -> End {
        let exit = self.run_raw();
        let registers = self.vcpu.registers().expect("state");
        let offset = registers.rip.wrapping_sub(BASE + HANDLERS);
        if exit != Exit::Halt || offset >= VECTORS * 16 || offset % 16 != 1 {
            return End::Exit(exit);
        }
        let vector = (offset / 16) as u8;
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let mut at = registers.gpr[4].wrapping_sub(BASE);
        let mut frame = Frame::default();
        if has_error {
            frame.error = self.read64(at);
            at += 8;
        }
        frame.rip = self.read64(at);
        frame.cs = self.read64(at + 8);
        frame.rflags = self.read64(at + 16);
        frame.rsp = self.read64(at + 24);
        frame.ss = self.read64(at + 32);
        self.frame = frame;
        let cr2 = if vector == 14 { self.vcpu.system_registers().expect("state").cr2 } else { 0 };
        End::Fault(Fault { vector, error: frame.error, cr2 })
    }

    /// Starts at `rip` with registers and flags given, at CPL 0 or 3.
    pub fn start(&mut self, kernel: bool, rip: u64, gpr: [u64; 16], rflags: u64) {
        self.set_system(&system(kernel));
        self.set_registers(&Registers { gpr, rip, rflags });
    }

    /// The same in 32-bit code.
    pub fn start32(&mut self, kernel: bool, rip: u64, gpr: [u64; 16], rflags: u64) {
        self.set_system(&system32(kernel));
        self.set_registers(&Registers { gpr, rip, rflags });
    }

    /// Puts the code of a case in place, unless it is.
    pub fn place(&mut self, case: &Case) {
        let pages = case.pages();
        let mut now = vec![0; pages.len()];
        self.memory.read(GuestPhys(CODE_AT), &mut now).unwrap();
        if now != pages {
            self.write(CODE_AT, &pages);
        }
    }

    fn begin_case(&mut self, case: &Case) {
        let start = &case.start;
        self.write(DATA_AT, &start.data);
        self.vcpu.set_xsave(&start.fpu.image()).unwrap();
        let begin = if case.code32 { Self::start32 } else { Self::start };
        begin(self, case.kernel, start.rip, start.gpr, start.rflags);
    }

    /// Goes through a case step by step, and tells of each instruction in its pages before it is
    /// run, also of those that the case jumps into or has written itself. Ends where `each` says
    /// false.
    pub fn step_case(&mut self, case: &Case, mut each: impl FnMut(&Instruction) -> bool) {
        self.place(case);
        self.begin_case(case);
        self.vcpu.set_guest_debug(&GuestDebug { step: true, ..GuestDebug::default() }).unwrap();
        loop {
            let rip = self.vcpu.registers().expect("state").rip;
            let at = rip.wrapping_sub(CODE);
            if at >= CODE_PAGES * PAGE {
                break;
            }
            let mut bytes = [0; 15];
            self.memory.read(GuestPhys(CODE_AT + at), &mut bytes).unwrap();
            let mut decoder = Decoder::with_ip(case.bits(), &bytes, rip, DecoderOptions::NONE);
            if !each(&decoder.decode()) || self.run_raw() != Exit::Debug(DebugStop::Step) {
                break;
            }
            self.vcpu.reply(Reply::Done);
        }
        self.vcpu.set_guest_debug(&GuestDebug::default()).unwrap();
    }

    /// Runs a case that is in place.
    pub fn run_case(&mut self, case: &Case) -> Result<Outcome, String> {
        self.begin_case(case);
        match self.run() {
            End::Fault(fault) => {
                let mut state = State {
                    gpr: self.vcpu.registers().expect("state").gpr,
                    rip: self.frame.rip,
                    rflags: self.frame.rflags,
                    fpu: Fpu::from_image(&self.vcpu.xsave().expect("state")),
                    data: vec![0; DATA_BYTES],
                };
                state.gpr[4] = self.frame.rsp;
                self.memory.read(GuestPhys(DATA_AT), &mut state.data).unwrap();
                Ok(Outcome { state, fault })
            }
            End::Exit(exit) => {
                // An exit that waits for an answer must not block the next case.
                self.vcpu.reply(Reply::Value(0));
                Err(format!("exit {exit:?} at {:x?}", self.vcpu.registers().expect("state")))
            }
        }
    }
}

fn segment(selector: u16, attributes: u32) -> Segment {
    Segment { base: 0, limit: 0xFFFF_FFFF, attributes, selector }
}

/// Of the attributes of a segment: it holds a null selector.
const UNUSABLE: u32 = 0x1_0000;

/// Control registers and segments of the guest at CPL 0 or 3.
pub fn system(kernel: bool) -> SystemRegisters {
    let dpl = if kernel { 0 } else { 3 << 5 };
    let stack = segment(if kernel { DS0 } else { DS3 }, 0xC093 | dpl);
    // Linux leaves them null in a 64-bit process.
    let data = segment(0, UNUSABLE);
    SystemRegisters {
        es: data,
        cs: segment(if kernel { CS0 } else { CS3 }, 0xA09B | dpl),
        ss: stack,
        ds: data,
        fs: data,
        gs: Segment { base: GS_BASE, ..data },
        ldt: Segment { attributes: UNUSABLE | 0x82, ..Segment::default() },
        tr: Segment { base: BASE + TSS_AT, limit: 0x67, attributes: 0x8B, selector: TSS },
        gdt: SegmentTable { base: BASE + GDT_AT, limit: 0x4F },
        idt: SegmentTable { base: BASE + IDT_AT, limit: (VECTORS * 16 - 1) as u16 },
        cr0: CR0,
        cr3: PML4,
        cr4: CR4,
        efer: EFER,
        ..SystemRegisters::default()
    }
}

/// The same for 32-bit code in compatibility mode, with flat segments.
pub fn system32(kernel: bool) -> SystemRegisters {
    let (code, data, dpl) = if kernel { (CS32_0, DS0, 0) } else { (CS32_3, DS3, 3 << 5) };
    let data = segment(data, 0xC093 | dpl);
    let cs = segment(code, 0xC09B | dpl);
    SystemRegisters { es: data, cs, ss: data, ds: data, ..system(kernel) }
}

/// Runs a test's body on both halves of the engine.
pub fn on_both(body: impl Fn(&mut Guest, &str)) {
    for (translate, name) in [(false, "interpreter"), (true, "translator")] {
        body(&mut Guest::new(translate), name);
    }
}

impl Guest {
    /// CPUID as the guest sees it.
    pub fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.write(KERNEL_CODE, &[0x0F, 0xA2, 0xF4]);
        let mut gpr = [0; 16];
        (gpr[0], gpr[1]) = (u64::from(leaf), u64::from(subleaf));
        self.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(self.run_raw(), Exit::Halt);
        let gpr = self.vcpu.registers().expect("state").gpr;
        [gpr[0] as u32, gpr[3] as u32, gpr[1] as u32, gpr[2] as u32]
    }
}
