//! The local APIC's page and IA32_APIC_BASE (Intel SDM 3A, 11.4.3 and 11.4.4).

mod support;

use support::case::Fault;
use support::guest::{BASE, End, Guest, KERNEL_CODE, P, W, on_both};
use tetrarch_engine::{Exit, Reply};

const APIC: u64 = 0xFEE0_0000;
const AT: u64 = 0x40_0000;
const ENABLE: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
const BSP: u64 = 1 << 8;

/// wrmsr of `base` to IA32_APIC_BASE ; mov eax, [rdi] ; ud2
fn write_base_and_read(guest: &mut Guest, base: u64) -> End {
    guest.map(AT, APIC, P | W);
    let code = [0xB9, 0x1B, 0, 0, 0, 0x0F, 0x30, 0x8B, 0x07, 0x0F, 0x0B];
    guest.write(KERNEL_CODE, &code);
    let mut gpr = [0; 16];
    (gpr[0], gpr[2], gpr[7]) = (base & 0xFFFF_FFFF, base >> 32, AT + 0x30);
    guest.start(true, BASE + KERNEL_CODE, gpr, 2);
    guest.run()
}

fn fault(vector: u8) -> End {
    End::Fault(Fault { vector, error: 0, cr2: 0 })
}

#[test]
fn page_is_the_apic_only_while_it_is_enabled() {
    on_both(|guest, engine| {
        assert_eq!(write_base_and_read(guest, APIC | ENABLE | BSP), fault(6), "{engine}");
        assert_eq!(
            guest.vcpu.registers().expect("state").gpr[0] & 0xFF,
            0x14,
            "{engine}: the version"
        );
        for base in [APIC | BSP, APIC | BSP | ENABLE, APIC | BSP | ENABLE | X2APIC] {
            let end = write_base_and_read(guest, base);
            if base & (ENABLE | X2APIC) == ENABLE {
                assert_eq!(end, fault(6), "{engine}");
                continue;
            }
            let read = Exit::MmioRead { address: APIC + 0x30, size: 4 };
            assert_eq!(end, End::Exit(read), "{engine}: {base:#x}");
            guest.vcpu.reply(Reply::Value(0xFFFF_FFFF));
            assert_eq!(guest.run(), fault(6), "{engine}");
            assert_eq!(guest.vcpu.registers().expect("state").gpr[0], 0xFFFF_FFFF, "{engine}");
        }
    });
}

#[test]
fn reserved_bits_of_the_base_are_refused() {
    on_both(|guest, engine| {
        let physical_bits = guest.cpuid(0x8000_0008, 0)[0] & 0xFF;
        let reserved = (0..8).chain([9]).chain(physical_bits..64);
        for bit in reserved {
            let base = APIC | ENABLE | BSP | 1 << bit;
            assert_eq!(write_base_and_read(guest, base), fault(13), "{engine}: bit {bit}");
        }
    });
}
