//! The text of a VMDK image: which extents hold its disk (VMware's "Virtual Disk Format 5.0",
//! "The Descriptor File").

use std::path::Path;

use crate::ImageError;
use crate::backend::SECTOR;

pub(crate) const MAGIC: &[u8] = b"# Disk DescriptorFile";

/// A descriptor is a page of text; QEMU reads no more of it.
pub(super) const BYTES_MAX: usize = 2 << 20;
/// Each is an open file: VMware's largest disk, 62 TB, has no more of 2 GB.
const EXTENTS_MAX: usize = 32 << 10;
const NO_PARENT: &str = "ffffffff";

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file, and where in it the extent begins, in bytes.
    Flat(String, u64),
    Sparse(String),
    Zero,
    /// The disk's bytes may not be read there.
    NoAccess,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub kind: Kind,
    /// In bytes.
    pub length: u64,
    pub writable: bool,
}

#[derive(Debug, Default)]
pub(super) struct Descriptor {
    /// As `createType` says it.
    pub subformat: String,
    pub extents: Vec<Extent>,
    /// Where the eight digits are that change with the disk, in bytes from the text's begin.
    pub content_id: Option<usize>,
}

impl Descriptor {
    /// Refuses what no disk can be made of. Of an embedded one the extents are not looked at: the
    /// file that it lies in is the only one.
    pub fn parse(text: &str, path: &Path, embedded: bool) -> Result<Self, ImageError> {
        let mut found = Self::default();
        let mut at = 0;
        for whole in text.split_inclusive('\n') {
            let (line, here) = (whole.trim(), at);
            at += whole.len();
            let (word, _) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if matches!(word, "RW" | "RDONLY" | "NOACCESS") {
                if !embedded {
                    found.extents.push(extent(line, path)?);
                }
                if found.extents.len() > EXTENTS_MAX {
                    let what = format!("more than {EXTENTS_MAX} extents");
                    return Err(damaged(path, what));
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim();
            match key.trim() {
                "version" if !matches!(value, "1" | "2" | "3") => {
                    return Err(unsupported(path, &format!("version {value}")));
                }
                "createType" => found.subformat = value.trim_matches('"').to_owned(),
                "CID" if value.len() == 8 => {
                    found.content_id = whole.rfind(value).map(|place| here + place);
                }
                "parentCID" if !value.eq_ignore_ascii_case(NO_PARENT) => {
                    return Err(unsupported(path, "a parent, of which they have the differences"));
                }
                "parentFileNameHint" => {
                    return Err(unsupported(path, "a parent, of which they have the differences"));
                }
                _ => {}
            }
        }
        Ok(found)
    }
}

/// `RW 8192 FLAT "NAME" 0`: access, sectors, kind, file, first sector in it.
fn extent(line: &str, path: &Path) -> Result<Extent, ImageError> {
    let wrong = || damaged(path, format!("its line {:?}", short(line)));
    let (head, rest) = line.split_once('"').unwrap_or((line, ""));
    let mut words = head.split_whitespace();
    let access = words.next().ok_or_else(wrong)?;
    let sectors: u64 = words.next().and_then(|word| word.parse().ok()).ok_or_else(wrong)?;
    let length = sectors.checked_mul(SECTOR).ok_or_else(wrong)?;
    let kind = if access == "NOACCESS" {
        Kind::NoAccess
    } else {
        let kind = words.next().ok_or_else(wrong)?;
        let name = || rest.rsplit_once('"').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong);
        match kind {
            "ZERO" => Kind::Zero,
            "SPARSE" => Kind::Sparse(name()?.0.to_owned()),
            // What VMFS, VMware's file system, keeps as a file of its own is flat as well.
            "FLAT" | "VMFS" => {
                let (name, tail) = name()?;
                let first = tail.split_whitespace().next().map_or(Ok(0), str::parse::<u64>);
                let first = first.ok().and_then(|first| first.checked_mul(SECTOR));
                Kind::Flat(name.to_owned(), first.ok_or_else(wrong)?)
            }
            other => return Err(unsupported(path, &format!("{} extents", short(other)))),
        }
    };
    Ok(Extent { kind, length, writable: access == "RW" })
}

/// Of a text that may be anything.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(60).collect()
}

pub(super) fn damaged(path: &Path, what: impl std::fmt::Display) -> ImageError {
    let mend = "get the file again, or restore the image from a backup";
    ImageError::new(path, format!("damaged vmdk image: {what}"), mend)
}

pub(super) fn unsupported(path: &Path, what: &str) -> ImageError {
    let mend = "convert it: qemu-img convert -f vmdk -O qcow2 OLD NEW";
    ImageError::new(path, format!("vmdk images with {what} are not supported"), mend)
}

/// The text of an image that is made here. Geometries of VMware's are 255 heads and 63 sectors but
/// for the smallest disks (open-vmdk, vmdk/sparse.c).
pub(super) fn text(subformat: &str, path: &Path, size: u64) -> String {
    let sectors = size / SECTOR;
    let cylinders = sectors.div_ceil(255 * 63).min(65535);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().filter(|&c| !c.is_control() && c != '"').collect();
    let id = new_content_id();
    format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={id}\nparentCID={NO_PARENT}\n\
         createType=\"{subformat}\"\n\n# Extent description\nRW {sectors} SPARSE \"{name}\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"255\"\n\
         ddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
    )
}

/// Eight digits that an image did not have before. The two highest numbers have a meaning.
pub(super) fn new_content_id() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let random = RandomState::new().build_hasher().finish();
    format!("{:08x}", random as u32 & 0x7FFF_FFFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Descriptor, String> {
        Descriptor::parse(text, Path::new("disk.vmdk"), false).map_err(|error| error.to_string())
    }

    #[test]
    fn extents_are_read_as_vmware_and_qemu_write_them() {
        let text = "# Disk DescriptorFile\nversion=1\nencoding=\"windows-1252\"\nCID=fb183c20\n\
            parentCID=ffffffff\ncreateType=\"vmfs\"\nRW 16 VMFS \"a b-flat.vmdk\"\n\
            RW 8 FLAT \"x\" 4\r\nRDONLY 4 SPARSE \"s001.vmdk\"\nRW 1 ZERO\nNOACCESS 2\n";
        let found = parse(text).unwrap();
        let kinds: Vec<_> = found.extents.iter().map(|extent| &extent.kind).collect();
        let flat = |name: &str, first| Kind::Flat(name.into(), first);
        assert_eq!(kinds[0], &flat("a b-flat.vmdk", 0));
        assert_eq!(kinds[1], &flat("x", 2048));
        assert_eq!(kinds[2..], [&Kind::Sparse("s001.vmdk".into()), &Kind::Zero, &Kind::NoAccess]);
        assert!(found.extents[0].writable && !found.extents[2].writable);
        assert_eq!((found.subformat.as_str(), found.extents[0].length), ("vmfs", 8192));
        let id = found.content_id.unwrap();
        assert_eq!(&text[id..id + 8], "fb183c20");
    }

    #[test]
    fn what_is_no_disk_here_is_named() {
        for (line, said) in [
            ("RW x FLAT \"a\"", "damaged vmdk image: its line"),
            ("RW 36893488147419103232 FLAT \"a\"", "damaged vmdk image"),
            ("RW 8 FLAT a", "damaged vmdk image"),
            ("RW 8", "damaged vmdk image"),
            ("RW 8 SESPARSE \"a\"", "vmdk images with SESPARSE extents are not supported"),
            ("parentCID=12345678", "a parent, of which they have the differences"),
            ("parentFileNameHint=\"base.vmdk\"", "qemu-img convert -f vmdk"),
            ("version=9", "version 9"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
        assert!(parse("any = thing\n\0\u{ff}").unwrap().extents.is_empty());
    }
}
