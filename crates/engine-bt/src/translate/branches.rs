//! Control flow: direct branches and their links, calls, returns, indirect
//! branches.

use std::mem::offset_of;
use std::num::NonZeroU32;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::block::{Link, Site, What};
use super::classify::Kind;
use super::emit::{Address, R13, R14, REQUEST, cc};
use super::job::{Cold, Flags, Job};
use super::liveness::ALL;
use super::operands::number;
use crate::state::CpuState;
use crate::state::block::{branch_offset, exec_index, exec_offset};

impl Job<'_> {
    /// Goes to a known address. `live` are the flags that it may need.
    pub(super) fn direct(&mut self, target: u64, live: u32, polled: bool) {
        let same_page = self.source.in_page(target);
        if !same_page && self.source.relative() {
            self.direct_by_table(target, live);
            return;
        }
        let backward = target <= self.source.rip;
        let mut guard = None;
        let mut places = Vec::new();
        let mut request = None;
        let needs_poll = backward && !polled && !self.source.counted();
        if (needs_poll || !same_page) && self.flags == Flags::Host && live != 0 {
            self.e.save_flags(R13);
            self.flags = Flags::Saved;
        }
        if needs_poll {
            self.e.cmp8_imm(REQUEST, 0);
            request = Some(self.e.jcc(cc::NE));
        }
        if !same_page {
            let cell = exec_offset(self.user) + exec_index(target) * 4;
            guard = Some(self.e.patched_cmp32(cell, u32::MAX));
            places.push(self.e.jcc(cc::NE));
        }
        let jump = self.e.patched_jmp();
        places.push(jump);
        let guard = guard.and_then(NonZeroU32::new);
        self.leave_link(places, target, Link { jump, guard, dead: (ALL & !live) as u8, origin: 0 });
        if let Some(request) = request {
            let after = self.current + 1;
            let site = self.site(after, self.flags == Flags::Saved, What::Nothing);
            let site = Site { rip: target, ..site };
            self.cold.push(Cold::Leave {
                places: vec![request],
                stub: self.stubs.leave_request,
                site,
            });
        }
    }

    /// The jumps at `places` go to `target` until they are linked. A fault there is to
    /// show all flags, needed or not: so it depends on where those are in which
    /// translation the link may go.
    fn leave_link(&mut self, places: Vec<u32>, target: u64, mut link: Link) {
        let way = self.ways.iter().find(|way| way.target == target).copied().unwrap_or_default();
        let mut saved = self.flags == Flags::Saved;
        if way.shown != 0 && !(saved && way.shown & u32::from(link.dead) == 0) {
            if way.needed == 0 && way.shown & !self.end.saved() == 0 {
                // They are still where they were before this block.
                saved = true;
            } else {
                self.built.origins.push(self.end.origin(way.shown & !way.needed));
                link.origin = self.built.origins.len() as u32;
            }
        }
        let site = Site { rip: target, ..self.site(self.current + 1, saved, What::Link(link)) };
        self.cold.push(Cold::Leave { places, stub: self.stubs.leave_link, site });
    }

    /// The same from relative code to another page: which, depends on where this one is
    /// mapped, so the target is looked up as an indirect branch does.
    fn direct_by_table(&mut self, target: u64, live: u32) {
        if self.flags == Flags::Host && live != 0 {
            self.e.save_flags(R13);
        }
        self.flags = Flags::Saved;
        self.relative_address(R13, target);
        let site = self.site(self.current + 1, true, What::Nothing);
        let site = Site { rip: target, dead: 0, ..site };
        self.indirect_from(branch_offset(self.user), site);
    }

    /// Whether the next instruction is a conditional branch that can be patched.
    pub(super) fn before_patched_branch(&self) -> bool {
        let next = self.current + 1;
        self.kinds.get(next) == Some(&Kind::Jcc)
            && self.source.in_page(self.instructions[next].near_branch_target())
    }

    pub(super) fn jcc(&mut self, i: &Instruction, polled: bool) {
        self.need_flags(i.rflags_read(), 0);
        let condition = jcc_opcode(i);
        let target = i.near_branch_target();
        let live = self.live_after();
        if self.source.in_page(target) && (target > self.source.rip || polled) {
            let jump = self.e.patched_jcc(condition);
            let link = Link { jump, guard: None, dead: (ALL & !live) as u8, origin: 0 };
            self.leave_link(vec![jump], target, link);
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
    pub(super) fn loop_(&mut self, i: &Instruction) {
        let live = self.live_after();
        let flags = self.flags;
        let address32 =
            !self.wide || matches!(i.code(), Code::Loop_rel8_64_ECX | Code::Jecxz_rel8_64);
        let is_loop = i.mnemonic() == Mnemonic::Loop;
        if is_loop {
            // 32-bit count: LEA zero-extends, as a write of ECX does.
            self.e.lea(!address32, 1, Address { base: Some(1), index: None, scale: 1, disp: -1 });
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

    pub(super) fn push_return(&mut self, i: &Instruction) {
        let word = self.word();
        self.stack(-word, word as u32, true);
        let next = i.next_ip();
        if self.source.relative() {
            self.relative_address(R13, next);
            self.e.store_at(true, R14, 0, R13);
        } else if !self.wide || next as i64 == i64::from(next as i32) {
            self.e.store_imm_at(self.wide, R14, 0, next as i32);
        } else {
            self.e.mov_imm(R13, next);
            self.e.store_at(true, R14, 0, R13);
        }
        self.move_rsp(-word);
    }

    pub(super) fn call(&mut self, i: &Instruction) {
        self.free_flags();
        self.push_return(i);
        self.direct(i.near_branch_target(), self.live_after(), false);
    }

    /// r13 := the target of an indirect branch. Puts live flags aside.
    pub(super) fn target_to_r13(&mut self, i: &Instruction) {
        self.free_flags();
        if i.op0_kind() == OpKind::Memory {
            let disp = self.operand(i, self.word() as u32, false);
            self.e.load_at(self.wide, R13, R14, disp);
        } else {
            let guest = number(i.op0_register()).unwrap_or(0);
            let host = self.host_register(guest, R13);
            if !self.wide {
                self.e.mov32(R13, host);
            } else if host != R13 {
                self.e.mov(R13, host);
            }
        }
    }

    /// The target is looked up before the return address is stored: a call to a
    /// wild address leaves no trace, and one that is not known yet is interpreted.
    pub(super) fn call_indirect(&mut self, i: &Instruction) {
        let scratch = offset_of!(CpuState, scratch) + 16;
        let target = offset_of!(CpuState, call_target);
        self.target_to_r13(i);
        self.e.store(target, R13);
        // Code that counts has polled at the block's start.
        let poll = !self.source.counted();
        let (miss, request) = self.e.find_target(branch_offset(self.user), poll);
        self.e.store(scratch, R13);
        self.push_return(i);
        self.e.load(R13, target);
        self.e.jmp_state(scratch);
        self.interpret_from(miss);
        if let Some(request) = request {
            self.leave(request, self.stubs.leave_request, What::Nothing);
        }
    }

    pub(super) fn ret(&mut self, i: &Instruction) {
        self.free_flags();
        let word = self.word();
        self.stack(0, word as u32, false);
        self.e.load_at(self.wide, R13, R14, 0);
        let extra = if i.op_count() == 1 { i.immediate16() } else { 0 };
        self.move_rsp(word + i32::from(extra));
        self.indirect();
    }

    /// Jumps to the guest address in r13. All flags have been put aside.
    pub(super) fn indirect(&mut self) {
        self.indirect_to(branch_offset(self.user));
    }

    /// The same with the table of the mode that execution goes on in.
    pub(super) fn indirect_to(&mut self, table: usize) {
        // A target that is not canonical faults at the branch, so whoever leaves
        // tells where it came from.
        let site = Site { dead: 0, ..self.site(self.current, true, What::Branch) };
        self.indirect_from(table, site);
    }

    fn indirect_from(&mut self, table: usize, site: Site) {
        let (miss, request) = self.e.indirect(table);
        self.cold.push(Cold::Leave { places: vec![miss], stub: self.stubs.leave_branch, site });
        let stub = self.stubs.leave_request_branch;
        self.cold.push(Cold::Leave { places: vec![request], stub, site });
    }
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
