//! Events that raise an interrupt.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::{EngineError, GSI_COUNT, MSI_GSIS, Unusable};

/// How many a VM has at most.
pub const MAX_IRQFDS: usize = 4096;

/// Lines of the interval timer, which no device shares.
const TIMER_LINES: [u32; 2] = [0, 2];

/// Names one that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IrqfdId(pub u64);

/// An event, the line that it raises, and the event of the end of the interrupt.
pub struct Irqfd {
    pub gsi: u32,
    event: OwnedFd,
    resample: Option<OwnedFd>,
    /// The kernel's number of the event, where it says it.
    number: Option<u64>,
}

impl Irqfd {
    /// Under descriptors of its own.
    pub fn new(
        gsi: u32,
        event: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<Self, EngineError> {
        if gsi >= MSI_GSIS.end {
            let mend = format!("give a line of 0 to {}", MSI_GSIS.end - 1);
            return Err(refused(gsi, "is no line", &mend));
        }
        if resample.is_some() && gsi >= GSI_COUNT {
            return Err(refused(
                gsi,
                "sends messages, which nobody ends",
                "give no resample event",
            ));
        }
        if resample.is_some() && TIMER_LINES.contains(&gsi) {
            return Err(refused(gsi, "is the interval timer's", "give a line of a device"));
        }
        for event in [Some(event), resample].into_iter().flatten() {
            check_event(gsi, event)?;
        }
        let own = |event: BorrowedFd<'_>| {
            event.try_clone_to_owned().map_err(|error| {
                let otherwise = "look at the host's limits";
                Unusable::refused("no descriptor for an interrupt's event", &error, otherwise)
            })
        };
        let resample = resample.map(own).transpose()?;
        Ok(Self { gsi, event: own(event)?, resample, number: number(event) })
    }

    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    pub fn resample(&self) -> Option<BorrowedFd<'_>> {
        self.resample.as_ref().map(AsFd::as_fd)
    }

    /// Takes the signals; whether there were any.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.event, &mut [0; 8]).is_ok()
    }

    /// Tells the other side that the guest has ended the interrupt.
    pub fn signal_resample(&self) {
        if let Some(resample) = &self.resample {
            // Fails only where the count is at its highest, and then it is signalled.
            let _ = rustix::io::write(resample, &1u64.to_ne_bytes());
        }
    }
}

fn refused(gsi: u32, what: &str, mend: &str) -> EngineError {
    EngineError::Refused(format!("an event for line {gsi}: it {what}")).mended_by(mend)
}

/// Whether the descriptor is an eventfd(2) that can be read without a wait.
fn check_event(gsi: u32, event: BorrowedFd<'_>) -> Result<(), EngineError> {
    // Where /proc is not there, the host's own error has to do.
    let link = fs::read_link(format!("/proc/self/fd/{}", event.as_raw_fd()));
    if link.is_ok_and(|link| !link.to_string_lossy().contains("[eventfd]")) {
        return Err(refused(gsi, "is no eventfd", "make it with eventfd(2)"));
    }
    match rustix::fs::fcntl_getfl(event) {
        Ok(flags) if !flags.contains(OFlags::NONBLOCK) => {
            Err(refused(gsi, "lets its reader wait", "make it with EFD_NONBLOCK"))
        }
        _ => Ok(()),
    }
}

/// The kernel's number of an eventfd (proc_pid_fdinfo(5); Linux 5.2).
fn number(event: BorrowedFd<'_>) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd())).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?;
    line.trim().parse().ok()
}

/// The events of one VM.
#[derive(Default)]
pub struct Irqfds {
    list: BTreeMap<IrqfdId, Arc<Irqfd>>,
    last: u64,
}

impl Irqfds {
    /// An event is one of a VM's once: its signals can be taken by one reader alone.
    pub fn add(&mut self, irqfd: Irqfd) -> Result<(IrqfdId, Arc<Irqfd>), EngineError> {
        let Irqfd { gsi, number, .. } = irqfd;
        if self.list.len() == MAX_IRQFDS {
            let what = format!("is one more than {MAX_IRQFDS}");
            return Err(refused(gsi, &what, "take others away first"));
        }
        let same = |other: &&Arc<Irqfd>| number.is_some() && other.number == number;
        if let Some(other) = self.list.values().find(same) {
            let what = format!("raises line {} already", other.gsi);
            return Err(refused(gsi, &what, "give another event"));
        }
        self.last += 1;
        let (id, irqfd) = (IrqfdId(self.last), Arc::new(irqfd));
        self.list.insert(id, Arc::clone(&irqfd));
        Ok((id, irqfd))
    }

    pub fn remove(&mut self, id: IrqfdId) -> Result<Arc<Irqfd>, EngineError> {
        self.list.remove(&id).ok_or_else(|| {
            EngineError::Refused(format!("there is no interrupt event {}", id.0))
                .mended_by("give what add_irqfd gave, once")
        })
    }

    pub fn get(&self, id: IrqfdId) -> Option<&Arc<Irqfd>> {
        self.list.get(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Irqfd>> {
        self.list.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_bound() {
        let mut list = Irqfds::default();
        let irqfd = || {
            let event = fs::File::open("/dev/null").unwrap().into();
            Irqfd { gsi: 24, event, resample: None, number: None }
        };
        let (_, first) = list.add(irqfd()).unwrap();
        list.list = (0..MAX_IRQFDS as u64).map(|id| (IrqfdId(id), Arc::clone(&first))).collect();
        let error = list.add(irqfd()).err().unwrap().to_string();
        assert!(error.contains("4096"), "{error}");
        list.remove(IrqfdId(7)).unwrap();
        assert!(list.remove(IrqfdId(7)).is_err());
        list.add(irqfd()).unwrap();
    }
}
