//! Register state between the contract's form and KVM's.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use tetrarch_engine::{Registers, Segment, SegmentTable, SystemRegisters};

pub fn registers(r: &kvm_regs) -> Registers {
    Registers {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
    }
}

pub fn kvm_registers(registers: &Registers) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
        registers.gpr;
    let Registers { rip, rflags, .. } = *registers;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        // Bit 1 is always set (Intel SDM 1, 3.4.3); entry to the guest fails without.
        rflags: rflags | 2,
    }
}

fn segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    Segment {
        base: s.base,
        limit: s.limit,
        attributes: u32::from(s.type_ & 0xF)
            | bit(s.s, 4)
            | u32::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
            | bit(s.unusable, 16),
        selector: s.selector,
    }
}

fn kvm_segment(s: &Segment) -> kvm_segment {
    let bit = |at: u32| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 0xF) as u8,
        s: bit(4),
        dpl: (s.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> SegmentTable {
    SegmentTable { base: t.base, limit: t.limit }
}

fn kvm_table(t: &SegmentTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

pub fn system_registers(s: &kvm_sregs) -> SystemRegisters {
    SystemRegisters {
        es: segment(&s.es),
        cs: segment(&s.cs),
        ss: segment(&s.ss),
        ds: segment(&s.ds),
        fs: segment(&s.fs),
        gs: segment(&s.gs),
        ldt: segment(&s.ldt),
        tr: segment(&s.tr),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
    }
}

/// `old` gives what the contract does not speak of: a pending interrupt.
pub fn kvm_system_registers(s: &SystemRegisters, old: &kvm_sregs) -> kvm_sregs {
    kvm_sregs {
        es: kvm_segment(&s.es),
        cs: kvm_segment(&s.cs),
        ss: kvm_segment(&s.ss),
        ds: kvm_segment(&s.ds),
        fs: kvm_segment(&s.fs),
        gs: kvm_segment(&s.gs),
        ldt: kvm_segment(&s.ldt),
        tr: kvm_segment(&s.tr),
        gdt: kvm_table(&s.gdt),
        idt: kvm_table(&s.idt),
        cr0: s.cr0 | CR0_ET,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: old.interrupt_bitmap,
    }
}

/// Always set on CPUs with an FPU of their own (Intel SDM 3A, 2.5).
const CR0_ET: u64 = 1 << 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_there_and_back() {
        for attributes in [0x9B, 0xA09B, 0xC093, 0x1_0000, 0x1_F0FF] {
            let there = Segment { base: 1, limit: 2, attributes, selector: 3 };
            assert_eq!(segment(&kvm_segment(&there)), there);
        }
    }

    #[test]
    fn registers_survive_the_way_there_and_back() {
        let there = Registers {
            gpr: std::array::from_fn(|index| index as u64 + 100),
            rip: 7,
            rflags: 0x246,
        };
        assert_eq!(registers(&kvm_registers(&there)), there);
    }
}
