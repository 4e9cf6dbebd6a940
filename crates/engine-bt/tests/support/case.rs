//! A test case and what came out of it, whoever ran it.

use super::model;

/// The guest's code: two pages at the same address in the guest and natively.
pub const CODE: u64 = 0x4000_0000;
pub const CODE_PAGES: u64 = 2;
/// The data, seen at two addresses: one that a 32-bit displacement reaches and
/// one that it does not.
pub const DATA: u64 = 0x4010_0000;
pub const DATA_HIGH: u64 = 0x10_0010_0000;
pub const DATA_PAGES: u64 = 5;
pub const DATA_BYTES: usize = DATA_PAGES as usize * PAGE as usize;
/// The page of the data that is not mapped, and the one that is read-only.
pub const HOLE: u64 = 2;
pub const READ_ONLY: u64 = 3;
/// The base of GS in both worlds.
pub const GS_BASE: u64 = DATA + 0x100;
pub const PAGE: u64 = 4096;
/// OF, SF, ZF, AF, PF, CF.
pub const ARITH: u64 = 0x8D5;
pub const DF: u64 = 1 << 10;
pub const NT: u64 = 1 << 14;
pub const AC_FLAG: u64 = 1 << 18;
pub const ID: u64 = 1 << 21;
/// What a case may start with, as far as sigreturn(2) loads it.
pub const START_FLAGS: u64 = ARITH | DF | AC_FLAG;
/// What it may change by POPF.
pub const POPF_FLAGS: u64 = START_FLAGS | NT | ID;
/// Where the x87 status word has the top of its stack (Intel SDM 1, 8.1.3).
const FSW_TOP: u16 = 7 << 11;
/// All that have a meaning but for RF: Linux clears it in what a handler sees.
const SYSTEM_FLAGS: u64 = 0x3F_7FD7 & !ARITH & !(1 << 16);

/// x87, MMX and vector registers with their control registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fpu {
    pub fcw: u16,
    pub fsw: u16,
    /// One bit for each register in use (Intel SDM 1, 10.5.1.1).
    pub tags: u8,
    pub mxcsr: u32,
    /// In stack order, as in the image.
    pub st: [[u8; 10]; 8],
    pub ymm: [[u64; 4]; 16],
}

impl Default for Fpu {
    fn default() -> Self {
        Self { fcw: 0x37F, fsw: 0, tags: 0, mxcsr: 0x1F80, st: [[0; 10]; 8], ymm: [[0; 4]; 16] }
    }
}

const IMAGE_BYTES: usize = 832;

impl Fpu {
    /// The XSAVE image in standard format (Intel SDM 1, 13.4).
    pub fn image(&self) -> Vec<u8> {
        let mut image = vec![0u8; IMAGE_BYTES];
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.tags;
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (slot, st) in image[32..160].chunks_exact_mut(16).zip(&self.st) {
            slot[..10].copy_from_slice(st);
        }
        for (index, ymm) in self.ymm.iter().enumerate() {
            for (quad, value) in ymm.iter().enumerate() {
                let at = if quad < 2 { 160 + quad * 8 } else { 576 + (quad - 2) * 8 };
                let at = at + index * 16;
                image[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        image[512] = 7;
        image
    }

    /// Reads an image; what it says is initial is initial, and what x87 keeps in
    /// an empty register does not count.
    pub fn from_image(image: &[u8]) -> Self {
        let mut fpu = Self::default();
        let present = image[512];
        let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let quad = |at: usize| {
            image[at..at + 8].iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))
        };
        fpu.mxcsr = u32::from(half(24)) | u32::from(half(26)) << 16;
        if present & 1 != 0 {
            fpu.fcw = half(0);
            fpu.fsw = half(2);
            fpu.tags = image[4];
            let top = usize::from(fpu.fsw >> 11 & 7);
            for (index, st) in fpu.st.iter_mut().enumerate() {
                if fpu.tags >> ((top + index) % 8) & 1 != 0 {
                    st.copy_from_slice(&image[32 + index * 16..42 + index * 16]);
                }
            }
        }
        for (index, ymm) in fpu.ymm.iter_mut().enumerate() {
            if present & 2 != 0 {
                ymm[0] = quad(160 + index * 16);
                ymm[1] = quad(168 + index * 16);
            }
            if present & 4 != 0 && image.len() >= IMAGE_BYTES {
                ymm[2] = quad(576 + index * 16);
                ymm[3] = quad(584 + index * 16);
            }
        }
        fpu
    }
}

/// An exception; every case ends with one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fault {
    pub vector: u8,
    pub error: u64,
    /// For #PF only.
    pub cr2: u64,
}

/// All that code at user level can see.
#[derive(Clone, Default)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fpu: Fpu,
    pub data: Vec<u8>,
}

/// Where the case stood when the exception came.
#[derive(Clone)]
pub struct Outcome {
    pub state: State,
    pub fault: Fault,
}

/// A case ready to run.
#[derive(Clone)]
pub struct Case {
    /// Bytes at `start.rip`; the last instruction is UD2.
    pub code: Vec<u8>,
    pub start: State,
    /// Run by the guest at CPL 0.
    pub kernel: bool,
    /// Code of compatibility mode, with flat segments.
    pub code32: bool,
    /// Arithmetic flags that mean something at the end.
    pub defined: u64,
    /// A single instruction, so that flags count at a fault too.
    pub single: bool,
    /// Arithmetic flags that mean something before each instruction, by address.
    pub defined_before: Vec<(u64, u64)>,
    /// There is a gather. What one that faults leaves in its mask differs between
    /// CPUs, for elements that were not selected.
    pub gathers: bool,
}

impl Case {
    /// One instruction, after which `defined` flags mean something.
    pub fn of_one(code: Vec<u8>, start: State, kernel: bool, defined: u64) -> Self {
        let (single, gathers, code32) = (true, false, false);
        Self { code, start, kernel, code32, defined, single, defined_before: Vec::new(), gathers }
    }

    pub fn bits(&self) -> u32 {
        if self.code32 { 32 } else { 64 }
    }

    /// Both code pages: INT3 all round, for jumps that go astray.
    pub fn pages(&self) -> Vec<u8> {
        let mut pages = vec![0xCC; (CODE_PAGES * PAGE) as usize];
        let at = (self.start.rip - CODE) as usize;
        pages[at..at + self.code.len()].copy_from_slice(&self.code);
        pages
    }
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// What differs between the host CPU and an engine; empty if nothing that counts.
pub fn differences(case: &Case, native: &Outcome, engine: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    let (n, e) = (&native.state, &engine.state);
    let hidden = model::hidden_error_bits(case, native.fault);
    let seen = |fault: Fault| match fault.vector {
        model::PF => Fault { error: fault.error & !hidden, ..fault },
        _ => fault,
    };
    let same = seen(native.fault) == seen(engine.fault)
        || n.rip == e.rip && model::both_apply(case, n, native.fault, engine.fault);
    if !same {
        found.push(format!("fault: native {:x?}, engine {:x?}", native.fault, engine.fault));
    }
    if n.rip != e.rip {
        found.push(format!("rip: native {:#x}, engine {:#x}", n.rip, e.rip));
    }
    // The upper halves, and what only 64-bit code has, are undefined in 32-bit code.
    let (count, width) = if case.code32 { (8, 0xFFFF_FFFF) } else { (16, u64::MAX) };
    for (index, name) in NAMES.iter().enumerate().take(count) {
        if (n.gpr[index] ^ e.gpr[index]) & width != 0 {
            found.push(format!("{name}: native {:#x}, engine {:#x}", n.gpr[index], e.gpr[index]));
        }
    }
    let at_end = n.rip == case.start.rip + case.code.len() as u64 - 2;
    let mask = if at_end || case.single {
        case.defined
    } else {
        let before = case.defined_before.iter().find(|(rip, _)| *rip == n.rip);
        before.map_or(0, |(_, defined)| *defined)
    };
    let mask = mask | SYSTEM_FLAGS;
    if (n.rflags ^ e.rflags) & mask != 0 {
        let (n, e) = (n.rflags, e.rflags);
        found.push(format!("flags: native {n:#x}, engine {e:#x} (defined {mask:#x})"));
    }
    let (nf, ef) = (&n.fpu, &e.fpu);
    let (top_open, mxcsr_open) =
        if at_end { (false, false) } else { model::registers_before_it_faults(case, n.rip) };
    let fsw = if top_open { !FSW_TOP } else { u16::MAX };
    let same = (nf.fcw, nf.fsw & fsw, nf.tags) == (ef.fcw, ef.fsw & fsw, ef.tags);
    if !same || nf.st != ef.st && !top_open {
        found.push(format!(
            "x87: native fcw {:x} fsw {:x} tags {:x} {:x?}\n     engine fcw {:x} fsw {:x} tags {:x} {:x?}",
            nf.fcw, nf.fsw, nf.tags, nf.st, ef.fcw, ef.fsw, ef.tags, ef.st
        ));
    }
    if nf.mxcsr != ef.mxcsr && !mxcsr_open {
        found.push(format!("mxcsr: native {:#x}, engine {:#x}", nf.mxcsr, ef.mxcsr));
    }
    for index in 0..16 {
        if nf.ymm[index] != ef.ymm[index] && (at_end || !case.gathers) {
            found.push(format!(
                "ymm{index}: native {:x?}, engine {:x?}",
                nf.ymm[index], ef.ymm[index]
            ));
        }
    }
    // What a faulting ENTER had pushed may stay.
    let pushed = !at_end && model::pushes_before_it_faults(case, n.rip);
    if n.data != e.data && !pushed {
        let at = n.data.iter().zip(&e.data).position(|(a, b)| a != b).unwrap_or(0);
        let end = (at + 16).min(n.data.len());
        found.push(format!(
            "data at {:#x}: native {:x?}, engine {:x?}",
            DATA + at as u64,
            &n.data[at..end],
            &e.data[at..end]
        ));
    }
    found
}

pub fn describe(case: &Case) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let start = &case.start;
    let _ = writeln!(text, "cpl {}, code {:02x?}", if case.kernel { 0 } else { 3 }, case.code);
    let mut decoder = iced_x86::Decoder::with_ip(case.bits(), &case.code, start.rip, 0);
    let mut formatter = iced_x86::IntelFormatter::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let mut line = String::new();
        iced_x86::Formatter::format(&mut formatter, &instruction, &mut line);
        let _ = writeln!(text, "  {:#x} {line}    ; {:?}", instruction.ip(), instruction.code());
    }
    for (index, name) in NAMES.iter().enumerate() {
        let _ = write!(text, "  {name} {:#x}", start.gpr[index]);
    }
    let _ = writeln!(text, "\n  flags {:#x}, mxcsr {:#x}", start.rflags, start.fpu.mxcsr);
    let _ = writeln!(
        text,
        "  fcw {:#x} fsw {:#x} tags {:#x} st {:x?}",
        start.fpu.fcw, start.fpu.fsw, start.fpu.tags, start.fpu.st
    );
    for (index, ymm) in start.fpu.ymm.iter().enumerate() {
        let _ = writeln!(text, "  ymm{index} {ymm:x?}");
    }
    text
}
