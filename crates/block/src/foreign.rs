//! What is taken for no raw disk: images in formats that are not read here, files that are packed,
//! and files whose names say another format.

use std::fs::File;
use std::path::Path;

use crate::ImageError;

/// First bytes of formats, where they stand, and their names for `qemu-img convert -f`.
const FORMATS: [(usize, &[u8], &str); 6] = [
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, &[0x7F, 0x10, 0xDA, 0xBE], "vdi"),
];

/// First bytes of packed files, and what unpacks them.
const PACKED: [(&[u8], &str); 4] = [
    (&[0x1F, 0x8B, 8], "gunzip"),
    (&[0xFD, b'7', b'z', b'X', b'Z', 0], "unxz"),
    (&[0x28, 0xB5, 0x2F, 0xFD], "unzstd"),
    (b"BZh91AY&SY", "bunzip2"),
];

/// Endings of names that say a format.
const ENDINGS: [&str; 7] = ["qcow", "qcow2", "qed", "vdi", "vhd", "vhdx", "vmdk"];

/// Refuses what `first` or the name say to be no raw disk.
pub(crate) fn refuse(file: &File, first: &[u8], path: &Path) -> Result<(), ImageError> {
    let begins = |at: usize, magic: &[u8]| first.get(at..).is_some_and(|f| f.starts_with(magic));
    if let Some((.., format)) = FORMATS.iter().find(|(at, magic, _)| begins(*at, magic)) {
        let mend = format!("convert it: qemu-img convert -f {format} -O qcow2 OLD NEW");
        let cause = format!("{format} images are not supported");
        return Err(ImageError::new(path, cause, mend));
    }
    if let Some((_, program)) = PACKED.iter().find(|(magic, _)| begins(0, magic)) {
        let mend = format!("unpack it: {program} FILE; or give the format, raw, if it is meant so");
        return Err(ImageError::new(path, "is a packed file and no image", mend));
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase);
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    match ending {
        Some(ending) if is_file && ENDINGS.contains(&ending.as_str()) => {
            let mend = "get the file again, or give the format, raw, if it is meant so";
            Err(ImageError::new(path, format!("is no {ending} image, as its name says"), mend))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::Format;
    use crate::image::guess_format;

    fn refusal(name: &str, bytes: &[u8]) -> Result<Format, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        guess_format(&path).map_err(|error| format!("{}; {}", error.cause, error.mend))
    }

    #[test]
    fn what_is_no_raw_disk_is_refused_by_its_name() {
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(&[0x7F, 0x10, 0xDA, 0xBE]);
        for (bytes, said) in [
            (&vdi[..], "vdi images are not supported; convert it: qemu-img convert -f vdi"),
            (b"vhdxfile", "vhdx images are not supported"),
            (b"conectix", "vpc images are not supported"),
            (
                &[0xFD, b'7', b'z', b'X', b'Z', 0, 0],
                "is a packed file and no image; unpack it: unxz",
            ),
        ] {
            let refusal = refusal("disk.img", bytes).unwrap_err();
            assert!(refusal.starts_with(said), "{refusal}");
        }
    }

    #[test]
    fn name_of_another_format_is_believed_no_more_than_the_bytes() {
        let refused = refusal("disk.QCOW2", b"<html>not found").unwrap_err();
        assert!(refused.starts_with("is no qcow2 image, as its name says; get"), "{refused}");
        assert_eq!(refusal("disk.img", b"<html>not found"), Ok(Format::Raw));
        assert_eq!(refusal("disk.img", b""), Ok(Format::Raw));
    }
}
