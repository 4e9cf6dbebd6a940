//! The sites of a code cache: written under its lock, read by vCPUs without one.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::block::Site;

const CHUNK: usize = 4096;
/// The most sites that are kept; the code memory is mostly full before.
pub const MAX_SITES: usize = 8 << 20;

type Chunk = Box<[OnceLock<Site>]>;

/// A table that only grows, in chunks that never move.
pub struct Sites {
    chunks: Box<[OnceLock<Chunk>]>,
    len: AtomicU32,
}

impl Sites {
    pub fn new() -> Self {
        let chunks = (0..MAX_SITES / CHUNK).map(|_| OnceLock::new()).collect();
        Self { chunks, len: AtomicU32::new(0) }
    }

    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed) as usize
    }

    /// `None` for a number that was never given.
    #[inline]
    pub fn get(&self, number: u32) -> Option<&Site> {
        let number = number as usize;
        self.chunks.get(number / CHUNK)?.get()?[number % CHUNK].get()
    }

    /// Adds a site and returns its number. The caller holds the cache's lock and
    /// has seen that there is room.
    pub fn push(&self, site: Site) -> u32 {
        let number = self.len.fetch_add(1, Ordering::Relaxed);
        let Some(chunk) = self.chunks.get(number as usize / CHUNK) else { return number };
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| OnceLock::new()).collect());
        let _ = chunk[number as usize % CHUNK].set(site);
        number
    }
}
