//! Paging: rights, error codes, A and D bits, page sizes, stale entries
//! (Intel SDM 3A, 4.5 to 4.10).

mod support;

use support::case::{Fault, PAGE};
use support::guest::{
    A, BASE, CR0, CR4, D, EFER, End, FREE, G, Guest, KERNEL_CODE, NX, P, PS, SMEP, U, W, WP,
    on_both, system,
};
use tetrarch_engine::Registers;

const AT: u64 = 0x40_0000;
const USER_CODE: u64 = 0x20_0000;
const UD: End = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });
const NXE: u64 = 1 << 11;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// mov rax, [rdi] ; ud2
const READ: [u8; 5] = [0x48, 0x8B, 0x07, 0x0F, 0x0B];
/// mov [rdi], rax ; ud2
const WRITE: [u8; 5] = [0x48, 0x89, 0x07, 0x0F, 0x0B];
/// jmp rdi
const JUMP: [u8; 2] = [0xFF, 0xE7];

struct Mode {
    kernel: bool,
    cr0: u64,
    cr4: u64,
    efer: u64,
}

const PLAIN: Mode = Mode { kernel: true, cr0: CR0, cr4: CR4, efer: EFER };

fn place_code(guest: &mut Guest) {
    guest.map(USER_CODE, KERNEL_CODE, P | U | A);
    guest.write(KERNEL_CODE, &READ);
    guest.write(KERNEL_CODE + 0x10, &WRITE);
    guest.write(KERNEL_CODE + 0x20, &JUMP);
}

/// Makes one access to `linear` and tells how it ended.
fn access(guest: &mut Guest, mode: &Mode, access: Access, linear: u64) -> End {
    let code = match access {
        Access::Read => 0,
        Access::Write => 0x10,
        Access::Fetch => 0x20,
    };
    let mut registers = system(mode.kernel);
    (registers.cr0, registers.cr4, registers.efer) = (mode.cr0, mode.cr4, mode.efer);
    guest.set_system(&registers);
    let base = if mode.kernel { BASE + KERNEL_CODE } else { USER_CODE };
    let mut gpr = [0; 16];
    gpr[7] = linear;
    guest.set_registers(&Registers { gpr, rip: base + code, rflags: 2 });
    guest.run()
}

fn page_fault(error: u64, cr2: u64) -> End {
    End::Fault(Fault { vector: 14, error, cr2 })
}

/// SDM 3A, 4.6.1, and the error code of 4.7. `None`: the access is allowed.
fn expected(entry: u64, mode: &Mode, access: Access) -> Option<u64> {
    let user = !mode.kernel;
    let mut code = match access {
        Access::Read => 0,
        Access::Write => 2,
        Access::Fetch if mode.efer & NXE != 0 || mode.cr4 & SMEP != 0 => 16,
        Access::Fetch => 0,
    };
    code |= if user { 4 } else { 0 };
    if entry & P == 0 {
        return Some(code);
    }
    if entry & NX != 0 && mode.efer & NXE == 0 {
        return Some(code | 1 | 8);
    }
    let user_page = entry & U != 0;
    let allowed = match access {
        _ if user && !user_page => false,
        Access::Read => true,
        Access::Write => entry & W != 0 || !user && mode.cr0 & WP == 0,
        Access::Fetch => entry & NX == 0 && (user || !user_page || mode.cr4 & SMEP == 0),
    };
    if allowed { None } else { Some(code | 1) }
}

#[test]
fn every_combination_of_rights_gives_its_error_code() {
    on_both(|guest, engine| {
        place_code(guest);
        guest.write(FREE, &[0x0F, 0x0B]);
        for bits in 0..16u64 {
            let entry = bits & 7 | if bits & 8 != 0 { NX } else { 0 };
            guest.map(AT, FREE, entry);
            for choice in 0..16 {
                let on = |bit: u64| choice >> bit & 1 != 0;
                let mode = Mode {
                    kernel: on(0),
                    cr0: if on(1) { CR0 } else { CR0 & !WP },
                    cr4: if on(2) { CR4 | SMEP } else { CR4 },
                    efer: if on(3) { EFER } else { EFER & !NXE },
                };
                for kind in [Access::Read, Access::Write, Access::Fetch] {
                    // Fetches run what is there: an UD2.
                    guest.write(FREE, &[0x0F, 0x0B]);
                    let got = access(guest, &mode, kind, AT);
                    let want = expected(entry, &mode, kind).map_or(UD, |e| page_fault(e, AT));
                    assert_eq!(got, want, "{engine}: entry {entry:#x} mode {choice:#x} {kind:?}");
                    if want != UD && kind != Access::Fetch {
                        let back = guest.frame.rip & 0xFFF;
                        let at = if kind == Access::Read { 0 } else { 0x10 };
                        assert_eq!(back, KERNEL_CODE & 0xFFF | at, "{engine}: rip");
                    }
                }
            }
        }
    });
}

#[test]
fn rights_are_the_least_of_all_levels() {
    on_both(|guest, engine| {
        place_code(guest);
        let user = Mode { kernel: false, ..PLAIN };
        for level in 1..4 {
            // The tables above AT are those of the code too but at level 1 and 0,
            // so the test has a branch of its own.
            let linear = 0x7F00_0000_0000;
            guest.map(linear, FREE, P | W | U);
            let slot = guest.slot(linear, level);
            let entry = guest.read64(slot);
            for (bits, kind, error) in [
                (entry & !W, Access::Write, 7),
                (entry & !U, Access::Read, 5),
                (entry | NX, Access::Fetch, 21),
                (entry & !P, Access::Read, 4),
            ] {
                guest.write64(slot, bits);
                let got = access(guest, &user, kind, linear);
                assert_eq!(got, page_fault(error, linear), "{engine}: level {level} {bits:#x}");
            }
            guest.write64(slot, entry);
            assert_eq!(access(guest, &user, Access::Write, linear), UD, "{engine}");
        }
    });
}

#[test]
fn reserved_bits_fault_with_rsvd() {
    on_both(|guest, engine| {
        place_code(guest);
        let linear = 0x7F00_0000_0000;
        for level in 0..4 {
            guest.map(linear, FREE, P | W | U);
            let slot = guest.slot(linear, level);
            let entry = guest.read64(slot);
            for bad in [1 << 45, 1 << 51] {
                guest.write64(slot, entry | bad);
                for (kind, error) in [(Access::Read, 9), (Access::Write, 11), (Access::Fetch, 25)] {
                    let got = access(guest, &PLAIN, kind, linear);
                    assert_eq!(got, page_fault(error, linear), "{engine}: level {level}");
                }
            }
            guest.write64(slot, entry);
        }
        // PS in a PML4 entry, and a large page whose frame is not aligned.
        let slot = guest.slot(linear, 3);
        let entry = guest.read64(slot);
        guest.write64(slot, entry | PS);
        assert_eq!(access(guest, &PLAIN, Access::Read, linear), page_fault(9, linear), "{engine}");
        guest.write64(slot, entry);
        let slot = guest.slot(linear, 1);
        guest.write64(slot, 0x20_2000 | P | W | PS);
        assert_eq!(access(guest, &PLAIN, Access::Read, linear), page_fault(9, linear), "{engine}");
    });
}

#[test]
fn accessed_and_dirty_bits_are_set_as_used() {
    on_both(|guest, engine| {
        place_code(guest);
        for kernel in [true, false] {
            let mode = Mode { kernel, ..PLAIN };
            for (kind, bits) in [(Access::Read, A), (Access::Fetch, A), (Access::Write, A | D)] {
                guest.map(AT, FREE, P | W | U);
                guest.write(FREE, &[0x0F, 0x0B]);
                assert_eq!(access(guest, &mode, kind, AT), UD, "{engine}");
                let slot = guest.slot(AT, 0);
                assert_eq!(guest.read64(slot) & (A | D), bits, "{engine}: {kind:?}");
            }
            // An access that faults sets nothing in the page's own entry.
            guest.map(AT, FREE, P | U);
            assert_ne!(access(guest, &mode, Access::Write, AT), UD, "{engine}");
            let slot = guest.slot(AT, 0);
            assert_eq!(guest.read64(slot) & D, 0, "{engine}: D of a write that faults");
        }
    });
}

#[test]
fn dirty_is_set_by_a_write_after_a_read() {
    on_both(|guest, engine| {
        guest.map(AT, FREE, P | W | U);
        // mov rax, [rdi] ; mov rcx, [rsi] ; mov [rdi], rax ; mov rdx, [rsi] ; ud2
        let code =
            [0x48, 0x8B, 0x07, 0x48, 0x8B, 0x0E, 0x48, 0x89, 0x07, 0x48, 0x8B, 0x16, 0x0F, 0x0B];
        guest.write(KERNEL_CODE, &code);
        let slot = guest.slot(AT, 0);
        let mut gpr = [0; 16];
        (gpr[6], gpr[7]) = (BASE + slot, AT);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), UD, "{engine}");
        let gpr = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((gpr[1] & (A | D), gpr[2] & (A | D)), (A, A | D), "{engine}");
    });
}

#[test]
fn large_pages_reach_where_they_should() {
    on_both(|guest, engine| {
        place_code(guest);
        // 2 MiB: all within; 1 GiB: the RAM at its start.
        let cases = [(1, 0x20_0000u64, 0x7F00_0020_0000u64), (2, 0, 0x7E40_0000_0000)];
        for (level, frame, linear) in cases {
            guest.map_level(linear, frame, P | W | U, level);
            for offset in [0x18_0000u64, 0x1F_FFF8, 0x10_0FFC] {
                let value = 0x1122_3344_5566_7788 ^ offset;
                guest.write64(frame + offset, value);
                let user = Mode { kernel: false, ..PLAIN };
                let got = access(guest, &user, Access::Read, linear + offset);
                assert_eq!(got, UD, "{engine}: level {level}");
                assert_eq!(
                    guest.vcpu.registers().expect("state").gpr[0],
                    value,
                    "{engine}: level {level}"
                );
            }
            let slot = guest.slot(linear, level);
            assert_eq!(guest.read64(slot) & (A | D), A, "{engine}");
            assert_eq!(access(guest, &PLAIN, Access::Write, linear + 0x18_0000), UD, "{engine}");
            assert_eq!(guest.read64(slot) & (A | D), A | D, "{engine}");
        }
    });
}

#[test]
fn access_across_pages_faults_at_the_second() {
    on_both(|guest, engine| {
        place_code(guest);
        guest.map(AT, FREE, P | W | U);
        guest.unmap(AT + PAGE);
        guest.write64(FREE + PAGE - 8, 0x5555);
        for (kind, error) in [(Access::Read, 0), (Access::Write, 2)] {
            let got = access(guest, &PLAIN, kind, AT + PAGE - 3);
            assert_eq!(got, page_fault(error, AT + PAGE), "{engine}");
        }
        assert_eq!(guest.read64(FREE + PAGE - 8), 0x5555, "{engine}: nothing is written");
        // And at the first when that one is missing.
        guest.map(AT + PAGE, FREE, P | W | U);
        guest.unmap(AT);
        for (kind, error) in [(Access::Read, 0), (Access::Write, 2)] {
            let got = access(guest, &PLAIN, kind, AT + PAGE - 3);
            assert_eq!(got, page_fault(error, AT + PAGE - 3), "{engine}");
        }
    });
}

#[test]
fn address_that_is_not_canonical_is_a_general_protection_fault() {
    on_both(|guest, engine| {
        place_code(guest);
        let gp = End::Fault(Fault { vector: 13, error: 0, cr2: 0 });
        for linear in [1 << 47, 0x1234_0000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF] {
            for kind in [Access::Read, Access::Write, Access::Fetch] {
                assert_eq!(access(guest, &PLAIN, kind, linear), gp, "{engine}: {linear:#x}");
            }
        }
    });
}

/// Code for the stale-entry tests: read [rdi]; write r8 to the entry [rsi];
/// `flush`; read [rdi] again.
fn stale(guest: &mut Guest, flush: &[u8], global: bool) -> u64 {
    guest.write64(FREE, 1);
    guest.write64(FREE + PAGE, 2);
    let bits = P | W | A | D | if global { G } else { 0 };
    guest.map(AT, FREE, bits);
    let mut code = vec![
        0x48, 0x8B, 0x07, // mov rax, [rdi]
        0x4C, 0x89, 0x06, // mov [rsi], r8
    ];
    code.extend_from_slice(flush);
    code.extend_from_slice(&[0x48, 0x8B, 0x1F, 0x0F, 0x0B]); // mov rbx, [rdi] ; ud2
    guest.write(KERNEL_CODE, &code);
    let slot = guest.slot(AT, 0);
    let mut gpr = [0; 16];
    (gpr[6], gpr[7], gpr[8]) = (BASE + slot, AT, (FREE + PAGE) | bits);
    gpr[9] = CR4;
    gpr[10] = CR4 & !0x80;
    guest.start(true, BASE + KERNEL_CODE, gpr, 2);
    assert_eq!(guest.run(), UD);
    let gpr = guest.vcpu.registers().expect("state").gpr;
    assert_eq!(gpr[0], 1);
    gpr[3]
}

#[test]
fn flushes_drop_stale_entries() {
    let invlpg = [0x0F, 0x01, 0x3F]; // invlpg [rdi]
    let cr3 = [0x0F, 0x20, 0xDA, 0x0F, 0x22, 0xDA]; // mov rdx, cr3 ; mov cr3, rdx
    // mov cr4, r10 ; mov cr4, r9: PGE off and on
    let cr4 = [0x41, 0x0F, 0x22, 0xE2, 0x41, 0x0F, 0x22, 0xE1];
    on_both(|guest, engine| {
        for (name, flush, global_too) in
            [("INVLPG", &invlpg[..], true), ("CR3", &cr3[..], false), ("CR4", &cr4[..], true)]
        {
            assert_eq!(stale(guest, flush, false), 2, "{engine}: {name}");
            if global_too {
                assert_eq!(stale(guest, flush, true), 2, "{engine}: {name}, global");
            }
        }
        // A load of CR3 keeps global pages (SDM 3A, 4.10.4.1): so does the engine.
        assert_eq!(stale(guest, &cr3, true), 1, "{engine}: CR3, global");
    });
}

#[test]
fn rights_taken_away_count_after_invlpg() {
    on_both(|guest, engine| {
        guest.map(AT, FREE, P | W | A | D);
        // mov [rdi], rax ; and qword [rsi], ~2 ; invlpg [rdi] ; mov [rdi], rax ; ud2
        let code = [
            0x48, 0x89, 0x07, 0x48, 0x83, 0x26, 0xFD, 0x0F, 0x01, 0x3F, 0x48, 0x89, 0x07, 0x0F,
            0x0B,
        ];
        guest.write(KERNEL_CODE, &code);
        let slot = guest.slot(AT, 0);
        let mut gpr = [0; 16];
        (gpr[6], gpr[7]) = (BASE + slot, AT);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), page_fault(3, AT), "{engine}");
        assert_eq!(guest.frame.rip, BASE + KERNEL_CODE + 10, "{engine}");
    });
}

#[test]
fn code_mapped_elsewhere_runs_after_invlpg() {
    on_both(|guest, engine| {
        for (page, value) in [(0, 1u8), (1, 2)] {
            guest.write(FREE + page * PAGE, &[0xB8, value, 0, 0, 0, 0xC3]); // mov eax ; ret
        }
        guest.map(AT, FREE, P | W | A | D);
        // call rdi ; mov ebx, eax ; mov [rsi], r8 ; invlpg [rdi] ; call rdi ; ud2
        let code =
            [0xFF, 0xD7, 0x89, 0xC3, 0x4C, 0x89, 0x06, 0x0F, 0x01, 0x3F, 0xFF, 0xD7, 0x0F, 0x0B];
        guest.write(KERNEL_CODE, &code);
        let slot = guest.slot(AT, 0);
        let mut gpr = [0; 16];
        gpr[4] = BASE + KERNEL_CODE + 0x800;
        (gpr[6], gpr[7], gpr[8]) = (BASE + slot, AT, (FREE + PAGE) | P | W | A | D);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), UD, "{engine}");
        let gpr = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((gpr[3], gpr[0]), (1, 2), "{engine}");
    });
}

#[test]
fn invlpg_drops_a_whole_large_page() {
    on_both(|guest, engine| {
        let linear = 0x7F00_0020_0000;
        guest.map_level(linear, 0x20_0000, P | W | A | D, 1);
        guest.write64(0x20_5000, 1);
        guest.write64(0x40_5000, 2);
        // mov rax, [rdi+0x5000] ; mov [rsi], r8 ; invlpg [rdi+0x1000] ; mov rbx, [rdi+0x5000]
        let code = [
            0x48, 0x8B, 0x87, 0x00, 0x50, 0, 0, 0x4C, 0x89, 0x06, 0x0F, 0x01, 0xBF, 0x00, 0x10, 0,
            0, 0x48, 0x8B, 0x9F, 0x00, 0x50, 0, 0, 0x0F, 0x0B,
        ];
        guest.write(KERNEL_CODE, &code);
        let slot = guest.slot(linear, 1);
        let mut gpr = [0; 16];
        (gpr[6], gpr[7], gpr[8]) = (BASE + slot, linear, 0x40_0000 | P | W | A | D | PS);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), UD, "{engine}");
        let gpr = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((gpr[0], gpr[3]), (1, 2), "{engine}");
    });
}
