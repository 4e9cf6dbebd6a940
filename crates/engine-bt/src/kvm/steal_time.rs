//! Steal time and the flags that come with it (msr.rst, MSR_KVM_STEAL_TIME).
//!
//! The time is what the host's scheduler let the vCPU's thread wait while it was
//! ready to run.
//!
//! The flags save interrupts between vCPUs: who wants the TLB of a vCPU that
//! does not run flushed writes that down instead of waking it. So the vCPU says
//! that it does not run before it stops using its TLB, and looks for the wish,
//! in the same locked exchange that takes the flag back, before it uses it
//! again.

use std::sync::atomic::{AtomicU8, Ordering, fence};

use tetrarch_engine::Waited;
use tetrarch_memory::GuestPhys;

use super::{ENABLED, Guest};
use crate::state::fault::{R, gp};

/// Bits 5:1 of the MSR; the structure is aligned to 64 bytes.
const RESERVED: u64 = 0x3E;
/// How old the time may be that the guest finds.
const INTERVAL_NS: u64 = 10_000_000;

// struct kvm_steal_time: steal, version, flags, preempted.
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;

/// Values of `preempted`.
const IS_PREEMPTED: u8 = 1 << 0;
const FLUSH_TLB: u8 = 1 << 1;

#[derive(Default)]
pub struct StealTime {
    msr: u64,
    /// The statistics of the vCPU's thread, which may open no files later,
    statistics: Option<Waited>,
    /// and what they said last.
    waited: Option<u64>,
    next_ns: u64,
    /// `preempted` is to be cleared when the vCPU goes on.
    away: bool,
}

impl StealTime {
    pub fn msr(&self) -> u64 {
        self.msr
    }

    /// The vCPU runs on another thread of the host than before.
    pub fn thread_changed(&mut self) {
        self.statistics = Waited::of_this_thread();
        self.waited = None;
    }

    fn address(&self) -> Option<u64> {
        (self.msr & ENABLED != 0).then_some(self.msr & !ENABLED)
    }

    /// How long the thread has waited since it was asked last.
    fn stolen_ns(&mut self) -> u64 {
        let Some(now) = self.statistics.as_ref().and_then(Waited::ns) else { return 0 };
        self.waited.replace(now).map_or(0, |last| now.saturating_sub(last))
    }

    pub fn set_msr(&mut self, guest: &Guest, value: u64) -> R<()> {
        if value & RESERVED != 0 {
            return gp(0);
        }
        let statistics = self.statistics.take();
        *self = Self { msr: value, statistics, ..Self::default() };
        if let Some(flags) = self.preempted_flags(guest) {
            // A vCPU that was saved was away then: nobody would say that it is not any more. A
            // wish for a flush stays until it goes on.
            flags.fetch_and(!IS_PREEMPTED, Ordering::SeqCst);
            self.away = true;
        }
        self.update(guest);
        Ok(())
    }

    /// Brings the guest's structure up to date, unless that was done just now.
    pub fn update(&mut self, guest: &Guest) {
        let Some(address) = self.address() else { return };
        let now = guest.time.now_ns();
        if now < self.next_ns {
            return;
        }
        self.next_ns = now + INTERVAL_NS;
        let stolen = self.stolen_ns();
        let memory = guest.memory;
        let mut old = [0; 12];
        if memory.read(GuestPhys(address), &mut old).is_err() {
            return;
        }
        let [steal, version] = [&old[..8], &old[8..]]
            .map(|bytes| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)));
        let odd = version as u32 | 1;
        let version_at = GuestPhys(address + VERSION);
        let _ = memory.write(version_at, &odd.to_le_bytes());
        fence(Ordering::SeqCst);
        let _ = memory.write(GuestPhys(address), &steal.wrapping_add(stolen).to_le_bytes());
        fence(Ordering::SeqCst);
        let _ = memory.write(version_at, &odd.wrapping_add(1).to_le_bytes());
    }

    /// The flags, about to be written, which other vCPUs of the guest change with locked accesses.
    fn preempted_flags<'a>(&self, guest: &Guest<'a>) -> Option<&'a AtomicU8> {
        let address = GuestPhys(self.address()? + PREEMPTED);
        let host = guest.memory.host(address, 1)?;
        guest.dirty.mark(address);
        // SAFETY: a mapped byte of guest RAM, which lives as long as the VM; a
        // byte is always aligned.
        Some(unsafe { AtomicU8::from_ptr(host) })
    }

    /// The vCPU stops running guest code for a while.
    pub fn leave(&mut self, guest: &Guest) {
        if let Some(flags) = self.preempted_flags(guest) {
            flags.store(IS_PREEMPTED, Ordering::SeqCst);
            self.away = true;
        }
    }

    /// It goes on. Whether another vCPU wants its TLB flushed before that.
    pub fn come_back(&mut self, guest: &Guest) -> bool {
        if !std::mem::take(&mut self.away) {
            return false;
        }
        let Some(flags) = self.preempted_flags(guest) else { return false };
        let flush = flags.swap(0, Ordering::SeqCst) & FLUSH_TLB != 0;
        self.update(guest);
        flush
    }
}
