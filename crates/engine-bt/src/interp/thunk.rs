//! x87, MMX, SSE, AVX and their kin, run on the host CPU.
//!
//! The instruction is encoded again with its memory operand replaced by a
//! bounce buffer in the state block, which GS reaches without a base register,
//! so every guest register keeps the host register of its own name. What is
//! left of the instruction's meaning is done here: whether it may run at all,
//! and its memory access with the checks of the guest's MMU.
//!
//! - [`arena`]: executable memory and the switch to guest registers
//! - [`masked`]: gathers and masked moves, whose accesses depend on data

mod arena;
mod masked;

use std::cell::RefCell;
use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpCodeTableKind, OpKind, Register, UsedRegister,
};

use rustc_hash::FxHashMap;

use super::{Flow, operand};
use crate::cpu::Cpu;
use crate::cpu::cpuid::Vendor;
use crate::cpu::fpu::{self, check_mode, class};
use crate::cpu::x87_pointers;
use crate::host::signals;
use crate::state::fault::{Fault, R, Stop, gp, ud, vector};
use crate::state::{CpuState, cr, reg};

pub use arena::{prepare, set_gs_base};

const BOUNCE: usize = offset_of!(CpuState, bounce);
/// The largest memory operand: a YMM register.
const BOUNCE_BYTES: usize = 32;
const _: () = assert!(BOUNCE.is_multiple_of(64) && size_of::<[u64; 16]>() >= BOUNCE_BYTES);

/// Whether a misaligned memory operand is #GP(0).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aligned {
    No,
    /// Unless MXCSR.MM.
    Packed,
    Always,
}

/// An instruction made ready to run.
#[derive(Clone, Copy)]
struct Thunk {
    code: usize,
    class: u8,
    /// Bytes of the memory operand; 0 without one.
    size: u8,
    reads: bool,
    writes: bool,
    /// #GP(0) unless the operand is aligned to its size.
    aligned: Aligned,
    /// Alignment that EFLAGS.AC asks for.
    natural: u8,
    /// The register that stands in for RSP.
    stand_in: Option<u8>,
    /// Changes FOP, FIP and FDP: what is neither a control instruction of x87 (Intel
    /// SDM 1, 8.3.12) nor one of MMX.
    x87_operation: bool,
    /// Stores nothing if it raises an unmasked x87 exception.
    x87_store: bool,
}

/// The thunks of a thread, by instruction without its memory operand. `None`:
/// not an instruction for us.
struct Thunks {
    thunks: FxHashMap<Instruction, Option<Thunk>>,
    slab: Option<arena::Slab>,
    infos: InstructionInfoFactory,
}

/// Instructions remembered, also those that are not ours.
const CACHE_ENTRIES: usize = 4096;

thread_local! {
    static THUNKS: RefCell<Thunks> = RefCell::new(Thunks {
        thunks: FxHashMap::default(),
        slab: None,
        infos: InstructionInfoFactory::new(),
    });
}

/// Why there is no thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// The instruction is not run natively.
    Foreign,
    /// The host gives no executable memory.
    Memory,
}

/// Runs the instruction if it is one for the host CPU.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let done = hint(cpu, i).or_else(|| zero(cpu, i)).or_else(|| masked::execute(cpu, i));
    let done = match done {
        Some(done) => done,
        None => match find(i) {
            Ok(thunk) => run(cpu, i, thunk),
            Err(Missing::Foreign) => return None,
            Err(Missing::Memory) => Err(Stop::Shutdown),
        },
    };
    Some(done.map(|()| Flow::Next))
}

/// VZEROALL and VZEROUPPER: of eight registers outside 64-bit mode (Intel SDM 2C, "VZEROALL"),
/// where the host, which is in it, would take all sixteen.
fn zero(cpu: &mut Cpu, i: &Instruction) -> Option<R<()>> {
    let first = match i.mnemonic() {
        Mnemonic::Vzeroall => 0,
        Mnemonic::Vzeroupper => 2,
        _ => return None,
    };
    let registers = if cpu.st.code64() { 16 } else { 8 };
    Some(check_mode(&cpu.st, class::AVX | class::VEX).map(|()| {
        cpu.st.vec[..registers].iter_mut().for_each(|ymm| ymm.0[first..].fill(0));
    }))
}

/// Instructions that only order or announce memory accesses.
fn hint(cpu: &mut Cpu, i: &Instruction) -> Option<R<()>> {
    match i.mnemonic() {
        Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetch => Some(Ok(())),
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => {
            fence(Ordering::SeqCst);
            Some(Ok(()))
        }
        // Checked as a load of one byte (SDM 2, CLFLUSH).
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => Some(line(cpu, i)),
        _ => None,
    }
}

fn line(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let address = operand::effective_address(cpu, i);
    let address = operand::linear(cpu, i.memory_segment(), address, 1, false)?;
    let user = cpu.user();
    cpu.load(address, 1, user)?;
    fence(Ordering::SeqCst);
    Ok(())
}

/// The instruction as it runs, up to the choice of a register for RSP.
fn canonical(i: &Instruction) -> Instruction {
    let mut new = *i;
    new.set_has_lock_prefix(false);
    new.set_has_xacquire_prefix(false);
    new.set_has_xrelease_prefix(false);
    new.set_has_rep_prefix(false);
    new.set_has_repne_prefix(false);
    new.set_segment_prefix(Register::None);
    if has_memory(i) {
        new.set_segment_prefix(Register::GS);
        new.set_memory_base(Register::None);
        new.set_memory_index(Register::None);
        new.set_memory_index_scale(1);
        new.set_memory_displacement64(BOUNCE as u64);
        new.set_memory_displ_size(8);
    }
    new
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory)
}

fn find(i: &Instruction) -> Result<Thunk, Missing> {
    let key = canonical(i);
    THUNKS.with_borrow_mut(|cache| {
        if let Some(known) = cache.thunks.get(&key) {
            return known.ok_or(Missing::Foreign);
        }
        if cache.thunks.len() >= CACHE_ENTRIES {
            cache.clear();
        }
        let thunk = match cache.build(&key) {
            Ok(thunk) => Some(thunk),
            Err(Missing::Foreign) => None,
            Err(Missing::Memory) => return Err(Missing::Memory),
        };
        cache.thunks.insert(key, thunk);
        thunk.ok_or(Missing::Foreign)
    })
}

impl Thunks {
    fn clear(&mut self) {
        self.thunks.clear();
        if let Some(slab) = &mut self.slab {
            slab.clear();
        }
    }

    fn build(&mut self, i: &Instruction) -> Result<Thunk, Missing> {
        let class = classify(i).ok_or(Missing::Foreign)?;
        let info = self.infos.info(i);
        let mut thunk = Thunk {
            code: 0,
            class,
            size: 0,
            reads: false,
            writes: false,
            aligned: Aligned::No,
            natural: 1,
            stand_in: None,
            x87_operation: class == class::X87 && !x87_control(i),
            x87_store: false,
        };
        if has_memory(i) {
            let [memory] = info.used_memory() else { return Err(Missing::Foreign) };
            thunk.take_operand(i, memory.access())?;
        } else if !info.used_memory().is_empty() {
            return Err(Missing::Foreign);
        }
        let used = info.used_registers().iter().map(UsedRegister::register);
        let (new, stand_in) = without_rsp(i, used)?;
        thunk.stand_in = stand_in;
        let mut encoder = Encoder::new(64);
        encoder.encode(&new, 0).map_err(|_| Missing::Foreign)?;
        thunk.code = self.store(&encoder.take_buffer())?;
        Ok(thunk)
    }

    /// Makes room by forgetting all, if there is none.
    fn store(&mut self, bytes: &[u8]) -> Result<usize, Missing> {
        if self.slab.is_none() {
            self.slab = arena::Slab::new();
        }
        let slab = self.slab.as_mut().ok_or(Missing::Memory)?;
        if let Some(code) = slab.add(bytes) {
            return Ok(code);
        }
        self.thunks.clear();
        slab.clear();
        slab.add(bytes).ok_or(Missing::Memory)
    }
}

impl Thunk {
    /// Notes what becomes of the operand in memory.
    fn take_operand(&mut self, i: &Instruction, access: OpAccess) -> Result<(), Missing> {
        use Mnemonic as M;
        use OpAccess as A;
        let size = i.memory_size().size();
        if size == 0 || size > BOUNCE_BYTES {
            return Err(Missing::Foreign);
        }
        self.size = size as u8;
        self.reads = matches!(
            access,
            A::Read | A::CondRead | A::ReadWrite | A::ReadCondWrite | A::CondWrite
        );
        self.writes = matches!(access, A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite);
        self.aligned = alignment(i, self.class);
        self.natural = match size {
            2 | 4 | 8 | 16 | 32 => self.size,
            10 => 8,
            _ => 1,
        };
        self.x87_store =
            matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp);
        Ok(())
    }
}

/// The instruction with a register that it does not use in the place of RSP, which is
/// the host's stack; and which one that is.
fn without_rsp(
    i: &Instruction,
    used: impl Iterator<Item = Register>,
) -> Result<(Instruction, Option<u8>), Missing> {
    let mut new = *i;
    let full = |register: Register| register.full_register();
    let mut used: Vec<Register> = used.map(full).collect();
    used.extend((0..i.op_count()).map(|op| full(i.op_register(op))));
    if !used.contains(&Register::RSP) {
        return Ok((new, None));
    }
    let stand_in =
        (8..16).find(|&n| !used.contains(&(Register::RAX + n))).ok_or(Missing::Foreign)?;
    for op in 0..i.op_count() {
        let register = i.op_register(op);
        if i.op_kind(op) == OpKind::Register && full(register) == Register::RSP {
            let first = match register.size() {
                8 => Register::RAX,
                4 => Register::EAX,
                2 => Register::AX,
                _ => return Err(Missing::Foreign),
            };
            new.set_op_register(op, first + stand_in);
        }
    }
    Ok((new, Some(stand_in as u8)))
}

fn x87_control(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Fninit
            | M::Fnclex
            | M::Fldcw
            | M::Fnstcw
            | M::Fnstsw
            | M::Fnsetpm
            | M::Fndisi
            | M::Fneni
    )
}

/// Whether the operands, and nothing but them, are what the instruction touches,
/// and what it needs of the mode. `None`: not an instruction for us.
fn classify(i: &Instruction) -> Option<u8> {
    let vex = match i.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    if i.flow_control() != FlowControl::Next
        || i.is_privileged()
        || i.is_stack_instruction()
        || i.is_string_instruction()
        || i.is_save_restore_instruction()
        || i.is_vsib()
    {
        return None;
    }
    let code = i.op_code();
    if code.table() == OpCodeTableKind::Normal && !vex {
        let first = if code.op_code_len() == 2 { code.op_code() >> 8 } else { code.op_code() };
        match first {
            0xD8..=0xDF => return Some(class::X87),
            0x9B => return Some(class::WAIT),
            _ => {}
        }
    }
    let mut class = if vex { class::VEX } else { 0 };
    for op in 0..i.op_count() {
        if i.op_kind(op) != OpKind::Register {
            continue;
        }
        let register = i.op_register(op);
        if register.is_mm() {
            class |= class::MMX;
        } else if register.is_xmm() || register.is_ymm() {
            class |= if vex { class::AVX } else { class::SSE };
        } else if !register.is_gpr() {
            return None;
        }
    }
    class |= class_without_register(i.mnemonic());
    // VMREAD and the like have general registers too: name what is known.
    (class & !class::VEX != 0 || is_known_general(i)).then_some(class)
}

/// What an instruction needs that no register operand may tell.
fn class_without_register(mnemonic: Mnemonic) -> u8 {
    match mnemonic {
        Mnemonic::Emms => class::MMX,
        Mnemonic::Vcvtss2si | Mnemonic::Vcvttss2si | Mnemonic::Vcvtsd2si | Mnemonic::Vcvttsd2si => {
            class::AVX
        }
        // With a memory operand no vector register tells.
        Mnemonic::Cvtss2si
        | Mnemonic::Cvttss2si
        | Mnemonic::Cvtsd2si
        | Mnemonic::Cvttsd2si
        | Mnemonic::Cvtps2pi
        | Mnemonic::Cvttps2pi
        | Mnemonic::Cvtpd2pi
        | Mnemonic::Cvttpd2pi => class::SSE,
        _ => 0,
    }
}

/// Of instructions on general registers and memory, those that run as thunks.
fn is_known_general(i: &Instruction) -> bool {
    let known = i.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            CpuidFeature::BMI1
                | CpuidFeature::BMI2
                | CpuidFeature::ADX
                | CpuidFeature::LZCNT
                | CpuidFeature::POPCNT
                | CpuidFeature::MOVBE
                | CpuidFeature::SSE4_2
        )
    });
    known && !i.cpuid_features().is_empty() || i.mnemonic() == Mnemonic::Movnti
}

/// Whether a misaligned memory operand is #GP(0) (Intel SDM 2, 2.4: types 1, 2
/// and 4 of the exception classes; SDM 1, 14.9 for AVX; AMD APM 1, 4.2.2).
fn alignment(i: &Instruction, class: u8) -> Aligned {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Movaps
        | M::Movapd
        | M::Movdqa
        | M::Movntps
        | M::Movntpd
        | M::Movntdq
        | M::Movntdqa
        | M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => Aligned::Always,
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Pcmpestri
        | M::Pcmpestri64
        | M::Pcmpestrm
        | M::Pcmpestrm64
        | M::Pcmpistri
        | M::Pcmpistrm => Aligned::No,
        _ if class & class::SSE != 0 && i.memory_size().size() >= 16 => Aligned::Packed,
        _ => Aligned::No,
    }
}

/// AMD CPUs do not check the operands of SHA, though they are of type 4 (seen on
/// Zen 5); translated code has whatever the host does.
fn takes_misaligned(cpu: &Cpu, i: &Instruction) -> bool {
    i.cpuid_features() == [CpuidFeature::SHA] && cpu.vm.cpuid.vendor() == Vendor::Amd
}

fn run(cpu: &mut Cpu, i: &Instruction, thunk: Thunk) -> R<()> {
    check_mode(&cpu.st, thunk.class)?;
    let (size, user) = (usize::from(thunk.size), cpu.user());
    let (mut linear, mut offset) = (0, 0);
    if size != 0 {
        // A pending x87 exception comes before the operand is looked at.
        if thunk.class & (class::X87 | class::MMX) != 0
            && !matches!(i.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw)
            && fpu::x87(&cpu.st).0[2] & 0x80 != 0
        {
            run_registers(cpu, &Instruction::with(Code::Wait))?;
        }
        offset = operand::effective_address(cpu, i);
        linear = operand::linear(cpu, i.memory_segment(), offset, size, thunk.writes)?;
        let mut natural = usize::from(thunk.natural);
        if thunk.aligned != Aligned::No && linear & (size as u64 - 1) != 0 {
            let allowed = thunk.aligned == Aligned::Packed && cpu.st.mxcsr & fpu::MXCSR_MM != 0;
            if allowed {
                natural = size;
            } else if !takes_misaligned(cpu, i) {
                return gp(0);
            }
        }
        operand::check_alignment(cpu, linear, natural)?;
        if thunk.writes {
            cpu.probe_write(linear, size, user)?;
        }
        if thunk.reads {
            let mut bytes = [0; BOUNCE_BYTES];
            load(cpu, linear, &mut bytes[..size], user)?;
            set_bounce(&mut cpu.st, &bytes);
        }
    }
    // A store to a device stops the instruction after its x87 side effects; they
    // must not happen twice.
    let ram = cpu.tlb.lookup(linear, user, true).is_some() && linear & 0xFFF <= 0x1000 - 10;
    let undo = (thunk.x87_store && !ram).then(|| {
        cpu.settle_x87_pointers();
        fpu::x87(&cpu.st)
    });
    let stored = if fpu::touches_x87(i) {
        fpu::with_loaded(&mut cpu.st, |st| {
            enter(st, thunk)?;
            if thunk.x87_operation {
                x87_pointers::ran_thunk(st, thunk.code, i.ip(), (size != 0).then_some(offset));
            }
            Ok(!(thunk.x87_store && store_suppressed()))
        })
    } else {
        enter(&mut cpu.st, thunk).map(|()| true)
    };
    let stored = stored.map_err(|host| host_fault(cpu, host))?;
    if thunk.writes && stored {
        let bytes = bounce(&cpu.st);
        let result = match size {
            1 | 2 | 4 | 8 => cpu.store(linear, size, cpu.st.bounce[0], user),
            _ => cpu.store_bytes(linear, &bytes[..size], user),
        };
        if let (Err(_), Some(undo)) = (&result, undo) {
            fpu::set_x87(&mut cpu.st, &undo.0);
        }
        return result;
    }
    Ok(())
}

/// Loads an operand, in one access where the CPU would make one.
fn load(cpu: &mut Cpu, linear: u64, bytes: &mut [u8], user: bool) -> R<()> {
    match bytes.len() {
        size @ (1 | 2 | 4 | 8) => {
            let value = cpu.load(linear, size, user)?;
            bytes.copy_from_slice(&value.to_le_bytes()[..size]);
            Ok(())
        }
        _ => cpu.load_bytes(linear, bytes, user),
    }
}

fn set_bounce(st: &mut CpuState, bytes: &[u8; BOUNCE_BYTES]) {
    for (quad, part) in st.bounce.iter_mut().zip(bytes.chunks_exact(8)) {
        *quad = part.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    }
}

fn bounce(st: &CpuState) -> [u8; BOUNCE_BYTES] {
    let mut bytes = [0; BOUNCE_BYTES];
    for (part, quad) in bytes.chunks_exact_mut(8).zip(&st.bounce) {
        part.copy_from_slice(&quad.to_le_bytes());
    }
    bytes
}

/// Runs the thunk with guest registers. The error is the host's exception.
fn enter(st: &mut CpuState, thunk: Thunk) -> Result<(), u8> {
    let stand_in = thunk.stand_in.map(usize::from);
    if let Some(stand_in) = stand_in {
        st.gpr.swap(reg::RSP, stand_in);
    }
    // SAFETY: `find` made the thunk on this thread, just now; `classify` and the
    // new encoding leave it the registers and the bounce buffer.
    let done = unsafe { arena::run(st, thunk.code) };
    if let Some(stand_in) = stand_in {
        st.gpr.swap(reg::RSP, stand_in);
    }
    if done { Ok(()) } else { Err(signals::cause(st).vector) }
}

/// Whether the x87 store that just ran has raised an unmasked invalid operation,
/// overflow or underflow: it has then stored nothing (Intel SDM 1, 8.5).
fn store_suppressed() -> bool {
    let (mut fcw, mut fsw) = (0u16, 0u16);
    // SAFETY: both store to locals and raise nothing.
    unsafe {
        std::arch::asm!("fnstcw [{}]", "fnstsw [{}]",
            in(reg) &raw mut fcw, in(reg) &raw mut fsw, options(nostack));
    }
    fsw & !fcw & 0b1_1001 != 0
}

/// The guest's exception for one that the host raised.
fn host_fault(cpu: &Cpu, host: u8) -> Stop {
    let guest = match host {
        // Without CR4.OSXMMEXCPT it is #UD (SDM 3A, 2.5).
        vector::XM if cpu.st.cr4 & cr::CR4_OSXMMEXCPT == 0 => vector::UD,
        vector::XM | vector::MF | vector::DE => host,
        vector::GP => return Fault::with_error(vector::GP, 0).into(),
        _ => vector::UD,
    };
    Fault::new(guest).into()
}

/// Raises a pending x87 exception, as waiting instructions do first.
pub fn wait(cpu: &mut Cpu) -> R<()> {
    let mut wait = Instruction::default();
    wait.set_code(Code::Wait);
    run_registers(cpu, &wait)
}

/// Runs an instruction without a memory operand.
fn run_registers(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    match find(i) {
        Ok(thunk) => run(cpu, i, thunk),
        Err(Missing::Foreign) => ud(),
        Err(Missing::Memory) => Err(Stop::Shutdown),
    }
}

#[cfg(test)]
mod tests;
