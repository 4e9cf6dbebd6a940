//! Arithmetic that leaves flags, or a result, undefined (Intel SDM 1, appendix A),
//! run by the host CPU.
//!
//! Translated code runs the host's instruction, and so gets what this CPU model
//! makes of the undefined; AMD and Intel differ. What is interpreted must leave the
//! same: a recording is replayed with the switch between the two elsewhere, and
//! flags reach the guest's memory with each interrupt.

use std::arch::asm;
use std::sync::LazyLock;

use crate::state::flag;
use crate::state::mask;

/// Runs one instruction with the arithmetic flags given; `f` has them afterwards.
macro_rules! with_flags {
    ($flags:ident, $text:expr, $($operands:tt)*) => {
        // SAFETY: the instruction changes the registers named and arithmetic flags;
        // the stack is balanced, and a division has been found not to overflow.
        unsafe {
            asm!(
                "push {f}", "popfq", $text, "pushfq", "pop {f}",
                f = inout(reg) $flags, $($operands)*
            )
        }
    };
}

/// Result and arithmetic flags of `$op a, cl`.
macro_rules! by_count {
    ($($name:ident $op:literal),*) => { $(
        pub fn $name(size: usize, mut a: u64, count: u64, flags: u64) -> (u64, u64) {
            let mut f = flags & flag::ARITH | flag::FIXED;
            match size {
                1 => with_flags!(f, concat!($op, " {a:l}, cl"), a = inout(reg) a, in("rcx") count),
                2 => with_flags!(f, concat!($op, " {a:x}, cl"), a = inout(reg) a, in("rcx") count),
                4 => with_flags!(f, concat!($op, " {a:e}, cl"), a = inout(reg) a, in("rcx") count),
                _ => with_flags!(f, concat!($op, " {a:r}, cl"), a = inout(reg) a, in("rcx") count),
            }
            (a & mask(size), f & flag::ARITH)
        }
    )* };
}

/// Whether ROL and ROR by a constant other than one leave OF as it was. On Intel's CPUs
/// they do, unlike those by CL.
pub fn rotate_by_constant_keeps_overflow() -> bool {
    static KEEPS: LazyLock<bool> = LazyLock::new(|| {
        [0, flag::OF].iter().all(|&before| {
            let (mut f, mut a) = (before | flag::FIXED, 0x40u64);
            with_flags!(f, "rol {a:r}, 57", a = inout(reg) a);
            let (mut g, mut b) = (before | flag::FIXED, 0x40u64);
            with_flags!(g, "rol {b:r}, 58", b = inout(reg) b);
            assert_eq!((a, b), (0x8000_0000_0000_0000, 1));
            f & flag::OF == before && g & flag::OF == before
        })
    });
    *KEEPS
}

by_count!(shl "shl", shr "shr", sar "sar", rol "rol", ror "ror", rcl "rcl", rcr "rcr");

/// Result and arithmetic flags of `$op a, b, cl`.
macro_rules! double_shift {
    ($($name:ident $op:literal),*) => { $(
        pub fn $name(size: usize, mut a: u64, b: u64, count: u64, flags: u64) -> (u64, u64) {
            let mut f = flags & flag::ARITH | flag::FIXED;
            match size {
                2 => with_flags!(f, concat!($op, " {a:x}, {b:x}, cl"),
                    a = inout(reg) a, b = in(reg) b, in("rcx") count),
                4 => with_flags!(f, concat!($op, " {a:e}, {b:e}, cl"),
                    a = inout(reg) a, b = in(reg) b, in("rcx") count),
                _ => with_flags!(f, concat!($op, " {a:r}, {b:r}, cl"),
                    a = inout(reg) a, b = in(reg) b, in("rcx") count),
            }
            (a & mask(size), f & flag::ARITH)
        }
    )* };
}

double_shift!(shld "shld", shrd "shrd");

/// Result and arithmetic flags of `$op r, a`; `r` is what the register held before.
macro_rules! of_one {
    ($($name:ident $op:literal),*) => { $(
        pub fn $name(size: usize, a: u64, mut r: u64, flags: u64) -> (u64, u64) {
            let mut f = flags & flag::ARITH | flag::FIXED;
            match size {
                2 => with_flags!(f, concat!($op, " {r:x}, {a:x}"), a = in(reg) a, r = inout(reg) r),
                4 => with_flags!(f, concat!($op, " {r:e}, {a:e}"), a = in(reg) a, r = inout(reg) r),
                _ => with_flags!(f, concat!($op, " {r:r}, {a:r}"), a = in(reg) a, r = inout(reg) r),
            }
            (r, f & flag::ARITH)
        }
    )* };
}

// The second and third are for hosts that CPUID shows to have them; so is all of BMI.
of_one!(bsf "bsf", bsr "bsr", tzcnt "tzcnt", lzcnt "lzcnt");

/// Result and arithmetic flags of `$op r, a`, of 32 or 64 bits.
macro_rules! lowest {
    ($($name:ident $op:literal),*) => { $(
        pub fn $name(size: usize, a: u64) -> (u64, u64) {
            let (mut f, mut r) = (flag::FIXED, a);
            match size {
                4 => with_flags!(f, concat!($op, " {r:e}, {r:e}"), r = inout(reg) r),
                _ => with_flags!(f, concat!($op, " {r:r}, {r:r}"), r = inout(reg) r),
            }
            (r, f & flag::ARITH)
        }
    )* };
}

lowest!(blsi "blsi", blsmsk "blsmsk", blsr "blsr");

/// Result and arithmetic flags of `$op r, a, b`, of 32 or 64 bits.
macro_rules! of_two {
    ($($name:ident $op:literal),*) => { $(
        pub fn $name(size: usize, a: u64, b: u64) -> (u64, u64) {
            let (mut f, mut r) = (flag::FIXED, a);
            match size {
                4 => with_flags!(f, concat!($op, " {r:e}, {r:e}, {b:e}"),
                    b = in(reg) b, r = inout(reg) r),
                _ => with_flags!(f, concat!($op, " {r:r}, {r:r}, {b:r}"),
                    b = in(reg) b, r = inout(reg) r),
            }
            (r, f & flag::ARITH)
        }
    )* };
}

of_two!(andn "andn", bextr "bextr", bzhi "bzhi");

/// IMUL of two operands: the low half of the product, and arithmetic flags.
pub fn imul(size: usize, mut a: u64, b: u64, flags: u64) -> (u64, u64) {
    let mut f = flags & flag::ARITH | flag::FIXED;
    match size {
        2 => with_flags!(f, "imul {a:x}, {b:x}", a = inout(reg) a, b = in(reg) b),
        4 => with_flags!(f, "imul {a:e}, {b:e}", a = inout(reg) a, b = in(reg) b),
        _ => with_flags!(f, "imul {a:r}, {b:r}", a = inout(reg) a, b = in(reg) b),
    }
    (a & mask(size), f & flag::ARITH)
}

/// rAX and rDX after `$op b` (of a byte: AX alone), and arithmetic flags.
macro_rules! of_rdx_rax {
    ($($name:ident $op:literal),*) => { $(
        pub fn $name(size: usize, mut rax: u64, mut rdx: u64, b: u64, flags: u64) -> (u64, u64, u64) {
            let mut f = flags & flag::ARITH | flag::FIXED;
            match size {
                1 => with_flags!(f, concat!($op, " {b:l}"),
                    b = in(reg) b, inout("rax") rax, inout("rdx") rdx),
                2 => with_flags!(f, concat!($op, " {b:x}"),
                    b = in(reg) b, inout("rax") rax, inout("rdx") rdx),
                4 => with_flags!(f, concat!($op, " {b:e}"),
                    b = in(reg) b, inout("rax") rax, inout("rdx") rdx),
                _ => with_flags!(f, concat!($op, " {b:r}"),
                    b = in(reg) b, inout("rax") rax, inout("rdx") rdx),
            }
            (rax, rdx, f & flag::ARITH)
        }
    )* };
}

of_rdx_rax!(mul "mul", imul_wide "imul", div "div", idiv "idiv");
