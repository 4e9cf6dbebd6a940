//! Which region an access meets: all regions of an address space, flattened
//! for each size of access, so that one search over the first address decides.

use std::sync::Arc;

use crate::{Device, Handler, Sizes, Span};

/// A region as the table sees it.
pub(crate) struct Placed {
    pub span: Span,
    pub sizes: Sizes,
    /// `None` where the engine answers: no exit gets here.
    pub device: Option<Arc<dyn Device>>,
}

/// Accesses that begin in `starts` belong to `region`.
struct Entry {
    starts: Span,
    region: u32,
}

/// The table of one moment. An access uses the one that it found at its
/// beginning to its end.
#[derive(Default)]
pub(crate) struct Table {
    regions: Vec<Placed>,
    handlers: Vec<Handler>,
    /// By the binary logarithm of the size.
    by_size: [Vec<Entry>; 4],
}

/// A device, where an access begins in its region, and for how many bytes the
/// region goes on there.
pub(crate) struct Hit<'a> {
    pub device: &'a dyn Device,
    pub by: Handler,
    pub offset: u64,
    pub room: u64,
    pub sizes: Sizes,
}

impl Table {
    /// `regions` in the order of their placing: of two that decode the same
    /// access, the earlier has it.
    pub fn new(regions: Vec<Placed>) -> Self {
        let mut by_size: [Vec<Entry>; 4] = Default::default();
        for (entries, size) in by_size.iter_mut().zip(Sizes::EACH) {
            // First who decodes the access whole, then who ends inside of it.
            for (index, region) in regions.iter().enumerate() {
                if let Some(starts) = region.span.starts(size).filter(|_| region.sizes.has(size)) {
                    claim(entries, starts, index as u32);
                }
            }
            for (index, region) in regions.iter().enumerate() {
                if region.sizes.has(size) && region.sizes.has(1) {
                    claim(entries, region.span, index as u32);
                }
            }
        }
        let handlers = regions
            .iter()
            .map(|region| region.device.as_ref().map_or(Handler::Nobody, |d| d.kind().into()))
            .collect();
        Self { regions, handlers, by_size }
    }

    /// Who owns the access of `size` bytes at `address`. A size that no CPU
    /// uses for a register is looked up as single bytes are.
    #[inline]
    pub fn find(&self, address: u64, size: u8) -> Option<Hit<'_>> {
        let size = if matches!(size, 1 | 2 | 4 | 8) { size } else { 1 };
        let entries = &self.by_size[size.trailing_zeros() as usize];
        let index = entries.partition_point(|entry| entry.starts.last < address);
        let entry = entries.get(index).filter(|entry| entry.starts.first <= address)?;
        let region = self.regions.get(entry.region as usize)?;
        Some(Hit {
            device: region.device.as_deref()?,
            by: self.handlers[entry.region as usize],
            offset: address - region.span.first,
            room: (region.span.last - address).saturating_add(1),
            sizes: region.sizes,
        })
    }
}

/// Gives `region` what is still free of `starts`.
fn claim(entries: &mut Vec<Entry>, starts: Span, region: u32) {
    let mut first = starts.first;
    let mut index = entries.partition_point(|entry| entry.starts.last < first);
    loop {
        let end = match entries.get(index) {
            Some(next) if next.starts.first <= starts.last => next.starts.first.checked_sub(1),
            _ => Some(starts.last),
        };
        if let Some(last) = end.filter(|&last| last >= first) {
            entries.insert(index, Entry { starts: Span { first, last }, region });
            index += 1;
        }
        // Now at an entry that begins inside of `starts`, or past the end.
        let Some(taken) = entries.get(index).filter(|next| next.starts.first <= starts.last) else {
            return;
        };
        let Some(next) = taken.starts.last.checked_add(1).filter(|&next| next <= starts.last)
        else {
            return;
        };
        first = next;
        index += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimed(spans: &[(u64, u64)]) -> Vec<(u64, u64, u32)> {
        let mut entries = Vec::new();
        for (index, &(first, last)) in spans.iter().enumerate() {
            claim(&mut entries, Span { first, last }, index as u32);
        }
        entries.iter().map(|e| (e.starts.first, e.starts.last, e.region)).collect()
    }

    #[test]
    fn later_claims_get_what_is_left() {
        assert_eq!(claimed(&[(4, 7), (0, 9)]), [(0, 3, 1), (4, 7, 0), (8, 9, 1)]);
        assert_eq!(claimed(&[(4, 7), (5, 6)]), [(4, 7, 0)]);
        assert_eq!(claimed(&[(4, 7), (6, 9), (0, 4)]), [(0, 3, 2), (4, 7, 0), (8, 9, 1)]);
        assert_eq!(claimed(&[(1, 1), (3, 3), (0, 4)]).len(), 5);
    }

    #[test]
    fn claims_reach_both_ends_of_the_space() {
        let all = (0, u64::MAX);
        assert_eq!(claimed(&[all, all]), [(0, u64::MAX, 0)]);
        assert_eq!(claimed(&[(u64::MAX, u64::MAX), all])[0], (0, u64::MAX - 1, 1));
        assert_eq!(claimed(&[(0, 0), all])[1], (1, u64::MAX, 1));
    }
}
