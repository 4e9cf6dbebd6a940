//! What a vCPU does: each action is code with an invariant that holds under every schedule.
//!
//! No action waits for something that another vCPU may not do: who waits for an answer gets it
//! from those that are done, too.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::layout::*;
use super::program::*;
use crate::harness::Input;

/// A kind of action, and what chooses among its forms.
#[derive(Clone, Copy, Debug)]
pub struct Action {
    pub kind: Kind,
    pub form: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Adds to a shared word, and to one of its own.
    Count,
    /// Writes data, then a flag.
    Send,
    /// Reads a flag, then the data.
    Receive,
    /// Changes a function, then a flag.
    ChangeFunction,
    /// Reads a flag, serialises, calls the function.
    CallFunction,
    /// Changes what a lock protects.
    Lock,
    /// Rewrites a function under a lock.
    Rewrite,
    /// Calls it under the lock.
    CallRewritten,
    /// Uses the pages that move.
    UseSlot,
    /// Gives a page another frame.
    MoveSlot,
    /// Protects a page, and sees that nobody writes there.
    ProtectSlot,
    /// Takes a page away, and sees whether its dirty bit tells the truth.
    HarvestSlot,
    /// Sends an interrupt that is counted.
    Interrupt,
    Nmi,
    LowestPriority,
    /// INIT and start-up of the last vCPU.
    Restart,
    SleepForTimer,
    SleepUntilWoken,
    /// Wakes who sleeps.
    Serve,
    /// Keeps values in registers for a while.
    Registers,
    Msr,
    X87,
    /// Uses memory that comes and goes.
    Region,
    /// Another action, in user mode.
    User,
}

/// Often what races are about; seldom what takes long.
const KINDS: [Kind; 32] = [
    Kind::Count,
    Kind::Count,
    Kind::Send,
    Kind::Receive,
    Kind::ChangeFunction,
    Kind::ChangeFunction,
    Kind::CallFunction,
    Kind::CallFunction,
    Kind::Lock,
    Kind::Rewrite,
    Kind::Rewrite,
    Kind::CallRewritten,
    Kind::CallRewritten,
    Kind::UseSlot,
    Kind::UseSlot,
    Kind::UseSlot,
    Kind::MoveSlot,
    Kind::ProtectSlot,
    Kind::HarvestSlot,
    Kind::Interrupt,
    Kind::Interrupt,
    Kind::Nmi,
    Kind::LowestPriority,
    Kind::Restart,
    Kind::SleepForTimer,
    Kind::SleepUntilWoken,
    Kind::Serve,
    Kind::Registers,
    Kind::Msr,
    Kind::X87,
    Kind::Region,
    Kind::User,
];

/// The lock of the page tables; those before it are for functions and words.
const TABLES_LOCK: u64 = lock(2);

const fn lock(number: u64) -> u64 {
    LOCKS + number * 0x80
}

type Done = Result<(), IcedError>;

impl Action {
    pub fn read(input: &mut Input) -> Self {
        Self { kind: KINDS[usize::from(input.u8()) % KINDS.len()], form: input.u8() }
    }

    /// Whether a vCPU that can be lost at any time may do it: it must hold no lock.
    fn may_be_lost(self) -> bool {
        use Kind::*;
        !matches!(
            self.kind,
            Lock | Rewrite | CallRewritten | MoveSlot | ProtectSlot | HarvestSlot | Restart
        )
    }
}

pub fn emit(e: &mut Emit, action: Action) -> Done {
    if e.is_victim() && !action.may_be_lost() {
        return e.gap();
    }
    let form = action.form;
    match action.kind {
        Kind::Count => count(e, form),
        Kind::Send => send(e, form),
        Kind::Receive => receive(e, form),
        Kind::ChangeFunction => change_function(e, form),
        Kind::CallFunction => call_function(e, form),
        Kind::Lock => locked_words(e, form),
        Kind::Rewrite => rewrite(e, form),
        Kind::CallRewritten => call_rewritten(e, form),
        Kind::UseSlot => use_slot(e, form),
        Kind::MoveSlot => move_slot(e, form),
        Kind::ProtectSlot => protect_slot(e, form),
        Kind::HarvestSlot => harvest_slot(e, form),
        Kind::Interrupt => interrupt(e, form),
        Kind::Nmi => nmi(e, form),
        Kind::LowestPriority => lowest_priority(e),
        Kind::Restart => restart(e, form),
        Kind::SleepForTimer => sleep_for_timer(e, form),
        // Somebody must be there to wake it.
        Kind::SleepUntilWoken if e.setup.victim && e.setup.vcpus == 2 => sleep_for_timer(e, form),
        Kind::SleepUntilWoken => e.sleep_until_woken(match form & 3 {
            // One that starts up has no handler for an NMI yet.
            2 if !e.is_victim() => Waking::Nmi,
            3 if e.setup.kvm => Waking::Kick,
            _ => Waking::Interrupt,
        }),
        Kind::Serve => e.serve(),
        Kind::Registers => registers(e, form),
        Kind::Msr => msr(e, form),
        Kind::X87 => x87(e, form),
        Kind::Region => region(e, form),
        Kind::User => e.in_user_mode(|e| match form % 8 {
            0 | 1 => count(e, form >> 3),
            2 => receive(e, form >> 3),
            3 => call_function(e, form >> 3),
            4 => send(e, form >> 3),
            5 => change_function(e, form >> 3),
            6 => registers(e, form >> 3),
            _ => use_slot(e, form >> 3),
        }),
    }
}

fn count(e: &mut Emit, form: u8) -> Done {
    let place = usize::from(form) % COUNTED.len();
    let at = e.either(COUNTED[place]);
    for _ in 0..=form >> 6 {
        match form >> 2 & 7 {
            0 | 1 => e.a.lock().inc(qword_ptr(at))?,
            2 | 3 => {
                e.a.mov(eax, 1)?;
                e.a.lock().xadd(qword_ptr(at), rax)?;
            }
            4 => e.a.lock().add(qword_ptr(at), 1)?,
            5 => e.a.lock().sub(qword_ptr(at), -1)?,
            6 => {
                let mut again = e.a.create_label();
                e.a.mov(rax, qword_ptr(at))?;
                e.a.set_label(&mut again)?;
                e.a.lea(rcx, qword_ptr(rax + 1))?;
                e.gap()?;
                e.a.lock().cmpxchg(qword_ptr(at), rcx)?;
                e.a.jne(again)?;
            }
            _ => {
                let mut again = e.a.create_label();
                e.a.mov(eax, dword_ptr(at))?;
                e.a.mov(edx, dword_ptr(at + 4))?;
                e.a.set_label(&mut again)?;
                e.a.mov(ebx, eax)?;
                e.a.mov(ecx, edx)?;
                e.a.add(ebx, 1)?;
                e.a.adc(ecx, 0)?;
                e.gap()?;
                e.a.lock().cmpxchg8b(qword_ptr(at))?;
                e.a.jne(again)?;
            }
        }
        e.a.inc(qword_ptr(own_count(e.id, place)))?;
        e.gap()?;
    }
    Ok(())
}

/// Words of a channel's data, whose last lies in two pages.
const DATA_WORDS: [u64; 4] = [0, 0x44, 0x1FC, 0xFFD];

fn channel(id: usize) -> (u64, u64) {
    // Every second is so far from its neighbour that both have a word across pages.
    (FLAGS + id as u64 * 0x100, CHANNEL_DATA + id as u64 * 4)
}

fn data_word(id: usize, word: u64) -> u64 {
    let (_, data) = channel(id);
    // The word across pages has place for one vCPU; of the others it is near.
    if word == 0xFFD && id != 0 { data + 0xFC0 } else { data + word }
}

fn send(e: &mut Emit, form: u8) -> Done {
    let (flag, _) = channel(e.id);
    let own = dword_ptr(e.block() + 0x30);
    e.a.mov(eax, own)?;
    e.a.inc(eax)?;
    for word in DATA_WORDS {
        let at = e.either(data_word(e.id, word));
        match form & 3 {
            0 | 1 => e.a.mov(dword_ptr(at), eax)?,
            2 => {
                e.a.mov(edi, at as u32)?;
                e.a.mov(ecx, 1)?;
                e.a.rep().stosd()?;
            }
            _ => {
                e.a.movd(xmm1, eax)?;
                e.a.movss(dword_ptr(at), xmm1)?;
            }
        }
        e.gap()?;
    }
    let flag = e.either(flag);
    if form & 4 == 0 {
        e.a.mov(dword_ptr(flag), eax)?;
    } else {
        e.a.mov(ecx, eax)?;
        e.a.xchg(dword_ptr(flag), ecx)?;
    }
    e.a.mov(own, eax)
}

fn receive(e: &mut Emit, form: u8) -> Done {
    let from = usize::from(form) % e.setup.vcpus;
    let (flag, _) = channel(from);
    let flag = e.either(flag);
    e.a.mov(ebx, dword_ptr(flag))?;
    let first = usize::from(form >> 2) % DATA_WORDS.len();
    for number in 0..DATA_WORDS.len() {
        let word = DATA_WORDS[(first + number) % DATA_WORDS.len()];
        let at = e.either(data_word(from, word));
        e.gap()?;
        e.a.mov(eax, dword_ptr(at))?;
        if word == 0xFFD && from == 0 {
            // It is not written at once: a carry is seen before or after the rest.
            e.a.cmp(ebx, 0xF0)?;
            let mut any = e.a.create_label();
            e.a.ja(any)?;
            e.a.cmp(eax, ebx)?;
            e.require(1, CodeAssembler::jae)?;
            e.a.set_label(&mut any)?;
            e.a.nop()?;
        } else {
            e.a.cmp(eax, ebx)?;
            e.require(1, CodeAssembler::jae)?;
        }
    }
    e.a.cmp(dword_ptr(flag), ebx)?;
    e.require(15, CodeAssembler::jae)
}

/// The function whose immediate, which lies in a doubleword, changes; and its flag.
fn function(owner: usize) -> (u64, u64) {
    (FUNCTIONS + owner as u64 * 0x1000 + 3, FLAGS + 0x800 + owner as u64 * 0x40)
}

fn change_function(e: &mut Emit, form: u8) -> Done {
    let (function, flag) = function(e.id);
    let immediate = e.either(function + 1);
    e.a.mov(eax, dword_ptr(function + 1))?;
    e.a.inc(eax)?;
    match form & 3 {
        0 | 1 => e.a.mov(dword_ptr(immediate), eax)?,
        2 => {
            e.a.mov(ecx, eax)?;
            e.a.xchg(dword_ptr(immediate), ecx)?;
        }
        _ => {
            e.a.movnti(dword_ptr(immediate), eax)?;
            e.a.sfence()?;
        }
    }
    e.gap()?;
    e.a.mov(dword_ptr(flag), eax)?;
    if form & 4 != 0 {
        call(e, function, flag)?;
    }
    Ok(())
}

fn call_somehow(e: &mut Emit, function: u64) -> Done {
    match e.below(4) {
        0 => {
            e.a.mov(rax, function)?;
            e.a.call(rax)
        }
        1 => {
            e.a.mov(rax, function + HIGH)?;
            e.a.call(rax)
        }
        _ => e.a.call(function),
    }
}

fn call(e: &mut Emit, function: u64, flag: u64) -> Done {
    e.a.mov(esi, dword_ptr(flag))?;
    e.a.xor(eax, eax)?;
    e.a.cpuid()?;
    e.gap()?;
    let function = e.either(function);
    call_somehow(e, function)?;
    e.a.cmp(eax, esi)?;
    e.require(2, CodeAssembler::jae)
}

fn call_function(e: &mut Emit, form: u8) -> Done {
    let owner = usize::from(form) % (e.setup.vcpus + 1);
    if owner == e.setup.vcpus {
        return call(e, FUNCTIONS + MAX_VCPUS as u64 * 0x1000 + 3, HOST_FLAG);
    }
    let (function, flag) = function(owner);
    call(e, function, flag)
}

fn locked_words(e: &mut Emit, form: u8) -> Done {
    let lock = lock(u64::from(form) % 2);
    let (owner, first, second) = (lock + 8, lock + 16, lock + 0x40);
    e.take(lock)?;
    e.a.mov(dword_ptr(owner), e.id as i32)?;
    e.a.mov(rbx, qword_ptr(first))?;
    e.a.inc(rbx)?;
    e.gap()?;
    e.a.mov(qword_ptr(first), rbx)?;
    e.gap()?;
    e.a.inc(qword_ptr(second))?;
    e.a.cmp(rbx, qword_ptr(second))?;
    e.require(0, CodeAssembler::je)?;
    e.a.cmp(dword_ptr(owner), e.id as i32)?;
    e.require(0, CodeAssembler::je)?;
    e.release(lock)
}

/// A function that is rewritten under a lock: its place, the lock and its version.
fn rewritten(form: u8) -> (u64, u64, u64) {
    let number = u64::from(form) % 2;
    let offset = [0x10, 0x3E, 0x800, 0xFFD][usize::from(form >> 1) % 4];
    let version = 0x20 + u64::from(form >> 1) % 4 * 4;
    (LOCKED_FUNCTIONS + number * 0x2000 + offset, lock(number), lock(number) + version)
}

fn rewrite(e: &mut Emit, form: u8) -> Done {
    const LENGTH: u64 = 12;
    let (function, lock, version) = rewritten(form);
    // The same value by other instructions: `value` is where the immediate begins.
    let (bytes, value): (&[u8], u64) = match form >> 3 & 3 {
        0 => (&[0xB8, 0, 0, 0, 0, 0xC3], 1),
        1 => (&[0x90, 0xB8, 0, 0, 0, 0, 0x90, 0xC3], 2),
        2 => (&[0x31, 0xC0, 0x05, 0, 0, 0, 0, 0xC3], 3),
        _ => (&[0x48, 0xC7, 0xC0, 0, 0, 0, 0, 0xEB, 0x01, 0xCC, 0xC3], 3),
    };
    let scratch = e.block() + 0x100;
    e.take(lock)?;
    let mut padded = [0xCC; LENGTH as usize];
    padded[..bytes.len()].copy_from_slice(bytes);
    for (number, word) in padded.chunks(4).enumerate() {
        let word = u32::from_le_bytes(word.try_into().expect("four bytes"));
        e.a.mov(dword_ptr(scratch + number as u64 * 4), word as i32)?;
    }
    e.a.mov(eax, dword_ptr(version))?;
    e.a.inc(eax)?;
    e.a.mov(dword_ptr(scratch + value), eax)?;
    e.a.mov(dword_ptr(version), eax)?;
    let at = e.either(function);
    e.gap()?;
    match form >> 5 & 3 {
        0 => {
            e.a.mov(esi, scratch as u32)?;
            e.a.mov(edi, at as u32)?;
            e.a.mov(ecx, LENGTH as u32)?;
            e.a.rep().movsb()?;
        }
        1 => {
            for offset in (0..LENGTH).step_by(4) {
                e.a.mov(eax, dword_ptr(scratch + offset))?;
                e.a.mov(dword_ptr(at + offset), eax)?;
                e.gap()?;
            }
        }
        2 => {
            for offset in (0..LENGTH).rev() {
                e.a.mov(al, byte_ptr(scratch + offset))?;
                e.a.mov(byte_ptr(at + offset), al)?;
            }
        }
        _ => {
            e.a.movq(xmm2, qword_ptr(scratch))?;
            e.a.movd(xmm3, dword_ptr(scratch + 8))?;
            e.a.movq(qword_ptr(at), xmm2)?;
            e.gap()?;
            e.a.movd(dword_ptr(at + 8), xmm3)?;
        }
    }
    e.gap()?;
    e.release(lock)
}

fn call_rewritten(e: &mut Emit, form: u8) -> Done {
    let (function, lock, version) = rewritten(form);
    e.take(lock)?;
    e.a.xor(eax, eax)?;
    e.a.cpuid()?;
    e.gap()?;
    let at = e.either(function);
    call_somehow(e, at)?;
    e.a.cmp(eax, dword_ptr(version))?;
    e.require(3, CodeAssembler::je)?;
    e.release(lock)
}

fn use_slot(e: &mut Emit, form: u8) -> Done {
    let slot = u64::from(form) % SLOTS;
    let base = SLOT_AT + slot * 4096;
    let own = 0x400 + e.id as u64 * 64;
    let page = e.either(base);
    for number in 0..3 {
        match (form >> 1).wrapping_add(number * 3) % 8 {
            0 | 1 => {
                e.a.mov(eax, dword_ptr(page + SLOT_MAGIC))?;
                e.a.cmp(eax, MAGIC)?;
                e.require(4, CodeAssembler::je)?;
            }
            2 if e.below(2) == 0 => {
                e.a.mov(rdi, HIGH + page)?;
                e.a.mov(dword_ptr(rdi + own), r12d)?;
            }
            2 => e.a.mov(dword_ptr(page + own), r12d)?,
            3 => e.a.lock().inc(dword_ptr(page + own + 4))?,
            4 => {
                call_somehow(e, page + SLOT_FUNCTION)?;
                e.a.cmp(eax, MAGIC)?;
                e.require(5, CodeAssembler::je)?;
            }
            // Both pages at once.
            5 => {
                let first = e.either(SLOT_AT);
                e.a.mov(qword_ptr(first + 0xFFC), r12)?;
            }
            6 => {
                let first = e.either(SLOT_AT);
                e.a.lock().inc(qword_ptr(first + 0xFFC))?;
            }
            _ => {
                e.a.mov(esi, (page + SLOT_MAGIC) as u32)?;
                e.a.mov(edi, (e.block() + 0x140) as u32)?;
                e.a.mov(ecx, 4)?;
                e.a.rep().movsb()?;
                e.a.mov(eax, dword_ptr(e.block() + 0x140))?;
                e.a.cmp(eax, MAGIC)?;
                e.require(4, CodeAssembler::je)?;
            }
        }
        e.gap()?;
    }
    Ok(())
}

/// Puts the frame that a slot has (or, by 1, the other) into RDI.
fn frame(e: &mut Emit, slot: u64, other: i32) -> Done {
    e.a.mov(edi, dword_ptr(SLOT_NOW + slot * 4))?;
    e.a.xor(edi, other)?;
    e.a.shl(edi, 12)?;
    e.a.add(edi, frames(slot) as i32)
}

fn entry(slot: u64) -> AsmMemoryOperand {
    qword_ptr(SLOT_PT + slot * 8)
}

fn move_slot(e: &mut Emit, form: u8) -> Done {
    let slot = u64::from(form) % SLOTS;
    let words = slot_words(e.setup.vcpus);
    let flags = if e.setup.global { PAGE | GLOBAL } else { PAGE };
    e.take(TABLES_LOCK)?;
    frame(e, slot, 1)?;
    for &word in &words {
        e.a.mov(eax, dword_ptr(rdi + word))?;
        e.a.cmp(eax, POISON)?;
        e.require(6, CodeAssembler::je)?;
        e.a.mov(dword_ptr(rdi + word), 0)?;
    }
    e.a.mov(dword_ptr(rdi + SLOT_MAGIC), MAGIC)?;
    e.a.mov(dword_ptr(rdi + SLOT_FUNCTION + 1), MAGIC)?;
    if form & 2 != 0 {
        e.a.mov(entry(slot), 0)?;
        e.shoot()?;
        frame(e, slot, 1)?;
    }
    // As Linux does, accessed and dirty bits are left to the processor at times.
    let flags = if form & 4 != 0 { flags & !0x60 } else { flags };
    e.a.lea(rax, qword_ptr(rdi + flags))?;
    e.a.mov(entry(slot), rax)?;
    e.gap()?;
    e.shoot()?;
    frame(e, slot, 0)?;
    for &word in &words {
        e.a.mov(dword_ptr(rdi + word), POISON)?;
    }
    e.a.mov(dword_ptr(rdi + SLOT_MAGIC), POISON)?;
    e.a.mov(dword_ptr(rdi + SLOT_FUNCTION + 1), POISON)?;
    e.a.xor(dword_ptr(SLOT_NOW + slot * 4), 1)?;
    e.release(TABLES_LOCK)
}

/// Adds what is written in the frame in RDI up, into EAX.
fn sum(e: &mut Emit) -> Done {
    e.a.xor(eax, eax)?;
    for word in slot_words(e.setup.vcpus) {
        e.a.add(eax, dword_ptr(rdi + word))?;
        e.a.rol(eax, 3)?;
    }
    Ok(())
}

fn while_others_run(e: &mut Emit, form: u8) -> Done {
    for _ in 0..=form >> 5 {
        e.relax()?;
    }
    Ok(())
}

fn protect_slot(e: &mut Emit, form: u8) -> Done {
    let slot = u64::from(form) % SLOTS;
    e.take(TABLES_LOCK)?;
    if form & 2 != 0 {
        e.a.lock().and(entry(slot), -3)?;
    } else {
        e.a.lock().btr(entry(slot), 1)?;
    }
    e.shoot()?;
    frame(e, slot, 0)?;
    sum(e)?;
    e.a.mov(esi, eax)?;
    while_others_run(e, form)?;
    sum(e)?;
    e.a.cmp(eax, esi)?;
    e.require(7, CodeAssembler::je)?;
    e.a.lock().or(entry(slot), 2)?;
    e.release(TABLES_LOCK)
}

fn harvest_slot(e: &mut Emit, form: u8) -> Done {
    let slot = u64::from(form) % SLOTS;
    let mut dirty = e.a.create_label();
    e.take(TABLES_LOCK)?;
    e.a.lock().and(entry(slot), -0x41)?;
    e.shoot()?;
    frame(e, slot, 0)?;
    sum(e)?;
    e.a.mov(esi, eax)?;
    while_others_run(e, form)?;
    e.a.xor(ebx, ebx)?;
    e.a.xchg(entry(slot), rbx)?;
    e.gap()?;
    e.shoot()?;
    e.a.test(ebx, 0x40)?;
    e.a.jnz(dirty)?;
    frame(e, slot, 0)?;
    sum(e)?;
    e.a.cmp(eax, esi)?;
    e.require(8, CodeAssembler::je)?;
    e.a.set_label(&mut dirty)?;
    e.a.mov(rax, entry(slot))?;
    e.a.test(rax, rax)?;
    e.require(9, CodeAssembler::je)?;
    e.a.mov(entry(slot), rbx)?;
    e.release(TABLES_LOCK)
}

fn interrupt(e: &mut Emit, form: u8) -> Done {
    let kind = if form & 1 == 0 { Counted::Low } else { Counted::High };
    let vector = u32::from(kind.vector());
    let one = usize::from(form >> 4) % e.setup.vcpus;
    let all: Vec<usize> = (0..e.setup.vcpus).collect();
    let others: Vec<usize> = e.others().collect();
    // Logical destinations of one cluster are masks in both modes.
    let mask = u32::from(form >> 4) & ((1 << e.setup.vcpus) - 1);
    let hypercall = e.setup.kvm && form >> 1 & 7 == 7;
    let masked = all.iter().copied().filter(|id| mask >> id & 1 != 0).collect();
    let (to, low, destination): (Vec<usize>, u32, u32) = match form >> 1 & 7 {
        0 | 1 => (vec![one], 0x4000, one as u32),
        2 => (vec![e.id], 0x4_4000, 0),
        3 => (all, 0x8_4000, 0),
        4 => (others, 0xC_4000, 0),
        5 if mask != 0 => (masked, 0x4800, mask),
        7 if hypercall => (masked, 0x4000, mask),
        6 => (all, 0x4000, if e.setup.x2apic { u32::MAX } else { 0xFF }),
        _ => (vec![one], 0x4000, one as u32),
    };
    for to in to {
        e.note_sent(kind, to)?;
    }
    e.gap()?;
    if hypercall {
        e.a.mov(eax, 10)?;
        e.a.mov(ebx, destination)?;
        e.a.xor(ecx, ecx)?;
        e.a.xor(edx, edx)?;
        e.a.mov(esi, low | vector)?;
        return e.a.vmcall();
    }
    e.send(low | vector, destination)
}

fn nmi(e: &mut Emit, form: u8) -> Done {
    // One that starts up has no handler for it yet.
    let steady = e.setup.vcpus - usize::from(e.setup.victim);
    let one = usize::from(form >> 2) % steady;
    let others = form & 3 == 0 && !e.setup.victim;
    let to = if others { e.others().collect() } else { vec![one] };
    for to in to {
        e.note_sent(Counted::Nmi, to)?;
    }
    e.gap()?;
    if others { e.send(0xC_4400, 0) } else { e.send(0x4400, one as u32) }
}

fn lowest_priority(e: &mut Emit) -> Done {
    let all = (1 << e.setup.vcpus) - 1;
    e.send(0x4900 | u32::from(LOWEST), all)
}

fn restart(e: &mut Emit, form: u8) -> Done {
    if !e.setup.victim {
        return e.gap();
    }
    let victim = e.setup.vcpus - 1;
    let online = dword_ptr(ONLINE + victim as u64 * 4);
    let start = 0x4600 | (TRAMPOLINE >> 12) as u32;
    let [mut again, mut there] = [(); 2].map(|()| e.a.create_label());
    e.take(TABLES_LOCK)?;
    e.a.mov(online, 0)?;
    e.a.lock().inc(dword_ptr(INITS))?;
    for _ in 0..=form & 1 {
        e.send(0x4500, victim as u32)?;
        e.gap()?;
    }
    if form & 2 != 0 {
        // The de-assert that old systems send.
        e.send(0x8500, victim as u32)?;
    }
    while_others_run(e, form)?;
    for _ in 0..=form >> 2 & 1 {
        e.send(start, victim as u32)?;
        e.gap()?;
    }
    e.a.set_label(&mut again)?;
    e.a.cmp(online, 0)?;
    e.a.jne(there)?;
    e.relax()?;
    e.a.jmp(again)?;
    e.a.set_label(&mut there)?;
    e.release(TABLES_LOCK)
}

fn sleep_for_timer(e: &mut Emit, form: u8) -> Done {
    let ticks = dword_ptr(e.block() + 0x50);
    let mut again = e.a.create_label();
    e.a.cli()?;
    e.a.mov(ebx, ticks)?;
    let ahead = 1 << (form >> 1 & 15);
    if form & 1 == 0 {
        e.apic(0x3E0, 0xB)?;
        e.apic(0x320, u32::from(TIMER))?;
        e.apic(0x380, ahead)?;
    } else {
        e.apic(0x320, 1 << 18 | u32::from(TIMER))?;
        e.a.mfence()?;
        e.a.rdtsc()?;
        e.a.add(eax, ahead as i32)?;
        e.a.adc(edx, 0)?;
        e.a.mov(ecx, 0x6E0)?;
        e.a.wrmsr()?;
    }
    e.gap()?;
    e.a.set_label(&mut again)?;
    e.a.sti()?;
    e.a.hlt()?;
    e.a.cli()?;
    e.a.cmp(ticks, ebx)?;
    e.a.je(again)?;
    e.a.sti()
}

fn registers(e: &mut Emit, form: u8) -> Done {
    let value = e.random.next();
    e.a.mov(r13, value)?;
    e.a.movq(xmm7, r13)?;
    e.a.mov(r9, !value)?;
    e.a.movq(xmm13, r9)?;
    for _ in 0..=form & 3 {
        e.gap()?;
    }
    if form & 4 != 0 {
        e.a.call(FUNCTIONS + 3)?;
    }
    for register in [xmm7, xmm13] {
        e.a.movq(rax, register)?;
        if register == xmm13 {
            e.a.not(rax)?;
        }
        e.a.cmp(rax, r13)?;
        e.require(11, CodeAssembler::je)?;
    }
    e.a.not(r9)?;
    e.a.cmp(r9, r13)?;
    e.require(11, CodeAssembler::je)
}

fn msr(e: &mut Emit, form: u8) -> Done {
    let indices: [u32; 5] = [0xC000_0102, 0xC000_0100, 0xC000_0081, 0x175, 0x277];
    let index = indices[usize::from(form) % indices.len()];
    let value: u32 = if index == 0x277 { 0x0007_0406 } else { e.random.next() as u32 };
    e.a.mov(ecx, index)?;
    e.a.mov(eax, value)?;
    e.a.mov(edx, if index == 0x277 { 0x0007_0406 } else { 0x55 })?;
    e.a.wrmsr()?;
    e.gap()?;
    e.gap()?;
    e.a.xor(eax, eax)?;
    e.a.mov(ecx, index)?;
    e.a.rdmsr()?;
    e.a.cmp(eax, value)?;
    e.require(12, CodeAssembler::je)
}

fn x87(e: &mut Emit, form: u8) -> Done {
    let scratch = qword_ptr(e.block() + 0x180);
    e.a.mov(eax, e.random.next() as u32)?;
    e.a.mov(scratch, rax)?;
    e.a.mov(r8, rax)?;
    e.a.fninit()?;
    e.a.fild(scratch)?;
    for _ in 0..=form & 3 {
        e.gap()?;
    }
    e.a.fistp(scratch)?;
    e.a.mov(rax, scratch)?;
    e.a.cmp(rax, r8)?;
    e.require(13, CodeAssembler::je)
}

/// What the host answers where no region is.
pub const NO_REGION: u32 = 0x5A5A_1234;

fn region(e: &mut Emit, form: u8) -> Done {
    let [mut none, mut compare, mut changed] = [(); 3].map(|()| e.a.create_label());
    let own = e.id as u64 * 8;
    let word = [0x10, 0xFF8, 0xFFE, 0x1800][usize::from(form) % 4];
    e.a.mov(ebx, dword_ptr(REGION_GENERATION))?;
    e.gap()?;
    if form & 4 != 0 {
        e.a.mov(dword_ptr(REGION_AT + 0x100 + own), r12d)?;
        e.gap()?;
    }
    if form & 8 != 0 {
        e.a.lock().inc(dword_ptr(REGION_AT + 0x104 + own))?;
    }
    if word == 0xFFE {
        // Across pages: two reads where there is no memory.
        e.a.mov(ax, word_ptr(REGION_AT + 0x10))?;
        e.a.mov(eax, dword_ptr(REGION_AT + word))?;
        return Ok(());
    }
    e.a.mov(eax, dword_ptr(REGION_AT + word))?;
    e.gap()?;
    e.a.cmp(ebx, dword_ptr(REGION_GENERATION))?;
    e.a.jne(changed)?;
    e.a.test(ebx, 1)?;
    e.a.jz(none)?;
    e.a.cmp(eax, ebx)?;
    e.a.jmp(compare)?;
    e.a.set_label(&mut none)?;
    e.a.cmp(eax, NO_REGION)?;
    e.a.set_label(&mut compare)?;
    e.require(10, CodeAssembler::je)?;
    e.a.set_label(&mut changed)?;
    e.a.nop()
}
