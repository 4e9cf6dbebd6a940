//! Refcounts of a qcow2 image against what it refers to (QEMU's docs/interop/qcow2.txt,
//! "Host cluster management"), and their repair. A program that keeps them lazily, or
//! that was killed, leaves them behind; the data does not depend on them, new clusters do.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::image::open_file;
use crate::qcow2::{COPIED, OFFSET, Qcow2Header, entries};
use crate::raw::take_lock;
use crate::{Format, ImageError, guess_format};

/// Of entries of L2 tables, beside those of all.
const COMPRESSED: u64 = 1 << 62;

/// So many problems are told in words.
const TOLD: usize = 20;
/// Counts are kept for this many clusters together, where any is referred to.
const GROUP: u64 = 4096;

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// Clusters that the image refers to.
    pub clusters: u64,
    /// Clusters that count as used, and are not: lost space.
    pub leaks: u64,
    /// What endangers the data: clusters that would be taken for free ones, references
    /// out of the file.
    pub errors: u64,
    /// Refcounts and flags that were set right.
    pub repaired: u64,
    /// In words, the first ones.
    pub problems: Vec<String>,
}

/// Checks an image, and with `repair` mends what it can. The report is of what is left.
pub fn check(path: &Path, repair: bool) -> Result<CheckReport, ImageError> {
    let kind = guess_format(path)?;
    if kind != Format::Qcow2 {
        let mend = "there is nothing to check in it; look into it by a file system's tools";
        return Err(ImageError::new(path, format!("{kind} images have no refcounts"), mend));
    }
    let file = open_file(path, repair)?;
    take_lock(&file, path, repair)?;
    let header = Qcow2Header::read(&file, path)?;
    if header.bitmaps {
        let mend = "use qemu-img check";
        return Err(ImageError::new(path, "it has bitmaps, which are not known here", mend));
    }
    let failed = |error| ImageError::host(path, "cannot check the image", error);
    let mut image = Image::read(&file, &header).map_err(failed)?;
    let mut report = image.compare().map_err(failed)?;
    let wrong = report.leaks > 0 || report.errors > 0 || header.dirty;
    if repair && wrong && image.lost == 0 {
        let mended = image.repair().map_err(failed)?;
        // Looked at anew, from the file.
        report =
            Image::read(&file, &header).and_then(|mut image| image.compare()).map_err(failed)?;
        report.repaired = mended;
        if header.dirty && report.errors == 0 {
            Qcow2Header::clear_dirty(&file).map_err(failed)?;
        }
    } else if header.dirty {
        report.problems.insert(0, "the image was not closed".into());
        report.errors = report.errors.max(1);
    }
    Ok(report)
}

/// Whether the file ends before what its tables refer to, as that of a copy that was cut short.
/// They are looked through only where the refcounts speak of clusters beyond the file: those may
/// also be lost space, which a program that was killed has left.
pub(crate) fn is_cut(file: &File, header: &Qcow2Header) -> io::Result<bool> {
    let end = file.metadata()?.len().next_multiple_of(header.cluster_size());
    Ok(header.counted_end(file)? > end && Image::read(file, header)?.lost > 0)
}

struct Image<'a> {
    file: &'a File,
    header: &'a Qcow2Header,
    /// Of the file, in clusters; the last one need not be whole.
    end: u64,
    /// References to each cluster.
    counts: BTreeMap<u64, Box<[u32]>>,
    /// Offsets of the refcount blocks.
    blocks: Vec<u64>,
    /// L1 tables: offset and entries, the active one first.
    l1: Vec<(u64, Vec<u64>)>,
    /// L2 tables, and from how many places each is referred to.
    l2: HashMap<u64, u32>,
    /// References that lead out of the file.
    lost: u64,
    problems: Vec<String>,
}

impl<'a> Image<'a> {
    fn read(file: &'a File, header: &'a Qcow2Header) -> io::Result<Self> {
        let end = file.metadata()?.len().div_ceil(header.cluster_size());
        let mut image = Self {
            file,
            header,
            end,
            counts: BTreeMap::new(),
            blocks: Vec::new(),
            l1: Vec::new(),
            l2: HashMap::new(),
            lost: 0,
            problems: Vec::new(),
        };
        image.count_all()?;
        Ok(image)
    }

    fn count_all(&mut self) -> io::Result<()> {
        let (header, cluster) = (self.header, self.header.cluster_size());
        self.refer(0, cluster, 1, "the header");
        let table = header.reftable_offset;
        let table_bytes = u64::from(header.reftable_clusters) * cluster;
        self.refer(table, table_bytes, 1, "the refcount table");
        self.blocks = entries(self.file, table, table_bytes / 8)?;
        for block in self.blocks.clone() {
            if block & OFFSET != 0 && self.is_in_file(block, "a refcount block") {
                self.refer(block & OFFSET, cluster, 1, "a refcount block");
            }
        }
        let mut tables = vec![(header.l1_offset, u64::from(header.l1_entries))];
        tables.extend(self.snapshots());
        for (offset, count) in tables {
            self.refer(offset, count * 8, 1, "an L1 table");
            let table = entries(self.file, offset, count)?;
            for entry in table.iter().map(|entry| entry & OFFSET).filter(|&offset| offset != 0) {
                if self.is_in_file(entry, "an L2 table") {
                    *self.l2.entry(entry).or_default() += 1;
                }
            }
            self.l1.push((offset, table));
        }
        for (offset, weight) in self.l2.clone() {
            self.refer(offset, cluster, weight, "an L2 table");
            for entry in entries(self.file, offset, cluster / 8)? {
                if entry & COMPRESSED != 0 {
                    let (offset, bytes) = self.compressed(entry);
                    self.refer(offset, bytes, weight, "a compressed cluster");
                } else if entry & OFFSET != 0 && self.is_in_file(entry, "a cluster") {
                    self.refer(entry & OFFSET, cluster, weight, "a cluster");
                }
            }
        }
        Ok(())
    }

    /// Where a compressed cluster lies: the offset in the low bits, and the sectors beside
    /// its first above them.
    fn compressed(&self, entry: u64) -> (u64, u64) {
        let split = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << split) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> split;
        (offset, (sectors + 1) * 512 - offset % 512)
    }

    /// The L1 tables of internal snapshots.
    fn snapshots(&mut self) -> Vec<(u64, u64)> {
        let (mut at, mut tables) = (self.header.snapshots_offset, Vec::new());
        // QCOW_MAX_SNAPSHOTS.
        for _ in 0..self.header.snapshots.min(65536) {
            let mut head = [0; 40];
            if self.file.read_exact_at(&mut head, at).is_err() {
                self.lost += 1;
                self.tell(format!("the table of snapshots at {at:#x} ends beyond the file"));
                break;
            }
            let number = |at: usize, len: usize| {
                head[at..at + len].iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
            };
            // QCOW_MAX_L1_SIZE, in entries.
            tables.push((number(0, 8), number(8, 4).min(4 << 20)));
            let len = 40 + number(36, 4) + number(12, 2) + number(14, 2);
            at = at.saturating_add(len.next_multiple_of(8));
        }
        tables
    }

    /// Whether an entry leads to the beginning of a cluster of the file.
    fn is_in_file(&mut self, entry: u64, what: &str) -> bool {
        let offset = entry & OFFSET;
        let cluster = self.header.cluster_size();
        let inside = offset.is_multiple_of(cluster) && offset / cluster < self.end;
        if !inside {
            self.lost += 1;
            self.tell(format!("{what} at {offset:#x}, which is no cluster of the file"));
        }
        inside
    }

    fn refer(&mut self, offset: u64, bytes: u64, weight: u32, what: &str) {
        let bits = self.header.cluster_bits;
        let Some(last) = offset.checked_add(bytes.saturating_sub(1)) else { return };
        if bytes == 0 {
            return;
        }
        if last >> bits >= self.end {
            self.lost += 1;
            return self.tell(format!("{what} at {offset:#x} ends beyond the file"));
        }
        for cluster in offset >> bits..=last >> bits {
            let group = self.counts.entry(cluster / GROUP);
            let counts = group.or_insert_with(|| vec![0; GROUP as usize].into());
            let count = &mut counts[(cluster % GROUP) as usize];
            *count = count.saturating_add(weight);
        }
    }

    fn count(&self, cluster: u64) -> u64 {
        let group = self.counts.get(&(cluster / GROUP));
        group.map_or(0, |counts| u64::from(counts[(cluster % GROUP) as usize]))
    }

    fn tell(&mut self, problem: String) {
        if self.problems.len() < TOLD {
            self.problems.push(problem);
        }
    }

    /// Refcounts in one block.
    fn per_block(&self) -> u64 {
        (self.header.cluster_size() * 8) >> self.header.refcount_order
    }

    /// Calls `each` with every refcount block that is there: its offset, the first cluster
    /// that it counts, and its bytes. Those that `each` has changed are written.
    fn each_block(&self, mut each: impl FnMut(u64, &mut [u8]) -> bool) -> io::Result<()> {
        let mut bytes = vec![0; self.header.cluster_size() as usize];
        for (index, &block) in self.blocks.iter().enumerate() {
            let offset = block & OFFSET;
            if offset == 0 || offset >> self.header.cluster_bits >= self.end {
                continue;
            }
            bytes.fill(0);
            crate::qcow2::read_at_most(self.file, &mut bytes, offset)?;
            if each(index as u64 * self.per_block(), &mut bytes) {
                self.file.write_all_at(&bytes, offset)?;
            }
        }
        Ok(())
    }

    /// What the refcounts and flags say, against what is referred to.
    fn compare(&mut self) -> io::Result<CheckReport> {
        let mut report = CheckReport { errors: self.lost, ..CheckReport::default() };
        let order = self.header.refcount_order;
        let mut problems = Vec::new();
        let mut covered = 0;
        self.each_block(|first, bytes| {
            for index in 0..self.per_block() {
                let (stored, counted) = (stored(bytes, index, order), self.count(first + index));
                covered += u64::from(counted > 0);
                if stored != counted {
                    let kind =
                        if stored > counted { &mut report.leaks } else { &mut report.errors };
                    *kind += 1;
                    if problems.len() < TOLD {
                        let cluster = first + index;
                        problems.push(format!(
                            "cluster {cluster} has refcount {stored}, and {counted} references"
                        ));
                    }
                }
            }
            false
        })?;
        let counted = |counts: &[u32]| counts.iter().filter(|&&count| count > 0).count() as u64;
        report.clusters = self.counts.values().map(|counts| counted(counts)).sum();
        let uncovered = report.clusters - covered.min(report.clusters);
        if uncovered > 0 {
            report.errors += uncovered;
            problems.push(format!("{uncovered} clusters in use have no refcount"));
        }
        let flags = self.each_flag(|_, _| Ok(()))?;
        if flags > 0 {
            report.errors += flags;
            problems.push(format!("{flags} entries are marked as shared and are not, or not so"));
        }
        self.problems.extend(problems);
        self.problems.truncate(TOLD);
        report.problems.clone_from(&self.problems);
        Ok(report)
    }

    /// Calls `mend` with the place and the right value of each entry of the active tables
    /// whose COPIED bit does not say whether its cluster's refcount is 1; how many.
    fn each_flag(&self, mut mend: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<u64> {
        let (bits, mut wrong) = (self.header.cluster_bits, 0);
        let mut look = |place: u64, entry: u64| {
            let right = if self.count((entry & OFFSET) >> bits) == 1 {
                entry | COPIED
            } else {
                entry & !COPIED
            };
            if right != entry {
                wrong += 1;
                mend(place, right)?;
            }
            io::Result::Ok(())
        };
        let Some((l1_offset, l1)) = self.l1.first() else { return Ok(0) };
        for (index, &entry) in (0..).zip(l1) {
            let offset = entry & OFFSET;
            if !self.l2.contains_key(&offset) {
                continue;
            }
            look(l1_offset + index * 8, entry)?;
            for (index, entry) in
                (0..).zip(entries(self.file, offset, self.header.cluster_size() / 8)?)
            {
                if entry & COMPRESSED == 0 && entry & OFFSET != 0 {
                    look(offset + index * 8, entry)?;
                }
            }
        }
        Ok(wrong)
    }

    /// Sets refcounts and flags right; how many.
    fn repair(&mut self) -> io::Result<u64> {
        let (order, mut mended) = (self.header.refcount_order, 0);
        self.add_blocks()?;
        let most = if order == 6 { u64::MAX } else { (1 << (1u64 << order)) - 1 };
        self.each_block(|first, bytes| {
            let before = mended;
            for index in 0..self.per_block() {
                let counted = self.count(first + index).min(most);
                if stored(bytes, index, order) != counted {
                    store(bytes, index, order, counted);
                    mended += 1;
                }
            }
            mended > before
        })?;
        // Nothing may be taken for a free cluster, or written in place, before its count
        // is on the disk.
        self.file.sync_data()?;
        mended +=
            self.each_flag(|place, entry| self.file.write_all_at(&entry.to_be_bytes(), place))?;
        self.file.sync_data()?;
        Ok(mended)
    }

    /// Makes a refcount block at the end of the file for clusters that have none. A table
    /// that is too small for it is left: those clusters stay errors.
    fn add_blocks(&mut self) -> io::Result<()> {
        let (cluster, per_block) = (self.header.cluster_size(), self.per_block());
        loop {
            let mut used = self.counts.iter().flat_map(|(group, counts)| {
                let first = group * GROUP;
                (first..).zip(counts.iter()).filter(|(_, count)| **count > 0).map(|(at, _)| at)
            });
            let missing = used.find_map(|at| {
                let index = (at / per_block) as usize;
                self.blocks.get(index).filter(|&&block| block & OFFSET == 0).map(|_| index)
            });
            let Some(index) = missing else { return Ok(()) };
            drop(used);
            let offset = self.end * cluster;
            self.file.write_all_at(&vec![0; cluster as usize], offset)?;
            self.end += 1;
            self.blocks[index] = offset;
            self.refer(offset, cluster, 1, "a refcount block");
            let place = self.header.reftable_offset + index as u64 * 8;
            self.file.sync_data()?;
            self.file.write_all_at(&offset.to_be_bytes(), place)?;
        }
    }
}

/// A refcount of 1 to 64 bits: narrow ones begin at the low bits of their byte.
pub(crate) fn stored(block: &[u8], index: u64, order: u32) -> u64 {
    let bits = 1 << order;
    let at = (index * bits / 8) as usize;
    if bits < 8 {
        return u64::from(block[at]) >> (index * bits % 8) & ((1 << bits) - 1);
    }
    let bytes = &block[at..at + bits as usize / 8];
    bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

fn store(block: &mut [u8], index: u64, order: u32, value: u64) {
    let bits = 1u64 << order;
    let at = (index * bits / 8) as usize;
    if bits < 8 {
        let (shift, mask) = (index * bits % 8, (1u8 << bits) - 1);
        block[at] = block[at] & !(mask << shift) | (value as u8 & mask) << shift;
        return;
    }
    let len = bits as usize / 8;
    block[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
}
