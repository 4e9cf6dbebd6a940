//! RAM in a file: runs of pages, each with its checksum.
//!
//! A machine that goes on from a file copies nothing when it starts. The runs are mapped over its
//! RAM, privately: a page that the guest reads is the file's, in the host's page cache, and one
//! that it writes is copied then. What no run has stays in the memfd and is zero.
//!
//! Checksums are looked at before that, of every run and on several threads: a guest that ran on
//! damaged memory would not be told. So the start costs what it takes to read the runs once, a
//! tenth of a second for a GiB that the page cache has; zeros cost nothing.
//!
//! Of several files one lies upon the other: the later ones have what was written since.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::SeekFrom;
use rustix::mm::{MapFlags, ProtFlags};

use crate::discard::map_memfd;
use crate::lazy::Range;
use crate::{GuestMemory, GuestPhys, MemoryError, PAGE_SIZE, Region};

/// The longest run: what a thread checks at once.
const RUN_MAX: usize = 1 << 20;
/// Mappings that a machine may have of its files; the host's limit for a process is 65530
/// (Documentation/admin-guide/sysctl/vm.rst, max_map_count). The shortest runs beyond are copied.
const MAPPINGS_MAX: usize = 8192;
const THREADS_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{0}")]
    File(#[from] io::Error),
    #[error("{0} {1}")]
    Damaged(String, &'static str),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Pages of RAM, and where they are in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub address: GuestPhys,
    /// In the file; 0: the pages are zero, and not there.
    pub offset: u64,
    /// In bytes.
    pub length: u32,
    /// CRC-32 (IEEE 802.3).
    pub crc: u32,
}

impl Run {
    pub const BYTES: usize = 24;

    /// Little-endian: address, offset, length, checksum.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.address.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.length.to_le_bytes());
        bytes[20..].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let long = |at| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let short = |at| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        Self { address: GuestPhys(long(0)), offset: long(8), length: short(16), crc: short(20) }
    }

    /// A table of them.
    /// A table of them; what is no whole one at its end counts as a damaged one.
    pub fn table(bytes: &[u8]) -> Vec<Self> {
        let whole = |chunk: &[u8]| {
            let mut bytes = [0; Self::BYTES];
            bytes[..chunk.len()].copy_from_slice(chunk);
            Self::from_bytes(&bytes)
        };
        bytes.chunks(Self::BYTES).map(whole).collect()
    }

    fn end(&self) -> u64 {
        self.address.0.saturating_add(self.length.into())
    }
}

/// A file and its runs, by ascending address.
pub struct Layer {
    /// For errors.
    pub name: String,
    pub file: File,
    pub runs: Vec<Run>,
}

/// Guest addresses whose pages are in one piece of one layer's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    start: u64,
    end: u64,
    /// None: zeros.
    source: Option<(usize, u64)>,
}

impl Segment {
    fn part(self, start: u64, end: u64) -> Self {
        let source = self.source.map(|(layer, offset)| (layer, offset + (start - self.start)));
        Self { start, end, source }
    }

    fn follows(&self, other: &Self) -> bool {
        self.start == other.end && self.source == other.part(other.end, other.end).source
    }
}

impl GuestMemory {
    /// Writes pages that are not zero to a file, from `offset` on: all of them, or those of
    /// `ranges`, whose zeros are noted too. Gives the runs and the offset behind the last.
    pub fn save(
        &self,
        file: &File,
        mut offset: u64,
        ranges: Option<&[Range]>,
    ) -> Result<(Vec<Run>, u64), ImageError> {
        let used = if ranges.is_none() { self.used()? } else { Vec::new() };
        let mut runs = Vec::new();
        let mut buffer = vec![0; RUN_MAX];
        for range in ranges.unwrap_or(&used) {
            for start in range.clone().step_by(RUN_MAX) {
                let data = &mut buffer[..RUN_MAX.min((range.end - start) as usize)];
                self.read(GuestPhys(start), data)?;
                for (from, to, zero) in kinds(data) {
                    let address = GuestPhys(start + from as u64);
                    let (length, part) = ((to - from) as u32, &data[from..to]);
                    if !zero {
                        file.write_all_at(part, offset)?;
                        runs.push(Run { address, offset, length, crc: crc32fast::hash(part) });
                        offset += u64::from(length);
                    } else if ranges.is_some() {
                        runs.push(Run { address, offset: 0, length, crc: 0 });
                    }
                }
            }
        }
        Ok((runs, offset))
    }

    /// Where pages have ever been written, by ascending address: to look at others would make
    /// them.
    fn used(&self) -> Result<Vec<Range>, ImageError> {
        let mut ranges = Vec::new();
        for region in self.ram() {
            let Some(memfd) = region.file() else { continue };
            let (first, end) = (memfd.start(), memfd.start() + region.len);
            let mut at = first;
            while at < end {
                let Ok(data) = rustix::fs::seek(memfd.file(), SeekFrom::Data(at)) else { break };
                let hole = rustix::fs::seek(memfd.file(), SeekFrom::Hole(data));
                at = hole.map_err(io::Error::from)?.min(end);
                if data < at {
                    ranges.push(region.start.0 + (data - first)..region.start.0 + (at - first));
                }
            }
        }
        ranges.extend(self.lazy.lock().ranges());
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, before| {
            let joined = next.start <= before.end;
            if joined {
                before.end = before.end.max(next.end);
            }
            joined
        });
        Ok(ranges)
    }

    /// Takes up what was saved, the first layer undermost: into RAM that is all zero and that
    /// nobody uses yet.
    pub fn load(&self, layers: &[Layer]) -> Result<(), ImageError> {
        let mut segments: Vec<Segment> = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            self.check(layer)?;
            let top: Vec<_> = layer.runs.iter().map(|run| segment(index, run)).collect();
            segments = over(&segments, &top);
        }
        verify(layers)?;
        segments.retain(|segment| segment.source.is_some());
        segments.dedup_by(|next, before| {
            let joined = next.follows(before);
            if joined {
                before.end = next.end;
            }
            joined
        });
        if segments.len() > MAPPINGS_MAX {
            segments.sort_unstable_by_key(|segment| segment.start.wrapping_sub(segment.end));
            for short in segments.split_off(MAPPINGS_MAX) {
                self.copy(layers, short)?;
            }
        }
        segments.into_iter().try_for_each(|segment| self.map_file(layers, segment))
    }

    /// Whether any of it is mapped from a file.
    pub fn is_lazy(&self) -> bool {
        self.lazy.lock().len() > 0
    }

    /// Copies what is mapped from files into the memfds, for who shares those. Nobody writes to
    /// guest memory meanwhile.
    pub fn settle(&self) -> Result<(), ImageError> {
        let mut lazy = self.lazy.lock();
        let mut buffer = vec![0; RUN_MAX];
        for region in self.ram() {
            let Some(memfd) = region.file() else { continue };
            for part in lazy.take(&(region.start.0..region.start.0 + region.len)) {
                for start in part.clone().step_by(RUN_MAX) {
                    let data = &mut buffer[..RUN_MAX.min((part.end - start) as usize)];
                    self.read(GuestPhys(start), data)?;
                    memfd.file().write_all_at(data, memfd.start() + (start - region.start.0))?;
                }
                map_memfd(&region, memfd, &part)?;
            }
        }
        Ok(())
    }

    fn check(&self, layer: &Layer) -> Result<(), ImageError> {
        let damaged = |how| Err(ImageError::Damaged(layer.name.clone(), how));
        let mut end = 0;
        for run in &layer.runs {
            let length = u64::from(run.length);
            if length == 0 || run.length as usize > RUN_MAX {
                return damaged("has a run of RAM of absurd size");
            }
            let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE);
            if !aligned(run.address.0) || !aligned(length) || !aligned(run.offset) {
                return damaged("has a run of RAM that begins in a page");
            }
            let beyond =
                run.offset.checked_add(length).is_none_or(|end| i64::try_from(end).is_err());
            if beyond {
                return damaged("has a run of RAM beyond any file");
            }
            if run.address.0 < end {
                return damaged("has a run of RAM upon another");
            }
            if self.host(run.address, length).is_none() {
                return damaged("has RAM where the machine has none");
            }
            end = run.end();
        }
        Ok(())
    }

    fn copy(&self, layers: &[Layer], segment: Segment) -> Result<(), ImageError> {
        let Some((layer, offset)) = segment.source else { return Ok(()) };
        let mut data = vec![0; (segment.end - segment.start) as usize];
        layers[layer].file.read_exact_at(&mut data, offset)?;
        Ok(self.write(GuestPhys(segment.start), &data)?)
    }

    fn map_file(&self, layers: &[Layer], segment: Segment) -> Result<(), ImageError> {
        let Some((layer, offset)) = segment.source else { return Ok(()) };
        let mut lazy = self.lazy.lock();
        for region in self.ram() {
            let (start, end) = within(&region, &(segment.start..segment.end));
            if start < end {
                let host = region.host().wrapping_add((start - region.start.0) as usize);
                // SAFETY: the range is part of the region's mapping, which lives as long as the
                // region and is unmapped as a whole; nothing but guest memory is in it.
                unsafe {
                    rustix::mm::mmap(
                        host.cast(),
                        (end - start) as usize,
                        ProtFlags::READ | ProtFlags::WRITE,
                        MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                        &layers[layer].file,
                        offset + (start - segment.start),
                    )
                }
                .map_err(io::Error::from)?;
                lazy.add(start..end);
            }
        }
        Ok(())
    }
}

/// What of a range is in a region.
pub(crate) fn within(region: &Region, range: &Range) -> (u64, u64) {
    let end = region.start.0 + region.len;
    (range.start.max(region.start.0), range.end.min(end))
}

fn segment(layer: usize, run: &Run) -> Segment {
    let source = (run.offset != 0).then_some((layer, run.offset));
    Segment { start: run.address.0, end: run.end(), source }
}

/// `top` upon `base`, both by ascending address.
fn over(base: &[Segment], top: &[Segment]) -> Vec<Segment> {
    let mut all = top.to_vec();
    let mut first = 0;
    for below in base {
        let mut at = below.start;
        while top.get(first).is_some_and(|one| one.end <= at) {
            first += 1;
        }
        for above in top[first..].iter().take_while(|above| above.start < below.end) {
            if at < above.start {
                all.push(below.part(at, above.start));
            }
            at = at.max(above.end);
        }
        if at < below.end {
            all.push(below.part(at, below.end));
        }
    }
    all.sort_unstable_by_key(|segment| segment.start);
    all
}

/// Reads every run of the files once.
fn verify(layers: &[Layer]) -> Result<(), ImageError> {
    let stored = |run: &&Run| run.offset != 0;
    let all: Vec<(&Layer, &Run)> = layers
        .iter()
        .flat_map(|layer| layer.runs.iter().filter(stored).map(move |run| (layer, run)))
        .collect();
    let next = AtomicUsize::new(0);
    let check = || {
        let mut buffer = vec![0; RUN_MAX];
        while let Some((layer, run)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let damaged = |how| ImageError::Damaged(layer.name.clone(), how);
            let data = &mut buffer[..run.length as usize];
            layer.file.read_exact_at(data, run.offset).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => damaged("is cut short"),
                _ => error.into(),
            })?;
            if crc32fast::hash(data) != run.crc {
                return Err(damaged("has RAM with a wrong checksum"));
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    std::thread::scope(|scope| {
        // A host that gives no thread leaves the work to this one.
        let others: Vec<_> = (1..threads.min(all.len()))
            .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, check).ok())
            .collect();
        let mut result = check();
        for other in others {
            let failed =
                || ImageError::File(io::Error::other("a thread that checks it has failed"));
            result = result.and(other.join().unwrap_or_else(|_| Err(failed())));
        }
        result
    })
}

/// Pieces of whole pages that are zero, or are not: (from, to, zero).
fn kinds(data: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut pieces: Vec<(usize, usize, bool)> = Vec::new();
    for (index, page) in data.chunks(PAGE_SIZE as usize).enumerate() {
        let from = index * PAGE_SIZE as usize;
        // All of it, without a branch a byte: it becomes vector instructions.
        let zero = page.iter().fold(0, |seen, byte| seen | byte) == 0;
        match pieces.last_mut() {
            Some((_, to, kind)) if *kind == zero => *to = from + page.len(),
            _ => pieces.push((from, from + page.len(), zero)),
        }
    }
    pieces
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
