//! A hash table that vCPUs search without a lock.
//!
//! Entries are chained by hash and never move or go: what is removed is only no
//! longer found, and who has found it already can go on along its chain.

use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU32, Ordering};

use rustc_hash::FxHasher;

use super::growing::Growing;

/// The end of a chain; other links are an entry's number, and 1.
const END: u32 = 0;

pub struct Entry<K, V> {
    pub key: K,
    pub value: V,
    next: AtomicU32,
}

pub struct Directory<K, V> {
    heads: Box<[AtomicU32]>,
    entries: Growing<Entry<K, V>>,
}

impl<K: Hash + Eq, V> Directory<K, V> {
    /// For `most` entries, in 2^`bits` chains.
    pub fn new(most: usize, bits: u32) -> Self {
        // Zeros that cost nothing until they are touched.
        let heads = vec![END; 1 << bits].into_boxed_slice();
        // SAFETY: `AtomicU32` has the size, alignment and valid values of `u32`, and the
        // box is the only owner.
        let heads = unsafe { Box::from_raw(Box::into_raw(heads) as *mut [AtomicU32]) };
        Self { heads, entries: Growing::new(most) }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[inline]
    pub fn get(&self, number: u32) -> Option<&Entry<K, V>> {
        self.entries.get(number)
    }

    fn head(&self, key: &K) -> &AtomicU32 {
        // Keys are page numbers and addresses: a guest that makes them collide slows
        // only itself down.
        let mut hasher = FxHasher::default();
        key.hash(&mut hasher);
        &self.heads[hasher.finish() as usize & (self.heads.len() - 1)]
    }

    /// The number of the entry, the youngest of those with this key.
    #[inline]
    pub fn find(&self, key: &K) -> Option<u32> {
        let mut link = self.head(key).load(Ordering::Acquire);
        while link != END {
            let entry = self.entries.get(link - 1)?;
            if entry.key == *key {
                return Some(link - 1);
            }
            link = entry.next.load(Ordering::Acquire);
        }
        None
    }

    /// Adds an entry; `None` if there is no room. The caller holds the lock.
    pub fn insert(&self, key: K, value: V) -> Option<u32> {
        let head = self.head(&key);
        let next = AtomicU32::new(head.load(Ordering::Relaxed));
        let number = self.entries.push(Entry { key, value, next })?;
        // It is found from here on, and complete.
        self.head(&self.entries.get(number)?.key).store(number + 1, Ordering::Release);
        Some(number)
    }

    /// Lets an entry not be found any more. The caller holds the lock.
    pub fn remove(&self, number: u32) {
        let Some(gone) = self.entries.get(number) else { return };
        let mut link = self.head(&gone.key);
        loop {
            let at = link.load(Ordering::Relaxed);
            if at == number + 1 {
                link.store(gone.next.load(Ordering::Relaxed), Ordering::Release);
                return;
            }
            let Some(entry) = at.checked_sub(1).and_then(|at| self.entries.get(at)) else { return };
            link = &entry.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_is_not_found_and_its_neighbours_are() {
        // One chain for all.
        let table = Directory::new(100, 0);
        let numbers = [10, 20, 30].map(|key| table.insert(key, key * 2).unwrap());
        table.remove(numbers[1]);
        table.remove(numbers[1]);
        assert_eq!(table.find(&20), None);
        assert_eq!([table.find(&10), table.find(&30)], [Some(numbers[0]), Some(numbers[2])]);
        assert_eq!(table.get(numbers[1]).unwrap().value, 40, "who has it may go on");
        let again = table.insert(20, 0).unwrap();
        assert_eq!(table.find(&20), Some(again));
        table.remove(numbers[0]);
        assert_eq!([table.find(&10), table.find(&20)], [None, Some(again)]);
    }

    /// A reader meets chains at every step of their changes.
    #[test]
    fn reader_finds_what_stays_while_others_come_and_go() {
        const KEEP: u64 = 1000;
        let table = Directory::new(200_000, 2);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut found = 0;
                while !done.load(Ordering::Relaxed) {
                    if let Some(number) = table.find(&KEEP) {
                        assert_eq!(table.get(number).unwrap().value, KEEP);
                        found += 1;
                    } else {
                        assert_eq!(found, 0, "it was there before");
                    }
                }
                found
            });
            let mut numbers = std::collections::VecDeque::new();
            for key in 0..100_000 {
                numbers.push_back(table.insert(key, key).unwrap());
                if numbers.len() > 50 {
                    let oldest = numbers.pop_front().unwrap();
                    if table.get(oldest).unwrap().key != KEEP {
                        table.remove(oldest);
                    }
                }
            }
            while table.find(&KEEP).is_none() {}
            done.store(true, Ordering::Relaxed);
            let _ = reader.join().unwrap();
        });
        assert!(table.find(&KEEP).is_some());
    }
}
