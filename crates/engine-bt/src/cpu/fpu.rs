//! Who owns the FPU, and the images of its state.
//!
//! The guest's x87 state (MMX registers are part of it) comes into the host CPU
//! with the first instruction that wants it ([`load`]) and stays, also while Rust
//! code runs, until [`leave`] at the end of `Vcpu::run`: compiled Rust never
//! touches x87, and a guest that does not either pays nothing. MXCSR is
//! different: Rust's own floating point obeys it, so the guest's value is in
//! hardware only inside translated code and native thunks, and else in
//! [`CpuState::mxcsr`]. XMM and YMM registers are in [`CpuState::vec`] whenever
//! Rust code runs.
//!
//! FOP, FIP and FDP of an image are the guest's; [`crate::cpu::x87_pointers`] says
//! how.

use std::arch::asm;
use std::sync::OnceLock;

use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind};
use tetrarch_engine::cpuid::{self, host_is_intel};
use thiserror::Error;

use crate::cpu::x87_pointers::{self, Pointers};
use crate::state::fault::{Fault, R, ud, vector};
use crate::state::{CpuState, FX_POINTERS, FxImage, Ymm, cr};

/// MXCSR after reset: all exceptions masked (Intel SDM 1, 10.2.3).
pub const MXCSR_INIT: u32 = 0x1F80;
/// FCW after FNINIT (Intel SDM 1, 8.1.5).
pub const FCW_INIT: u16 = 0x37F;

/// The x87 part of an FXSAVE image: FCW to FDP, then the registers. MXCSR and
/// its mask lie between (Intel SDM 1, table 10-2).
pub const FX_MXCSR: usize = 24;
pub const FX_MXCSR_MASK: usize = 28;
pub const FX_ST: usize = 32;
pub const FX_XMM: usize = 160;

/// Parts of an XSAVE image (Intel SDM 1, 13.4). With x87, SSE and AVX alone the
/// compacted format has the same offsets as the standard one.
pub const XSAVE_HEADER: usize = 512;
pub const XSAVE_AVX: usize = 576;
pub const XSAVE_BYTES: usize = 832;

/// State components of XCR0.
pub mod component {
    pub const X87: u64 = 1;
    pub const SSE: u64 = 2;
    pub const AVX: u64 = 4;
    pub const ALL: u64 = X87 | SSE | AVX;
}

/// What an instruction needs of the CPU's mode.
pub mod class {
    pub const X87: u8 = 1;
    pub const WAIT: u8 = 2;
    pub const MMX: u8 = 4;
    pub const SSE: u8 = 8;
    pub const AVX: u8 = 16;
    /// Encoded by VEX: protected mode only.
    pub const VEX: u8 = 32;
}

/// #UD and #NM by the control registers (Intel SDM 2, 2.4 and 2.5; SDM 3A, 2.5).
pub fn check_mode(st: &CpuState, class: u8) -> R<()> {
    let em = st.cr0 & cr::CR0_EM != 0;
    let ts = st.cr0 & cr::CR0_TS != 0;
    if class & class::VEX != 0 && (!st.protected() || st.vm86()) {
        return ud();
    }
    let avx = st.cr4 & cr::CR4_OSXSAVE != 0 && st.xcr0 & component::ALL == component::ALL;
    if class & class::AVX != 0 && !avx
        || class & class::SSE != 0 && (em || st.cr4 & cr::CR4_OSFXSR == 0)
        || class & class::MMX != 0 && em
    {
        return ud();
    }
    let absent = class & class::X87 != 0 && (em || ts)
        || class & class::WAIT != 0 && ts && st.cr0 & cr::CR0_MP != 0
        || class & (class::MMX | class::SSE | class::AVX) != 0 && ts;
    if absent { Err(Fault::new(vector::NM).into()) } else { Ok(()) }
}

/// Whether the host CPU and its kernel have AVX.
pub fn host_avx() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}

/// MXCSR.MM: packed operands may be misaligned (AMD APM 1, 4.2.2).
pub const MXCSR_MM: u32 = 1 << 17;

/// The bits of MXCSR that exist: the host's, of which MM needs its CPUID bit.
pub fn mxcsr_mask() -> u32 {
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        let mut image = FxImage([0; 512]);
        fxsave(&mut image);
        match word(&image.0, FX_MXCSR_MASK) {
            // Intel SDM 1, 11.6.6: zero means the mask of the first SSE CPUs.
            0 => 0xFFBF,
            mask => mask & (0xFFFF | if host_misaligned_sse() { MXCSR_MM } else { 0 }),
        }
    })
}

fn host_misaligned_sse() -> bool {
    !host_is_intel() && cpuid::host(0x8000_0001, 0)[2] >> 7 & 1 != 0
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn fxsave(image: &mut FxImage) {
    // SAFETY: writes the 512 bytes of the image, which is aligned to 64.
    unsafe { asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack)) };
}

/// Loads the x87 part of `image` into the host CPU; MXCSR keeps its value.
fn fxrstor(image: &mut FxImage) {
    let mut mxcsr = 0u32;
    // SAFETY: stores four bytes to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack)) };
    image.0[FX_MXCSR..FX_MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    // SAFETY: reads the 512 aligned bytes of the image; its MXCSR is one that
    // the CPU had; the XMM registers that it also loads are declared.
    unsafe {
        asm!("fxrstor64 [{}]", in(reg) image.0.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack));
    }
}

/// The x87 state after FNINIT.
fn initial_x87() -> FxImage {
    let mut image = FxImage([0; 512]);
    image.0[..2].copy_from_slice(&FCW_INIT.to_le_bytes());
    image
}

/// The state after RESET.
pub fn reset(st: &mut CpuState) {
    st.mxcsr = MXCSR_INIT;
    st.vec = Default::default();
    set_x87(st, &initial_x87().0);
}

/// Whether an instruction reads or changes x87 or MMX state.
pub fn touches_x87(i: &Instruction) -> bool {
    use CpuidFeature as F;
    // The conversions from MMX switch to MMX with a memory operand, too.
    matches!(
        i.mnemonic(),
        Mnemonic::Wait | Mnemonic::Fisttp | Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd
    ) || i.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            F::FPU | F::FPU287 | F::FPU287XL_ONLY | F::FPU387 | F::FPU387SL_ONLY | F::MMX
        )
    }) || (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Register && i.op_register(op).is_mm())
}

/// Called when `Vcpu::run` begins: until [`leave`] the guest's x87 state may stay
/// in the host CPU once it is there.
pub fn enter(st: &mut CpuState) {
    // SAFETY: stores four bytes of the state.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut st.host_mxcsr, options(nostack)) };
    st.fpu_stays = 1;
}

/// Called when `Vcpu::run` ends.
pub fn leave(st: &mut CpuState) {
    unload(st);
    st.fpu_stays = 0;
}

/// Makes the guest's x87 state live in the host CPU.
pub fn load(st: &mut CpuState) {
    if st.fpu_loaded != 0 {
        return;
    }
    let mut fcw = 0u16;
    // SAFETY: both store to what they are given.
    unsafe {
        asm!("fnstcw [{}]", in(reg) &raw mut fcw, options(nostack));
        asm!("stmxcsr [{}]", in(reg) &raw mut st.host_mxcsr, options(nostack));
    }
    st.host_fcw = u32::from(fcw);
    st.last_thunk = Default::default();
    fxrstor(&mut st.fx);
    st.fpu_loaded = 1;
}

/// Takes the guest's x87 state out of the host CPU and gives it back clean.
pub fn unload(st: &mut CpuState) {
    if st.fpu_loaded == 0 {
        return;
    }
    st.fx = x87(st);
    st.fpu_loaded = 0;
    let fcw = st.host_fcw as u16;
    // SAFETY: FNINIT drops pending exceptions, so that FLDCW cannot raise one.
    unsafe { asm!("fninit", "fldcw [{}]", in(reg) &raw const fcw, options(nostack)) };
}

/// Runs `f` with the guest's x87 state live, whether or not it already is. Between
/// [`enter`] and [`leave`] it stays.
pub fn with_loaded<T>(st: &mut CpuState, f: impl FnOnce(&mut CpuState) -> T) -> T {
    let loaded = st.fpu_loaded != 0;
    load(st);
    let result = f(st);
    if !loaded && st.fpu_stays == 0 {
        x87_pointers::settle_thunks(st);
        unload(st);
    }
    result
}

/// The x87 part of an FXSAVE image, with the pointers that are settled; all else
/// is zero.
pub fn x87(st: &CpuState) -> FxImage {
    let mut image = FxImage([0; 512]);
    if st.fpu_loaded != 0 {
        fxsave(&mut image);
    } else {
        image.0 = st.fx.0;
    }
    image.0[FX_POINTERS].copy_from_slice(&st.fx.0[FX_POINTERS]);
    image.0[5] = 0;
    image.0[FX_MXCSR..FX_ST].fill(0);
    image.0[FX_XMM..].fill(0);
    image
}

/// Control and status word as the CPU keeps them, whatever an image says: reserved bits of FCW
/// are fixed, and the summary of FSW, twice, is that of the unmasked exceptions (Intel SDM 1,
/// 8.1.3 and 8.1.5).
fn settle_words(image: &mut FxImage) {
    const FCW_KEPT: u16 = 0x1F3F;
    const FCW_ONE: u16 = 0x40;
    const EXCEPTIONS: u16 = 0x3F;
    const SUMMARY: u16 = 0x8080;
    let word = |at: usize| u16::from_le_bytes([image.0[at], image.0[at + 1]]);
    let (fcw, mut fsw) = (word(0) & FCW_KEPT | FCW_ONE, word(2) & !SUMMARY);
    if fsw & !fcw & EXCEPTIONS != 0 {
        fsw |= SUMMARY;
    }
    image.0[..2].copy_from_slice(&fcw.to_le_bytes());
    image.0[2..4].copy_from_slice(&fsw.to_le_bytes());
}

/// Replaces the x87 state by that of an FXSAVE image.
pub fn set_x87(st: &mut CpuState, image: &[u8]) {
    let mut new = FxImage([0; 512]);
    new.0[..FX_XMM].copy_from_slice(&image[..FX_XMM]);
    Pointers::of(&new).put(&mut new);
    if st.fpu_loaded != 0 {
        fxrstor(&mut new);
        st.fx.0[FX_POINTERS].copy_from_slice(&new.0[FX_POINTERS]);
        st.last_thunk = Default::default();
    } else {
        settle_words(&mut new);
        st.fx = new;
    }
}

/// FNINIT.
pub fn init_x87(st: &mut CpuState) {
    set_x87(st, &initial_x87().0);
}

/// Whether an image has the x87 pointers: AMD saves those of a pending exception
/// only (AMD APM 2, 11.4.4.3).
pub fn saves_pointers(image: &FxImage) -> bool {
    const ES: u8 = 0x80;
    image.0[2] & ES != 0 || host_is_intel()
}

/// An FXSAVE image with the first `registers` XMM registers.
pub fn fx_image(st: &CpuState, registers: usize) -> FxImage {
    let mut image = x87(st);
    if !saves_pointers(&image) {
        image.0[FX_POINTERS].fill(0);
    }
    image.0[FX_MXCSR..FX_MXCSR + 4].copy_from_slice(&st.mxcsr.to_le_bytes());
    image.0[FX_MXCSR_MASK..FX_ST].copy_from_slice(&mxcsr_mask().to_le_bytes());
    for (slot, ymm) in image.0[FX_XMM..].chunks_exact_mut(16).zip(&st.vec).take(registers) {
        slot.copy_from_slice(&half(ymm, 0));
    }
    image
}

/// Sixteen bytes of a vector register: half 0 is XMM, half 1 the rest of YMM.
pub fn half(ymm: &Ymm, which: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&ymm.0[which * 2].to_le_bytes());
    bytes[8..].copy_from_slice(&ymm.0[which * 2 + 1].to_le_bytes());
    bytes
}

/// Replaces sixteen bytes of a vector register.
pub fn set_half(ymm: &mut Ymm, which: usize, bytes: &[u8]) {
    for (quad, part) in ymm.0[which * 2..which * 2 + 2].iter_mut().zip(bytes.chunks_exact(8)) {
        *quad = part.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    }
}

/// Which components are not in their initial configuration (Intel SDM 1, 13.6).
/// SSE counts MXCSR in, as XSAVE's rules for XSTATE_BV do (13.7).
pub fn in_use(st: &CpuState, x87: &FxImage, registers: usize) -> u64 {
    let vec = &st.vec[..registers];
    let mut used = 0;
    let differs = |range: std::ops::Range<usize>| x87.0[range.clone()] != initial_x87().0[range];
    // Pointers alone make no use of it.
    if differs(0..FX_POINTERS.start) || differs(FX_POINTERS.end..FX_XMM) {
        used |= component::X87;
    }
    if st.mxcsr != MXCSR_INIT || vec.iter().any(|ymm| ymm.0[..2] != [0; 2]) {
        used |= component::SSE;
    }
    if vec.iter().any(|ymm| ymm.0[2..] != [0; 2]) {
        used |= component::AVX;
    }
    used
}

/// The whole state as an XSAVE image in standard format.
pub fn save_xsave(st: &CpuState) -> Vec<u8> {
    let mut image = vec![0; if host_avx() { XSAVE_BYTES } else { XSAVE_AVX }];
    image[..512].copy_from_slice(&fx_image(st, 16).0);
    image[XSAVE_HEADER] = component::X87 as u8 | component::SSE as u8;
    if host_avx() {
        image[XSAVE_HEADER] |= component::AVX as u8;
        for (slot, ymm) in image[XSAVE_AVX..].chunks_exact_mut(16).zip(&st.vec) {
            slot.copy_from_slice(&half(ymm, 1));
        }
    }
    image
}

/// An XSAVE image without the components that this engine lacks and XCR0 does not
/// enable: no guest has used them. KVM marks PKRU as there whatever the guest does.
pub fn without_disabled(image: &[u8], xcr0: u64) -> Vec<u8> {
    let mut image = image.to_vec();
    let keep = (xcr0 | component::ALL).to_le_bytes();
    for (byte, keep) in image.iter_mut().skip(XSAVE_HEADER).zip(keep) {
        *byte &= keep;
    }
    image
}

/// Why an image is none of this CPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadImage {
    #[error("an XSAVE image has at least {XSAVE_AVX} bytes, not {0}")]
    Short(usize),
    #[error("XSAVE image with unknown state components {0:#x}")]
    Components(u64),
    #[error("XSAVE image in compacted format")]
    Compacted,
    #[error("XSAVE image with reserved bits in MXCSR {0:#x}")]
    Mxcsr(u32),
    #[error("XSAVE image with AVX state that this host or the image lacks")]
    NoAvx,
}

/// Replaces the whole state by that of an XSAVE image in standard format.
/// Components that the image leaves out become initial. On an error nothing has
/// changed.
pub fn load_xsave(st: &mut CpuState, image: &[u8]) -> Result<(), BadImage> {
    if image.len() < XSAVE_AVX {
        return Err(BadImage::Short(image.len()));
    }
    let header = |at: usize| {
        image[XSAVE_HEADER + at..XSAVE_HEADER + at + 8]
            .iter()
            .rev()
            .fold(0u64, |value, &byte| value << 8 | u64::from(byte))
    };
    let present = header(0);
    let mxcsr = word(image, FX_MXCSR);
    if present & !component::ALL != 0 {
        return Err(BadImage::Components(present));
    }
    if header(8) != 0 {
        return Err(BadImage::Compacted);
    }
    if mxcsr & !mxcsr_mask() != 0 {
        return Err(BadImage::Mxcsr(mxcsr));
    }
    let avx = present & component::AVX != 0;
    if avx && (image.len() < XSAVE_BYTES || !host_avx()) {
        return Err(BadImage::NoAvx);
    }
    st.vec = Default::default();
    st.mxcsr = MXCSR_INIT;
    if present & component::X87 != 0 {
        set_x87(st, image);
    } else {
        init_x87(st);
    }
    if present & component::SSE != 0 {
        for (slot, ymm) in image[FX_XMM..].chunks_exact(16).zip(&mut st.vec) {
            set_half(ymm, 0, slot);
        }
    }
    if present & (component::SSE | component::AVX) != 0 {
        st.mxcsr = mxcsr;
    }
    if avx {
        for (slot, ymm) in image[XSAVE_AVX..].chunks_exact(16).zip(&mut st.vec) {
            set_half(ymm, 1, slot);
        }
    }
    Ok(())
}

/// A zeroed state in its reset configuration, for tests.
#[cfg(test)]
pub fn test_state() -> Box<CpuState> {
    // SAFETY: every field is a plain integer or an array of them: zero is valid.
    let mut st: Box<CpuState> = unsafe {
        let layout = std::alloc::Layout::new::<CpuState>();
        let memory = std::alloc::alloc_zeroed(layout).cast::<CpuState>();
        assert!(!memory.is_null());
        Box::from_raw(memory)
    };
    reset(&mut st);
    st
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_status_word_are_what_the_cpu_makes_of_them() {
        let mut st = test_state();
        let mut image = initial_x87();
        for bit in 0..=16 {
            for other in [0u16, 0xFFFF, 0x037F, 0x0300, 0x0021, 0x80A1] {
                let one = 1u32.checked_shl(bit).unwrap_or(0) as u16;
                for (fcw, fsw) in [(one, other), (other, one), (!one, other), (other, !one)] {
                    image.0[..2].copy_from_slice(&fcw.to_le_bytes());
                    image.0[2..4].copy_from_slice(&fsw.to_le_bytes());
                    set_x87(&mut st, &image.0);
                    let kept = x87(&st).0[..4].to_vec();
                    load(&mut st);
                    let loaded = x87(&st).0[..4].to_vec();
                    unload(&mut st);
                    assert_eq!(kept, loaded, "fcw {fcw:#x} fsw {fsw:#x}");
                }
            }
        }
    }

    #[test]
    fn x87_survives_load_and_unload() {
        let mut st = test_state();
        load(&mut st);
        let value = 1.5f64;
        // SAFETY: the x87 registers are the guest's between load and unload.
        unsafe {
            asm!("fld qword ptr [{}]", "fldpi", in(reg) &raw const value, options(nostack));
        }
        unload(&mut st);
        assert_eq!(st.fx.0[4], 0b1100_0000, "two registers in use");
        assert_eq!(st.fx.0[FX_ST + 16..FX_ST + 26], [0, 0, 0, 0, 0, 0, 0, 0xC0, 0xFF, 0x3F]);
        let mut fcw = 0u16;
        // SAFETY: stores two bytes to a local.
        unsafe { asm!("fnstcw [{}]", in(reg) &raw mut fcw, options(nostack)) };
        assert_eq!(fcw, FCW_INIT);
        load(&mut st);
        assert_eq!(x87(&st).0[4], 0b1100_0000);
        unload(&mut st);
    }

    #[test]
    fn images_hide_host_addresses() {
        let mut st = test_state();
        load(&mut st);
        let zero = 0.0f64;
        // Unmasked division by zero: the CPU keeps the pointers of a pending one.
        let fcw = 0x37Bu16;
        // SAFETY: as above; no waiting instruction follows before the unload.
        unsafe {
            asm!("fldcw [{}]", "fld1", "fdiv qword ptr [{}]",
                in(reg) &raw const fcw, in(reg) &raw const zero, options(nostack));
        }
        let live = save_xsave(&st);
        assert_eq!(live[FX_POINTERS], [0; 18]);
        assert_ne!(live[2] & 0x84, 0, "the exception is pending");
        unload(&mut st);
        assert_eq!(save_xsave(&st), live);
    }

    #[test]
    fn xsave_round_trip() {
        let mut st = test_state();
        for (index, ymm) in st.vec.iter_mut().enumerate() {
            let upper = if host_avx() { index as u64 } else { 0 };
            ymm.0 = [index as u64 + 1, !(index as u64), upper, upper << 32];
        }
        st.mxcsr = 0x3F80;
        st.fx.0[FX_ST] = 7;
        let image = save_xsave(&st);
        let mut other = test_state();
        load_xsave(&mut other, &image).unwrap();
        assert_eq!(other.vec, st.vec);
        assert_eq!(other.mxcsr, 0x3F80);
        assert_eq!(save_xsave(&other), image);
        let mut none = image.clone();
        none[XSAVE_HEADER] = 0;
        load_xsave(&mut other, &none).unwrap();
        assert_eq!(other.vec, [Ymm::default(); 16]);
        assert_eq!(other.mxcsr, MXCSR_INIT);
        assert_eq!(in_use(&other, &x87(&other), 16), 0);
    }

    #[test]
    fn bad_images_change_nothing() {
        let mut st = test_state();
        st.vec[3].0[0] = 5;
        let image = save_xsave(&st);
        let mut bad_mxcsr = image.clone();
        bad_mxcsr[FX_MXCSR + 3] = 1;
        let mut unknown = image.clone();
        unknown[XSAVE_HEADER + 1] = 2;
        let mut compacted = image.clone();
        compacted[XSAVE_HEADER + 15] = 0x80;
        let reserved = u32::from_le_bytes([0x80, 0x1F, 0, 1]);
        for (bad, why) in [
            (&bad_mxcsr[..], BadImage::Mxcsr(reserved)),
            (&unknown, BadImage::Components(u64::from(image[XSAVE_HEADER]) | 0x200)),
            (&compacted, BadImage::Compacted),
            (&image[..575], BadImage::Short(575)),
        ] {
            assert_eq!(load_xsave(&mut st, bad), Err(why));
            assert_eq!(save_xsave(&st), image);
        }
    }
}
