//! VMDK images of flat extents: a text that names files which hold the disk's bytes (VMware's
//! "Virtual Disk Format 5.0", "The Descriptor File").

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use imago::file::File as Storage;
use imago::format::gate::ImplicitOpenGate;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use parking_lot::Mutex;

use crate::ImageError;
use crate::backend::SECTOR;
use crate::format::{Access, storage};
use crate::image::open_file;
use crate::qcow2::read_at_most;
use crate::raw::{size_of, take_lock};

pub(crate) const SPARSE: &[u8] = b"KDMV";
pub(crate) const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";

/// A descriptor is a page of text; QEMU reads no more of it.
const DESCRIPTOR_MAX: usize = 2 << 20;

pub(crate) fn open(file: File, path: &Path, writes: bool) -> Result<Access, ImageError> {
    let failed = |error| ImageError::host(path, "cannot use the image", error);
    let text = descriptor(&file, path, writes)?;
    check_extents(&text, path)?;
    let named = StorageOpenOptions::new().filename(path);
    let storage = Storage::from_open_file(file, named).map_err(failed)?;
    let mut image = Vmdk::<Storage>::open_image(storage, false).map_err(failed)?;
    let refused = Arc::default();
    let opened = image.open_implicit_dependencies_gated(Extents(Arc::clone(&refused)));
    opened.map_err(|error| refused.lock().take().unwrap_or_else(|| failed(error)))?;
    Ok(FormatAccess::new(image))
}

fn descriptor(file: &File, path: &Path, writes: bool) -> Result<String, ImageError> {
    let mut bytes = vec![0; size_of(file, path)?.min(DESCRIPTOR_MAX as u64) as usize];
    let there = read_at_most(file, &mut bytes, 0)
        .map_err(|error| ImageError::host(path, "cannot read the image", error))?;
    bytes.truncate(there);
    if bytes.starts_with(SPARSE) {
        let mend = "convert it: qemu-img convert -f vmdk -O qcow2 OLD NEW";
        return Err(ImageError::new(path, "sparse vmdk images are not supported", mend));
    }
    if !bytes.starts_with(DESCRIPTOR) {
        let mend = "give the image's format: format=raw|qcow2|vmdk";
        return Err(ImageError::new(path, "is not a vmdk image", mend));
    }
    if writes {
        let mend = "add readonly or snapshot=on, or convert it: tetrarch disk convert";
        return Err(ImageError::new(path, "vmdk images are not written to", mend));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Refuses extents that are shorter than the descriptor says: what is missing would read as zeroes.
fn check_extents(text: &str, path: &Path) -> Result<(), ImageError> {
    for line in text.lines() {
        let Some((name, needed)) = flat_extent(line) else { continue };
        let extent = path.parent().unwrap_or(Path::new("")).join(name);
        let len = size_of(&open_extent(&extent, path)?, &extent)?;
        if len < needed {
            let cause = format!("has {len} of the {needed} bytes that {} says", path.display());
            return Err(ImageError::new(extent, cause, "get the file again"));
        }
    }
    Ok(())
}

/// `RW 8192 FLAT "NAME" 0`: access, sectors, kind, file, first sector in it. Its name and end.
fn flat_extent(line: &str) -> Option<(&str, u64)> {
    let (head, rest) = line.split_once('"')?;
    let (name, tail) = rest.rsplit_once('"')?;
    let mut words = head.split_whitespace();
    let (_, sectors, kind) = (words.next()?, words.next()?.parse::<u64>().ok()?, words.next()?);
    let first = tail.split_whitespace().next().map_or(Some(0), |word| word.parse().ok())?;
    (kind == "FLAT").then(|| (name, sectors.saturating_add(first).saturating_mul(SECTOR)))
}

fn open_extent(extent: &Path, image: &Path) -> Result<File, ImageError> {
    open_file(extent, false).map_err(|mut error| {
        error.cause = format!("{} (an extent of {})", error.cause, image.display());
        error.mend = "put the file beside the descriptor, or get both again".into();
        error
    })
}

/// Flat files beside the descriptor. What is refused is kept, for its words.
struct Extents(Arc<Mutex<Option<ImageError>>>);

impl ImplicitOpenGate<Storage> for Extents {
    fn open_format<F: FormatDriverBuilder<Storage>>(&mut self, _: F) -> io::Result<Access> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a VMDK over another image"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        let path = options.get_filename().unwrap_or(Path::new(""));
        let file = open_file(path, false).and_then(|file| {
            take_lock(&file, path, false)?;
            Ok(file)
        });
        let file = file.map_err(|error| {
            let text = error.to_string();
            *self.0.lock() = Some(error);
            io::Error::other(text)
        });
        storage(file?, false)
    }
}
