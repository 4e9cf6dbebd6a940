//! From a path to a disk: which format, which files behind it, whose lock, and what is
//! thrown away at the end.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder};
use rustix::fs::OFlags;

use crate::check;
use crate::foreign;
use crate::format::{Access, FormatDisk, Store, contained, flat, storage};
use crate::metadata::Metadata;
use crate::qcow2::{self, Qcow2Header};
use crate::raw::take_lock;
use crate::vmdk::{self, Vmdk};
use crate::{BlockBackend, Cache, ImageError, RawDisk, RawOptions};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
}

impl Format {
    pub const ALL: [Self; 3] = [Self::Raw, Self::Qcow2, Self::Vmdk];

    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }

    /// What the first bytes of an image say that it is.
    pub fn of(first: &[u8]) -> Self {
        if first.starts_with(&qcow2::MAGIC) {
            Self::Qcow2
        } else if first.starts_with(vmdk::SPARSE) || first.starts_with(vmdk::DESCRIPTOR) {
            Self::Vmdk
        } else {
            Self::Raw
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}: no format")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub struct ImageOptions {
    /// By the image's first bytes where it is not given.
    pub format: Option<Format>,
    pub readonly: bool,
    pub cache: Cache,
    /// What is written is gone at the end; the image stays as it is.
    pub snapshot: bool,
}

/// Opens the disk that an image is, by descriptors of its files: `files` are that of the image, then
/// of its backing files from the top down. `path` is what it is called.
pub fn open_handed(
    path: &Path,
    files: Vec<File>,
    options: ImageOptions,
) -> Result<Box<dyn BlockBackend>, ImageError> {
    let mut chain = Chain { handed: Some(files.into()), ..Chain::default() };
    let format = match options.format {
        Some(format) => format,
        None => chain.guess(path)?,
    };
    if options.snapshot || options.cache == Cache::None || format == Format::Vmdk {
        let cause = "vmdk images, snapshot=on and cache=none need more than descriptors";
        return Err(ImageError::new(path, cause, "let the machine open the path: --allow"));
    }
    let writes = !options.readonly;
    let disk: Box<dyn BlockBackend> = if format == Format::Raw {
        let guessed = options.format.is_none();
        let raw = RawOptions { readonly: options.readonly, cache: Cache::Writeback, guessed };
        Box::new(RawDisk::of_file(chain.file(path, writes)?, path, raw)?)
    } else {
        let layer = chain.layer(path, format, writes)?;
        Box::new(FormatDisk::new(layer, path.to_owned(), options.readonly))
    };
    if chain.handed.is_some_and(|left| !left.is_empty()) {
        let cause = "has fewer backing files than there are descriptors";
        return Err(ImageError::new(path, cause, "give one for each file of the image"));
    }
    Ok(disk)
}

/// Opens the disk that an image is.
pub fn open(path: &Path, options: ImageOptions) -> Result<Box<dyn BlockBackend>, ImageError> {
    let format = match options.format {
        Some(format) => format,
        None => guess_format(path)?,
    };
    if format == Format::Raw && !options.snapshot {
        let guessed = options.format.is_none();
        let raw = RawOptions { readonly: options.readonly, cache: options.cache, guessed };
        return Ok(Box::new(RawDisk::open(path, raw)?));
    }
    let writes = !options.readonly && !options.snapshot;
    let mut chain = Chain::default();
    let layer = chain.layer(path, format, writes)?;
    if options.snapshot {
        let overlay = contained(path, || overlay(layer.access, path))?;
        return Ok(Box::new(FormatDisk::new(overlay, path.to_owned(), options.readonly)));
    }
    Ok(Box::new(FormatDisk::new(layer, path.to_owned(), options.readonly)))
}

pub(crate) struct Layer {
    pub access: Access,
    pub cluster: u64,
    /// What is written to, where clusters come and go.
    pub file: Option<File>,
    /// Of one that is written to and that others have made.
    pub metadata: Option<Metadata>,
    /// What `access` goes to, where that is such an image.
    pub vmdk: Option<Arc<Vmdk>>,
}

impl Layer {
    fn plain(access: Access) -> Self {
        Self { access, cluster: 0, file: None, metadata: None, vmdk: None }
    }
}

/// The images that one consists of, from the top down.
#[derive(Default)]
pub(crate) struct Chain {
    /// Device and inode of each.
    seen: Vec<(u64, u64)>,
    /// Their files, where they are not opened by their paths.
    handed: Option<VecDeque<File>>,
}

/// QEMU has no limit; each layer is an open file, and looked through by every read.
const MAX_LAYERS: usize = 64;

impl Chain {
    pub fn layer(
        &mut self,
        path: &Path,
        format: Format,
        writes: bool,
    ) -> Result<Layer, ImageError> {
        let host = |what| move |error| ImageError::host(path, what, error);
        let file = self.file(path, writes)?;
        let metadata = file.metadata().map_err(host("cannot open the image"))?;
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) {
            let cause = "the chain of backing files comes back to this image";
            let mend = "give an image of the chain another backing file: qemu-img rebase -u";
            return Err(ImageError::new(path, cause, mend));
        }
        if self.seen.len() == MAX_LAYERS {
            let cause = format!("a chain of more than {MAX_LAYERS} backing files");
            let mend = "merge some: qemu-img commit, or qemu-img convert -O qcow2";
            return Err(ImageError::new(path, cause, mend));
        }
        self.seen.push(identity);
        take_lock(&file, path, writes)?;
        let failed = host("cannot use the image");
        match format {
            Format::Raw => {
                let storage = storage(file, writes).map_err(&failed)?;
                Ok(Layer::plain(flat(storage, writes).map_err(&failed)?))
            }
            Format::Qcow2 => {
                let header = Qcow2Header::read(&file, path)?;
                check_writable(&header, path, writes)?;
                let backing = self.backing(&header, path)?;
                if check::is_cut(&file, &header).map_err(&failed)? {
                    let mend = "get the file again, or save what is left: qemu-img convert";
                    let cause = "damaged qcow2 image: its file ends before its data do";
                    return Err(ImageError::new(path, cause, mend));
                }
                let again = writes.then(|| file.try_clone()).transpose().map_err(&failed)?;
                let metadata = if writes { Some(own_tables(&file, path, &header)?) } else { None };
                let storage = storage(file, writes).map_err(&failed)?;
                let mut image = Qcow2::<Store>::open_image(storage, writes).map_err(&failed)?;
                image.set_data_file(None);
                image.set_backing(backing);
                let cluster = header.cluster_size();
                let access = FormatAccess::new(image);
                Ok(Layer { access, cluster, file: again, metadata, vmdk: None })
            }
            Format::Vmdk => {
                let vmdk = Arc::new(Vmdk::open(file, path, writes)?);
                let access = flat(Arc::clone(&vmdk) as Store, writes).map_err(&failed)?;
                Ok(Layer { vmdk: Some(vmdk), ..Layer::plain(access) })
            }
        }
    }

    fn file(&mut self, path: &Path, writes: bool) -> Result<File, ImageError> {
        let Some(handed) = &mut self.handed else { return open_file(path, writes) };
        let file = handed.pop_front().ok_or_else(|| no_descriptor(path))?;
        let failed = |errno: rustix::io::Errno| {
            ImageError::host(path, "cannot use the descriptor", errno.into())
        };
        let mode = rustix::fs::fcntl_getfl(&file).map_err(failed)? & OFlags::ACCMODE;
        if mode != OFlags::RDWR && (writes || mode != OFlags::RDONLY) {
            let cause =
                format!("its descriptor is not for {}", if writes { "both" } else { "reading" });
            return Err(ImageError::new(path, cause, "open it for reading, or for both to write"));
        }
        plain_file(file, path)
    }

    /// Of the next file.
    fn guess(&self, path: &Path) -> Result<Format, ImageError> {
        match self.handed.as_ref().map(VecDeque::front) {
            None => guess_format(path),
            Some(Some(file)) => guess_format_of(file, path),
            Some(None) => Err(no_descriptor(path)),
        }
    }

    fn backing(
        &mut self,
        header: &Qcow2Header,
        image: &Path,
    ) -> Result<Option<Access>, ImageError> {
        let Some(name) = &header.backing else { return Ok(None) };
        let path = backing_path(image, name)?;
        let named = |mut error: ImageError| {
            if error.path == path {
                error.cause = format!("{} (the backing file of {})", error.cause, image.display());
                if !path.exists() {
                    error.mend = "put it there, or name another: qemu-img rebase -u".into();
                }
            }
            error
        };
        let format = match &header.backing_format {
            Some(format) => format.parse().map_err(|UnknownFormat(_)| {
                let cause = format!("its backing file {name} has the format {format}");
                let mend = format!("convert that: qemu-img convert -f {format} -O qcow2 OLD NEW");
                ImageError::new(image, cause, mend)
            })?,
            // A guest that had the backing file as a raw disk can have made it look
            // like an image over any file of the host.
            None => match self.guess(&path).map_err(named)? {
                Format::Raw => Format::Raw,
                other => {
                    let cause = format!("it does not say that its backing file is {other}");
                    let mend =
                        format!("write it down: qemu-img rebase -u -F {other} -b {name} IMAGE");
                    return Err(ImageError::new(image, cause, mend));
                }
            },
        };
        let layer = self.layer(&path, format, false).map_err(named)?;
        Ok(Some(layer.access))
    }
}

/// The path of a backing file, which may be relative to the folder of its image.
pub fn backing_path(image: &Path, name: &str) -> Result<PathBuf, ImageError> {
    // QEMU's block/qapi.c, path_has_protocol: nbd://, ssh://, json:{…}, fat:, …
    let protocol = name.split_once(':').map(|(protocol, _)| protocol);
    if let Some(protocol) = protocol.filter(|name| !name.contains('/')) {
        if let (Some(rest), "file") = (name.strip_prefix("file:"), protocol) {
            return Ok(image.parent().unwrap_or(Path::new("")).join(rest));
        }
        let cause = format!("its backing file {name} is not a file");
        let there = image.parent().unwrap_or(Path::new("")).join(name).exists();
        let mend = if there {
            format!("write it as ./{name}: what stands before a colon is a protocol")
        } else {
            "copy that into a file: qemu-img convert -O qcow2 OLD NEW".into()
        };
        return Err(ImageError::new(image, cause, mend));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(name))
}

fn check_writable(header: &Qcow2Header, path: &Path, writes: bool) -> Result<(), ImageError> {
    if header.dirty {
        let cause = "the image was not closed, and its refcounts are behind";
        let mend = "bring them up to date: tetrarch disk check --repair IMAGE";
        return Err(ImageError::new(path, cause, mend));
    }
    if header.snapshots > 0 && writes {
        let cause = format!("the image has internal snapshots ({})", header.snapshots);
        let mend = "add readonly or snapshot=on, or make a copy: qemu-img convert -O qcow2 OLD NEW";
        return Err(ImageError::new(path, cause, mend));
    }
    Ok(())
}

fn own_tables(file: &File, path: &Path, header: &Qcow2Header) -> Result<Metadata, ImageError> {
    let failed = |error| ImageError::host(path, "cannot use the image", error);
    let again = file.try_clone().map_err(failed)?;
    let metadata = Metadata::read(again, path, header).map_err(failed)?;
    if let Some(what) = metadata.uncounted().map_err(failed)? {
        let cause = format!("damaged qcow2 image: its refcounts leave out {what}");
        let mend = "repair it: qemu-img check -r all IMAGE";
        return Err(ImageError::new(path, cause, mend));
    }
    Ok(metadata)
}

/// Clusters of an overlay that is thrown away: small, since most writes are.
const OVERLAY_CLUSTER: u64 = 64 << 10;

/// An image over `base` in a file without a name, which ends with the process.
fn overlay(base: Access, path: &Path) -> Result<Layer, ImageError> {
    // As QEMU does: /tmp may be memory.
    let folder = std::env::var_os("TMPDIR").map_or("/var/tmp".into(), PathBuf::from);
    let failed = |error| ImageError {
        mend: "set TMPDIR to a folder with room that you can write to".into(),
        ..ImageError::host(&folder, "cannot make the overlay of snapshot=on", error)
    };
    let file = tempfile::tempfile_in(&folder).map_err(failed)?;
    let again = file.try_clone().map_err(failed)?;
    let size = base.size();
    let create = Qcow2::<Store>::create_builder(storage(file, true).map_err(failed)?)
        .size(size)
        .cluster_size(OVERLAY_CLUSTER as usize);
    let deny = imago::DenyImplicitOpenGate::default();
    let opened = create.create_open(deny, |file| {
        Ok(Qcow2::<Store>::builder(file).write(true).backing(Some(base)))
    });
    let overlay = opened.map_err(|e| ImageError::host(path, "cannot make its overlay", e))?;
    let access = FormatAccess::new(overlay);
    Ok(Layer { cluster: OVERLAY_CLUSTER, file: Some(again), ..Layer::plain(access) })
}

fn no_descriptor(path: &Path) -> ImageError {
    let mend = "give one for each file of the image";
    ImageError::new(path, "there is no descriptor of it", mend)
}

/// Opens a file or block device, and nothing that would wait or wind.
pub(crate) fn open_file(path: &Path, writes: bool) -> Result<File, ImageError> {
    let failed = |error| ImageError::host(path, "cannot open the image", error);
    let mut open = OpenOptions::new();
    let open = open.read(true).write(writes).custom_flags(libc::O_NONBLOCK);
    let file = open.open(path).map_err(|error| match error.raw_os_error() {
        // What open(2) says of a socket, or of a device that is not there.
        Some(libc::ENXIO) => not_an_image(path),
        _ => failed(error),
    })?;
    plain_file(file, path)
}

/// Refuses what is neither a file nor a block device.
fn plain_file(file: File, path: &Path) -> Result<File, ImageError> {
    let failed = |error| ImageError::host(path, "cannot open the image", error);
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        if kind.is_dir() {
            return Err(ImageError::new(path, "is a directory", "give the path of an image"));
        }
        return Err(not_an_image(path));
    }
    // io_uring would take the flag for the wish not to wait for the disk either.
    rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| failed(errno.into()))?;
    Ok(file)
}

fn not_an_image(path: &Path) -> ImageError {
    ImageError::new(path, "is neither a file nor a block device", "give the path of an image")
}

/// The format that an image's first bytes speak of. One that is of no use here is refused: its
/// bytes are no disk, and would be damaged by a guest that takes them for one.
pub fn guess_format(path: &Path) -> Result<Format, ImageError> {
    guess_format_of(&open_file(path, false)?, path)
}

fn guess_format_of(file: &File, path: &Path) -> Result<Format, ImageError> {
    let first = first_bytes(file, path)?;
    let format = Format::of(&first);
    if format == Format::Raw {
        foreign::refuse(file, &first, path)?;
    }
    Ok(format)
}

pub(crate) fn first_bytes(file: &File, path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![0; 512];
    let read = file.read_at(&mut bytes, 0);
    bytes.truncate(read.map_err(|e| ImageError::host(path, "cannot read the image", e))?);
    Ok(bytes)
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
