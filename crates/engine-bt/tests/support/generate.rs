//! Makes programs of random instructions from iced's tables.

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, CpuidFeature, EncodingKind, FlowControl, Instruction,
    InstructionBlock, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind as K, OpKind,
    Register,
};

use super::case::{
    AC_FLAG, ARITH, CODE, Case, DATA, DATA_BYTES, DATA_HIGH, Fpu, GS_BASE, HOLE, PAGE, POPF_FLAGS,
    READ_ONLY, START_FLAGS, State,
};
use super::features::Bits;
use super::guest::Guest;
use super::model::{rflags, undefined};
use super::random::Random;

/// A piece of a program. Regions nest.
#[derive(Clone, Debug)]
pub enum Item {
    Nothing,
    Plain(Instruction),
    /// Jcc to the end of the region.
    Skip {
        jump: Code,
        end: usize,
    },
    /// Loads the counter; the region's end counts down.
    Loop {
        register: Register,
        count: u32,
        end: usize,
    },
    EndLoop {
        register: Register,
        start: usize,
        short: bool,
    },
    /// Jumps to what follows, which so is a block of its own.
    Jump,
    /// Calls what is in the region.
    Call {
        end: usize,
    },
    EndCall,
}

#[derive(Clone)]
pub struct Program {
    pub items: Vec<Item>,
    pub start: State,
    pub kernel: bool,
}

const JUMPS: [Code; 16] = [
    Code::Jo_rel32_64,
    Code::Jno_rel32_64,
    Code::Jb_rel32_64,
    Code::Jae_rel32_64,
    Code::Je_rel32_64,
    Code::Jne_rel32_64,
    Code::Jbe_rel32_64,
    Code::Ja_rel32_64,
    Code::Js_rel32_64,
    Code::Jns_rel32_64,
    Code::Jp_rel32_64,
    Code::Jnp_rel32_64,
    Code::Jl_rel32_64,
    Code::Jge_rel32_64,
    Code::Jle_rel32_64,
    Code::Jg_rel32_64,
];

/// Flags that an instruction gives a value whatever its operands are.
pub fn defines(i: &Instruction) -> u64 {
    use Mnemonic as M;
    let counted = matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd | M::Rol | M::Ror | M::Rcl | M::Rcr
    );
    let repeated = i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix());
    if counted || repeated { 0 } else { rflags(i.rflags_modified()) & !undefined(i) }
}

impl Program {
    /// The flags defined before each item and at the end, or `None` if some
    /// instruction's result depends on an undefined one.
    fn defined(&self) -> Option<Vec<u64>> {
        let mut unknown = 0;
        let mut defined = Vec::with_capacity(self.items.len() + 1);
        let mut skips: Vec<usize> = Vec::new();
        let mut loops: Vec<usize> = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            skips.retain(|&end| end > index);
            loops.retain(|&end| end > index);
            defined.push(ARITH & !unknown);
            match item {
                Item::Plain(i) => {
                    if rflags(i.rflags_read()) & unknown != 0 || !self.prepared(index, i) {
                        return None;
                    }
                    let gone = undefined(i);
                    // Round the loop again, an earlier instruction could read it.
                    if gone != 0 && !loops.is_empty() {
                        return None;
                    }
                    if skips.is_empty() {
                        unknown &= !defines(i);
                    }
                    unknown |= gone;
                }
                Item::Skip { jump, end } => {
                    let mut i = Instruction::default();
                    i.set_code(*jump);
                    if rflags(i.rflags_read()) & unknown != 0 {
                        return None;
                    }
                    skips.push(*end);
                }
                Item::Loop { end, .. } => loops.push(*end),
                // It may return to anywhere in the middle of what it does.
                Item::Call { end } => skips.push(*end),
                _ => {}
            }
        }
        defined.push(ARITH & !unknown);
        Some(defined)
    }

    /// Whether an instruction that must not see a random operand does not.
    fn prepared(&self, index: usize, i: &Instruction) -> bool {
        let before = index.checked_sub(1).map(|index| &self.items[index]);
        let after = |code| matches!(before, Some(Item::Plain(b)) if b.code() == code);
        match i.mnemonic() {
            Mnemonic::Popfq => after(Code::Pushq_imm32),
            _ if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::MemorySegRDI) => {
                after(Code::Mov_r64_imm64)
            }
            _ => true,
        }
    }

    pub fn case(&self) -> Option<Case> {
        let defined = self.defined()?;
        let mut out: Vec<(usize, Instruction, Option<usize>)> = Vec::new();
        let branch = |code| Instruction::with_branch(code, 0).ok();
        for (index, item) in self.items.iter().enumerate() {
            match item {
                Item::Nothing => {}
                Item::Plain(i) => out.push((index, *i, None)),
                Item::Skip { jump, end } => out.push((index, branch(*jump)?, Some(*end))),
                Item::Loop { register, count, .. } => {
                    let i = Instruction::with2(Code::Mov_r32_imm32, *register, *count).ok()?;
                    out.push((index, i, None));
                }
                Item::EndLoop { register, start, short } => {
                    if *short {
                        let i = branch(Code::Loop_rel8_64_RCX)?;
                        out.push((index, i, Some(start + 1)));
                    } else {
                        let i = Instruction::with1(Code::Dec_rm32, *register).ok()?;
                        out.push((index, i, None));
                        out.push((index, branch(Code::Jne_rel32_64)?, Some(start + 1)));
                    }
                }
                Item::Call { end } => {
                    out.push((index, branch(Code::Call_rel32_64)?, Some(index + 1)));
                    out.push((index, branch(Code::Jmp_rel32_64)?, Some(end + 1)));
                }
                Item::Jump => out.push((index, branch(Code::Jmp_rel32_64)?, Some(index + 1))),
                Item::EndCall => out.push((index, Instruction::with(Code::Retnq), None)),
            }
        }
        let single = out.len() == 1;
        let items: Vec<usize> = out.iter().map(|(index, ..)| *index).collect();
        let mut end = Instruction::default();
        end.set_code(Code::Ud2);
        out.push((self.items.len(), end, None));
        // The encoder finds targets by address: number the instructions.
        let at = |position: usize| 0x1000 + position as u64 * 16;
        let starts: Vec<usize> = out.iter().map(|(index, ..)| *index).collect();
        let mut instructions = Vec::with_capacity(out.len());
        for (position, (_, mut i, target)) in out.into_iter().enumerate() {
            i.set_ip(at(position));
            if let Some(target) = target {
                // A jump to the region's own end part goes to what follows there.
                let to = starts.iter().position(|&start| start >= target)?;
                i.set_near_branch64(at(to));
            }
            instructions.push(i);
        }
        let block = InstructionBlock::new(&instructions, self.start.rip);
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let encoded = BlockEncoder::encode(64, block, options).ok()?;
        let code = encoded.code_buffer;
        // A REP prefix has iterations behind it that may have written flags.
        let exact = |item: usize| match self.items[item] {
            Item::Plain(i) => !i.is_string_instruction(),
            _ => true,
        };
        let places = items.iter().zip(&encoded.new_instruction_offsets);
        let defined_before = places
            .filter(|(item, _)| exact(**item))
            .map(|(item, offset)| (self.start.rip + u64::from(*offset), defined[*item]))
            .collect();
        let defined = *defined.last()?;
        let start = self.start.clone();
        let gathers = self.items.iter().any(|item| matches!(item, Item::Plain(i) if i.is_vsib()));
        Some(Case {
            code,
            start,
            kernel: self.kernel,
            code32: false,
            defined,
            single,
            defined_before,
            gathers,
        })
    }
}

/// Features of the instruction set that cases use where the guest has them: all
/// but those whose instructions tell of the machine or of time.
pub fn usable(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::CLFSH
            | F::SSE3
            | F::PCLMULQDQ
            | F::SSSE3
            | F::FMA
            | F::CMPXCHG16B
            | F::SSE4_1
            | F::SSE4_2
            | F::MOVBE
            | F::POPCNT
            | F::AES
            | F::AVX
            | F::F16C
            | F::BMI1
            | F::AVX2
            | F::BMI2
            | F::ADX
            | F::CLFLUSHOPT
            | F::CLWB
            | F::SHA
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
            | F::LZCNT
            | F::SSE4A
            | F::SHA512
            | F::SM3
            | F::SM4
            | F::AVX_VNNI
            | F::AVX_IFMA
            | F::AVX_VNNI_INT8
            | F::AVX_NE_CONVERT
            | F::AVX_VNNI_INT16
            | F::CLZERO
    )
}

/// Instructions that user code must not run here: they show the machine, or
/// change what a case cannot set.
pub fn unfit(code: Code) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    matches!(
        code.mnemonic(),
        M::INVALID | M::Db | M::Dw | M::Dd | M::Dq | M::Zero_bytes
            | M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
            | M::Sgdt | M::Sidt | M::Sldt | M::Smsw | M::Str | M::Lar | M::Lsl | M::Verr | M::Verw
            | M::Cli | M::Sti | M::Popf | M::Popfq | M::Fxsave | M::Fxsave64 | M::Fxrstor
            | M::Fxrstor64 | M::Fsave | M::Fnsave | M::Frstor | M::Fstenv | M::Fnstenv | M::Fldenv
            // They change the base of GS, or load a selector of the host.
            | M::Lfs | M::Lgs | M::Lss | M::Rdfsbase | M::Wrfsbase | M::Wrgsbase
            // With a register 0F 0D is #UD on AMD and a NOP on Intel.
            | M::Reservednop
    ) || matches!(
        code,
        Code::Bswap_r16 | Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL
            // Some CPUs read 16 bits and some 32.
            | Code::Movsxd_r16_rm16
    ) || op.must_be_cpl0()
        || !op.is_instruction()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Integer,
    X87,
    Vector,
}

pub struct Generator {
    info: InstructionInfoFactory,
    codes: Vec<(Code, Class)>,
    integer: Vec<Code>,
    x87: Vec<Code>,
    vector: Vec<Code>,
    data: Vec<u8>,
    /// MXCSR.MM, where the guest has it.
    misaligned: u32,
}

struct Context {
    random: Random,
    /// Registers whose value is still the one at the start.
    known: [Option<u64>; 16],
    reserved: Vec<Register>,
    items: Vec<Item>,
}

impl Generator {
    pub fn new(guest: &mut Guest) -> Self {
        let bits = Bits::of_guest(guest);
        let has = |feature| usable(feature) && bits.has(feature);
        let misaligned = (guest.cpuid(0x8000_0001, 0)[2] >> 7 & 1) << 17;
        let mut codes = Vec::new();
        for code in Code::values() {
            if unfit(code)
                || !code.op_code().mode64()
                || matches!(code.encoding(), EncodingKind::EVEX | EncodingKind::MVEX)
            {
                continue;
            }
            let mut i = Instruction::default();
            i.set_code(code);
            if i.flow_control() != FlowControl::Next || !i.cpuid_features().iter().all(|&f| has(f))
            {
                continue;
            }
            use CpuidFeature as F;
            let class = match i.cpuid_features() {
                [F::FPU | F::FPU287 | F::FPU387 | F::MMX, ..] => Class::X87,
                [
                    F::INTEL8086
                    | F::INTEL186
                    | F::INTEL286
                    | F::INTEL386
                    | F::INTEL486
                    | F::X64
                    | F::CMOV
                    | F::CX8
                    | F::BMI1
                    | F::BMI2
                    | F::ADX
                    | F::LZCNT
                    | F::POPCNT
                    | F::MOVBE
                    | F::CMPXCHG16B
                    | F::MULTIBYTENOP
                    | F::PAUSE,
                    ..,
                ] => Class::Integer,
                _ => Class::Vector,
            };
            codes.push((code, class));
        }
        let of = |class| codes.iter().filter(|c| c.1 == class).map(|c| c.0).collect::<Vec<_>>();
        let (integer, x87, vector) = (of(Class::Integer), of(Class::X87), of(Class::Vector));
        assert!(integer.len() > 400 && x87.len() > 150 && vector.len() > 300, "{}", codes.len());
        let mut random = Random::new(1);
        let mut data = Vec::new();
        while data.len() < 4 * DATA_BYTES {
            let quad = match random.below(6) {
                0 => float(&mut random).to_bits(),
                1 => {
                    u64::from((float(&mut random) as f32).to_bits()) << 32
                        | u64::from((float(&mut random) as f32).to_bits())
                }
                _ => random.value(),
            };
            data.extend_from_slice(&quad.to_le_bytes());
        }
        Self { info: InstructionInfoFactory::new(), codes, integer, x87, vector, data, misaligned }
    }

    /// How many kinds of instructions cases are made from.
    pub fn codes(&self) -> usize {
        self.codes.len()
    }

    pub fn program(&mut self, seed: u64, code: Option<usize>) -> Program {
        let mut random = Random::new(seed);
        loop {
            let start = self.start(&mut random);
            let mut context = Context {
                known: start.gpr.map(Some),
                random: Random::new(random.bits()),
                reserved: vec![Register::RSP],
                items: Vec::new(),
            };
            match code {
                Some(index) => {
                    let (code, _) = self.codes[index % self.codes.len()];
                    for _ in 0..50 {
                        if self.instruction(&mut context, code).is_some() {
                            break;
                        }
                    }
                }
                None => {
                    let budget = 1 + context.random.below(12);
                    self.block(&mut context, budget, 0);
                }
            }
            // Alignment is checked in user mode only, and natively that is all there is.
            let checked = |value: u64| value & AC_FLAG != 0;
            let aligned = checked(start.rflags)
                || context.items.iter().any(|item| {
                    matches!(item, Item::Plain(i) if i.code() == Code::Pushq_imm32
                        && checked(i.immediate32to64() as u64))
                });
            let kernel = random.percent(20) && !aligned;
            let program = Program { items: context.items, start, kernel };
            if program.case().is_some() {
                return program;
            }
            if code.is_some() && random.percent(10) {
                // Some forms iced lists cannot be made here; take another.
                return self.program(random.bits(), None);
            }
        }
    }

    fn start(&mut self, random: &mut Random) -> State {
        let mut state = State::default();
        for register in &mut state.gpr {
            let at = random.below(DATA_BYTES) as u64;
            *register = match random.below(10) {
                0..4 => DATA + at,
                4 => DATA_HIGH + at,
                5 | 6 => random.below(32) as u64,
                _ => random.value(),
            };
        }
        state.gpr[4] = match random.below(16) {
            0 => DATA + random.below(DATA_BYTES) as u64,
            1 => DATA + random.pick(&[0, 8, PAGE, PAGE + 4, 2 * PAGE, 2 * PAGE - 8]),
            2 => DATA_HIGH + PAGE + 0x800,
            _ => DATA + PAGE + 0x400 + random.below(128) as u64 * 8,
        };
        state.rip = CODE
            + match random.below(4) {
                0 => PAGE - 1 - random.below(48) as u64,
                _ => random.below(3000) as u64,
            };
        state.rflags = 0x202 | flags(random, START_FLAGS);
        state.fpu = fpu(random);
        if random.percent(5) {
            state.fpu.mxcsr |= self.misaligned;
        }
        let at = random.below(self.data.len() - DATA_BYTES);
        state.data = self.data[at..at + DATA_BYTES].to_vec();
        state
    }

    fn block(&mut self, c: &mut Context, budget: usize, depth: usize) {
        let mut left = budget;
        while left > 0 {
            left -= 1;
            let inner = 1 + c.random.below(left.clamp(1, 4));
            let region = left > 0 && depth < 3;
            match c.random.below(100) {
                0..12 if region => {
                    let at = c.items.len();
                    c.items.push(Item::Skip { jump: c.random.pick(&JUMPS), end: 0 });
                    let before = c.known;
                    self.block(c, inner, depth + 1);
                    for (known, before) in c.known.iter_mut().zip(before) {
                        *known = known.filter(|_| *known == before);
                    }
                    let last = c.items.len();
                    if let Item::Skip { end, .. } = &mut c.items[at] {
                        *end = last;
                    }
                    left = left.saturating_sub(inner);
                    self.keep_if_defined(c, at);
                }
                12..17 if region => {
                    self.looped(c, inner, depth);
                    left = left.saturating_sub(inner);
                }
                17..22 if region => {
                    let at = c.items.len();
                    c.items.push(Item::Call { end: 0 });
                    c.known[4] = None;
                    self.block(c, inner, depth + 1);
                    let last = c.items.len();
                    c.items[at] = Item::Call { end: last };
                    c.items.push(Item::EndCall);
                    left = left.saturating_sub(inner);
                    self.keep_if_defined(c, at);
                }
                22..30 => self.stack(c),
                30..32 => self.flags(c),
                32..40 => c.items.push(Item::Jump),
                _ => self.random(c),
            }
        }
    }

    /// Takes back what was added since `at` if it reads an undefined flag.
    fn keep_if_defined(&self, c: &mut Context, at: usize) {
        let program = Program { items: c.items.clone(), start: State::default(), kernel: false };
        if program.defined().is_none() {
            c.items.truncate(at);
        }
    }

    fn looped(&mut self, c: &mut Context, inner: usize, depth: usize) {
        let at = c.items.len();
        let short = c.random.percent(30);
        let registers = [Register::ECX, Register::EBX, Register::R12D, Register::R14D];
        let register = if short { Register::ECX } else { c.random.pick(&registers) };
        let full = register.full_register();
        if c.reserved.contains(&full) {
            return;
        }
        let count = 1 + c.random.below(4) as u32;
        c.items.push(Item::Loop { register, count, end: 0 });
        c.known[full.number()] = None;
        c.reserved.push(full);
        self.block(c, inner, depth + 1);
        c.reserved.pop();
        let end = c.items.len();
        c.items[at] = Item::Loop { register, count, end };
        c.items.push(Item::EndLoop { register, start: at, short });
        self.keep_if_defined(c, at);
    }

    fn stack(&mut self, c: &mut Context) {
        const CODES: [Code; 14] = [
            Code::Push_r64,
            Code::Push_rm64,
            Code::Pushq_imm8,
            Code::Pushq_imm32,
            Code::Push_r16,
            Code::Pop_r64,
            Code::Pop_r64,
            Code::Pop_rm64,
            Code::Pop_r16,
            Code::Leaveq,
            Code::Push_r64,
            Code::Push_r64,
            Code::Pushfq,
            Code::Push_rm16,
        ];
        let code = c.random.pick(&CODES);
        let _ = self.instruction(c, code);
    }

    /// POPF, with a value that leaves the case its single steps and interrupts.
    fn flags(&mut self, c: &mut Context) {
        let at = c.items.len();
        let value = (flags(&mut c.random, POPF_FLAGS) | 0x202) as u32;
        if let Ok(push) = Instruction::with1(Code::Pushq_imm32, value as i32) {
            c.items.push(Item::Plain(push));
            c.items.push(Item::Plain(Instruction::with(Code::Popfq)));
        }
        self.keep_if_defined(c, at);
    }

    fn random(&mut self, c: &mut Context) {
        for _ in 0..50 {
            let code = match c.random.below(100) {
                0..58 => c.random.pick(&self.integer),
                58..68 => c.random.pick(&self.x87),
                _ => c.random.pick(&self.vector),
            };
            if self.instruction(c, code).is_some() {
                return;
            }
        }
    }

    /// Adds an instruction of the kind `code`, with what prepares it. `None` if
    /// the operands drawn do not fit.
    fn instruction(&mut self, c: &mut Context, code: Code) -> Option<()> {
        let at = c.items.len();
        let mut i = Instruction::default();
        i.set_code(code);
        let op = code.op_code();
        let mut vectors: Vec<usize> = (0..16).collect();
        for number in 0..op.op_count() {
            operand(
                c,
                &mut i,
                number,
                op.op_kind(number),
                &mut vectors,
                op.requires_unique_reg_nums(),
            )?;
        }
        if op.can_use_lock_prefix() && i.op0_kind() == OpKind::Memory && c.random.percent(25) {
            i.set_has_lock_prefix(true);
        }
        if i.is_string_instruction() {
            self.string(c, &mut i);
        }
        // Whether SHA instructions check alignment differs between CPUs.
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory && i.cpuid_features().contains(&CpuidFeature::SHA) {
            return None;
        }
        // Which bytes of a masked store can fault is the CPU's own choice (SDM 2,
        // MASKMOVDQU): none here.
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::MemorySegRDI) {
            if c.reserved.contains(&Register::RDI) {
                return None;
            }
            let to = DATA + c.random.below(0x1FF0) as u64;
            let load = Instruction::with2(Code::Mov_r64_imm64, Register::RDI, to).ok()?;
            c.items.push(Item::Plain(load));
            c.known[7] = Some(to);
        }
        if code == Code::Enterq_imm16_imm8 {
            i.set_immediate16(c.random.below(64) as u16);
            i.set_immediate8_2nd(c.random.below(3) as u8);
        }
        let mut encoder = iced_x86::Encoder::new(64);
        i.set_ip(CODE);
        if encoder.encode(&i, CODE).is_err() {
            c.items.truncate(at);
            return None;
        }
        let info = self.info.info(&i);
        let writes = |access| {
            matches!(
                access,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            )
        };
        let written: Vec<Register> = info
            .used_registers()
            .iter()
            .filter(|used| writes(used.access()) && used.register().is_gpr())
            .map(|used| used.register().full_register())
            .collect();
        let stack_allowed = i.is_stack_instruction() || c.random.percent(5);
        let reserved =
            |r: &Register| c.reserved.contains(r) && !(*r == Register::RSP && stack_allowed);
        if written.iter().any(reserved) {
            c.items.truncate(at);
            return None;
        }
        c.items.push(Item::Plain(i));
        let program = Program { items: c.items.clone(), start: State::default(), kernel: false };
        if program.defined().is_none() {
            c.items.truncate(at);
            return None;
        }
        for register in written {
            c.known[register.number()] = None;
        }
        Some(())
    }

    /// Pointers and a small count for a string instruction.
    fn string(&mut self, c: &mut Context, i: &mut Instruction) {
        let compares = i.rflags_modified() != 0;
        if c.random.percent(60) {
            if compares && c.random.percent(50) {
                i.set_has_repne_prefix(true);
            } else {
                i.set_has_rep_prefix(true);
            }
        }
        for register in [Register::RSI, Register::RDI] {
            let pointer = c.known[register.number()].is_some_and(|v| v.wrapping_sub(DATA) < 0x4000);
            // Round a loop again it could point elsewhere.
            let again = c.reserved.len() > 1;
            if (!pointer || again || c.random.percent(40)) && !c.reserved.contains(&register) {
                // One alias only: the CPU moves blocks unless the linear addresses
                // overlap (SDM 1, 7.3.9.3).
                let value = DATA + (target(&mut c.random) - DATA) % (DATA_HIGH - DATA);
                if let Ok(load) = Instruction::with2(Code::Mov_r64_imm64, register, value) {
                    c.items.push(Item::Plain(load));
                    c.known[register.number()] = Some(value);
                }
            }
        }
        if !c.reserved.contains(&Register::RCX) {
            let count = c.random.below(20) as u32;
            if let Ok(load) = Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count) {
                c.items.push(Item::Plain(load));
                c.known[1] = None;
            }
        }
    }
}

/// Arithmetic flags, and now and then others.
fn flags(random: &mut Random, rare: u64) -> u64 {
    let rare = if random.percent(10) { random.bits() & rare } else { 0 };
    random.bits() & ARITH | rare
}

fn float(random: &mut Random) -> f64 {
    const EDGES: [f64; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        f64::MIN_POSITIVE,
        5e-324,
        1e-40,
        2147483648.0,
        9.3e18,
    ];
    match random.below(3) {
        0 => random.pick(&EDGES),
        1 => (random.bits() as i64 >> random.below(64)) as f64 / 16.0,
        _ => f64::from_bits(random.bits()),
    }
}

/// A double as x87 holds it (Intel SDM 1, 4.2.2), normal numbers only.
fn extended(value: f64) -> [u8; 10] {
    let bits = value.to_bits();
    let exponent = (bits >> 52 & 0x7FF) as u16;
    let fraction = bits << 11 & !(1 << 63);
    let (exponent, integer) = match exponent {
        0 => (0, 0),
        0x7FF => (0x7FFF, 1 << 63),
        e => (e + (16383 - 1023), 1u64 << 63),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&(fraction | integer).to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | ((bits >> 48) as u16 & 0x8000)).to_le_bytes());
    bytes
}

pub fn fpu(random: &mut Random) -> Fpu {
    let mut fpu = Fpu::default();
    for ymm in &mut fpu.ymm {
        let kind = random.below(6);
        for quad in ymm {
            *quad = match kind {
                0 => float(random).to_bits(),
                1 => {
                    u64::from((float(random) as f32).to_bits()) << 32
                        | u64::from((float(random) as f32).to_bits())
                }
                2 => (random.below(64) as u64) << 32 | random.below(64) as u64,
                3 => random.pick(&[0, u64::MAX, 1 << 63, 1 << 31 | 1 << 63]),
                _ => random.value(),
            };
        }
    }
    if random.percent(30) {
        // Rounding, flush to zero, denormals are zero.
        fpu.mxcsr = 0x1F80 | random.bits() as u32 & 0xE040;
    }
    if random.percent(4) {
        fpu.mxcsr &= !(random.bits() as u32 & 0x1F80);
    }
    if random.percent(30) {
        fpu.fcw = 0x7F | random.pick(&[0, 0x200, 0x300]) | (random.below(4) as u16) << 10;
    }
    if random.percent(4) {
        fpu.fcw &= !(random.bits() as u16 & 0x3F);
    }
    if random.percent(60) {
        fpu.tags = random.bits() as u8;
        fpu.fsw = (random.bits() as u16) & 0x7F00;
        let top = usize::from(fpu.fsw >> 11 & 7);
        for (index, st) in fpu.st.iter_mut().enumerate() {
            if fpu.tags >> ((top + index) % 8) & 1 != 0 {
                *st = extended(float(random));
                if random.percent(10) {
                    st[..8].copy_from_slice(&random.bits().to_le_bytes());
                }
            }
        }
    }
    fpu
}

/// An address in or near the data.
fn target(random: &mut Random) -> u64 {
    let page = match random.below(100) {
        0..45 => 0,
        45..75 => 1,
        75..85 => 4,
        85..93 => READ_ONLY,
        _ => HOLE,
    };
    let offset = match random.below(10) {
        0 => PAGE - 1 - random.below(40) as u64,
        1 | 2 => random.below(PAGE as usize) as u64,
        _ => random.below(PAGE as usize / 32) as u64 * 32,
    };
    let base = if random.percent(25) { DATA_HIGH } else { DATA };
    base + page * PAGE + offset
}

fn general(c: &mut Context, size: usize) -> Register {
    let number = c.random.below(16) as u32;
    let number = if number == 4 && c.random.percent(70) { 5 } else { number };
    match size {
        1 if c.random.percent(20) => Register::AH + c.random.below(4) as u32,
        1 => Register::AL + if number >= 4 { number + 4 } else { number },
        2 => Register::AX + number,
        4 => Register::EAX + number,
        _ => Register::RAX + number,
    }
}

fn memory(c: &mut Context, i: &mut Instruction, op: u32) {
    i.set_op_kind(op, OpKind::Memory);
    let to = target(&mut c.random);
    let low = to < 1 << 31;
    let fits = |value: u64| value as i64 == i64::from(value as i32);
    if low && c.random.percent(8) {
        i.set_memory_base(Register::RIP);
        i.set_memory_displacement64(to);
        i.set_memory_displ_size(8);
        return;
    }
    let segment = c.random.percent(7);
    let to = if segment {
        i.set_segment_prefix(Register::GS);
        to.wrapping_sub(GS_BASE)
    } else {
        to
    };
    let narrow = !segment && low && c.random.percent(6);
    let first = if narrow { Register::EAX } else { Register::RAX };
    for _ in 0..30 {
        let base = c.random.below(16);
        let Some(value) = c.known[base] else { continue };
        if narrow && value >> 32 != 0 {
            continue;
        }
        let mut rest = to.wrapping_sub(value);
        let mut index = None;
        if c.random.percent(35) {
            let number = c.random.below(16);
            let scale = 1u64 << c.random.below(4);
            if number != 4
                && let Some(value) = c.known[number]
                && !(narrow && value >> 32 != 0)
            {
                rest = rest.wrapping_sub(value.wrapping_mul(scale));
                index = Some((number, scale));
            }
        }
        if !fits(rest) {
            continue;
        }
        i.set_memory_base(first + base as u32);
        if let Some((number, scale)) = index {
            i.set_memory_index(first + number as u32);
            i.set_memory_index_scale(scale as u32);
        }
        i.set_memory_displacement64(if narrow { rest & 0xFFFF_FFFF } else { rest });
        i.set_memory_displ_size(if rest == 0 { 0 } else { 1 });
        return;
    }
    // No register leads there: an absolute address.
    let to = if low || segment { to } else { to - DATA_HIGH + DATA };
    i.set_memory_displacement64(to);
    i.set_memory_displ_size(8);
}

/// Takes a vector register that is not used yet where they must differ.
fn vector(c: &mut Context, free: &mut Vec<usize>, unique: bool) -> u32 {
    if unique && !free.is_empty() {
        let at = c.random.below(free.len());
        return free.swap_remove(at) as u32;
    }
    c.random.below(16) as u32
}

fn operand(
    c: &mut Context,
    i: &mut Instruction,
    op: u32,
    kind: K,
    free: &mut Vec<usize>,
    unique: bool,
) -> Option<()> {
    let to_memory = c.random.percent(60);
    let register = match kind {
        K::mem | K::mem_mib => {
            memory(c, i, op);
            return Some(());
        }
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::mm_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
            if to_memory =>
        {
            memory(c, i, op);
            return Some(());
        }
        K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
            memory(c, i, op);
            if i.memory_base().size() != 8 || i.memory_base() == Register::RIP {
                return None;
            }
            let wide = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
            let first = if wide { Register::YMM0 } else { Register::XMM0 };
            i.set_memory_index(first + vector(c, free, unique));
            i.set_memory_index_scale(1 << c.random.below(4));
            return Some(());
        }
        K::mem_offs => {
            let to = target(&mut c.random);
            i.set_op_kind(op, OpKind::Memory);
            i.set_memory_displacement64(to);
            i.set_memory_displ_size(8);
            return Some(());
        }
        K::seg_rSI => {
            i.set_op_kind(op, OpKind::MemorySegRSI);
            return Some(());
        }
        K::es_rDI => {
            i.set_op_kind(op, OpKind::MemoryESRDI);
            return Some(());
        }
        K::seg_rDI => {
            i.set_op_kind(op, OpKind::MemorySegRDI);
            return Some(());
        }
        K::seg_rBX_al => {
            i.set_op_kind(op, OpKind::Memory);
            i.set_memory_base(Register::RBX);
            i.set_memory_index(Register::AL);
            return Some(());
        }
        K::r8_or_mem | K::r8_reg | K::r8_opcode => general(c, 1),
        K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => general(c, 2),
        K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => general(c, 4),
        K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => general(c, 8),
        K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + c.random.below(8) as u32,
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
            Register::XMM0 + vector(c, free, unique)
        }
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
            Register::YMM0 + vector(c, free, unique)
        }
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::st0 => Register::ST0,
        K::sti_opcode => Register::ST0 + c.random.below(8) as u32,
        _ => return immediate(c, i, op, kind),
    };
    i.set_op_kind(op, OpKind::Register);
    i.set_op_register(op, register);
    Some(())
}

fn immediate(c: &mut Context, i: &mut Instruction, op: u32, kind: K) -> Option<()> {
    let value = c.random.value();
    let small = value as i8;
    match kind {
        K::imm8 | K::imm8_const_1 if op > 0 && i.op_kind(op - 1) == OpKind::Immediate8 => {
            i.set_op_kind(op, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(value as u8);
        }
        K::imm8 if op > 0 && i.op_kind(op - 1) == OpKind::Immediate16 => {
            i.set_op_kind(op, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(value as u8);
        }
        K::imm8 => {
            // A 16-bit double shift by more than 16 has no defined result.
            let narrow = matches!(i.code(), Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8);
            i.set_op_kind(op, OpKind::Immediate8);
            i.set_immediate8(if narrow { value as u8 & 15 } else { value as u8 });
        }
        K::imm8_const_1 => {
            i.set_op_kind(op, OpKind::Immediate8);
            i.set_immediate8(1);
        }
        K::imm8sex16 => {
            i.set_op_kind(op, OpKind::Immediate8to16);
            i.set_immediate8to16(i16::from(small));
        }
        K::imm8sex32 => {
            i.set_op_kind(op, OpKind::Immediate8to32);
            i.set_immediate8to32(i32::from(small));
        }
        K::imm8sex64 => {
            i.set_op_kind(op, OpKind::Immediate8to64);
            i.set_immediate8to64(i64::from(small));
        }
        K::imm16 => {
            i.set_op_kind(op, OpKind::Immediate16);
            i.set_immediate16(value as u16);
        }
        K::imm32 => {
            i.set_op_kind(op, OpKind::Immediate32);
            i.set_immediate32(value as u32);
        }
        K::imm32sex64 => {
            i.set_op_kind(op, OpKind::Immediate32to64);
            i.set_immediate32to64(i64::from(value as i32));
        }
        K::imm64 => {
            i.set_op_kind(op, OpKind::Immediate64);
            i.set_immediate64(value);
        }
        _ => return None,
    }
    Some(())
}
