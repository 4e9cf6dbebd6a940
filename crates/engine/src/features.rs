//! What of CPUID a running guest has come to rely on: a kernel looks once, and chooses its code.

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

const WORDS: [Word; 16] = [
    word(1, 0, 2, 1 << 27),
    word(1, 0, 3, 1 << 28),
    // FDP and the selectors of x87 are of no use to a guest that finds them there.
    word(7, 0, 1, 1 << 6 | 1 << 13),
    word(7, 0, 2, 1 << 4),
    word(7, 0, 3, 0),
    word(7, 1, 0, 0),
    word(7, 1, 3, 0),
    // MCDT_NO.
    word(7, 2, 3, 1 << 5),
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

/// Each word's name, and its bits, of what CPUID says.
pub fn features(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Vec<(String, u32)> {
    WORDS
        .iter()
        .map(|word| {
            let bits = cpuid(word.leaf, word.subleaf)[word.register];
            (word.name(), bits & !word.none)
        })
        .collect()
}

/// Who made a CPU ("GenuineIntel"), and its family, model and stepping as EAX of leaf 1 has them,
/// of what CPUID says.
pub fn identity(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> (String, u32) {
    let [_, b, c, d] = cpuid(0, 0);
    let vendor: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
    (String::from_utf8_lossy(&vendor).into_owned(), cpuid(SIGNATURE, 0)[0])
}

/// What a guest's CPU is where it is not all that the host's is: so that a guest finds the same on
/// several hosts, and no more than it had elsewhere. The default is the host's.
#[derive(Clone, Debug, Default)]
pub struct CpuModel {
    /// Family, model and stepping.
    signature: Option<u32>,
    /// By leaf, subleaf and register, bits that may stay.
    words: Vec<(u32, u32, usize, u32)>,
}

/// The leaf that has family, model and stepping in EAX; AMD repeats them in the other.
const SIGNATURE: u32 = 1;
const SIGNATURE_AMD: u32 = 0x8000_0001;

impl CpuModel {
    /// `named` is the most that it may have of the host's features, in words as [`features`]
    /// gives them. Those that are not named stay as they are, and names that are none of a word
    /// are of another version, and mean nothing here. Without a signature it is the host's.
    pub fn new(named: &[(String, u32)], signature: Option<u32>) -> Self {
        let bits = |word: &Word| {
            let name = word.name();
            named.iter().find(|(other, _)| *other == name).map(|(_, bits)| *bits)
        };
        let limit =
            |word: &Word| Some((word.leaf, word.subleaf, word.register, bits(word)? | word.none));
        Self { signature, words: WORDS.iter().filter_map(limit).collect() }
    }

    /// Makes a subleaf's EAX to EDX, as the host has them, the model's.
    pub fn apply(&self, leaf: u32, subleaf: u32, registers: &mut [u32; 4]) {
        for &(at, sub, register, bits) in &self.words {
            if (at, sub) == (leaf, subleaf) {
                registers[register] &= bits;
            }
        }
        if let Some(signature) = self.signature
            && (leaf == SIGNATURE || leaf == SIGNATURE_AMD && registers[0] != 0)
        {
            registers[0] = signature;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_takes_features_alone() {
        let words = [("7.EBX".to_owned(), 1 << 5), ("1.2.EAX".to_owned(), 0)];
        let limit = CpuModel::new(&words, None);
        let mut leaf7 = [u32::MAX; 4];
        limit.apply(7, 0, &mut leaf7);
        assert_eq!(leaf7, [u32::MAX, 1 << 5 | 1 << 6 | 1 << 13, u32::MAX, u32::MAX]);
        let mut others = [u32::MAX; 4];
        limit.apply(7, 1, &mut others);
        limit.apply(1, 2, &mut others);
        CpuModel::default().apply(1, 0, &mut others);
        assert_eq!(others, [u32::MAX; 4]);
    }

    #[test]
    fn a_signature_is_where_the_host_has_its_own() {
        let model = CpuModel::new(&[], Some(0x306C3));
        for (leaf, host, shown) in [
            (1, 0x806F8, 0x306C3),
            (0x8000_0001, 0xA10F11, 0x306C3),
            (0x8000_0001, 0, 0),
            (2, 0x806F8, 0x806F8),
        ] {
            let mut registers = [host, 1, 2, 3];
            model.apply(leaf, 0, &mut registers);
            assert_eq!(registers, [shown, 1, 2, 3], "{leaf:#x}");
        }
    }

    #[test]
    fn a_vendor_is_read_in_its_order() {
        let leaf = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let cpuid = |at: u32, _: u32| match at {
            0 => [1, leaf(b"Auth"), leaf(b"cAMD"), leaf(b"enti")],
            _ => [0x800F12, 0, 0, 0],
        };
        assert_eq!(identity(cpuid), ("AuthenticAMD".to_owned(), 0x800F12));
    }
}
