//! What the manuals leave to the model of the CPU. A test that compares with the
//! host accepts what stands here, and nothing beyond it; docs/testing.md has the
//! same list in words.

use std::sync::OnceLock;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits, UsedMemory,
};

use super::case::{
    AC_FLAG, CODE, CODE_PAGES, Case, DATA, DATA_HIGH, DATA_PAGES, Fault, GS_BASE, HOLE, Outcome,
    PAGE, READ_ONLY, State,
};

pub const UD: u8 = 6;
pub const SS: u8 = 12;
pub const GP: u8 = 13;
pub const PF: u8 = 14;
pub const AC: u8 = 17;

/// An exception of the x87 that is not masked waits (Intel SDM 1, 8.1.3.3).
const FSW_ES: u16 = 1 << 7;

/// Error code bits of #PF.
const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;

/// Iced's flag bits as RFLAGS has them.
pub fn rflags(bits: u32) -> u64 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |flags, (_, at)| flags | 1 << at)
}

/// Flags that are undefined after an instruction (Intel SDM 1, appendix A), also
/// where iced, which knows no counts, or the manual's "if the count is 0", say too
/// little.
pub fn undefined(i: &Instruction) -> u64 {
    use Mnemonic as M;
    let flags = rflags(i.rflags_undefined());
    const OF_AF: u64 = 0x810;
    match i.mnemonic() {
        M::Shl | M::Sal | M::Shr => {
            let size = i.op0_register().size().max(i.memory_size().size());
            flags | OF_AF | if size < 4 { 1 } else { 0 }
        }
        M::Sar | M::Shld | M::Shrd => flags | OF_AF,
        M::Rol | M::Ror | M::Rcl | M::Rcr => flags | 0x800,
        _ => flags,
    }
}

/// Whether a result as such is undefined.
pub fn undefined_result(i: &Instruction) -> bool {
    match i.mnemonic() {
        // Of 16 bits (Intel SDM 2A, "BSWAP").
        Mnemonic::Bswap => i.op0_register().size() == 2,
        // By more than 16 bits of 16 (Intel SDM 2B, "SHLD").
        Mnemonic::Shld | Mnemonic::Shrd => {
            let narrow = i.op0_register().size().max(i.memory_size().size()) == 2;
            narrow && (i.op2_kind() == OpKind::Register || i.immediate8() & 31 > 16)
        }
        // REP prefixes are reserved here (Intel SDM 2A, 2.1.1); AMD's microcode takes
        // the condition from them.
        Mnemonic::Loope | Mnemonic::Loopne => i.has_rep_prefix() || i.has_repne_prefix(),
        // Of 16 bits: some CPUs read 16 and some 32 (AMD APM 3, "MOVSXD").
        _ => i.code() == Code::Movsxd_r16_rm16,
    }
}

/// The bytes of the program at an address, decoded.
pub fn instruction_at(case: &Case, rip: u64) -> Option<Instruction> {
    let at = rip.checked_sub(case.start.rip)? as usize;
    let bytes = case.code.get(at..).filter(|bytes| !bytes.is_empty())?;
    Some(Decoder::with_ip(case.bits(), bytes, rip, DecoderOptions::NONE).decode())
}

fn canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

/// Whether the CPU's addresses have 57 bits: then more of them are canonical than
/// in the guest.
fn five_levels() -> bool {
    static FLAG: OnceLock<bool> = OnceLock::new();
    *FLAG.get_or_init(|| {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        info.lines().any(|line| line.starts_with("flags") && line.split(' ').any(|f| f == "la57"))
    })
}

/// Why there is nothing to compare a guest with.
pub fn left_out(case: &Case, native: &Outcome) -> Option<&'static str> {
    let fault = native.fault;
    if case.kernel && fault.vector == PF && fault.cr2 >> 63 != 0 {
        // The upper half is the guest kernel's own.
        return Some("kernel code in the upper half");
    }
    if five_levels() && fault.vector == PF && !canonical(fault.cr2) {
        return Some("an address that is canonical with five levels of tables");
    }
    // Linux can refuse them (split_lock_detect=fatal).
    let locked = instruction_at(case, native.state.rip)
        .is_some_and(|i| i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg);
    (fault.vector == AC && locked && native.state.rflags & AC_FLAG == 0)
        .then_some("a locked access across two lines")
}

/// Whether both faults are ones that the instruction at which they came can raise
/// for its memory operands: which comes first is the model's choice, even for one
/// operand where several apply (Intel SDM 3A, 6.9; AMD APM 2, 8.5).
pub fn both_apply(case: &Case, at: &State, one: Fault, other: Fault) -> bool {
    let Some(i) = instruction_at(case, at.rip) else { return false };
    let mut factory = InstructionInfoFactory::new();
    let memory = factory.info(&i).used_memory();
    let applies = |fault| memory.iter().any(|m| operand_raises(case, &i, m, at, fault));
    applies(one) && applies(other)
}

fn value(at: &State, register: Register) -> u64 {
    let full = register.full_register();
    match register {
        Register::GS => GS_BASE,
        _ if full.is_gpr() => {
            let value = at.gpr[full.number()];
            if register.size() == 4 { value & 0xFFFF_FFFF } else { value }
        }
        _ => 0,
    }
}

fn operand_raises(case: &Case, i: &Instruction, m: &UsedMemory, at: &State, fault: Fault) -> bool {
    let Some(start) = m.virtual_address(0, |register, _, _| Some(value(at, register))) else {
        return false;
    };
    // Of a repeated string instruction iced knows no size: it is judged element by element.
    let size = match m.memory_size().size() {
        0 => i.memory_size().size().max(1),
        size => size,
    } as u64;
    let last = start.wrapping_add(size - 1);
    match fault.vector {
        SS | GP | AC if fault.error != 0 => false,
        SS => m.segment() == Register::SS && !(canonical(start) && canonical(last)),
        GP => {
            let wild = m.segment() != Register::SS && !(canonical(start) && canonical(last));
            // Also of vectors that may be misaligned: no CPU refuses those.
            wild || size >= 16 && start % 16 != 0 && i.cpuid_features() != [CpuidFeature::AVX]
        }
        // Checked in user mode alone (Intel SDM 3A, 6.15, "Interrupt 17").
        AC => !case.kernel && at.rflags & AC_FLAG != 0 && start % size.min(8) != 0,
        PF => {
            let (reads, writes) = match m.access() {
                OpAccess::Read | OpAccess::CondRead => (true, false),
                OpAccess::Write | OpAccess::CondWrite => (false, true),
                OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
                _ => return false,
            };
            let page = fault.cr2 & !(PAGE - 1);
            let within = fault.cr2.wrapping_sub(start) < size;
            // Anywhere in a page only for those that touch a part of the operand.
            let first = fault.cr2 == start || fault.cr2 == page;
            let expected: &[u64] = match rights(page) {
                Rights::None if reads && writes => &[U, U | W],
                Rights::None if reads => &[U],
                Rights::None => &[U | W],
                Rights::Read if writes => &[U | W | P],
                _ => &[],
            };
            let hidden = hidden_error_bits(case, fault);
            within
                && (first || masked(i))
                && expected.iter().any(|error| error & !hidden == fault.error & !hidden)
        }
        _ => false,
    }
}

fn masked(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vmaskmovdqu
            | M::Maskmovdqu
            | M::Maskmovq
    )
}

/// Whether they differ in a fault that each model raises, or not, as it likes.
pub fn fault_is_open(case: &Case, one: &Outcome, other: &Outcome) -> bool {
    // Round a loop it may end at the same place later.
    let ends = |outcome: &Outcome| (outcome.fault, outcome.state.rip, outcome.state.gpr);
    ends(one) != ends(other)
        && [(one, other), (other, one)].iter().any(|(faulted, other)| {
            let at_memory = |outcome: &Outcome| [SS, GP, PF, AC].contains(&outcome.fault.vector);
            instruction_at(case, faulted.state.rip).is_some_and(|i| {
                faulted.fault.vector == AC && alignment_is_open(&i)
                    || at_memory(faulted) && stores_x87(&i) && other.state.fpu.fsw & FSW_ES != 0
                    || at_memory(faulted) && at_memory(other) && compares_strings(&i)
                    || upper_half_faults(&i, &faulted.state, faulted.fault)
            })
        })
}

/// Of an operand whose alignment each model checks as it likes: vectors (Intel SDM 2B, "MOVUPS":
/// "may or may not"), masked bytes, and the stack pointer that ENTER probes.
fn alignment_is_open(i: &Instruction) -> bool {
    i.memory_size().size() >= 16 || masked(i) || i.mnemonic() == Mnemonic::Enter
}

/// One that raises an x87 exception which is not masked stores nothing: Intel's CPUs do not look
/// at the operand then, AMD's have looked before.
fn stores_x87(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
        && i.op0_kind() == OpKind::Memory
}

/// Either operand may be the one that faults.
fn compares_strings(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64
    )
}

/// Of 16 bytes of memory these use the lower eight, and may read no more (Intel SDM 2B,
/// "PUNPCKLBW"). Where MXCSR lets SSE's operands be misaligned (AMD APM 1, 4.2.2), the
/// upper eight can lie in another page: a Zen 5 does not look at it.
fn upper_half_faults(i: &Instruction, at: &State, fault: Fault) -> bool {
    use Mnemonic as M;
    let lower = matches!(
        i.mnemonic(),
        M::Punpcklbw | M::Punpcklwd | M::Punpckldq | M::Punpcklqdq | M::Unpcklps | M::Unpcklpd
    ) || matches!(
        i.mnemonic(),
        M::Psllw | M::Pslld | M::Psllq | M::Psrlw | M::Psrld | M::Psrlq | M::Psraw | M::Psrad
    );
    lower
        && fault.vector == PF
        && InstructionInfoFactory::new().info(i).used_memory().iter().any(|m| {
            let start = m.virtual_address(0, |register, _, _| Some(value(at, register)));
            m.memory_size().size() == 16
                && start.is_some_and(|start| (8..16).contains(&fault.cr2.wrapping_sub(start)))
        })
}

/// ENTER pushes a frame at a time, and which pushes are done before a later one
/// faults is the model's choice (Intel SDM 2A, "ENTER").
pub fn pushes_before_it_faults(case: &Case, rip: u64) -> bool {
    instruction_at(case, rip).is_some_and(|i| i.mnemonic() == Mnemonic::Enter)
}

/// What a store that faults has done to the registers before is the model's choice for
/// two kinds: one of MMX has made TOP zero on Intel's CPUs, and VCVTPS2PH has set
/// MXCSR's flags of what it converted.
pub fn registers_before_it_faults(case: &Case, rip: u64) -> (bool, bool) {
    let Some(i) = instruction_at(case, rip).filter(|i| i.op0_kind() == OpKind::Memory) else {
        return (false, false);
    };
    let mmx = i.op_count() > 1 && i.op1_register().is_mm();
    (mmx, i.mnemonic() == Mnemonic::Vcvtps2ph)
}

enum Rights {
    None,
    Read,
    All,
}

fn rights(page: u64) -> Rights {
    let within = |base: u64, pages: u64| page.wrapping_sub(base) < pages * PAGE;
    if within(CODE, CODE_PAGES) {
        return Rights::All;
    }
    for base in [DATA, DATA_HIGH] {
        if within(base, DATA_PAGES) {
            return match (page - base) / PAGE {
                HOLE => Rights::None,
                READ_ONLY => Rights::Read,
                _ => Rights::All,
            };
        }
    }
    Rights::None
}

/// Bits of the error code of #PF that cannot be compared: the privilege level is
/// the guest's own, and Linux says "present" of every address past user space so
/// that its map stays hidden.
pub fn hidden_error_bits(case: &Case, native: Fault) -> u64 {
    let not_user = u64::from(native.cr2 >= 0x7FFF_FFFF_F000);
    if case.kernel { U | not_user } else { not_user }
}

/// Further differences that the sieve accepts: encodings that the manuals reserve,
/// or whose faults have no order.
pub fn sieve_accepts(i: &Instruction, code: &[u8], host: &Outcome, guest: &Outcome) -> bool {
    let vectors = [host.fault.vector, guest.fault.vector];
    let only = |allowed: &[u8]| vectors.iter().all(|vector| allowed.contains(vector));
    match i.mnemonic() {
        // In the wrong mode and at the wrong level: both faults apply (AMD APM 3,
        // "SYSEXIT"; Intel SDM 2B).
        Mnemonic::Sysexit | Mnemonic::Sysexitq => only(&[UD, GP]),
        // To an outer level: whether its stack is read before the selector is
        // looked at (Intel SDM 2B, "RET").
        Mnemonic::Retf => only(&[GP, PF]),
        // Control registers that do not exist, at the wrong level.
        Mnemonic::INVALID if code.windows(2).any(|w| matches!(w, [0x0F, 0x20..=0x23])) => {
            only(&[UD, GP])
        }
        // No bit of CPUID announces them. Where the CPU has them, user code gets #GP or #UD
        // by what the hypervisor below has switched on (Intel TDX Module, ABI specification).
        Mnemonic::Seamcall | Mnemonic::Seamops | Mnemonic::Seamret | Mnemonic::Tdcall => {
            only(&[UD, GP])
        }
        // No byte is selected: whether the address counts all the same is the model's choice
        // (Intel SDM 2B, "MASKMOVQ").
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => vectors.contains(&PF),
        // Which part of the area is touched first is too.
        Mnemonic::Xrstor => only(&[PF]) && host.fault.error == guest.fault.error,
        // With a REP prefix Zen 4 runs it, and Zen 5 does not; the manual is silent.
        Mnemonic::Clzero if i.has_rep_prefix() || i.has_repne_prefix() => vectors.contains(&UD),
        // VEX.W does not count outside 64-bit mode (Intel SDM 2C, "PEXTRD"); a Zen refuses it.
        // With W in 64-bit mode they are VPEXTRQ and VPINSRQ.
        Mnemonic::Vpextrd | Mnemonic::Vpinsrd if matches!(code, [0xC4, 0xE3, w, ..] if w & 0x80 != 0) => {
            host.fault.vector == UD
        }
        // VPERMQ and VPERMPD ask for VEX.W; AMD's CPUs ignore it. LOCK VERW is refused by the
        // manual (AMD APM 3, 1.2.5), and not by a Zen 4 on which VERW clears buffers. RDPKRU and
        // WRPKRU have no mandatory prefix ("NP", Intel SDM 2B); a Zen 5 runs them with any.
        Mnemonic::INVALID => {
            let vperm = matches!(code, [0xC4, 0xE3, 0x7D, 0 | 1, ..]);
            let verw = matches!(code, [0xF0, 0x0F, 0x00, form, ..] if form & 0xF8 == 0x28);
            let pkru = matches!(code, [0x66 | 0xF2 | 0xF3, .., 0x0F, 0x01, 0xEE | 0xEF]);
            (vperm || verw || pkru) && guest.fault.vector == UD
        }
        _ => undefined_result(i),
    }
}
