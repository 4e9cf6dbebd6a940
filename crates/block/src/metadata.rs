//! Where a qcow2 image's own tables lie, so that no data is written over them, as in QEMU's
//! `qcow2_pre_write_overlap_check` (block/qcow2-refcount.c). An entry of a damaged image may lead
//! there, and its guest would then say where in the file its data are, and whose they are.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::check::stored;
use crate::qcow2::{COPIED, OFFSET, Qcow2Header, entries, read_at_most};

/// The clusters of an image that is written to.
///
/// Lock: `known`, held while the file is read.
pub(crate) struct Metadata {
    file: File,
    path: PathBuf,
    known: Mutex<Known>,
    /// A write was refused: the image is damaged, and takes no more.
    corrupt: AtomicBool,
}

/// As the file was when it was last looked at.
struct Known {
    header: Qcow2Header,
    clusters: HashSet<u64>,
    /// Entries of the L1 table whose L2 table is known.
    l1: Vec<bool>,
    /// Entries of the refcount table; 0 where no block is known.
    blocks: Vec<u64>,
}

impl Metadata {
    pub fn read(file: File, path: &Path, header: &Qcow2Header) -> io::Result<Self> {
        let known = Mutex::new(Known::read(&file, header.clone())?);
        Ok(Self { file, path: path.to_owned(), known, corrupt: AtomicBool::new(false) })
    }

    /// What the refcounts say is free, and is not: it would be given out.
    pub fn uncounted(&self) -> io::Result<Option<&'static str>> {
        let known = self.known.lock();
        let (order, per_block) = (known.header.refcount_order, known.per_block());
        let mut clusters: Vec<u64> = known.clusters.iter().copied().collect();
        clusters.sort_unstable();
        let (mut block, mut loaded) = (vec![0; known.header.cluster_size() as usize], None);
        for cluster in clusters {
            let index = cluster / per_block;
            if loaded != Some(index) {
                block.fill(0);
                let at = known.blocks.get(index as usize).copied().unwrap_or(0);
                if at != 0 {
                    read_at_most(&self.file, &mut block, at)?;
                }
                loaded = Some(index);
            }
            if stored(&block, cluster % per_block, order) == 0 {
                return Ok(Some(if cluster == 0 { "its header" } else { "its tables" }));
            }
        }
        Ok(None)
    }

    /// Whether `length` bytes of the disk from `guest` on may be written to the file at `host`.
    /// An error where one of the image's own tables is there.
    pub fn check(&self, guest: u64, host: u64, length: u64) -> io::Result<()> {
        if self.corrupt.load(Ordering::SeqCst) {
            return Err(Errno::IO.into());
        }
        let mut known = self.known.lock();
        if known.learn(&self.file, guest, host, length)? && !known.overlaps(host, length) {
            return Ok(());
        }
        // Tables move when they grow, and where one was data may be.
        known.reread(&self.file)?;
        if known.overlaps(host, length) {
            drop(known);
            self.condemn();
            return Err(Errno::IO.into());
        }
        Ok(())
    }

    /// The disk has another size, and its tables perhaps another place.
    pub fn moved(&self) -> io::Result<()> {
        self.known.lock().reread(&self.file)
    }

    fn condemn(&self) {
        if self.corrupt.swap(true, Ordering::SeqCst) {
            return;
        }
        let path = self.path.display();
        log::error!(
            "{path}: damaged: data would be written over its tables, so it is written to no more; \
            repair it: qemu-img check -r all {path}"
        );
        if let Err(error) = Qcow2Header::mark_corrupt(&self.file) {
            log::warn!("{path}: cannot be marked as corrupt: {error}");
        }
    }
}

impl Known {
    fn read(file: &File, header: Qcow2Header) -> io::Result<Self> {
        let l1 = entries(file, header.l1_offset, header.l1_entries.into())?;
        let blocks = u64::from(header.reftable_clusters) * header.cluster_size() / 8;
        let blocks = entries(file, header.reftable_offset, blocks)?;
        let mut known = Self {
            header,
            clusters: HashSet::from([0]),
            l1: vec![false; l1.len()],
            blocks: vec![0; blocks.len()],
        };
        known.add(known.header.l1_offset, 8 * l1.len() as u64);
        known.add(known.header.reftable_offset, 8 * blocks.len() as u64);
        l1.iter().enumerate().for_each(|(index, &entry)| known.enter_table(index, entry));
        blocks.iter().enumerate().for_each(|(index, &entry)| known.enter_block(index, entry));
        Ok(known)
    }

    fn reread(&mut self, file: &File) -> io::Result<()> {
        let mut header = self.header.clone();
        header.reread_tables(file)?;
        *self = Self::read(file, header)?;
        Ok(())
    }

    fn per_block(&self) -> u64 {
        (self.header.cluster_size() * 8) >> self.header.refcount_order
    }

    fn add(&mut self, offset: u64, bytes: u64) {
        if bytes > 0 {
            let bits = self.header.cluster_bits;
            self.clusters.extend(offset >> bits..=(offset + bytes - 1) >> bits);
        }
    }

    fn enter_table(&mut self, index: usize, entry: u64) {
        if entry & OFFSET != 0 {
            self.clusters.insert((entry & OFFSET) >> self.header.cluster_bits);
            // One that is shared is replaced before it is written to.
            self.l1[index] = entry & COPIED != 0;
        }
    }

    fn enter_block(&mut self, index: usize, entry: u64) {
        if entry & OFFSET != 0 {
            self.clusters.insert((entry & OFFSET) >> self.header.cluster_bits);
            self.blocks[index] = entry & OFFSET;
        }
    }

    fn overlaps(&self, host: u64, length: u64) -> bool {
        let bits = self.header.cluster_bits;
        length > 0
            && (host >> bits..=(host + length - 1) >> bits)
                .any(|cluster| self.clusters.contains(&cluster))
    }

    /// Looks at tables that a write may have made. False where the file is to be read anew.
    fn learn(&mut self, file: &File, guest: u64, host: u64, length: u64) -> io::Result<bool> {
        let (bits, last) = (self.header.cluster_bits, length.max(1) - 1);
        for index in guest >> (2 * bits - 3)..=(guest + last) >> (2 * bits - 3) {
            match self.l1.get(index as usize) {
                Some(true) => continue,
                Some(false) => {}
                None => return Ok(false),
            }
            let entry = entries(file, self.header.l1_offset + 8 * index, 1)?[0];
            self.enter_table(index as usize, entry);
            let table = (entry & OFFSET) >> bits;
            if table != 0 && !self.learn_blocks(file, (table, table))? {
                return Ok(false);
            }
        }
        self.learn_blocks(file, (host >> bits, (host + last) >> bits))
    }

    /// The refcount blocks of some clusters, and those of the blocks.
    fn learn_blocks(&mut self, file: &File, (first, last): (u64, u64)) -> io::Result<bool> {
        let per_block = self.per_block();
        for mut index in first / per_block..=last / per_block {
            loop {
                match self.blocks.get(index as usize) {
                    Some(0) => {}
                    Some(_) => break,
                    None => return Ok(false),
                }
                let entry = entries(file, self.header.reftable_offset + 8 * index, 1)?[0];
                if entry & OFFSET == 0 {
                    break;
                }
                self.enter_block(index as usize, entry);
                index = ((entry & OFFSET) >> self.header.cluster_bits) / per_block;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
