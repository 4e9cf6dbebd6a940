//! What the guest's CPU says it is.
//!
//! The policy: a subset of the host's features, since user-level instructions
//! run on the host, cut to what this engine implements. Vendor, family, model
//! and stepping are the host's, since they choose among the guest's
//! workarounds, or all but the vendor those of a model; the brand string names
//! the engine. Leaves are those of Intel
//! SDM 2A "CPUID" and AMD APM 3, appendix E.
//!
//! What is hidden, and why, stands in docs/cpu.md; a test compares each bit with
//! the table in tests/support/features.rs.

use core::arch::x86_64::_xgetbv;

use iced_x86::{Code, CpuidFeature, DecoderOptions, Instruction};
use tetrarch_engine::CpuModel;
use tetrarch_engine::cpuid::{Topology, brand, host, host_brand, host_is_intel};

use crate::cpu::fpu::{MXCSR_MM, mxcsr_mask};
use crate::cpu::msr::EFER_AUTO_IBRS;
use crate::state::address::PHYS_BITS;
use crate::state::{CpuState, cr};

/// Who made the CPU; some instructions and MSRs differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    /// AMD, and Hygon, which follows it.
    Amd,
}

/// The last leaf is the topology, which Intel says once more in 0x1F.
const fn max_basic(vendor: Vendor) -> u32 {
    match vendor {
        Vendor::Intel => 0x1F,
        Vendor::Amd => 0xD,
    }
}

const EXTENDED: u32 = 0x8000_0000;

/// Feature bits that may pass from the host, by register of a leaf.
mod bits {
    /// Bits by number.
    const fn set(list: &[u32]) -> u32 {
        let mut value = 0;
        let mut index = 0;
        while index < list.len() {
            value |= 1 << list[index];
            index += 1;
        }
        value
    }

    // Leaf 1, ECX.
    pub const FMA: u32 = 1 << 12;
    pub const X2APIC: u32 = 1 << 21;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const XSAVE: u32 = 1 << 26;
    pub const OSXSAVE: u32 = 1 << 27;
    pub const AVX: u32 = 1 << 28;
    pub const F16C: u32 = 1 << 29;
    pub const HYPERVISOR: u32 = 1 << 31;
    /// SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX
    /// F16C RDRAND.
    pub const L1_ECX: u32 = set(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
    // Leaf 1, EDX.
    pub const VME: u32 = 1 << 1;
    pub const APIC: u32 = 1 << 9;
    pub const HTT: u32 = 1 << 28;
    /// FPU DE PSE TSC MSR PAE MCE CX8 SEP MTRR PGE MCA CMOV PAT PSE36 CLFLUSH
    /// MMX FXSR SSE SSE2.
    pub const L1_EDX: u32 =
        set(&[0, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
    // Leaf 7.
    pub const AVX2: u32 = 1 << 5;
    pub const FSGSBASE: u32 = 1 << 0;
    pub const SMEP: u32 = 1 << 7;
    /// The selectors of the last x87 instruction are zero.
    pub const NO_FCS_FDS: u32 = 1 << 13;
    /// BMI1 AVX2 BMI2 ERMS RDSEED ADX CLFLUSHOPT CLWB SHA; FDP changes with
    /// exceptions only.
    pub const L7_EBX: u32 = set(&[3, 5, 6, 8, 9, 18, 19, 23, 24, 29]);
    pub const UMIP: u32 = 1 << 2;
    /// GFNI VAES VPCLMULQDQ RDPID.
    pub const L7_ECX: u32 = set(&[8, 9, 10, 22]);
    pub const VAES: u32 = 1 << 9;
    pub const VPCLMULQDQ: u32 = 1 << 10;
    /// FSRM SERIALIZE.
    pub const L7_EDX: u32 = set(&[4, 14]);
    /// IBRS and IBPB, ARCH_CAPABILITIES.
    pub const L7_EDX_INTEL: u32 = set(&[26, 29]);
    // Leaf 7, subleaf 1; all of it works on YMM registers.
    /// SHA512 SM3 SM4 AVX-VNNI AVX-IFMA.
    pub const L7_1_EAX: u32 = set(&[0, 1, 2, 4, 23]);
    /// AVX-VNNI-INT8 AVX-NE-CONVERT AVX-VNNI-INT16.
    pub const L7_1_EDX: u32 = set(&[4, 5, 10]);
    /// XSAVEOPT XSAVEC, XGETBV with ECX = 1.
    pub const XSAVE_EAX: u32 = set(&[0, 1, 2]);
    // Leaf 0x8000_0001.
    pub const CMP_LEGACY: u32 = 1 << 1;
    /// LAHF ABM PREFETCHW.
    pub const E1_ECX: u32 = set(&[0, 5, 8]);
    /// SSE4A MISALIGNSSE TOPOEXT.
    pub const E1_ECX_AMD: u32 = set(&[6, 7, 22]);
    pub const MISALIGNSSE: u32 = 1 << 7;
    /// LOCK MOV CR0 is MOV CR8, which the decoder of AMD's encodings does.
    pub const E1_ECX_AMD_ALWAYS: u32 = set(&[4]);
    /// SYSCALL NX PDPE1GB RDTSCP LM.
    pub const E1_EDX: u32 = set(&[11, 20, 26, 27, 29]);
    /// AMD repeats the low bits of leaf 1 and has MMXEXT and FFXSR.
    pub const E1_EDX_AMD_SAME: u32 = 0x0183_F3FF;
    pub const E1_EDX_AMD: u32 = set(&[22, 25]);
    pub const FFXSR: u32 = 1 << 25;
    /// What the engine adds on any host: it runs in software.
    pub const E1_EDX_ALWAYS: u32 = set(&[11, 20, 29]);
    /// CLZERO; XSAVE stores the x87 error pointers always.
    pub const E8_EBX_HOST: u32 = set(&[0, 2]);
    /// SSB_NO BTC_NO. Translated code gives the guest's user no way to the
    /// guest kernel's memory by these.
    pub const E8_EBX: u32 = set(&[26, 29]);
    /// NoNestedDataBp, LFENCE serialises, null selectors clear the base,
    /// automatic IBRS, SRSO_NO, SRSO_USER_KERNEL_NO.
    pub const E21_EAX: u32 = set(&[0, 2, 6, 8, 29, 30]);
    /// TSA_SQ_NO TSA_L1_NO.
    pub const E21_ECX: u32 = set(&[1, 2]);
}

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO,
/// MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO,
/// PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO (Intel SDM 4, table 2-2). The guest's
/// mitigations would act on no real hardware: its kernel's memory is not mapped
/// where its user code runs, and VERW reaches no buffer.
pub const ARCH_CAPABILITIES: u64 =
    0x7B | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 20 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 62;

/// Answers of CPUID that are the same for all vCPUs, and what follows from them.
pub struct CpuidTable {
    vendor: Vendor,
    topology: Topology,
    /// Leaf 0 and 0x8000_0000: EBX, ECX, EDX.
    vendor_string: [u32; 3],
    l1: [u32; 4],
    l7: [u32; 4],
    l7_1: [u32; 4],
    xsave_eax: u32,
    e1: [u32; 4],
    e8_ebx: u32,
    e21: [u32; 4],
    brand: [u32; 12],
    /// Leaf 2, leaf 4 (Intel), 0x8000_0005, 0x8000_0006, 0x8000_001D (AMD).
    leaf2: [u32; 4],
    e5: [u32; 4],
    e6: [u32; 4],
    caches: Vec<[u32; 4]>,
    /// Which codes run, since each instruction that is translated or interpreted asks.
    runs: Box<[bool]>,
}

/// XCR0 of the host: what its kernel lets us use.
fn host_xcr0(l1_ecx: u32) -> u64 {
    if l1_ecx & bits::OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: CPUID says that XGETBV is enabled.
    unsafe { read_xcr0() }
}

/// # Safety
/// CR4.OSXSAVE must be set.
#[target_feature(enable = "xsave")]
unsafe fn read_xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Leaf 1. The initial APIC ID comes at the query.
fn leaf_1(host: [u32; 4], xsave: bool, avx: bool, many: bool) -> [u32; 4] {
    let mut ecx = host[2] & bits::L1_ECX;
    if !xsave {
        ecx &= !bits::XSAVE;
    }
    if !avx {
        ecx &= !(bits::AVX | bits::FMA | bits::F16C);
    }
    ecx |= bits::HYPERVISOR | bits::X2APIC | bits::TSC_DEADLINE;
    let mut edx = host[3] & bits::L1_EDX | bits::APIC | bits::VME;
    if many {
        edx |= bits::HTT;
    }
    [host[0], 0, ecx, edx]
}

/// Leaf 7, subleaves 0 and 1.
fn leaf_7(avx: bool, intel: bool) -> [[u32; 4]; 2] {
    let host7 = host(7, 0);
    let mut first = [1, host7[1] & bits::L7_EBX, host7[2] & bits::L7_ECX, host7[3] & bits::L7_EDX];
    let mut second = [0; 4];
    if !avx {
        first[1] &= !bits::AVX2;
        first[2] &= !(bits::VAES | bits::VPCLMULQDQ);
    } else if host7[0] >= 1 {
        let host = host(7, 1);
        second = [host[0] & bits::L7_1_EAX, 0, 0, host[3] & bits::L7_1_EDX];
    }
    first[1] |= bits::FSGSBASE | bits::SMEP | bits::NO_FCS_FDS;
    first[2] |= bits::UMIP;
    if intel {
        first[3] |= bits::L7_EDX_INTEL;
    }
    [first, second]
}

/// Leaf 0x8000_0001, and EBX of 0x8000_0008; `edx` is leaf 1's, which AMD repeats.
fn extended(edx: u32, intel: bool, many: bool) -> ([u32; 4], u32) {
    let host_e1 = host(0x8000_0001, 0);
    let mut e1 = [0, 0, host_e1[2] & bits::E1_ECX, host_e1[3] & bits::E1_EDX];
    e1[3] |= bits::E1_EDX_ALWAYS;
    if intel {
        return (e1, 0);
    }
    e1[0] = host_e1[0];
    e1[2] |= host_e1[2] & bits::E1_ECX_AMD | bits::E1_ECX_AMD_ALWAYS;
    if mxcsr_mask() & MXCSR_MM == 0 {
        e1[2] &= !bits::MISALIGNSSE;
    }
    if many {
        e1[2] |= bits::CMP_LEGACY;
    }
    e1[3] |= host_e1[3] & bits::E1_EDX_AMD | edx & bits::E1_EDX_AMD_SAME;
    (e1, bits::E8_EBX | host(0x8000_0008, 0)[1] & bits::E8_EBX_HOST)
}

impl CpuidTable {
    /// The table for this host, with no more than the model has.
    pub fn new(topology: Topology, model: &CpuModel) -> Self {
        let leaf0 = host(0, 0);
        let vendor_string = [leaf0[1], leaf0[2], leaf0[3]];
        let many = topology.package_vcpus() > 1;
        let intel = host_is_intel();
        let vendor = if intel { Vendor::Intel } else { Vendor::Amd };

        let host1 = host(1, 0);
        let xcr0 = host_xcr0(host1[2]);
        let xsave = host1[2] & bits::XSAVE != 0 && xcr0 & 3 == 3;
        let avx = xsave && xcr0 & 7 == 7;
        let mut l1 = leaf_1(host1, xsave, avx, many);
        let [mut l7, mut l7_1] = leaf_7(avx, intel);
        let (mut e1, e8_ebx) = extended(l1[3], intel, many);
        let mut xsave_1 = [if xsave { host(0xD, 1)[0] & bits::XSAVE_EAX } else { 0 }, 0, 0, 0];
        let mut e8 = [0, e8_ebx, 0, 0];
        let mut e21 = if intel { [0; 4] } else { [bits::E21_EAX, 0, bits::E21_ECX, 0] };
        model.apply(1, 0, &mut l1);
        model.apply(7, 0, &mut l7);
        model.apply(7, 1, &mut l7_1);
        model.apply(0xD, 1, &mut xsave_1);
        model.apply(EXTENDED_FEATURES, 0, &mut e1);
        model.apply(0x8000_0008, 0, &mut e8);
        model.apply(0x8000_0021, 0, &mut e21);

        let cache_leaf = if intel { 4 } else { 0x8000_001D };
        let caches = (0..8)
            .map(|index| host(cache_leaf, index))
            .take_while(|leaf| leaf[0] & 0x1F != 0)
            .map(|leaf| topology.cache(leaf, intel))
            .collect();

        let mut e6 = host(0x8000_0006, 0);
        if intel {
            e6 = [0, 0, e6[2], 0];
        }
        let mut table = Self {
            vendor,
            topology,
            vendor_string,
            l1,
            l7,
            l7_1,
            xsave_eax: xsave_1[0],
            e1,
            e8_ebx: e8[1],
            e21,
            brand: brand("bt", &host_brand()),
            leaf2: if intel { host(2, 0) } else { [0; 4] },
            e5: if intel { [0; 4] } else { host(0x8000_0005, 0) },
            e6,
            caches,
            runs: Box::default(),
        };
        table.runs = Code::values().map(|code| table.code_runs(code)).collect();
        table
    }

    /// The bits of CR4 that exist; others are reserved (SDM 3A, 2.5).
    pub fn cr4_mask(&self) -> u64 {
        let l1d = self.l1[3];
        let [_, l7b, l7c, _] = self.l7;
        let features = [
            (l1d >> 1, cr::CR4_VME | cr::CR4_PVI),
            (l1d >> 2, cr::CR4_DE),
            (l1d >> 3, cr::CR4_PSE),
            (l1d >> 4, cr::CR4_TSD),
            (l1d >> 6, cr::CR4_PAE),
            (l1d >> 7, cr::CR4_MCE),
            (l1d >> 13, cr::CR4_PGE),
            (l1d >> 24, cr::CR4_OSFXSR),
            (l1d >> 25, cr::CR4_OSXMMEXCPT),
            (u32::from(self.xsave()), cr::CR4_OSXSAVE),
            (l7b, cr::CR4_FSGSBASE),
            (l7b >> 7, cr::CR4_SMEP),
            (l7c >> 2, cr::CR4_UMIP),
        ];
        // RDPMC is there without counters.
        features
            .iter()
            .filter(|(word, _)| word & 1 != 0)
            .fold(cr::CR4_PCE, |all, (_, bits)| all | bits)
    }

    /// The bits of EFER that exist (APM 2, 3.1.7).
    pub fn efer_mask(&self) -> u64 {
        let e1d = self.e1[3];
        let features = [
            (e1d >> 11, cr::EFER_SCE),
            (e1d >> 20, cr::EFER_NXE),
            (e1d >> 29, cr::EFER_LME | cr::EFER_LMA),
            (u32::from(self.ffxsr()), cr::EFER_FFXSR),
            (self.e21[0] >> 8, EFER_AUTO_IBRS),
        ];
        features.iter().filter(|(word, _)| word & 1 != 0).fold(0, |all, (_, bits)| all | bits)
    }

    /// Whether an entry of page-directory pointers may be that of a 1 GiB page.
    pub fn gib_pages(&self) -> bool {
        self.e1[3] >> 26 & 1 != 0
    }

    pub fn x2apic(&self) -> bool {
        self.l1[2] & bits::X2APIC != 0
    }

    pub fn tsc_deadline(&self) -> bool {
        self.l1[2] & bits::TSC_DEADLINE != 0
    }

    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Family, model and stepping: EAX of leaf 1, and EDX after RESET.
    pub fn signature(&self) -> u32 {
        self.l1[0]
    }

    /// The bits that XCR0 may have; 0 where XSAVE is hidden.
    pub fn xcr0_mask(&self) -> u64 {
        if self.l1[2] & bits::XSAVE == 0 {
            0
        } else if self.l1[2] & bits::AVX == 0 {
            3
        } else {
            7
        }
    }

    /// Whether EFER.FFXSR may be set.
    pub fn ffxsr(&self) -> bool {
        self.vendor == Vendor::Amd && self.e1[3] & bits::FFXSR != 0
    }

    /// Whether XGETBV takes ECX = 1.
    pub fn xgetbv_in_use(&self) -> bool {
        self.xsave_eax & 4 != 0
    }

    /// Whether CR4 bit for XSAVE may be set.
    pub fn xsave(&self) -> bool {
        self.xcr0_mask() != 0
    }

    /// Bytes of the standard-format XSAVE area for `xcr0` (Intel SDM 1, 13.4).
    pub fn xsave_size(xcr0: u64) -> u32 {
        if xcr0 & 4 != 0 { 832 } else { 576 }
    }

    /// What a vCPU in this state finds, with its local APIC on or off.
    pub fn query(
        &self,
        leaf: u32,
        subleaf: u32,
        apic_id: u32,
        st: &CpuState,
        apic: bool,
    ) -> [u32; 4] {
        let mut r = self.fixed(leaf, subleaf, apic_id);
        match leaf {
            1 => {
                if st.cr4 & cr::CR4_OSXSAVE != 0 {
                    r[2] |= bits::OSXSAVE;
                }
                if !apic {
                    r[3] &= !bits::APIC;
                }
            }
            0xD if subleaf == 0 && self.xsave() => r[1] = Self::xsave_size(st.xcr0),
            0xD if subleaf == 1 && self.xsave_eax & 2 != 0 => {
                r[1] = Self::xsave_size(st.xcr0);
            }
            EXTENDED_FEATURES if self.vendor == Vendor::Amd && !apic => {
                r[3] &= !bits::APIC;
            }
            // Intel reports SYSCALL in 64-bit mode only.
            EXTENDED_FEATURES if self.vendor == Vendor::Intel && !st.code64() => {
                r[3] &= !(1 << 11);
            }
            _ => {}
        }
        r
    }

    fn max_extended(&self) -> u32 {
        match self.vendor {
            Vendor::Intel => 0x8000_0008,
            Vendor::Amd => 0x8000_0021,
        }
    }

    /// All that does not depend on the state of the vCPU.
    pub fn fixed(&self, leaf: u32, subleaf: u32, apic_id: u32) -> [u32; 4] {
        let amd = self.vendor == Vendor::Amd;
        let [b, c, d] = self.vendor_string;
        match leaf {
            0 => [max_basic(self.vendor), b, c, d],
            1 => {
                let [eax, _, ecx, edx] = self.l1;
                [eax, self.topology.leaf_1_ebx(apic_id), ecx, edx]
            }
            2 => self.leaf2,
            4 if !amd => self.caches.get(subleaf as usize).copied().unwrap_or([0; 4]),
            // ARAT: the APIC timer never stops.
            6 => [1 << 2, 0, 0, 0],
            7 if subleaf == 0 => self.l7,
            7 if subleaf == 1 => self.l7_1,
            0xB => self.topology.leaf_b(subleaf, apic_id),
            0x1F if !amd => self.topology.leaf_b(subleaf, apic_id),
            0xD if self.xsave() => match subleaf {
                0 => [self.xcr0_mask() as u32, 0, Self::xsave_size(self.xcr0_mask()), 0],
                1 => [self.xsave_eax, 0, 0, 0],
                2 if self.xcr0_mask() & 4 != 0 => [256, 576, 0, 0],
                _ => [0; 4],
            },
            EXTENDED if amd => [self.max_extended(), b, c, d],
            EXTENDED => [self.max_extended(), 0, 0, 0],
            EXTENDED_FEATURES => self.e1,
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 4;
                [self.brand[at], self.brand[at + 1], self.brand[at + 2], self.brand[at + 3]]
            }
            0x8000_0005 => self.e5,
            0x8000_0006 => self.e6,
            // The TSC is invariant.
            0x8000_0007 => [0, 0, 0, 1 << 8],
            0x8000_0008 => {
                let size = 48 << 8 | PHYS_BITS;
                if amd {
                    [size, self.e8_ebx, self.topology.leaf_8000_0008_ecx(), 0]
                } else {
                    [size, 0, 0, 0]
                }
            }
            0x8000_001D if amd && self.e1[2] & TOPOEXT != 0 => {
                self.caches.get(subleaf as usize).copied().unwrap_or([0; 4])
            }
            0x8000_001E if amd && self.e1[2] & TOPOEXT != 0 => {
                self.topology.leaf_8000_001e(apic_id)
            }
            0x8000_0021 => self.e21,
            _ => [0; 4],
        }
    }

    /// How instructions are decoded. AMD lets an operand-size prefix truncate near
    /// branches and ignores REX.W of far ones (AMD APM 3, 1.2.7 and "JMP (Far)"),
    /// and LOCK MOV CR0 is MOV CR8 there; F3 0F 09 is WBINVD where WBNOINVD is not
    /// reported (Intel SDM 2D, "WBNOINVD").
    pub fn decoder_options(&self) -> u32 {
        let vendor = match self.vendor {
            Vendor::Amd => DecoderOptions::AMD,
            Vendor::Intel => DecoderOptions::NONE,
        };
        vendor | DecoderOptions::NO_WBNOINVD
    }

    /// Whether the instruction runs; if not, it is #UD.
    pub fn runs(&self, i: &Instruction) -> bool {
        match i.code() {
            // As Zen 5 does, and Zen 4 does not; the manual is silent.
            Code::Clzerow | Code::Clzerod | Code::Clzeroq
                if i.has_repne_prefix() || i.has_rep_prefix() =>
            {
                false
            }
            code => self.runs[code as usize],
        }
    }

    fn code_runs(&self, code: Code) -> bool {
        match code {
            // Hints without shadow stacks (Intel SDM 1, 17.2.6).
            Code::Rdsspd_r32 | Code::Rdsspq_r64 => true,
            // The hint space of prefetches with a register is Intel's alone.
            Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D => self.vendor == Vendor::Intel,
            _ => code.cpuid_features().iter().all(|&feature| {
                matches!(
                    feature,
                    // What every x86-64 CPU has.
                    CpuidFeature::INTEL8086
                        | CpuidFeature::INTEL186
                        | CpuidFeature::INTEL286
                        | CpuidFeature::INTEL386
                        | CpuidFeature::INTEL486
                        | CpuidFeature::X64
                ) || self.feature_exposed(feature)
            }),
        }
    }

    /// Whether CPUID shows this feature, or the engine has it without a bit.
    pub fn feature_exposed(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature as F;
        let l1c = |bit: u32| self.l1[2] >> bit & 1 != 0;
        let l7b = |bit: u32| self.l7[1] >> bit & 1 != 0;
        let l7c = |bit: u32| self.l7[2] >> bit & 1 != 0;
        let l71a = |bit: u32| self.l7_1[0] >> bit & 1 != 0;
        let l71d = |bit: u32| self.l7_1[3] >> bit & 1 != 0;
        let e1c = |bit: u32| self.e1[2] >> bit & 1 != 0;
        let e1d = |bit: u32| self.e1[3] >> bit & 1 != 0;
        match feature {
            F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CPUID
            | F::CX8
            | F::CMOV
            | F::CLFSH
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::FXSR
            | F::MMX
            | F::MSR
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::RDPMC
            | F::SEP
            | F::SMM
            | F::SSE
            | F::SSE2
            | F::SYSCALL
            | F::TSC
            | F::FSGSBASE => true,
            // Encoded as hints that do nothing on a CPU without the feature.
            F::CET_IBT | F::CLDEMOTE | F::MPX | F::PREFETCHITI | F::PREFETCHW | F::PREFETCHWT1 => {
                true
            }
            F::SSE3 => l1c(0),
            F::PCLMULQDQ => l1c(1),
            F::SSSE3 => l1c(9),
            F::FMA => l1c(12),
            F::CMPXCHG16B => l1c(13),
            F::SSE4_1 => l1c(19),
            F::SSE4_2 => l1c(20),
            F::MOVBE => l1c(22),
            F::POPCNT => l1c(23),
            F::AES => l1c(25),
            F::XSAVE => l1c(26),
            F::AVX => l1c(28),
            F::F16C => l1c(29),
            F::RDRAND => l1c(30),
            F::BMI1 => l7b(3),
            F::AVX2 => l7b(5),
            F::BMI2 => l7b(8),
            F::RDSEED => l7b(18),
            F::ADX => l7b(19),
            F::CLFLUSHOPT => l7b(23),
            F::CLWB => l7b(24),
            F::SHA => l7b(29),
            F::GFNI => l7c(8),
            F::VAES => l7c(9),
            F::VPCLMULQDQ => l7c(10),
            F::RDPID => l7c(22),
            F::SERIALIZE => self.l7[3] >> 14 & 1 != 0,
            F::SHA512 => l71a(0),
            F::SM3 => l71a(1),
            F::SM4 => l71a(2),
            F::AVX_VNNI => l71a(4),
            F::AVX_IFMA => l71a(23),
            F::AVX_VNNI_INT8 => l71d(4),
            F::AVX_NE_CONVERT => l71d(5),
            F::AVX_VNNI_INT16 => l71d(10),
            F::XSAVEOPT => self.xsave_eax & 1 != 0,
            F::XSAVEC => self.xsave_eax & 2 != 0,
            F::LZCNT => e1c(5),
            F::SSE4A => e1c(6),
            F::CLZERO => self.e8_ebx & 1 != 0,
            F::RDTSCP => e1d(27),
            _ => false,
        }
    }
}

const EXTENDED_FEATURES: u32 = 0x8000_0001;
const TOPOEXT: u32 = 1 << 22;

#[cfg(test)]
mod tests {
    use super::*;

    fn table(vcpus: u32) -> CpuidTable {
        CpuidTable::new(Topology::flat(vcpus), &CpuModel::default())
    }

    #[test]
    fn features_are_a_subset_of_the_host() {
        let t = table(1);
        let software = bits::HYPERVISOR | bits::X2APIC | bits::TSC_DEADLINE;
        assert_eq!(t.l1[2] & !host(1, 0)[2] & !software, 0);
        let software = bits::FSGSBASE | bits::SMEP | bits::NO_FCS_FDS;
        assert_eq!(t.l7[1] & !host(7, 0)[1] & !software, 0);
        assert_eq!(t.l7[2] & !host(7, 0)[2] & !bits::UMIP, 0);
    }

    #[test]
    fn hidden_features_stay_hidden() {
        let t = table(2);
        let l7 = t.fixed(7, 0, 0);
        for bit in [2, 4, 10, 11, 14, 16, 17, 20, 21, 28, 30, 31] {
            assert_eq!(l7[1] >> bit & 1, 0, "leaf 7 EBX bit {bit}");
        }
        for bit in [1, 3, 7, 16] {
            assert_eq!(l7[2] >> bit & 1, 0, "leaf 7 ECX bit {bit}");
        }
        let l1 = t.fixed(1, 0, 0);
        for bit in [3, 5, 6, 17] {
            assert_eq!(l1[2] >> bit & 1, 0, "leaf 1 ECX bit {bit}");
        }
        assert_eq!(t.fixed(0x8000_0001, 0, 0)[2] >> 2 & 1, 0, "SVM");
        for feature in [CpuidFeature::AVX512F, CpuidFeature::SMAP, CpuidFeature::VMX] {
            assert!(!t.feature_exposed(feature));
        }
    }

    #[test]
    fn xsave_leaf_agrees_with_the_mask() {
        let t = table(1);
        if t.xsave() {
            let leaf = t.fixed(0xD, 0, 0);
            assert_eq!(u64::from(leaf[0]), t.xcr0_mask());
            assert_eq!(leaf[2], CpuidTable::xsave_size(t.xcr0_mask()));
            let avx = t.fixed(0xD, 2, 0);
            if t.xcr0_mask() & 4 != 0 {
                assert_eq!(avx[0] + avx[1], 832);
            } else {
                assert_eq!(avx, [0; 4]);
            }
        }
    }

    #[test]
    fn a_limit_hides_features_and_what_follows_from_them() {
        let words = [("1.ECX".to_owned(), 0), ("7.EBX".to_owned(), 0)];
        let t = CpuidTable::new(Topology::flat(1), &CpuModel::new(&words, None));
        assert_eq!((t.fixed(1, 0, 0)[2], t.fixed(0xD, 0, 0)), (0, [0; 4]));
        assert_eq!(t.fixed(1, 0, 0)[3], table(1).fixed(1, 0, 0)[3]);
        for feature in [CpuidFeature::AVX, CpuidFeature::AVX2, CpuidFeature::BMI1] {
            assert!(!t.feature_exposed(feature));
        }
    }

    #[test]
    fn topology_tells_vcpus_apart() {
        let t = table(3);
        assert_eq!(t.fixed(1, 0, 2)[1] >> 24, 2);
        assert_eq!(t.fixed(0xB, 1, 2), [2, 3, 0x201, 2]);
        assert_eq!(t.fixed(0xB, 2, 2)[2], 2);
        assert_eq!(table(1).fixed(0xB, 1, 0)[0], 0);
    }

    #[test]
    fn leaves_past_the_end_are_zero() {
        let t = table(1);
        for leaf in [0xE, 0x15, 0x20, 0x4000_0000, 0x4000_0001, 0x8000_0040, u32::MAX] {
            assert_eq!(t.fixed(leaf, 0, 0), [0; 4], "{leaf:#x}");
        }
    }
}
