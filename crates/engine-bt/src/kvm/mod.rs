//! KVM's paravirtual interface, which engine `kvm` has from the kernel and this
//! engine offers itself where the platform asks for it
//! (Documentation/virt/kvm/x86/cpuid.rst, msr.rst and hypercalls.rst).
//!
//! Left out: asynchronous page faults, since the host faults guest memory in at
//! once; extended destination IDs of MSIs and memory encryption, since there is
//! nothing behind them.

mod eoi;
mod hypercall;
mod steal_time;

use tetrarch_engine::pvclock::{Timebase, write_wall_clock};
use tetrarch_engine::{CpuidLeaf, Hypercalls, Platform, Waited};
use tetrarch_memory::{GuestMemory, GuestPhys};

use crate::irqchip::IrqChip;
use crate::journal::Journal;
use crate::memory::dirty_log::DirtyLog;
use crate::state::fault::{R, gp};

pub use hypercall::hypercall;

const SIGNATURE_LEAF: u32 = 0x4000_0000;
pub const FEATURES_LEAF: u32 = 0x4000_0001;
/// Frequencies of TSC and local APIC timer in kHz, as VMware began it.
const FREQUENCY_LEAF: u32 = 0x4000_0010;
/// The local APIC's timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Leaf 0x4000_0001, EAX.
pub mod feature {
    pub const CLOCK_SOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCK_SOURCE_2: u32 = 1 << 3;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_EOI: u32 = 1 << 6;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const POLL_CONTROL: u32 = 1 << 12;
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    pub const CLOCK_SOURCE_STABLE: u32 = 1 << 24;

    /// Those that need the hypercalls to be KVM's.
    pub const BY_HYPERCALL: u32 = PV_UNHALT | PV_SEND_IPI | PV_SCHED_YIELD;
    /// Those that need to know how long a ready vCPU had to wait.
    pub const BY_STEAL_TIME: u32 = STEAL_TIME | PV_TLB_FLUSH;
    pub const ALL: u32 = CLOCK_SOURCE
        | NOP_IO_DELAY
        | CLOCK_SOURCE_2
        | PV_EOI
        | POLL_CONTROL
        | CLOCK_SOURCE_STABLE
        | BY_HYPERCALL
        | BY_STEAL_TIME;
}

mod msr {
    pub const OLD_WALL_CLOCK: u32 = 0x11;
    pub const OLD_SYSTEM_TIME: u32 = 0x12;
    pub const WALL_CLOCK: u32 = 0x4B56_4D00;
    pub const SYSTEM_TIME: u32 = 0x4B56_4D01;
    pub const STEAL_TIME: u32 = 0x4B56_4D03;
    pub const PV_EOI: u32 = 0x4B56_4D04;
    pub const POLL_CONTROL: u32 = 0x4B56_4D05;
}

/// What of the interface a saved vCPU holds; the old numbers of two of them are
/// the same registers.
pub const SAVED_MSRS: [u32; 5] =
    [msr::WALL_CLOCK, msr::SYSTEM_TIME, msr::STEAL_TIME, msr::PV_EOI, msr::POLL_CONTROL];

/// Bit 0 of the MSRs that hold an address.
const ENABLED: u64 = 1;

/// The features that a platform gets on this host; 0 where it wants none.
pub fn features(platform: &Platform, journalled: bool) -> u32 {
    if !platform.kvm {
        return 0;
    }
    let mut features = feature::ALL;
    if platform.hypercalls != Hypercalls::None {
        features &= !feature::BY_HYPERCALL;
    }
    if journalled || !Waited::available() {
        features &= !feature::BY_STEAL_TIME;
    }
    if journalled {
        // What is offered depends on what else happens to wait.
        features &= !feature::PV_EOI;
    }
    features
}

/// The leaves that announce the interface.
pub fn leaves(features: u32, tsc_hz: u64) -> [CpuidLeaf; 3] {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    let leaf = |leaf, registers| CpuidLeaf { leaf, subleaf: None, vcpu: None, registers };
    [
        leaf(SIGNATURE_LEAF, [FREQUENCY_LEAF, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
        leaf(FEATURES_LEAF, [features, 0, 0, 0]),
        leaf(FREQUENCY_LEAF, [(tsc_hz / 1000) as u32, APIC_BUS_KHZ, 0, 0]),
    ]
}

/// What the interface works on beside its own state.
pub struct Guest<'a> {
    pub memory: &'a GuestMemory,
    pub dirty: &'a DirtyLog,
    pub irqchip: &'a IrqChip,
    pub time: &'a Timebase,
    pub journal: Option<&'a Journal>,
    pub vcpu: usize,
    /// The vCPU's TSC less that of the machine.
    pub tsc_base: u64,
    /// Counts the interrupts that were ended without the local APIC.
    pub quiet_eois: &'a mut u64,
}

/// One vCPU's part of the interface: what its MSRs hold.
pub struct Paravirtual {
    wall_clock: u64,
    system_time: u64,
    pub steal_time: steal_time::StealTime,
    pub eoi: eoi::Eoi,
    /// Bit 0: the host may poll before it lets a halted vCPU sleep. It never does.
    poll_control: u64,
}

impl Paravirtual {
    pub fn new() -> Self {
        Self {
            wall_clock: 0,
            system_time: 0,
            steal_time: steal_time::StealTime::default(),
            eoi: eoi::Eoi::default(),
            poll_control: 1,
        }
    }

    /// Of a machine that records or replays, which has neither of the parts that work in guest
    /// memory by themselves.
    pub fn copied(&self) -> Self {
        let Self { wall_clock, system_time, poll_control, .. } = *self;
        Self { wall_clock, system_time, poll_control, ..Self::new() }
    }

    pub fn read_msr(&self, index: u32) -> R<u64> {
        Ok(match index {
            msr::OLD_WALL_CLOCK | msr::WALL_CLOCK => self.wall_clock,
            msr::OLD_SYSTEM_TIME | msr::SYSTEM_TIME => self.system_time,
            msr::STEAL_TIME => self.steal_time.msr(),
            msr::PV_EOI => self.eoi.msr(),
            msr::POLL_CONTROL => self.poll_control,
            _ => return gp(0),
        })
    }

    pub fn write_msr(&mut self, guest: &mut Guest, index: u32, value: u64) -> R<()> {
        match index {
            msr::OLD_WALL_CLOCK | msr::WALL_CLOCK => {
                self.wall_clock = value;
                let read = || guest.time.start_ns();
                let start = guest.journal.map_or_else(read, |journal| journal.value(read));
                if value != 0 {
                    write_wall_clock(guest.memory, GuestPhys(value), start);
                }
            }
            msr::OLD_SYSTEM_TIME | msr::SYSTEM_TIME => {
                self.system_time = value;
                self.tsc_changed(guest);
            }
            msr::STEAL_TIME => return self.steal_time.set_msr(guest, value),
            msr::PV_EOI => return self.eoi.set_msr(guest, value),
            msr::POLL_CONTROL if value >> 1 == 0 => self.poll_control = value,
            _ => return gp(0),
        }
        Ok(())
    }

    /// The guest has set its TSC: what is counted from it is written anew.
    pub fn tsc_changed(&self, guest: &Guest) {
        if self.system_time & ENABLED != 0 {
            let address = GuestPhys(self.system_time & !ENABLED);
            guest.time.write_system_time(guest.memory, address, guest.tsc_base);
        }
    }
}

/// The feature to which an MSR of the interface belongs.
fn feature_of(index: u32) -> Option<u32> {
    Some(match index {
        msr::OLD_WALL_CLOCK | msr::OLD_SYSTEM_TIME => feature::CLOCK_SOURCE,
        msr::WALL_CLOCK | msr::SYSTEM_TIME => feature::CLOCK_SOURCE_2,
        msr::STEAL_TIME => feature::STEAL_TIME,
        msr::PV_EOI => feature::PV_EOI,
        msr::POLL_CONTROL => feature::POLL_CONTROL,
        _ => return None,
    })
}

/// Whether RDMSR and WRMSR of an index come here, with these features.
pub fn has_msr(features: u32, index: u32) -> bool {
    feature_of(index).is_some_and(|feature| features & feature != 0)
}
