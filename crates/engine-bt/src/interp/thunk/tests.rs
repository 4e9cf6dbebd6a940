//! Native execution against the host CPU itself, and against the SDM where the
//! host must not be asked.

use std::arch::asm;

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, MemoryOperand};
use tetrarch_engine::Exit;
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::*;
use crate::cpu::VmShared;
use crate::interp::xsave;
use crate::state::{Ymm, attr, cr, flag, reg, seg};

const RAM: u64 = 1 << 20;
/// Not RAM: an access leaves the vCPU.
const DEVICE: u64 = 0xD000_0000;

/// A vCPU in 64-bit mode without paging, every FPU feature on.
pub(crate) fn machine() -> Cpu {
    signals::install();
    let mut cpu = Cpu::new(0, VmShared::alone(GuestMemory::new(RAM).unwrap())).unwrap();
    let st = &mut *cpu.st;
    st.cr0 = cr::CR0_PE | cr::CR0_MP | cr::CR0_NE | cr::CR0_ET;
    st.cr4 = cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT | cr::CR4_OSXSAVE;
    st.xcr0 = 7;
    st.efer = cr::EFER_LME | cr::EFER_LMA;
    st.seg[seg::CS].attributes |= attr::L;
    cpu.update_mode();
    cpu
}

/// What runs on the host CPU, as [`crate::interp`] asks for it.
fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let done = xsave::execute(cpu, i).map(|done| done.map(|()| Flow::Next));
    done.or_else(|| super::execute(cpu, i))
}

/// Assembles one instruction and executes it.
fn exec(cpu: &mut Cpu, build: impl FnOnce(&mut CodeAssembler)) -> R<Flow> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a);
    let bytes = a.assemble(0).unwrap();
    exec_bytes(cpu, &bytes, 64)
}

fn exec_bytes(cpu: &mut Cpu, bytes: &[u8], bits: u32) -> R<Flow> {
    let i = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
    assert_eq!(i.len(), bytes.len(), "{bytes:02x?}");
    cpu.replay.rewind();
    let result = execute(cpu, &i).expect("an instruction for the host");
    if result.is_ok() {
        cpu.replay.clear();
    }
    result
}

fn poke(cpu: &Cpu, address: u64, bytes: &[u8]) {
    cpu.vm.memory.write(GuestPhys(address), bytes).unwrap();
}

fn peek(cpu: &Cpu, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    cpu.vm.memory.read(GuestPhys(address), &mut bytes).unwrap();
    bytes
}

fn fault(vector: u8) -> Stop {
    Fault::new(vector).into()
}

fn gp0() -> Stop {
    Fault::with_error(vector::GP, 0).into()
}

fn floats(values: [f32; 8]) -> Ymm {
    let mut bytes = [0; 32];
    for (part, value) in bytes.chunks_exact_mut(4).zip(values) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    let mut ymm = Ymm::default();
    fpu::set_half(&mut ymm, 0, &bytes[..16]);
    fpu::set_half(&mut ymm, 1, &bytes[16..]);
    ymm
}

const A: [f32; 8] = [1.5, -2.25, 3e10, 0.1, 7.0, -0.0, 1e-40, 5.5];
const B: [f32; 8] = [0.3, 4.0, -1e-10, 0.7, 0.5, 9.0, 2.0, -5.5];

/// Runs a legacy SSE instruction by inline assembly: the answer of the host.
macro_rules! host_sse {
    ($text:literal, $a:expr, $b:expr) => {{
        let (mut a, b): (Ymm, Ymm) = ($a, $b);
        // SAFETY: the instruction reads and writes xmm0 and xmm1.
        unsafe {
            asm!("movups xmm0, [{a}]", "movups xmm1, [{b}]", $text, "movups [{a}], xmm0",
                a = in(reg) &raw mut a, b = in(reg) &raw const b,
                out("xmm0") _, out("xmm1") _, options(nostack));
        }
        a
    }};
}

#[test]
fn sse_gives_what_the_host_gives() {
    let mut cpu = machine();
    let (a, b) = (floats(A), floats(B));
    macro_rules! check {
        ($name:ident, $text:literal) => {
            // Upper halves stay, as SSE instructions leave them.
            cpu.st.vec[3] = a;
            cpu.st.vec[12] = b;
            exec(&mut cpu, |c| c.$name(xmm3, xmm12).unwrap()).unwrap();
            assert_eq!(cpu.st.vec[3], host_sse!($text, a, b), $text);
            poke(&cpu, 0x1230, &fpu::half(&b, 0));
            cpu.st.gpr[8] = 0x1000;
            cpu.st.gpr[15] = 0x46;
            cpu.st.vec[3] = a;
            exec(&mut cpu, |c| c.$name(xmm3, xmmword_ptr(r8 + r15 * 8)).unwrap()).unwrap();
            assert_eq!(cpu.st.vec[3], host_sse!($text, a, b), $text);
        };
    }
    check!(addps, "addps xmm0, xmm1");
    check!(mulps, "mulps xmm0, xmm1");
    check!(divps, "divps xmm0, xmm1");
    check!(pshufb, "pshufb xmm0, xmm1");
    check!(psadbw, "psadbw xmm0, xmm1");
    check!(pmaddwd, "pmaddwd xmm0, xmm1");
    check!(haddps, "haddps xmm0, xmm1");
    check!(pmulld, "pmulld xmm0, xmm1");
    check!(aesenc, "aesenc xmm0, xmm1");
}

#[test]
fn avx_uses_all_of_the_register() {
    if !fpu::host_avx() {
        return;
    }
    let mut cpu = machine();
    cpu.st.vec[1] = floats(A);
    cpu.st.vec[14] = floats(B);
    exec(&mut cpu, |c| c.vaddps(ymm9, ymm1, ymm14).unwrap()).unwrap();
    let sum: [f32; 8] = std::array::from_fn(|n| A[n] + B[n]);
    assert_eq!(cpu.st.vec[9], floats(sum));
    exec(&mut cpu, |c| c.vmulps(xmm9, xmm1, xmm14).unwrap()).unwrap();
    assert_eq!(cpu.st.vec[9].0[2..], [0, 0]);
    exec(&mut cpu, |c| c.vzeroupper().unwrap()).unwrap();
    assert!(cpu.st.vec.iter().all(|ymm| ymm.0[2..] == [0, 0]));
}

#[test]
fn general_registers_take_part() {
    let mut cpu = machine();
    cpu.st.vec[2] = Ymm([0x8000_0000_0000_0080, 0x0080_0000_0000_8000, 9, 9]);
    cpu.st.gpr[reg::RAX] = u64::MAX;
    exec(&mut cpu, |c| c.pmovmskb(eax, xmm2).unwrap()).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], 0b0100_0010_1000_0001);
    let before = cpu.st.gpr;
    cpu.st.gpr[13] = (-7i64) as u64;
    exec(&mut cpu, |c| c.cvtsi2sd(xmm5, r13).unwrap()).unwrap();
    assert_eq!(f64::from_bits(cpu.st.vec[5].0[0]), -7.0);
    cpu.st.gpr[13] = before[13];
    cpu.st.gpr[reg::RSP] = 4242;
    exec(&mut cpu, |c| c.cvtsi2sd(xmm5, rsp).unwrap()).unwrap();
    assert_eq!(f64::from_bits(cpu.st.vec[5].0[0]), 4242.0);
    exec(&mut cpu, |c| c.pmovmskb(esp, xmm2).unwrap()).unwrap();
    assert_eq!(cpu.st.gpr[reg::RSP], 0b0100_0010_1000_0001);
    cpu.st.gpr[reg::RSP] = before[reg::RSP];
    assert_eq!(cpu.st.gpr, before);
    cpu.st.gpr[reg::RSP] = 0x2000;
    exec(&mut cpu, |c| c.movnti(qword_ptr(rsp + 8), rsp).unwrap()).unwrap();
    assert_eq!(peek(&cpu, 0x2008, 8), 0x2000u64.to_le_bytes());
}

#[test]
fn flags_come_back() {
    let mut cpu = machine();
    cpu.st.vec[0] = floats(A);
    cpu.st.vec[1] = floats(B);
    cpu.st.set_rflags(flag::ARITH | flag::DF | flag::IF);
    exec(&mut cpu, |c| c.comiss(xmm1, xmm0).unwrap()).unwrap();
    assert_eq!(cpu.st.rflags(), flag::CF | flag::DF | flag::IF | flag::FIXED);
    cpu.st.vec[1].0[0] = u64::MAX;
    exec(&mut cpu, |c| c.ucomiss(xmm0, xmm1).unwrap()).unwrap();
    assert_eq!(cpu.st.flags & flag::ARITH, flag::CF | flag::PF | flag::ZF);
    exec(&mut cpu, |c| c.addps(xmm0, xmm0).unwrap()).unwrap();
    assert_eq!(cpu.st.flags & flag::ARITH, flag::CF | flag::PF | flag::ZF);
}

#[test]
fn x87_with_memory_loaded_or_not() {
    for live in [false, true] {
        let mut cpu = machine();
        if live {
            fpu::load(&mut cpu.st);
        }
        poke(&cpu, 0x100, &2.5f64.to_le_bytes());
        poke(&cpu, 0x108, &10i16.to_le_bytes());
        cpu.st.gpr[reg::RDI] = 0x100;
        exec(&mut cpu, |c| c.fld(qword_ptr(rdi)).unwrap()).unwrap();
        exec(&mut cpu, |c| c.fadd(qword_ptr(rdi)).unwrap()).unwrap();
        exec(&mut cpu, |c| c.fiadd(word_ptr(rdi + 8)).unwrap()).unwrap();
        exec(&mut cpu, |c| c.fld(st0).unwrap()).unwrap();
        exec(&mut cpu, |c| c.fstp(tbyte_ptr(rdi + 16)).unwrap()).unwrap();
        exec(&mut cpu, |c| c.fistp(dword_ptr(rdi + 32)).unwrap()).unwrap();
        assert_eq!(peek(&cpu, 0x110, 10), [0, 0, 0, 0, 0, 0, 0, 0xF0, 2, 0x40]);
        assert_eq!(peek(&cpu, 0x120, 4), 15i32.to_le_bytes());
        exec(&mut cpu, |c| c.fnstsw(ax).unwrap()).unwrap();
        assert_eq!(cpu.st.gpr[reg::RAX] & 0x3800, 0, "the stack is empty again");
        fpu::unload(&mut cpu.st);
        assert_eq!(cpu.st.fx.0[4], 0);
    }
}

#[test]
fn unmasked_simd_exception() {
    let mut cpu = machine();
    cpu.st.vec[0] = floats([1.0; 8]);
    cpu.st.mxcsr = 0x1F80 & !(1 << 9);
    let before = cpu.st.vec;
    let divide = |c: &mut CodeAssembler| c.divps(xmm0, xmm7).unwrap();
    assert_eq!(exec(&mut cpu, divide), Err(fault(vector::XM)));
    assert_eq!(cpu.st.mxcsr, 0x1D84, "the flag of the exception is set");
    assert_eq!(cpu.st.vec, before);
    cpu.st.cr4 &= !cr::CR4_OSXMMEXCPT;
    assert_eq!(exec(&mut cpu, divide), Err(fault(vector::UD)));
    cpu.st.mxcsr = 0x1F80;
    exec(&mut cpu, divide).unwrap();
    assert_eq!(cpu.st.vec[0].0[0], 0x7F80_0000_7F80_0000);
    let mut host = 0u32;
    // SAFETY: stores four bytes to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut host, options(nostack)) };
    assert_eq!(host & 0x1F80, 0x1F80, "the guest's MXCSR stays in thunks");
}

#[test]
fn rsp_keeps_its_value_through_a_fault() {
    let mut cpu = machine();
    cpu.st.mxcsr = 0x1F80 & !(1 << 12);
    cpu.st.gpr[reg::RSP] = (1 << 60) + 1;
    let before = cpu.st.gpr;
    let inexact = |c: &mut CodeAssembler| c.cvtsi2sd(xmm0, rsp).unwrap();
    assert_eq!(exec(&mut cpu, inexact), Err(fault(vector::XM)));
    assert_eq!(cpu.st.gpr, before);
}

#[test]
fn pending_x87_exception() {
    let mut cpu = machine();
    poke(&cpu, 0x200, &0x37Bu16.to_le_bytes());
    poke(&cpu, 0x300, &[0xAA; 8]);
    cpu.st.gpr[reg::RSI] = 0x200;
    exec(&mut cpu, |c| c.fldcw(word_ptr(rsi)).unwrap()).unwrap();
    exec(&mut cpu, |c| c.fld1().unwrap()).unwrap();
    exec(&mut cpu, |c| c.fldz().unwrap()).unwrap();
    exec(&mut cpu, |c| c.fdivp(st1, st0).unwrap()).unwrap();
    assert_eq!(exec(&mut cpu, |c| c.wait().unwrap()), Err(fault(vector::MF)));
    assert_eq!(exec(&mut cpu, |c| c.fld1().unwrap()), Err(fault(vector::MF)));
    assert_eq!(exec(&mut cpu, |c| c.emms().unwrap()), Err(fault(vector::MF)));
    exec(&mut cpu, |c| c.fnclex().unwrap()).unwrap();
    exec(&mut cpu, |c| c.wait().unwrap()).unwrap();
    // An unmasked stack underflow stores nothing.
    poke(&cpu, 0x200, &0x37Eu16.to_le_bytes());
    exec(&mut cpu, |c| c.fninit().unwrap()).unwrap();
    exec(&mut cpu, |c| c.fldcw(word_ptr(rsi)).unwrap()).unwrap();
    exec(&mut cpu, |c| c.fstp(qword_ptr(rsi + 0x100)).unwrap()).unwrap();
    assert_eq!(peek(&cpu, 0x300, 8), [0xAA; 8]);
    assert_eq!(exec(&mut cpu, |c| c.wait().unwrap()), Err(fault(vector::MF)));
}

#[test]
fn store_to_a_device_pops_once() {
    let mut cpu = machine();
    cpu.st.gpr[reg::RBX] = DEVICE;
    exec(&mut cpu, |c| c.fldpi().unwrap()).unwrap();
    exec(&mut cpu, |c| c.fld1().unwrap()).unwrap();
    let store = |c: &mut CodeAssembler| c.fstp(dword_ptr(rbx + 4)).unwrap();
    let exit = Exit::MmioWrite { address: DEVICE + 4, size: 4, data: 0x3F80_0000 };
    assert_eq!(exec(&mut cpu, store), Err(Stop::Exit(exit)));
    assert_eq!(cpu.st.fx.0[4], 0xC0);
    cpu.replay.answer(0);
    exec(&mut cpu, store).unwrap();
    assert_eq!(cpu.st.fx.0[4], 0x80);
    let load = |c: &mut CodeAssembler| c.movd(xmm1, dword_ptr(rbx)).unwrap();
    let exit = Exit::MmioRead { address: DEVICE, size: 4 };
    assert_eq!(exec(&mut cpu, load), Err(Stop::Exit(exit)));
    cpu.replay.answer(0x1234_5678);
    exec(&mut cpu, load).unwrap();
    assert_eq!(cpu.st.vec[1].0[..2], [0x1234_5678, 0]);
}

#[test]
fn alignment_of_operands() {
    let mut cpu = machine();
    cpu.st.gpr[reg::RAX] = 0x1008;
    assert_eq!(exec(&mut cpu, |c| c.movaps(xmm0, xmmword_ptr(rax)).unwrap()), Err(gp0()));
    assert_eq!(exec(&mut cpu, |c| c.addps(xmm0, xmmword_ptr(rax)).unwrap()), Err(gp0()));
    assert_eq!(exec(&mut cpu, |c| c.movntdq(xmmword_ptr(rax), xmm0).unwrap()), Err(gp0()));
    exec(&mut cpu, |c| c.movups(xmm0, xmmword_ptr(rax)).unwrap()).unwrap();
    exec(&mut cpu, |c| c.pcmpistri(xmm0, xmmword_ptr(rax), 0).unwrap()).unwrap();
    exec(&mut cpu, |c| c.addsd(xmm0, qword_ptr(rax + 1)).unwrap()).unwrap();
    if fpu::host_avx() {
        exec(&mut cpu, |c| c.vaddps(xmm0, xmm0, xmmword_ptr(rax)).unwrap()).unwrap();
        exec(&mut cpu, |c| c.vmovaps(xmm0, xmmword_ptr(rax + 8)).unwrap()).unwrap();
        let wide = |c: &mut CodeAssembler| c.vmovaps(ymm0, ymmword_ptr(rax + 8)).unwrap();
        assert_eq!(exec(&mut cpu, wide), Err(gp0()));
    }
    cpu.st.gpr[reg::RAX] = 0x8000_0000_0000_0000;
    assert_eq!(exec(&mut cpu, |c| c.movups(xmm0, xmmword_ptr(rax)).unwrap()), Err(gp0()));
}

#[test]
fn control_registers_decide() {
    let (ud, nm) = (Err(fault(vector::UD)), Err(fault(vector::NM)));
    let x87 = |c: &mut CodeAssembler| c.fld1().unwrap();
    let wait = |c: &mut CodeAssembler| c.wait().unwrap();
    let mmx = |c: &mut CodeAssembler| c.paddb(mm0, mm1).unwrap();
    let sse = |c: &mut CodeAssembler| c.paddb(xmm0, xmm1).unwrap();
    let avx = |c: &mut CodeAssembler| c.vpaddb(xmm0, xmm1, xmm2).unwrap();
    let fxsave = |c: &mut CodeAssembler| c.fxsave(ptr(rax)).unwrap();
    let xsave = |c: &mut CodeAssembler| c.xsave(ptr(rax)).unwrap();
    let mut cpu = machine();
    cpu.st.cr0 |= cr::CR0_TS;
    assert_eq!(exec(&mut cpu, x87), nm);
    assert_eq!(exec(&mut cpu, wait), nm);
    assert_eq!(exec(&mut cpu, mmx), nm);
    assert_eq!(exec(&mut cpu, sse), nm);
    assert_eq!(exec(&mut cpu, avx), nm);
    assert_eq!(exec(&mut cpu, fxsave), nm);
    assert_eq!(exec(&mut cpu, xsave), nm);
    cpu.st.cr0 &= !cr::CR0_MP;
    assert_eq!(exec(&mut cpu, wait), Ok(Flow::Next));
    cpu.st.cr0 = cpu.st.cr0 & !cr::CR0_TS | cr::CR0_EM;
    assert_eq!(exec(&mut cpu, x87), nm);
    assert_eq!(exec(&mut cpu, mmx), ud);
    assert_eq!(exec(&mut cpu, sse), ud);
    assert_eq!(exec(&mut cpu, wait), Ok(Flow::Next));
    let mut cpu = machine();
    cpu.st.cr4 &= !cr::CR4_OSFXSR;
    assert_eq!(exec(&mut cpu, mmx), Ok(Flow::Next));
    assert_eq!(exec(&mut cpu, sse), ud);
    cpu.st.xcr0 = 3;
    assert_eq!(exec(&mut cpu, avx), ud);
    cpu.st.cr4 &= !cr::CR4_OSXSAVE;
    assert_eq!(exec(&mut cpu, xsave), ud);
    cpu.st.cr0 &= !cr::CR0_PE;
    assert_eq!(exec(&mut cpu, avx), ud);
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let mut cpu = machine();
    for bytes in [
        &[0x48, 0x01, 0xD8][..],               // add rax, rbx
        &[0x0F, 0xA2],                         // cpuid
        &[0xF4],                               // hlt
        &[0x0F, 0x05],                         // syscall
        &[0x0F, 0x31],                         // rdtsc
        &[0x50],                               // push rax
        &[0xF3, 0xA4],                         // rep movsb
        &[0x0F, 0x01, 0xD0],                   // xgetbv
        &[0x0F, 0x78, 0xC3],                   // vmread rbx, rax
        &[0xC5, 0xF8, 0x90, 0xC1],             // kmovw k0, k1
        &[0x62, 0xF1, 0x7C, 0x08, 0x58, 0xC1], // vaddps xmm0, xmm0, xmm1 by EVEX
    ] {
        let i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(execute(&mut cpu, &i).is_none(), "{i}");
    }
}

#[test]
fn more_thunks_than_there_is_room() {
    let mut cpu = machine();
    for round in 0..2 {
        for value in 0..=255u32 {
            for source in 0..16u8 {
                let from = XMM[usize::from(source)];
                cpu.st.vec[usize::from(source)] =
                    Ymm([0x1111_1111_0000_0000, 0x3333_3333_2222_2222, 0, 0]);
                exec(&mut cpu, |c| c.pshufd(xmm4, from, value).unwrap()).unwrap();
                let low = u64::from((value & 3) * 0x1111_1111);
                let high = u64::from((value >> 2 & 3) * 0x1111_1111);
                assert_eq!(cpu.st.vec[4].0[0], high << 32 | low, "{round} {value} {source}");
            }
        }
    }
}

/// Whatever bytes decode to, the host survives and RSP is never given away.
#[test]
fn random_instructions_stay_inside() {
    let mut cpu = machine();
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut ran = 0;
    for _ in 0..100_000 {
        let mut bytes = [0; 16];
        for part in bytes.chunks_exact_mut(8) {
            part.copy_from_slice(&random().to_le_bytes());
        }
        let start: &[u8] = match random() % 8 {
            0 => &[0x0F],
            1 => &[0x66, 0x0F],
            2 => &[0xF2, 0x48, 0x0F],
            3 => &[0xF3, 0x0F],
            4 => &[0xC5],
            5 => &[0xC4, 0xE2, 0x7D],
            6 => &[0x66, 0x0F, 0x38],
            _ => &[0xD8],
        };
        bytes[..start.len()].copy_from_slice(start);
        if start == [0xD8] {
            bytes[0] |= (random() & 7) as u8;
        }
        for bits in [16, 32, 64] {
            let i = Decoder::new(bits, &bytes, DecoderOptions::NONE).decode();
            if i.is_invalid() {
                continue;
            }
            for value in cpu.st.gpr.iter_mut() {
                *value = random() & 0xF_FFF0;
            }
            cpu.st.mxcsr = random() as u32 & 0xFFFF;
            cpu.st.vec[(random() & 15) as usize].0 = std::array::from_fn(|_| random());
            let stack = cpu.st.gpr[reg::RSP];
            let named =
                (0..i.op_count()).any(|op| i.op_register(op).full_register() == Register::RSP);
            if let Some(result) = execute(&mut cpu, &i) {
                ran += u64::from(result.is_ok());
                assert!(named || cpu.st.gpr[reg::RSP] == stack, "{i}");
            }
            cpu.replay.clear();
        }
    }
    assert!(ran > 10_000, "{ran}");
}

const XMM: [AsmRegisterXmm; 16] = [
    xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14,
    xmm15,
];

#[test]
fn threads_do_not_share_state() {
    let threads: Vec<_> = (0..4u64)
        .map(|id| {
            std::thread::spawn(move || {
                signals::thread_init();
                let mut cpu = machine();
                cpu.st.vec[0].0[0] = id;
                for _ in 0..1000 {
                    exec(&mut cpu, |c| c.paddq(xmm1, xmm0).unwrap()).unwrap();
                }
                cpu.st.vec[1].0[0]
            })
        })
        .collect();
    for (id, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap(), id as u64 * 1000);
    }
}

#[test]
fn masked_elements_do_not_fault() {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    let mut cpu = machine();
    let sign = 1u64 << 63;
    poke(&cpu, 0x1000, &[0x11; 32]);
    // Elements 0 and 3; the second half of the operand is not RAM.
    cpu.st.gpr[reg::RCX] = RAM - 16;
    poke(&cpu, RAM - 16, &[7; 16]);
    cpu.st.vec[1] = Ymm([0x8000_0000, sign, 0, 0]);
    cpu.st.vec[2] = Ymm([u64::MAX; 4]);
    exec(&mut cpu, |c| c.vmaskmovps(ymm2, ymm1, ymmword_ptr(rcx)).unwrap()).unwrap();
    assert_eq!(cpu.st.vec[2], Ymm([0x0707_0707, 0x0707_0707 << 32, 0, 0]));
    cpu.st.vec[2] = Ymm([1, 2, 3, 4]);
    exec(&mut cpu, |c| c.vpmaskmovd(ymmword_ptr(rcx), ymm1, ymm2).unwrap()).unwrap();
    assert_eq!(peek(&cpu, RAM - 16, 16), [1, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0, 0, 0]);
    cpu.st.gpr[reg::RDI] = 0x1003;
    cpu.st.vec[3] = Ymm([0x80, 0x80 << 56, 0, 0]);
    exec(&mut cpu, |c| c.maskmovdqu(xmm2, xmm3).unwrap()).unwrap();
    let mut expected = [0x11; 32];
    (expected[3], expected[18]) = (1, 0);
    assert_eq!(peek(&cpu, 0x1000, 32), expected);
}

#[test]
fn mmx_mask_stores_and_marks_the_state() {
    let mut cpu = machine();
    cpu.st.gpr[reg::RAX] = 0x8877_6655_4433_2211;
    cpu.st.gpr[reg::RDX] = 0x80_0000_0000_0080;
    cpu.st.gpr[reg::RDI] = 0x1001;
    exec(&mut cpu, |c| c.fld1().unwrap()).unwrap();
    exec(&mut cpu, |c| c.movq(mm3, rax).unwrap()).unwrap();
    exec(&mut cpu, |c| c.movq(mm6, rdx).unwrap()).unwrap();
    exec(&mut cpu, |c| c.maskmovq(mm3, mm6).unwrap()).unwrap();
    assert_eq!(peek(&cpu, 0x1000, 9), [0, 0x11, 0, 0, 0, 0, 0, 0x77, 0]);
    assert_eq!(cpu.st.fx.0[4], 0xFF);
    exec(&mut cpu, |c| c.emms().unwrap()).unwrap();
    assert_eq!(cpu.st.fx.0[4], 0);
}

/// A gather to register 0 from [rbx + index * scale] by the mask in register 2.
fn vsib(code: Code, to: Register, index: Register, scale: u32) -> impl Fn(&mut CodeAssembler) {
    let mask = to + 2;
    let memory = MemoryOperand::with_base_index_scale(Register::RBX, index, scale);
    let i = Instruction::with3(code, to, memory, mask).unwrap();
    move |c| c.add_instruction(i).unwrap()
}

#[test]
fn gathers() {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    let mut cpu = machine();
    for n in 0..64u32 {
        poke(&cpu, 0x4000 + u64::from(n) * 4, &n.to_le_bytes());
    }
    cpu.st.gpr[reg::RBX] = 0x4080;
    let pair = |low: i32, high: i32| u64::from(low as u32) | u64::from(high as u32) << 32;
    cpu.st.vec[1] = Ymm([pair(0, -3), pair(5, 7), pair(-32, 1), pair(2, 3)]);
    cpu.st.vec[2] = Ymm([u64::MAX, 0, u64::MAX, u64::MAX]);
    cpu.st.vec[0] = Ymm([99; 4]);
    exec(&mut cpu, vsib(Code::VEX_Vpgatherdd_ymm_vm32y_ymm, Register::YMM0, Register::YMM1, 4))
        .unwrap();
    assert_eq!(cpu.st.vec[0], Ymm([pair(32, 29), 99, pair(0, 33), pair(34, 35)]));
    assert_eq!(cpu.st.vec[2], Ymm::default());
    // Four quadword indices, four words: the upper half of the result is zero.
    cpu.st.vec[1] = Ymm([1, 2, u64::MAX, 0]);
    cpu.st.vec[2] = Ymm([u64::MAX; 4]);
    cpu.st.vec[0] = Ymm([99; 4]);
    exec(&mut cpu, vsib(Code::VEX_Vgatherqps_xmm_vm64y_xmm, Register::XMM0, Register::YMM1, 4))
        .unwrap();
    assert_eq!(cpu.st.vec[0], Ymm([pair(33, 34), pair(31, 32), 0, 0]));
    // A fault keeps the elements before it.
    cpu.st.vec[1] = Ymm([1, 1 << 62, 0, 0]);
    cpu.st.vec[2] = Ymm([u64::MAX, u64::MAX, 0, 0]);
    cpu.st.vec[0] = Ymm([99; 4]);
    let load = vsib(Code::VEX_Vpgatherqq_xmm_vm64x_xmm, Register::XMM0, Register::XMM1, 2);
    assert_eq!(exec(&mut cpu, load), Err(gp0()));
    assert_eq!(cpu.st.vec[0].0[1], 99);
    assert_ne!(cpu.st.vec[0].0[0], 99);
    assert_eq!(cpu.st.vec[2].0[..2], [0, u64::MAX]);
}

#[test]
fn thirty_two_bit_code() {
    let mut cpu = machine();
    cpu.st.efer = 0;
    cpu.st.seg[seg::CS].attributes = cpu.st.seg[seg::CS].attributes & !attr::L | attr::DB;
    for s in &mut cpu.st.seg {
        s.limit = u32::MAX;
    }
    cpu.st.seg[seg::DS].base = 0x100;
    poke(&cpu, 0x1100, &3.0f64.to_le_bytes());
    cpu.st.gpr[reg::RBX] = 0x1000;
    exec_bytes(&mut cpu, &[0xDD, 0x03], 32).unwrap(); // fld qword [ebx]
    exec_bytes(&mut cpu, &[0xDD, 0x5B, 0x08], 32).unwrap(); // fstp qword [ebx+8]
    assert_eq!(peek(&cpu, 0x1108, 8), 3.0f64.to_le_bytes());
    exec_bytes(&mut cpu, &[0xF2, 0x0F, 0x58, 0x03], 32).unwrap(); // addsd xmm0, [ebx]
    assert_eq!(f64::from_bits(cpu.st.vec[0].0[0]), 3.0);
    cpu.st.gpr[reg::RBX] = 0x40;
    exec_bytes(&mut cpu, &[0xDD, 0x07], 16).unwrap(); // fld qword [bx]
}

mod images {
    use super::*;
    use crate::cpu::fpu::component;
    use crate::state::FX_POINTERS;

    fn ask(cpu: &mut Cpu, mask: u64) {
        cpu.st.gpr[reg::RAX] = mask;
        cpu.st.gpr[reg::RDX] = 0;
        cpu.st.gpr[reg::RBX] = 0x8000;
    }

    fn fill(cpu: &mut Cpu) {
        for (index, ymm) in cpu.st.vec.iter_mut().enumerate() {
            ymm.0 = std::array::from_fn(|quad| (index * 4 + quad + 1) as u64);
        }
        cpu.st.mxcsr = 0x9FC0;
        exec(cpu, |c| c.fldpi().unwrap()).unwrap();
    }

    #[test]
    fn fxsave_and_fxrstor() {
        for live in [false, true] {
            let mut cpu = machine();
            if live {
                fpu::load(&mut cpu.st);
            }
            ask(&mut cpu, 0);
            fill(&mut cpu);
            let vec = cpu.st.vec;
            poke(&cpu, 0x8000, &[0xCC; 512]);
            exec(&mut cpu, |c| c.fxsave64(ptr(rbx)).unwrap()).unwrap();
            let image = peek(&cpu, 0x8000, 512);
            assert_eq!(image[6..24], [0; 18]);
            assert_eq!(image[416..], [0xCC; 96]);
            assert_eq!(image[24..28], 0x9FC0u32.to_le_bytes());
            cpu.st.vec = Default::default();
            cpu.st.mxcsr = 0x1F80;
            exec(&mut cpu, |c| c.fninit().unwrap()).unwrap();
            exec(&mut cpu, |c| c.fxrstor64(ptr(rbx)).unwrap()).unwrap();
            assert_eq!(cpu.st.vec[15].0, [vec[15].0[0], vec[15].0[1], 0, 0]);
            assert_eq!(cpu.st.mxcsr, 0x9FC0);
            assert_eq!(fpu::x87(&cpu.st).0[4], 0x80);
            poke(&cpu, 0x801B, &[1]);
            assert_eq!(exec(&mut cpu, |c| c.fxrstor(ptr(rbx)).unwrap()), Err(gp0()));
            cpu.st.gpr[reg::RBX] += 8;
            assert_eq!(exec(&mut cpu, |c| c.fxsave(ptr(rbx)).unwrap()), Err(gp0()));
            fpu::unload(&mut cpu.st);
        }
    }

    #[test]
    fn xsave_and_xrstor() {
        let mut cpu = machine();
        ask(&mut cpu, u64::MAX);
        fill(&mut cpu);
        let before = fpu::save_xsave(&cpu.st);
        exec(&mut cpu, |c| c.xsave64(ptr(rbx)).unwrap()).unwrap();
        let image = peek(&cpu, 0x8000, 832);
        assert_eq!(image[512], 7);
        fpu::reset(&mut cpu.st);
        exec(&mut cpu, |c| c.xrstor64(ptr(rbx)).unwrap()).unwrap();
        assert_eq!(fpu::save_xsave(&cpu.st), before);
        // Only what is asked for changes; what the header lacks becomes initial.
        cpu.vm.memory.write(GuestPhys(0x8200), &[3]).unwrap();
        ask(&mut cpu, component::AVX);
        exec(&mut cpu, |c| c.xrstor(ptr(rbx)).unwrap()).unwrap();
        assert!(cpu.st.vec.iter().all(|ymm| ymm.0[2..] == [0, 0] && ymm.0[0] != 0));
        // In the initial configuration, XSAVE clears the bits it was asked for.
        fpu::reset(&mut cpu.st);
        ask(&mut cpu, component::SSE);
        exec(&mut cpu, |c| c.xsave(ptr(rbx)).unwrap()).unwrap();
        assert_eq!(peek(&cpu, 0x8200, 1), [1]);
    }

    #[test]
    fn xsaveopt_and_xsavec_leave_out_what_is_initial() {
        let mut cpu = machine();
        ask(&mut cpu, 7);
        cpu.st.vec[2].0[3] = 5;
        poke(&cpu, 0x8000, &[0xCC; 832]);
        poke(&cpu, 0x8200, &[0; 64]);
        exec(&mut cpu, |c| c.xsaveopt(ptr(rbx)).unwrap()).unwrap();
        let image = peek(&cpu, 0x8000, 832);
        assert_eq!((image[512], image[519], &image[160..416]), (4, 0, &[0xCC; 256][..]));
        assert_eq!(image[24..28], 0x1F80u32.to_le_bytes());
        poke(&cpu, 0x8000, &[0xCC; 832]);
        exec(&mut cpu, |c| c.xsavec64(ptr(rbx)).unwrap()).unwrap();
        let image = peek(&cpu, 0x8000, 832);
        assert_eq!(image[..512], [0xCC; 512]);
        assert_eq!(quads(&image[512..528]), [4, 1 << 63 | 7]);
        assert_eq!(image[528..576], [0xCC; 48]);
        poke(&cpu, 0x8210, &[0; 48]);
        cpu.st.vec[2].0 = [9; 4];
        cpu.st.mxcsr = 0x3F80;
        exec(&mut cpu, |c| c.xrstor64(ptr(rbx)).unwrap()).unwrap();
        assert_eq!(cpu.st.vec[2], Ymm([0, 0, 0, 5]));
        assert_eq!(cpu.st.mxcsr, 0x1F80);
    }

    fn quads(bytes: &[u8]) -> Vec<u64> {
        bytes.chunks_exact(8).map(|part| u64::from_le_bytes(part.try_into().unwrap())).collect()
    }

    #[test]
    fn bad_headers() {
        let mut cpu = machine();
        ask(&mut cpu, 7);
        exec(&mut cpu, |c| c.xsave(ptr(rbx)).unwrap()).unwrap();
        let good = peek(&cpu, 0x8000, 576);
        for (at, value) in [(512, 8), (520, 1), (528, 1), (527, 0x80), (27, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            if at == 527 {
                bad[512] = 1; // present, but not in the compacted layout
            }
            poke(&cpu, 0x8000, &bad);
            assert_eq!(exec(&mut cpu, |c| c.xrstor(ptr(rbx)).unwrap()), Err(gp0()), "{at}");
        }
        poke(&cpu, 0x8000, &good);
        exec(&mut cpu, |c| c.xrstor(ptr(rbx)).unwrap()).unwrap();
        cpu.st.gpr[reg::RBX] += 16;
        assert_eq!(exec(&mut cpu, |c| c.xrstor(ptr(rbx)).unwrap()), Err(gp0()));
        assert_eq!(exec(&mut cpu, |c| c.xsavec(ptr(rbx)).unwrap()), Err(gp0()));
    }

    /// D9 E8, without the five bits of D9; or nothing, on a CPU that keeps the opcode
    /// of unmasked exceptions alone (Intel SDM 1, 8.1.9.1).
    fn fop_of_fld1() -> [u8; 2] {
        let mut image = [0u8; 108];
        // SAFETY: writes the 108 bytes, and leaves the FPU as a function finds it.
        unsafe {
            core::arch::asm!("fninit", "fld1", "fnsave [{}]", in(reg) image.as_mut_ptr());
        }
        let fop = [image[18], image[19]];
        assert!([[0xE8, 1], [0, 0]].contains(&fop), "{fop:x?}");
        fop
    }

    #[test]
    fn environments() {
        // The pointers have a test of their own.
        let rest = |cpu: &Cpu| {
            let image = fpu::x87(&cpu.st).0;
            (image[..FX_POINTERS.start].to_vec(), image[FX_POINTERS.end..].to_vec())
        };
        for live in [false, true] {
            let mut cpu = machine();
            if live {
                fpu::load(&mut cpu.st);
            }
            ask(&mut cpu, 0);
            exec(&mut cpu, |c| c.fldpi().unwrap()).unwrap();
            exec(&mut cpu, |c| c.fld1().unwrap()).unwrap();
            let whole = rest(&cpu);
            poke(&cpu, 0x8000, &[0x55; 128]);
            exec(&mut cpu, |c| c.fnsave(ptr(rbx)).unwrap()).unwrap();
            let image = peek(&cpu, 0x8000, 109);
            assert_eq!(
                image[..12],
                [0x7F, 3, 0xFF, 0xFF, 0, 0x30, 0xFF, 0xFF, 0xFF, 0x0F, 0xFF, 0xFF]
            );
            assert_eq!(image[16..18], [0; 2]);
            assert_eq!(image[18..20], fop_of_fld1(), "FOP");
            assert_eq!(image[20..26], [0; 6]);
            assert_eq!(image[108], 0x55);
            assert_eq!(fpu::x87(&cpu.st).0[4], 0, "FNSAVE initializes");
            exec(&mut cpu, |c| c.frstor(ptr(rbx)).unwrap()).unwrap();
            assert_eq!(rest(&cpu), whole);
            // 66 DD 33: fnsave with the 16-bit format.
            exec_bytes(&mut cpu, &[0x66, 0xDD, 0x33], 64).unwrap();
            let short = peek(&cpu, 0x8000, 94);
            assert_eq!(short[..14], [0x7F, 3, 0, 0x30, 0xFF, 0x0F, 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(short[14..94], image[28..108]);
            exec_bytes(&mut cpu, &[0x66, 0xDD, 0x23], 64).unwrap();
            assert_eq!(rest(&cpu), whole);
            poke(&cpu, 0x9000, &0x360u16.to_le_bytes());
            cpu.st.gpr[reg::RSI] = 0x9000;
            exec(&mut cpu, |c| c.fnstenv(ptr(rbx)).unwrap()).unwrap();
            exec(&mut cpu, |c| c.fldcw(word_ptr(rsi)).unwrap()).unwrap();
            exec(&mut cpu, |c| c.fnstenv(ptr(rsi)).unwrap()).unwrap();
            let masked = fpu::x87(&cpu.st).0[0];
            assert_eq!(masked & 0x3F, 0x3F, "FNSTENV masks all exceptions");
            exec(&mut cpu, |c| c.fldenv(ptr(rbx)).unwrap()).unwrap();
            assert_eq!(rest(&cpu), whole);
            fpu::unload(&mut cpu.st);
        }
    }

    #[test]
    fn mxcsr_moves() {
        let mut cpu = machine();
        ask(&mut cpu, 0);
        poke(&cpu, 0x8000, &0xFFC0u32.to_le_bytes());
        exec(&mut cpu, |c| c.ldmxcsr(dword_ptr(rbx)).unwrap()).unwrap();
        exec(&mut cpu, |c| c.stmxcsr(dword_ptr(rbx + 4)).unwrap()).unwrap();
        assert_eq!(peek(&cpu, 0x8004, 4), 0xFFC0u32.to_le_bytes());
        poke(&cpu, 0x8000, &0x1_1F80u32.to_le_bytes());
        assert_eq!(exec(&mut cpu, |c| c.ldmxcsr(dword_ptr(rbx)).unwrap()), Err(gp0()));
        assert_eq!(cpu.st.mxcsr, 0xFFC0);
    }

    #[test]
    fn misaligned_operands_need_the_bit_that_cpuid_shows() {
        let mut cpu = machine();
        ask(&mut cpu, 0);
        let shown = cpu.cpuid(0x8000_0001, 0)[2] >> 7 & 1 != 0;
        poke(&cpu, 0x8000, &(0x1F80 | fpu::MXCSR_MM).to_le_bytes());
        let loaded = exec(&mut cpu, |c| c.ldmxcsr(dword_ptr(rbx)).unwrap());
        assert_eq!(loaded, if shown { Ok(Flow::Next) } else { Err(gp0()) });
        let added = exec(&mut cpu, |c| c.addps(xmm1, xmmword_ptr(rbx + 4)).unwrap());
        assert_eq!(added, loaded, "a packed operand");
        let moved = exec(&mut cpu, |c| c.movaps(xmm1, xmmword_ptr(rbx + 4)).unwrap());
        assert_eq!(moved, Err(gp0()), "a move that asks for alignment");
    }
}
