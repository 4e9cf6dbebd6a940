//! Instruction streams out of fuzz data.
//!
//! Raw bytes are guest code as they are. A stream of records is better code:
//! every record becomes one instruction whose memory operands lie near the
//! guest's registers and whose branches lead to other instructions.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter, Mnemonic,
    OpKind,
};

use super::input::Input;
use super::tables::DATA;

/// Port that ends a run.
pub const END_PORT: u8 = 0xFF;
const MAX_RECORDS: usize = 64;

/// Guest code and where its instructions begin, as offsets.
#[derive(Clone)]
pub struct GuestCode {
    pub bytes: Vec<u8>,
    pub starts: Vec<u16>,
}

impl GuestCode {
    /// The instruction after the one at `offset`.
    pub fn after(&self, offset: u64) -> u64 {
        match self.starts.iter().find(|&&start| u64::from(start) > offset) {
            Some(&start) => u64::from(start),
            None => offset + 1,
        }
    }
}

impl GuestCode {
    /// Puts what `choose` gives for an instruction in its place, where it has room.
    pub fn replace_some(&mut self, mut choose: impl FnMut() -> Option<&'static [u8]>) {
        for window in self.starts.windows(2) {
            let place = usize::from(window[0])..usize::from(window[1]);
            if let Some(bytes) = choose()
                && bytes.len() <= place.len()
            {
                self.bytes[place.clone()].fill(0x90);
                self.bytes[place.start..][..bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    /// Keeps the first `count` instructions.
    pub fn truncate(&mut self, count: usize) {
        self.bytes.truncate(usize::from(self.starts[count]));
        self.starts.truncate(count + 1);
        self.bytes.extend([0xE6, END_PORT, 0xF4]);
    }

    pub fn disassembly(&self, bits: u32, base: u64) -> String {
        let mut text = String::new();
        for window in self.starts.windows(2) {
            let (start, end) = (usize::from(window[0]), usize::from(window[1]));
            let bytes = &self.bytes[start..end];
            let mut decoder =
                Decoder::with_ip(bits, bytes, base + start as u64, DecoderOptions::NONE);
            let i = decoder.decode();
            let mut line = String::new();
            IntelFormatter::new().format(&i, &mut line);
            text += &format!("{:#x}  {line}  {bytes:02x?}\n", i.ip());
        }
        text
    }
}

pub fn raw(input: &mut Input) -> GuestCode {
    let mut bytes = input.bytes(1024).to_vec();
    bytes.extend([0xE6, END_PORT, 0xF4]);
    GuestCode { bytes, starts: Vec::new() }
}

const PREFIXES: [&[u8]; 24] = [
    &[],
    &[],
    &[],
    &[],
    &[],
    &[],
    &[0x48],
    &[0x48],
    &[0x48],
    &[0x66],
    &[0x66],
    &[0x66],
    &[0xF2],
    &[0xF3],
    &[0xF2, 0x48],
    &[0xF3, 0x48],
    &[0x66, 0x48],
    &[0xF0],
    &[0xF0, 0x48],
    &[0x65],
    &[0x64, 0x48],
    &[0x67],
    &[0x36],
    &[0x2E],
];

struct Branch {
    at: usize,
    size: usize,
    end: usize,
    choice: u16,
}

/// Reads records. `repeatable` leaves out what depends on time or chance.
pub fn records(input: &mut Input, bits: u32, base: u64, repeatable: bool) -> GuestCode {
    let mut code = GuestCode { bytes: Vec::new(), starts: Vec::new() };
    let mut branches = Vec::new();
    while !input.is_empty() && code.starts.len() < MAX_RECORDS {
        record(input, bits, base, repeatable, &mut code, &mut branches);
    }
    code.starts.push(code.bytes.len() as u16);
    code.bytes.extend([0xE6, END_PORT, 0xF4]);
    for branch in branches {
        aim(&mut code, &branch);
    }
    code
}

/// Points a branch to the start of an instruction, mostly forward.
fn aim(code: &mut GuestCode, branch: &Branch) {
    let back = branch.choice & 7 == 0;
    let reachable: Vec<i64> = code
        .starts
        .iter()
        .map(|&start| i64::from(start) - branch.end as i64)
        .filter(|&distance| back || distance >= 0)
        .filter(|&distance| branch.size > 1 || i8::try_from(distance).is_ok())
        .collect();
    if reachable.is_empty() {
        return;
    }
    let distance = reachable[usize::from(branch.choice >> 3) % reachable.len()];
    let bytes = &distance.to_le_bytes()[..branch.size];
    code.bytes[branch.at..branch.at + branch.size].copy_from_slice(bytes);
}

/// Whether two CPUs, or one at two times, may disagree on more than flags.
fn unpredictable(i: &Instruction) -> bool {
    // Counts over 16 leave the result undefined.
    if matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd) && i.op1_register().size() == 2 {
        return true;
    }
    matches!(
        i.mnemonic(),
        Mnemonic::Rdtsc | Mnemonic::Rdtscp | Mnemonic::Rdrand | Mnemonic::Rdseed | Mnemonic::Rdpru
    )
}

fn record(
    input: &mut Input,
    bits: u32,
    base: u64,
    repeatable: bool,
    code: &mut GuestCode,
    branches: &mut Vec<Branch>,
) {
    let mut bytes = [0u8; 32];
    let mut len = 0;
    let mut put = |byte| {
        bytes[len] = byte;
        len += 1;
    };
    let (prefix, map) = (input.u8(), input.u8());
    let (opcode, modrm, sib) = (input.u8(), input.u8(), input.u8());
    let operand = input.u16();
    if map < 240 {
        for &byte in PREFIXES[usize::from(prefix) % PREFIXES.len()] {
            if bits == 64 || byte != 0x48 {
                put(byte);
            }
        }
        if bits == 64 && prefix >= 0xE0 {
            put(0x40 | prefix & 15);
        }
        match map {
            0..128 => {}
            128..208 => put(0x0F),
            208..228 => [0x0F, 0x38].into_iter().for_each(&mut put),
            _ => [0x0F, 0x3A].into_iter().for_each(&mut put),
        }
    } else if map < 248 {
        put(0xC5);
        put(prefix);
    } else {
        put(0xC4);
        put(prefix & 0xE0 | (1 + map % 3));
        put(operand as u8);
    }
    for byte in [opcode, modrm, sib] {
        put(byte);
    }

    let start = code.bytes.len();
    let ip = base + start as u64;
    let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE);
    let i = decoder.decode();
    if i.code() == Code::INVALID || repeatable && unpredictable(&i) {
        // Undefined opcodes are code too, but the interesting kinds are few.
        if i.code() == Code::INVALID && operand & 15 == 0 {
            code.starts.push(start as u16);
            code.bytes.extend(&bytes[..len]);
        }
        return;
    }
    let offsets = decoder.get_constant_offsets(&i);
    let wide = (operand as i16 as i64).to_le_bytes();
    if offsets.has_displacement() {
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        let displacement = if i.is_ip_rel_memory_operand() {
            let target = DATA + u64::from(operand) * 2;
            target.wrapping_sub(ip + i.len() as u64).to_le_bytes()
        } else if i.memory_displ_size() == 8 || i.memory_base() == iced_x86::Register::None {
            (DATA + u64::from(operand)).to_le_bytes()
        } else {
            wide
        };
        bytes[at..at + size].copy_from_slice(&displacement[..size]);
    }
    for (at, size) in [
        (offsets.immediate_offset(), offsets.immediate_size()),
        (offsets.immediate_offset2(), offsets.immediate_size2()),
    ] {
        if size != 0 {
            bytes[at..at + size].copy_from_slice(&wide[..size]);
        }
    }
    let near =
        matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if near && i.flow_control() != FlowControl::Next {
        let size = offsets.immediate_size();
        branches.push(Branch {
            at: start + offsets.immediate_offset(),
            size,
            end: start + i.len(),
            choice: operand,
        });
    }
    code.starts.push(start as u16);
    code.bytes.extend(&bytes[..i.len()]);
    if repeatable {
        hide_undefined_flags(&i, code);
    }
}

/// Clears the flags that an instruction leaves undefined, where the tiers may
/// differ, and OF with them. Takes AH for it.
fn hide_undefined_flags(i: &Instruction, code: &mut GuestCode) {
    use iced_x86::RflagsBits as B;
    let undefined = i.rflags_undefined();
    if undefined == 0 {
        return;
    }
    let mut keep = 0xFF;
    for (bit, mask) in [(B::SF, 0x80), (B::ZF, 0x40), (B::AF, 0x10), (B::PF, 4), (B::CF, 1)] {
        if undefined & bit != 0 {
            keep &= !mask;
        }
    }
    // LAHF; AND AH, keep; SAHF
    for instruction in [&[0x9F][..], &[0x80, 0xE4, keep], &[0x9E]] {
        code.starts.push(code.bytes.len() as u16);
        code.bytes.extend(instruction);
    }
}
