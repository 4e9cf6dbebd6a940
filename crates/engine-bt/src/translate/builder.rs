//! One block: decode, classify, find live flags, emit.
//!
//! There is no intermediate form. Most instructions are copied with their
//! registers renamed and their memory operand replaced by a checked host
//! pointer; a few have a sequence of their own; the rest leave for the
//! interpreter. Every instruction either completes or has changed nothing when
//! it leaves, so faults are precise and any leave can be finished elsewhere.
//!
//! Flags: a memory check clobbers the arithmetic flags. Where they are live
//! they are put aside first (`saved_flags`) and brought back only when an
//! instruction needs them, at most once between two writers. A block therefore
//! has two entries, one for each place the flags may be in.

use std::mem::offset_of;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};

use super::cache::{Exit, Link, MapEntry};
use super::classify::{Kind, classify, keeps_flags_sometimes};
use super::emit::{Address, Emitter, IRQ_WAIT, R13, R14, R15, REQUEST, cc, gpr_offset};
use super::liveness::{self, ALL};
use super::stubs::Stubs;
use crate::block::{branch_offset, exec_index, exec_offset};
use crate::cpu::mode;
use crate::cpuid::CpuidTable;
use crate::state::{CpuState, seg};

const MAX_INSTRUCTIONS: usize = 64;

/// A finished translation, not yet at an address.
#[derive(Default)]
pub struct Built {
    pub rip: u64,
    pub code: Vec<u8>,
    pub outward: Vec<(u32, u64)>,
    /// Places of 32-bit exit numbers, counted from the block's first exit.
    pub exit_numbers: Vec<u32>,
    pub exits: Vec<Exit>,
    pub map: Vec<MapEntry>,
    pub entry: u32,
    pub indirect_entry: u32,
    pub flags_in: u32,
    /// Guest bytes translated.
    pub len: u32,
    pub instructions: u32,
}

/// What the guest's code bytes are, and where.
pub struct Source<'a> {
    pub rip: u64,
    /// From `rip` to the end of its page (or of the one instruction that crosses
    /// into the next page).
    pub bytes: &'a [u8],
    pub mode: u32,
    /// For an instruction that crosses pages: the exec id of its second page.
    pub second: Option<u32>,
    /// Bytes of the page from its start, for looking ahead.
    pub page: &'a [u8],
    pub cpuid: &'a CpuidTable,
}

/// Where the arithmetic flags are while emitting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flags {
    Host,
    Saved,
}

/// Code that is emitted after the hot part.
enum Cold {
    /// Fill the TLB and try again.
    Fill { miss: u32, retry: u32, stub: u64, instruction: usize },
    FillConstant { miss: u32, retry: u32, stub: u64, instruction: usize, linear: u64 },
    /// Leave through `stub` with an exit number.
    Leave { places: Vec<u32>, stub: u64, exit: Exit },
}

pub struct Builder {
    emitter: Emitter,
    info: InstructionInfoFactory,
    stubs: Stubs,
}

struct Job<'a> {
    e: &'a mut Emitter,
    info: &'a mut InstructionInfoFactory,
    stubs: Stubs,
    source: &'a Source<'a>,
    user: bool,
    flags: Flags,
    live: Vec<u32>,
    cold: Vec<Cold>,
    built: Built,
    current: usize,
    rips: Vec<u64>,
}

impl Builder {
    pub fn new(stubs: Stubs) -> Self {
        let bmi2 = std::arch::is_x86_feature_detected!("bmi2");
        Self { emitter: Emitter::new(bmi2), info: InstructionInfoFactory::new(), stubs }
    }

    /// Translates from `source.rip`. `None` if not even the first instruction
    /// decodes from the bytes given: it crosses into the next page, or is invalid.
    pub fn build(&mut self, source: &Source<'_>) -> Option<Built> {
        let mut instructions = Vec::with_capacity(MAX_INSTRUCTIONS);
        let mut kinds = Vec::with_capacity(MAX_INSTRUCTIONS);
        let mut decoder =
            Decoder::with_ip(64, source.bytes, source.rip, DecoderOptions::NONE);
        while instructions.len() < MAX_INSTRUCTIONS && decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                break;
            }
            let kind = classify(&instruction, source, &mut self.info);
            instructions.push(instruction);
            kinds.push(kind);
            if kind.ends_block() {
                break;
            }
            if source.second.is_some() {
                break;
            }
        }
        let last = *instructions.last()?;
        let ends = kinds.last().is_some_and(|kind| kind.ends_block());
        let end_live = liveness::after(&last, ends, source);
        let live = liveness::backwards(&instructions, &kinds, end_live);

        self.emitter.clear();
        let mut job = Job {
            e: &mut self.emitter,
            info: &mut self.info,
            stubs: self.stubs,
            source,
            user: source.mode & mode::USER != 0,
            flags: Flags::Host,
            live,
            cold: Vec::new(),
            built: Built { rip: source.rip, ..Built::default() },
            current: 0,
            rips: instructions.iter().map(Instruction::ip).collect(),
        };
        job.run(&instructions, &kinds, ends);
        let mut built = job.built;
        built.flags_in = job.live[0];
        built.code = std::mem::take(&mut job.e.code);
        built.outward = std::mem::take(&mut job.e.outward);
        built.instructions = instructions.len() as u32;
        built.len = (last.next_ip() - source.rip) as u32;
        Some(built)
    }
}

/// The guest register number of a general register of any width.
fn number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register().number() as u8)
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

fn gpr_of(width: usize, number: u8) -> Register {
    let first = match width {
        1 => Register::AL as u32,
        2 => Register::AX as u32,
        4 => Register::EAX as u32,
        _ => Register::RAX as u32,
    };
    // AL..BL, then AH..BH, then SPL..R15L: skip the high bytes.
    let skip = if width == 1 && number >= 4 { 4 } else { 0 };
    Register::try_from((first + u32::from(number) + skip) as usize).unwrap_or(Register::RAX)
}

impl Job<'_> {
    fn run(&mut self, instructions: &[Instruction], kinds: &[Kind], ends: bool) {
        // The indirect entry finds the flags in `saved_flags`.
        if self.live[0] != 0 {
            self.e.restore_flags(R13);
        }
        self.built.indirect_entry = 0;
        self.built.entry = self.e.pos();
        self.mark(0);
        if let Some(id) = self.source.second {
            self.check_second_page(instructions[0].ip(), id);
        }
        // A backward branch needs a poll of the request flag somewhere in the
        // loop: here, at the last place where no flag is live.
        let last = instructions.len() - 1;
        let poll_at = if loops_back(&instructions[last], self.source.rip) {
            (0..=last).rev().find(|&index| self.live[index] == 0)
        } else {
            None
        };
        let mut polled = false;
        for (index, (instruction, kind)) in instructions.iter().zip(kinds).enumerate() {
            self.current = index;
            self.mark(index);
            if poll_at == Some(index) {
                self.poll(instruction.ip());
                polled = true;
            }
            self.emit(instruction, *kind, polled);
        }
        if !ends {
            let next = instructions[last].next_ip();
            self.current = last;
            let live = self.live[last + 1];
            self.direct(next, live, false);
        }
        self.finish();
    }

    /// Notes that the code from here on belongs to instruction `index`.
    fn mark(&mut self, index: usize) {
        let rip = (self.rips[index] - self.source.rip) as u16;
        let entry = MapEntry { offset: self.e.pos(), rip, saved: self.flags == Flags::Saved };
        self.built.map.push(entry);
    }

    fn rip(&self) -> u64 {
        self.rips[self.current]
    }

    /// Flags needed by the current instruction or later ones.
    fn live_before(&self) -> u32 {
        self.live[self.current]
    }

    fn live_after(&self) -> u32 {
        self.live[self.current + 1]
    }

    /// Makes the host's flags free for checks. Uses r13.
    fn free_flags(&mut self) {
        if self.flags == Flags::Host && self.live_before() != 0 {
            self.e.save_flags(R13);
            self.flags = Flags::Saved;
            // From here on a leave finds the flags put aside.
            self.mark(self.current);
        }
    }

    /// Brings live flags back before an instruction that reads some, or writes
    /// only a part of them. Uses r13.
    fn need_flags(&mut self, read: u32, written: u32) {
        if self.flags == Flags::Saved
            && (read != 0 || written != 0 && self.live_after() & !written != 0)
        {
            self.e.restore_flags(R13);
            self.flags = Flags::Host;
        }
    }

    fn poll(&mut self, rip: u64) {
        self.e.cmp8_imm(REQUEST, 0);
        let place = self.e.jcc(cc::NE);
        let exit = Exit { rip, saved: self.flags == Flags::Saved, link: None, straddles: false };
        self.cold.push(Cold::Leave { places: vec![place], stub: self.stubs.leave_request, exit });
    }

    fn check_second_page(&mut self, rip: u64, id: u32) {
        let page = (rip | 0xFFF).wrapping_add(1);
        if self.live[0] != 0 {
            self.e.save_flags(R13);
            self.flags = Flags::Saved;
            self.mark(0);
        }
        self.e.cmp32_imm(exec_offset(self.user) + exec_index(page) * 4, id);
        let place = self.e.jcc(cc::NE);
        let exit = Exit { rip, saved: self.flags == Flags::Saved, link: None, straddles: true };
        self.cold.push(Cold::Leave { places: vec![place], stub: self.stubs.leave_interpret, exit });
    }

    fn emit(&mut self, i: &Instruction, kind: Kind, polled: bool) {
        match kind {
            Kind::Nothing => {}
            Kind::Copy => {
                if !self.copy(i) {
                    self.interpret();
                }
            }
            Kind::Lea => self.lea(i),
            Kind::Push => self.push(i),
            Kind::Pop => self.pop(i),
            Kind::Leave => self.leave(),
            Kind::Pushf => self.pushf(),
            Kind::Cli => self.e.store8_imm(offset_of!(CpuState, iflag), 0),
            Kind::Sti => self.sti(),
            Kind::Swapgs => self.swapgs(),
            Kind::Rdtsc => self.rdtsc(),
            Kind::ReadBase(segment) => self.read_base(i, segment),
            Kind::Jmp => self.direct(i.near_branch_target(), self.live_after(), polled),
            Kind::Jcc => self.jcc(i, polled),
            Kind::Loop => self.loop_(i),
            Kind::Call => self.call(i),
            Kind::JmpIndirect => {
                self.target_to_r13(i);
                self.indirect();
            }
            Kind::CallIndirect => self.call_indirect(i),
            Kind::Ret => self.ret(i),
            Kind::Interpret => self.interpret(),
        }
    }

    /// Leaves for the interpreter at the current instruction. What follows in
    /// the block, if anything, is reached only through other blocks.
    fn interpret(&mut self) {
        let place = self.e.jmp();
        let saved = self.flags == Flags::Saved;
        let exit = Exit { rip: self.rip(), saved, link: None, straddles: false };
        self.cold.push(Cold::Leave { places: vec![place], stub: self.stubs.leave_interpret, exit });
        // Later code is entered with whatever the interpreter left: never from here.
    }

    // --- memory operands ---

    /// Loads a guest register that lives in memory into `scratch`; otherwise
    /// tells where it lives.
    fn host_register(&mut self, guest: u8, scratch: u8) -> u8 {
        match guest {
            4 => R15,
            13..=15 => {
                self.e.load(scratch, gpr_offset(guest));
                scratch
            }
            _ => guest,
        }
    }

    /// base + index * scale + displacement with host registers. Uses r13, r14.
    fn address(&mut self, i: &Instruction) -> Address {
        let base = number(i.memory_base()).map(|guest| self.host_register(guest, R14));
        let index = number(i.memory_index()).map(|guest| self.host_register(guest, R13));
        let scale = i.memory_index_scale() as u8;
        Address { base, index, scale, disp: i.memory_displacement64() as i32 }
    }

    /// The linear address, where it is a constant.
    fn constant_address(i: &Instruction) -> Option<u64> {
        let plain = !matches!(i.memory_segment(), Register::FS | Register::GS);
        if i.is_ip_rel_memory_operand() && plain {
            return Some(i.ip_rel_memory_address());
        }
        let absolute = i.memory_base() == Register::None && i.memory_index() == Register::None;
        (absolute && plain).then(|| i.memory_displacement64())
    }

    /// r14 := the linear address of the memory operand. Flags must be free.
    fn linear(&mut self, i: &Instruction) {
        if i.is_ip_rel_memory_operand() {
            self.e.mov_imm(R14, i.ip_rel_memory_address());
        } else {
            let wide = i.memory_base().size() != 4 && i.memory_index().size() != 4;
            let address = self.address(i);
            self.e.lea(wide, R14, address);
        }
        let segment = match i.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return,
        };
        self.e.add_gs(R14, base_offset(segment));
    }

    /// Checks the memory operand and leaves a host pointer to it: returns the
    /// displacement from r14. Clobbers r13 and the host's flags.
    fn operand(&mut self, i: &Instruction, size: u32, write: bool) -> i32 {
        if let Some(linear) = Self::constant_address(i) {
            if (linear & 0xFFF) + u64::from(size) <= 4096 {
                return self.constant(linear, write);
            }
            let retry = self.e.pos();
            self.e.mov_imm(R14, linear);
            self.checked(size, write, retry);
            return 0;
        }
        let retry = self.e.pos();
        self.linear(i);
        self.checked(size, write, retry);
        0
    }

    fn constant(&mut self, linear: u64, write: bool) -> i32 {
        let retry = self.e.pos();
        let miss = self.e.check_constant(linear & !0xFFF, self.user, write);
        let stub = self.stubs.fill_address[usize::from(self.user) * 2 + usize::from(write)];
        let instruction = self.current;
        self.cold.push(Cold::FillConstant { miss, retry, stub, instruction, linear });
        (linear & 0xFFF) as i32
    }

    fn checked(&mut self, size: u32, write: bool, retry: u32) {
        let miss = self.e.check(size, self.user, write);
        let stub = self.stubs.fill[usize::from(self.user) * 2 + usize::from(write)];
        self.cold.push(Cold::Fill { miss, retry, stub, instruction: self.current });
    }

    /// Checks `size` bytes at rsp + `disp`.
    fn stack(&mut self, disp: i32, size: u32, write: bool) {
        let retry = self.e.pos();
        self.e.lea(true, R14, Address { base: Some(R15), index: None, scale: 1, disp });
        self.checked(size, write, retry);
    }

    // --- instructions ---

    /// Copies an instruction with its operands replaced. False if it cannot be.
    fn copy(&mut self, i: &Instruction) -> bool {
        let read = i.rflags_read();
        let written = i.rflags_modified();
        let memory = (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory);
        let (accesses, memory_write) = {
            let info = self.info.info(i);
            let accesses: Vec<OpAccess> = (0..i.op_count()).map(|op| info.op_access(op)).collect();
            let write = memory.is_some_and(|op| writes(accesses[op as usize]));
            (accesses, write)
        };

        let mut copy = *i;
        // Guest registers in memory, with the scratch register for each.
        let mut spilled: [Option<(u8, u8, bool, bool)>; 2] = [None; 2];
        let scratches: &[u8] = if memory.is_some() { &[R13] } else { &[R13, R14] };
        for op in 0..i.op_count() {
            if i.op_kind(op) != OpKind::Register {
                continue;
            }
            let register = i.op_register(op);
            let Some(guest) = number(register) else { continue };
            if is_high_byte(register) && memory.is_some() {
                return false;
            }
            let host = match guest {
                4 => R15,
                13..=15 => {
                    let slot = spilled
                        .iter()
                        .position(|s| s.is_none_or(|(g, ..)| g == guest))
                        .filter(|&slot| slot < scratches.len());
                    let Some(slot) = slot else { return false };
                    let access = accesses[op as usize];
                    let size = register.size();
                    let (_, scratch, load, store) =
                        spilled[slot].unwrap_or((guest, scratches[slot], false, false));
                    let load = load || access != OpAccess::Write || size < 4;
                    let store = store || writes(access);
                    spilled[slot] = Some((guest, scratch, load, store));
                    scratch
                }
                _ => continue,
            };
            copy.set_op_register(op, gpr_of(register.size(), host));
        }
        // A 32-bit register written only conditionally still zero-extends, and
        // the copy does that by itself in the scratch register.

        if memory.is_some() {
            self.free_flags();
            let size = i.memory_size().size() as u32;
            let disp = self.operand(i, size, memory_write);
            copy.set_memory_base(Register::R14);
            copy.set_memory_index(Register::None);
            copy.set_memory_index_scale(1);
            copy.set_memory_displacement64(disp as i64 as u64);
            copy.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
            copy.set_segment_prefix(Register::None);
        }
        let sometimes = if keeps_flags_sometimes(i) { self.live_after() } else { 0 };
        self.need_flags(read | sometimes, written);
        for (guest, scratch, load, _) in spilled.iter().flatten() {
            if *load {
                self.e.load(*scratch, gpr_offset(*guest));
            }
        }
        if !self.e.instruction(&copy) {
            return false;
        }
        for (guest, scratch, _, store) in spilled.iter().flatten() {
            if *store {
                self.e.store(gpr_offset(*guest), *scratch);
            }
        }
        if written != 0 {
            self.flags = Flags::Host;
        }
        true
    }

    fn lea(&mut self, i: &Instruction) {
        let to = i.op0_register();
        let guest = number(to).unwrap_or(0);
        let host = match guest {
            4 => R15,
            13..=15 => R14,
            _ => guest,
        };
        if i.is_ip_rel_memory_operand() {
            let value = i.ip_rel_memory_address();
            let value = if to.size() == 4 { value & 0xFFFF_FFFF } else { value };
            self.e.mov_imm(host, value);
        } else {
            let address32 = i.memory_base().size() == 4 || i.memory_index().size() == 4;
            let address = self.address(i);
            self.e.lea(to.size() == 8 && !address32, host, address);
        }
        if host == R14 {
            self.e.store(gpr_offset(guest), R14);
        }
    }

    fn push(&mut self, i: &Instruction) {
        self.free_flags();
        if i.op0_kind() == OpKind::Memory {
            let disp = self.operand(i, 8, false);
            self.e.load_at(R13, R14, disp);
            self.e.store(offset_of!(CpuState, scratch) + 16, R13);
            self.stack(-8, 8, true);
            self.e.load(R13, offset_of!(CpuState, scratch) + 16);
            self.e.store_at(R14, 0, R13);
        } else {
            self.stack(-8, 8, true);
            if i.op0_kind() == OpKind::Register {
                let guest = number(i.op0_register()).unwrap_or(0);
                let host = self.host_register(guest, R13);
                self.e.store_at(R14, 0, host);
            } else {
                self.e.store_imm_at(R14, 0, i.immediate(0) as i32);
            }
        }
        self.move_rsp(-8);
    }

    fn move_rsp(&mut self, by: i32) {
        self.e.lea(true, R15, Address { base: Some(R15), index: None, scale: 1, disp: by });
    }

    fn pop(&mut self, i: &Instruction) {
        self.free_flags();
        self.stack(0, 8, false);
        match number(i.op0_register()).unwrap_or(0) {
            4 => {
                self.e.load_at(R15, R14, 0);
                return;
            }
            guest @ 13..=15 => {
                self.e.load_at(R13, R14, 0);
                self.e.store(gpr_offset(guest), R13);
            }
            guest => self.e.load_at(guest, R14, 0),
        }
        self.move_rsp(8);
    }

    fn leave(&mut self) {
        self.free_flags();
        let retry = self.e.pos();
        self.e.mov(R14, 5);
        self.checked(8, false, retry);
        self.e.load_at(R13, R14, 0);
        self.e.lea(true, R15, Address { base: Some(5), index: None, scale: 1, disp: 8 });
        self.e.mov(5, R13);
    }

    /// PUSHF reads every flag, so `free_flags` has put all of them aside.
    fn pushf(&mut self) {
        self.free_flags();
        self.stack(-8, 8, true);
        let saved = offset_of!(CpuState, saved_flags);
        let rax = super::emit::RAX;
        self.e.store(offset_of!(CpuState, scratch) + 16, rax);
        self.e.load8(rax, saved + 1);
        self.e.load8(R13, saved);
        self.e.shl_imm(R13, 11);
        self.e.or(rax, R13);
        self.e.load8(R13, offset_of!(CpuState, iflag));
        self.e.shl_imm(R13, 9);
        self.e.or(rax, R13);
        self.e.load32(R13, offset_of!(CpuState, flags));
        // The pushed image has RF and VM clear (SDM 2, PUSHF).
        let keep = !(crate::state::flag::ARITH | crate::state::flag::RF | crate::state::flag::VM);
        self.e.and32_imm(R13, keep as u32);
        self.e.or(rax, R13);
        self.e.store_at(R14, 0, rax);
        self.e.load(rax, offset_of!(CpuState, scratch) + 16);
        self.move_rsp(-8);
    }

    /// With an interrupt waiting, STI is the interpreter's, shadow and all.
    fn sti(&mut self) {
        self.free_flags();
        self.e.cmp8_imm(IRQ_WAIT, 0);
        let place = self.e.jcc(cc::NE);
        let saved = self.flags == Flags::Saved;
        let exit = Exit { rip: self.rip(), saved, link: None, straddles: false };
        self.cold.push(Cold::Leave { places: vec![place], stub: self.stubs.leave_interpret, exit });
        self.e.store8_imm(offset_of!(CpuState, iflag), 1);
    }

    fn swapgs(&mut self) {
        let (base, kernel) = (base_offset(seg::GS), offset_of!(CpuState, kernel_gs_base));
        self.e.load(R13, base);
        self.e.load(R14, kernel);
        self.e.store(kernel, R13);
        self.e.store(base, R14);
    }

    fn rdtsc(&mut self) {
        self.free_flags();
        let (rax, rdx) = (0, 2);
        self.e.raw(&[0x0F, 0x31]); // rdtsc
        self.e.shl_imm(rdx, 32);
        self.e.or(rax, rdx);
        self.e.add_gs(rax, offset_of!(CpuState, tsc_offset));
        self.e.mov(rdx, rax);
        self.e.shr_imm(rdx, 32);
        self.e.raw(&[0x89, 0xC0]); // mov eax, eax
    }

    fn read_base(&mut self, i: &Instruction, segment: usize) {
        let register = i.op0_register();
        let guest = number(register).unwrap_or(0);
        let host = match guest {
            4 => R15,
            13..=15 => R13,
            _ => guest,
        };
        if register.size() == 8 {
            self.e.load(host, base_offset(segment));
        } else {
            self.e.load32(host, base_offset(segment));
        }
        if host == R13 {
            self.e.store(gpr_offset(guest), R13);
        }
    }

    // --- control flow ---

    /// Goes to a known address. `live` are the flags that it may need.
    fn direct(&mut self, target: u64, live: u32, polled: bool) {
        let same_page = target & !0xFFF == self.source.rip & !0xFFF && self.source.second.is_none();
        let backward = target <= self.source.rip;
        let mut guard = None;
        let mut places = Vec::new();
        let mut request = Vec::new();
        let needs_poll = backward && !polled;
        if (needs_poll || !same_page) && self.flags == Flags::Host && live != 0 {
            self.e.save_flags(R13);
            self.flags = Flags::Saved;
        }
        if needs_poll {
            self.e.cmp8_imm(REQUEST, 0);
            request.push(self.e.jcc(cc::NE));
        }
        if !same_page {
            let cell = exec_offset(self.user) + exec_index(target) * 4;
            guard = Some(self.e.cmp32_imm(cell, u32::MAX));
            places.push(self.e.jcc(cc::NE));
        }
        let jump = self.e.jmp();
        places.push(jump);
        let saved = self.flags == Flags::Saved;
        let link = Some(Link { jump, guard, dead: ALL & !live });
        let exit = Exit { rip: target, saved, link, straddles: false };
        self.cold.push(Cold::Leave { places, stub: self.stubs.leave_link, exit });
        if !request.is_empty() {
            let exit = Exit { rip: target, saved, link: None, straddles: false };
            self.cold.push(Cold::Leave { places: request, stub: self.stubs.leave_request, exit });
        }
    }

    fn jcc(&mut self, i: &Instruction, polled: bool) {
        self.need_flags(i.rflags_read(), 0);
        let condition = jcc_opcode(i);
        let target = i.near_branch_target();
        let live = self.live_after();
        let same_page = target & !0xFFF == self.source.rip & !0xFFF && self.source.second.is_none();
        if same_page && (target > self.source.rip || polled) {
            let jump = self.e.jcc(condition);
            let link = Some(Link { jump, guard: None, dead: ALL & !live });
            let exit = Exit { rip: target, saved: false, link, straddles: false };
            let stub = self.stubs.leave_link;
            self.cold.push(Cold::Leave { places: vec![jump], stub, exit });
            self.direct(i.next_ip(), live, polled);
            return;
        }
        let taken = self.e.jcc(condition);
        self.direct(i.next_ip(), live, polled);
        self.e.bind(taken);
        self.flags = Flags::Host;
        self.direct(target, live, polled);
    }

    /// LOOP and JRCXZ: neither touches flags.
    fn loop_(&mut self, i: &Instruction) {
        let live = self.live_after();
        let flags = self.flags;
        let address32 = matches!(
            i.code(),
            Code::Loop_rel8_64_ECX | Code::Jecxz_rel8_64
        );
        let is_loop = i.mnemonic() == Mnemonic::Loop;
        if is_loop {
            // 32-bit count: LEA zero-extends, as a write of ECX does.
            self.e.lea(
                !address32,
                1,
                Address { base: Some(1), index: None, scale: 1, disp: -1 },
            );
        }
        let zero = self.e.jrcxz(address32);
        let over = self.e.jmp();
        self.e.bind8(zero);
        let (at_zero, else_) = if is_loop {
            (i.next_ip(), i.near_branch_target())
        } else {
            (i.near_branch_target(), i.next_ip())
        };
        // After LOOP's decrement the instruction is done: a request must be seen
        // before it or at the target, which `direct` does.
        self.direct(at_zero, live, false);
        self.e.bind(over);
        self.flags = flags;
        self.direct(else_, live, false);
    }

    fn push_return(&mut self, i: &Instruction) {
        self.stack(-8, 8, true);
        let next = i.next_ip();
        if next as i64 == i64::from(next as i32) {
            self.e.store_imm_at(R14, 0, next as i32);
        } else {
            self.e.mov_imm(R13, next);
            self.e.store_at(R14, 0, R13);
        }
        self.move_rsp(-8);
    }

    fn call(&mut self, i: &Instruction) {
        self.free_flags();
        self.push_return(i);
        self.direct(i.near_branch_target(), self.live_after(), false);
    }

    /// r13 := the target of an indirect branch. Puts live flags aside.
    fn target_to_r13(&mut self, i: &Instruction) {
        self.free_flags();
        if i.op0_kind() == OpKind::Memory {
            let disp = self.operand(i, 8, false);
            self.e.load_at(R13, R14, disp);
        } else {
            let guest = number(i.op0_register()).unwrap_or(0);
            let host = self.host_register(guest, R13);
            if host != R13 {
                self.e.mov(R13, host);
            }
        }
    }

    fn call_indirect(&mut self, i: &Instruction) {
        let scratch = offset_of!(CpuState, scratch) + 16;
        self.target_to_r13(i);
        self.e.store(scratch, R13);
        self.push_return(i);
        self.e.load(R13, scratch);
        self.indirect();
    }

    fn ret(&mut self, i: &Instruction) {
        self.free_flags();
        self.stack(0, 8, false);
        self.e.load_at(R13, R14, 0);
        let extra = if i.op_count() == 1 { i.immediate16() } else { 0 };
        self.move_rsp(8 + i32::from(extra));
        self.indirect();
    }

    /// Jumps to the guest address in r13. All flags have been put aside.
    fn indirect(&mut self) {
        let (miss, request) = self.e.indirect(branch_offset(self.user));
        self.e.bind_outward(miss, self.stubs.leave_branch);
        self.e.bind_outward(request, self.stubs.leave_request_branch);
    }

    // --- the end ---

    fn finish(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Fill { miss, retry, stub, instruction } => {
                    self.e.bind(miss);
                    self.fill(retry, stub, instruction);
                }
                Cold::FillConstant { miss, retry, stub, instruction, linear } => {
                    self.e.bind(miss);
                    self.e.mov_imm(R14, linear);
                    self.fill(retry, stub, instruction);
                }
                Cold::Leave { places, stub, exit } => {
                    for place in places {
                        self.e.bind(place);
                    }
                    let number = self.built.exits.len() as u32;
                    self.e.store32_imm(offset_of!(CpuState, site), number);
                    self.built.exit_numbers.push(self.e.pos() - 4);
                    let jump = self.e.jmp();
                    self.e.bind_outward(jump, stub);
                    self.built.exits.push(exit);
                }
            }
        }
    }

    fn fill(&mut self, retry: u32, stub: u64, instruction: usize) {
        // The check has been reached with the flags free: saved if they live.
        let saved = self.live[instruction] != 0;
        let rip = (self.rips[instruction] - self.source.rip) as u16;
        self.built.map.push(MapEntry { offset: self.e.pos(), rip, saved });
        let call = self.e.call();
        self.e.bind_outward(call, stub);
        let jump = self.e.jmp();
        self.e.bind_to(jump, retry);
    }
}

fn base_offset(segment: usize) -> usize {
    offset_of!(CpuState, seg) + segment * size_of::<tetrarch_engine::Segment>()
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Whether the block's last instruction may jump back to or before its start.
fn loops_back(last: &Instruction, start: u64) -> bool {
    matches!(last.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
        && last.near_branch_target() <= start
}

/// The condition in the opcode of a Jcc.
fn jcc_opcode(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}
