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

/// How the vCPUs lie in packages ("sockets") and cores.
///
/// An APIC ID is thread, core and package in fields of as many bits as each needs (Intel SDM 3A,
/// 9.9.2), so IDs have gaps where a count is no power of two. vCPUs are numbered in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    pub sockets: u32,
    /// Of a socket.
    pub cores: u32,
    /// Of a core.
    pub threads: u32,
}

/// Bits of a field that counts to `count`.
fn bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

impl Topology {
    /// One package of `vcpus` cores with one thread each.
    pub const fn flat(vcpus: u32) -> Self {
        Self { sockets: 1, cores: vcpus, threads: 1 }
    }

    pub fn vcpus(self) -> u32 {
        self.sockets.saturating_mul(self.package_vcpus())
    }

    /// vCPUs of a package.
    pub fn package_vcpus(self) -> u32 {
        self.cores.saturating_mul(self.threads)
    }

    fn core_shift(self) -> u32 {
        bits(self.threads)
    }

    fn package_shift(self) -> u32 {
        self.core_shift() + bits(self.cores)
    }

    pub fn apic_id(self, vcpu: u32) -> u32 {
        let (core, thread) = (vcpu / self.threads.max(1), vcpu % self.threads.max(1));
        let (package, core) = (core / self.cores.max(1), core % self.cores.max(1));
        package << self.package_shift() | core << self.core_shift() | thread
    }

    /// Whose APIC ID it is.
    pub fn vcpu(self, apic_id: u32) -> Option<u32> {
        let field = |shift: u32, bits: u32| apic_id >> shift & ((1u32 << bits) - 1);
        let thread = field(0, self.core_shift());
        let core = field(self.core_shift(), bits(self.cores));
        let package = apic_id.checked_shr(self.package_shift()).unwrap_or(0);
        (thread < self.threads && core < self.cores && package < self.sockets)
            .then(|| (package * self.cores + core) * self.threads + thread)
    }

    /// Leaf 1, EBX: the APIC ID, the package's logical processors, CLFLUSH of 64 bytes.
    pub fn leaf_1_ebx(self, apic_id: u32) -> u32 {
        8 << 8 | self.package_vcpus().min(0xFF) << 16 | (apic_id & 0xFF) << 24
    }

    /// Leaves 0xB and 0x1F: threads of a core, then all of the package.
    pub fn leaf_b(self, subleaf: u32, apic_id: u32) -> [u32; 4] {
        match subleaf {
            0 => [self.core_shift(), self.threads, 1 << 8, apic_id],
            1 => [self.package_shift(), self.package_vcpus(), 2 << 8 | 1, apic_id],
            _ => [0, 0, subleaf & 0xFF, apic_id],
        }
    }

    /// A subleaf of leaf 4 or 0x8000_001D: the last level is the package's, the others are
    /// each core's. `EAX[25:14]` are the IDs that share it, less one; Intel puts the package's
    /// IDs of cores, less one, above that.
    pub fn cache(self, mut leaf: [u32; 4], intel: bool) -> [u32; 4] {
        let (kind, level) = (leaf[0] & 0x1F, leaf[0] >> 5 & 7);
        leaf[0] &= 0x3FFF;
        if kind != 0 {
            let shift = if level < 3 { self.core_shift() } else { self.package_shift() };
            leaf[0] |= ((1 << shift) - 1).min(0xFFF) << 14;
            if intel {
                leaf[0] |= ((1 << bits(self.cores)) - 1).min(0x3F) << 26;
            }
        }
        leaf
    }

    /// Leaf 0x8000_0008, ECX on AMD: bits of the APIC ID, the package's vCPUs less one.
    pub fn leaf_8000_0008_ecx(self) -> u32 {
        self.package_shift() << 12 | self.package_vcpus().saturating_sub(1).min(0xFF)
    }

    /// Leaf 0x8000_001E on AMD: the core and its threads; each package is a node.
    pub fn leaf_8000_001e(self, apic_id: u32) -> [u32; 4] {
        let core = apic_id >> self.core_shift() & ((1 << bits(self.cores)) - 1);
        let threads = self.threads.saturating_sub(1).min(0xFF);
        let node = apic_id.checked_shr(self.package_shift()).unwrap_or(0);
        [apic_id, threads << 8 | core & 0xFF, node & 0xFF, 0]
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
        let three = Topology::flat(3);
        assert_eq!(three.leaf_1_ebx(2) >> 24, 2);
        assert_eq!(three.leaf_b(1, 2), [2, 3, 0x201, 2]);
        assert_eq!(three.leaf_b(2, 2)[2], 2);
        assert_eq!(Topology::flat(1).leaf_b(1, 0)[0], 0);
        assert_eq!(three.leaf_8000_0008_ecx(), 2 << 12 | 2);
    }

    #[test]
    fn apic_ids_have_a_field_for_each_level() {
        let odd = Topology { sockets: 2, cores: 3, threads: 2 };
        let ids: Vec<u32> = (0..odd.vcpus()).map(|vcpu| odd.apic_id(vcpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        let owners: Vec<u32> = (0..32).filter_map(|id| odd.vcpu(id)).collect();
        assert_eq!(owners, (0..12).collect::<Vec<u32>>());
        assert_eq!((odd.vcpu(6), odd.vcpu(16), odd.vcpu(u32::MAX)), (None, None, None));
        assert_eq!(odd.leaf_b(0, 9), [1, 2, 0x100, 9]);
        assert_eq!(odd.leaf_b(1, 9), [3, 6, 0x201, 9]);
        // L2 is the core's, L3 the package's; four IDs of cores.
        assert_eq!(odd.cache([0x43, 0, 0, 0], true)[0], 0x43 | 1 << 14 | 3 << 26);
        assert_eq!(odd.cache([0x63, 0, 0, 0], false)[0], 0x63 | 7 << 14);
        assert_eq!(odd.leaf_8000_001e(13), [13, 0x102, 1, 0]);
    }
}
