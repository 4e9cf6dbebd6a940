//! New images, and copies of images in another format.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping};

use crate::backend::SECTOR;
use crate::format::{Access, contained, storage};
use crate::image::{Chain, backing_path, guess_format, open_file};
use crate::new_file::NewFile;
use crate::qcow2::Qcow2Header;
use crate::raw::size_of;
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
    match format {
        Format::Raw => {
            if new.backing.is_some() {
                let mend = "give --format qcow2";
                return Err(ImageError::new(path, "a raw image has no backing file", mend));
            }
            file.set_len(size).map_err(failed)?;
            let raw = Raw::open_image(storage(file, true).map_err(failed)?, true);
            Ok(FormatAccess::new(raw.map_err(failed)?))
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
            let mend = "give --format raw or --format qcow2";
            Err(ImageError::new(path, "vmdk images are not written", mend))
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

/// An image that is copied.
pub struct Source {
    access: Access,
    path: PathBuf,
}

impl Source {
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self, ImageError> {
        let format = match format {
            Some(format) => format,
            None => guess_format(path)?,
        };
        let access = Chain::default().layer(path, format, false)?.access;
        Ok(Self { access, path: path.to_owned() })
    }

    pub fn size(&self) -> u64 {
        self.access.size()
    }

    /// Copies the disk into a new image, without its zeroes. `progress` hears how many
    /// bytes are done and ends the copy by `false`; what was made is gone then.
    pub fn copy(
        &self,
        path: &Path,
        format: Format,
        mut progress: impl FnMut(u64) -> bool,
    ) -> Result<bool, ImageError> {
        let size = self.size().next_multiple_of(SECTOR);
        let (target, file) = make(path, format, size, &NewImage::default())?;
        let whole = contained(&self.path, || self.copy_to(&target, path, &mut progress))?;
        if whole {
            file.finish()?;
        }
        Ok(whole)
    }

    fn copy_to(
        &self,
        target: &Access,
        path: &Path,
        progress: &mut impl FnMut(u64) -> bool,
    ) -> Result<bool, ImageError> {
        let reading = |error| ImageError::host(&self.path, "cannot read the image", error);
        let writing = |error| ImageError::host(path, "cannot write the image", error);
        let mut buffer = vec![0; STEP as usize];
        let (mut at, mut told) = (0, 0);
        // Source and target can be used.
        if !progress(0) {
            return Ok(false);
        }
        while at < self.size() {
            let (mapping, length) =
                self.access.get_mapping(at, self.size() - at).map_err(reading)?;
            let zero = matches!(mapping, Mapping::Zero { .. });
            let len = length.min(if zero { u64::MAX } else { STEP }).max(1).min(self.size() - at);
            if !zero {
                let part = &mut buffer[..len as usize];
                self.access.read(&mut *part, at).map_err(reading)?;
                write_sparse(target, at, part).map_err(writing)?;
            }
            at += len;
            if at - told >= STEP || at == self.size() {
                told = at;
                if !progress(at) {
                    return Ok(false);
                }
            }
        }
        target.flush().and_then(|()| target.sync()).map_err(writing)?;
        Ok(true)
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
    let (size, qcow2) = match format {
        Format::Raw => (size_of(&file, path)?, None),
        Format::Qcow2 => {
            let header = Qcow2Header::read(&file, path)?;
            (header.size, Some(header))
        }
        Format::Vmdk => (Chain::default().layer(path, format, false)?.access.size(), None),
    };
    Ok(Description { format, size, allocated, qcow2 })
}
