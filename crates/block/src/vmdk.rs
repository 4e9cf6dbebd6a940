//! VMDK images: extents that are files of the disk's bytes, or sparse ones, named by a text that
//! lies beside them or in the only one (VMware's "Virtual Disk Format 5.0"). All of them together
//! are a storage with the disk's bytes, which imago's formats can lie upon.

mod descriptor;
mod sparse;
mod stream;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use parking_lot::Mutex;

pub(crate) use self::descriptor::MAGIC as DESCRIPTOR;
use self::descriptor::{Descriptor, Kind, damaged};
pub(crate) use self::sparse::MAGIC as SPARSE;
use self::sparse::{Sparse, zero_file};
pub(crate) use self::stream::Stream;
use crate::ImageError;
use crate::backend::SECTOR;
use crate::image::open_file;
use crate::qcow2::read_at_most;
use crate::raw::{size_of, take_lock};

/// A table's entry has 32 bits for a sector of the file; as QEMU makes no larger one.
const SPARSE_MAX: u64 = 2 << 40;

enum Data {
    Flat(File, u64),
    Sparse(Box<Sparse>),
    Zero,
    NoAccess,
}

/// Bytes of the disk, and where they are.
struct Part {
    start: u64,
    end: u64,
    data: Data,
    writable: bool,
}

/// Where the image says that its disk is another now: who has differences to it goes by that.
struct ContentId {
    file: File,
    at: u64,
}

/// How often a descriptor may name a file of the disk's bytes: each time it is opened and locked
/// anew.
const EXTENTS_OF_A_FILE: usize = 256;

/// A disk, by its extents.
pub(crate) struct Vmdk {
    parts: Vec<Part>,
    size: u64,
    subformat: String,
    /// Until something was written.
    unchanged: AtomicBool,
    content_id: Mutex<Option<ContentId>>,
    helper: CommonStorageHelper,
}

impl Vmdk {
    pub fn open(file: File, path: &Path, writes: bool) -> Result<Self, ImageError> {
        let mut bytes = vec![0; size_of(&file, path)?.min(descriptor::BYTES_MAX as u64) as usize];
        let there = read_at_most(&file, &mut bytes, 0)
            .map_err(|error| ImageError::host(path, "cannot read the image", error))?;
        bytes.truncate(there);
        if bytes.starts_with(SPARSE) {
            return Self::of_one_file(file, path, writes);
        }
        if !bytes.starts_with(DESCRIPTOR) {
            let mend = "give the image's format: format=raw|qcow2|vmdk";
            return Err(ImageError::new(path, "is not a vmdk image", mend));
        }
        let text = String::from_utf8_lossy(&bytes);
        let mut found = Descriptor::parse(&text, path, false)?;
        // Bytes that are no text are longer there than in the file.
        found.content_id = found.content_id.filter(|_| text.len() == bytes.len());
        let mut parts = Vec::new();
        let mut size = 0u64;
        let mut files = HashMap::new();
        for extent in &found.extents {
            let end = size.checked_add(extent.length).filter(|&end| end <= i64::MAX as u64);
            let end = end.ok_or_else(|| damaged(path, "extents beyond any disk"))?;
            let writable = writes && extent.writable;
            let data = Data::open(extent, path, writable)?;
            if let Some(file) = data.file() {
                let about = file.metadata();
                let about = about.map_err(|e| ImageError::host(path, "cannot use the image", e))?;
                let times: &mut usize = files.entry((about.dev(), about.ino())).or_default();
                *times += 1;
                // A sparse one is a disk with tables of its own.
                let most = if matches!(data, Data::Sparse(_)) { 1 } else { EXTENTS_OF_A_FILE };
                if *times > most {
                    return Err(damaged(path, "a file is too many of its extents"));
                }
            }
            parts.push(Part { start: size, end, data, writable });
            size = end;
        }
        if parts.is_empty() {
            return Err(damaged(path, "it names no extents"));
        }
        Ok(Self::new(parts, found, file, writes))
    }

    fn of_one_file(file: File, path: &Path, writes: bool) -> Result<Self, ImageError> {
        let again = file.try_clone();
        let again = again.map_err(|error| ImageError::host(path, "cannot use the image", error))?;
        let (sparse, embedded) = Sparse::open(file, path, writes)?;
        let end = sparse.size();
        if end > i64::MAX as u64 {
            return Err(damaged(path, "a disk beyond any size"));
        }
        let mut found = embedded.unwrap_or_default();
        if found.subformat.is_empty() {
            let packed = sparse.is_packed();
            found.subformat = if packed { "streamOptimized" } else { "sparse extent" }.into();
        }
        let data = Data::Sparse(Box::new(sparse));
        Ok(Self::new(vec![Part { start: 0, end, data, writable: writes }], found, again, writes))
    }

    fn new(parts: Vec<Part>, found: Descriptor, file: File, writes: bool) -> Self {
        let at = found.content_id.filter(|_| writes);
        Self {
            size: parts.last().map_or(0, |part| part.end),
            parts,
            subformat: found.subformat,
            unchanged: AtomicBool::new(true),
            content_id: Mutex::new(at.map(|at| ContentId { file, at: at as u64 })),
            helper: CommonStorageHelper::default(),
        }
    }

    /// Makes an empty image, which grows.
    pub fn create(file: &File, path: &Path, size: u64) -> Result<(), ImageError> {
        if size > SPARSE_MAX {
            let mend = "give at most 2T, or --format qcow2";
            return Err(ImageError::new(path, format!("a vmdk image of {size} bytes"), mend));
        }
        sparse::create(file, path, size)
            .map_err(|error| ImageError::host(path, "cannot make the image", error))
    }

    /// As VMware names kinds of images.
    pub fn subformat(&self) -> &str {
        &self.subformat
    }

    /// How many bytes from `offset` on are known to be zeroes, without reading them.
    pub fn hole(&self, offset: u64) -> io::Result<u64> {
        let Some(part) = self.part(offset) else { return Ok(0) };
        match &part.data {
            Data::Zero => Ok(part.end - offset),
            Data::Sparse(sparse) => Ok(sparse.hole(offset - part.start)?.min(part.end - offset)),
            Data::Flat(..) | Data::NoAccess => Ok(0),
        }
    }

    fn part(&self, offset: u64) -> Option<&Part> {
        let index = self.parts.partition_point(|part| part.end <= offset);
        self.parts.get(index)
    }

    /// Calls `each` with a part, the place in it, and how many bytes are there.
    fn each(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(&Part, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let at = offset.checked_add(done).ok_or(io::ErrorKind::UnexpectedEof)?;
            let part = self.part(at).ok_or(io::ErrorKind::UnexpectedEof)?;
            let here = (part.end - at).min(length - done);
            each(part, at - part.start, here)?;
            done += here;
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        self.each(offset, rest.len() as u64, |part, at, length| {
            let (here, behind) = std::mem::take(&mut rest).split_at_mut(length as usize);
            rest = behind;
            match &part.data {
                Data::Flat(file, first) => file.read_exact_at(here, first + at),
                Data::Sparse(sparse) => sparse.read(at, here),
                Data::Zero => {
                    here.fill(0);
                    Ok(())
                }
                Data::NoAccess => Err(io::Error::other("an extent that may not be accessed")),
            }
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change()?;
        let mut rest = data;
        self.each(offset, rest.len() as u64, |part, at, length| {
            let (here, behind) = rest.split_at(length as usize);
            rest = behind;
            match &part.data {
                Data::Flat(file, first) if part.writable => file.write_all_at(here, first + at),
                Data::Sparse(sparse) if part.writable => sparse.write(at, here),
                _ => Err(io::Error::other("an extent that may not be written to")),
            }
        })
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change()?;
        self.each(offset, length, |part, at, length| match &part.data {
            Data::Zero => Ok(()),
            Data::Flat(file, first) if part.writable => zero_file(file, first + at, length),
            Data::Sparse(sparse) if part.writable => sparse.zero(at, length),
            _ => Err(io::Error::other("an extent that may not be written to")),
        })
    }

    /// Says in the image that its disk is another one from now on ("The Descriptor File", CID).
    fn change(&self) -> io::Result<()> {
        if self.unchanged.swap(false, Ordering::Relaxed)
            && let Some(ContentId { file, at }) = self.content_id.lock().take()
        {
            file.write_all_at(descriptor::new_content_id().as_bytes(), at)?;
        }
        Ok(())
    }
}

impl Data {
    fn open(extent: &descriptor::Extent, path: &Path, writes: bool) -> Result<Self, ImageError> {
        let (Kind::Flat(name, _) | Kind::Sparse(name)) = &extent.kind else {
            let zero = extent.kind == Kind::Zero;
            return Ok(if zero { Self::Zero } else { Self::NoAccess });
        };
        let place = path.parent().unwrap_or(Path::new("")).join(name);
        let file = open_file(&place, writes).map_err(|mut error| {
            error.cause = format!("{} (an extent of {})", error.cause, path.display());
            error.mend = "put the file beside the descriptor, or get both again".into();
            error
        })?;
        take_lock(&file, &place, writes)?;
        let (data, there, first) = match &extent.kind {
            Kind::Flat(_, first) => {
                let there = size_of(&file, &place)?;
                (Self::Flat(file, *first), there, *first)
            }
            _ => {
                let mut magic = [0; 4];
                let read = read_at_most(&file, &mut magic, 0);
                read.map_err(|e| ImageError::host(&place, "cannot read the image", e))?;
                if magic != SPARSE {
                    return Err(damaged(&place, "it is no sparse extent, as its descriptor says"));
                }
                let (sparse, _) = Sparse::open(file, &place, writes)?;
                let there = sparse.size();
                (Self::Sparse(Box::new(sparse)), there, 0)
            }
        };
        let needed = first.saturating_add(extent.length);
        if there < needed {
            // What is missing would read as zeroes.
            let cause = format!("has {there} of the {needed} bytes that {} says", path.display());
            return Err(ImageError::new(place, cause, "get the file again"));
        }
        Ok(data)
    }

    fn file(&self) -> Option<&File> {
        match self {
            Self::Flat(file, _) => Some(file),
            Self::Sparse(sparse) => Some(sparse.file()),
            Self::Zero | Self::NoAccess => None,
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self {
            Self::Flat(file, _) => file.sync_data(),
            Self::Sparse(sparse) => sparse.sync(),
            Self::Zero | Self::NoAccess => Ok(()),
        }
    }
}

impl fmt::Debug for Vmdk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmdk").field("size", &self.size).finish_non_exhaustive()
    }
}

impl fmt::Display for Vmdk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmdk[{}]", self.subformat)
    }
}

/// The trait's functions are unsafe to call since they ask for what [`imago::StorageExt`] sees to;
/// none of them relies on it here.
impl Storage for Vmdk {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size / SECTOR * SECTOR)
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut part in bufv.into_inner() {
            let here = self.size.saturating_sub(offset).min(part.len() as u64) as usize;
            self.read(offset, &mut part[..here])?;
            // A storage reads as zeroes behind its end.
            part[here..].fill(0);
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for part in bufv.into_inner() {
            self.write(offset, &part)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.parts.iter().filter(|part| part.writable).try_for_each(|part| part.data.sync())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}
