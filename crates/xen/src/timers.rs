//! One-shot timers, one a vCPU, behind one descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

const NS_PER_S: u64 = 1_000_000_000;
/// The descriptor is looked at again after so long, where nothing is due before.
const FAR_NS: u64 = 3600 * NS_PER_S;

/// Deadlines are in nanoseconds of the guest's clock; 0 is none.
pub struct Timers {
    descriptor: OwnedFd,
    deadlines: Vec<u64>,
}

impl Timers {
    pub fn new(vcpus: usize) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let descriptor = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { descriptor, deadlines: vec![0; vcpus] })
    }

    pub fn deadlines(&self) -> &[u64] {
        &self.deadlines
    }

    pub fn set(&mut self, vcpu: usize, deadline: u64, now: u64) {
        if let Some(slot) = self.deadlines.get_mut(vcpu) {
            *slot = deadline;
            self.arm(now);
        }
    }

    /// Takes the vCPUs whose time has come. The machine may have stood meanwhile, and then none
    /// has.
    pub fn take_due(&mut self, now: u64) -> Vec<u32> {
        // Ready or not, it is armed anew.
        let _ = rustix::io::read(&self.descriptor, &mut [0; 8]);
        let mut due = Vec::new();
        for (vcpu, deadline) in self.deadlines.iter_mut().enumerate() {
            if *deadline != 0 && *deadline <= now {
                *deadline = 0;
                due.push(vcpu as u32);
            }
        }
        self.arm(now);
        due
    }

    /// Ready when the first is due.
    fn arm(&self, now: u64) {
        let first = self.deadlines.iter().filter(|&&deadline| deadline != 0).min();
        // 0 would switch it off.
        let left = first.map_or(0, |first| first.saturating_sub(now).clamp(1, FAR_NS));
        let time =
            |ns: u64| Timespec { tv_sec: (ns / NS_PER_S) as i64, tv_nsec: (ns % NS_PER_S) as i64 };
        let setting = Itimerspec { it_interval: time(0), it_value: time(left) };
        // Fails for no setting that is made here.
        let _ = timerfd_settime(&self.descriptor, TimerfdTimerFlags::empty(), &setting);
    }
}

impl AsFd for Timers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_due_are_taken_once() {
        let mut timers = Timers::new(3).unwrap();
        timers.set(0, 100, 0);
        timers.set(2, 50, 0);
        timers.set(9, 1, 0);
        assert!(timers.take_due(49).is_empty());
        assert_eq!(timers.take_due(50), [2]);
        assert_eq!(timers.take_due(u64::MAX), [0]);
        assert!(timers.take_due(u64::MAX).is_empty());
    }
}
