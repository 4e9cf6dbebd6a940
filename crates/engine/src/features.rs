//! What of CPUID a running guest has come to rely on: a kernel looks once, and chooses its code.

use crate::Vm;

/// A word of CPUID whose bits are features (Intel SDM 2A, "CPUID"; AMD APM 3, appendix E).
struct Word {
    leaf: u32,
    subleaf: u32,
    /// 0 is EAX.
    register: usize,
    /// Bits that are none: APIC ID and counts, OSXSAVE and OSPKE, which are the guest's own; and
    /// what says that something cannot happen, which no code depends on.
    none: u32,
}

const fn word(leaf: u32, subleaf: u32, register: usize, none: u32) -> Word {
    Word { leaf, subleaf, register, none }
}

const WORDS: [Word; 15] = [
    word(1, 0, 2, 1 << 27),
    word(1, 0, 3, 1 << 28),
    // FDP and the selectors of x87 are of no use to a guest that finds them there.
    word(7, 0, 1, 1 << 6 | 1 << 13),
    word(7, 0, 2, 1 << 4),
    word(7, 0, 3, 0),
    word(7, 1, 0, 0),
    word(7, 1, 3, 0),
    // What XCR0 may have, how it is saved, and what IA32_XSS may have.
    word(0xD, 0, 0, 0),
    word(0xD, 1, 0, 0),
    word(0xD, 1, 2, 0),
    // KVM's own, or of a platform that has its own there.
    word(0x4000_0001, 0, 0, 0),
    word(0x8000_0001, 0, 2, 1 << 1),
    word(0x8000_0001, 0, 3, 0),
    // SSB_NO, BTC_NO.
    word(0x8000_0008, 0, 1, 1 << 26 | 1 << 29),
    // NoNestedDataBp, null selectors clear the base, SRSO_NO, SRSO_USER_KERNEL_NO.
    word(0x8000_0021, 0, 0, 1 << 0 | 1 << 6 | 1 << 29 | 1 << 30),
];

impl Word {
    /// Such as "1.ECX" or "7.1.EAX".
    fn name(&self) -> String {
        let register = ["EAX", "EBX", "ECX", "EDX"][self.register];
        let at = if self.subleaf == 0 { String::new() } else { format!(".{}", self.subleaf) };
        format!("{:X}{at}.{register}", self.leaf)
    }
}

/// Each word's name, and its bits.
pub fn features(vm: &dyn Vm) -> Vec<(String, u32)> {
    WORDS
        .iter()
        .map(|word| {
            let bits = vm.cpuid(word.leaf, word.subleaf)[word.register];
            (word.name(), bits & !word.none)
        })
        .collect()
}

/// The most that a guest's CPU may have of the host's features, so that it finds no more than it
/// had elsewhere. The default limits nothing.
#[derive(Clone, Debug, Default)]
pub struct FeatureLimit {
    /// By leaf, subleaf and register, bits that may stay.
    words: Vec<(u32, u32, usize, u32)>,
}

impl FeatureLimit {
    /// Of words as [`features`] gives them. Those that are not named stay as they are, and names
    /// that are none of a word are of another version, and mean nothing here.
    pub fn new(named: &[(String, u32)]) -> Self {
        let bits = |word: &Word| {
            let name = word.name();
            named.iter().find(|(other, _)| *other == name).map(|(_, bits)| *bits)
        };
        let limit =
            |word: &Word| Some((word.leaf, word.subleaf, word.register, bits(word)? | word.none));
        Self { words: WORDS.iter().filter_map(limit).collect() }
    }

    /// Takes from a subleaf's EAX to EDX what is too much.
    pub fn apply(&self, leaf: u32, subleaf: u32, registers: &mut [u32; 4]) {
        for &(at, sub, register, bits) in &self.words {
            if (at, sub) == (leaf, subleaf) {
                registers[register] &= bits;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_takes_features_alone() {
        let words = [("7.EBX".to_owned(), 1 << 5), ("1.2.EAX".to_owned(), 0)];
        let limit = FeatureLimit::new(&words);
        let mut leaf7 = [u32::MAX; 4];
        limit.apply(7, 0, &mut leaf7);
        assert_eq!(leaf7, [u32::MAX, 1 << 5 | 1 << 6 | 1 << 13, u32::MAX, u32::MAX]);
        let mut others = [u32::MAX; 4];
        limit.apply(7, 1, &mut others);
        limit.apply(1, 2, &mut others);
        FeatureLimit::default().apply(1, 0, &mut others);
        assert_eq!(others, [u32::MAX; 4]);
    }
}
