//! Features of the instruction set by their CPUID bits, and what the guest's CPUID
//! does with each.

use std::collections::HashMap;
use tetrarch_engine::cpuid::host;

use iced_x86::CpuidFeature;

use super::guest::Guest;

/// What the guest's CPUID says of a feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// What the host's says.
    Host,
    /// Always that it is there: the engine needs nothing of the host for it.
    Software,
    /// That it is not, and why.
    Hidden(&'static str),
}

/// Leaf, subleaf, register (EAX, EBX, ECX, EDX) and bit.
type Bit = (u32, u32, usize, u32);

pub struct Feature {
    pub feature: CpuidFeature,
    pub bit: Bit,
    pub policy: Policy,
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const D: usize = 3;
const EXT: u32 = 0x8000_0001;
const EXT8: u32 = 0x8000_0008;

const AVX512: Policy =
    Policy::Hidden("the state is 2 KiB larger, and no tier has ZMM or mask registers");
const AMX: Policy = Policy::Hidden("tile state is 8 KiB and needs the host's permission");
const NESTED: Policy = Policy::Hidden("no guests in guests");
const HINT: Policy = Policy::Hidden("a hint, which does nothing with the bit or without");
const TSX: Policy = Policy::Hidden("transactions cannot be translated");
const IDLE: Policy = Policy::Hidden("a guest that waits by it keeps a host CPU busy; HLT does not");
const HOST_COUNTERS: Policy = Policy::Hidden("it shows the host's counters");
const MEMORY: Policy = Policy::Hidden("not in the model of the guest's MMU");
const DEVICE: Policy = Policy::Hidden("for stores to devices that the guest does not have");
const MSRS: Policy = Policy::Hidden("of use to kernels for MSRs alone, which exit or are emulated");
const GONE: Policy = Policy::Hidden("of the Bulldozer family, gone since Zen");
const ATOMIC: Policy = Policy::Hidden("an atomic operation that the translator does not know");
const KEYS: Policy = Policy::Hidden("its keys are the host CPU's, out of a saved machine's reach");
const TRACE: Policy = Policy::Hidden("Processor Trace is not offered");
const SECURE: Policy = Policy::Hidden("memory that the host cannot read has no place here");

#[rustfmt::skip]
const TABLE: &[(CpuidFeature, Bit, Policy)] = {
    use CpuidFeature as F;
    use Policy::{Hidden, Host, Software};
    &[
        (F::SSE3, (1, 0, C, 0), Host),
        (F::PCLMULQDQ, (1, 0, C, 1), Host),
        (F::MONITOR, (1, 0, C, 3), IDLE),
        (F::VMX, (1, 0, C, 5), NESTED),
        (F::SMX, (1, 0, C, 6), NESTED),
        (F::SSSE3, (1, 0, C, 9), Host),
        (F::FMA, (1, 0, C, 12), Host),
        (F::CMPXCHG16B, (1, 0, C, 13), Host),
        (F::SSE4_1, (1, 0, C, 19), Host),
        (F::SSE4_2, (1, 0, C, 20), Host),
        (F::MOVBE, (1, 0, C, 22), Host),
        (F::POPCNT, (1, 0, C, 23), Host),
        (F::AES, (1, 0, C, 25), Host),
        (F::XSAVE, (1, 0, C, 26), Host),
        (F::AVX, (1, 0, C, 28), Host),
        (F::F16C, (1, 0, C, 29), Host),
        (F::RDRAND, (1, 0, C, 30), Host),
        (F::TSC, (1, 0, D, 4), Host),
        (F::CX8, (1, 0, D, 8), Host),
        (F::SEP, (1, 0, D, 11), Host),
        (F::CMOV, (1, 0, D, 15), Host),
        (F::CLFSH, (1, 0, D, 19), Host),
        (F::MMX, (1, 0, D, 23), Host),
        (F::FXSR, (1, 0, D, 24), Host),
        (F::SSE, (1, 0, D, 25), Host),
        (F::SSE2, (1, 0, D, 26), Host),
        (F::FSGSBASE, (7, 0, B, 0), Software),
        (F::SGX1, (7, 0, B, 2), SECURE),
        (F::BMI1, (7, 0, B, 3), Host),
        (F::HLE, (7, 0, B, 4), TSX),
        (F::AVX2, (7, 0, B, 5), Host),
        (F::BMI2, (7, 0, B, 8), Host),
        (F::INVPCID, (7, 0, B, 10), MEMORY),
        (F::RTM, (7, 0, B, 11), TSX),
        (F::MPX, (7, 0, B, 14), Hidden("withdrawn, and its instructions are hints without it")),
        (F::AVX512F, (7, 0, B, 16), AVX512),
        (F::AVX512DQ, (7, 0, B, 17), AVX512),
        (F::RDSEED, (7, 0, B, 18), Host),
        (F::ADX, (7, 0, B, 19), Host),
        (F::SMAP, (7, 0, B, 20), MEMORY),
        (F::AVX512_IFMA, (7, 0, B, 21), AVX512),
        (F::CLFLUSHOPT, (7, 0, B, 23), Host),
        (F::CLWB, (7, 0, B, 24), Host),
        (F::AVX512PF, (7, 0, B, 26), AVX512),
        (F::AVX512ER, (7, 0, B, 27), AVX512),
        (F::AVX512CD, (7, 0, B, 28), AVX512),
        (F::SHA, (7, 0, B, 29), Host),
        (F::AVX512BW, (7, 0, B, 30), AVX512),
        (F::AVX512VL, (7, 0, B, 31), AVX512),
        (F::PREFETCHWT1, (7, 0, C, 0), HINT),
        (F::AVX512_VBMI, (7, 0, C, 1), AVX512),
        (F::PKU, (7, 0, C, 3), MEMORY),
        (F::WAITPKG, (7, 0, C, 5), IDLE),
        (F::AVX512_VBMI2, (7, 0, C, 6), AVX512),
        (F::CET_SS, (7, 0, C, 7), Hidden("shadow stacks are not in the model of the guest's MMU")),
        (F::GFNI, (7, 0, C, 8), Host),
        (F::VAES, (7, 0, C, 9), Host),
        (F::VPCLMULQDQ, (7, 0, C, 10), Host),
        (F::AVX512_VNNI, (7, 0, C, 11), AVX512),
        (F::AVX512_BITALG, (7, 0, C, 12), AVX512),
        (F::AVX512_VPOPCNTDQ, (7, 0, C, 14), AVX512),
        (F::RDPID, (7, 0, C, 22), Host),
        (F::KL, (7, 0, C, 23), KEYS),
        (F::CLDEMOTE, (7, 0, C, 25), HINT),
        (F::MOVDIRI, (7, 0, C, 27), DEVICE),
        (F::MOVDIR64B, (7, 0, C, 28), DEVICE),
        (F::ENQCMD, (7, 0, C, 29), DEVICE),
        (F::AVX512_4VNNIW, (7, 0, D, 2), AVX512),
        (F::AVX512_4FMAPS, (7, 0, D, 3), AVX512),
        (F::UINTR, (7, 0, D, 5), Hidden("interrupts go through the guest's kernel")),
        (F::AVX512_VP2INTERSECT, (7, 0, D, 8), AVX512),
        (F::SERIALIZE, (7, 0, D, 14), Host),
        (F::TSXLDTRK, (7, 0, D, 16), TSX),
        (F::PCONFIG, (7, 0, D, 18), SECURE),
        (F::CET_IBT, (7, 0, D, 20), Hidden("indirect branches are not tracked")),
        (F::AMX_BF16, (7, 0, D, 22), AMX),
        (F::AVX512_FP16, (7, 0, D, 23), AVX512),
        (F::AMX_TILE, (7, 0, D, 24), AMX),
        (F::AMX_INT8, (7, 0, D, 25), AMX),
        (F::SHA512, (7, 1, A, 0), Host),
        (F::SM3, (7, 1, A, 1), Host),
        (F::SM4, (7, 1, A, 2), Host),
        (F::RAO_INT, (7, 1, A, 3), ATOMIC),
        (F::AVX_VNNI, (7, 1, A, 4), Host),
        (F::AVX512_BF16, (7, 1, A, 5), AVX512),
        (F::CMPCCXADD, (7, 1, A, 7), ATOMIC),
        (F::FRED, (7, 1, A, 17), Hidden("events are delivered through the IDT")),
        (F::LKGS, (7, 1, A, 18), Hidden("comes with FRED")),
        (F::WRMSRNS, (7, 1, A, 19), MSRS),
        (F::AMX_FP16, (7, 1, A, 21), AMX),
        (F::HRESET, (7, 1, A, 22), MSRS),
        (F::AVX_IFMA, (7, 1, A, 23), Host),
        (F::MSRLIST, (7, 1, A, 27), MSRS),
        (F::TSE, (7, 1, B, 1), SECURE),
        (F::AVX_VNNI_INT8, (7, 1, D, 4), Host),
        (F::AVX_NE_CONVERT, (7, 1, D, 5), Host),
        (F::AMX_COMPLEX, (7, 1, D, 8), AMX),
        (F::AVX_VNNI_INT16, (7, 1, D, 10), Host),
        (F::PREFETCHITI, (7, 1, D, 14), HINT),
        (F::XSAVEOPT, (0xD, 1, A, 0), Host),
        (F::XSAVEC, (0xD, 1, A, 1), Host),
        (F::XSAVES, (0xD, 1, A, 3), Hidden("no supervisor state is offered")),
        (F::PTWRITE, (0x14, 0, B, 4), TRACE),
        (F::AESKLE, (0x19, 0, B, 0), KEYS),
        (F::WIDE_KL, (0x19, 0, B, 2), KEYS),
        (F::SVM, (EXT, 0, C, 2), NESTED),
        (F::LZCNT, (EXT, 0, C, 5), Host),
        (F::SSE4A, (EXT, 0, C, 6), Host),
        (F::PREFETCHW, (EXT, 0, C, 8), Host),
        (F::XOP, (EXT, 0, C, 11), GONE),
        (F::SKINIT, (EXT, 0, C, 12), NESTED),
        (F::SKINIT_or_SVM, (EXT, 0, C, 2), NESTED),
        (F::LWP, (EXT, 0, C, 15), GONE),
        (F::FMA4, (EXT, 0, C, 16), GONE),
        (F::TBM, (EXT, 0, C, 21), GONE),
        (F::MONITORX, (EXT, 0, C, 29), IDLE),
        (F::RDTSCP, (EXT, 0, D, 27), Host),
        (F::CLZERO, (EXT8, 0, B, 0), Host),
        (F::INVLPGB, (EXT8, 0, B, 3), MEMORY),
        (F::RDPRU, (EXT8, 0, B, 4), HOST_COUNTERS),
        (F::MCOMMIT, (EXT8, 0, B, 8), Hidden("the host's memory errors are not the guest's")),
        (F::WBNOINVD, (EXT8, 0, B, 9), Hidden("it runs as WBINVD, which does nothing either")),
        (F::SEV_ES, (0x8000_001F, 0, A, 3), SECURE),
        (F::SEV_SNP, (0x8000_001F, 0, A, 4), SECURE),
    ]
};

pub fn features() -> impl Iterator<Item = Feature> {
    TABLE.iter().map(|&(feature, bit, policy)| Feature { feature, bit, policy })
}

/// The bits of one CPU, the host's or the guest's.
pub struct Bits(HashMap<CpuidFeature, bool>);

fn bits(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Bits {
    let mut has = |(leaf, subleaf, register, bit): Bit| {
        let most = cpuid(leaf & 0x8000_0000, 0)[0];
        // Past the last leaf Intel answers with another one.
        leaf <= most
            && (leaf != 7 || subleaf <= cpuid(7, 0)[0])
            && cpuid(leaf, subleaf)[register] >> bit & 1 != 0
    };
    Bits(features().map(|f| (f.feature, has(f.bit))).collect())
}

impl Bits {
    pub fn of_host() -> Self {
        bits(host)
    }

    pub fn of_guest(guest: &mut Guest) -> Self {
        bits(|leaf, subleaf| guest.cpuid(leaf, subleaf))
    }

    /// `None`: no bit says.
    pub fn get(&self, feature: CpuidFeature) -> Option<bool> {
        self.0.get(&feature).copied()
    }

    /// Whether the CPU has it, where a feature without a bit is one that all have.
    pub fn has(&self, feature: CpuidFeature) -> bool {
        self.get(feature).unwrap_or(true)
    }
}
