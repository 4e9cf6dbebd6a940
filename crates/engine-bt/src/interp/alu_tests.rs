//! The arithmetic of the interpreter against the CPU that runs the tests.
//!
//! Every operation runs on the host with the same operands and flags; result and
//! defined flags must agree. Operands are random, with the edges of each size
//! mixed in.

use core::arch::asm;

use super::{alu, bits, host_alu, muldiv};
use crate::state::flag;
use crate::state::mask;

const ROUNDS: usize = 20_000;
const SIZES: [usize; 4] = [1, 2, 4, 8];

/// xorshift64*: the same operands in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// One operand in four is at an edge, where carries and signs change.
    fn operand(&mut self, size: usize) -> u64 {
        let edges = [0, 1, mask(size), alu::sign_bit(size), alu::sign_bit(size) - 1, 0x0F, 0x10, 9];
        match self.next() % 4 {
            0 => edges[self.next() as usize % edges.len()],
            1 => self.next() & mask(size) >> (self.next() % (size as u64 * 8)),
            _ => self.next() & mask(size),
        }
    }

    fn flags(&mut self) -> u64 {
        self.next() & flag::ARITH
    }
}

/// Defines a function that runs `$code` on the host: `a` changes, `b` and `cl`
/// are read.
macro_rules! host {
    ($name:ident, $($op8:literal)?, $op16:literal, $op32:literal, $op64:literal) => {
        fn $name(size: usize, a: u64, b: u64, count: u64, flags: u64) -> (u64, u64) {
            let (mut a, mut f) = (a, flags | flag::FIXED);
            macro_rules! run {
                ($text:literal) => {
                    // SAFETY: only registers change, and of the flags only the
                    // arithmetic ones; the stack is balanced.
                    unsafe {
                        asm!(
                            "push {f}", "popfq", $text, "pushfq", "pop {f}",
                            "/* {a} {b} */",
                            a = inout(reg) a, b = in(reg) b, f = inout(reg) f, in("rcx") count,
                        )
                    }
                };
            }
            match size {
                $(1 => run!($op8),)?
                2 => run!($op16),
                4 => run!($op32),
                _ => run!($op64),
            }
            (a & mask(size), f & flag::ARITH)
        }
    };
}

host!(host_add, "add {a:l}, {b:l}", "add {a:x}, {b:x}", "add {a:e}, {b:e}", "add {a}, {b}");
host!(host_adc, "adc {a:l}, {b:l}", "adc {a:x}, {b:x}", "adc {a:e}, {b:e}", "adc {a}, {b}");
host!(host_sub, "sub {a:l}, {b:l}", "sub {a:x}, {b:x}", "sub {a:e}, {b:e}", "sub {a}, {b}");
host!(host_sbb, "sbb {a:l}, {b:l}", "sbb {a:x}, {b:x}", "sbb {a:e}, {b:e}", "sbb {a}, {b}");
host!(host_and, "and {a:l}, {b:l}", "and {a:x}, {b:x}", "and {a:e}, {b:e}", "and {a}, {b}");
host!(host_or, "or {a:l}, {b:l}", "or {a:x}, {b:x}", "or {a:e}, {b:e}", "or {a}, {b}");
host!(host_xor, "xor {a:l}, {b:l}", "xor {a:x}, {b:x}", "xor {a:e}, {b:e}", "xor {a}, {b}");
host!(host_inc, "inc {a:l}", "inc {a:x}", "inc {a:e}", "inc {a}");
host!(host_dec, "dec {a:l}", "dec {a:x}", "dec {a:e}", "dec {a}");
host!(host_neg, "neg {a:l}", "neg {a:x}", "neg {a:e}", "neg {a}");
host!(host_not, "not {a:l}", "not {a:x}", "not {a:e}", "not {a}");
host!(host_popcnt, , "popcnt {a:x}, {b:x}", "popcnt {a:e}, {b:e}", "popcnt {a}, {b}");
host!(host_pdep, , "nop", "pdep {a:e}, {a:e}, {b:e}", "pdep {a}, {a}, {b}");
host!(host_pext, , "nop", "pext {a:e}, {a:e}, {b:e}", "pext {a}, {a}, {b}");
host!(
    host_crc32,
    "crc32 {a:e}, {b:l}",
    "crc32 {a:e}, {b:x}",
    "crc32 {a:e}, {b:e}",
    "crc32 {a}, {b}"
);

type Host = fn(usize, u64, u64, u64, u64) -> (u64, u64);

/// Compares result and flags but those in `undefined`.
fn check(
    name: &str,
    sizes: &[usize],
    host: Host,
    model: impl Fn(usize, u64, u64, u64, u64) -> (u64, u64),
    undefined: fn(usize, u64) -> u64,
) {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for round in 0..ROUNDS {
        let size = sizes[round % sizes.len()];
        let (a, b) = (random.operand(size), random.operand(size));
        let (count, flags) = (random.next() & 0xFF, random.flags());
        let expected = host(size, a, b, count, flags);
        let got = model(size, a, b, count, flags);
        let compared = flag::ARITH & !undefined(size, count);
        assert!(
            expected.0 == got.0 && (expected.1 ^ got.1) & compared == 0,
            "{name} size {size} a {a:#x} b {b:#x} count {count:#x} flags {flags:#x}: \
             host {expected:x?}, model {got:x?}"
        );
    }
}

fn none(_: usize, _: u64) -> u64 {
    0
}

#[test]
fn addition_and_subtraction_agree_with_the_host() {
    let carry = |flags| flags & flag::CF != 0;
    check("add", &SIZES, host_add, |s, a, b, _, _| alu::add(s, a, b, false), none);
    check("adc", &SIZES, host_adc, move |s, a, b, _, f| alu::add(s, a, b, carry(f)), none);
    check("sub", &SIZES, host_sub, |s, a, b, _, _| alu::sub(s, a, b, false), none);
    check("sbb", &SIZES, host_sbb, move |s, a, b, _, f| alu::sub(s, a, b, carry(f)), none);
    check("neg", &SIZES, host_neg, |s, a, _, _, _| alu::neg(s, a), none);
    let keep_carry = |(r, new): (u64, u64), old| (r, new & !flag::CF | old & flag::CF);
    check("inc", &SIZES, host_inc, move |s, a, _, _, f| keep_carry(alu::inc(s, a), f), none);
    check("dec", &SIZES, host_dec, move |s, a, _, _, f| keep_carry(alu::dec(s, a), f), none);
}

#[test]
fn logic_agrees_with_the_host() {
    let af = |_, _| flag::AF;
    check("and", &SIZES, host_and, |s, a, b, _, _| alu::and(s, a, b), af);
    check("or", &SIZES, host_or, |s, a, b, _, _| alu::or(s, a, b), af);
    check("xor", &SIZES, host_xor, |s, a, b, _, _| alu::xor(s, a, b), af);
    check("not", &SIZES, host_not, |s, a, _, _, f| (alu::not(s, a).0, f), none);
}

#[test]
fn counts_of_bits_agree_with_the_host() {
    let wide = &SIZES[1..];
    if is_x86_feature_detected!("popcnt") {
        check("popcnt", wide, host_popcnt, |s, _, b, _, _| bits::popcnt(s, b), none);
    }
}

#[test]
fn bmi_agrees_with_the_host() {
    let wide = &SIZES[2..];
    if is_x86_feature_detected!("bmi2") {
        check("pdep", wide, host_pdep, |_, a, b, _, f| (bits::pdep(a, b), f), none);
        check("pext", wide, host_pext, |_, a, b, _, f| (bits::pext(a, b), f), none);
    }
}

#[test]
fn crc32_agrees_with_the_host() {
    if !is_x86_feature_detected!("sse4.2") {
        return; // the host has no such instruction
    }
    // The sum is 32 bits wide whatever the data is.
    let low: Host = |s, a, b, c, f| host_crc32(s, a & 0xFFFF_FFFF, b, c, f);
    let model = |s, a: u64, b, _, f| (u64::from(bits::crc32c(a as u32, s, b)) & mask(s), f);
    check("crc32", &SIZES, low, model, none);
}

/// Whether a quotient fits is computed before the host divides, which must not fault.
#[test]
fn quotients_fit_or_do_not() {
    for size in SIZES {
        let least = alu::sign_bit(size);
        assert!(!muldiv::divides_signed(size, mask(size), least, mask(size)));
        assert!(muldiv::divides_signed(size, mask(size), least, 1));
        assert!(muldiv::divides_signed(size, 0, mask(size) >> 1, 1));
        assert!(!muldiv::divides_signed(size, 0, least, 1));
        assert!(!muldiv::divides_signed(size, 0, 5, 0));
        assert!(!muldiv::divides(size, 0, 0));
        assert!(!muldiv::divides(size, 3, 3));
        assert!(muldiv::divides(size, 3, 4));
    }
    let mut random = Random(11);
    let mut divided = 0;
    for round in 0..ROUNDS * 4 {
        let size = SIZES[round % 4];
        let (low, b) = (random.operand(size), random.operand(size));
        // Small and sign-extending upper halves, or hardly a quotient would fit.
        let high = match random.next() % 3 {
            0 => 0,
            1 if low & alu::sign_bit(size) != 0 => mask(size),
            _ => random.operand(size) & mask(size) >> (random.next() % (size as u64 * 8)),
        };
        let (rax, rdx) = if size == 1 { (high << 8 | low, 0) } else { (low, high) };
        // A signal ends the test if one is let through that does not fit.
        if muldiv::divides(size, high, b) {
            host_alu::div(size, rax, rdx, b, 0);
            divided += 1;
        }
        if muldiv::divides_signed(size, high, low, b) {
            let (quotient, remainder, _) = host_alu::idiv(size, rax, rdx, b, 0);
            let remainder = if size == 1 { quotient >> 8 } else { remainder };
            let (quotient, m) = (alu::sign_extend(size, quotient), mask(size));
            let product = quotient.wrapping_mul(alu::sign_extend(size, b));
            assert_eq!(product.wrapping_add(remainder) & m, low, "size {size}: {low:#x} / {b:#x}");
            divided += 1;
        }
    }
    assert!(divided > ROUNDS, "too few divisions: {divided}");
}

#[test]
fn conditions_read_the_flags_of_a_comparison() {
    let mut random = Random(3);
    for _ in 0..ROUNDS {
        let (a, b) = (random.operand(4), random.operand(4));
        let flags = alu::cmp(4, a, b);
        let (x, y) = (a as u32 as i32, b as u32 as i32);
        assert_eq!(alu::condition(2, flags), a < b);
        assert_eq!(alu::condition(3, flags), a >= b);
        assert_eq!(alu::condition(4, flags), a == b);
        assert_eq!(alu::condition(6, flags), a <= b);
        assert_eq!(alu::condition(7, flags), a > b);
        assert_eq!(alu::condition(12, flags), x < y);
        assert_eq!(alu::condition(13, flags), x >= y);
        assert_eq!(alu::condition(14, flags), x <= y);
        assert_eq!(alu::condition(15, flags), x > y);
    }
}

#[test]
fn decimal_adjustment_follows_the_manuals_examples() {
    // SDM 2A, DAA: 79H + 35H = AEH, adjusted to 14H with carry.
    let (sum, flags) = alu::add(1, 0x79, 0x35, false);
    let (al, flags) = alu::decimal_adjust(sum as u8, flags, false);
    assert_eq!((al, flags & flag::CF), (0x14, flag::CF));
    // SDM 2A, DAS: 35H - 47H = EEH, adjusted to 88H with borrow.
    let (difference, flags) = alu::sub(1, 0x35, 0x47, false);
    let (al, flags) = alu::decimal_adjust(difference as u8, flags, true);
    assert_eq!((al, flags & flag::CF), (0x88, flag::CF));
    // 8 + 5 = 13, unpacked; 3 - 8 = 5 with borrow.
    assert_eq!(alu::ascii_adjust(0x000D, 0, false).0, 0x0103);
    let (ax, flags) = alu::ascii_adjust(0x02FB, flag::AF, true);
    assert_eq!((ax, flags & flag::CF), (0x0105, flag::CF));
}
