//! A guest out of fuzz data: mode, registers, code and odd bytes in memory.

use std::time::Duration;

use tetrarch_engine::{Registers, Segment, SegmentTable, SystemRegisters, Vcpu};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::code::{self, GuestCode};
use super::input::{Input, Random};
use super::tables::{self, CODE, DATA, KERNEL_STACK_END, RAM, STACK, segment};
use super::watchdog::Watchdog;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Real,
    Protected,
    Paged,
    Pae,
    Compatibility,
    Long,
    /// System registers that make no sense.
    Odd,
}

impl Mode {
    pub fn bits(self) -> u32 {
        match self {
            Self::Real => 16,
            Self::Protected | Self::Paged | Self::Pae | Self::Compatibility => 32,
            Self::Long | Self::Odd => 64,
        }
    }

    fn long(self) -> bool {
        matches!(self, Self::Long | Self::Compatibility | Self::Odd)
    }

    /// Width of an item in an exception frame.
    pub fn frame_word(self) -> u64 {
        match self {
            Self::Real => 2,
            _ if self.long() => 8,
            _ => 4,
        }
    }
}

#[derive(Clone)]
pub struct Guest {
    pub mode: Mode,
    pub code: GuestCode,
    /// Linear address of the first byte of code.
    pub code_at: u64,
    /// It does the same each time, as far as we can see to it.
    pub repeatable: bool,
    /// What answers the guest's reads of devices.
    pub answers: u64,
    registers: Registers,
    system: SystemRegisters,
    layout: tables::Layout,
    xsave: Option<Random>,
    avx: bool,
    msrs: Vec<(u32, u64)>,
    pokes: Vec<(u64, u64)>,
}

const FP_VALUES: [u64; 8] = [
    0,
    0x3FF0_0000_0000_0000,
    0x7FF0_0000_0000_0000,
    0x7FF0_0000_0000_0001,
    0xFFF8_0000_0000_0000,
    0x0000_0000_0000_0001,
    0x8000_0000_0000_0000,
    0x7F80_0001_3F80_0000,
];

fn address(input: &mut Input, code: &GuestCode, code_at: u64) -> u64 {
    let kind = input.u8();
    let low = u64::from(input.u16());
    match kind % 24 {
        0..=5 => DATA + low,
        6 => DATA + (low & 0xF0) * 256 + 0xFF0 + (low & 15),
        7 | 8 => (2 << 20) + low,
        9 => (4 << 20) + (low & 0xFFF),
        10 | 11 => {
            let starts = &code.starts;
            let index = if starts.is_empty() { 0 } else { low as usize % starts.len() };
            code_at + starts.get(index).map_or(low & 0xFF, |&start| u64::from(start))
        }
        12 => input.u64(),
        13 | 14 => low & 0xFF,
        15 => 0x7FFF_FFFF_FFF8 + (low & 15),
        16 => u64::MAX - (low & 15),
        17 => (6 << 20) + (low << 4),
        18 => low,
        19 => 0xFEE0_0000 + (low & 0xFFF),
        20 => RAM - 16 + (low & 31),
        21 => (1 << 30) + DATA + low,
        22 => 0xFFFF_8000_0000_0000 + DATA + low,
        _ => u64::from(input.u32()),
    }
}

fn odd_segment(input: &mut Input) -> Segment {
    Segment {
        base: input.u64(),
        limit: input.u32(),
        attributes: input.u32() & 0x1_F0FF,
        selector: input.u16(),
    }
}

fn system(input: &mut Input, mode: Mode, user: bool) -> SystemRegisters {
    let bits = input.u32();
    let on = |bit: u32, mask: u64| if bits >> bit & 1 != 0 { mask } else { 0 };
    // Usually off, so that most guests do more than fault.
    let seldom = |bit: u32, mask: u64| if bits >> bit & 7 == 7 { mask } else { 0 };
    let (cs, data) = match (mode.bits(), user) {
        (64, false) => (tables::CODE64, tables::DATA32),
        (64, true) => (tables::USER_CODE64, tables::USER_DATA),
        (_, false) => (tables::CODE32, tables::DATA32),
        (_, true) => (tables::USER_CODE32, tables::USER_DATA),
    };
    let real = |selector: u16, code: bool| Segment {
        base: u64::from(selector) << 4,
        limit: 0xFFFF,
        attributes: if code { 0x9B } else { 0x93 },
        selector,
    };
    let flat = mode != Mode::Real;
    let data = |selector| if flat { segment(data) } else { real(selector, false) };
    let paging = flat && mode != Mode::Protected;
    let mut registers = SystemRegisters {
        cs: if flat { segment(cs) } else { real((CODE >> 4) as u16, true) },
        ss: data((STACK >> 4) as u16),
        ds: data((DATA >> 4) as u16),
        es: data((DATA >> 4) as u16),
        fs: Segment { base: DATA + 0x2000 + on(0, 0xFF8), ..data(0x3200) },
        gs: Segment { base: DATA + 0x4000 + on(1, 0xFF8), ..data(0x3400) },
        ldt: Segment { attributes: 0x1_0082, ..Segment::default() },
        tr: tables::task(),
        gdt: tables::gdt(),
        idt: match mode {
            Mode::Real => SegmentTable { base: 0, limit: 0x3FF },
            _ if mode.long() => SegmentTable { base: tables::IDT64, limit: 0xFFF },
            _ => SegmentTable { base: tables::IDT32, limit: 0x7FF },
        },
        // MP, ET, NE; WP, AM; seldom EM or TS.
        cr0: 0x32 | on(2, 1 << 16) | on(3, 1 << 18) | seldom(4, 4) | seldom(7, 8),
        cr2: 0,
        cr3: match mode {
            Mode::Paged => tables::PD32,
            Mode::Pae => tables::PDPT_PAE,
            _ => tables::PML4,
        },
        // PSE, OSFXSR, OSXMMEXCPT; PGE, FSGSBASE, DE; seldom TSD, SMEP.
        cr4: 0x610
            | on(10, 0x80)
            | on(11, 1 << 16)
            | on(12, 8)
            | seldom(13, 4)
            | seldom(16, 1 << 20),
        cr8: seldom(19, 5),
        // SCE, NXE.
        efer: on(22, 1) | 0x800,
        apic_base: 0xFEE0_0900,
    };
    if flat {
        registers.cr0 |= 1;
    }
    if paging {
        registers.cr0 |= 1 << 31;
    }
    if mode == Mode::Pae || mode.long() {
        registers.cr4 |= 0x20;
    }
    if mode.long() {
        registers.efer |= 0x500;
    }
    if mode == Mode::Odd {
        for segment in [
            &mut registers.cs,
            &mut registers.ss,
            &mut registers.ds,
            &mut registers.es,
            &mut registers.fs,
            &mut registers.gs,
            &mut registers.ldt,
            &mut registers.tr,
        ] {
            if input.bool() {
                *segment = odd_segment(input);
            }
        }
        for word in
            [&mut registers.cr0, &mut registers.cr4, &mut registers.efer, &mut registers.cr3]
        {
            if input.bool() {
                *word ^= u64::from(input.u32());
            }
        }
        for table in [&mut registers.gdt, &mut registers.idt] {
            if input.bool() {
                *table = SegmentTable { base: input.u64(), limit: input.u16() };
            }
        }
        if input.rarely(8) {
            registers.apic_base = input.u64();
        }
    }
    registers
}

impl Guest {
    /// `repeatable`: the guest does the same each time, as far as we can see to it.
    pub fn read(input: &mut Input, repeatable: bool) -> Self {
        let (kind, options, seed) = (input.u8(), input.u8(), input.u16());
        let mode = match kind % 16 {
            0 | 1 => Mode::Real,
            2 => Mode::Protected,
            3 => Mode::Paged,
            4 => Mode::Pae,
            5 => Mode::Compatibility,
            6 if !repeatable => Mode::Odd,
            _ => Mode::Long,
        };
        let user = mode != Mode::Real && options & 1 != 0;
        // The code often runs over the end of a page.
        let code_at = CODE + if options & 2 != 0 { 0xF00 | u64::from(input.u8()) } else { 0 };
        let far = mode == Mode::Long && user && seed & 1 != 0;
        let code_at = if far { tables::PROGRAMS + code_at } else { code_at };
        let system = system(input, mode, user);
        let mut pokes = Vec::new();
        if options & 4 != 0 && !repeatable {
            for _ in 0..input.u8() % 8 {
                let at = u64::from(input.u32()) % (RAM - 8);
                pokes.push((at, input.u64()));
            }
        }
        let place = Place { address: input.bytes(16 * 4), flags: input.u32(), rsp: input.u16() };
        let lstar = input.u16();
        let code = if repeatable || options & 8 != 0 {
            code::records(input, mode.bits(), code_at, repeatable)
        } else {
            code::raw(input)
        };
        let registers = place.registers(&code, code_at, mode, options);
        let code_base = if mode == Mode::Real { CODE } else { 0 };
        let registers = Registers { rip: code_at - code_base, ..registers };
        let target = |number: u16| {
            let start = code.starts.get(usize::from(number) % code.starts.len().max(1));
            code_at + start.map_or(0, |&start| u64::from(start))
        };
        let msrs = vec![
            (0xC000_0081, 0x28 << 48 | 0x08 << 32),
            (0xC000_0082, target(lstar)),
            (0xC000_0083, target(lstar)),
            (0xC000_0084, if lstar & 0x8000 != 0 { 0x4_7700 } else { 0 }),
            (0xC000_0102, DATA + 0x6000),
            (0x174, 0x08),
            (0x175, KERNEL_STACK_END - 0x200),
            (0x176, target(lstar >> 4)),
        ];
        Self {
            mode,
            code,
            code_at,
            repeatable,
            answers: u64::from(seed),
            registers,
            system,
            layout: tables::Layout {
                user,
                protect_tables: repeatable,
                seed: u64::from(seed),
                open_gates: options & 16 != 0,
            },
            xsave: (options & 32 != 0).then(|| Random(u64::from(seed) << 8 | 1)),
            avx: mode.long() && mode != Mode::Odd && options & 64 != 0,
            msrs,
            pokes,
        }
    }

    /// Puts the guest into a machine. False if the engine refuses the state.
    pub fn load(&self, memory: &GuestMemory, vcpu: &mut dyn Vcpu) -> bool {
        tables::write(memory, &self.layout);
        let mut random = Random(self.answers ^ 0xDA7A);
        for page in 0..8 {
            let bytes = random.bytes(256);
            memory.write(GuestPhys(DATA + page * 0x1000), &bytes).expect("data lies in RAM");
        }
        let at = GuestPhys(self.code_at % tables::PROGRAMS);
        memory.write(at, &self.code.bytes).expect("code lies in RAM");
        for &(at, value) in &self.pokes {
            memory.write(GuestPhys(at), &value.to_le_bytes()).expect("chosen in RAM");
        }
        for &(index, value) in &self.msrs {
            let _ = vcpu.set_msr(index, value);
        }
        if let Some(random) = &self.xsave {
            let image = vector_state(vcpu.xsave().expect("state"), random.clone());
            vcpu.set_xsave(&image).expect("the image is valid");
        }
        if self.avx {
            let mut system = self.system;
            (system.cs, system.ss) = (segment(tables::CODE64), segment(tables::DATA32));
            system.cr4 |= 1 << 18;
            if vcpu.set_system_registers(&system).is_ok() {
                let registers = Registers { rip: tables::XSETBV, ..self.registers };
                vcpu.set_registers(&registers).expect("registers");
                // On a host without AVX the guest gets an exception instead, and what was
                // poked into memory may have made a loop of its handler.
                let _watchdog = Watchdog::new(vcpu.kicker(), Duration::from_secs(1));
                let _ = vcpu.run();
            }
        }
        let mut system = self.system;
        if self.avx {
            system.cr4 |= 1 << 18;
        }
        let accepted = vcpu.set_system_registers(&system).is_ok();
        vcpu.set_registers(&self.registers).expect("registers");
        accepted
    }
}

struct Place<'a> {
    address: &'a [u8],
    flags: u32,
    rsp: u16,
}

impl Place<'_> {
    fn registers(&self, code: &GuestCode, at: u64, mode: Mode, options: u8) -> Registers {
        let mut input = Input::new(self.address);
        let mut gpr = [0; 16];
        for register in &mut gpr {
            *register = address(&mut input, code, at);
            if mode.bits() < 64 {
                // The upper halves are undefined there, and each tier has its own.
                *register &= 0xFFFF_FFFF;
            }
        }
        let stack_base = if mode == Mode::Real { STACK } else { 0 };
        if self.rsp & 15 != 15 {
            gpr[4] = STACK + 0x4000 - stack_base + u64::from(self.rsp & 0x7F8);
        }
        let mut flags = u64::from(self.flags) & 0x24_7FD7;
        // Single steps, interrupts and alignment checks now and then only.
        for (bit, guard) in [(8, 24), (9, 25), (18, 27)] {
            if self.flags >> guard & 3 != 3 {
                flags &= !(1 << bit);
            }
        }
        if mode == Mode::Odd && options & 128 != 0 {
            flags |= u64::from(self.flags) & 1 << 17;
        }
        Registers { gpr, rip: 0, rflags: flags | 2 }
    }
}

/// Fills an XSAVE image with numbers of all kinds.
fn vector_state(mut image: Vec<u8>, mut random: Random) -> Vec<u8> {
    let choice = random.next();
    if choice & 7 == 0 {
        // Some exceptions unmasked, some rounding.
        image[0] &= (choice >> 8) as u8 | 0xC0;
        image[25] &= (choice >> 16) as u8;
    }
    for at in (160..416).step_by(8).chain((576..image.len()).step_by(8)) {
        let value = random.next();
        let value = match value & 3 {
            0 => FP_VALUES[(value >> 8) as usize & 7],
            1 => value >> 8 & 0xFFFF | 0x3FF0_0000_0000_0000,
            _ => value,
        };
        image[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    // Some x87 registers in use, with any content.
    image[4] = random.next() as u8;
    for register in 0..8 {
        let content = random.next();
        image[32 + register * 16..40 + register * 16].copy_from_slice(&content.to_le_bytes());
        let exponent = random.next() as u16 & 0x8001 | 0x3FFE;
        image[40 + register * 16..42 + register * 16].copy_from_slice(&exponent.to_le_bytes());
    }
    image
}
