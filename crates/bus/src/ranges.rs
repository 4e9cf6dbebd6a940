//! Which device owns which addresses.

use std::fmt;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::Device;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    #[error("a device at {space} {base:#x} needs a length of at least 1")]
    Empty { space: &'static str, base: u64 },
    #[error("{length:#x} from {space} {base:#x} go past the last one, {last:#x}")]
    PastEnd { space: &'static str, base: u64, length: u64, last: u64 },
    #[error("{space} {wanted} overlaps {owner} at {taken}")]
    Overlap { space: &'static str, wanted: Span, taken: Span, owner: String },
}

/// First and last address of a range; inclusive, so that one can end at 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub first: u64,
    pub last: u64,
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}

struct Range {
    span: Span,
    owner: String,
    /// `None` where the range is the engine's: the exit never gets here, and
    /// the entry only keeps others from attaching to it.
    device: Option<Arc<dyn Device>>,
}

/// One address space: ranges that do not overlap, in order.
pub(crate) struct RangeMap {
    space: &'static str,
    last: u64,
    /// Held only to look up or to insert, never while a device is called.
    ranges: RwLock<Vec<Range>>,
}

/// A device and where an access falls in its range.
pub(crate) struct Hit {
    pub device: Arc<dyn Device>,
    pub offset: u64,
}

/// What a whole access meets.
pub(crate) enum Lookup {
    /// All bytes belong to one device.
    One(Hit),
    /// No byte belongs to a device.
    Nobody,
    /// Ranges begin or end inside the access.
    Mixed,
}

impl RangeMap {
    pub fn new(space: &'static str, last: u64) -> Self {
        Self { space, last, ranges: RwLock::new(Vec::new()) }
    }

    pub fn attach(
        &self,
        base: u64,
        length: u64,
        owner: &str,
        device: Option<Arc<dyn Device>>,
    ) -> Result<(), AttachError> {
        let space = self.space;
        if length == 0 {
            return Err(AttachError::Empty { space, base });
        }
        let last = match base.checked_add(length - 1) {
            Some(last) if last <= self.last => last,
            _ => return Err(AttachError::PastEnd { space, base, length, last: self.last }),
        };
        let span = Span { first: base, last };
        let mut ranges = self.ranges.write();
        let index = ranges.partition_point(|range| range.span.last < base);
        if let Some(next) = ranges.get(index).filter(|next| next.span.first <= last) {
            let (taken, owner) = (next.span, next.owner.clone());
            return Err(AttachError::Overlap { space, wanted: span, taken, owner });
        }
        ranges.insert(index, Range { span, owner: owner.to_owned(), device });
        Ok(())
    }

    pub fn find(&self, address: u64, size: u8) -> Lookup {
        let ranges = self.ranges.read();
        let index = ranges.partition_point(|range| range.span.last < address);
        let Some(range) = ranges.get(index) else { return Lookup::Nobody };
        let Some(last) = address.checked_add(u64::from(size.max(1)) - 1) else {
            return Lookup::Mixed;
        };
        if range.span.first > last {
            return Lookup::Nobody;
        }
        if range.span.first > address || range.span.last < last {
            return Lookup::Mixed;
        }
        match &range.device {
            Some(device) => {
                let offset = address - range.span.first;
                Lookup::One(Hit { device: Arc::clone(device), offset })
            }
            None => Lookup::Nobody,
        }
    }

    /// Removes all devices; the caller drops them, outside of the lock.
    pub fn take_devices(&self) -> Vec<Arc<dyn Device>> {
        let mut ranges = self.ranges.write();
        let devices = ranges.iter_mut().filter_map(|range| range.device.take()).collect();
        ranges.retain(|range| range.device.is_some());
        devices
    }
}
