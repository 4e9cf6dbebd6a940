//! Model-specific registers (Intel SDM 4; AMD APM 2, appendix A).
//!
//! Those that Linux, the BSDs and firmware touch on a CPU with our CPUID;
//! anything else is #GP(0), as on hardware.

use tetrarch_engine::machine_check::{BANKS, MCG_CAP};

use crate::cpu::Cpu;
use crate::cpu::cpuid::{ARCH_CAPABILITIES, Vendor};
use crate::irqchip::ProtectionFault;
use crate::kvm;
use crate::state::address::{PHYS_BITS, canonical};
use crate::state::fault::{R, gp};
use crate::state::msrs::{MsrFile, VARIABLE_MTRRS};
use crate::state::{cr, seg};

pub mod index {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1B;
    pub const FEATURE_CONTROL: u32 = 0x3A;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const MICROCODE_UPDATE: u32 = 0x79;
    pub const MICROCODE_REVISION: u32 = 0x8B;
    pub const MTRR_CAP: u32 = 0xFE;
    pub const ARCH_CAPABILITIES: u32 = 0x10A;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17A;
    pub const MCG_CTL: u32 = 0x17B;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const DEBUG_CONTROL: u32 = 0x1D9;
    pub const MTRR_VARIABLE: u32 = 0x200;
    pub const MTRR_FIXED_64K: u32 = 0x250;
    pub const MTRR_FIXED_16K: u32 = 0x258;
    pub const MTRR_FIXED_4K: u32 = 0x268;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEFAULT_TYPE: u32 = 0x2FF;
    pub const MC_BANKS: u32 = 0x400;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const X2APIC: u32 = 0x800;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
    pub const PERF_EVENT_SELECT: u32 = 0xC001_0000;
    pub const SYSCFG: u32 = 0xC001_0010;
    pub const HWCR: u32 = 0xC001_0015;
    pub const TOP_MEM: u32 = 0xC001_001A;
    pub const TOP_MEM2: u32 = 0xC001_001D;
    pub const INT_PENDING: u32 = 0xC001_0055;
    pub const PERF_CORE: u32 = 0xC001_0200;
    pub const LS_CFG: u32 = 0xC001_1020;
    pub const DE_CFG: u32 = 0xC001_1029;
}

/// EFER.AutomaticIBRSEn (AMD APM 2, 3.1.7): stored, there is nothing to do.
pub const EFER_AUTO_IBRS: u64 = 1 << 21;
const APIC_BASE_X2APIC: u64 = 1 << 10;
/// HWCR.TscFreqSel: the TSC counts at the P0 frequency; read-only.
const HWCR_TSC_FREQ: u64 = 1 << 24;
/// HWCR.McStatusWrEn: what a bank tells can be made up (AMD APM 2, 9.3.2.2).
const HWCR_MC_STATUS_WRITE: u64 = 1 << 18;
/// Registers of a bank, which are four.
const MC_CTL: usize = 0;
const MC_STATUS: usize = 1;
/// DE_CFG: LFENCE is always serialising.
const DE_CFG_LFENCE: u64 = 1 << 1;
const DEBUG_CONTROL_LBR: u64 = 1 << 0;
/// EFLAGS.TF steps from branch to branch (SDM 3B, 18.4.1 and 18.4.4; APM 2, 13.1.1.5).
pub const DEBUG_CONTROL_BTF: u64 = 1 << 1;
/// MISC_ENABLE: no branch trace store, no PEBS.
const MISC_ENABLE_FIXED: u64 = 1 << 11 | 1 << 12;

/// Memory types that MTRRs and, with `UC-`, the PAT can hold.
fn memory_type(value: u64, pat: bool) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6) || pat && value == 7
}

fn memory_types(value: u64, pat: bool) -> bool {
    value.to_le_bytes().iter().all(|&byte| memory_type(u64::from(byte), pat))
}

fn fixed_mtrr(number: u32) -> Option<usize> {
    match number {
        index::MTRR_FIXED_64K => Some(0),
        n if n & !1 == index::MTRR_FIXED_16K => Some(1 + (n & 1) as usize),
        n if n & !7 == index::MTRR_FIXED_4K => Some(3 + (n & 7) as usize),
        _ => None,
    }
}

fn variable_mtrr(number: u32) -> Option<usize> {
    let at = number.wrapping_sub(index::MTRR_VARIABLE) as usize;
    (at < 2 * VARIABLE_MTRRS).then_some(at)
}

/// Bank and register of it.
fn machine_check(number: u32) -> Option<(usize, usize)> {
    let at = number.wrapping_sub(index::MC_BANKS) as usize;
    (at < 4 * BANKS as usize).then_some((at / 4, at % 4))
}

/// Chip configuration that kernels read and write back without a check of
/// CPUID: CLK_CTL, NB_CFG, the PCI configuration window, SMRAM, BU_CFG2, DC_CFG,
/// TW_CFG, EX_CFG. There is nothing behind them.
fn amd_ignored(number: u32) -> bool {
    matches!(
        number,
        0xC001_001B
            | 0xC001_001F
            | 0xC001_0058
            | 0xC001_0112
            | 0xC001_0113
            | 0xC001_102A
            | 0xC001_1022
            | 0xC001_1023
            | 0xC001_102C
    )
}

/// Event selects and counters of AMD's PMU. Each family since K7 has the first
/// four, so they are not #GP, but they count nothing.
fn amd_perf(number: u32) -> bool {
    (index::PERF_EVENT_SELECT..index::PERF_EVENT_SELECT + 8).contains(&number)
        || (index::PERF_CORE..index::PERF_CORE + 12).contains(&number)
}

fn is_apic(number: u32) -> bool {
    number == index::APIC_BASE
        || number == index::TSC_DEADLINE
        || (index::X2APIC..index::X2APIC + 0x100).contains(&number)
}

/// The registers of a saved vCPU that have no place of their own in it, on
/// either vendor's CPU and with every guest interface.
pub fn saved() -> impl Iterator<Item = u32> {
    const SINGLE: [u32; 24] = [
        index::TSC_AUX,
        index::STAR,
        index::LSTAR,
        index::CSTAR,
        index::SFMASK,
        index::KERNEL_GS_BASE,
        index::SYSENTER_CS,
        index::SYSENTER_ESP,
        index::SYSENTER_EIP,
        index::PAT,
        index::MTRR_DEFAULT_TYPE,
        index::MTRR_FIXED_64K,
        index::MTRR_FIXED_16K,
        index::MTRR_FIXED_16K + 1,
        index::MCG_STATUS,
        index::MCG_CTL,
        index::SPEC_CTRL,
        index::MISC_ENABLE,
        index::HWCR,
        index::SYSCFG,
        index::TOP_MEM,
        index::TOP_MEM2,
        index::LS_CFG,
        index::DEBUG_CONTROL,
    ];
    SINGLE
        .into_iter()
        .chain(index::MTRR_FIXED_4K..index::MTRR_FIXED_4K + 8)
        .chain(index::MTRR_VARIABLE..index::MTRR_VARIABLE + 2 * VARIABLE_MTRRS as u32)
        .chain(index::MC_BANKS..index::MC_BANKS + 4 * BANKS)
        .chain(kvm::SAVED_MSRS)
}

/// Whether a register of the local APIC belongs to a feature that the guest's CPU lacks.
fn lacks_apic(cpu: &Cpu, number: u32) -> bool {
    number == index::TSC_DEADLINE && !cpu.vm.cpuid.tsc_deadline()
}

/// RDMSR.
pub fn read(cpu: &mut Cpu, number: u32) -> R<u64> {
    if lacks_apic(cpu, number) {
        return gp(0);
    }
    if is_apic(number) {
        cpu.settle_eoi();
        let (now, tsc) = (cpu.now_ns(), cpu.tsc());
        return match cpu.vm.irqchip.apic_msr_read(cpu.id, number, now, tsc) {
            Ok(value) => Ok(value),
            Err(ProtectionFault) => gp(0),
        };
    }
    let (st, msrs) = (&*cpu.st, &cpu.msrs);
    let value = match number {
        index::TSC => cpu.tsc(),
        index::TSC_AUX => st.tsc_aux,
        index::EFER => st.efer,
        index::STAR => st.star,
        index::LSTAR => st.lstar,
        index::CSTAR => st.cstar,
        index::SFMASK => st.sfmask,
        index::FS_BASE => st.seg[seg::FS].base,
        index::GS_BASE => st.seg[seg::GS].base,
        index::KERNEL_GS_BASE => st.kernel_gs_base,
        index::SYSENTER_CS => st.sysenter_cs,
        index::SYSENTER_ESP => st.sysenter_esp,
        index::SYSENTER_EIP => st.sysenter_eip,
        index::PAT => msrs.pat,
        // Fixed ranges, write-combining, and the variable ranges.
        index::MTRR_CAP => 1 << 10 | 1 << 8 | VARIABLE_MTRRS as u64,
        index::MTRR_DEFAULT_TYPE => msrs.mtrr_default_type,
        index::MCG_CAP => MCG_CAP,
        index::MCG_STATUS => msrs.mcg_status,
        index::MCG_CTL => msrs.mcg_ctl,
        index::DEBUG_CONTROL => msrs.debug_control,
        _ => {
            if let Some(at) = fixed_mtrr(number) {
                msrs.mtrr_fixed[at]
            } else if let Some(at) = variable_mtrr(number) {
                msrs.mtrr_variable[at]
            } else if let Some((bank, register)) = machine_check(number) {
                msrs.machine_check[bank][register]
            } else if kvm::has_msr(cpu.vm.kvm_features, number) {
                return cpu.kvm.read_msr(number);
            } else {
                return match cpu.vm.cpuid.vendor() {
                    Vendor::Intel => read_intel(cpu, number),
                    Vendor::Amd => read_amd(cpu, number),
                };
            }
        }
    };
    Ok(value)
}

fn read_intel(cpu: &Cpu, number: u32) -> R<u64> {
    Ok(match number {
        index::PLATFORM_ID => 0,
        // Locked: no VMX, no SGX.
        index::FEATURE_CONTROL => 1,
        index::SPEC_CTRL => cpu.msrs.spec_ctrl,
        // No known bad microcode has the highest revision.
        index::MICROCODE_REVISION => 0xFFFF_FFFF << 32,
        index::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
        index::MISC_ENABLE => cpu.msrs.misc_enable | MISC_ENABLE_FIXED,
        _ => return gp(0),
    })
}

fn read_amd(cpu: &Cpu, number: u32) -> R<u64> {
    Ok(match number {
        index::MICROCODE_REVISION => 0xFFFF_FFFF,
        index::HWCR => cpu.msrs.hwcr | HWCR_TSC_FREQ,
        index::SYSCFG => cpu.msrs.syscfg,
        index::TOP_MEM => cpu.msrs.top_mem,
        index::TOP_MEM2 => cpu.msrs.top_mem2,
        index::LS_CFG => cpu.msrs.ls_cfg,
        index::DE_CFG => DE_CFG_LFENCE,
        index::INT_PENDING => 0,
        n if amd_perf(n) || amd_ignored(n) => 0,
        _ => return gp(0),
    })
}

/// WRMSR.
pub fn write(cpu: &mut Cpu, number: u32, value: u64) -> R<()> {
    let to_x2apic = number == index::APIC_BASE && value & APIC_BASE_X2APIC != 0;
    if lacks_apic(cpu, number) || to_x2apic && !cpu.vm.cpuid.x2apic() {
        return gp(0);
    }
    if is_apic(number) {
        cpu.settle_eoi();
        let (now, tsc) = (cpu.now_ns(), cpu.tsc());
        let old_base = cpu.vm.irqchip.apic_base(cpu.id);
        if cpu.vm.irqchip.apic_msr_write(cpu.id, number, value, now, tsc).is_err() {
            return gp(0);
        }
        // The page of the APIC has moved, which no TLB entry may outlive.
        if number == index::APIC_BASE && old_base != cpu.vm.irqchip.apic_base(cpu.id) {
            cpu.tlb.flush(true);
        }
        return Ok(());
    }
    match number {
        index::LSTAR
        | index::CSTAR
        | index::FS_BASE
        | index::GS_BASE
        | index::KERNEL_GS_BASE
        | index::SYSENTER_ESP
        | index::SYSENTER_EIP
            if !canonical(value) =>
        {
            return gp(0);
        }
        index::TSC => {
            cpu.set_tsc(value);
            cpu.tsc_changed();
        }
        // AMD's CPUs ignore the reserved upper half (APM 2, A.1).
        index::TSC_AUX if value >> 32 != 0 && cpu.vm.cpuid.vendor() == Vendor::Intel => {
            return gp(0);
        }
        index::TSC_AUX => cpu.st.tsc_aux = value & 0xFFFF_FFFF,
        index::EFER => return write_efer(cpu, value),
        index::STAR => cpu.st.star = value,
        index::LSTAR => cpu.st.lstar = value,
        index::CSTAR => cpu.st.cstar = value,
        index::SFMASK => cpu.st.sfmask = value & 0xFFFF_FFFF,
        index::FS_BASE => cpu.st.seg[seg::FS].base = value,
        index::GS_BASE => cpu.st.seg[seg::GS].base = value,
        index::KERNEL_GS_BASE => cpu.st.kernel_gs_base = value,
        index::SYSENTER_CS => cpu.st.sysenter_cs = value & 0xFFFF_FFFF,
        index::SYSENTER_ESP => cpu.st.sysenter_esp = value,
        index::SYSENTER_EIP => cpu.st.sysenter_eip = value,
        index::PAT => {
            if !memory_types(value, true) {
                return gp(0);
            }
            cpu.msrs.pat = value;
        }
        index::MCG_STATUS => cpu.msrs.mcg_status = value & 7,
        index::MCG_CTL => {
            if !all_or_none(value) {
                return gp(0);
            }
            cpu.msrs.mcg_ctl = value;
        }
        // LBR is stored, but no branches are recorded; nor do the pins of AMD's CPUs exist.
        index::DEBUG_CONTROL => {
            let pins = if cpu.vm.cpuid.vendor() == Vendor::Amd { 0x3C } else { 0 };
            if value & !(DEBUG_CONTROL_LBR | DEBUG_CONTROL_BTF | pins) != 0 {
                return gp(0);
            }
            cpu.msrs.debug_control = value;
        }
        index::MICROCODE_UPDATE => {}
        _ => {
            if let Some(written) = write_mtrr(&mut cpu.msrs, number, value) {
                return written;
            }
            if let Some((bank, register)) = machine_check(number) {
                return write_machine_check(&mut cpu.msrs, bank, register, value);
            }
            if kvm::has_msr(cpu.vm.kvm_features, number) {
                return cpu.write_kvm_msr(number, value);
            }
            return match cpu.vm.cpuid.vendor() {
                Vendor::Intel => write_intel(cpu, number, value),
                Vendor::Amd => write_amd(cpu, number, value),
            };
        }
    }
    Ok(())
}

/// Which errors are told: of the banks as they are here, all or none (Intel SDM 3B, 17.3.2.1).
fn all_or_none(value: u64) -> bool {
    value == 0 || value == !0
}

/// A register of a bank of machine checks (Intel SDM 3B, 17.3.2; AMD APM 2, 9.3.2).
fn write_machine_check(msrs: &mut MsrFile, bank: usize, register: usize, value: u64) -> R<()> {
    // Kernels clear bit 10 of bank 4, the GART's errors on a K8.
    let valid = match register {
        MC_CTL => value == 0 || value | 1 << 10 == !0,
        // What is told is cleared, and not made up, but for a test of AMD's.
        MC_STATUS => value == 0 || msrs.hwcr & HWCR_MC_STATUS_WRITE != 0,
        _ => true,
    };
    if !valid {
        return gp(0);
    }
    msrs.machine_check[bank][register] = value;
    Ok(())
}

/// Memory type range registers (Intel SDM 3A, 12.11). `None`: it is none of them.
fn write_mtrr(msrs: &mut MsrFile, number: u32, value: u64) -> Option<R<()>> {
    let (valid, register) = if number == index::MTRR_DEFAULT_TYPE {
        let valid = value & !0xCFF == 0 && memory_type(value & 0xFF, false);
        (valid, &mut msrs.mtrr_default_type)
    } else if let Some(at) = fixed_mtrr(number) {
        (memory_types(value, false), &mut msrs.mtrr_fixed[at])
    } else {
        let at = variable_mtrr(number)?;
        // Even: base and type. Odd: mask and valid bit.
        let is_base = at & 1 == 0;
        let allowed = ((1 << PHYS_BITS) - 0x1000) | if is_base { 0xFF } else { 0x800 };
        let valid = value & !allowed == 0 && (!is_base || memory_type(value & 0xFF, false));
        (valid, &mut msrs.mtrr_variable[at])
    };
    if !valid {
        return Some(gp(0));
    }
    *register = value;
    Some(Ok(()))
}

fn write_intel(cpu: &mut Cpu, number: u32, value: u64) -> R<()> {
    match number {
        // IBRS only: there is no STIBP or SSBD in our CPUID.
        index::SPEC_CTRL if value & !1 == 0 => cpu.msrs.spec_ctrl = value,
        index::PRED_CMD if value & !1 == 0 => {}
        // Software writes 0 before it asks for the revision.
        index::MICROCODE_REVISION => {}
        index::MISC_ENABLE => cpu.msrs.misc_enable = value & !MISC_ENABLE_FIXED,
        _ => return gp(0),
    }
    Ok(())
}

fn write_amd(cpu: &mut Cpu, number: u32, value: u64) -> R<()> {
    match number {
        index::MICROCODE_REVISION => {}
        index::HWCR => cpu.msrs.hwcr = value & !HWCR_TSC_FREQ,
        index::SYSCFG => cpu.msrs.syscfg = value,
        index::TOP_MEM => cpu.msrs.top_mem = value,
        index::TOP_MEM2 => cpu.msrs.top_mem2 = value,
        index::LS_CFG => cpu.msrs.ls_cfg = value,
        // The one bit of it that matters is fixed.
        index::DE_CFG | index::INT_PENDING => {}
        n if amd_perf(n) || amd_ignored(n) => {}
        _ => return gp(0),
    }
    Ok(())
}

/// EFER (SDM 3A, 2.2.1; APM 2, 3.1.7). LMA is not writable; LME cannot change
/// while paging is on.
fn write_efer(cpu: &mut Cpu, value: u64) -> R<()> {
    let old = cpu.st.efer;
    if value & !cpu.vm.cpuid.efer_mask() != 0
        || (value ^ old) & cr::EFER_LME != 0 && cpu.st.cr0 & cr::CR0_PG != 0
    {
        return gp(0);
    }
    cpu.st.efer = value & !cr::EFER_LMA | old & cr::EFER_LMA;
    if (cpu.st.efer ^ old) & cr::EFER_NXE != 0 {
        cpu.tlb.flush(true);
    }
    cpu.update_mode();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_types_are_checked() {
        assert!(memory_types(0x0007_0406_0007_0406, true));
        assert!(!memory_types(0x0007_0406_0007_0406, false));
        assert!(!memory_types(2, true));
        assert!(memory_types(0x0606_0606_0606_0606, false));
    }

    #[test]
    fn mtrr_numbers() {
        assert_eq!(fixed_mtrr(0x250), Some(0));
        assert_eq!(fixed_mtrr(0x251), None);
        assert_eq!(fixed_mtrr(0x259), Some(2));
        assert_eq!(fixed_mtrr(0x268), Some(3));
        assert_eq!(fixed_mtrr(0x26F), Some(10));
        assert_eq!(variable_mtrr(0x20F), Some(15));
        assert_eq!(variable_mtrr(0x210), None);
    }

    #[test]
    fn apic_registers_are_the_chips() {
        assert!(is_apic(0x1B) && is_apic(0x6E0) && is_apic(0x800) && is_apic(0x8FF));
        assert!(!is_apic(0x900) && !is_apic(0x7FF));
    }
}
