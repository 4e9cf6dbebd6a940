//! A block while it is made: what its parts share, and the code that stands in
//! every block.

use std::mem::offset_of;

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory};

use super::block::{Built, MapEntry, Site, Source, What};
use super::classify::{Kind, stack_run};
use super::emit::{Address, Emitter, R13, R14, REQUEST, cc};
use super::liveness::{ALL, Way};
use super::operands::{flag_operand, number};
use super::sources::{Keep, Kept, Sources};
use super::stubs::Stubs;
use crate::journal::Counting;
use crate::state::CpuState;
use crate::state::block::{exec_index, exec_offset};

/// Where the arithmetic flags are while emitting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flags {
    Host,
    Saved,
}

/// Code that is emitted after the hot part.
pub(super) enum Cold {
    /// Fill the TLB and try again.
    Fill {
        miss: u32,
        retry: u32,
        stub: u64,
        instruction: usize,
    },
    FillConstant {
        miss: u32,
        retry: u32,
        stub: u64,
        instruction: usize,
        linear: u64,
    },
    /// Find the access in the TLB, remember its page as the stack's, go on.
    Stack {
        miss: u32,
        resume: u32,
        stub: u64,
        instruction: usize,
        limit: u32,
    },
    /// Leave for the interpreter at `instruction`, which did nothing yet.
    Slow {
        place: u32,
        instruction: usize,
    },
    /// Leave through `stub` with a site number.
    Leave {
        places: Vec<u32>,
        stub: u64,
        site: Site,
    },
}

pub(super) struct Job<'a> {
    pub(super) e: &'a mut Emitter,
    pub(super) info: &'a mut InstructionInfoFactory,
    pub(super) stubs: Stubs,
    pub(super) source: &'a Source<'a>,
    pub(super) user: bool,
    /// 64-bit code; else the stack's words and addresses have 32 bits.
    pub(super) wide: bool,
    pub(super) flags: Flags,
    pub(super) live: Vec<u32>,
    pub(super) ways: Vec<Way>,
    /// Where the flags are from at the block's end.
    pub(super) end: Sources,
    /// What instructions are preceded by so that flags can be made again.
    pub(super) keeps: Vec<(usize, Keep)>,
    pub(super) cold: Vec<Cold>,
    pub(super) built: Built,
    pub(super) current: usize,
    pub(super) instructions: &'a [Instruction],
    pub(super) kinds: &'a [Kind],
    /// See [`Source::polls`].
    pub(super) polls: bool,
    /// The block has made sure that the guest's x87 state is in the host CPU.
    pub(super) x87_loaded: bool,
}

impl Job<'_> {
    pub(super) fn run(&mut self, ends: bool) {
        let (instructions, kinds) = (self.instructions, self.kinds);
        if self.source.relative() {
            // r13 is the guest's address.
            let disp = -(self.source.rip as i32);
            let page = Address { base: Some(R13), index: None, scale: 1, disp };
            self.e.lea(true, R13, page);
            self.e.store(offset_of!(CpuState, code_page), R13);
        }
        self.built.saved_entry = self.e.pos();
        if self.source.counted() {
            self.count();
        } else {
            if self.live[0] != 0 {
                self.e.restore_flags(R13);
            }
            self.built.entry = self.e.pos();
            self.mark(0);
        }
        if let Some(id) = self.source.second {
            self.check_second_page(instructions[0].ip(), id);
        }
        // A backward branch needs a poll of the request flag somewhere in the
        // loop: here, at the last place where no flag is live.
        let last = instructions.len() - 1;
        let poll_at = if !self.source.counted() && loops_back(&instructions[last], self.source.rip)
        {
            (0..=last).rev().find(|&index| self.live[index] == 0)
        } else {
            None
        };
        let mut polled = self.source.counted();
        let mut index = 0;
        while index <= last {
            self.current = index;
            self.mark(index);
            if poll_at == Some(index) {
                self.poll();
                polled = true;
            }
            let run = stack_run(&instructions[index..], &kinds[index..]);
            self.keep_registers(index, run.max(1));
            if run > 1 {
                self.stack_run(&instructions[index..index + run], &kinds[index..index + run]);
                index += run;
            } else {
                self.emit(&instructions[index], kinds[index], polled);
                index += 1;
            }
        }
        if !ends {
            let next = instructions[last].next_ip();
            self.current = last;
            let live = self.live[last + 1];
            self.direct(next, live, false);
        }
        self.finish();
    }

    /// Both entries, in code that counts: the block is counted where it begins, and left there
    /// beyond the limit. Where it polls, it does so there, since a replay can stand nowhere else.
    fn count(&mut self) {
        let live = self.live[0] != 0;
        let stands = self.polls || self.source.counting != Counting::Recorded;
        if live && !self.polls {
            self.e.restore_flags(R13);
            self.built.entry = self.e.pos();
            self.mark(0);
            if stands {
                self.e.save_flags(R13);
                self.flags = Flags::Saved;
                self.mark(0);
                self.count_to_limit();
                self.e.restore_flags(R13);
                self.flags = Flags::Host;
                self.mark(0);
            } else {
                self.e.count_beside_flags(self.instructions.len() as u8, R13);
            }
            return;
        }
        let saved = live.then(|| self.e.jmp());
        self.built.entry = self.e.pos();
        self.mark(0);
        if let Some(saved) = saved {
            self.e.save_flags(R13);
            self.e.bind(saved);
            self.flags = Flags::Saved;
            self.mark(0);
        }
        if stands {
            self.count_to_limit();
        } else {
            self.e.count(self.instructions.len() as u8);
        }
        if self.polls {
            self.poll();
        }
    }

    fn count_to_limit(&mut self) {
        self.e.count(self.instructions.len() as u8);
        let limit = self.e.jcc(cc::G);
        self.leave(limit, self.stubs.leave_limit, What::Nothing);
    }

    /// Instructions from `index` on, where they are counted.
    fn left(&self, index: usize) -> u8 {
        if self.source.counted() { self.instructions.len().saturating_sub(index) as u8 } else { 0 }
    }

    /// Notes that the code from here on belongs to instruction `index`.
    pub(super) fn mark(&mut self, index: usize) {
        let rip = (self.instructions[index].ip() - self.source.rip) as u16;
        let (saved, live) = (self.flags == Flags::Saved, self.live[index]);
        self.built.map.push(MapEntry::new(self.e.pos(), rip, self.left(index), saved, live));
    }

    /// Keeps registers that the next instructions overwrite and flags are made from.
    fn keep_registers(&mut self, from: usize, count: usize) {
        for place in 0..self.keeps.len() {
            let (index, Keep { what, slot, .. }) = self.keeps[place];
            if let Kept::Register(register) = what
                && (from..from + count).contains(&index)
            {
                let host = self.host_register(number(register).unwrap_or(0), R13);
                self.e.store(flag_operand(slot), host);
            }
        }
    }

    /// The slot that the current instruction's memory operand goes to, if any.
    pub(super) fn memory_kept(&self) -> Option<u8> {
        let here =
            |(index, keep): &&(usize, Keep)| *index == self.current && keep.what == Kept::Memory;
        self.keeps.iter().find(here).map(|(_, keep)| keep.slot)
    }

    /// Flags needed by the current instruction or later ones.
    pub(super) fn live_before(&self) -> u32 {
        self.live[self.current]
    }

    pub(super) fn live_after(&self) -> u32 {
        self.live[self.current + 1]
    }

    /// Makes the host's flags free for checks. Uses r13.
    pub(super) fn free_flags(&mut self) {
        if self.flags == Flags::Host && self.live_before() != 0 {
            self.e.save_flags(R13);
            self.flags = Flags::Saved;
            // From here on a leave finds the flags put aside.
            self.mark(self.current);
        }
    }

    /// Brings live flags back before an instruction that reads some, or writes
    /// only a part of them. Uses r13.
    pub(super) fn need_flags(&mut self, read: u32, written: u32) {
        if self.flags == Flags::Saved
            && (read != 0 || written != 0 && self.live_after() & !written != 0)
        {
            self.e.restore_flags(R13);
            self.flags = Flags::Host;
        }
    }

    pub(super) fn poll(&mut self) {
        self.e.cmp8_imm(REQUEST, 0);
        let place = self.e.jcc(cc::NE);
        self.leave(place, self.stubs.leave_request, What::Nothing);
    }

    pub(super) fn check_second_page(&mut self, rip: u64, id: u32) {
        let page = (rip | 0xFFF).wrapping_add(1);
        self.current = 0;
        self.free_flags();
        let stub = self.stubs.leave_interpret;
        if self.source.relative() {
            let (index, others) = self.e.check_exec(page as i32, id);
            self.leave(index, stub, What::Straddles(id));
            self.leave(others, stub, What::Straddles(id));
            return;
        }
        self.e.cmp32_imm(exec_offset(self.user) + exec_index(page) * 4, id);
        let place = self.e.jcc(cc::NE);
        self.leave(place, stub, What::Straddles(id));
    }

    pub(super) fn emit(&mut self, i: &Instruction, kind: Kind, polled: bool) {
        match kind {
            Kind::Nothing => {}
            Kind::Copy => {
                if !self.copy(i) {
                    self.slow();
                }
            }
            Kind::Lea => self.lea(i),
            Kind::Push => self.push(i),
            Kind::Pop => self.pop(i),
            Kind::Leave => self.leave_frame(),
            Kind::Pushf => self.pushf(),
            Kind::Cli => self.e.store8_imm(offset_of!(CpuState, iflag), 0),
            Kind::Sti => self.sti(),
            Kind::Swapgs => self.swapgs(),
            Kind::Rdtsc => self.rdtsc(false),
            Kind::Rdtscp => self.rdtsc(true),
            Kind::Syscall => self.syscall(i),
            Kind::Sysret => self.sysret(),
            Kind::String { size, moves } => self.string(i, size, moves),
            Kind::BitString => {
                if !self.bit_string(i) {
                    self.slow();
                }
            }
            Kind::ReadSelector(segment) => self.read_selector(i, segment),
            Kind::StoreSelector(segment) => self.store_selector(i, segment),
            Kind::ReadControl(offset) => self.read_control(i, offset),
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
            Kind::Port { out } => self.port(i, out),
            Kind::Interpret => self.interpret(),
        }
    }

    /// Leaves for the interpreter at the current instruction. What follows in
    /// the block, if anything, is reached only through other blocks.
    pub(super) fn interpret(&mut self) {
        let place = self.e.jmp();
        self.interpret_from(place);
        // Later code is entered with whatever the interpreter left: never from here.
    }

    /// The jump at `place` leaves for the interpreter at the current instruction.
    pub(super) fn interpret_from(&mut self, place: u32) {
        let what = What::Instruction(self.built.interpreted.len() as u32);
        self.built.interpreted.push(self.instructions[self.current]);
        self.leave(place, self.stubs.leave_interpret, what);
    }

    /// Leaves for the interpreter at an instruction that has no copy.
    fn slow(&mut self) {
        self.free_flags();
        let place = self.e.jmp();
        self.cold.push(Cold::Slow { place, instruction: self.current });
    }

    /// A conditional leave for the interpreter, after a check that has clobbered
    /// flags which nothing needs: they are made again where it leaves.
    pub(super) fn slow_if(&mut self, condition: u8) {
        let place = self.e.jcc(condition);
        self.cold.push(Cold::Slow { place, instruction: self.current });
    }

    /// The jump at `place` leaves through `stub`, with the guest at the current
    /// instruction.
    pub(super) fn leave(&mut self, place: u32, stub: u64, what: What) {
        let site = self.site(self.current, self.flags == Flags::Saved, what);
        self.cold.push(Cold::Leave { places: vec![place], stub, site });
    }

    /// A place where the block leaves with the instructions before `index` done; where
    /// that is its end, the guest is wherever `rip` is set to.
    pub(super) fn site(&self, index: usize, saved: bool, what: What) -> Site {
        let rip = match self.instructions.get(index) {
            Some(i) => i.ip(),
            None => self.instructions[index - 1].next_ip(),
        };
        let run = (rip - self.source.rip) as u16;
        let dead = (ALL & !self.live[index]) as u8;
        let (relative, left) = (self.source.relative(), self.left(index));
        Site { rip, relative, saved, dead, run, left, block: 0, what }
    }

    pub(super) fn finish(&mut self) {
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
                Cold::Stack { miss, resume, stub, instruction, limit } => {
                    self.e.bind(miss);
                    self.e.mov_imm(R13, limit.into());
                    self.fill(resume, stub, instruction);
                }
                Cold::Slow { place, instruction } => {
                    self.e.bind(place);
                    self.mark_slow(instruction);
                    let call = self.e.call();
                    self.e.bind_outward(call, self.stubs.leave_slow);
                    // Never run: the return address shall belong to this place.
                    self.e.raw(&[0xCC]);
                }
                Cold::Leave { places, stub, site } => {
                    for place in places {
                        self.e.bind(place);
                    }
                    let number = self.built.sites.len() as u32;
                    self.e.store32_imm(offset_of!(CpuState, site), number);
                    self.built.site_numbers.push(self.e.pos() - 4);
                    let jump = self.e.jmp();
                    self.e.bind_outward(jump, stub);
                    self.built.sites.push(site);
                }
            }
        }
    }

    /// Notes that the code from here on leaves at `instruction`, by an address in it.
    fn mark_slow(&mut self, instruction: usize) {
        // The check has been reached with the flags free: saved if they live.
        let live = self.live[instruction];
        let rip = (self.instructions[instruction].ip() - self.source.rip) as u16;
        let left = self.left(instruction);
        self.built.map.push(MapEntry::new(self.e.pos(), rip, left, live != 0, live));
    }

    /// Calls a stub that returns with the access ready to be tried at `retry`.
    pub(super) fn fill(&mut self, retry: u32, stub: u64, instruction: usize) {
        self.mark_slow(instruction);
        let call = self.e.call();
        self.e.bind_outward(call, stub);
        let jump = self.e.jmp();
        self.e.bind_to(jump, retry);
    }
}

/// Whether the block's last instruction may jump back to or before its start.
fn loops_back(last: &Instruction, start: u64) -> bool {
    matches!(last.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
        && last.near_branch_target() <= start
}
