//! What of CPUID a running guest has come to rely on: a kernel looks once, and chooses its code.

use crate::Vm;

/// (leaf, subleaf, register: 0 is EAX) of words whose bits are features (Intel SDM 2A, "CPUID";
/// AMD APM 3, appendix E), and the bits that are none: APIC ID and counts, OSXSAVE and OSPKE, which
/// are the guest's own; and what says that something cannot happen, which no code depends on.
const WORDS: [(u32, u32, usize, u32); 10] = [
    (1, 0, 2, 1 << 27),
    (1, 0, 3, 1 << 28),
    // FDP and the selectors of x87 are of no use to a guest that finds them there.
    (7, 0, 1, 1 << 6 | 1 << 13),
    (7, 0, 2, 1 << 4),
    (7, 0, 3, 0),
    (7, 1, 0, 0),
    (7, 1, 3, 0),
    (0xD, 1, 0, 0),
    (0x8000_0001, 0, 2, 1 << 1),
    (0x8000_0001, 0, 3, 0),
];

/// Each as "1.ECX", and its bits.
pub fn features(vm: &dyn Vm) -> Vec<(String, u32)> {
    WORDS
        .iter()
        .map(|&(leaf, subleaf, register, none)| {
            let name = ["EAX", "EBX", "ECX", "EDX"][register];
            let at = if subleaf == 0 { String::new() } else { format!(".{subleaf}") };
            (format!("{leaf:X}{at}.{name}"), vm.cpuid(leaf, subleaf)[register] & !none)
        })
        .collect()
}
