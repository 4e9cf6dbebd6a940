//! Access rights of segments, for every type, level and presence (Intel SDM 3A,
//! 5.2 to 5.7), against the manual's rules written out once more.

use iced_x86::Register;

use super::*;
use crate::interp::exception::fixture::*;
use crate::interp::operand::linear;

const AT: u16 = 0x68;

/// Puts a descriptor at [`AT`] and the CPU at `cpl`.
fn describe(cpu: &mut Cpu, cpl: u8, access: u8, flags: u8) {
    cpu.st.cpl = cpl;
    let raw = 0x1000 | u64::from(access) << 40 | u64::from(flags) << 52;
    poke(cpu, GDT + u64::from(AT), raw);
}

#[test]
fn loads_of_every_descriptor_at_every_level() {
    let mut cpu = protected_mode();
    for access in 0..=255u8 {
        let (kind, code_or_data) = (access & 15, access & 16 != 0);
        let (dpl, present) = (access >> 5 & 3, access & 0x80 != 0);
        let (code, rw, conforming) = (kind & 8 != 0, kind & 2 != 0, kind & 12 == 12);
        for cpl in 0..4 {
            for rpl in 0..4 {
                let selector = AT | rpl;
                let what = format!("access {access:#x}, CPL {cpl}, RPL {rpl}");
                describe(&mut cpu, cpl, access, 0);
                let stack = code_or_data && !code && rw && dpl == cpl && rpl as u8 == cpl;
                let expected = match (stack, present) {
                    (false, _) => gp(u32::from(AT)),
                    (true, false) => fail(vector::SS, u32::from(AT)),
                    (true, true) => Ok(()),
                };
                assert_eq!(load_segment(&mut cpu, seg::SS, selector), expected, "SS, {what}");

                describe(&mut cpu, cpl, access, 0);
                let before = cpu.st.seg[seg::DS];
                let readable = code_or_data && (!code || rw);
                let data = readable && (conforming || dpl >= cpl && dpl >= rpl as u8);
                let expected = match (data, present) {
                    (false, _) => gp(u32::from(AT)),
                    (true, false) => fail(vector::NP, u32::from(AT)),
                    (true, true) => Ok(()),
                };
                assert_eq!(load_segment(&mut cpu, seg::DS, selector), expected, "DS, {what}");
                // The accessed bit is set by a load and by nothing else.
                let stored = peek(&cpu, GDT + u64::from(AT) + 5, 1) as u8;
                if expected.is_ok() {
                    assert_eq!((stored, cpu.st.seg[seg::DS].selector), (access | 1, selector));
                } else {
                    assert_eq!((stored, cpu.st.seg[seg::DS]), (access, before), "{what}");
                }
            }
        }
    }
}

#[test]
fn accesses_follow_the_type_and_the_limit() {
    // Offset and size, for a limit of 0x1000 up or down.
    let mut cpu = protected_mode();
    let places = [(0, 1), (0xFFD, 4), (0xFFE, 4), (0x1000, 1), (0x1001, 1), (0x1FFE, 2)];
    for kind in 0..16u8 {
        let (code, rw, down) = (kind & 8 != 0, kind & 2 != 0, kind & 12 == 4);
        if code && !rw {
            continue; // no data segment register can hold it
        }
        for (offset, size) in places {
            for write in [false, true] {
                describe(&mut cpu, 0, 0x90 | kind, 4);
                load_segment(&mut cpu, seg::ES, AT).unwrap();
                let inside = if down { offset > 0x1000 } else { offset + size - 1 <= 0x1000 };
                let allowed = inside && (!write || rw && !code);
                let got = linear(&cpu, Register::ES, offset, size as usize, write);
                let expected = if allowed { Ok(offset) } else { gp(0) };
                assert_eq!(got, expected, "type {kind:#x} {offset:#x} {size} write {write}");
            }
        }
    }
}

#[test]
fn null_segments_fault_when_used_not_when_loaded() {
    let mut cpu = protected_mode();
    for selector in 0..4 {
        load_segment(&mut cpu, seg::FS, selector).unwrap();
        assert_eq!(cpu.st.seg[seg::FS].selector, selector);
        assert_eq!(linear(&cpu, Register::FS, 0, 1, false), gp(0));
        assert_eq!(load_segment(&mut cpu, seg::SS, selector), gp(0));
    }
    // In 64-bit mode they serve, and SS takes one below CPL 3 with the RPL of CPL.
    let mut cpu = long_mode();
    load_segment(&mut cpu, seg::FS, 3).unwrap();
    assert_eq!(linear(&cpu, Register::FS, 0x10, 1, true), Ok(0x10));
    assert_eq!(load_segment(&mut cpu, seg::SS, 0), Ok(()));
    assert_eq!(load_segment(&mut cpu, seg::SS, 1), gp(0));
}
