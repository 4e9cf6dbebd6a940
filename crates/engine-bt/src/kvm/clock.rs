//! kvmclock (msr.rst, MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW;
//! arch/x86/include/asm/pvclock-abi.h).
//!
//! The guest multiplies ticks of its TSC since a moment that is written down
//! once. That moment is the VM's, not the vCPU's: so all vCPUs read the same
//! time, as the stable flag promises. The clock stands with the machine because
//! the guest's TSC does.

use std::sync::atomic::{Ordering, fence};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::ENABLED;
use crate::cpu::Cpu;

const NS_PER_S: u64 = 1_000_000_000;
/// pvclock_vcpu_time_info.flags: readings of all vCPUs agree.
const TSC_STABLE: u8 = 1 << 0;
/// A moment of the machine's clock and the machine's TSC at it; made when it is
/// first wanted.
#[derive(Default)]
pub struct Timebase(Mutex<Option<Moment>>);

#[derive(Clone, Copy, Debug)]
struct Moment {
    ns: u64,
    tsc: u64,
}

impl Timebase {
    /// The guest's clock says `ns` at this TSC of the machine: it goes on from a
    /// saved state.
    pub fn set(&self, ns: u64, tsc: u64) {
        *self.0.lock() = Some(Moment { ns, tsc });
    }

    /// What the guest's clock says at a moment of the machine.
    pub fn clock_ns(&self, ns: u64, tsc: u64, tsc_hz: u64) -> u64 {
        let (now, scale) = (Moment { ns, tsc }, Scale::new(tsc_hz));
        clock_ns(self.moment(now), now, scale)
    }

    /// The moment from which all vCPUs count; `now` where there is none yet. It
    /// never changes while the machine lives: a guest's clock must not step.
    fn moment(&self, now: Moment) -> Moment {
        *self.0.lock().get_or_insert(now)
    }
}

/// Ticks to nanoseconds, as the guest does it: shifted, multiplied, the upper
/// half of the 32.32 product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// As kvm_get_time_scale() in arch/x86/kvm/x86.c: a multiplier with its top
    /// bit set has the most precision.
    fn new(tsc_hz: u64) -> Self {
        let mut hz = tsc_hz.max(1);
        let mut shift = 0;
        while hz > NS_PER_S * 2 {
            hz >>= 1;
            shift -= 1;
        }
        while hz <= NS_PER_S {
            hz <<= 1;
            shift += 1;
        }
        // The same frequency, with what the shift cut off.
        let shifted = |value: u128| if shift < 0 { value << -shift } else { value >> shift };
        let mul = shifted(u128::from(NS_PER_S) << 32) / u128::from(tsc_hz.max(1));
        Self { mul: u32::try_from(mul).unwrap_or(u32::MAX), shift }
    }

    fn ns(self, ticks: u64) -> u64 {
        let ticks = if self.shift < 0 {
            ticks >> -self.shift
        } else {
            ticks.wrapping_shl(self.shift as u32)
        };
        ((u128::from(ticks) * u128::from(self.mul)) >> 32) as u64
    }
}

/// Nanoseconds and TSC of the machine that belong together: of some pairs the
/// one with the least between its reads of the TSC.
fn now(cpu: &Cpu) -> Moment {
    let pair = || {
        let (before, ns, after) = (cpu.tsc(), cpu.now_ns(), cpu.tsc());
        let took = after.wrapping_sub(before);
        (took, Moment { ns, tsc: before.wrapping_add(took / 2).wrapping_sub(cpu.tsc_base()) })
    };
    let (mut least, mut best) = pair();
    for _ in 1..8 {
        let (took, moment) = pair();
        if took < least {
            (least, best) = (took, moment);
        }
    }
    best
}

/// The time now as the guest's clock says it.
fn clock_ns(base: Moment, now: Moment, scale: Scale) -> u64 {
    base.ns.wrapping_add(scale.ns(now.tsc.wrapping_sub(base.tsc)))
}

/// Fills the structure at the address in MSR_KVM_SYSTEM_TIME.
pub fn write_system_time(cpu: &Cpu) {
    let msr = cpu.kvm.system_time;
    if msr & ENABLED == 0 {
        return;
    }
    let scale = Scale::new(cpu.vm.tsc_hz);
    let base = cpu.vm.kvm_time.moment(now(cpu));
    let mut body = [0; 24];
    body[..8].copy_from_slice(&base.tsc.wrapping_add(cpu.tsc_base()).to_le_bytes());
    body[8..16].copy_from_slice(&base.ns.to_le_bytes());
    body[16..20].copy_from_slice(&scale.mul.to_le_bytes());
    body[20] = scale.shift as u8;
    body[21] = TSC_STABLE;
    write_versioned(&cpu.vm.memory, GuestPhys(msr & !ENABLED), 8, &body);
}

/// Fills the structure at the address in MSR_KVM_WALL_CLOCK: the date at which
/// the guest's clock was 0.
pub fn write_wall_clock(cpu: &Cpu) {
    let address = cpu.kvm.wall_clock;
    if address == 0 {
        return;
    }
    let (now, scale) = (now(cpu), Scale::new(cpu.vm.tsc_hz));
    let ns = clock_ns(cpu.vm.kvm_time.moment(now), now, scale);
    let date = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let start = date.wrapping_sub(ns);
    let mut body = [0; 8];
    body[..4].copy_from_slice(&((start / NS_PER_S) as u32).to_le_bytes());
    body[4..].copy_from_slice(&((start % NS_PER_S) as u32).to_le_bytes());
    write_versioned(&cpu.vm.memory, GuestPhys(address), 4, &body);
}

/// Writes `body` at an offset from its 32-bit version, which is odd meanwhile.
/// An address outside of RAM gets nothing, as with KVM.
fn write_versioned(memory: &GuestMemory, address: GuestPhys, offset: u64, body: &[u8]) {
    let mut version = [0; 4];
    if memory.read(address, &mut version).is_err() {
        return;
    }
    let odd = u32::from_le_bytes(version) | 1;
    let body_at = GuestPhys(address.0.wrapping_add(offset));
    // In this order for a vCPU that reads the clock of another one.
    let _ = memory.write(address, &odd.to_le_bytes());
    fence(Ordering::SeqCst);
    let _ = memory.write(body_at, body);
    fence(Ordering::SeqCst);
    let _ = memory.write(address, &odd.wrapping_add(1).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_exact_to_a_few_parts_in_a_billion() {
        for hz in [1, 400_000_000, 1_000_000_000, 2_000_000_001, 2_445_404_123, 5_700_000_000] {
            let scale = Scale::new(hz);
            let second = scale.ns(hz);
            assert!(second.abs_diff(NS_PER_S) <= 4, "{hz} Hz: {scale:?} gives {second} ns");
        }
    }

    #[test]
    fn all_vcpus_count_from_one_moment() {
        let (base, scale) = (Timebase::default(), Scale::new(2_000_000_000));
        let first = base.moment(Moment { ns: 500, tsc: 1_000 });
        // Much later, with a TSC that is not quite as fast as it was measured.
        let hour = 3_600 * NS_PER_S;
        let late = Moment { ns: 500 + hour + 2 * NS_PER_S, tsc: 1_000 + 2 * hour };
        let second = base.moment(late);
        assert_eq!((first.ns, first.tsc), (second.ns, second.tsc));
        assert!(clock_ns(second, late, scale).abs_diff(500 + hour) <= 3_600 * 4);
    }

    #[test]
    fn saved_clock_goes_on_from_what_it_said() {
        let base = Timebase::default();
        base.moment(Moment { ns: 500, tsc: 1_000 });
        base.set(7 * NS_PER_S, 5_000);
        assert_eq!(base.clock_ns(0, 5_000, 2_000_000_000), 7 * NS_PER_S);
    }
}
