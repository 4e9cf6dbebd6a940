//! The header of a qcow2 image, looked at before a library may trust it: QEMU's
//! docs/interop/qcow2.txt, and the limits of block/qcow2.h.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::ImageError;

pub(crate) const MAGIC: [u8; 4] = *b"QFI\xFB";

/// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Compatible features.
const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Header extensions.
const BACKING_FORMAT: u32 = 0xE279_2ACA;
const BITMAPS: u32 = 0x2385_2875;

/// Where an entry of the refcount table has the offset of a block.
const REFTABLE_OFFSET: u64 = !0x1FF;

/// Of entries of L1 and L2 tables ("Cluster mapping"): the refcount is 1, and an offset.
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;

/// QCOW_MAX_L1_SIZE and QCOW_MAX_REFTABLE_SIZE, in bytes: a header can ask for no more
/// memory than these.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// Blocks without a count are rare; a table may name any number of them.
const BLOCKS_LOOKED_AT: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    /// As it stands there, relative to the image's folder.
    pub backing: Option<String>,
    pub backing_format: Option<String>,
    /// The refcounts may be behind: a program that keeps them lazily did not end well.
    pub dirty: bool,
    pub lazy_refcounts: bool,
    pub snapshots: u32,
    pub refcount_order: u32,
    /// Dirty bitmaps of QEMU's lie in clusters of the image.
    pub bitmaps: bool,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshots_offset: u64,
}

/// What a header has that no image can have.
#[derive(Debug, thiserror::Error)]
enum Damage {
    #[error("it ends after {0} bytes")]
    Ends(usize),
    #[error("clusters of 2^{bits} bytes")]
    Clusters { bits: u32 },
    #[error("its header's length or its refcounts' width")]
    Header,
    #[error("a header extension is longer than the header")]
    Extension,
    #[error("{there} of {needed} entries of its L1 table")]
    L1Entries { there: u32, needed: u128 },
    #[error("its {table} of {bytes} bytes at {offset:#x}")]
    Table { table: &'static str, bytes: u64, offset: u64 },
    #[error("its file of {file_len} bytes ends before its {table} does")]
    Cut { file_len: u64, table: &'static str },
    #[error("the name of its backing file is not in its header")]
    BackingOutside,
    #[error("its backing file's name is cut")]
    BackingCut,
    #[error("its backing file's name is no text")]
    BackingNoText,
    #[error("the format of its backing file is no text")]
    BackingFormatNoText,
}

impl Qcow2Header {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Reads and checks it. What this refuses no image has that QEMU would open, but for
    /// the features that it names.
    pub fn read(file: &File, path: &Path) -> Result<Self, ImageError> {
        let damaged = |what: Damage| {
            let mend = "restore the image from a backup, or give format=raw for its bytes";
            ImageError::new(path, format!("damaged qcow2 image: {what}"), mend)
        };
        let unsupported = |what: &str| {
            let mend = "convert it: qemu-img convert -O qcow2 OLD NEW";
            ImageError::new(path, format!("qcow2 with {what} is not supported"), mend)
        };
        let host = |error| ImageError::host(path, "cannot read the image", error);
        let file_len = file.metadata().map_err(host)?.len();

        // A header of version 3 with the field for the compression.
        let mut bytes = [0; 112];
        let there = read_at_most(file, &mut bytes, 0).map_err(host)?;
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if bytes[..4] != MAGIC {
            let mend = "give the image's format: format=raw|qcow2|vmdk";
            return Err(ImageError::new(path, "is not a qcow2 image", mend));
        }
        let version = u32_at(4);
        let minimum = match version {
            2 => 72,
            3 => 104,
            _ => return Err(unsupported(&format!("version {version}"))),
        };
        if there < minimum {
            return Err(damaged(Damage::Ends(there)));
        }
        let (features, lazy, order, length) = if version == 2 {
            (0, 0, 4, 72)
        } else {
            (u64_at(72), u64_at(80), u32_at(96), u32_at(100))
        };
        let cluster_bits = u32_at(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(Damage::Clusters { bits: cluster_bits }));
        }
        let cluster = 1u64 << cluster_bits;
        if order > 6 || length < minimum as u32 || u64::from(length) > cluster {
            return Err(damaged(Damage::Header));
        }
        if features & CORRUPT != 0 {
            let mend = "repair it: qemu-img check -r all IMAGE";
            return Err(ImageError::new(path, "the image is marked as corrupt", mend));
        }
        if u32_at(32) != 0 {
            return Err(unsupported("encryption"));
        }
        if features & EXTERNAL_DATA != 0 {
            return Err(unsupported("an external data file"));
        }
        let zstd = length >= 112 && there >= 112 && bytes[104] != 0;
        if features & COMPRESSION_TYPE != 0 || zstd {
            return Err(unsupported("compression other than zlib"));
        }
        if features & EXTENDED_L2 != 0 {
            return Err(unsupported("extended L2 entries"));
        }
        let unknown = features >> 5;
        if unknown != 0 {
            return Err(unsupported(&format!("incompatible features {:#x}", unknown << 5)));
        }

        let extensions = Extensions::read(file, u64::from(length), cluster).map_err(&damaged)?;
        let header = Self {
            version,
            cluster_bits,
            size: u64_at(24),
            backing: backing_name(file, u64_at(8), u32_at(16), cluster).map_err(&damaged)?,
            backing_format: extensions.backing_format,
            bitmaps: extensions.bitmaps,
            dirty: features & DIRTY != 0,
            lazy_refcounts: lazy & LAZY_REFCOUNTS != 0,
            snapshots: u32_at(60),
            refcount_order: order,
            l1_offset: u64_at(40),
            l1_entries: u32_at(36),
            reftable_offset: u64_at(48),
            reftable_clusters: u32_at(56),
            snapshots_offset: u64_at(64),
        };
        header.check_tables(file_len).map_err(damaged)?;
        Ok(header)
    }

    /// Marks an image as closed, whose refcounts are right again.
    pub(crate) fn clear_dirty(file: &File) -> io::Result<()> {
        let mut features = [0; 8];
        file.read_exact_at(&mut features, 72)?;
        let cleared = u64::from_be_bytes(features) & !DIRTY;
        file.write_all_at(&cleared.to_be_bytes(), 72)?;
        file.sync_data()
    }

    /// Says that the image is to be repaired before it is written to; one of version 2 has no
    /// place for it.
    pub(crate) fn mark_corrupt(file: &File) -> io::Result<()> {
        let (mut version, mut features) = ([0; 4], [0; 8]);
        file.read_exact_at(&mut version, 4)?;
        if u32::from_be_bytes(version) < 3 {
            return Ok(());
        }
        file.read_exact_at(&mut features, 72)?;
        let marked = u64::from_be_bytes(features) | CORRUPT;
        file.write_all_at(&marked.to_be_bytes(), 72)?;
        file.sync_data()
    }

    /// Where the tables are now: they move when they grow.
    pub(crate) fn reread_tables(&mut self, file: &File) -> io::Result<()> {
        let mut bytes = [0; 60];
        file.read_exact_at(&mut bytes, 0)?;
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        (self.l1_entries, self.l1_offset) = (u32_at(36), u64_at(40));
        (self.reftable_offset, self.reftable_clusters) = (u64_at(48), u32_at(56));
        Ok(())
    }

    /// Where the last cluster ends that has a refcount, as far as the last blocks of them say.
    pub(crate) fn counted_end(&self, file: &File) -> io::Result<u64> {
        let cluster = self.cluster_size();
        let mut table = vec![0; (u64::from(self.reftable_clusters) * cluster) as usize];
        let there = read_at_most(file, &mut table, self.reftable_offset)?;
        let entries = table[..there].chunks_exact(8).enumerate().rev();
        let blocks = entries.filter_map(|(index, entry)| {
            let entry = u64::from_be_bytes(entry.try_into().expect("8 bytes"));
            let block = entry & REFTABLE_OFFSET;
            (block != 0).then_some((index as u64, block))
        });
        let mut bytes = vec![0; cluster as usize];
        for (index, block) in blocks.take(BLOCKS_LOOKED_AT) {
            let there = read_at_most(file, &mut bytes, block)?;
            if let Some(last) = bytes[..there].iter().rposition(|&byte| byte != 0) {
                // Of narrow counts all that share a byte.
                let in_block = ((last as u64 + 1) * 8).div_ceil(1 << self.refcount_order);
                let per_block = (cluster * 8) >> self.refcount_order;
                return Ok((index * per_block + in_block).saturating_mul(cluster));
            }
        }
        Ok(0)
    }

    fn check_tables(&self, file_len: u64) -> Result<(), Damage> {
        let cluster = self.cluster_size();
        // An entry of L1 is a table of cluster / 8 entries of L2.
        let per_entry = u128::from(cluster) * u128::from(cluster / 8);
        let needed = u128::from(self.size).div_ceil(per_entry);
        if u128::from(self.l1_entries) < needed {
            return Err(Damage::L1Entries { there: self.l1_entries, needed });
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let reftable_bytes = u64::from(self.reftable_clusters) * cluster;
        for (table, offset, bytes, limit) in [
            ("L1 table", self.l1_offset, l1_bytes, MAX_L1_BYTES),
            ("refcount table", self.reftable_offset, reftable_bytes, MAX_REFTABLE_BYTES),
        ] {
            if bytes > limit || !offset.is_multiple_of(cluster) {
                return Err(Damage::Table { table, bytes, offset });
            }
            // The last cluster of a file need not be whole.
            let end = offset.checked_add(bytes);
            let whole = end.is_some_and(|end| end <= file_len.next_multiple_of(cluster));
            if bytes > 0 && !whole {
                return Err(Damage::Cut { file_len, table });
            }
        }
        Ok(())
    }
}

fn backing_name(file: &File, at: u64, len: u32, cluster: u64) -> Result<Option<String>, Damage> {
    if at == 0 {
        return Ok(None);
    }
    let inside = at.checked_add(u64::from(len)).is_some_and(|end| end <= cluster);
    if !(1..=1023).contains(&len) || !inside {
        return Err(Damage::BackingOutside);
    }
    let mut name = vec![0; len as usize];
    file.read_exact_at(&mut name, at).map_err(|_| Damage::BackingCut)?;
    let name = String::from_utf8(name).map_err(|_| Damage::BackingNoText)?;
    if name.contains('\0') { Err(Damage::BackingNoText) } else { Ok(Some(name)) }
}

/// What lies between the header and the name of the backing file.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    bitmaps: bool,
}

impl Extensions {
    fn read(file: &File, header: u64, cluster: u64) -> Result<Self, Damage> {
        let (mut found, mut at, mut head) = (Self::default(), header, [0; 8]);
        while at + 8 <= cluster && file.read_exact_at(&mut head, at).is_ok() {
            let kind = u32::from_be_bytes(head[..4].try_into().expect("4 bytes"));
            let len = u64::from(u32::from_be_bytes(head[4..].try_into().expect("4 bytes")));
            if at + 8 + len > cluster && kind != 0 {
                return Err(Damage::Extension);
            }
            match kind {
                0 => break,
                BITMAPS => found.bitmaps = true,
                BACKING_FORMAT => {
                    // QEMU's longest name of a format has fewer than 16 letters.
                    let mut name = vec![0; len.min(16) as usize];
                    let read = file.read_exact_at(&mut name, at + 8);
                    let name = read.ok().and_then(|()| String::from_utf8(name).ok());
                    found.backing_format = Some(name.ok_or(Damage::BackingFormatNoText)?);
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }
}

/// A table of big-endian entries; what the file has not is 0.
pub(crate) fn entries(file: &File, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    read_at_most(file, &mut bytes, offset)?;
    let entry = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
    Ok(bytes.chunks_exact(8).map(entry).collect())
}

/// Fills as much as there is.
pub(crate) fn read_at_most(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
