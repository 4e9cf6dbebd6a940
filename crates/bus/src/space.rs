//! An address space: which regions there are, and where they are placed.

use std::fmt;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;

use crate::doorbell::{Placement, Wanted};
use crate::table::{Placed, Table};
use crate::{Device, DeviceDoorbell};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    #[error("a device at {space} {base:#x} needs a length of at least 1")]
    Empty { space: &'static str, base: u64 },
    #[error("{length:#x} from {space} {base:#x} go past the last one, {last:#x}")]
    PastEnd { space: &'static str, base: u64, length: u64, last: u64 },
    #[error("{space} {wanted} overlaps {owner} at {taken}")]
    Overlap { space: &'static str, wanted: Span, taken: Span, owner: String },
    #[error("a device of {length:#x} from {space} {base:#x} has no access of {sizes} bytes")]
    Sizes { space: &'static str, base: u64, length: u64, sizes: Sizes },
    #[error("the region was detached")]
    Detached,
}

/// First and last address of a range; inclusive, so that one can end at 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub first: u64,
    pub last: u64,
}

impl Span {
    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Where an access of `size` bytes can begin that lies wholly inside.
    pub(crate) fn starts(self, size: u8) -> Option<Self> {
        let last = self.last.checked_sub(u64::from(size) - 1)?;
        (last >= self.first).then_some(Self { first: self.first, last })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}

/// The sizes of access that a region decodes; others pass it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes(u8);

impl Sizes {
    pub const ALL: Self = Self(1 | 2 | 4 | 8);
    pub(crate) const EACH: [u8; 4] = [1, 2, 4, 8];

    /// `None` where one is not 1, 2, 4 or 8, or where there is none.
    pub fn of(sizes: &[u8]) -> Option<Self> {
        let known = sizes.iter().all(|size| Self::EACH.contains(size));
        (known && !sizes.is_empty()).then(|| Self(sizes.iter().fold(0, |all, size| all | size)))
    }

    /// `size` is 1, 2, 4 or 8, which is a bit of the set.
    #[inline]
    pub fn has(self, size: u8) -> bool {
        self.0 & size != 0
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = Self::EACH.into_iter().filter(|&size| self.has(size));
        let sizes: Vec<_> = sizes.map(|size| size.to_string()).collect();
        f.write_str(&sizes.join("/"))
    }
}

struct Record {
    id: u64,
    base: u64,
    length: u64,
    sizes: Sizes,
    owner: String,
    device: Option<Arc<dyn Device>>,
    doorbells: Vec<DeviceDoorbell>,
    mapped: bool,
}

impl Record {
    fn span(&self) -> Span {
        Span { first: self.base, last: self.base + (self.length - 1) }
    }

    /// Whether there is an access that both decode.
    fn conflicts(&self, other: &Self) -> bool {
        Sizes::EACH.into_iter().filter(|&size| self.sizes.has(size) && other.sizes.has(size)).any(
            |size| match (self.span().starts(size), other.span().starts(size)) {
                (Some(own), Some(others)) => own.overlaps(others),
                _ => false,
            },
        )
    }
}

/// In the order of placing.
#[derive(Default)]
struct Records {
    records: Vec<Record>,
    next: u64,
    /// Where there is an engine that has doorbells.
    placement: Option<Placement>,
}

/// One address space.
///
/// Lock: `records`, held to change the space, the engine's doorbells too, and never
/// while a device is called or dropped. An access takes no lock: it reads the table of the
/// moment, which a change replaces.
pub(crate) struct Space {
    name: &'static str,
    last: u64,
    records: Mutex<Records>,
    table: ArcSwap<Table>,
}

impl Space {
    pub fn new(name: &'static str, last: u64, placement: Option<Placement>) -> Self {
        let records = Mutex::new(Records { placement, ..Records::default() });
        Self { name, last, records, table: ArcSwap::default() }
    }

    /// The table of this moment, which keeps its devices alive.
    #[inline]
    pub fn table(&self) -> Guard<Arc<Table>> {
        self.table.load()
    }

    /// Makes a region and maps it; refused where another one decodes an access
    /// of it: that is a mistake of who puts the machine together. One that is not
    /// `mapped` waits for its driver to place it.
    pub fn attach(
        self: &Arc<Self>,
        base: u64,
        length: u64,
        sizes: Sizes,
        owner: &str,
        device: Option<Arc<dyn Device>>,
        mapped: bool,
    ) -> Result<Region, AttachError> {
        let span = self.check(base, length)?;
        if !Sizes::EACH.iter().any(|&size| sizes.has(size) && span.starts(size).is_some()) {
            return Err(AttachError::Sizes { space: self.name, base, length, sizes });
        }
        let owner = owner.to_owned();
        // Before the lock, so that a device which is refused is dropped after it.
        let doorbells = device.as_ref().map(|device| device.doorbells()).unwrap_or_default();
        let mut record = Record { id: 0, base, length, sizes, owner, device, doorbells, mapped };
        let mut records = self.records.lock();
        let id = records.next;
        record.id = id;
        let conflict = |other: &&Record| mapped && other.mapped && other.conflicts(&record);
        if let Some(taken) = records.records.iter().find(conflict) {
            return Err(AttachError::Overlap {
                space: self.name,
                wanted: span,
                taken: taken.span(),
                owner: taken.owner.clone(),
            });
        }
        records.next += 1;
        records.records.push(record);
        let old = self.publish(&mut records);
        drop(records);
        drop(old);
        Ok(Region { space: Arc::clone(self), id })
    }

    fn check(&self, base: u64, length: u64) -> Result<Span, AttachError> {
        let space = self.name;
        if length == 0 {
            return Err(AttachError::Empty { space, base });
        }
        match base.checked_add(length - 1) {
            Some(last) if last <= self.last => Ok(Span { first: base, last }),
            _ => Err(AttachError::PastEnd { space, base, length, last: self.last }),
        }
    }

    /// Replaces the table. The old one may hold the last reference to a device
    /// and is dropped by the caller, without the lock.
    fn publish(&self, records: &mut Records) -> Arc<Table> {
        let Records { records, placement, .. } = records;
        let mapped = records.iter().filter(|record| record.mapped);
        let placed = mapped.clone().map(|record| Placed {
            span: record.span(),
            sizes: record.sizes,
            device: record.device.clone(),
        });
        let table = Arc::new(Table::new(placed.collect()));
        let old = self.table.swap(Arc::clone(&table));
        if let Some(placement) = placement {
            let wanted = mapped.filter_map(|record| {
                let Record { base, sizes, ref device, ref doorbells, .. } = *record;
                Some(Wanted { base, sizes, device: device.as_ref()?, doorbells })
            });
            placement.follow(wanted, &table);
        }
        old
    }

    /// Where who answers now, by address.
    pub fn regions(&self) -> Vec<(Span, String)> {
        let records = self.records.lock();
        let mapped = records.records.iter().filter(|record| record.mapped);
        let mut found: Vec<_> = mapped.map(|r| (r.span(), r.owner.clone())).collect();
        found.sort_by_key(|(span, _)| span.first);
        found
    }

    /// Changes the record of a region, whose place in the order is then the
    /// last if `change` says that it was placed anew.
    fn change(
        &self,
        id: u64,
        change: impl FnOnce(&mut Record) -> Result<bool, AttachError>,
    ) -> Result<(), AttachError> {
        let mut records = self.records.lock();
        let list = &mut records.records;
        let index = list.iter().position(|r| r.id == id).ok_or(AttachError::Detached)?;
        if change(&mut list[index])? {
            let record = list.remove(index);
            list.push(record);
        }
        let old = self.publish(&mut records);
        drop(records);
        drop(old);
        Ok(())
    }

    fn detach(&self, id: u64) -> Option<Arc<dyn Device>> {
        let mut records = self.records.lock();
        let index = records.records.iter().position(|record| record.id == id)?;
        let record = records.records.remove(index);
        let old = self.publish(&mut records);
        drop(records);
        drop(old);
        record.device
    }

    /// Who has an address, for messages.
    pub fn owner(&self, address: u64) -> Option<String> {
        let records = self.records.lock();
        let at = Span { first: address, last: address };
        let has = |record: &&Record| record.mapped && record.span().overlaps(at);
        Some(records.records.iter().find(has)?.owner.clone())
    }

    /// Detaches all devices; the caller drops them when it holds no lock.
    pub fn take_devices(&self) -> Vec<Arc<dyn Device>> {
        let mut records = self.records.lock();
        let list = std::mem::take(&mut records.records);
        let (gone, kept): (Vec<_>, Vec<_>) = list.into_iter().partition(|r| r.device.is_some());
        records.records = kept;
        let old = self.publish(&mut records);
        drop(records);
        drop(old);
        gone.into_iter().filter_map(|record| record.device).collect()
    }
}

/// A region of an address space: where a device answers. It can be moved, and
/// unmapped and mapped again, while vCPUs run, as the base address registers
/// and the command register of a PCI function ask (PCI Local Bus 3.0, 6.2.5).
///
/// An access that began before a change ends with what it found. Dropping the
/// handle leaves the region where it is.
pub struct Region {
    space: Arc<Space>,
    id: u64,
}

impl Region {
    /// Sets the base. A mapped region answers there from now on; where others
    /// were placed before it, they go on to answer, until they leave.
    pub fn move_to(&self, base: u64) -> Result<(), AttachError> {
        self.space.change(self.id, |record| {
            self.space.check(base, record.length)?;
            record.base = base;
            Ok(record.mapped)
        })
    }

    /// Lets the region answer at its base. Overlaps are as for a move.
    pub fn map(&self) -> Result<(), AttachError> {
        self.space.change(self.id, |record| Ok(!std::mem::replace(&mut record.mapped, true)))
    }

    /// No access reaches the device until the region is mapped again.
    pub fn unmap(&self) -> Result<(), AttachError> {
        self.space.change(self.id, |record| {
            record.mapped = false;
            Ok(false)
        })
    }

    /// Removes the region for good. The caller drops the device when it holds
    /// no lock; an access in flight may keep it a little longer.
    pub fn detach(&self) -> Option<Arc<dyn Device>> {
        self.space.detach(self.id)
    }

    /// Base, length, and whether it is mapped; `None` when detached.
    pub fn place(&self) -> Option<(u64, u64, bool)> {
        let records = self.space.records.lock();
        let record = records.records.iter().find(|record| record.id == self.id)?;
        Some((record.base, record.length, record.mapped))
    }
}
