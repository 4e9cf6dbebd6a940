//! Instructions that save and restore FPU state as an image in memory, and the
//! moves of MXCSR.
//!
//! They are done in Rust because images must not show host addresses, and
//! because the XMM and YMM registers are not in the host CPU here. An image is
//! written only where all of it can be written, so a fault leaves no trace.

use iced_x86::{Code, Instruction, Mnemonic};

use super::operand;
use super::thunk::wait;
use crate::cpu::Cpu;
use crate::cpu::fpu::{self, check_mode, class, component};
use crate::cpu::x87_pointers::Pointers;
use crate::state::fault::{Fault, R, gp, ud, vector};
use crate::state::{FxImage, cr, reg};

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<()>> {
    Some(match i.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => fxsave(cpu, i),
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => fxrstor(cpu, i),
        Mnemonic::Xsave | Mnemonic::Xsave64 => xsave(cpu, i, Form::Plain),
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => xsave(cpu, i, Form::Optimized),
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => xsave(cpu, i, Form::Compacted),
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => xrstor(cpu, i),
        Mnemonic::Ldmxcsr => ldmxcsr(cpu, i, class::SSE),
        Mnemonic::Vldmxcsr => ldmxcsr(cpu, i, class::AVX | class::VEX),
        Mnemonic::Stmxcsr => stmxcsr(cpu, i, class::SSE),
        Mnemonic::Vstmxcsr => stmxcsr(cpu, i, class::AVX | class::VEX),
        Mnemonic::Fnsave | Mnemonic::Fsave => store_x87(cpu, i, true),
        Mnemonic::Fnstenv | Mnemonic::Fstenv => store_x87(cpu, i, false),
        Mnemonic::Frstor => load_x87(cpu, i, true),
        Mnemonic::Fldenv => load_x87(cpu, i, false),
        _ => return None,
    })
}

/// The linear address of an image of `size` bytes.
fn image_at(cpu: &Cpu, i: &Instruction, size: usize, align: u64, write: bool) -> R<u64> {
    let offset = operand::effective_address(cpu, i);
    let linear = operand::linear(cpu, i.memory_segment(), offset, size, write)?;
    if linear & (align - 1) != 0 { gp(0) } else { Ok(linear) }
}

/// How many XMM registers FXSAVE and FXRSTOR touch: with EFER.FFXSR none in 64-bit
/// code of the kernel (AMD APM 2, 3.1.7).
fn fast_registers(cpu: &Cpu) -> usize {
    let fast = cpu.st.efer & cr::EFER_FFXSR != 0 && cpu.st.cpl == 0 && cpu.st.code64();
    if fast { 0 } else { registers(cpu) }
}

/// XMM8-15 exist in 64-bit mode only.
fn registers(cpu: &Cpu) -> usize {
    if cpu.st.code64() { 16 } else { 8 }
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn mxcsr_of(image: &[u8]) -> R<u32> {
    let value = quad(image, fpu::FX_MXCSR) as u32;
    if value & !fpu::mxcsr_mask() != 0 { gp(0) } else { Ok(value) }
}

fn ldmxcsr(cpu: &mut Cpu, i: &Instruction, class: u8) -> R<()> {
    check_mode(&cpu.st, class)?;
    let value = operand::load_mem(cpu, i, 4)? as u32;
    if value & !fpu::mxcsr_mask() != 0 {
        return gp(0);
    }
    cpu.st.mxcsr = value;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, i: &Instruction, class: u8) -> R<()> {
    check_mode(&cpu.st, class)?;
    let value = u64::from(cpu.st.mxcsr);
    operand::store_mem(cpu, i, 4, value)
}

/// FXSAVE. Bytes 416 to 511 are not the CPU's: 464 and up are for software, and
/// none of them is written (Intel SDM 1, 10.5.1).
fn fxsave(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    check_mode(&cpu.st, class::X87)?;
    let linear = image_at(cpu, i, 512, 16, true)?;
    let user = cpu.user();
    cpu.probe_write(linear, 512, user)?;
    let count = fast_registers(cpu);
    let image = image(cpu, i, count);
    cpu.store_bytes(linear, &image.0[..fpu::FX_XMM + count * 16], user)
}

fn fxrstor(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    check_mode(&cpu.st, class::X87)?;
    let linear = image_at(cpu, i, 512, 16, false)?;
    let user = cpu.user();
    let mut image = [0; 512];
    cpu.load_bytes(linear, &mut image, user)?;
    let mxcsr = mxcsr_of(&image)?;
    narrow_pointers(i, &mut image);
    let count = fast_registers(cpu);
    let st = &mut *cpu.st;
    fpu::set_x87(st, &image);
    st.mxcsr = mxcsr;
    for (ymm, slot) in st.vec[..count].iter_mut().zip(image[fpu::FX_XMM..].chunks_exact(16)) {
        fpu::set_half(ymm, 0, slot);
    }
    Ok(())
}

/// Without REX.W an image has 32 bits of FIP and FDP, and selectors, which are zero
/// (Intel SDM 1, table 10-2).
fn narrow_pointers(i: &Instruction, image: &mut [u8]) {
    let wide = matches!(
        i.mnemonic(),
        Mnemonic::Fxsave64
            | Mnemonic::Fxrstor64
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor64
    );
    if !wide {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
}

/// The image that FXSAVE and its kin store.
fn image(cpu: &mut Cpu, i: &Instruction, registers: usize) -> FxImage {
    if fpu::saves_pointers(&fpu::x87(&cpu.st)) {
        cpu.settle_x87_pointers();
    }
    let mut image = fpu::fx_image(&cpu.st, registers);
    narrow_pointers(i, &mut image.0);
    image
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Optimized,
    Compacted,
}

/// #UD and #NM of the XSAVE family; the components asked for (SDM 1, 13.3).
fn requested(cpu: &Cpu) -> R<u64> {
    let st = &*cpu.st;
    if st.cr4 & cr::CR4_OSXSAVE == 0 {
        return ud();
    }
    if st.cr0 & cr::CR0_TS != 0 {
        return Err(Fault::new(vector::NM).into());
    }
    let mask = st.gpr[reg::RDX] << 32 | st.gpr[reg::RAX] & 0xFFFF_FFFF;
    Ok(mask & st.xcr0 & component::ALL)
}

/// XSAVE, XSAVEOPT and XSAVEC (Intel SDM 1, 13.7, 13.9, 13.10). XSAVEOPT makes
/// no use of the modified optimization, which is the CPU's choice.
fn xsave(cpu: &mut Cpu, i: &Instruction, form: Form) -> R<()> {
    let wanted = requested(cpu)?;
    let avx = wanted & component::AVX != 0;
    let size = if avx { fpu::XSAVE_BYTES } else { fpu::XSAVE_AVX };
    let linear = image_at(cpu, i, size, 64, true)?;
    let user = cpu.user();
    cpu.probe_write(linear, size, user)?;
    let count = registers(cpu);
    let image = image(cpu, i, count).0;
    let used = fpu::in_use(&cpu.st, &fpu::x87(&cpu.st), count) & wanted;
    let written = if form == Form::Plain { wanted } else { used };
    let mut header = [0; 16];
    let header = if form == Form::Compacted {
        header[..8].copy_from_slice(&used.to_le_bytes());
        header[8..].copy_from_slice(&(1 << 63 | wanted).to_le_bytes());
        &header[..]
    } else {
        cpu.load_bytes(linear + fpu::XSAVE_HEADER as u64, &mut header[..8], user)?;
        let state = quad(&header, 0) & !wanted | used;
        header[..8].copy_from_slice(&state.to_le_bytes());
        &header[..8]
    };
    let mut store = |at: usize, bytes: &[u8]| cpu.store_bytes(linear + at as u64, bytes, user);
    if written & component::X87 != 0 {
        store(0, &image[..fpu::FX_MXCSR])?;
        store(fpu::FX_ST, &image[fpu::FX_ST..fpu::FX_XMM])?;
    }
    // MXCSR goes with either vector component, and is under no optimization but
    // that of XSAVEC, where it belongs to SSE.
    let mxcsr = match form {
        Form::Compacted => written & component::SSE != 0,
        _ => wanted & (component::SSE | component::AVX) != 0,
    };
    if mxcsr {
        store(fpu::FX_MXCSR, &image[fpu::FX_MXCSR..fpu::FX_ST])?;
    }
    if written & component::SSE != 0 {
        store(fpu::FX_XMM, &image[fpu::FX_XMM..fpu::FX_XMM + count * 16])?;
    }
    store(fpu::XSAVE_HEADER, header)?;
    if written & component::AVX != 0 {
        let mut upper = [0; 256];
        for (slot, ymm) in upper.chunks_exact_mut(16).zip(&cpu.st.vec) {
            slot.copy_from_slice(&fpu::half(ymm, 1));
        }
        cpu.store_bytes(linear + fpu::XSAVE_AVX as u64, &upper[..count * 16], user)?;
    }
    Ok(())
}

/// XRSTOR in both formats (Intel SDM 1, 13.8).
fn xrstor(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let wanted = requested(cpu)?;
    let linear = image_at(cpu, i, fpu::XSAVE_AVX, 64, false)?;
    let user = cpu.user();
    let mut image = [0; fpu::XSAVE_BYTES];
    cpu.load_bytes(linear, &mut image[..fpu::XSAVE_AVX], user)?;
    let present = quad(&image, fpu::XSAVE_HEADER);
    let layout = quad(&image, fpu::XSAVE_HEADER + 8);
    let rest = &image[fpu::XSAVE_HEADER + 16..fpu::XSAVE_AVX];
    let compacted = layout >> 63 != 0;
    let bad = if compacted {
        let components = layout & !(1 << 63);
        components & !cpu.st.xcr0 != 0
            || present & !components != 0
            || rest.iter().any(|&byte| byte != 0)
    } else {
        present & !cpu.st.xcr0 != 0 || layout != 0 || rest[..8].iter().any(|&byte| byte != 0)
    };
    if bad {
        return gp(0);
    }
    narrow_pointers(i, &mut image);
    let loaded = wanted & present;
    if loaded & component::AVX != 0 {
        image_at(cpu, i, fpu::XSAVE_BYTES, 64, false)?;
        let at = linear + fpu::XSAVE_AVX as u64;
        cpu.load_bytes(at, &mut image[fpu::XSAVE_AVX..], user)?;
    }
    // The standard format has MXCSR whatever is present; in the compacted one it
    // is part of SSE.
    let mxcsr = if compacted {
        match (wanted & component::SSE != 0, loaded & component::SSE != 0) {
            (true, true) => Some(mxcsr_of(&image)?),
            (true, false) => Some(fpu::MXCSR_INIT),
            _ => None,
        }
    } else if wanted & (component::SSE | component::AVX) != 0 {
        Some(mxcsr_of(&image)?)
    } else {
        None
    };
    let count = registers(cpu);
    let st = &mut *cpu.st;
    if loaded & component::X87 != 0 {
        fpu::set_x87(st, &image);
    } else if wanted & component::X87 != 0 {
        fpu::init_x87(st);
    }
    for (bit, which, at) in [(component::SSE, 0, fpu::FX_XMM), (component::AVX, 1, fpu::XSAVE_AVX)]
    {
        if wanted & bit == 0 {
            continue;
        }
        for (ymm, slot) in st.vec[..count].iter_mut().zip(image[at..].chunks_exact(16)) {
            let bytes = if loaded & bit != 0 { slot } else { &[0; 16][..] };
            fpu::set_half(ymm, which, bytes);
        }
    }
    if let Some(mxcsr) = mxcsr {
        st.mxcsr = mxcsr;
    }
    Ok(())
}

/// Bytes of the environment and of one register (Intel SDM 1, 8.1.10).
const ENV_32: usize = 28;
const ENV_16: usize = 14;
const STACK: usize = 80;

fn env_size(i: &Instruction) -> usize {
    let short = matches!(
        i.code(),
        Code::Fnstenv_m14byte
            | Code::Fstenv_m14byte
            | Code::Fldenv_m14byte
            | Code::Fnsave_m94byte
            | Code::Fsave_m94byte
            | Code::Frstor_m94byte
    );
    if short { ENV_16 } else { ENV_32 }
}

/// The dwords or words of an environment that hold pointers: FIP, FCS or FOP, FDP,
/// FDS (Intel SDM 1, figures 8-9 to 8-12).
fn pack(cpu: &Cpu, env: usize, pointers: Pointers) -> [u32; 4] {
    let Pointers { opcode, instruction, data } = pointers;
    let (opcode, ip, dp) = (u32::from(opcode), instruction as u32, data as u32);
    match (cpu.st.protected() && !cpu.st.vm86(), env == ENV_32) {
        (true, true) => [ip, opcode << 16, dp, 0],
        (true, false) => [ip, 0, dp, 0],
        (false, _) => [ip & 0xFFFF, ip >> 16 << 12 | opcode, dp & 0xFFFF, dp >> 16 << 12],
    }
}

fn unpack(cpu: &Cpu, env: usize, [ip, second, dp, fourth]: [u32; 4]) -> Pointers {
    let (opcode, ip, dp) = match (cpu.st.protected() && !cpu.st.vm86(), env == ENV_32) {
        (true, true) => (second >> 16, ip, dp),
        (true, false) => (0, ip, dp),
        (false, _) => (second, ip & 0xFFFF | second >> 12 << 16, dp & 0xFFFF | fourth >> 12 << 16),
    };
    let opcode = opcode as u16 & 0x7FF;
    Pointers { opcode, instruction: u64::from(ip), data: u64::from(dp) }
}

/// Control, status and tag word in the 32-bit format, with pointers; the unused
/// halves are ones, as the CPU stores them.
#[repr(C, align(16))]
struct Environment([u8; ENV_32 + STACK]);

/// FNSTENV and FNSAVE. The host CPU makes the image, then it is changed.
fn store_x87(cpu: &mut Cpu, i: &Instruction, all: bool) -> R<()> {
    check_mode(&cpu.st, class::X87)?;
    if matches!(i.mnemonic(), Mnemonic::Fsave | Mnemonic::Fstenv) {
        wait(cpu)?;
    }
    let env = env_size(i);
    let size = env + if all { STACK } else { 0 };
    let linear = image_at(cpu, i, size, 1, true)?;
    let user = cpu.user();
    cpu.probe_write(linear, size, user)?;
    cpu.settle_x87_pointers();
    let pointers = pack(cpu, env, Pointers::of(&cpu.st.fx));
    let before = fpu::x87(&cpu.st);
    let mut image = Environment([0; ENV_32 + STACK]);
    fpu::with_loaded(&mut cpu.st, |_| {
        let target = image.0.as_mut_ptr();
        // SAFETY: the buffer has room for the larger image; the x87 state is the
        // guest's and is meant to change.
        unsafe {
            if all {
                std::arch::asm!("fnsave [{}]", in(reg) target, options(nostack));
            } else {
                std::arch::asm!("fnstenv [{}]", in(reg) target, options(nostack));
            }
        }
    });
    let mut bytes = [0; ENV_32 + STACK];
    if env == ENV_32 {
        bytes = image.0;
        for (field, value) in bytes[12..26].chunks_mut(4).zip(pointers) {
            field.copy_from_slice(&value.to_le_bytes()[..field.len()]);
        }
    } else {
        for word in 0..3 {
            bytes[word * 2..word * 2 + 2].copy_from_slice(&image.0[word * 4..word * 4 + 2]);
        }
        for (field, value) in bytes[6..ENV_16].chunks_exact_mut(2).zip(pointers) {
            field.copy_from_slice(&value.to_le_bytes()[..2]);
        }
        bytes[ENV_16..ENV_16 + STACK].copy_from_slice(&image.0[ENV_32..]);
    }
    let result = cpu.store_bytes(linear, &bytes[..size], user);
    if result.is_err() {
        fpu::set_x87(&mut cpu.st, &before.0);
    }
    result
}

fn load_x87(cpu: &mut Cpu, i: &Instruction, all: bool) -> R<()> {
    check_mode(&cpu.st, class::X87)?;
    wait(cpu)?;
    let env = env_size(i);
    let size = env + if all { STACK } else { 0 };
    let linear = image_at(cpu, i, size, 1, false)?;
    let user = cpu.user();
    let mut bytes = [0; ENV_32 + STACK];
    cpu.load_bytes(linear, &mut bytes[..size], user)?;
    let mut image = Environment([0; ENV_32 + STACK]);
    let stride = env / 7;
    for word in 0..3 {
        let at = word * stride;
        image.0[word * 4..word * 4 + 2].copy_from_slice(&bytes[at..at + 2]);
    }
    let field = |index: usize| {
        let at = (3 + index) * stride;
        bytes[at..at + stride].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
    };
    let pointers = unpack(cpu, env, std::array::from_fn(field));
    if all {
        image.0[ENV_32..].copy_from_slice(&bytes[env..env + STACK]);
    }
    fpu::with_loaded(&mut cpu.st, |_| {
        let source = image.0.as_ptr();
        // SAFETY: the buffer is a whole image. Exceptions that it brings are
        // raised by the next waiting instruction, which is the guest's. The one
        // that may be pending now was raised by `wait` above.
        unsafe {
            if all {
                std::arch::asm!("frstor [{}]", in(reg) source, options(nostack));
            } else {
                std::arch::asm!("fldenv [{}]", in(reg) source, options(nostack));
            }
        }
    });
    // The host's environment has none.
    let mut now = fpu::x87(&cpu.st);
    pointers.put(&mut now);
    fpu::set_x87(&mut cpu.st, &now.0);
    Ok(())
}
