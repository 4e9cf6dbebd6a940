//! Machine code for the fixed patterns of a translation.
//!
//! Everything with a guest operand goes through iced's encoder; what is written
//! here by hand are the few sequences that stand in every block, so that their
//! length and flag effects are in sight.

use std::mem::offset_of;

use iced_x86::{Encoder, Instruction};

use crate::state::block::{
    EXEC_PAGE_OFFSET, SHARED_OFFSET, TLB_ENTRIES, exec_offset, stack_offset, tlb_index, tlb_offset,
};
use crate::state::{CpuState, Shared, StackPage};

/// Host register numbers by their encoding.
pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;
pub const R11: u8 = 11;
pub const R13: u8 = 13;
pub const R14: u8 = 14;
/// Holds the guest's rsp.
pub const R15: u8 = 15;

pub const REQUEST: usize = SHARED_OFFSET + offset_of!(Shared, request);
pub const IRQ_WAIT: usize = SHARED_OFFSET + offset_of!(Shared, irq_wait);

pub const fn gpr_offset(guest: u8) -> usize {
    offset_of!(CpuState, gpr) + guest as usize * 8
}

/// The longest instruction that a CPU takes (SDM 2A, 2.3.11).
const MAX_INSTRUCTION: u32 = 15;

/// Condition codes as in Jcc opcodes.
pub mod cc {
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
    pub const G: u8 = 15;
}

/// A base + index * scale + displacement in host registers.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    pub base: Option<u8>,
    pub index: Option<u8>,
    pub scale: u8,
    pub disp: i32,
}

/// Code under construction. Jumps out of it are recorded as (offset of rel32,
/// absolute target) and resolved when the block gets its address.
pub struct Emitter {
    pub code: Vec<u8>,
    pub outward: Vec<(u32, u64)>,
    encoder: Encoder,
    bmi2: bool,
}

impl Emitter {
    pub fn new(bmi2: bool) -> Self {
        Self { code: Vec::new(), outward: Vec::new(), encoder: Encoder::new(64), bmi2 }
    }

    pub fn clear(&mut self) {
        self.code.clear();
        self.outward.clear();
    }

    pub fn pos(&self) -> u32 {
        self.code.len() as u32
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Encodes a guest instruction whose operands are already the host's.
    /// False if it has no encoding (a high-byte register beside r8-r15).
    pub fn instruction(&mut self, instruction: &Instruction) -> bool {
        match self.encoder.encode(instruction, 0) {
            Ok(_) => {
                let buffer = self.encoder.take_buffer();
                self.bytes(&buffer);
                self.encoder.set_buffer({
                    let mut buffer = buffer;
                    buffer.clear();
                    buffer
                });
                true
            }
            Err(_) => {
                drop(self.encoder.take_buffer());
                false
            }
        }
    }

    /// `opcode reg, [rsp + offset]`: the state block by the stack pointer (see
    /// [`crate::state::block`]).
    fn state(&mut self, wide: bool, opcode: &[u8], reg: u8, offset: usize) {
        self.bytes(&[0x40 | u8::from(wide) << 3 | (reg >> 3) << 2]);
        self.bytes(opcode);
        if let Ok(near) = i8::try_from(offset) {
            self.bytes(&[0x44 | (reg & 7) << 3, 0x24, near as u8]);
        } else {
            self.bytes(&[0x84 | (reg & 7) << 3, 0x24]);
            self.imm32(offset as u32);
        }
    }

    pub fn load(&mut self, reg: u8, offset: usize) {
        self.state(true, &[0x8B], reg, offset);
    }

    pub fn store(&mut self, offset: usize, reg: u8) {
        self.state(true, &[0x89], reg, offset);
    }

    pub fn load32(&mut self, reg: u8, offset: usize) {
        self.state(false, &[0x8B], reg, offset);
    }

    pub fn store32(&mut self, offset: usize, reg: u8) {
        self.state(false, &[0x89], reg, offset);
    }

    /// `movzx reg, byte [rsp + offset]`
    pub fn load8(&mut self, reg: u8, offset: usize) {
        self.state(false, &[0x0F, 0xB6], reg, offset);
    }

    pub fn store8_imm(&mut self, offset: usize, value: u8) {
        self.state(false, &[0xC6], 0, offset);
        self.bytes(&[value]);
    }

    pub fn store32_imm(&mut self, offset: usize, value: u32) {
        self.state(false, &[0xC7], 0, offset);
        self.imm32(value);
    }

    pub fn store64_imm(&mut self, offset: usize, value: i32) {
        self.state(true, &[0xC7], 0, offset);
        self.imm32(value as u32);
    }

    pub fn store8(&mut self, offset: usize, reg: u8) {
        self.state(false, &[0x88], reg, offset);
    }

    pub fn store16(&mut self, offset: usize, reg: u8) {
        self.bytes(&[0x66]);
        self.state(false, &[0x89], reg, offset);
    }

    /// `movzx reg, word [rsp + offset]`
    pub fn load16(&mut self, reg: u8, offset: usize) {
        self.state(false, &[0x0F, 0xB7], reg, offset);
    }

    pub fn cmp8_imm(&mut self, offset: usize, value: u8) {
        self.state(false, &[0x80], 7, offset);
        self.bytes(&[value]);
    }

    /// `cmp dword [rsp + offset], imm32`. Returns where the immediate is.
    pub fn cmp32_imm(&mut self, offset: usize, value: u32) -> u32 {
        self.state(false, &[0x81], 7, offset);
        self.imm32(value);
        self.pos() - 4
    }

    /// `cmp reg, [rsp + offset]`
    pub fn cmp_state(&mut self, reg: u8, offset: usize) {
        self.state(true, &[0x3B], reg, offset);
    }

    pub fn add_state(&mut self, reg: u8, offset: usize) {
        self.state(true, &[0x03], reg, offset);
    }

    /// mov reg, value in its shortest form. Leaves the flags.
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        let b = reg >> 3;
        if let Ok(low) = u32::try_from(value) {
            if b != 0 {
                self.bytes(&[0x41]);
            }
            self.bytes(&[0xB8 | reg & 7]);
            self.imm32(low);
        } else if value as i64 == i64::from(value as i32) {
            self.bytes(&[0x48 | b, 0xC7, 0xC0 | reg & 7]);
            self.imm32(value as u32);
        } else {
            self.bytes(&[0x48 | b, 0xB8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }

    fn rr(&mut self, wide: bool, opcode: u8, rm: u8, reg: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        self.bytes(&[rex, opcode, 0xC0 | (reg & 7) << 3 | rm & 7]);
    }

    pub fn mov(&mut self, to: u8, from: u8) {
        self.rr(true, 0x89, to, from);
    }

    pub fn mov32(&mut self, to: u8, from: u8) {
        self.rr(false, 0x89, to, from);
    }

    /// movsxd to, from
    pub fn movsxd(&mut self, to: u8, from: u8) {
        self.rr(true, 0x63, from, to);
    }

    /// movzx to, the low byte of from
    pub fn movzx8(&mut self, to: u8, from: u8) {
        self.bytes(&[0x40 | (to >> 3) << 2 | from >> 3, 0x0F, 0xB6]);
        self.bytes(&[0xC0 | (to & 7) << 3 | from & 7]);
    }

    pub fn or(&mut self, to: u8, from: u8) {
        self.rr(true, 0x09, to, from);
    }

    pub fn shl_imm(&mut self, reg: u8, count: u8) {
        self.bytes(&[0x48 | reg >> 3, 0xC1, 0xE0 | reg & 7, count]);
    }

    pub fn shr_imm(&mut self, reg: u8, count: u8) {
        self.bytes(&[0x48 | reg >> 3, 0xC1, 0xE8 | reg & 7, count]);
    }

    pub fn sar_imm(&mut self, reg: u8, count: u8) {
        self.bytes(&[0x48 | reg >> 3, 0xC1, 0xF8 | reg & 7, count]);
    }

    pub fn or32_imm(&mut self, reg: u8, value: u32) {
        self.bytes(&[0x40 | reg >> 3, 0x81, 0xC8 | reg & 7]);
        self.imm32(value);
    }

    /// cmp reg, imm32
    pub fn cmp_imm(&mut self, reg: u8, value: u32) {
        self.bytes(&[0x48 | reg >> 3, 0x81, 0xF8 | reg & 7]);
        self.imm32(value);
    }

    pub fn and32_imm(&mut self, reg: u8, value: u32) {
        self.bytes(&[0x40 | reg >> 3, 0x81, 0xE0 | reg & 7]);
        self.imm32(value);
    }

    /// `lea reg, [address]`; 32 bits wide if not `wide`. Leaves the flags.
    pub fn lea(&mut self, wide: bool, reg: u8, address: Address) {
        let base = address.base;
        let index = address.index;
        let rex = 0x40
            | u8::from(wide) << 3
            | (reg >> 3) << 2
            | index.map_or(0, |i| (i >> 3) << 1)
            | base.map_or(0, |b| b >> 3);
        self.bytes(&[rex, 0x8D]);
        self.mem_operand(reg, address);
    }

    /// ModRM, SIB and displacement for `address`.
    fn mem_operand(&mut self, reg: u8, address: Address) {
        let Address { base, index, scale, disp } = address;
        let reg = (reg & 7) << 3;
        let scale_bits = scale.trailing_zeros() as u8;
        let Some(base) = base else {
            // No base: SIB with disp32.
            let index = index.map_or(4, |i| i & 7);
            self.bytes(&[reg | 4, scale_bits << 6 | index << 3 | 5]);
            self.imm32(disp as u32);
            return;
        };
        let short = i8::try_from(disp).is_ok();
        // rbp and r13 as base always have a displacement.
        let mode = if disp == 0 && base & 7 != 5 {
            0
        } else if short {
            0x40
        } else {
            0x80
        };
        match index {
            None if base & 7 != 4 => self.bytes(&[mode | reg | base & 7]),
            _ => {
                let index = index.map_or(4, |i| i & 7);
                self.bytes(&[mode | reg | 4, scale_bits << 6 | index << 3 | base & 7]);
            }
        }
        match mode {
            0 => {}
            0x40 => self.bytes(&[disp as u8]),
            _ => self.imm32(disp as u32),
        }
    }

    /// mov reg, [base + disp]; 32 bits, zero-extended, if not `wide`
    pub fn load_at(&mut self, wide: bool, reg: u8, base: u8, disp: i32) {
        self.bytes(&[0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | base >> 3, 0x8B]);
        self.mem_operand(reg, Address { base: Some(base), index: None, scale: 1, disp });
    }

    /// mov [base + disp], reg; 32 bits of it if not `wide`
    pub fn store_at(&mut self, wide: bool, base: u8, disp: i32, reg: u8) {
        self.bytes(&[0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | base >> 3, 0x89]);
        self.mem_operand(reg, Address { base: Some(base), index: None, scale: 1, disp });
    }

    /// mov [base + disp], the low word of reg
    pub fn store16_at(&mut self, base: u8, disp: i32, reg: u8) {
        self.bytes(&[0x66, 0x40 | (reg >> 3) << 2 | base >> 3, 0x89]);
        self.mem_operand(reg, Address { base: Some(base), index: None, scale: 1, disp });
    }

    /// Loads 1, 2, 4 or 8 bytes at `[base + disp]`, zero-extended.
    pub fn load_sized(&mut self, reg: u8, base: u8, disp: i32, size: u8) {
        let rex = 0x40 | u8::from(size == 8) << 3 | (reg >> 3) << 2 | base >> 3;
        match size {
            1 => self.bytes(&[rex, 0x0F, 0xB6]),
            2 => self.bytes(&[rex, 0x0F, 0xB7]),
            _ => self.bytes(&[rex, 0x8B]),
        }
        self.mem_operand(reg, Address { base: Some(base), index: None, scale: 1, disp });
    }

    /// Stores 1, 2, 4 or 8 bytes at `[base]`.
    pub fn store_sized(&mut self, base: u8, reg: u8, size: u8) {
        if size == 2 {
            self.bytes(&[0x66]);
        }
        let rex = 0x40 | u8::from(size == 8) << 3 | (reg >> 3) << 2 | base >> 3;
        self.bytes(&[rex, if size == 1 { 0x88 } else { 0x89 }]);
        self.mem_operand(reg, Address { base: Some(base), index: None, scale: 1, disp: 0 });
    }

    /// REP MOVS or REP STOS with elements of `size` bytes.
    pub fn rep_string(&mut self, size: u8, moves: bool) {
        self.bytes(&[0xF3]);
        match size {
            2 => self.code.insert(self.code.len() - 1, 0x66),
            8 => self.bytes(&[0x48]),
            _ => {}
        }
        let opcode = if moves { 0xA4 } else { 0xAA };
        self.bytes(&[opcode | u8::from(size > 1)]);
    }

    /// mov [base + disp], imm32, sign-extended to a quadword if `wide`
    pub fn store_imm_at(&mut self, wide: bool, base: u8, disp: i32, value: i32) {
        self.bytes(&[0x40 | u8::from(wide) << 3 | base >> 3, 0xC7]);
        self.mem_operand(0, Address { base: Some(base), index: None, scale: 1, disp });
        self.imm32(value as u32);
    }

    /// Jcc rel32 with the target open. Returns where rel32 is.
    pub fn jcc(&mut self, condition: u8) -> u32 {
        self.bytes(&[0x0F, 0x80 | condition]);
        self.imm32(0);
        self.pos() - 4
    }

    /// Puts the four bytes that come after `before` more into one aligned quadword,
    /// so that they can be patched while another vCPU runs the code.
    fn align_patch(&mut self, before: u32) {
        match (self.pos() + before) % 8 {
            5 => self.bytes(&[0x0F, 0x1F, 0x00]), // nop [rax]
            6 => self.bytes(&[0x66, 0x90]),
            7 => self.bytes(&[0x90]),
            _ => {}
        }
    }

    /// Gives the instruction from `start` to here prefixes without effect (CS in 64-bit
    /// mode: SDM 1, 3.3.4), so that a Jcc behind it can be patched where it stands: a NOP
    /// between the two would keep the CPU from fusing them. Where that costs no more, the
    /// JMP behind the Jcc needs no NOP either.
    pub fn align_before_branch(&mut self, start: u32) {
        let prefixes = match (self.pos() + 2) % 8 {
            place @ 0..=2 => 3 - place,
            3 | 4 => 0,
            place => 8 - place,
        };
        if self.pos() - start + prefixes <= MAX_INSTRUCTION {
            let start = start as usize;
            self.code.splice(start..start, std::iter::repeat_n(0x2E, prefixes as usize));
        }
    }

    /// A JMP that can be patched. Returns where rel32 is.
    pub fn patched_jmp(&mut self) -> u32 {
        self.align_patch(1);
        self.jmp()
    }

    /// A Jcc that can be patched. Returns where rel32 is.
    pub fn patched_jcc(&mut self, condition: u8) -> u32 {
        self.align_patch(2);
        self.jcc(condition)
    }

    /// `cmp dword [rsp + offset], imm32` that can be patched. Returns where the
    /// immediate is.
    pub fn patched_cmp32(&mut self, offset: usize, value: u32) -> u32 {
        // REX, opcode, ModRM, SIB and the offset, which is no small one, come first.
        self.align_patch(8);
        self.cmp32_imm(offset, value)
    }

    /// JMP rel32 with the target open. Returns where rel32 is.
    pub fn jmp(&mut self) -> u32 {
        self.bytes(&[0xE9]);
        self.imm32(0);
        self.pos() - 4
    }

    pub fn call(&mut self) -> u32 {
        self.bytes(&[0xE8]);
        self.imm32(0);
        self.pos() - 4
    }

    /// JRCXZ over the next instructions. Returns where rel8 is.
    pub fn jrcxz(&mut self, address32: bool) -> u32 {
        if address32 {
            self.bytes(&[0x67]);
        }
        self.bytes(&[0xE3, 0]);
        self.pos() - 1
    }

    /// Lets the rel32 at `place` point here.
    pub fn bind(&mut self, place: u32) {
        let here = self.pos();
        self.bind_to(place, here);
    }

    pub fn bind_to(&mut self, place: u32, target: u32) {
        let relative = target.wrapping_sub(place + 4);
        self.code[place as usize..place as usize + 4].copy_from_slice(&relative.to_le_bytes());
    }

    pub fn bind8(&mut self, place: u32) {
        self.code[place as usize] = (self.pos() - place - 1) as u8;
    }

    /// Lets the rel32 at `place` point to an address outside the block.
    pub fn bind_outward(&mut self, place: u32, target: u64) {
        self.outward.push((place, target));
    }

    /// Puts the arithmetic flags aside. Uses `scratch`; leaves everything else.
    pub fn save_flags(&mut self, scratch: u8) {
        self.mov(scratch, RAX);
        self.bytes(&[0x9F]); // lahf
        self.bytes(&[0x0F, 0x90, 0xC0]); // seto al
        self.store32(offset_of!(CpuState, saved_flags), RAX);
        self.mov(RAX, scratch);
    }

    /// Brings the arithmetic flags back. Uses `scratch`.
    pub fn restore_flags(&mut self, scratch: u8) {
        self.mov(scratch, RAX);
        self.load32(RAX, offset_of!(CpuState, saved_flags));
        self.bytes(&[0x04, 0x7F]); // add al, 127: overflows if AL is 1
        self.bytes(&[0x9E]); // sahf
        self.mov(RAX, scratch);
    }

    /// Checks the access at the linear address in r14 and turns r14 into the
    /// host address. Clobbers r13 and the flags. Returns the rel32 of the miss.
    pub fn check(&mut self, size: u32, user: bool, write: bool) -> u32 {
        let table = tlb_offset(user, write) as u32;
        if self.bmi2 {
            self.bytes(&[0xC4, 0x43, 0xFB, 0xF0, 0xEE, 8]); // rorx r13, r14, 8
        } else {
            self.mov(R13, R14);
            self.shr_imm(R13, 8);
        }
        self.and32_imm(R13, (TLB_ENTRIES as u32 - 1) << 4);
        self.bytes(&[0x4E, 0x2B, 0xB4, 0x2C]); // sub r14, [rsp + r13 + tag]
        self.imm32(table);
        self.bytes(&[0x49, 0x81, 0xFE]); // cmp r14, 4096 - size
        self.imm32(4096 - size);
        let miss = self.jcc(cc::A);
        self.bytes(&[0x4E, 0x03, 0xB4, 0x2C]); // add r14, [rsp + r13 + host]
        self.imm32(table + 8);
        miss
    }

    /// The same for an address known now. r14 becomes the host's page.
    pub fn check_constant(&mut self, page: u64, user: bool, write: bool) -> u32 {
        let entry = tlb_offset(user, write) + tlb_index(page) * 16;
        if page as i64 == i64::from(page as i32) {
            self.state(true, &[0x81], 7, entry);
            self.imm32(page as u32);
        } else {
            self.mov_imm(R13, page);
            self.state(true, &[0x39], R13, entry);
        }
        let miss = self.jcc(cc::NE);
        self.load(R14, entry + 8);
        miss
    }

    /// Checks `size` bytes at rsp + `disp` against the stack page and makes r14
    /// the host address. Clobbers the flags. Returns the rel32 of the miss, which
    /// finds the offset from the stack page in r14.
    pub fn check_stack(&mut self, wide: bool, disp: i32, size: u32, user: bool) -> u32 {
        self.lea(wide, R14, Address { base: Some(R15), index: None, scale: 1, disp });
        let entry = stack_offset(user);
        self.state(true, &[0x2B], R14, entry + offset_of!(StackPage, page)); // sub r14, page
        self.cmp_imm(R14, 4096 - size);
        let miss = self.jcc(cc::A);
        self.add_state(R14, entry + offset_of!(StackPage, host));
        miss
    }

    /// Looks the guest address in r13 up in the table of branch targets and
    /// jumps there. Clobbers r14 and the flags. Returns the rel32s of the miss
    /// and of the request exit.
    pub fn indirect(&mut self, table: usize) -> (u32, u32) {
        let miss = self.look_up(table);
        self.cmp8_imm(REQUEST, 0);
        let request = self.jcc(cc::NE);
        self.bytes(&[0x42, 0xFF, 0xA4, 0x34]); // jmp [rsp + r14 + host]
        self.imm32(table as u32 + 8);
        (miss, request)
    }

    /// Looks the guest address in r13 up as [`Emitter::indirect`] does, and leaves
    /// the host's in r13. The request exit is there with `poll`.
    pub fn find_target(&mut self, table: usize, poll: bool) -> (u32, Option<u32>) {
        let miss = self.look_up(table);
        let request = poll.then(|| {
            self.cmp8_imm(REQUEST, 0);
            self.jcc(cc::NE)
        });
        self.bytes(&[0x4E, 0x8B, 0xAC, 0x34]); // mov r13, [rsp + r14 + host]
        self.imm32(table as u32 + 8);
        (miss, request)
    }

    /// r14 := the offset in the table of the target in r13. Returns the rel32 of the miss.
    fn look_up(&mut self, table: usize) -> u32 {
        self.bytes(&[0x45, 0x0F, 0xB7, 0xF5]); // movzx r14d, r13w
        self.bytes(&[0x41, 0xC1, 0xE6, 4]); // shl r14d, 4
        self.bytes(&[0x4E, 0x3B, 0xAC, 0x34]); // cmp r13, [rsp + r14 + target]
        self.imm32(table as u32);
        self.jcc(cc::NE)
    }

    /// Adds to the count of instructions. Leaves the flags as a comparison with the limit does.
    pub fn count(&mut self, instructions: u8) {
        // add qword [rsp + count], imm8
        self.state(true, &[0x83], 0, offset_of!(CpuState, beyond_limit));
        self.bytes(&[instructions]);
    }

    /// The same, which leaves the flags alone. Uses `scratch`.
    pub fn count_beside_flags(&mut self, instructions: u8, scratch: u8) {
        let count = offset_of!(CpuState, beyond_limit);
        self.load(scratch, count);
        let disp = i32::from(instructions);
        self.lea(true, scratch, Address { base: Some(scratch), index: None, scale: 1, disp });
        self.store(count, scratch);
    }

    /// Checks that the page `disp` behind the running relative code is the one of an exec
    /// id. Clobbers r13, r14 and the flags. Returns the rel32s of the misses.
    pub fn check_exec(&mut self, disp: i32, id: u32) -> (u32, u32) {
        self.load(R13, offset_of!(CpuState, code_page));
        self.lea(true, R13, Address { base: Some(R13), index: None, scale: 1, disp });
        self.mov(R14, R13);
        self.shr_imm(R14, 12);
        self.bytes(&[0x45, 0x0F, 0xB7, 0xF6]); // movzx r14d, r14w
        self.bytes(&[0x4E, 0x39, 0xAC, 0xF4]); // cmp [rsp + r14 * 8 + pages], r13
        self.imm32(EXEC_PAGE_OFFSET as u32);
        let page = self.jcc(cc::NE);
        self.bytes(&[0x42, 0x81, 0xBC, 0xB4]); // cmp dword [rsp + r14 * 4 + ids], id
        self.imm32(exec_offset(true) as u32);
        self.imm32(id);
        let other = self.jcc(cc::NE);
        (page, other)
    }

    /// `jmp [rsp + offset]`
    pub fn jmp_state(&mut self, offset: usize) {
        self.state(false, &[0xFF], 4, offset);
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A NOP between them would keep the CPU from fusing the two.
    #[test]
    fn a_branch_that_can_be_patched_stands_behind_the_compare() {
        for offset in 0..8 {
            for compare in [&[0x39, 0xC6][..], &[0x48, 0x39, 0xC6], &[0x48, 0x83, 0xC0, 0x20]] {
                let mut e = Emitter::new(true);
                e.raw(&vec![0x90; offset]);
                e.raw(compare);
                e.align_before_branch(offset as u32);
                let end = e.pos();
                assert!(e.code.ends_with(compare) && end - offset as u32 <= MAX_INSTRUCTION);
                let place = e.patched_jcc(cc::NE);
                assert_eq!(place, end + 2, "a NOP behind {compare:x?} at {offset}");
                assert!(place % 8 <= 4, "crosses a quadword");
            }
        }
    }
}
