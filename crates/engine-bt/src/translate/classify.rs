//! What the translator does with an instruction.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use std::mem::offset_of;

use super::block::Source;
use crate::cpu::fpu;
use crate::state::{CpuState, mode, seg};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No effect at all: NOP, ENDBR, prefetches.
    Nothing,
    /// Copied with its operands replaced.
    Copy,
    Lea,
    Push,
    Pop,
    Leave,
    Pushf,
    Cli,
    Sti,
    Swapgs,
    Rdtsc,
    /// RDFSBASE, RDGSBASE.
    ReadBase(usize),
    Rdtscp,
    Syscall,
    Sysret,
    /// MOVS or STOS, with or without REP.
    String {
        size: u8,
        moves: bool,
    },
    /// A bit test with the offset in a register and a memory operand.
    BitString,
    /// MOV from a segment register, to a register or to memory.
    ReadSelector(usize),
    StoreSelector(usize),
    /// MOV from a control register, or RDPID: state at this offset.
    ReadControl(usize),
    Jmp,
    Jcc,
    Loop,
    Call,
    JmpIndirect,
    CallIndirect,
    Ret,
    /// IN or OUT.
    Port {
        out: bool,
    },
    /// Left to the interpreter.
    Interpret,
}

impl Kind {
    pub fn ends_block(self) -> bool {
        matches!(
            self,
            Kind::Jmp
                | Kind::Jcc
                | Kind::Loop
                | Kind::Call
                | Kind::JmpIndirect
                | Kind::CallIndirect
                | Kind::Ret
                | Kind::Syscall
                | Kind::Sysret
                | Kind::Port { .. }
                | Kind::Interpret
        )
    }
}

pub fn classify(i: &Instruction, source: &Source<'_>) -> Kind {
    let mode = source.mode;
    let kernel = mode & mode::USER == 0;
    if !source.cpuid.runs(i) {
        return Kind::Interpret;
    }
    if source.relative() && i.memory_base() == Register::EIP {
        // The sum is cut to 32 bits, where the page is not known.
        return Kind::Interpret;
    }
    if source.is_out_of_reach(i) {
        return Kind::Interpret;
    }
    if i.flow_control() != FlowControl::Next {
        return transfer(i, mode);
    }
    use Mnemonic as M;
    match i.mnemonic() {
        mnemonic if does_nothing(mnemonic) => Kind::Nothing,
        M::Pause if source.yields => Kind::Interpret,
        M::Lea if i.op0_register().size() >= 4 => Kind::Lea,
        M::Lea => Kind::Interpret,
        M::Push | M::Pop | M::Leave => stack(i),
        M::In => Kind::Port { out: false },
        M::Out => Kind::Port { out: true },
        M::Pushfq | M::Pushfd => Kind::Pushf,
        M::Cli if kernel => Kind::Cli,
        M::Sti if kernel => Kind::Sti,
        M::Swapgs if kernel => Kind::Swapgs,
        M::Rdrand | M::Rdseed if source.counted() => Kind::Interpret,
        M::Rdtsc if kernel || mode & mode::TSC != 0 => Kind::Rdtsc,
        M::Rdtscp if kernel || mode & mode::TSC != 0 => Kind::Rdtscp,
        M::Movsb | M::Movsw | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            string(i, source)
        }
        // MOVSD is also an SSE2 instruction.
        M::Movsd if i.is_string_instruction() => string(i, source),
        M::Bt | M::Bts | M::Btr | M::Btc
            if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register =>
        {
            // The offset moves the access in its segment.
            let checked = source.code32() && source.segment(i.memory_segment()).is_some();
            if checked { Kind::Interpret } else { Kind::BitString }
        }
        M::Mov if i.op1_kind() == OpKind::Register => match i.op1_register() {
            Register::CR0 if kernel => Kind::ReadControl(offset_of!(CpuState, cr0)),
            Register::CR2 if kernel => Kind::ReadControl(offset_of!(CpuState, cr2)),
            Register::CR3 if kernel => Kind::ReadControl(offset_of!(CpuState, cr3)),
            Register::CR4 if kernel => Kind::ReadControl(offset_of!(CpuState, cr4)),
            register if register.is_segment_register() => selector(i, register),
            _ => copy(i, source),
        },
        // The host's would clear the eight registers that 32-bit code has not.
        M::Vzeroall | M::Vzeroupper if source.code32() => Kind::Interpret,
        M::Rdpid => Kind::ReadControl(offset_of!(CpuState, tsc_aux)),
        M::Rdfsbase if mode & mode::FSGSBASE != 0 => Kind::ReadBase(seg::FS),
        M::Rdgsbase if mode & mode::FSGSBASE != 0 => Kind::ReadBase(seg::GS),
        _ => copy(i, source),
    }
}

/// What goes on elsewhere than behind itself.
fn transfer(i: &Instruction, mode: u32) -> Kind {
    let syscalls = mode & (mode::SYSCALL | mode::CODE32) == mode::SYSCALL;
    match i.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rel8_32 | Code::Jmp_rel32_32 => {
            Kind::Jmp
        }
        Code::Call_rel32_64 | Code::Call_rel32_32 => Kind::Call,
        Code::Jmp_rm64 | Code::Jmp_rm32 => Kind::JmpIndirect,
        Code::Call_rm64 | Code::Call_rm32 => Kind::CallIndirect,
        Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16 => Kind::Ret,
        Code::Syscall if syscalls => Kind::Syscall,
        Code::Sysretq if syscalls && mode & mode::USER == 0 => Kind::Sysret,
        _ if i.flow_control() == FlowControl::ConditionalBranch => conditional(i),
        _ => Kind::Interpret,
    }
}

fn does_nothing(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Rdsspd
            | M::Rdsspq
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetch
            | M::Reservednop
            // Translated code runs with DF clear.
            | M::Cld
    )
}

/// PUSH, POP and LEAVE.
fn stack(i: &Instruction) -> Kind {
    match i.code() {
        Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm32 | Code::Pushq_imm8 => Kind::Push,
        Code::Push_r32 | Code::Push_rm32 | Code::Pushd_imm32 | Code::Pushd_imm8 => Kind::Push,
        Code::Pop_r64 | Code::Pop_r32 => Kind::Pop,
        Code::Pop_rm64 | Code::Pop_rm32 if i.op0_kind() == OpKind::Register => Kind::Pop,
        Code::Leaveq | Code::Leaved => Kind::Leave,
        _ => Kind::Interpret,
    }
}

/// The longest run of pushes or pops that is checked at once.
const STACK_RUN: usize = 16;

/// How many instructions from the first on push registers, or pop registers and
/// perhaps return: a prologue or an epilogue.
pub(super) fn stack_run(instructions: &[Instruction], kinds: &[Kind]) -> usize {
    let plain = |index: usize| {
        instructions[index].op0_kind() == OpKind::Register
            && !matches!(instructions[index].op0_register(), Register::RSP | Register::ESP)
    };
    let Some(&first) = kinds.first() else { return 0 };
    if !matches!(first, Kind::Push | Kind::Pop) {
        return 0;
    }
    let len = kinds.len().min(STACK_RUN);
    let run = (0..len).take_while(|&index| kinds[index] == first && plain(index)).count();
    let returns = first == Kind::Pop && run > 0 && kinds.get(run) == Some(&Kind::Ret);
    run + usize::from(returns)
}

/// MOVS and STOS on flat addresses of the code's own size.
fn string(i: &Instruction, source: &Source<'_>) -> Kind {
    let (mut size, mut moves) = (0, false);
    let flat = |segment| source.segment(segment).is_none();
    for op in 0..i.op_count() {
        match (i.op_kind(op), source.code32()) {
            (OpKind::MemoryESRDI, false) => size = i.memory_size().size() as u8,
            (OpKind::MemoryESEDI, true) if flat(Register::ES) => {
                size = i.memory_size().size() as u8;
            }
            (OpKind::MemorySegRSI, false) | (OpKind::MemorySegESI, true)
                if flat(i.memory_segment()) =>
            {
                moves = true;
            }
            (OpKind::Register, _) if !i.op_register(op).is_xmm() => {}
            // Another address size, or SSE2's MOVSD.
            _ => return Kind::Interpret,
        }
    }
    if size == 0 { Kind::Interpret } else { Kind::String { size, moves } }
}

fn selector(i: &Instruction, from: Register) -> Kind {
    let segment = match from {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::DS => seg::DS,
        Register::FS => seg::FS,
        _ => seg::GS,
    };
    match i.op0_kind() {
        OpKind::Memory => Kind::StoreSelector(segment),
        _ if i.op0_register().size() >= 4 => Kind::ReadSelector(segment),
        _ => Kind::Interpret,
    }
}

fn conditional(i: &Instruction) -> Kind {
    if i.is_jcc_short_or_near() {
        let full = matches!(i.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
        return if full { Kind::Jcc } else { Kind::Interpret };
    }
    match i.code() {
        Code::Jrcxz_rel8_64
        | Code::Jecxz_rel8_64
        | Code::Jecxz_rel8_32
        | Code::Loop_rel8_64_RCX
        | Code::Loop_rel8_64_ECX
        | Code::Loop_rel8_32_ECX => Kind::Loop,
        _ => Kind::Interpret,
    }
}

/// Whether an instruction does nothing but read and write its operands, fixed
/// general registers and flags, so that running it anywhere is the same.
fn copy(i: &Instruction, source: &Source<'_>) -> Kind {
    let mode = source.mode;
    if !(copied_integer(i) || copied_vector(i)) {
        return Kind::Interpret;
    }
    let vector = uses_vector(i);
    let needed = match (vector, i.encoding()) {
        (Vector::None, _) => 0,
        (Vector::X87, _) => mode::FPU,
        (Vector::Sse, EncodingKind::VEX) => mode::AVX,
        (Vector::Sse, _) => mode::SSE,
    };
    if mode & needed != needed || i.encoding() == EncodingKind::EVEX {
        return Kind::Interpret;
    }
    for op in 0..i.op_count() {
        match i.op_kind(op) {
            OpKind::Memory => {
                let size = i.memory_size().size();
                if size == 0 || size > 64 || i.is_vsib() {
                    return Kind::Interpret;
                }
                // The pointer that x87 instructions leave is one into the segment.
                let based = source.segment(i.memory_segment()).is_some();
                if source.code32() && based && fpu::touches_x87(i) {
                    return Kind::Interpret;
                }
            }
            OpKind::Register if i.op_register(op).is_segment_register() => return Kind::Interpret,
            OpKind::Register
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return Kind::Interpret,
        }
    }
    Kind::Copy
}

enum Vector {
    None,
    X87,
    Sse,
}

fn uses_vector(i: &Instruction) -> Vector {
    let mut vector = Vector::None;
    for &feature in i.cpuid_features() {
        use CpuidFeature as F;
        match feature {
            F::FPU | F::FPU287 | F::FPU287XL_ONLY | F::FPU387 | F::FPU387SL_ONLY | F::MMX => {
                vector = Vector::X87
            }
            F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
            | F::SHA512
            | F::SM3
            | F::SM4
            | F::AVX_VNNI
            | F::AVX_IFMA
            | F::AVX_VNNI_INT8
            | F::AVX_NE_CONVERT
            | F::AVX_VNNI_INT16 => return Vector::Sse,
            _ => {}
        }
    }
    // FISTTP came with SSE3 but is an x87 instruction.
    vector
}

fn copied_vector(i: &Instruction) -> bool {
    use Mnemonic as M;
    if matches!(uses_vector(i), Vector::None) {
        return false;
    }
    // What has operands beside those in its encoding, tells where it runs, or
    // is not all or nothing.
    !matches!(
        i.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Maskmovdqu
            | M::Maskmovq
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Clflush
            | M::Monitor
            | M::Mwait
            | M::Fisttp
            | M::Ldmxcsr
            | M::Vldmxcsr
    )
}

fn copied_integer(i: &Instruction) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        // MOV of segment, control and debug registers is not for here, nor is
        // the form with a 64-bit absolute address.
        M::Mov => {
            !matches!(
                i.code(),
                Code::Mov_AL_moffs8
                    | Code::Mov_AX_moffs16
                    | Code::Mov_EAX_moffs32
                    | Code::Mov_RAX_moffs64
                    | Code::Mov_moffs8_AL
                    | Code::Mov_moffs16_AX
                    | Code::Mov_moffs32_EAX
                    | Code::Mov_moffs64_RAX
            ) && (0..i.op_count())
                .all(|op| i.op_kind(op) != OpKind::Register || i.op_register(op).is_gpr())
        }
        // A bit offset in a register reaches outside the operand.
        M::Bt | M::Bts | M::Btr | M::Btc => {
            i.op0_kind() != OpKind::Memory || i.op1_kind() != OpKind::Register
        }
        M::Movsxd => i.op0_register().size() >= 4,
        M::Nop
        | M::Movzx
        | M::Movsx
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Add
        | M::Or
        | M::Adc
        | M::Sbb
        | M::And
        | M::Sub
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Mul
        | M::Imul
        | M::Div
        | M::Idiv
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Shld
        | M::Shrd
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Bswap
        | M::Movbe
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Lahf
        | M::Sahf
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Pause
        | M::Mfence
        | M::Lfence
        | M::Sfence
        | M::Movnti
        | M::Crc32
        | M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Mulx
        | M::Pdep
        | M::Pext
        | M::Rorx
        | M::Sarx
        | M::Shlx
        | M::Shrx
        | M::Adcx
        | M::Adox
        | M::Rdrand
        | M::Rdseed => true,
        mnemonic => is_cmov(mnemonic) || is_setcc(mnemonic),
    }
}

fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
    )
}

fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

/// Whether a shift or rotate may leave the flags as they were.
pub fn keeps_flags_sometimes(i: &Instruction) -> bool {
    use Mnemonic as M;
    if !matches!(
        i.mnemonic(),
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd
    ) {
        return false;
    }
    let last = i.op_count() - 1;
    match i.op_kind(last) {
        OpKind::Register => i.op_register(last) == Register::CL,
        _ => {
            let wide = i.op_kind(0) == OpKind::Register && i.op0_register().size() == 8
                || i.op_kind(0) == OpKind::Memory && i.memory_size().size() == 8;
            i.immediate(last) & if wide { 63 } else { 31 } == 0
        }
    }
}

/// Whether the instruction may leave translated code with nothing of it done.
pub fn may_leave(i: &Instruction, kind: Kind) -> bool {
    match kind {
        Kind::Copy => {
            let in_memory = |op: &u32| {
                i.op_kind(*op) == OpKind::Register
                    && matches!(
                        i.op_register(*op).full_register(),
                        Register::R13 | Register::R14 | Register::R15
                    )
            };
            matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
                || !copied_integer(i) && fpu::touches_x87(i)
                || (0..i.op_count()).any(|op| match i.op_kind(op) {
                    OpKind::Memory => true,
                    OpKind::Register => !i.op_register(op).is_gpr(),
                    _ => false,
                })
                // More than there are scratch registers for: it has no copy.
                || i.op_count() > 2 && (0..i.op_count()).filter(in_memory).count() > 2
        }
        Kind::Push
        | Kind::Pop
        | Kind::Leave
        | Kind::Call
        | Kind::String { .. }
        | Kind::BitString
        | Kind::StoreSelector(_) => true,
        _ => false,
    }
}
