//! The code of one vCPU: it comes up, waits for the others, does its actions again and again,
//! and leaves when all have done theirs and it has seen all that was sent to it.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tetrarch_memory::GuestMemory;

use super::actions::{self, Action};
use super::layout::*;
use crate::harness::Random;

/// Where a vCPU lets another have its turn, ends, tells what is wrong, and tells of an exception.
pub const YIELD: u8 = 0x81;
pub const END: u8 = 0x82;
pub const WRONG: u8 = 0x83;
pub const FAULT: u8 = 0x84;

/// What of a machine its programs go by.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub vcpus: usize,
    /// vCPUs take turns on one thread: who waits gives its turn away.
    pub turns: bool,
    pub x2apic: bool,
    /// The pages that move are global.
    pub global: bool,
    /// The last vCPU is sent INIT at any time, and starts anew.
    pub victim: bool,
    /// It has KVM's interface: interrupts end by memory, and hypercalls send some.
    pub kvm: bool,
    pub rounds: u8,
}

impl Setup {
    pub fn is_victim(&self, id: usize) -> bool {
        self.victim && id == self.vcpus - 1
    }
}

/// Interrupts of which the last that was sent must be seen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    Low,
    Nmi,
    Wake,
    High,
}

impl Counted {
    pub const ALL: [Self; 4] = [Self::Low, Self::Nmi, Self::Wake, Self::High];

    pub fn vector(self) -> u8 {
        match self {
            Self::Low => 0x40,
            Self::Nmi => 2,
            Self::Wake => 0x55,
            Self::High => 0xE1,
        }
    }

    /// How many were sent to a vCPU by others of the guest.
    pub fn sent(self, to: usize) -> u64 {
        SENT + to as u64 * 64 + self as u64 * 4
    }

    /// And by the host.
    pub fn sent_by_host(self, to: usize) -> u64 {
        self.sent(to) + 0x800
    }

    fn seen(self, id: usize) -> u64 {
        block(id) + 0x80 + self as u64 * 4
    }

    fn seen_of_host(self, id: usize) -> u64 {
        block(id) + 0xA0 + self as u64 * 4
    }

    /// How often its handler ran.
    pub fn received(self, id: usize) -> u64 {
        block(id) + 0x60 + self as u64 * 4
    }
}

const SHOOT: u8 = 0x71;
pub const LOWEST: u8 = 0x61;
pub const TIMER: u8 = 0x91;
const BACK: u8 = 0x80;

/// Of the page [`SHARED`].
pub const SHOOT_REQUEST: u64 = SHARED;
const DONE: u64 = SHARED + 0x40;
pub const ONLINE: u64 = SHARED + 0x80;
pub const INITS: u64 = SHARED + 0xC0;
const ACKNOWLEDGED: u64 = SHARED + 0x100;
const WANTED: u64 = SHARED + 0x200;
pub const SLOT_NOW: u64 = SHARED + 0x300;
/// How often the region has come or gone; odd while it is there.
pub const REGION_GENERATION: u64 = SHARED + 0x340;
pub const HOST_FLAG: u64 = SHARED + 0x380;

/// How a vCPU that sleeps wants to be woken; the numbers are those of [`WANTED`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Waking {
    Interrupt = 1,
    /// With interrupts off.
    Nmi,
    /// By KVM's hypercall, with interrupts off.
    Kick,
}

impl Waking {
    /// Set by whoever has woken the vCPU.
    fn flag(self, id: usize) -> u64 {
        block(id)
            + match self {
                Self::Interrupt => 0x48,
                Self::Nmi => 0x4C,
                Self::Kick => 0x54,
            }
    }
}

/// Of a vCPU's own page.
pub fn progress(id: usize) -> u64 {
    block(id)
}

pub fn own_count(id: usize, place: usize) -> u64 {
    block(id) + 8 + 8 * place as u64
}

/// Where KVM's interface says whether the vCPU is away.
fn steal_time(id: usize) -> u64 {
    block(id) + 0x200
}

/// The guest writes a number here before it is wrong.
pub fn found(id: usize) -> u64 {
    block(id) + 0xF8
}

/// What must never be: what the guest tells at the port [`WRONG`] is an index.
pub const WRONGS: [&str; 16] = [
    "a lock was held by two",
    "the flag was there before the data",
    "old code ran after the flag",
    "old code ran under the lock",
    "the page of before was read after its shootdown",
    "the page of before was executed after its shootdown",
    "the page of before was written after its shootdown",
    "a page was written after its write protection",
    "a page was written and its dirty bit is clear",
    "the processor changed an entry that was not present",
    "memory was not that of the region",
    "a register changed by itself",
    "an MSR changed by itself",
    "an x87 register changed by itself",
    "user mode has another stack pointer",
    "a counter went back",
];

type Done = Result<(), IcedError>;

pub struct Emit {
    pub a: CodeAssembler,
    pub id: usize,
    pub setup: Setup,
    pub random: Random,
}

impl Emit {
    fn new(id: usize, setup: Setup, random: Random) -> Self {
        Self { a: CodeAssembler::new(64).expect("64-bit code"), id, setup, random }
    }

    pub fn below(&mut self, count: u64) -> u64 {
        self.random.next() % count
    }

    pub fn is_victim(&self) -> bool {
        self.setup.is_victim(self.id)
    }

    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let id = self.id;
        (0..self.setup.vcpus).filter(move |&other| other != id)
    }

    pub fn block(&self) -> u64 {
        block(self.id)
    }

    /// An address by one of the two ways to it.
    pub fn either(&mut self, address: u64) -> u64 {
        if self.below(4) == 0 { address + ALIAS } else { address }
    }

    /// In a loop that waits for another vCPU. Keeps flags and registers.
    pub fn relax(&mut self) -> Done {
        if self.setup.turns { self.a.out(u32::from(YIELD), al) } else { self.a.pause() }
    }

    /// Now and then a while in which others do something. Keeps flags and registers.
    pub fn gap(&mut self) -> Done {
        match self.below(16) {
            0..=2 => self.a.out(u32::from(YIELD), al)?,
            3 if self.setup.turns => self.a.out(u32::from(YIELD), al)?,
            3..=5 => {
                for _ in 0..1 << self.below(4) {
                    self.a.pause()?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// `jump` leads on where all is as it must be.
    pub fn require(
        &mut self,
        wrong: usize,
        jump: fn(&mut CodeAssembler, CodeLabel) -> Done,
    ) -> Done {
        let mut fine = self.a.create_label();
        jump(&mut self.a, fine)?;
        self.a.mov(dword_ptr(found(self.id)), eax)?;
        self.a.mov(eax, wrong as u32)?;
        self.a.out(u32::from(WRONG), eax)?;
        self.a.set_label(&mut fine)?;
        self.a.nop()
    }

    /// Writes a register of the local APIC. Clobbers EAX, ECX, EDX.
    pub fn apic(&mut self, register: u32, value: u32) -> Done {
        if self.setup.x2apic {
            self.a.mov(ecx, 0x800 + (register >> 4))?;
            self.a.mov(eax, value)?;
            self.a.xor(edx, edx)?;
            self.a.wrmsr()
        } else {
            self.a.mov(edx, 0xFEE0_0000 + register)?;
            self.a.mov(eax, value)?;
            self.a.mov(dword_ptr(rdx), eax)
        }
    }

    /// Sends an interrupt. Clobbers EAX, ECX, EDX.
    pub fn send(&mut self, low: u32, destination: u32) -> Done {
        if self.setup.x2apic {
            self.a.mov(ecx, 0x830)?;
            self.a.mov(eax, low)?;
            self.a.mov(edx, destination)?;
            self.a.wrmsr()
        } else {
            self.apic(0x310, destination << 24)?;
            self.gap()?;
            self.apic(0x300, low)
        }
    }

    /// Counts an interrupt as sent, before it is. What the victim sends does not count, as it
    /// may be gone in between.
    pub fn note_sent(&mut self, kind: Counted, to: usize) -> Done {
        if self.is_victim() {
            return Ok(());
        }
        self.a.lock().inc(dword_ptr(kind.sent(to)))
    }

    /// Takes a ticket lock. Clobbers EAX.
    pub fn take(&mut self, lock: u64) -> Done {
        let [mut again, mut mine] = [(); 2].map(|()| self.a.create_label());
        self.a.mov(eax, 1)?;
        self.a.lock().xadd(dword_ptr(lock), eax)?;
        self.a.set_label(&mut again)?;
        self.a.cmp(dword_ptr(lock + 4), eax)?;
        self.a.je(mine)?;
        self.relax()?;
        self.a.jmp(again)?;
        self.a.set_label(&mut mine)?;
        self.a.nop()
    }

    pub fn release(&mut self, lock: u64) -> Done {
        self.a.inc(dword_ptr(lock + 4))
    }

    /// Forgets what this vCPU knows of the pages that move. Clobbers RAX and RDX.
    fn flush(&mut self) -> Done {
        match self.below(3) {
            0 => {
                self.a.mov(rax, cr4)?;
                self.a.mov(rdx, rax)?;
                self.a.xor(rdx, 0x80)?;
                self.a.mov(cr4, rdx)?;
                self.a.mov(cr4, rax)?;
            }
            1 if !self.setup.global => {
                self.a.mov(rax, cr3)?;
                self.a.mov(cr3, rax)?;
            }
            _ => {
                for slot in 0..SLOTS {
                    for base in [0, ALIAS, HIGH, HIGH + ALIAS] {
                        self.a.mov(rax, base + SLOT_AT + slot * 4096)?;
                        self.a.invlpg(byte_ptr(rax))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A shootdown, with the lock of the page tables held. Who sleeps with interrupts off is woken
    /// meanwhile. Clobbers RAX, RCX, RDX.
    pub fn shoot(&mut self) -> Done {
        self.a.inc(dword_ptr(SHOOT_REQUEST))?;
        self.gap()?;
        self.flush()?;
        let vector = u32::from(SHOOT);
        let way = self.below(4);
        if way == 0 {
            self.send(0xC_4000 | vector, 0)?;
        } else if way == 1 && self.setup.kvm && !self.setup.global {
            for other in self.others() {
                self.shoot_or_leave_word(other)?;
            }
        } else {
            for other in self.others() {
                self.send(0x4000 | vector, other as u32)?;
                self.gap()?;
            }
        }
        let [mut again, mut first] = [(); 2].map(|()| self.a.create_label());
        self.a.jmp(first)?;
        self.a.set_label(&mut again)?;
        self.relax()?;
        self.serve()?;
        self.a.set_label(&mut first)?;
        self.a.mov(eax, dword_ptr(SHOOT_REQUEST))?;
        for other in self.others() {
            self.a.cmp(dword_ptr(ACKNOWLEDGED + other as u64 * 64), eax)?;
            self.a.jne(again)?;
        }
        Ok(())
    }

    /// Of a vCPU that KVM's interface says is away the TLB is flushed before it comes back, if that
    /// is asked there. Clobbers EAX, ECX, EDX.
    fn shoot_or_leave_word(&mut self, other: usize) -> Done {
        let away = byte_ptr(steal_time(other) + 16);
        let [mut send, mut done] = [(); 2].map(|()| self.a.create_label());
        self.a.mov(al, away)?;
        self.a.test(al, 1)?;
        self.a.jz(send)?;
        self.a.mov(cl, al)?;
        self.a.or(cl, 2)?;
        self.gap()?;
        self.a.lock().cmpxchg(away, cl)?;
        self.a.jne(send)?;
        self.a.mov(eax, dword_ptr(SHOOT_REQUEST))?;
        self.a.mov(dword_ptr(ACKNOWLEDGED + other as u64 * 64), eax)?;
        self.a.jmp(done)?;
        self.a.set_label(&mut send)?;
        self.send(0x4000 | u32::from(SHOOT), other as u32)?;
        self.a.set_label(&mut done)?;
        self.a.nop()
    }

    /// Sleeps until another has answered. Interrupts are on before and after. Of those that go
    /// to sleep the last wakes all others.
    pub fn sleep_until_woken(&mut self, by: Waking) -> Done {
        let woken = dword_ptr(by.flag(self.id));
        let [mut again, mut halt, mut awake] = [(); 3].map(|()| self.a.create_label());
        self.a.cli()?;
        if by == Waking::Nmi {
            // One may come between the look and HLT: its handler goes back to the look.
            self.a.lea(rax, qword_ptr(again))?;
            self.a.mov(qword_ptr(self.halt_range()), rax)?;
            self.a.lea(rax, qword_ptr(halt))?;
            self.a.mov(qword_ptr(self.halt_range() + 8), rax)?;
        }
        self.a.mov(woken, 0)?;
        self.a.mov(eax, by as u32)?;
        self.a.xchg(dword_ptr(WANTED + self.id as u64 * 64), eax)?;
        self.gap()?;
        self.serve()?;
        self.a.set_label(&mut again)?;
        self.a.cmp(woken, 0)?;
        self.a.jne(awake)?;
        if by == Waking::Interrupt {
            self.a.sti()?;
        }
        self.a.set_label(&mut halt)?;
        self.a.hlt()?;
        self.a.cli()?;
        self.a.jmp(again)?;
        self.a.set_label(&mut awake)?;
        self.a.sti()
    }

    /// The addresses between which an NMI has the vCPU look again whether it may sleep.
    fn halt_range(&self) -> u64 {
        self.block() + 0x1E0
    }

    /// Wakes whoever wants to be. Clobbers EAX, ECX, EDX.
    pub fn serve(&mut self) -> Done {
        if self.is_victim() {
            return Ok(());
        }
        for other in self.others() {
            let [mut no, mut by_nmi, mut by_kick] = [(); 3].map(|()| self.a.create_label());
            self.a.xor(eax, eax)?;
            self.a.xchg(dword_ptr(WANTED + other as u64 * 64), eax)?;
            self.a.cmp(eax, Waking::Nmi as i32)?;
            self.a.je(by_nmi)?;
            self.a.ja(by_kick)?;
            self.a.test(eax, eax)?;
            self.a.jz(no)?;
            self.gap()?;
            self.note_sent(Counted::Wake, other)?;
            self.send(0x4000 | u32::from(Counted::Wake.vector()), other as u32)?;
            self.a.jmp(no)?;
            self.a.set_label(&mut by_nmi)?;
            self.note_sent(Counted::Nmi, other)?;
            self.send(0x4400, other as u32)?;
            self.a.jmp(no)?;
            self.a.set_label(&mut by_kick)?;
            self.a.mov(dword_ptr(Waking::Kick.flag(other)), 1)?;
            self.a.mov(eax, 5)?;
            self.a.mov(ecx, other as u32)?;
            self.a.vmcall()?;
            self.a.set_label(&mut no)?;
            self.a.nop()?;
        }
        Ok(())
    }

    fn come_up(&mut self) -> Done {
        self.a.mov(rsp, stack_top(self.id))?;
        self.apic(0xF0, 0x1FF)?;
        self.apic(0x80, 0)?;
        if !self.setup.x2apic {
            self.apic(0xE0, u32::MAX)?;
            self.apic(0xD0, 1 << (24 + self.id))?;
        }
        if self.setup.kvm {
            for (index, offset) in
                [(0x4B56_4D04u32, 0xE0), (0x4B56_4D03, 0x200), (0x4B56_4D01, 0x240)]
            {
                self.a.mov(ecx, index)?;
                self.a.mov(eax, (self.block() + offset) as u32 | 1)?;
                self.a.xor(edx, edx)?;
                self.a.wrmsr()?;
            }
        }
        self.a.sti()?;
        self.a.mov(dword_ptr(ONLINE + self.id as u64 * 4), 1)?;
        if !self.is_victim() {
            for other in self.others() {
                let [mut again, mut there] = [(); 2].map(|()| self.a.create_label());
                self.a.set_label(&mut again)?;
                self.a.cmp(dword_ptr(ONLINE + other as u64 * 4), 0)?;
                self.a.jne(there)?;
                self.relax()?;
                self.a.jmp(again)?;
                self.a.set_label(&mut there)?;
                self.a.nop()?;
            }
        }
        Ok(())
    }

    fn body(&mut self, actions: &[Action]) -> Done {
        let [mut again, mut end] = [(); 2].map(|()| self.a.create_label());
        self.come_up()?;
        self.a.mov(r12d, u32::from(self.setup.rounds) + 1)?;
        self.a.set_label(&mut again)?;
        self.a.nop()?;
        for action in actions {
            actions::emit(self, *action)?;
            self.a.inc(qword_ptr(progress(self.id)))?;
        }
        let vcpus = self.setup.vcpus as i32;
        if self.is_victim() {
            self.a.cmp(dword_ptr(DONE), vcpus - 1)?;
            self.relax()?;
            self.a.jl(again)?;
        } else {
            self.a.dec(r12d)?;
            self.a.jnz(again)?;
        }
        self.a.lock().inc(dword_ptr(DONE))?;
        if self.is_victim() {
            return self.a.out(u32::from(END), al);
        }
        let mut wait = self.a.create_label();
        self.a.set_label(&mut wait)?;
        self.relax()?;
        self.serve()?;
        self.a.cmp(dword_ptr(DONE), vcpus)?;
        self.a.jl(wait)?;
        for kind in Counted::ALL {
            for (sent, seen) in [
                (kind.sent(self.id), kind.seen(self.id)),
                (kind.sent_by_host(self.id), kind.seen_of_host(self.id)),
            ] {
                self.a.mov(eax, dword_ptr(sent))?;
                self.a.cmp(eax, dword_ptr(seen))?;
                self.a.jne(wait)?;
            }
        }
        self.a.jmp(end)?;
        self.a.set_label(&mut end)?;
        self.a.out(u32::from(END), al)
    }

    /// The end of an interrupt whose handler has saved EAX, ECX and EDX.
    fn leave_handler(&mut self, eoi: bool) -> Done {
        let mut done = self.a.create_label();
        if eoi && self.setup.kvm {
            self.a.btr(dword_ptr(self.block() + 0xE0), 0)?;
            self.a.jc(done)?;
        }
        if eoi {
            self.apic(0xB0, 0)?;
        }
        self.a.set_label(&mut done)?;
        self.a.pop(rdx)?;
        self.a.pop(rcx)?;
        self.a.pop(rax)?;
        self.a.iretq()
    }

    fn enter_handler(&mut self) -> Done {
        self.a.push(rax)?;
        self.a.push(rcx)?;
        self.a.push(rdx)?;
        self.gap()
    }

    fn counted(&mut self, kind: Counted) -> Done {
        self.enter_handler()?;
        for (sent, seen) in [
            (kind.sent(self.id), kind.seen(self.id)),
            (kind.sent_by_host(self.id), kind.seen_of_host(self.id)),
        ] {
            self.a.mov(eax, dword_ptr(sent))?;
            self.a.mov(dword_ptr(seen), eax)?;
        }
        self.a.inc(dword_ptr(kind.received(self.id)))?;
        let woken = match kind {
            Counted::Wake => Some(Waking::Interrupt),
            Counted::Nmi => Some(Waking::Nmi),
            _ => None,
        };
        if let Some(by) = woken {
            self.a.mov(dword_ptr(by.flag(self.id)), 1)?;
        }
        if kind == Counted::Nmi {
            let mut elsewhere = self.a.create_label();
            let rip = qword_ptr(rsp + 24);
            self.a.mov(rax, rip)?;
            self.a.cmp(rax, qword_ptr(self.halt_range() + 8))?;
            self.a.ja(elsewhere)?;
            self.a.mov(rcx, qword_ptr(self.halt_range()))?;
            self.a.cmp(rax, rcx)?;
            self.a.jb(elsewhere)?;
            self.a.mov(rip, rcx)?;
            self.a.set_label(&mut elsewhere)?;
            self.a.nop()?;
        }
        self.leave_handler(kind != Counted::Nmi)
    }

    fn handler(&mut self, vector: u8) -> Done {
        if let Some(&kind) = Counted::ALL.iter().find(|kind| kind.vector() == vector) {
            return self.counted(kind);
        }
        match vector {
            // A page that is changed at the moment: again.
            14 => {
                let mut no = self.a.create_label();
                self.a.push(rax)?;
                self.a.mov(rax, cr2)?;
                self.a.btr(rax, HIGH.trailing_zeros() as i32)?;
                self.a.btr(rax, ALIAS.trailing_zeros() as i32)?;
                self.a.sub(rax, SLOT_AT as i32)?;
                self.a.cmp(rax, (SLOTS * 4096) as i32)?;
                self.a.jae(no)?;
                self.relax()?;
                self.a.pop(rax)?;
                self.a.add(rsp, 8)?;
                self.a.iretq()?;
                self.a.set_label(&mut no)?;
                self.a.mov(eax, 14)?;
                self.a.out(u32::from(FAULT), eax)
            }
            0..32 => {
                self.a.mov(eax, u32::from(vector))?;
                self.a.out(u32::from(FAULT), eax)
            }
            SHOOT => {
                self.enter_handler()?;
                self.a.mov(ecx, dword_ptr(SHOOT_REQUEST))?;
                self.gap()?;
                self.flush()?;
                self.gap()?;
                self.a.mov(dword_ptr(ACKNOWLEDGED + self.id as u64 * 64), ecx)?;
                self.leave_handler(true)
            }
            TIMER => {
                self.enter_handler()?;
                self.a.inc(dword_ptr(self.block() + 0x50))?;
                self.leave_handler(true)
            }
            LOWEST => {
                self.enter_handler()?;
                self.a.inc(dword_ptr(self.block() + 0x58))?;
                self.leave_handler(true)
            }
            // User mode is done.
            BACK => {
                self.a.mov(rsp, qword_ptr(self.block() + 0x38))?;
                self.a.sti()?;
                self.a.jmp(qword_ptr(self.block() + 0x40))
            }
            _ => self.a.iretq(),
        }
    }

    /// Does an action in user mode. Clobbers RAX and RCX.
    pub fn in_user_mode(&mut self, body: impl FnOnce(&mut Self) -> Done) -> Done {
        let [mut user, mut back] = [(); 2].map(|()| self.a.create_label());
        let block = self.block();
        let stack = stack_top(self.id) - 0x1800;
        self.a.mov(qword_ptr(block + 0x38), rsp)?;
        self.a.lea(rax, qword_ptr(back))?;
        self.a.mov(qword_ptr(block + 0x40), rax)?;
        self.a.push(i32::from(USER_DATA))?;
        self.a.push(stack as i32)?;
        // Any port may be written there.
        self.a.push(0x3202)?;
        self.a.push(i32::from(USER_CODE64))?;
        self.a.lea(rax, qword_ptr(user))?;
        if self.below(2) == 0 {
            self.a.mov(rcx, HIGH)?;
            self.a.add(rax, rcx)?;
        }
        self.a.push(rax)?;
        self.gap()?;
        self.a.iretq()?;
        self.a.set_label(&mut user)?;
        self.a.nop()?;
        body(self)?;
        self.a.mov(rax, rsp)?;
        self.a.cmp(rax, stack as i32)?;
        self.require(14, CodeAssembler::je)?;
        self.a.int(i32::from(BACK))?;
        self.a.set_label(&mut back)?;
        self.a.nop()
    }

    fn assembled(mut self, at: u64, emit: impl FnOnce(&mut Self) -> Done) -> Vec<u8> {
        emit(&mut self).expect("instructions that exist");
        self.a.assemble(at).expect("code that fits together")
    }
}

/// From real mode to the code of a vCPU.
fn trampoline(memory: &GuestMemory, id: usize) {
    const LONG: u64 = TRAMPOLINE + 0x100;
    const POINTERS: u64 = TRAMPOLINE + 0x200;
    let idt = idt(id);
    for (at, limit, base) in [(POINTERS, 0xFF, GDT), (POINTERS + 16, idt.limit, idt.base)] {
        put(memory, at, &u16::to_le_bytes(limit));
        put64(memory, at + 2, base);
    }
    let real = || {
        let mut a = CodeAssembler::new(16)?;
        a.cli()?;
        a.lgdt(cs_segment(POINTERS - TRAMPOLINE))?;
        a.mov(eax, 0x6A0)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xC000_0080u32)?;
        a.mov(eax, 0x900)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, 0x8001_0033u32)?;
        a.mov(cr0, eax)?;
        a.assemble(0)
    };
    let mut real: Vec<u8> = real().expect("16-bit code");
    // JMP far to 64-bit code, with an offset of 32 bits.
    real.extend([0x66, 0xEA]);
    real.extend((LONG as u32).to_le_bytes());
    real.extend(CODE64.to_le_bytes());
    put(memory, TRAMPOLINE, &real);
    let long = || {
        let mut a = CodeAssembler::new(64)?;
        a.lidt(qword_ptr(POINTERS + 16))?;
        a.mov(eax, u32::from(DATA))?;
        a.mov(ss, eax)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        // It was busy before.
        a.mov(byte_ptr(GDT + u64::from(task(id)) + 5), 0x89)?;
        a.mov(eax, u32::from(task(id)))?;
        a.ltr(eax)?;
        a.mov(rax, code(id))?;
        a.jmp(rax)?;
        a.assemble(LONG)
    };
    put(memory, LONG, &long().expect("64-bit code"));
}

/// A memory operand of LGDT in 16-bit code: its segment's base is the trampoline's page.
fn cs_segment(offset: u64) -> AsmMemoryOperand {
    ptr(offset).cs()
}

/// Puts a vCPU's code, its handlers and their gates into memory.
pub fn load(memory: &GuestMemory, id: usize, setup: Setup, actions: &[Action], seed: u64) {
    let mut random = Random(seed);
    let main = Emit::new(id, setup, random.clone()).assembled(code(id), |e| e.body(actions));
    assert!((main.len() as u64) < HANDLERS, "{} bytes of code", main.len());
    put(memory, code(id), &main);
    let own = [SHOOT, LOWEST, TIMER, BACK];
    let vectors = (0..32).chain(own).chain(Counted::ALL.map(Counted::vector));
    for (number, vector) in (0..).zip(vectors) {
        let at = code(id) + HANDLERS + number * 0x100;
        random.next();
        let handler = Emit::new(id, setup, random.clone()).assembled(at, |e| e.handler(vector));
        assert!(handler.len() <= 0x100, "{} bytes of a handler", handler.len());
        put(memory, at, &handler);
        put_gate(memory, id, vector, at);
    }
    if setup.is_victim(id) {
        trampoline(memory, id);
    }
}
