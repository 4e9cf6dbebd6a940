//! What the guest's CPU says it is, on KVM.
//!
//! The policy is that of every engine: features are those of the host as far
//! as they are virtualized, here by what KVM_GET_SUPPORTED_CPUID says; vendor,
//! family, model and stepping are the host's; the topology is our own; the
//! brand string names the engine. KVM's own leaves from 0x4000_0000 on stay
//! where the platform wants them, since the kernel keeps their promises.
//!
//! Hidden for good reason: MONITOR (the host may not stop in it), VMX and SVM
//! (guests of guests are no promise of ours), the PMU.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use tetrarch_engine::cpuid::{Topology, brand, host_brand};
use tetrarch_engine::{CpuModel, EngineError, Hypercalls, Platform};

/// Where KVM announces itself, and its features.
const KVM_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_00FF;
const KVM_FEATURES: u32 = 0x4000_0001;
/// The leaf of XSAVE; what its legacy region and header take; and ECX of a component's subleaf
/// that XSAVES alone saves.
const XSAVE: u32 = 0xD;
const XSAVE_LEAST: u32 = 576;
const SUPERVISOR: u32 = 1;

mod bits {
    // Leaf 0x4000_0001, EAX.
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    // Leaf 1, ECX and EDX.
    pub const HIDDEN_1_ECX: u32 = 1 << 3 | 1 << 5 | 1 << 15;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const X2APIC: u32 = 1 << 21;
    pub const HYPERVISOR: u32 = 1 << 31;
    pub const HTT: u32 = 1 << 28;
    // Leaf 0x8000_0001, ECX: CMP_LEGACY; SVM, PERFCTR_CORE, PERFCTR_NB.
    pub const CMP_LEGACY: u32 = 1 << 1;
    pub const HIDDEN_E1_ECX: u32 = 1 << 2 | 1 << 23 | 1 << 24;
    /// Leaf 7, EDX.
    pub const ARCH_CAPABILITIES: u32 = 1 << 29;
}

/// What decides about the tables beside the host's features.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub topology: Topology,
    pub intel: bool,
    pub tsc_deadline: bool,
}

/// Whether the guest is told of IA32_ARCH_CAPABILITIES.
pub fn has_arch_capabilities(supported: &CpuId) -> bool {
    let leaf7 = |entry: &&kvm_cpuid_entry2| entry.function == 7 && entry.index == 0;
    let found = supported.as_slice().iter().find(leaf7);
    found.is_some_and(|entry| entry.edx & bits::ARCH_CAPABILITIES != 0)
}

/// The table of one vCPU.
pub fn table(
    supported: &CpuId,
    policy: Policy,
    platform: &Platform,
    model: &CpuModel,
    vcpu: u32,
) -> Result<CpuId, EngineError> {
    let Policy { topology, intel, .. } = policy;
    let apic_id = topology.apic_id(vcpu);
    let brand = brand("kvm", &host_brand());
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // The topology is written anew.
        .filter(|entry| !matches!(entry.function, 0xB | 0x1F | 0xA | 0x8000_000A))
        .copied()
        .collect();
    for entry in &mut entries {
        adapt(entry, policy, apic_id, &brand);
    }
    let leaves: &[u32] = if intel { &[0xB, 0x1F] } else { &[0xB] };
    for (function, subleaf) in leaves.iter().flat_map(|&leaf| (0..3).map(move |sub| (leaf, sub))) {
        let [eax, ebx, ecx, edx] = topology.leaf_b(subleaf, apic_id);
        entries.push(kvm_cpuid_entry2 {
            function,
            index: subleaf,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        });
    }
    // The kernel's list is complete but for the leaves that it leaves to us.
    let missing = |leaf, entries: &[kvm_cpuid_entry2]| {
        !entries.iter().any(|entry: &kvm_cpuid_entry2| entry.function == leaf)
    };
    for leaf in 0x8000_0002..=0x8000_0004 {
        if missing(leaf, &entries) {
            let mut entry = kvm_cpuid_entry2 { function: leaf, ..Default::default() };
            adapt(&mut entry, policy, apic_id, &brand);
            entries.push(entry);
        }
    }
    if !intel && missing(0x8000_001E, &entries) {
        let mut entry = kvm_cpuid_entry2 { function: 0x8000_001E, ..Default::default() };
        adapt(&mut entry, policy, apic_id, &brand);
        entries.push(entry);
    }
    take(&mut entries, model);
    add_platform(&mut entries, platform, vcpu);
    CpuId::from_entries(&entries).map_err(|_| {
        EngineError::Internal(format!("{} CPUID leaves are more than KVM takes", entries.len()))
    })
}

/// Makes the CPU the model: takes what the guest shall not have, and of XSAVE what belongs to it (Intel SDM 1, 13.2).
fn take(entries: &mut [kvm_cpuid_entry2], model: &CpuModel) {
    for entry in entries.iter_mut() {
        let mut registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        model.apply(entry.function, entry.index, &mut registers);
        [entry.eax, entry.ebx, entry.ecx, entry.edx] = registers;
    }
    let word = |index: u32, entries: &[kvm_cpuid_entry2]| {
        let of = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (XSAVE, index);
        entries.iter().find(of).map_or((0, 0), |entry| (entry.eax, entry.ecx))
    };
    let components = word(0, entries).0 | word(1, entries).1;
    let mut size = XSAVE_LEAST;
    for entry in entries.iter_mut().filter(|entry| entry.function == XSAVE && entry.index > 1) {
        if entry.index > 31 || components >> entry.index & 1 == 0 {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        } else if entry.ecx & SUPERVISOR == 0 {
            size = size.max(entry.ebx + entry.eax);
        }
    }
    for entry in entries.iter_mut().filter(|entry| (entry.function, entry.index) == (XSAVE, 0)) {
        entry.ecx = size;
    }
}

/// KVM's own leaves stay where the platform wants them; its leaves replace and
/// add.
fn add_platform(entries: &mut Vec<kvm_cpuid_entry2>, platform: &Platform, vcpu: u32) {
    if !platform.kvm {
        entries.retain(|entry| !KVM_LEAVES.contains(&entry.function));
    } else if platform.hypercalls != Hypercalls::None {
        // These make hypercalls, which are another's.
        for entry in entries.iter_mut().filter(|entry| entry.function == KVM_FEATURES) {
            entry.eax &= !(bits::PV_UNHALT | bits::PV_SEND_IPI | bits::PV_SCHED_YIELD);
        }
    }
    for own in platform.cpuid.iter().filter(|own| own.vcpu.is_none_or(|own| own == vcpu)) {
        entries.retain(|entry| {
            entry.function != own.leaf || own.subleaf.is_some_and(|index| index != entry.index)
        });
        let [eax, ebx, ecx, edx] = own.registers;
        let (index, flags) = match own.subleaf {
            Some(index) => (index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            None => (0, 0),
        };
        let function = own.leaf;
        let entry =
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() };
        entries.push(entry);
    }
}

fn adapt(entry: &mut kvm_cpuid_entry2, policy: Policy, apic_id: u32, brand: &[u32; 12]) {
    let Policy { topology, intel, tsc_deadline } = policy;
    let many = topology.package_vcpus() > 1;
    match entry.function {
        0 => entry.eax = entry.eax.max(if intel { 0x1F } else { 0xB }),
        1 => {
            entry.ebx = topology.leaf_1_ebx(apic_id);
            entry.ecx &= !bits::HIDDEN_1_ECX;
            entry.ecx |= bits::HYPERVISOR | bits::X2APIC;
            set(&mut entry.ecx, bits::TSC_DEADLINE, tsc_deadline);
            set(&mut entry.edx, bits::HTT, many);
        }
        4 | 0x8000_001D => {
            let leaf = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            entry.eax = topology.cache(leaf, intel)[0];
        }
        0x8000_0001 => {
            entry.ecx &= !bits::HIDDEN_E1_ECX;
            set(&mut entry.ecx, bits::CMP_LEGACY, many && !intel);
        }
        0x8000_0002..=0x8000_0004 => {
            let at = (entry.function - 0x8000_0002) as usize * 4;
            entry.eax = brand[at];
            entry.ebx = brand[at + 1];
            entry.ecx = brand[at + 2];
            entry.edx = brand[at + 3];
        }
        0x8000_0008 if !intel => entry.ecx = topology.leaf_8000_0008_ecx(),
        0x8000_001E if !intel => {
            let [eax, ebx, ecx, edx] = topology.leaf_8000_001e(apic_id);
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (eax, ebx, ecx, edx);
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !bit | if on { bit } else { 0 };
}

#[cfg(test)]
mod tests {
    use super::*;
    use tetrarch_engine::CpuidLeaf;

    fn supported() -> CpuId {
        let entry = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(0, 0x20, 1, 2, 3),
            entry(1, 0x123, 0x7700_0800, !bits::HYPERVISOR, u32::MAX),
            entry(0xB, 9, 9, 9, 9),
            entry(0x1F, 9, 9, 9, 9),
            entry(0x4000_0000, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            entry(0x4000_0001, 0x0100_0009, 0, 0, 0),
            entry(0x8000_0001, 0, 0, u32::MAX, 0),
        ])
        .unwrap()
    }

    fn policy(vcpus: u32) -> Policy {
        Policy { topology: Topology::flat(vcpus), intel: false, tsc_deadline: true }
    }

    fn kvm() -> Platform {
        Platform { kvm: true, ..Platform::default() }
    }

    fn all() -> CpuModel {
        CpuModel::default()
    }

    fn leaf(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let is = |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == index;
        *table.as_slice().iter().find(is).unwrap()
    }

    #[test]
    fn topology_is_ours_and_tells_vcpus_apart() {
        for id in 0..4 {
            let table = table(&supported(), policy(4), &kvm(), &all(), id).unwrap();
            assert_eq!(leaf(&table, 1, 0).ebx >> 16, id << 8 | 4);
            let cores = leaf(&table, 0xB, 1);
            assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 4, id));
            assert_eq!(leaf(&table, 0x8000_001E, 0).eax, id);
            assert!(!table.as_slice().iter().any(|entry| entry.function == 0x1F));
        }
    }

    #[test]
    fn leaves_of_kvm_stay() {
        let table = table(&supported(), policy(1), &kvm(), &all(), 0).unwrap();
        assert_eq!(leaf(&table, 0x4000_0000, 0).ebx, 0x4b4d_564b);
        assert_eq!(leaf(&table, 0x4000_0001, 0).eax & 0x0100_0009, 0x0100_0009);
        assert_ne!(leaf(&table, 1, 0).ecx & bits::HYPERVISOR, 0);
    }

    #[test]
    fn leaves_of_kvm_go_where_the_platform_is_not_kvms() {
        let own =
            |leaf, subleaf, vcpu, eax| CpuidLeaf { leaf, subleaf, vcpu, registers: [eax, 0, 0, 0] };
        let cpuid = vec![
            own(0x4000_0000, None, None, 0x4000_0010),
            own(0xB, Some(1), None, 7),
            own(0x4000_0004, None, Some(0), 8),
            own(0x4000_0004, None, Some(1), 9),
        ];
        let platform = Platform { cpuid, ..Platform::default() };
        let table = table(&supported(), policy(2), &platform, &all(), 1).unwrap();
        assert_eq!(leaf(&table, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(leaf(&table, 0x4000_0004, 0).eax, 9);
        assert_eq!((leaf(&table, 0xB, 1).eax, leaf(&table, 0xB, 0).ebx), (7, 1));
        let functions: Vec<u32> = table.as_slice().iter().map(|entry| entry.function).collect();
        assert!(!functions.contains(&0x4000_0001));
        assert_eq!(functions.iter().filter(|&&leaf| leaf == 0x4000_0000).count(), 1);
    }

    #[test]
    fn features_that_call_go_where_the_calls_are_anothers() {
        let platform = Platform { hypercalls: Hypercalls::Kernel, ..kvm() };
        let mut supported = supported().as_slice().to_vec();
        supported
            .iter_mut()
            .filter(|it| it.function == 0x4000_0001)
            .for_each(|it| it.eax = u32::MAX);
        let table =
            table(&CpuId::from_entries(&supported).unwrap(), policy(1), &platform, &all(), 0)
                .unwrap();
        assert_eq!(leaf(&table, 0x4000_0001, 0).eax, !(1 << 7 | 1 << 11 | 1 << 13));
    }

    #[test]
    fn hidden_features_stay_hidden() {
        let table = table(&supported(), policy(1), &kvm(), &all(), 0).unwrap();
        assert_eq!(leaf(&table, 1, 0).ecx & bits::HIDDEN_1_ECX, 0);
        assert_eq!(leaf(&table, 1, 0).edx & bits::HTT, 0);
        assert_eq!(leaf(&table, 0x8000_0001, 0).ecx & bits::HIDDEN_E1_ECX, 0);
    }

    #[test]
    fn brand_names_the_engine() {
        let table = table(&supported(), policy(1), &kvm(), &all(), 0).unwrap();
        assert_eq!(leaf(&table, 0x8000_0002, 0).eax, u32::from_le_bytes(*b"Tetr"));
    }

    #[test]
    fn deadline_timer_follows_the_host() {
        let without = Policy { tsc_deadline: false, ..policy(1) };
        let table = table(&supported(), without, &kvm(), &all(), 0).unwrap();
        assert_eq!(leaf(&table, 1, 0).ecx & bits::TSC_DEADLINE, 0);
    }

    #[test]
    fn a_limit_takes_features_and_the_room_of_their_state() {
        let entry = |function, index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        let mut supported = supported().as_slice().to_vec();
        supported.push(entry(7, 0, 2, u32::MAX, 0));
        supported.push(entry(XSAVE, 0, 0xE7, 0, 2696));
        supported.push(entry(XSAVE, 1, 0xF, 0, 1 << 11));
        supported.push(entry(XSAVE, 2, 256, 576, 0));
        supported.push(entry(XSAVE, 6, 512, 1152, 0));
        supported.push(entry(XSAVE, 11, 16, 0, SUPERVISOR));
        let supported = CpuId::from_entries(&supported).unwrap();
        let words = [("7.EBX", 1 << 5), ("D.EAX", 7), ("D.1.EAX", 7), ("D.1.ECX", 0)];
        let words = words.map(|(name, bits)| (name.to_owned(), bits));
        let table = table(&supported, policy(1), &kvm(), &CpuModel::new(&words, None), 0).unwrap();
        assert_eq!(leaf(&table, 7, 0).ebx & !(1 << 6 | 1 << 13), 1 << 5);
        assert_eq!((leaf(&table, XSAVE, 0).eax, leaf(&table, XSAVE, 0).ecx), (7, 832));
        assert_eq!((leaf(&table, XSAVE, 1).eax, leaf(&table, XSAVE, 1).ecx), (7, 0));
        assert_eq!(leaf(&table, XSAVE, 2).ebx, 576);
        assert_eq!((leaf(&table, XSAVE, 6).eax, leaf(&table, XSAVE, 11).eax), (0, 0));
    }
}
