//! A table that only grows: written under a lock, read by vCPUs without one.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Entries of a chunk; the first few chunks are smaller, as many a table stays small.
const CHUNK: usize = 4096;
const FIRST_CHUNK: usize = 256;

type Chunk<T> = Box<[OnceLock<T>]>;

/// In chunks that never move.
pub struct Growing<T> {
    chunks: Box<[OnceLock<Chunk<T>>]>,
    len: AtomicU32,
}

/// The chunk of an entry, and its index there.
#[inline]
fn place(number: u32) -> (usize, usize) {
    const SMALL_CHUNKS: usize = (CHUNK / FIRST_CHUNK).ilog2() as usize;
    let number = number as usize + FIRST_CHUNK;
    if number >= CHUNK {
        return (SMALL_CHUNKS - 1 + number / CHUNK, number % CHUNK);
    }
    let chunk = (number / FIRST_CHUNK).ilog2() as usize;
    (chunk, number - (FIRST_CHUNK << chunk))
}

impl<T> Growing<T> {
    /// For `most` entries, or a few more.
    pub fn new(most: usize) -> Self {
        let chunks = (0..=place(most as u32).0).map(|_| OnceLock::new()).collect();
        Self { chunks, len: AtomicU32::new(0) }
    }

    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire) as usize
    }

    /// `None` for a number that was never given.
    #[inline]
    pub fn get(&self, number: u32) -> Option<&T> {
        let (chunk, index) = place(number);
        self.chunks.get(chunk)?.get()?.get(index)?.get()
    }

    /// Adds an entry and returns its number; `None` if there is no room. The caller
    /// holds the lock.
    pub fn push(&self, value: T) -> Option<u32> {
        let number = self.len.load(Ordering::Relaxed);
        let (chunk, index) = place(number);
        let len = CHUNK.min(FIRST_CHUNK << chunk.min(CHUNK.ilog2() as usize));
        let chunk = self.chunks.get(chunk)?;
        let chunk = chunk.get_or_init(|| (0..len).map(|_| OnceLock::new()).collect());
        chunk.get(index)?.set(value).ok()?;
        self.len.store(number + 1, Ordering::Release);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_by_their_numbers() {
        const MOST: u32 = 3 * CHUNK as u32 + 5;
        let table = Growing::new(MOST as usize);
        for number in 0..MOST {
            assert_eq!(table.get(number), None);
            assert_eq!(table.push(number), Some(number));
        }
        assert_eq!(table.len(), MOST as usize);
        for number in 0..MOST {
            assert_eq!(table.get(number), Some(&number));
        }
        assert_eq!(table.get(u32::MAX / 2), None);
        while table.push(0).is_some() {}
        assert!(table.len() < MOST as usize + CHUNK, "it is full at some time");
    }
}
