//! Clocks in guest memory of the time that the host's scheduler let vCPUs' threads wait while they
//! were ready to run.
//!
//! The I/O thread brings them up to date, so that nothing is written while the machine is held.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tetrarch_engine::Waited;
use tetrarch_io::{Attachment, Handler, IoThread, Trigger};
use tetrarch_memory::{GuestMemory, GuestPhys};

/// How old the time may be that the guest finds.
const INTERVAL_NS: i64 = 10_000_000;

#[derive(Default)]
struct Clock {
    /// Of 8 bytes, which the guest reads at once.
    address: Option<u64>,
    /// Of the thread, and what it said last.
    thread: Option<Waited>,
    waited: Option<u64>,
}

impl Clock {
    /// How long its thread has waited since it was asked last.
    fn stolen_ns(&mut self) -> u64 {
        let Some(now) = self.thread.as_ref().and_then(Waited::ns) else { return 0 };
        self.waited.replace(now).map_or(0, |last| now.saturating_sub(last))
    }

    fn update(&mut self, memory: &GuestMemory, hz: u64) {
        let Some(address) = self.address else { return };
        let stolen = u128::from(self.stolen_ns()) * u128::from(hz) / 1_000_000_000;
        if stolen != 0 {
            // RAM that has gone has no clock.
            let _ = add(memory, address, stolen as u64);
        }
    }
}

/// Whether there is RAM.
fn add(memory: &GuestMemory, address: u64, ticks: u64) -> bool {
    let mut clock = [0; 8];
    memory.read(GuestPhys(address), &mut clock).is_ok() && {
        let clock = u64::from_le_bytes(clock).wrapping_add(ticks);
        memory.write(GuestPhys(address), &clock.to_le_bytes()).is_ok()
    }
}

struct Clocks {
    memory: Arc<GuestMemory>,
    /// Of the guest's TSC, in whose ticks they count.
    hz: u64,
    clocks: Vec<Clock>,
    timer: OwnedFd,
    ticks: bool,
}

impl Clocks {
    fn update(&mut self) {
        self.clocks.iter_mut().for_each(|clock| clock.update(&self.memory, self.hz));
    }

    /// The timer rings while there is a clock.
    fn rearm(&mut self) {
        let wanted = self.clocks.iter().any(|clock| clock.address.is_some());
        if std::mem::replace(&mut self.ticks, wanted) != wanted {
            let tv_nsec = if wanted { INTERVAL_NS } else { 0 };
            let interval = Timespec { tv_sec: 0, tv_nsec };
            let setting = Itimerspec { it_interval: interval, it_value: interval };
            // Of a timer and a time that are sound.
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting);
        }
    }
}

impl Handler for Clocks {
    fn ready(&mut self, _source: u32) {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.update();
    }
}

/// Lock: `clocks`, held while the I/O thread brings them up to date.
pub struct StolenTime {
    clocks: Arc<Mutex<Clocks>>,
    /// Keeps the clocks on their thread.
    _attachment: Attachment,
}

impl StolenTime {
    pub fn new(io: &IoThread, memory: Arc<GuestMemory>, hz: u64, vcpus: usize) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let clocks = (0..vcpus).map(|_| Clock::default()).collect();
        let clocks = Arc::new(Mutex::new(Clocks { memory, hz, clocks, timer, ticks: false }));
        let attachment = io.attach("stolen time", Arc::clone(&clocks) as _);
        attachment.add(&clocks.lock().timer, 0, Trigger::Readable)?;
        Ok(Self { clocks, _attachment: attachment })
    }

    /// The calling thread is about to run a vCPU.
    pub fn runs_here(&self, vcpu: u32) {
        if let Some(clock) = self.clocks.lock().clocks.get_mut(vcpu as usize) {
            clock.thread = Waited::of_this_thread();
            clock.waited = None;
        }
    }

    /// Where a vCPU's clock is from now on, if it has one. False, and it has none, where that is no
    /// RAM.
    pub fn set_clock(&self, vcpu: u32, address: Option<u64>) -> bool {
        let mut clocks = self.clocks.lock();
        let Clocks { memory, clocks: all, .. } = &mut *clocks;
        let Some(clock) = all.get_mut(vcpu as usize) else { return false };
        clock.address = address.filter(|&address| add(memory, address, 0));
        // What was before is not this guest's.
        clock.stolen_ns();
        let there = clock.address == address;
        clocks.rearm();
        there
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const HZ: u64 = 2_000_000_000;

    fn clock(memory: &GuestMemory, address: u64) -> u64 {
        let mut clock = [0; 8];
        memory.read(GuestPhys(address), &mut clock).unwrap();
        u64::from_le_bytes(clock)
    }

    #[test]
    fn clock_counts_what_its_thread_waits() {
        if !Waited::available() {
            println!("skipped: this host has no /proc/thread-self/schedstat");
            return;
        }
        let io = IoThread::new("test").unwrap();
        let memory = Arc::new(GuestMemory::new(1 << 16).unwrap());
        let stolen = StolenTime::new(&io, Arc::clone(&memory), HZ, 2).unwrap();
        memory.write(GuestPhys(0x1000), &7_u64.to_le_bytes()).unwrap();
        stolen.runs_here(1);
        let own = Waited::of_this_thread().unwrap();
        assert!(stolen.set_clock(1, Some(0x1000)));
        let (before, start) = (own.ns().unwrap(), Instant::now());
        while clock(&memory, 0x1000) == 7 {
            assert!(start.elapsed() < Duration::from_secs(30));
            // Who gives up the processor waits for it.
            std::thread::sleep(Duration::from_micros(50));
        }
        assert!(stolen.set_clock(1, None));
        let counted = clock(&memory, 0x1000) - 7;
        let waited = own.ns().unwrap() - before;
        // The first look may have been before `own`'s.
        assert!(counted <= (waited + 1_000_000_000) * HZ / 1_000_000_000);
        assert_eq!(clock(&memory, 0x2000), 0);
    }

    #[test]
    fn what_is_no_ram_has_no_clock() {
        let io = IoThread::new("test").unwrap();
        let memory = Arc::new(GuestMemory::new(1 << 16).unwrap());
        let stolen = StolenTime::new(&io, memory, HZ, 1).unwrap();
        for address in [(1 << 16) - 7, 1 << 16, u64::MAX - 7, u64::MAX] {
            assert!(!stolen.set_clock(0, Some(address)), "{address:#x}");
        }
        assert!(!stolen.set_clock(1, Some(0)));
        stolen.runs_here(1);
        assert!(stolen.set_clock(0, Some(0)));
        assert!(stolen.set_clock(0, None));
    }
}
