//! Model-specific registers: those set at the start, and those saved.
//!
//! Hosts differ in what they let a VMM set. A refused register is left out,
//! with one line in the log, and all others are set all the same. What no guest
//! can notice is for who looks for it: each host refuses something.

use std::collections::BTreeSet;

use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, MsrList, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use parking_lot::Mutex;
use tetrarch_engine::{EngineError, machine_check};

use crate::error::refused;

// KVM_X86_SETUP_MCE (linux/kvm.h) of a vCPU's descriptor.
vmm_sys_util::ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);

pub mod index {
    pub const MC_BANKS: u32 = 0x400;
    pub const TSC: u32 = 0x10;
    pub const OLD_WALL_CLOCK: u32 = 0x11;
    pub const OLD_SYSTEM_TIME: u32 = 0x12;
    pub const APIC_BASE: u32 = 0x1B;
    pub const ARCH_CAPABILITIES: u32 = 0x10A;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const MTRR_DEFAULT_TYPE: u32 = 0x2FF;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const EFER: u32 = 0xC000_0080;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
}

/// IA32_MISC_ENABLE: fast strings.
const FAST_STRINGS: u64 = 1;
/// MTRRs on, all memory write-back, as firmware leaves them: with MTRRs off
/// Linux gives up PAT as well.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Of Python's loggers: "tetrarch.kvm".
const LOGGER: &str = "tetrarch::kvm";

/// What was refused and told, by any VM: the host is the same for all.
static REFUSED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// The MSRs of one VM: those that the kernel knows of, and those set at first.
pub struct MsrPolicy {
    saved: Vec<u32>,
    initial: Vec<(u32, u64)>,
}

impl MsrPolicy {
    pub fn new(kvm: &Kvm, arch_capabilities: bool) -> Self {
        // Without the list nothing is saved; what runs is not touched by that.
        let saved = kvm.get_msr_index_list().map(|list: MsrList| list.as_slice().to_vec());
        let mut initial =
            vec![(index::MISC_ENABLE, FAST_STRINGS), (index::MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK)];
        if arch_capabilities && let Some(value) = feature(kvm, index::ARCH_CAPABILITIES) {
            initial.push((index::ARCH_CAPABILITIES, value));
        }
        Self { saved: saved.unwrap_or_default(), initial }
    }

    pub fn initialise(&self, vcpu: &VcpuFd) {
        self.set_all(vcpu, &self.initial);
    }

    /// All that the kernel lists and lets us read.
    pub fn read_all(&self, vcpu: &VcpuFd) -> Vec<(u32, u64)> {
        // The kernel does not list the banks, whose number is the vCPU's own.
        let banks = index::MC_BANKS..index::MC_BANKS + 4 * machine_check::BANKS;
        let all = self.saved.iter().copied().chain(banks);
        all.filter_map(|index| Some((index, get(vcpu, index)?))).collect()
    }

    /// Sets what the kernel takes.
    pub fn set_all(&self, vcpu: &VcpuFd, values: &[(u32, u64)]) {
        for &(index, value) in values {
            if !set(vcpu, index, value) && REFUSED.lock().insert(index) {
                let level = level_of_refusal(get(vcpu, index), value);
                log::log!(target: LOGGER, level,
                    "kvm: the host refuses MSR {index:#x} = {value:#x}; it is left out");
            }
        }
    }
}

/// Gives a new vCPU the banks that a vCPU of every engine has; by itself the kernel gives it more.
pub fn set_up_machine_checks(vcpu: &VcpuFd) -> Result<(), EngineError> {
    let capability = machine_check::MCG_CAP;
    // SAFETY: the kernel reads the eight bytes of the local.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_X86_SETUP_MCE(), &raw const capability) };
    if done == 0 {
        return Ok(());
    }
    Err(refused("set up machine checks", kvm_ioctls::Error::last()))
}

/// A guest notices a register that reads otherwise than it should, and hardly one
/// that its vCPU does not have: that is of another vendor.
fn level_of_refusal(reads: Option<u64>, wanted: u64) -> log::Level {
    match reads {
        Some(value) if value != wanted => log::Level::Warn,
        _ => log::Level::Debug,
    }
}

/// What the host offers by a feature MSR (KVM_GET_MSRS on /dev/kvm).
fn feature(kvm: &Kvm, index: u32) -> Option<u64> {
    let mut msrs = one(index, 0).ok()?;
    let read = kvm.get_msrs(&mut msrs).ok()?;
    (read == 1).then(|| msrs.as_slice()[0].data)
}

fn one(index: u32, data: u64) -> Result<Msrs, EngineError> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|_| EngineError::Internal("no room for one MSR".into()))
}

/// `None` where the vCPU has no such register.
pub fn read(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, EngineError> {
    let mut msrs = one(index, 0)?;
    let read = vcpu.get_msrs(&mut msrs).map_err(|error| refused("read an MSR", error))?;
    Ok((read == 1).then(|| msrs.as_slice()[0].data))
}

/// False where the vCPU refuses the register or the value.
pub fn write(vcpu: &VcpuFd, index: u32, value: u64) -> Result<bool, EngineError> {
    let written = vcpu.set_msrs(&one(index, value)?);
    Ok(written.map_err(|error| refused("write an MSR", error))? == 1)
}

/// The same where it does not matter why there is none.
pub fn get(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    read(vcpu, index).ok().flatten()
}

/// The same where nothing else can be done about it.
pub fn set(vcpu: &VcpuFd, index: u32, value: u64) -> bool {
    write(vcpu, index, value).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_is_a_warning_where_the_guest_reads_something_else() {
        assert_eq!(level_of_refusal(Some(0), 1), log::Level::Warn);
        assert_eq!(level_of_refusal(Some(1), 1), log::Level::Debug);
        assert_eq!(level_of_refusal(None, 1), log::Level::Debug);
    }
}
