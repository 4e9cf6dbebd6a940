//! Disks in a format: imago knows qcow2, VMDK is a storage of its own; threads wait for them.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::file::File;
use imago::format::PreallocateMode;
use imago::raw::Raw;
use imago::{DynStorage, FormatAccess, Mapping, StorageExt};
use parking_lot::RwLock;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use tetrarch_memory::ScatterList;

use crate::backend::SECTOR;
use crate::create::too_large;
use crate::image::Layer;
use crate::metadata::Metadata;
use crate::workers::{Blocking, WorkerQueue};
use crate::{BlockBackend, BlockError, BlockInfo, BlockQueue, ImageError, Request};

/// Data goes by a buffer of this size at most: guest memory changes while it is read,
/// which no format's code expects.
const CHUNK: usize = 256 << 10;

/// Where a format's bytes are: a file, or the extents of a VMDK image.
pub(crate) type Store = Arc<dyn DynStorage>;
pub(crate) type Access = FormatAccess<Store>;

/// Lock: `access`, to read for what leaves the mapping of clusters alone or adds to it,
/// to write for what takes clusters away. It is held while the file is waited for.
struct FormatImage {
    access: RwLock<Access>,
    path: PathBuf,
    readonly: bool,
    /// The format's unit, in bytes.
    cluster: u32,
    /// The file that data are written to, where what is discarded is given back to the host.
    file: Option<std::fs::File>,
    metadata: Option<Metadata>,
    resizable: bool,
}

/// A disk in a format.
pub(crate) struct FormatDisk(Arc<FormatImage>);

impl FormatDisk {
    pub fn new(layer: Layer, path: PathBuf, readonly: bool) -> Self {
        let (access, cluster) = (RwLock::new(layer.access), layer.cluster.max(SECTOR) as u32);
        let Layer { file, metadata, .. } = layer;
        let resizable = layer.vmdk.is_none();
        let image = FormatImage { access, path, readonly, cluster, file, metadata, resizable };
        Self(Arc::new(image))
    }
}

impl BlockBackend for FormatDisk {
    fn info(&self) -> BlockInfo {
        self.0.info()
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.0.serve(&Request::Flush)
    }

    fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
        let failed = |e| ImageError::host(&self.0.path, "cannot start an I/O thread", e);
        Ok(Box::new(WorkerQueue::new(Arc::clone(&self.0) as _).map_err(failed)?))
    }

    fn resize(&self, size: u64) -> Result<(), ImageError> {
        if !self.0.resizable {
            let mend = "convert it to qcow2 before: tetrarch disk convert";
            return Err(ImageError::new(&self.0.path, "vmdk images are not resized", mend));
        }
        let failed = |e| ImageError::host(&self.0.path, "cannot resize the image", e);
        contained(&self.0.path, || {
            let mut access = self.0.access.write();
            let resized = access.resize(size.next_multiple_of(SECTOR), PreallocateMode::None);
            resized
                .and_then(|()| access.flush())
                .and_then(|()| access.sync())
                .and_then(|()| self.0.metadata.as_ref().map_or(Ok(()), Metadata::moved))
                .map_err(|error| too_large(&self.0.path, failed(error)))
        })
    }
}

impl FormatImage {
    /// Moves data between guest memory and the disk, a buffer at a time.
    fn each_chunk(
        data: &ScatterList,
        mut each: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; data.len().min(CHUNK as u64) as usize];
        let mut done = 0;
        while done < data.len() {
            let len = (data.len() - done).min(CHUNK as u64) as usize;
            each(done, &mut buffer[..len])?;
            done += len as u64;
        }
        Ok(())
    }

    /// Writes, but not where the image has its own tables.
    fn write(&self, access: &Access, mut data: &[u8], mut offset: u64) -> io::Result<()> {
        let Some(metadata) = &self.metadata else { return access.write(data, offset) };
        while !data.is_empty() {
            let mapping = access.prepare_data_mapping(offset, data.len() as u64, true)?;
            let length = mapping.length();
            metadata.check(offset, mapping.offset(), length)?;
            let (here, rest) = data.split_at(length as usize);
            mapping.storage().write(here, mapping.offset())?;
            access.commit_data_mapping(mapping)?;
            (data, offset) = (rest, offset + length);
        }
        Ok(())
    }

    /// An error where a part of the disk lies in the image's own tables.
    fn check(&self, access: &Access, offset: u64, length: u64) -> io::Result<()> {
        let Some(metadata) = &self.metadata else { return Ok(()) };
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let (mapping, length) = access.get_mapping(at, end - at)?;
            if let Mapping::Raw { offset, writable: true, .. } = mapping {
                metadata.check(at, offset, length)?;
            }
            at += length.max(1);
        }
        Ok(())
    }

    /// Takes clusters out of the image, and gives their space back to the host. Nobody else
    /// has a cluster that was freed before the lock is gone.
    fn discard(
        &self,
        offset: u64,
        length: u64,
        discard: impl FnOnce(&mut Access) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut access = self.access.write();
        self.check(&access, offset, length)?;
        let whole = u64::from(self.cluster);
        let (mut at, end) = (offset.next_multiple_of(whole), (offset + length) / whole * whole);
        let mut freed = Vec::new();
        while self.file.is_some() && at < end {
            let (mapping, len) = access.get_mapping(at, end - at)?;
            // Only what lies in the image itself can be written to.
            if let Mapping::Raw { offset, writable: true, .. } = mapping {
                freed.push((offset, len));
            }
            at += len.max(1);
        }
        discard(&mut access)?;
        for (offset, len) in freed {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let file = self.file.as_ref();
            // The space is lost to the host alone where its file system knows no holes.
            let _ = file.map(|file| rustix::fs::fallocate(file, mode, offset, len));
        }
        Ok(())
    }

    fn try_serve(&self, request: &Request) -> io::Result<()> {
        match request {
            Request::Read { offset, data } => Self::each_chunk(data, |done, buffer| {
                self.access.read().read(&mut *buffer, offset + done)?;
                data.write_at(done, buffer);
                Ok(())
            }),
            Request::Write { offset, data } => Self::each_chunk(data, |done, buffer| {
                data.read_at(done, buffer);
                self.write(&self.access.read(), buffer, offset + done)
            }),
            Request::Flush => {
                let access = self.access.read();
                access.flush()?;
                access.sync()
            }
            Request::Discard { offset, length } => {
                let discarded = self
                    .discard(*offset, *length, |access| access.discard_to_any(*offset, *length));
                match discarded {
                    // A hint that nothing can be made of.
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                    done => done,
                }
            }
            Request::WriteZeroes { offset, length, unmap: true } => {
                self.discard(*offset, *length, |access| access.discard_to_zero(*offset, *length))
            }
            Request::WriteZeroes { offset, length, unmap: false } => {
                let access = self.access.read();
                self.check(&access, *offset, *length)?;
                access.write_zeroes(*offset, *length)
            }
        }
    }
}

impl Blocking for FormatImage {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            // A disk ends with a whole sector.
            size: self.access.read().size() / SECTOR * SECTOR,
            block_size: SECTOR as u32,
            readonly: self.readonly,
            discards: !self.readonly,
            discard_granularity: self.cluster,
        }
    }

    fn serve(&self, request: &Request) -> Result<(), BlockError> {
        request.check(&self.info())?;
        let served = if self.readonly && matches!(request, Request::Flush) {
            Ok(())
        } else {
            self.try_serve(request)
        };
        served.map_err(|error| {
            let error_of_request = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => BlockError::NoSpace,
                io::ErrorKind::FileTooLarge => BlockError::NoSpace,
                _ => BlockError::Host(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            };
            log::warn!("{}: {error}", self.path.display());
            error_of_request
        })
    }
}

/// An opened file as imago's storage.
pub(crate) fn storage(file: std::fs::File, writes: bool) -> io::Result<Store> {
    let file = File::from_open_file(file, imago::StorageOpenOptions::new().write(writes))?;
    Ok(Arc::new(file))
}

/// The bytes of a storage as a disk.
pub(crate) fn flat(store: Store, writes: bool) -> io::Result<Access> {
    Ok(FormatAccess::new(Raw::open_image(store, writes)?))
}

/// Runs a format's code, which may give up on a damaged image by a panic.
pub(crate) fn contained<T>(
    path: &Path,
    body: impl FnOnce() -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        let mend = "look for damage: tetrarch disk check IMAGE";
        Err(ImageError::new(path, "the image cannot be understood", mend))
    })
}
