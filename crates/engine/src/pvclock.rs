//! The clock that KVM and Xen have in memory (Linux, arch/x86/include/asm/pvclock-abi.h; KVM's
//! msr.rst, MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW; Xen's public/xen.h,
//! vcpu_time_info).
//!
//! The guest multiplies ticks of its TSC since a moment that is written down
//! once. That moment is the VM's, not the vCPU's: so all vCPUs read the same
//! time, as the stable flag promises. The clock stands with the machine because
//! the guest's TSC does.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tetrarch_memory::{GuestMemory, GuestPhys};

use crate::Clock;

const NS_PER_S: u64 = 1_000_000_000;
/// pvclock_vcpu_time_info.flags: readings of all vCPUs agree.
const TSC_STABLE: u8 = 1 << 0;

/// The VM's clocks, and the moment from which the guest counts: made when it is
/// first wanted.
pub struct Timebase {
    clock: Arc<Clock>,
    scale: Scale,
    moment: Mutex<Option<Moment>>,
}

/// Of the machine's clock, and the machine's TSC at it.
#[derive(Clone, Copy, Debug)]
struct Moment {
    ns: u64,
    tsc: u64,
}

impl Timebase {
    pub fn new(clock: Arc<Clock>, tsc_hz: u64) -> Self {
        Self { clock, scale: Scale::new(tsc_hz), moment: Mutex::new(None) }
    }

    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// The guest's clock says `ns` at this TSC of the machine: it goes on from a
    /// saved state.
    pub fn set(&self, ns: u64, tsc: u64) {
        *self.moment.lock() = Some(Moment { ns, tsc });
    }

    /// What the guest's clock says now.
    pub fn guest_now_ns(&self) -> u64 {
        let now = self.now();
        self.clock_ns(now.ns, now.tsc)
    }

    /// What the guest's clock says at a moment of the machine.
    pub fn clock_ns(&self, ns: u64, tsc: u64) -> u64 {
        let now = Moment { ns, tsc };
        let base = self.moment(now);
        base.ns.wrapping_add(self.scale.ns(now.tsc.wrapping_sub(base.tsc)))
    }

    /// The moment from which all vCPUs count; `now` where there is none yet. It
    /// never changes while the machine lives: a guest's clock must not step.
    fn moment(&self, now: Moment) -> Moment {
        *self.moment.lock().get_or_insert(now)
    }

    /// Nanoseconds and TSC that belong together: of some pairs the one with the least
    /// between its reads of the TSC.
    fn now(&self) -> Moment {
        let pair = || {
            let (before, ns, after) = (self.clock.tsc(), self.clock.now_ns(), self.clock.tsc());
            let took = after.wrapping_sub(before);
            (took, Moment { ns, tsc: before.wrapping_add(took / 2) })
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

    /// Fills a pvclock_vcpu_time_info of a vCPU whose TSC is ahead of the machine's by
    /// `tsc_base`.
    pub fn write_system_time(&self, memory: &GuestMemory, address: GuestPhys, tsc_base: u64) {
        let base = self.moment(self.now());
        let mut body = [0; 24];
        body[..8].copy_from_slice(&base.tsc.wrapping_add(tsc_base).to_le_bytes());
        body[8..16].copy_from_slice(&base.ns.to_le_bytes());
        body[16..20].copy_from_slice(&self.scale.mul.to_le_bytes());
        body[20] = self.scale.shift as u8;
        body[21] = TSC_STABLE;
        write_versioned(memory, address, 8, &body);
    }

    /// The date at which the guest's clock was 0.
    pub fn start_ns(&self) -> u64 {
        let now = self.now();
        let ns = self.clock_ns(now.ns, now.tsc);
        let date =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        date.wrapping_sub(ns)
    }
}

/// Fills a pvclock_wall_clock with the date at which the guest's clock was 0, in nanoseconds
/// since 1970.
pub fn write_wall_clock(memory: &GuestMemory, address: GuestPhys, start: u64) {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&((start / NS_PER_S) as u32).to_le_bytes());
    body[4..].copy_from_slice(&((start % NS_PER_S) as u32).to_le_bytes());
    write_versioned(memory, address, 4, &body);
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

    fn timebase() -> Timebase {
        Timebase::new(Arc::new(Clock::new()), 2_000_000_000)
    }

    #[test]
    fn all_vcpus_count_from_one_moment() {
        let base = timebase();
        let first = base.moment(Moment { ns: 500, tsc: 1_000 });
        // Much later, with a TSC that is not quite as fast as it was measured.
        let hour = 3_600 * NS_PER_S;
        let late = Moment { ns: 500 + hour + 2 * NS_PER_S, tsc: 1_000 + 2 * hour };
        let second = base.moment(late);
        assert_eq!((first.ns, first.tsc), (second.ns, second.tsc));
        assert!(base.clock_ns(late.ns, late.tsc).abs_diff(500 + hour) <= 3_600 * 4);
    }

    #[test]
    fn saved_clock_goes_on_from_what_it_said() {
        let base = timebase();
        base.moment(Moment { ns: 500, tsc: 1_000 });
        base.set(7 * NS_PER_S, 5_000);
        assert_eq!(base.clock_ns(0, 5_000), 7 * NS_PER_S);
    }
}
