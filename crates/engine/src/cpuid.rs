//! What every engine's CPUID says alike: the host it starts from, the topology
//! of the vCPUs, the brand string.
//!
//! Leaves are those of Intel SDM 2A "CPUID" and AMD APM 3, appendix E.

use std::sync::OnceLock;

use core::arch::x86_64::{__cpuid, __cpuid_count};

/// The host's answer; zeros where it has no such leaf.
pub fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    // Newer compilers have them as safe functions.
    #[allow(unused_unsafe)]
    // SAFETY: CPUID exists on every x86-64 CPU.
    let (max, r) = unsafe { (__cpuid(leaf & 0x8000_0000).eax, __cpuid_count(leaf, subleaf)) };
    if leaf > max {
        return [0; 4];
    }
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// "GenuineIntel"; whatever else is x86-64 follows AMD. Asked once: where the host
/// is itself a guest, each CPUID costs microseconds.
pub fn host_is_intel() -> bool {
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| host(0, 0)[1] == u32::from_le_bytes(*b"Genu"))
}

/// The processor's name as leaves 0x8000_0002 to 0x8000_0004 give it.
pub fn host_brand() -> String {
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .flat_map(|leaf| host(leaf, 0))
        .flat_map(u32::to_le_bytes)
        .take_while(|&byte| byte != 0)
        .map(|byte| if byte.is_ascii_graphic() { byte } else { b' ' })
        .collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// "Tetrarch ENGINE on" and the host's brand, as much as fits 47 bytes and a NUL.
pub fn brand(engine: &str, host_brand: &str) -> [u32; 12] {
    let host_brand = host_brand.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = format!("Tetrarch {engine} on {host_brand}");
    let mut bytes = [0u8; 48];
    let len = text.len().min(47);
    bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
    let mut words = [0; 12];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
    }
    words
}

/// One package of `vcpus` cores with one thread each; APIC IDs count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    pub vcpus: u32,
}

impl Topology {
    /// Bits of an APIC ID that tell the vCPUs apart.
    pub fn id_bits(self) -> u32 {
        self.vcpus.max(1).next_power_of_two().trailing_zeros()
    }

    /// Leaf 1, EBX: the APIC ID, the logical processors, CLFLUSH of 64 bytes.
    pub fn leaf_1_ebx(self, apic_id: u32) -> u32 {
        8 << 8 | (self.vcpus & 0xFF) << 16 | (apic_id & 0xFF) << 24
    }

    /// Leaf 0xB: threads of a core, then cores of the package.
    pub fn leaf_b(self, subleaf: u32, apic_id: u32) -> [u32; 4] {
        match subleaf {
            0 => [0, 1, 1 << 8, apic_id],
            1 => [self.id_bits(), self.vcpus, 2 << 8 | 1, apic_id],
            _ => [0, 0, subleaf & 0xFF, apic_id],
        }
    }

    /// A subleaf of leaf 4 or 0x8000_001D: each CPU has its caches for itself
    /// (`EAX[25:14]`); Intel puts the cores of the package, less one, above that.
    pub fn cache(self, mut leaf: [u32; 4], intel: bool) -> [u32; 4] {
        leaf[0] &= 0x3FFF;
        if intel && leaf[0] & 0x1F != 0 {
            leaf[0] |= (self.vcpus.saturating_sub(1) & 0x3F) << 26;
        }
        leaf
    }

    /// Leaf 0x8000_0008, ECX on AMD: bits of the APIC ID, cores less one.
    pub fn leaf_8000_0008_ecx(self) -> u32 {
        self.id_bits() << 12 | self.vcpus.saturating_sub(1) & 0xFF
    }

    /// Leaf 0x8000_001E on AMD: one thread a core, one node.
    pub fn leaf_8000_001e(self, apic_id: u32) -> [u32; 4] {
        [apic_id, apic_id & 0xFF, 0, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brand_names_the_engine_and_ends_in_nul() {
        let words = brand("bt", "A very  long processor name that does not fit the leaf");
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert!(bytes.starts_with(b"Tetrarch bt on A very long"));
        assert_eq!(bytes[47], 0);
    }

    #[test]
    fn topology_tells_vcpus_apart() {
        let three = Topology { vcpus: 3 };
        assert_eq!(three.leaf_1_ebx(2) >> 24, 2);
        assert_eq!(three.leaf_b(1, 2), [2, 3, 0x201, 2]);
        assert_eq!(three.leaf_b(2, 2)[2], 2);
        assert_eq!(Topology { vcpus: 1 }.leaf_b(1, 0)[0], 0);
        assert_eq!(three.leaf_8000_0008_ecx(), 2 << 12 | 2);
    }
}
