//! Returns to an outer level, and what they leave of data segments.

use super::*;
use crate::interp::exception::fixture::*;
use crate::interp::segment::null_segment;

fn push_all(cpu: &mut Cpu, size: u64, values: &[u64]) {
    for &value in values.iter().rev() {
        let sp = cpu.st.gpr[reg::RSP] - size;
        cpu.st.gpr[reg::RSP] = sp;
        let bytes = &value.to_le_bytes()[..size as usize];
        cpu.vm.memory.write(tetrarch_memory::GuestPhys(sp), bytes).unwrap();
    }
}

const DATA_SEGMENTS: [usize; 4] = [seg::ES, seg::DS, seg::FS, seg::GS];

/// IRET and RETF to user mode from 64-bit and 32-bit kernels, with what `prepare`
/// did to the data segments.
fn returns_to_user(prepare: impl Fn(&mut Cpu), check: impl Fn(&Cpu, &str)) {
    let (cs, ss) = (u64::from(USER_CS), u64::from(USER_DS));
    let iret = [0x1234, cs, flag::FIXED, USER_STACK, ss];
    let retf = [0x1234, cs, USER_STACK, ss];
    let long: fn() -> Cpu = long_mode;
    for (make, size, code, frame, name) in [
        (long, 8, &[0x48, 0xCF][..], &iret[..], "IRETQ"),
        (long, 8, &[0x48, 0xCB], &retf, "RETFQ"),
        (protected_mode, 4, &[0xCF], &iret, "IRETD"),
        (protected_mode, 4, &[0xCB], &retf, "RETFD"),
    ] {
        let mut cpu = make();
        prepare(&mut cpu);
        push_all(&mut cpu, size, frame);
        run(&mut cpu, code).unwrap();
        assert_eq!(cpu.st.cpl, 3, "{name}");
        check(&cpu, name);
    }
}

#[test]
fn null_selectors_lose_their_rpl() {
    for rpl in 0..4 {
        returns_to_user(
            |cpu| {
                for index in DATA_SEGMENTS {
                    cpu.st.seg[index] = null_segment(rpl, 0);
                }
            },
            |cpu, name| {
                let selectors = DATA_SEGMENTS.map(|index| cpu.st.seg[index].selector);
                assert_eq!(selectors, [0; 4], "{name}");
            },
        );
    }
}

#[test]
fn nulled_segments_keep_their_base() {
    // As a 64-bit kernel has them: null with a base by MSR, or of DPL 0.
    let kernel = Segment { base: 0x1234_5000, ..segment(KERNEL_DS, 0xC093) };
    let null = Segment { base: 0x1234_5000, ..null_segment(3, 0) };
    for before in [kernel, null] {
        returns_to_user(
            |cpu| {
                for index in DATA_SEGMENTS {
                    cpu.st.seg[index] = before;
                }
            },
            |cpu, name| {
                for index in DATA_SEGMENTS {
                    let s = cpu.st.seg[index];
                    assert_eq!((s.selector, s.base), (0, 0x1234_5000), "{name}");
                    assert_ne!(s.attributes & attr::UNUSABLE, 0, "{name}");
                }
            },
        );
    }
}

fn segment(selector: u16, attributes: u32) -> Segment {
    Segment { base: 0, limit: 0xFFFF_FFFF, attributes, selector }
}

#[test]
fn segments_of_the_outer_level_stay() {
    // Data of DPL 3, and conforming code of DPL 0.
    for (selector, attributes) in [(USER_DS, 0xC0F3), (CONFORMING | 3, 0xC09F)] {
        let before = segment(selector, attributes);
        returns_to_user(
            |cpu| {
                for index in DATA_SEGMENTS {
                    cpu.st.seg[index] = before;
                }
            },
            |cpu, name| {
                for index in DATA_SEGMENTS {
                    assert_eq!(cpu.st.seg[index], before, "{name}");
                }
            },
        );
    }
}

#[test]
fn a_return_to_the_same_level_changes_no_segment() {
    let mut cpu = long_mode();
    cpu.st.seg[seg::FS] = Segment { base: 0x5000, ..null_segment(3, 0) };
    let before = cpu.st.seg[seg::FS];
    push_all(&mut cpu, 8, &[0x1234, u64::from(KERNEL_CS), 2, KERNEL_STACK, u64::from(KERNEL_DS)]);
    run(&mut cpu, &[0x48, 0xCF]).unwrap();
    assert_eq!(cpu.st.seg[seg::FS], before);
}

#[test]
fn iret_that_faults_ends_the_blocking_of_nmis() {
    let mut cpu = protected_mode();
    cpu.st.nmi_blocked = 1;
    push_all(&mut cpu, 4, &[0x1234, 0, flag::FIXED]);
    assert_eq!(run(&mut cpu, &[0xCF]), gp(0));
    assert_eq!(cpu.st.nmi_blocked, 0);
}
