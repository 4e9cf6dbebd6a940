//! The interpreter: every mode, every instruction; the reference for the
//! translator and its slow path.
//!
//! One instruction is decoded by iced-x86 and executed against [`Cpu`]. An
//! instruction either completes or leaves no trace but finished iterations of a
//! REP prefix, so a fault or an exit can restart it.
//!
//! - here: fetch, decode and dispatch
//! - [`operand`]: registers, effective addresses, operands
//! - [`integer`], [`shift`], [`muldiv`], [`bits`], [`string`], [`control`],
//!   [`stack`]: the user-level integer set; [`alu`] holds its arithmetic as pure
//!   functions, but what leaves something undefined: [`host_alu`]
//! - [`debug`]: hardware breakpoints
//! - [`exception`], [`frame`]: the way into a handler, for faults and interrupts
//! - [`system`], [`far`], [`gate`], [`task`], [`segment`], [`io`]: privileged
//!   instructions, far transfers, call gates, task switches, SYSCALL, ports
//! - [`platform`]: hypercalls, and what else the machine answers with registers
//! - [`thunk`]: x87, MMX, SSE, AVX and other register-only instructions, run on
//!   the host CPU with their memory operand in a bounce buffer

pub mod alu;
#[cfg(test)]
mod alu_tests;
pub mod bits;
pub mod control;
pub mod debug;
pub mod exception;
pub mod far;
pub mod frame;
pub mod gate;
pub mod host_alu;
pub mod integer;
#[cfg(test)]
mod integer_tests;
pub mod io;
pub mod muldiv;
pub mod operand;
pub mod platform;
pub mod segment;
pub mod shift;
pub mod stack;
pub mod string;
pub mod syscall;
pub mod system;
pub mod task;
pub mod thunk;
#[cfg(test)]
mod vm86_tests;
pub mod xsave;

use iced_x86::{Decoder, DecoderError, FlowControl, Instruction, Mnemonic};
use tetrarch_memory::PAGE_SIZE;

use crate::cpu::Cpu;
use crate::cpu::msr::DEBUG_CONTROL_BTF;
use crate::state::fault::{Fault, R, Stop, gp, ud};
use crate::state::{flag, seg, shadow};

/// The longest instruction (SDM 2A, 2.3.11).
const MAX_LENGTH: usize = 15;
/// DR6.BS: a single step ended (SDM 3A, 17.2.3).
const DR6_BS: u64 = 1 << 14;

/// Where execution goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// At the next instruction.
    Next,
    /// The instruction has set RIP itself.
    Jump,
}

/// Runs one instruction, or a bounded run of iterations of a REP prefix.
///
/// On `Ok` the instruction is done, or RIP is still at a REP instruction that
/// has iterations left. On `Err` nothing has changed but finished iterations;
/// only the #DB of a single step or a data breakpoint is a trap and finds RIP
/// behind the instruction, and a fault of a new task finds the task switched.
pub fn step(cpu: &mut Cpu) -> R<()> {
    cpu.replay.rewind();
    let watching = debug::watching(cpu);
    if watching {
        debug::stop_before(cpu)?;
    }
    // MOV SS and POP SS act on the next instruction like RF (SDM 3B, 17.3.1.1).
    if watching && cpu.st.flags & flag::RF == 0 && cpu.st.shadow & shadow::MOV_SS == 0 {
        let hits = debug::Breakpoints::of_guest(cpu).instruction_hits(cpu);
        if hits != 0 {
            // Goes into the saved flags, so that IRET gets past the breakpoint.
            cpu.st.flags |= flag::RF;
            return Err(Fault::debug(hits).into());
        }
    }
    let i = fetch(cpu)?;
    run(cpu, &i, watching)
}

/// Runs an instruction that has been fetched and decoded at RIP, in a mode that
/// the translator takes: no breakpoint can be on it.
pub fn step_decoded(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    cpu.replay.rewind();
    run(cpu, i, false)
}

fn run(cpu: &mut Cpu, i: &Instruction, watching: bool) -> R<()> {
    let accesses = watching.then(|| (debug::accesses(cpu, i), debug::repetitions(cpu, i)));
    let shadow = std::mem::take(&mut cpu.st.shadow);
    let flags = cpu.st.flags;
    let flow = match execute(cpu, i) {
        Ok(flow) => flow,
        Err(stop) => {
            // The instruction starts again, in the same shadow.
            if matches!(stop, Stop::Exit(_)) {
                cpu.st.shadow = shadow;
            }
            return Err(stop);
        }
    };
    if flow == Flow::Next {
        let next = i.next_ip();
        cpu.st.rip = if cpu.st.code64() { next } else { next & 0xFFFF_FFFF };
    }
    cpu.replay.clear();
    cpu.counts.interpreted += 1;
    cpu.st.count_one();
    let traced = (flags | cpu.st.flags) & (flag::TF | flag::RF) != 0;
    if traced || watching || cpu.st.pending_debug != 0 {
        let Some((mut accesses, repetitions)) = accesses else { return after(cpu, i, flags, 0) };
        if debug::repeats(i) {
            let done = repetitions.wrapping_sub(debug::repetitions(cpu, i));
            accesses.repeat(done, flags & flag::DF != 0);
        }
        let hits = debug::Breakpoints::of_guest(cpu).data_hits(&accesses);
        let trap = after(cpu, i, flags, hits);
        return debug::stop_behind(cpu, &accesses, trap);
    }
    Ok(())
}

/// RF lasts one instruction unless that loads it (SDM 3A, 17.3.1.1); TF at the
/// start of an instruction makes a trap at its end (SDM 3A, 17.3.1.4), and so do
/// the data breakpoints that it hit.
#[cold]
fn after(cpu: &mut Cpu, i: &Instruction, before: u64, hits: u64) -> R<()> {
    use Mnemonic as M;
    let unfinished = cpu.st.rip == i.ip() && i.is_string_instruction();
    let loads_flags = matches!(i.mnemonic(), M::Iret | M::Iretd | M::Iretq);
    if before & flag::RF != 0 && !loads_flags && !unfinished {
        cpu.st.flags &= !flag::RF;
    }
    let now = cpu.st.flags;
    let stepped = match i.mnemonic() {
        // Software interrupts that clear TF go unstepped (SDM 3A, 17.3.1.4).
        M::Int | M::Int3 | M::Int1 | M::Into => before & now & flag::TF != 0,
        // Of these TF counts as they leave it: SYSRET that sets it traps before
        // the first instruction of user code (AMD APM 3, "SYSRET").
        M::Syscall | M::Sysret | M::Sysretq => now & flag::TF != 0,
        _ => before & flag::TF != 0,
    };
    let by_branch = cpu.msrs.debug_control & DEBUG_CONTROL_BTF != 0;
    let stepped = stepped && (!by_branch || branches(cpu, i));
    let causes = std::mem::take(&mut cpu.st.pending_debug) | hits;
    if cpu.st.shadow & shadow::MOV_SS != 0 {
        // MOV SS and POP SS go unstepped, and what their operand hits waits for
        // the end of the next instruction (SDM 3A, 6.8.3).
        cpu.st.pending_debug = causes;
        return Ok(());
    }
    let causes = causes | if stepped { DR6_BS } else { 0 };
    if causes != 0 { Err(Fault::debug(causes).into()) } else { Ok(()) }
}

/// Whether the instruction, which is done, was a branch that was taken.
fn branches(cpu: &Cpu, i: &Instruction) -> bool {
    match i.flow_control() {
        FlowControl::Next => false,
        FlowControl::ConditionalBranch => cpu.st.rip == i.near_branch_target(),
        _ => true,
    }
}

/// Fetches and decodes the instruction at CS:RIP.
pub fn fetch(cpu: &mut Cpu) -> R<Instruction> {
    let rip = cpu.st.rip;
    let bits = cpu.st.code_bits();
    let cs = &cpu.st.seg[seg::CS];
    let (start, room) = if bits == 64 {
        (rip, MAX_LENGTH)
    } else {
        let Some(left) = u64::from(cs.limit).checked_sub(rip) else { return gp(0) };
        (cs.base.wrapping_add(rip) & 0xFFFF_FFFF, (left as usize + 1).min(MAX_LENGTH))
    };
    let mut bytes = [0; MAX_LENGTH];
    let mut len = 0;
    let options = cpu.vm.cpuid.decoder_options();
    loop {
        // The next page is touched only by an instruction that reaches it, which
        // then meets its fault.
        let at = start.wrapping_add(len as u64);
        let at = if bits == 64 { at } else { at & 0xFFFF_FFFF };
        let on_page = (PAGE_SIZE - (at & (PAGE_SIZE - 1))) as usize;
        len += cpu.fetch(at, &mut bytes[len..room.min(len + on_page)])?;
        let mut decoder = Decoder::with_ip(bits, &bytes[..len], rip, options);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => return Ok(instruction),
            DecoderError::NoMoreBytes if len < room => {}
            // Over the limit of CS, or over 15 bytes, which the decoder calls
            // invalid once it has used them all.
            DecoderError::NoMoreBytes => return gp(0),
            _ if instruction.len() == MAX_LENGTH => return gp(0),
            _ => return ud(),
        }
    }
}

/// Executes a decoded instruction.
pub fn execute(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    use Mnemonic as M;
    if !cpu.vm.cpuid.runs(i) {
        // These two encodings mean BSF and BSR on a CPU without them.
        return match i.mnemonic() {
            M::Tzcnt => bits::bit_scan(cpu, i, false),
            M::Lzcnt => bits::bit_scan(cpu, i, true),
            _ => platform::hypercall(cpu, i).unwrap_or_else(ud),
        };
    }
    if let Some(result) = dispatch_integer(cpu, i) {
        return result;
    }
    if let Some(result) = system::execute(cpu, i) {
        return result;
    }
    if let Some(result) = xsave::execute(cpu, i) {
        return result.map(|()| Flow::Next);
    }
    thunk::execute(cpu, i).unwrap_or_else(ud)
}

/// The user-level integer instructions; `None` for all others.
fn dispatch_integer(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Mov if integer::is_plain_mov(i) => integer::mov(cpu, i),
        M::Mov => return None,
        M::Movzx | M::Movnti => integer::mov(cpu, i),
        M::Movsx | M::Movsxd => integer::movsx(cpu, i),
        M::Movbe => integer::movbe(cpu, i),
        M::Lea => integer::lea(cpu, i),
        M::Xchg => integer::xchg(cpu, i),
        M::Xadd => integer::xadd(cpu, i),
        M::Cmpxchg => integer::cmpxchg(cpu, i),
        M::Cmpxchg8b => integer::cmpxchg8b(cpu, i),
        M::Cmpxchg16b => integer::cmpxchg16b(cpu, i),
        M::Bswap => integer::bswap(cpu, i),
        M::Xlatb => integer::xlat(cpu, i),
        M::Bound => integer::bound(cpu, i),

        M::Add | M::Adc | M::Sub | M::Sbb | M::And | M::Or | M::Xor => integer::binary(cpu, i),
        M::Cmp => integer::compare(cpu, i, alu::cmp),
        M::Test => integer::compare(cpu, i, alu::test),
        M::Inc => integer::unary(cpu, i, alu::MASK_INC, alu::inc),
        M::Dec => integer::unary(cpu, i, alu::MASK_INC, alu::dec),
        M::Neg => integer::unary(cpu, i, flag::ARITH, alu::neg),
        M::Not => integer::unary(cpu, i, 0, alu::not),
        M::Adcx | M::Adox => integer::adcx_adox(cpu, i),
        M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad => integer::bcd(cpu, i),
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => integer::convert(cpu, i),
        M::Lahf | M::Sahf | M::Salc | M::Clc | M::Stc | M::Cmc | M::Cld | M::Std => {
            integer::flag_instruction(cpu, i)
        }
        M::Cli | M::Sti => stack::cli_sti(cpu, i),

        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => {
            shift::shift(cpu, i)
        }
        M::Shld | M::Shrd => shift::double_shift(cpu, i),
        M::Rorx | M::Sarx | M::Shlx | M::Shrx => shift::shift_without_flags(cpu, i),

        M::Mul => muldiv::mul(cpu, i, false),
        M::Imul => muldiv::imul(cpu, i),
        M::Mulx => muldiv::mulx(cpu, i),
        M::Div => muldiv::div(cpu, i, false),
        M::Idiv => muldiv::div(cpu, i, true),

        M::Bt | M::Bts | M::Btr | M::Btc => bits::bit_test(cpu, i),
        M::Bsf => bits::bit_scan(cpu, i, false),
        M::Bsr => bits::bit_scan(cpu, i, true),
        M::Tzcnt | M::Lzcnt | M::Popcnt => bits::count(cpu, i),
        M::Andn | M::Bextr | M::Bzhi | M::Pdep | M::Pext => bits::bmi_two_sources(cpu, i),
        M::Blsi | M::Blsmsk | M::Blsr => bits::bmi_lowest(cpu, i),
        M::Crc32 => bits::crc32(cpu, i),
        M::Rdrand | M::Rdseed => bits::random(cpu, i),

        M::Push | M::Pop if stack::is_segment(i) => return None,
        M::Push => stack::push(cpu, i),
        M::Pop => stack::pop(cpu, i),
        M::Pusha | M::Pushad => stack::pusha(cpu, i),
        M::Popa | M::Popad => stack::popa(cpu, i),
        M::Pushf | M::Pushfd | M::Pushfq => stack::pushf(cpu, i),
        M::Popf | M::Popfd | M::Popfq => stack::popf(cpu, i),
        M::Enter => stack::enter(cpu, i),
        M::Leave => stack::leave(cpu, i),

        M::Jmp if control::is_near(i) => control::jmp(cpu, i),
        M::Call if control::is_near(i) => control::call(cpu, i),
        M::Jmp | M::Call => return None,
        M::Ret => control::ret(cpu, i),
        M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne => {
            control::count_branch(cpu, i)
        }

        M::Movsb | M::Movsw | M::Movsq => string::movs(cpu, i),
        M::Movsd if i.is_string_instruction() => string::movs(cpu, i),
        M::Cmpsb | M::Cmpsw | M::Cmpsq => string::cmps(cpu, i),
        M::Cmpsd if i.is_string_instruction() => string::cmps(cpu, i),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => string::stos(cpu, i),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => string::lods(cpu, i),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => string::scas(cpu, i),

        M::Pause => {
            pause(cpu);
            Ok(Flow::Next)
        }
        M::Nop | M::Reservednop | M::Endbr32 | M::Endbr64 | M::Rdsspd | M::Rdsspq => Ok(Flow::Next),
        M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchit0
        | M::Prefetchit1 => Ok(Flow::Next),
        M::Lfence | M::Sfence | M::Mfence | M::Serialize => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(Flow::Next)
        }
        M::Clflush | M::Clflushopt | M::Clwb | M::Cldemote => integer::cache_line(cpu, i),
        M::Clzero => integer::clear_line(cpu, i),

        _ => return dispatch_conditional(cpu, i),
    })
}

/// After so many PAUSEs the host's CPU is given away.
const PATIENCE: u32 = 16;

/// PAUSE: what a loop waits for may be done by a vCPU that waits for this host's CPU.
fn pause(cpu: &mut Cpu) {
    if cpu.vm.crowded {
        cpu.pauses += 1;
        if cpu.pauses >= PATIENCE {
            cpu.pauses = 0;
            std::thread::yield_now();
        }
    }
}

/// Jcc, SETcc and CMOVcc.
fn dispatch_conditional(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Jo
        | M::Jno
        | M::Jb
        | M::Jae
        | M::Je
        | M::Jne
        | M::Jbe
        | M::Ja
        | M::Js
        | M::Jns
        | M::Jp
        | M::Jnp
        | M::Jl
        | M::Jge
        | M::Jle
        | M::Jg => control::jcc(cpu, i),
        M::Seto
        | M::Setno
        | M::Setb
        | M::Setae
        | M::Sete
        | M::Setne
        | M::Setbe
        | M::Seta
        | M::Sets
        | M::Setns
        | M::Setp
        | M::Setnp
        | M::Setl
        | M::Setge
        | M::Setle
        | M::Setg => integer::setcc(cpu, i),
        M::Cmovo
        | M::Cmovno
        | M::Cmovb
        | M::Cmovae
        | M::Cmove
        | M::Cmovne
        | M::Cmovbe
        | M::Cmova
        | M::Cmovs
        | M::Cmovns
        | M::Cmovp
        | M::Cmovnp
        | M::Cmovl
        | M::Cmovge
        | M::Cmovle
        | M::Cmovg => integer::cmovcc(cpu, i),
        _ => return None,
    })
}
