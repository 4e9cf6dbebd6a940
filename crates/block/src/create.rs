//! New images, and copies of images in another format.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, Mapping};

use crate::backend::SECTOR;
use crate::format::{Access, Store, contained, flat, storage};
use crate::image::{Chain, Layer, backing_path, guess_format, open_file};
use crate::new_file::NewFile;
use crate::qcow2::Qcow2Header;
use crate::raw::size_of;
use crate::vmdk::{Stream, Vmdk};
use crate::{Format, ImageError};

/// What a new image is to be.
#[derive(Debug, Clone, Default)]
pub struct NewImage {
    /// In bytes; a backing file's size where it is not given.
    pub size: Option<u64>,
    /// The file over which it is written, relative to the image's folder, and its format.
    pub backing: Option<(String, Format)>,
    /// Of qcow2, a power of two.
    pub cluster_size: Option<u64>,
}

/// Makes an image where there is no file yet, and gives its size.
pub fn create(path: &Path, format: Format, new: &NewImage) -> Result<u64, ImageError> {
    let size = match (new.size, &new.backing) {
        (Some(size), _) => size,
        (None, Some((name, format))) => {
            let base = backing_path(path, name)?;
            Chain::default().layer(&base, *format, false)?.access.size()
        }
        (None, None) => return Err(ImageError::new(path, "has no size", "give one, such as 8G")),
    };
    if let Some((name, format)) = &new.backing {
        // It has to be there, and to be what it is said to be.
        Chain::default().layer(&backing_path(path, name)?, *format, false)?;
    }
    let (_, file) = make(path, format, size, new)?;
    file.finish()?;
    Ok(size)
}

/// The image, and the file that it is in, which has no name yet.
fn make(
    path: &Path,
    format: Format,
    size: u64,
    new: &NewImage,
) -> Result<(Access, NewFile), ImageError> {
    if size == 0 || !size.is_multiple_of(SECTOR) || size > i64::MAX as u64 {
        let cause = format!("a disk of {size} bytes");
        return Err(ImageError::new(path, cause, "give a multiple of 512, from 512 to 2^63"));
    }
    let file = NewFile::open(path)?;
    let shared = file.share();
    let shared = shared.map_err(|error| ImageError::host(path, "cannot make the image", error))?;
    Ok((format_file(shared, path, format, size, new)?, file))
}

fn format_file(
    file: File,
    path: &Path,
    format: Format,
    size: u64,
    new: &NewImage,
) -> Result<Access, ImageError> {
    let failed = |error| ImageError::host(path, "cannot make the image", error);
    if new.backing.is_some() && format != Format::Qcow2 {
        let mend = "give --format qcow2";
        return Err(ImageError::new(path, format!("a {format} image has no backing file"), mend));
    }
    match format {
        Format::Raw => {
            file.set_len(size).map_err(failed)?;
            flat(storage(file, true).map_err(failed)?, true).map_err(failed)
        }
        Format::Qcow2 => {
            let mut builder =
                Qcow2::<_, Access>::create_builder(storage(file, true).map_err(failed)?).size(size);
            if let Some((name, format)) = &new.backing {
                builder = builder.backing(name.clone(), format.name().into());
            }
            if let Some(cluster) = new.cluster_size {
                if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
                    let mend = "give a power of two from 512 to 2M";
                    let cause = format!("clusters of {cluster} bytes");
                    return Err(ImageError::new(path, cause, mend));
                }
                builder = builder.cluster_size(cluster as usize);
            }
            let deny = imago::DenyImplicitOpenGate::default();
            let image = builder
                .create_open(deny, |file| {
                    use imago::FormatDriverBuilder;
                    Ok(Qcow2::<_, Access>::builder(file).backing(None).write(true))
                })
                .map_err(|error| too_large(path, failed(error)))?;
            let access = FormatAccess::new(image);
            access.flush().and_then(|()| access.sync()).map_err(failed)?;
            Ok(access)
        }
        Format::Vmdk => {
            Vmdk::create(&file, path, size)?;
            let vmdk: Store = Arc::new(Vmdk::open(file, path, true)?);
            flat(vmdk, true).map_err(failed)
        }
    }
}

/// What is no error of the host's is a table that would be too large.
pub(crate) fn too_large(path: &Path, error: ImageError) -> ImageError {
    if error.source.as_ref().is_some_and(|source| source.raw_os_error().is_some()) {
        return error;
    }
    let mend = "give a smaller size, or larger clusters: --cluster-size 2M";
    ImageError::new(path, error.cause, mend)
}

/// What a copy is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Image(Format),
    /// A VMDK image of compressed grains, to be read alone.
    StreamOptimized,
}

/// An image that is copied.
pub struct Source {
    access: Access,
    vmdk: Option<Arc<Vmdk>>,
    path: PathBuf,
}

impl Source {
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self, ImageError> {
        let format = match format {
            Some(format) => format,
            None => guess_format(path)?,
        };
        let Layer { access, vmdk, .. } = Chain::default().layer(path, format, false)?;
        Ok(Self { access, vmdk, path: path.to_owned() })
    }

    pub fn size(&self) -> u64 {
        self.access.size()
    }

    /// Copies the disk into a new image, without its zeroes. `progress` hears how many
    /// bytes are done and ends the copy by `false`; what was made is gone then.
    pub fn copy(
        &self,
        path: &Path,
        target: Target,
        mut progress: impl FnMut(u64) -> bool,
    ) -> Result<bool, ImageError> {
        let size = self.size().next_multiple_of(SECTOR);
        let writing = |error| ImageError::host(path, "cannot write the image", error);
        let (mut sink, file) = match target {
            Target::Image(format) => {
                let (access, file) = make(path, format, size, &NewImage::default())?;
                (Sink::Access(access), file)
            }
            Target::StreamOptimized => {
                let file = NewFile::open(path)?;
                let shared = file.share().map_err(writing)?;
                (Sink::Stream(Stream::create(shared, path, size).map_err(writing)?), file)
            }
        };
        let whole = contained(&self.path, || self.copy_to(&mut sink, path, &mut progress))?;
        if whole {
            sink.finish().map_err(writing)?;
            file.finish()?;
        }
        Ok(whole)
    }

    /// Whether there are only zeroes from `at` on, as the image says by itself, and for how long.
    fn step(&self, at: u64) -> io::Result<(bool, u64)> {
        let rest = self.size() - at;
        let (mapping, length) = self.access.get_mapping(at, rest)?;
        let hole = self.vmdk.as_ref().map_or(Ok(0), |vmdk| vmdk.hole(at))?;
        if matches!(mapping, Mapping::Zero { .. }) {
            return Ok((true, length.clamp(1, rest)));
        }
        if hole > 0 {
            return Ok((true, hole.min(rest)));
        }
        Ok((false, length.clamp(1, rest).min(STEP)))
    }

    fn copy_to(
        &self,
        target: &mut Sink,
        path: &Path,
        progress: &mut impl FnMut(u64) -> bool,
    ) -> Result<bool, ImageError> {
        let reading = |error: io::Error| {
            let damaged = self.vmdk.is_some() && error.raw_os_error().is_none();
            let mut error = ImageError::host(&self.path, "cannot read the image", error);
            if damaged {
                // There is nothing to repair it by.
                error.mend = "get the file again, or restore the image from a backup".into();
            }
            error
        };
        let writing = |error| ImageError::host(path, "cannot write the image", error);
        let mut buffer = vec![0; STEP as usize];
        let (mut at, mut told) = (0, 0);
        // Source and target can be used.
        if !progress(0) {
            return Ok(false);
        }
        while at < self.size() {
            let (mut zero, mut len) = self.step(at).map_err(reading)?;
            if let Sink::Stream(_) = target {
                // Grains are written once, and whole.
                zero = zero && len >= STEP;
                len = if zero { len / STEP * STEP } else { STEP.min(self.size() - at) };
            }
            if zero {
                target.skip(len).map_err(writing)?;
            } else {
                let part = &mut buffer[..len as usize];
                self.access.read(&mut *part, at).map_err(reading)?;
                target.write(at, part).map_err(writing)?;
            }
            at += len;
            if at - told >= STEP || at == self.size() {
                told = at;
                if !progress(at) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Where a copy goes.
enum Sink {
    Access(Access),
    Stream(Stream),
}

impl Sink {
    fn skip(&mut self, length: u64) -> io::Result<()> {
        match self {
            Self::Access(_) => Ok(()),
            Self::Stream(stream) => stream.skip(length),
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Access(access) => write_sparse(access, at, data),
            Self::Stream(stream) => stream.write(data),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Access(access) => access.flush().and_then(|()| access.sync()),
            Self::Stream(stream) => stream.finish(),
        }
    }
}

/// Bytes that are copied at a time, and the least of zeroes that are left out.
const STEP: u64 = 4 << 20;
const HOLE: usize = 64 << 10;

fn write_sparse(target: &Access, at: u64, data: &[u8]) -> io::Result<()> {
    let mut start = None;
    for (index, part) in data.chunks(HOLE).enumerate() {
        let here = index * HOLE;
        if part.iter().all(|&byte| byte == 0) {
            if let Some(start) = start.take() {
                target.write(&data[start..here], at + start as u64)?;
            }
        } else {
            start.get_or_insert(here);
        }
    }
    match start {
        Some(start) => target.write(&data[start..], at + start as u64),
        None => Ok(()),
    }
}

/// What an image is, seen from outside.
#[derive(Debug)]
pub struct Description {
    pub format: Format,
    /// Of the disk, in bytes.
    pub size: u64,
    /// What the file takes on the host.
    pub allocated: u64,
    pub qcow2: Option<Qcow2Header>,
    /// Of a VMDK image, as VMware names it.
    pub subformat: Option<String>,
}

/// Looks at an image, whoever uses it and whether or not its backing files are there.
pub fn describe(path: &Path, format: Option<Format>) -> Result<Description, ImageError> {
    let file = open_file(path, false)?;
    let format = match format {
        Some(format) => format,
        None => guess_format(path)?,
    };
    let metadata = file.metadata().map_err(|e| ImageError::host(path, "cannot be looked at", e))?;
    let allocated = metadata.blocks() * SECTOR;
    let (size, qcow2, subformat) = match format {
        Format::Raw => (size_of(&file, path)?, None, None),
        Format::Qcow2 => {
            let header = Qcow2Header::read(&file, path)?;
            (header.size, Some(header), None)
        }
        Format::Vmdk => {
            let layer = Chain::default().layer(path, format, false)?;
            let subformat = layer.vmdk.map(|vmdk| vmdk.subformat().to_owned());
            (layer.access.size(), None, subformat)
        }
    };
    Ok(Description { format, size, allocated, qcow2, subformat })
}
