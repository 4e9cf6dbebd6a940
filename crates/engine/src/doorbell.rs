//! Doorbells: writes of the guest that signal an event and are no exit.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use tetrarch_memory::{GuestMemory, GuestPhys};

use crate::{ENGINE_MMIO, ENGINE_PORTS, EngineError, Exit, Platform, Unusable};

/// How many a VM has at most, so that what a guest's BARs bring about is bounded.
pub const MAX_DOORBELLS: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DoorbellAddress {
    Port(u16),
    Memory(u64),
}

impl fmt::Display for DoorbellAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "port {port:#x}"),
            Self::Memory(address) => write!(f, "address {address:#x}"),
        }
    }
}

/// Which writes: those that begin at the address, of this size and value where
/// they are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    pub address: DoorbellAddress,
    pub size: Option<u8>,
    /// Only with a size.
    pub value: Option<u64>,
}

impl Doorbell {
    /// A write of any size and value.
    pub fn at(address: DoorbellAddress) -> Self {
        Self { address, size: None, value: None }
    }

    fn matches(&self, size: u8, value: u64) -> bool {
        self.size.is_none_or(|own| own == size) && self.value.is_none_or(|own| own == value)
    }

    /// Whether one write could ring both.
    fn collides(&self, other: &Self) -> bool {
        let both = |a: Option<u64>, b: Option<u64>| a.is_none() || b.is_none() || a == b;
        self.address == other.address
            && both(self.size.map(u64::from), other.size.map(u64::from))
            && both(self.value, other.value)
    }

    /// Whether such writes can be, and reach the machine.
    fn check(&self, memory: &GuestMemory, platform: &Platform) -> Result<(), EngineError> {
        let (start, widest, space, taken): (u64, u8, u64, &[_]) = match self.address {
            DoorbellAddress::Port(port) => (port.into(), 4, 0xFFFF, &ENGINE_PORTS),
            DoorbellAddress::Memory(address) => (address, 8, u64::MAX, &ENGINE_MMIO),
        };
        if let Some(size) = self.size.filter(|&size| !size.is_power_of_two() || size > widest) {
            return Err(self.refused(
                &format!("has no writes of {size} bytes"),
                if widest == 4 { "give 1, 2 or 4" } else { "give 1, 2, 4 or 8" },
            ));
        }
        match (self.value, self.size) {
            (Some(_), None) => {
                return Err(self.refused("has a value without a size", "give the size too"));
            }
            (Some(value), Some(size)) if size < 8 && value >> (size * 8) != 0 => {
                let what = format!("waits for {value:#x}, which {size} bytes do not hold");
                return Err(self.refused(&what, "give a smaller value, or a larger size"));
            }
            _ => {}
        }
        let last = start.checked_add(u64::from(self.size.unwrap_or(1)) - 1);
        let Some(last) = last.filter(|&last| last <= space) else {
            return Err(self.refused("goes past the last address", "give a lower address"));
        };
        let overlaps =
            |&&(base, length, _): &&(u64, u64, &str)| base <= last && start < base + length;
        if let Some((.., owner)) = taken.iter().find(overlaps) {
            return Err(self.refused(&format!("belongs to {owner}"), "give another address"));
        }
        let elsewhere = "give an address that is a device's";
        match self.address {
            DoorbellAddress::Port(port) if platform.register_port(port).is_some() => {
                Err(self.refused("belongs to the platform", elsewhere))
            }
            DoorbellAddress::Memory(address) if memory.contains(GuestPhys(address), 1) => {
                Err(self.refused("is RAM, whose writes nobody sees", elsewhere))
            }
            _ => Ok(()),
        }
    }

    fn refused(&self, what: &str, mend: &str) -> EngineError {
        EngineError::Refused(format!("a doorbell at {} {what}", self.address)).mended_by(mend)
    }
}

/// The doorbells of one VM.
#[derive(Clone, Default)]
pub struct Doorbells {
    /// By address.
    list: Vec<(Doorbell, Arc<OwnedFd>)>,
}

impl Doorbells {
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Adds one; gives the event under a descriptor of the list's own.
    pub fn add(
        &mut self,
        doorbell: Doorbell,
        event: BorrowedFd<'_>,
        memory: &GuestMemory,
        platform: &Platform,
    ) -> Result<Arc<OwnedFd>, EngineError> {
        doorbell.check(memory, platform)?;
        if self.list.len() == MAX_DOORBELLS {
            let what = format!("is one more than {MAX_DOORBELLS}");
            return Err(doorbell.refused(&what, "take others away first"));
        }
        let first = self.list.partition_point(|(other, _)| other.address < doorbell.address);
        let same =
            self.list[first..].iter().take_while(|(other, _)| other.address == doorbell.address);
        if let Some((other, _)) = same.clone().find(|(other, _)| other.collides(&doorbell)) {
            let what =
                if *other == doorbell { "is there already" } else { "takes another's writes" };
            return Err(doorbell.refused(what, "take the other away first"));
        }
        let event = Arc::new(event.try_clone_to_owned().map_err(|error| {
            Unusable::refused("no descriptor for a doorbell", &error, "look at the host's limits")
        })?);
        self.list.insert(first + same.count(), (doorbell, Arc::clone(&event)));
        Ok(event)
    }

    /// Takes one away; gives its event.
    pub fn remove(&mut self, doorbell: &Doorbell) -> Result<Arc<OwnedFd>, EngineError> {
        let index = self
            .list
            .iter()
            .position(|(other, _)| other == doorbell)
            .ok_or_else(|| doorbell.refused("is not there", "give it as it was added"))?;
        Ok(self.list.remove(index).1)
    }

    /// The event of the doorbell that a write rings.
    pub fn find(&self, write: &Exit) -> Option<&OwnedFd> {
        let (address, size, value) = match *write {
            Exit::PortOut { port, size, data } => (DoorbellAddress::Port(port), size, data.into()),
            Exit::MmioWrite { address, size, data } => {
                (DoorbellAddress::Memory(address), size, data)
            }
            _ => return None,
        };
        let first = self.list.partition_point(|(other, _)| other.address < address);
        let mut same = self.list[first..].iter().take_while(|(other, _)| other.address == address);
        same.find(|(doorbell, _)| doorbell.matches(size, value)).map(|(_, event)| &**event)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::RegisterPorts;

    const NOTIFY: DoorbellAddress = DoorbellAddress::Memory(0xD000_0050);

    struct Bench {
        doorbells: Doorbells,
        memory: GuestMemory,
        platform: Platform,
        event: std::fs::File,
    }

    impl Bench {
        fn new() -> Self {
            let port = RegisterPorts { ports: 0x5658..=0x5659, any_privilege: true };
            Self {
                doorbells: Doorbells::default(),
                memory: GuestMemory::new(1 << 20).unwrap(),
                platform: Platform { ports: vec![port], ..Platform::default() },
                event: std::fs::File::open("/dev/null").unwrap(),
            }
        }

        fn add(&mut self, doorbell: Doorbell) -> Result<(), String> {
            let Self { doorbells, memory, platform, event } = self;
            let added = doorbells.add(doorbell, event.as_fd(), memory, platform);
            added.map(drop).map_err(|error| error.to_string())
        }

        fn rings(&self, address: u64, size: u8, data: u64) -> bool {
            self.doorbells.find(&Exit::MmioWrite { address, size, data }).is_some()
        }
    }

    #[test]
    fn size_and_value_choose_among_those_of_an_address() {
        let mut bench = Bench::new();
        for queue in 0..3 {
            let value = Some(queue * 2);
            bench.add(Doorbell { address: NOTIFY, size: Some(4), value }).unwrap();
        }
        bench.add(Doorbell::at(DoorbellAddress::Memory(0xD000_0060))).unwrap();
        assert!(bench.rings(0xD000_0050, 4, 4) && bench.rings(0xD000_0050, 4, 0));
        assert!(!bench.rings(0xD000_0050, 4, 3) && !bench.rings(0xD000_0050, 2, 4));
        assert!(!bench.rings(0xD000_0051, 4, 4));
        assert!((1..=8).all(|size| bench.rings(0xD000_0060, size, 7)));
        let port = Exit::PortOut { port: 0x50, size: 4, data: 4 };
        assert!(bench.doorbells.find(&port).is_none());
        assert!(bench.doorbells.find(&Exit::MmioRead { address: 0xD000_0060, size: 4 }).is_none());
        let gone = Doorbell { address: NOTIFY, size: Some(4), value: Some(2) };
        bench.doorbells.remove(&gone).unwrap();
        assert!(bench.doorbells.remove(&gone).is_err());
        assert!(!bench.rings(0xD000_0050, 4, 2) && bench.rings(0xD000_0050, 4, 4));
    }

    #[test]
    fn what_cannot_ring_is_refused_with_the_mend() {
        use DoorbellAddress::{Memory, Port};
        let mut bench = Bench::new();
        for (address, size, value, cause) in [
            (NOTIFY, Some(3), None, "3 bytes; give 1, 2, 4 or 8"),
            (NOTIFY, Some(0), None, "0 bytes"),
            (Port(0x90), Some(8), None, "8 bytes; give 1, 2 or 4"),
            (NOTIFY, None, Some(1), "without a size"),
            (NOTIFY, Some(2), Some(0x1_0000), "which 2 bytes do not hold"),
            (Port(0xFFFE), Some(4), None, "past the last"),
            (Memory(u64::MAX), Some(2), None, "past the last"),
            (Port(0x1F), Some(2), None, "the primary interrupt controller"),
            (Memory(0xFEC0_0FFF), None, None, "the I/O APIC"),
            (Memory(0xFEE0_0000), Some(4), Some(0x41), "the local APICs"),
            (Port(0x5659), None, None, "the platform"),
            (Memory(0xF_FFFF), Some(4), None, "is RAM"),
        ] {
            let error = bench.add(Doorbell { address, size, value }).unwrap_err();
            assert!(error.contains(cause) && error.contains(';'), "{error}");
        }
        assert!(bench.doorbells.is_empty());
        assert!(
            bench.add(Doorbell { address: Memory(u64::MAX), size: Some(1), value: None }).is_ok()
        );
    }

    #[test]
    fn two_that_one_write_could_ring_are_refused() {
        let mut bench = Bench::new();
        let doorbell = |size, value| Doorbell { address: NOTIFY, size, value };
        bench.add(doorbell(Some(4), Some(1))).unwrap();
        let error = bench.add(doorbell(Some(4), Some(1))).unwrap_err();
        assert!(error.contains("is there already"), "{error}");
        for (size, value) in [(Some(4), None), (None, None)] {
            let error = bench.add(doorbell(size, value)).unwrap_err();
            assert!(error.contains("takes another's writes"), "{error}");
        }
        bench.add(doorbell(Some(2), None)).unwrap();
        bench.add(doorbell(Some(4), Some(2))).unwrap();
    }

    #[test]
    fn there_is_a_bound() {
        let mut bench = Bench::new();
        // The descriptors are not what is tested.
        let event = Arc::new(OwnedFd::from(bench.event.try_clone().unwrap()));
        let doorbell = |index| Doorbell::at(DoorbellAddress::Memory(0xD000_0000 + index));
        bench.doorbells.list =
            (0..MAX_DOORBELLS as u64).map(|i| (doorbell(i), Arc::clone(&event))).collect();
        let error = bench.add(doorbell(MAX_DOORBELLS as u64)).unwrap_err();
        assert!(error.contains("4096"), "{error}");
    }
}
