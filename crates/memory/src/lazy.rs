//! Which RAM is mapped from a file of saved RAM, and not from its memfd.

use std::collections::BTreeMap;

/// Guest physical addresses of whole pages.
pub type Range = std::ops::Range<u64>;

/// Ranges that do not touch, by where they begin.
#[derive(Default)]
pub struct Lazy(BTreeMap<u64, u64>);

impl Lazy {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        self.0.iter().map(|(&start, &end)| start..end)
    }

    /// A range that none of the others has.
    pub fn add(&mut self, range: Range) {
        self.0.insert(range.start, range.end);
    }

    /// What of the others is in a range.
    pub fn within(&self, range: &Range) -> Vec<Range> {
        let before = self.0.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.0.range(range.start..range.end))
            .map(|(&start, &end)| start.max(range.start)..end.min(range.end))
            .filter(|part| part.start < part.end)
            .collect()
    }

    /// Takes what is in a range out of the others, and gives it.
    pub fn take(&mut self, range: &Range) -> Vec<Range> {
        let taken = self.within(range);
        for part in &taken {
            let Some((&start, &end)) = self.0.range(..=part.start).next_back() else { continue };
            self.0.remove(&start);
            if start < part.start {
                self.0.insert(start, part.start);
            }
            if part.end < end {
                self.0.insert(part.end, end);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_taken_out() {
        let mut lazy = Lazy::default();
        lazy.add(10..20);
        lazy.add(20..30);
        lazy.add(40..50);
        assert_eq!(lazy.within(&(0..10)), []);
        assert_eq!(lazy.take(&(15..25)), [15..20, 20..25]);
        assert_eq!(lazy.ranges().collect::<Vec<_>>(), [10..15, 25..30, 40..50]);
        assert_eq!(lazy.take(&(42..44)).len(), 1);
        assert_eq!(lazy.take(&(0..100)), [10..15, 25..30, 40..42, 44..50]);
        assert_eq!(lazy.len(), 0);
    }
}
