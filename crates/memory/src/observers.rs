//! Who hears of what happens to guest memory, and how vm-memory tells them.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::{GuestPhys, Region};

/// Why an observer keeps a region away: an engine's error, of which this crate knows
/// no more than what it says.
pub type Refusal = Box<dyn std::error::Error + Send + Sync>;

/// Hears of every write to guest memory that does not come from a vCPU, and of
/// every region that comes and goes: an engine, its code map, a dirty log.
pub trait MemoryObserver: Send + Sync {
    /// Bytes were written; they are there already.
    fn written(&self, address: GuestPhys, length: u64);

    /// A region is about to appear. An error keeps it away.
    fn mapped(&self, _region: &Region) -> Result<(), Refusal> {
        Ok(())
    }

    /// A region is no longer found. Whoever got host addresses in it must have
    /// forgotten them when this returns: they are unmapped then.
    fn unmapped(&self, _region: &Region) {}
}

/// The observers of one machine's memory: read at each write, without a lock.
#[derive(Default)]
pub(crate) struct Observers(ArcSwap<Vec<Arc<dyn MemoryObserver>>>);

impl Observers {
    pub fn add(&self, observer: &Arc<dyn MemoryObserver>) {
        self.0.rcu(|list| {
            let mut list = Vec::clone(list);
            list.push(Arc::clone(observer));
            list
        });
    }

    /// An observer may keep regions, and with them this list: the end of the
    /// machine's memory ends that.
    pub fn clear(&self) {
        self.0.store(Arc::default());
    }

    #[inline]
    pub fn written(&self, address: GuestPhys, length: u64) {
        if length > 0 {
            for observer in self.0.load().iter() {
                observer.written(address, length);
            }
        }
    }

    /// Tells all, or none for good: who was told hears that it is gone again.
    pub fn mapped(&self, region: &Region) -> Result<(), Refusal> {
        let list = self.0.load_full();
        for (index, observer) in list.iter().enumerate() {
            if let Err(refused) = observer.mapped(region) {
                list[..index].iter().for_each(|told| told.unmapped(region));
                return Err(refused);
            }
        }
        Ok(())
    }

    pub fn unmapped(&self, region: &Region) {
        self.0.load_full().iter().for_each(|observer| observer.unmapped(region));
    }
}

/// What a region of guest memory has in the place of a dirty bitmap: vm-memory
/// marks here what it writes, for virtio queues as for everything else, and the
/// mark goes to the observers. They keep what was marked, each in its own form.
#[derive(Clone)]
pub struct WriteMarks {
    start: GuestPhys,
    observers: Arc<Observers>,
}

impl WriteMarks {
    pub(crate) fn new(start: GuestPhys, observers: Arc<Observers>) -> Self {
        Self { start, observers }
    }
}

/// The marks from some offset of a region on.
#[derive(Clone)]
pub struct WriteMarksSlice<'a> {
    start: GuestPhys,
    observers: &'a Observers,
}

impl fmt::Debug for WriteMarks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteMarks from {}", self.start)
    }
}

impl fmt::Debug for WriteMarksSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteMarks from {}", self.start)
    }
}

impl<'a> WithBitmapSlice<'a> for WriteMarks {
    type S = WriteMarksSlice<'a>;
}

impl<'a> WithBitmapSlice<'a> for WriteMarksSlice<'_> {
    type S = Self;
}

impl BitmapSlice for WriteMarksSlice<'_> {}

impl Bitmap for WriteMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.observers.written(self.start.offset(offset as u64), len as u64);
    }

    /// Nothing is kept here.
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> WriteMarksSlice<'_> {
        WriteMarksSlice { start: self.start.offset(offset as u64), observers: &self.observers }
    }
}

impl Bitmap for WriteMarksSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.observers.written(self.start.offset(offset as u64), len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { start: self.start.offset(offset as u64), observers: self.observers }
    }
}
