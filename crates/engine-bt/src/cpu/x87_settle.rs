//! Putting the guest's x87 pointers in place of the host's
//! ([`x87_pointers`](super::x87_pointers)), with what the vCPU and the translator
//! know of addresses.

use crate::cpu::Cpu;
use crate::cpu::x87_pointers::{Found, resolve, write};
use crate::state::seg;

impl Cpu {
    /// Makes the host CPU's pointers the guest's, and
    /// [`CpuState::fx`](crate::state::CpuState::fx) hold them.
    pub fn settle_x87_pointers(&mut self) {
        if self.st.fpu_loaded == 0 {
            return;
        }
        let places = self.places.clone();
        let found = resolve(
            &self.st,
            |host| places.as_ref().and_then(|places| places.rip_of(host, self.st.x87_page)),
            |host| self.tlb.linear_of(host),
        );
        let Found::New(mut new, environment) = found else { return };
        new.opcode = opcode_at(self, new.instruction, new.opcode);
        write(&mut self.st, new, environment);
    }
}

/// The opcode of the guest's instruction: the copy that ran may have another
/// operand. `host` is the copy's.
fn opcode_at(cpu: &Cpu, instruction: u64, host: u16) -> u16 {
    let mut bytes = [0; 15];
    let base = if cpu.st.code64() { 0 } else { cpu.st.seg[seg::CS].base };
    let len = cpu.peek(base.wrapping_add(instruction), &mut bytes);
    let bytes = &bytes[..len];
    // Legacy prefixes and REX (Intel SDM 2A, 2.1.1 and 2.2.1).
    let prefix = |byte: &u8| {
        matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
            || cpu.st.code64() && byte & 0xF0 == 0x40
    };
    let start = bytes.iter().position(|byte| !prefix(byte)).unwrap_or(len);
    match bytes[start..] {
        [first, modrm, ..] => {
            let opcode = u16::from(first & 7) << 8 | u16::from(modrm);
            // Another page may be mapped there by now.
            let same = first & 0xF8 == 0xD8 && (opcode ^ host) & 0x738 == 0;
            if same { opcode } else { host }
        }
        _ => host,
    }
}
