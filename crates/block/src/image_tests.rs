use tempfile::TempDir;

use super::*;
use crate::testing::{Driver, pattern};
use crate::{BlockError, NewImage, Request, create};

const MIB: u64 = 1 << 20;

/// Beside the build, as temporary files in memory know no holes.
fn folder() -> TempDir {
    TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
}

fn new(size: u64) -> NewImage {
    NewImage { size: Some(size), ..NewImage::default() }
}

fn over(name: &str, format: Format) -> NewImage {
    NewImage { backing: Some((name.into(), format)), ..NewImage::default() }
}

fn drive(path: &Path, options: ImageOptions) -> Driver {
    Driver::new(open(path, options).unwrap().open_queue().unwrap())
}

fn refusal(path: &Path, options: ImageOptions) -> String {
    let error = open(path, options).err().expect("it is refused").to_string();
    assert!(error.starts_with(path.parent().unwrap().to_str().unwrap()), "{error}");
    assert!(!error.contains('\n') && !error.contains("os error"), "{error}");
    error
}

const PLAIN: ImageOptions =
    ImageOptions { format: None, readonly: false, cache: Cache::Writeback, snapshot: false };
const SNAPSHOT: ImageOptions = ImageOptions { snapshot: true, ..PLAIN };
const READONLY: ImageOptions = ImageOptions { readonly: true, ..PLAIN };

#[test]
fn qcow2_keeps_what_was_written_and_flushed() {
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    assert_eq!(create(&path, Format::Qcow2, &new(64 * MIB)).unwrap(), 64 * MIB);
    let places = [0, 65536 - 512, 5 * MIB + 1024, 64 * MIB - 4096];
    let mut driver = drive(&path, PLAIN);
    for offset in places {
        driver.write(offset, &[(0x3000, 2048), (0x1000, 2048)], &pattern(offset, 4096));
    }
    assert_eq!(driver.run(Request::Flush), Ok(()));
    // What is lost with the process is not needed: as if it were killed here.
    let copy = folder.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    for image in [&path, &copy] {
        drop(std::mem::replace(&mut driver, drive(&copy, SNAPSHOT)));
        let mut driver = drive(image, SNAPSHOT);
        for offset in places {
            assert!(driver.read(offset, &[(0, 4096)]).unwrap() == pattern(offset, 4096));
        }
        assert!(driver.read(MIB, &[(0, MIB)]).unwrap().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn overlay_reads_through_and_keeps_its_own() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("base.img"), pattern(0, 4 << 20)).unwrap();
    create(&at("one.qcow2"), Format::Qcow2, &over("base.img", Format::Raw)).unwrap();
    create(&at("two.qcow2"), Format::Qcow2, &over("one.qcow2", Format::Qcow2)).unwrap();
    drive(&at("one.qcow2"), PLAIN).write(MIB, &[(0, 512)], &pattern(1, 512));
    let mut driver = drive(&at("two.qcow2"), PLAIN);
    driver.write(2 * MIB, &[(0, 512)], &pattern(2, 512));
    let zeroes = Request::WriteZeroes { offset: 3 * MIB, length: 70_000, unmap: true };
    assert_eq!(driver.run(zeroes), Ok(()));
    let mut expected = pattern(0, 4 << 20);
    expected[MIB as usize..][..512].copy_from_slice(&pattern(1, 512));
    expected[2 * MIB as usize..][..512].copy_from_slice(&pattern(2, 512));
    expected[3 * MIB as usize..][..70_000].fill(0);
    assert!(driver.read(0, &[(0, 4 * MIB)]).unwrap() == expected);
    assert!(std::fs::read(at("base.img")).unwrap() == pattern(0, 4 << 20));
    // Who reads through an image keeps writers off it.
    assert!(refusal(&at("one.qcow2"), PLAIN).contains("the image is in use"));
    assert!(refusal(&at("base.img"), PLAIN).contains("the image is in use"));
}

#[test]
fn discarded_clusters_of_qcow2_are_given_back_and_used_again() {
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    create(&path, Format::Qcow2, &new(8 * MIB)).unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    let mut driver = drive(&path, PLAIN);
    for round in 0..3 {
        driver.write(0, &[(0, 4 * MIB)], &pattern(round, 4 << 20));
        assert_eq!(driver.run(Request::Flush), Ok(()));
        let full = blocks();
        let (offset, length) = (MIB - 512, 2 * MIB);
        assert_eq!(driver.run(Request::WriteZeroes { offset, length, unmap: true }), Ok(()));
        // 31 whole clusters of 64 KiB lie in it.
        assert!(blocks() * 512 + (30 << 16) <= full * 512, "{} of {full} blocks", blocks());
        assert_eq!(driver.run(Request::Discard { offset: 3 * MIB, length: MIB }), Ok(()));
        let mut expected = pattern(round, 4 << 20);
        expected[offset as usize..(offset + length) as usize].fill(0);
        expected[3 << 20..].fill(0);
        assert!(driver.read(0, &[(0, 4 * MIB)]).unwrap() == expected);
    }
    drop(driver);
    let report = crate::check(&path, false).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
    assert!(std::fs::metadata(&path).unwrap().len() < 6 * MIB);
}

#[test]
fn snapshot_leaves_no_trace() {
    let folder = folder();
    let raw = folder.path().join("disk.img");
    std::fs::write(&raw, pattern(0, 1 << 20)).unwrap();
    let qcow2 = folder.path().join("disk.qcow2");
    create(&qcow2, Format::Qcow2, &new(MIB)).unwrap();
    for path in [&raw, &qcow2] {
        let before = std::fs::read(path).unwrap();
        let mut driver = drive(path, SNAPSHOT);
        driver.write(512, &[(0, 4096)], &pattern(7, 4096));
        assert_eq!(driver.run(Request::Flush), Ok(()));
        assert!(driver.read(512, &[(0x8000, 4096)]).unwrap() == pattern(7, 4096));
        // Two machines may run from one image so.
        drive(path, SNAPSHOT);
        drop(driver);
        assert!(std::fs::read(path).unwrap() == before);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn backing_files_that_cannot_be_used_are_named_with_cause_and_mend() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("base.img"), pattern(0, 1 << 20)).unwrap();
    create(&at("a.qcow2"), Format::Qcow2, &over("base.img", Format::Raw)).unwrap();
    create(&at("b.qcow2"), Format::Qcow2, &over("a.qcow2", Format::Qcow2)).unwrap();

    // Circular: the first one is put over the second.
    std::fs::rename(at("base.img"), at("kept.img")).unwrap();
    std::os::unix::fs::symlink("b.qcow2", at("base.img")).unwrap();
    let as_qcow2 = std::fs::read(at("a.qcow2")).unwrap();
    let format = as_qcow2.windows(7).position(|bytes| bytes == b"\0\0\0\x03raw").unwrap();
    let mut circular = as_qcow2.clone();
    circular[format..format + 9].copy_from_slice(b"\0\0\0\x05qcow2");
    std::fs::write(at("a.qcow2"), &circular).unwrap();
    let error = refusal(&at("b.qcow2"), PLAIN);
    assert!(error.contains("the chain of backing files comes back to this image (the"), "{error}");
    std::fs::write(at("a.qcow2"), &as_qcow2).unwrap();

    // Missing.
    std::fs::remove_file(at("base.img")).unwrap();
    let error = refusal(&at("b.qcow2"), PLAIN);
    assert!(error.contains("base.img: cannot open the image: no such file"), "{error}");
    assert!(error.contains("(the backing file of "), "{error}");
    // Also where it is not said what that is to be.
    std::fs::write(at("unsaid.qcow2"), header_over("base.img", "")).unwrap();
    let error = refusal(&at("unsaid.qcow2"), PLAIN);
    assert!(error.contains("unsaid.qcow2); put it there, or name another"), "{error}");
    std::fs::rename(at("kept.img"), at("base.img")).unwrap();
    drop(open(&at("b.qcow2"), PLAIN).unwrap());

    // Truncated: where its tables would be.
    let file = OpenOptions::new().write(true).open(at("a.qcow2")).unwrap();
    file.set_len(65536).unwrap();
    let error = refusal(&at("b.qcow2"), PLAIN);
    assert!(error.contains("ends before its L1 table does"), "{error}");

    // Foreign: a format and a protocol that are not ours.
    for (name, format, expected) in [
        ("base.img", "vdi", "its backing file base.img has the format vdi; convert that"),
        ("nbd://host", "raw", "its backing file nbd://host is not a file; copy that"),
        ("json:{}", "raw", "its backing file json:{} is not a file; copy that"),
    ] {
        let path = at("foreign.qcow2");
        std::fs::write(&path, header_over(name, format)).unwrap();
        let error = refusal(&path, PLAIN);
        assert!(error.contains(expected), "{error}");
    }

    // A backing file without a format, that looks like one.
    std::fs::write(at("plain.qcow2"), header_over("b.qcow2", "")).unwrap();
    let error = refusal(&at("plain.qcow2"), PLAIN);
    assert!(error.contains("does not say that its backing file is qcow2; write it"), "{error}");
}

fn handed(paths: &[&Path], options: ImageOptions) -> Result<Box<dyn BlockBackend>, ImageError> {
    let top = !options.readonly;
    let files = paths.iter().enumerate().map(|(index, path)| {
        OpenOptions::new().read(true).write(top && index == 0).open(path).unwrap()
    });
    let files = files.collect();
    // Nothing has that name: no path is opened.
    open_handed(Path::new("/nowhere/image"), files, options)
}

#[test]
fn image_is_opened_by_descriptors_of_its_files_alone() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let (base, top) = (at("base.img"), at("top.qcow2"));
    std::fs::write(&base, pattern(0, 1 << 20)).unwrap();
    create(&top, Format::Qcow2, &over("base.img", Format::Raw)).unwrap();

    let disk = handed(&[&top, &base], PLAIN).unwrap();
    assert!(handed(&[&base], PLAIN).is_err(), "the chain has its locks");
    let mut driver = Driver::new(disk.open_queue().unwrap());
    driver.write(4096, &[(0, 4096)], &pattern(1, 4096));
    assert_eq!(driver.run(Request::Flush), Ok(()));
    drop((driver, disk));
    let mut driver = drive(&top, READONLY);
    assert!(driver.read(0, &[(0, 4096)]).unwrap() == pattern(0, 1 << 20)[..4096]);
    assert!(driver.read(4096, &[(0, 4096)]).unwrap() == pattern(1, 4096));
    drop(driver);

    let disk = handed(&[&base], ImageOptions { format: Some(Format::Raw), ..PLAIN }).unwrap();
    let mut driver = Driver::new(disk.open_queue().unwrap());
    driver.write(0, &[(0, 512)], &pattern(2, 512));
    disk.resize(2 * MIB).unwrap();
    drop((driver, disk));
    assert!(std::fs::read(&base).unwrap()[..512] == pattern(2, 512));

    let refused = |paths: &[&Path], options, words: &str| {
        let error = handed(paths, options).err().expect("it is refused").to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(&[&top], PLAIN, "there is no descriptor of it");
    refused(&[], PLAIN, "there is no descriptor of it");
    refused(&[&base, &top], PLAIN, "fewer backing files");
    refused(&[folder.path()], READONLY, "is a directory");
    refused(&[&top, &base], SNAPSHOT, "need more than descriptors");
    let reader = File::open(&top).unwrap();
    let error = open_handed(&top, vec![reader], PLAIN).err().expect("it is refused");
    assert!(error.to_string().contains("its descriptor is not for both"), "{error}");
}

/// An image of 1 MiB with nothing in it but a backing file.
fn header_over(name: &str, format: &str) -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xFB\0\0\0\x03");
    put(8, &512u64.to_be_bytes());
    put(16, &(name.len() as u32).to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &MIB.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3u64 << 16).to_be_bytes());
    put(48, &(1u64 << 16).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    if !format.is_empty() {
        put(104, &0xE279_2ACAu32.to_be_bytes());
        put(108, &(format.len() as u32).to_be_bytes());
        put(112, format.as_bytes());
    }
    put(512, name.as_bytes());
    image
}

#[test]
fn features_that_are_not_served_are_refused_by_name() {
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    for (at, value, expected) in [
        (7, 4, "qcow2 with version 4 is not supported; convert it"),
        (35, 2, "qcow2 with encryption is not supported; convert it"),
        (79, 1, "was not closed, and its refcounts are behind; bring them up to date"),
        (79, 2, "marked as corrupt; repair it"),
        (79, 4, "qcow2 with an external data file is not supported"),
        (79, 8, "qcow2 with compression other than zlib is not supported"),
        (79, 16, "qcow2 with extended L2 entries is not supported"),
        (79, 32, "qcow2 with incompatible features 0x20 is not supported"),
        (63, 1, "the image has internal snapshots (1); add readonly"),
        (23, 30, "damaged qcow2 image: clusters of 2^30 bytes; restore"),
        (36, 0xFF, "damaged qcow2 image: its L1 table of "),
        (46, 0xFF, "damaged qcow2 image: its L1 table of 8 bytes at 0x3ff00; restore"),
        (40, 0xFF, "ends before its L1 table does"),
        (56, 0xFF, "damaged qcow2 image: its refcount table of "),
        (24, 0xFF, "entries of its L1 table"),
        (103, 99, "damaged qcow2 image: its header's length"),
    ] {
        let mut image = header_over("x", "raw");
        image[8..16].fill(0);
        std::fs::write(&path, &image).unwrap();
        drop(open(&path, READONLY).unwrap());
        image[at] = value;
        std::fs::write(&path, &image).unwrap();
        let error = refusal(&path, PLAIN);
        assert!(error.contains(expected), "byte {at} = {value}: {error}");
    }
    std::fs::write(&path, b"QFI\xFB\0\0\0\x03").unwrap();
    assert!(refusal(&path, PLAIN).contains("damaged qcow2 image: it ends after 8 bytes"));
    let qcow2 = ImageOptions { format: Some(Format::Qcow2), ..PLAIN };
    std::fs::write(&path, [0; 4096]).unwrap();
    assert!(refusal(&path, qcow2).contains("is not a qcow2 image; give the image's format"));
}

#[test]
fn flat_vmdk_is_read_and_written() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    std::fs::write(folder.path().join("disk-flat.vmdk"), pattern(0, 1 << 20)).unwrap();
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=11111111\nparentCID=ffffffff\n\
        createType=\"monolithicFlat\"\nRW 2048 FLAT \"disk-flat.vmdk\" 0\nRW 8 ZERO\n";
    std::fs::write(&path, descriptor).unwrap();
    let mut driver = drive(&path, READONLY);
    assert!(driver.read(4096, &[(0, 8192)]).unwrap() == pattern(4096, 8192));
    // Over the end of an extent.
    let read = driver.read(MIB - 512, &[(0, 1024)]).unwrap();
    assert!(read[..512] == pattern(MIB - 512, 512) && read[512..] == [0; 512]);
    let data = driver.list(&[(0, 512)]);
    assert_eq!(driver.run(Request::Write { offset: 0, data }), Err(BlockError::ReadOnly));
    drop(driver);
    let mut driver = drive(&path, SNAPSHOT);
    driver.write(0, &[(0, 512)], &pattern(9, 512));
    assert!(driver.read(0, &[(0x1000, 512)]).unwrap() == pattern(9, 512));
    drop(driver);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), descriptor);
    let mut driver = drive(&path, PLAIN);
    driver.write(512, &[(0, 512)], &pattern(9, 512));
    assert_eq!(driver.run(Request::Flush), Ok(()));
    let flat = std::fs::read(folder.path().join("disk-flat.vmdk")).unwrap();
    assert!(flat[512..1024] == pattern(9, 512) && flat[1024..] == pattern(1024, (1 << 20) - 1024));
    // What has differences to the disk as it was can tell.
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("CID=11111111\n") && text.len() == descriptor.len(), "{text}");
    let list = driver.list(&[(0, 512)]);
    assert!(driver.run(Request::Write { offset: MIB, data: list }).is_err());
}

#[test]
fn sparse_vmdk_keeps_what_was_written_and_flushed() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    assert_eq!(create(&path, Format::Vmdk, &new(100 * MIB - 512)).unwrap(), 100 * MIB - 512);
    let places = [0, 65536 - 512, 33 * MIB + 1024, 100 * MIB - 512 - 4096];
    let mut driver = drive(&path, PLAIN);
    for offset in places {
        driver.write(offset, &[(0x3000, 2048), (0x1000, 2048)], &pattern(offset, 4096));
    }
    let unmap = Request::WriteZeroes { offset: 33 * MIB + 1024, length: 512, unmap: true };
    assert_eq!(driver.run(unmap), Ok(()));
    assert_eq!(driver.run(Request::Discard { offset: 50 * MIB, length: MIB }), Ok(()));
    assert_eq!(driver.run(Request::Flush), Ok(()));
    drop(driver);
    assert!(std::fs::metadata(&path).unwrap().len() < MIB);
    let check = |path: &Path| {
        let mut driver = drive(path, READONLY);
        for offset in places {
            let mut expected = pattern(offset, 4096);
            if offset == 33 * MIB + 1024 {
                expected[..512].fill(0);
            }
            assert!(driver.read(offset, &[(0, 4096)]).unwrap() == expected, "at {offset}");
        }
        assert!(driver.read(MIB, &[(0, MIB)]).unwrap().iter().all(|&byte| byte == 0));
    };
    check(&path);
    let stream = folder.path().join("stream.vmdk");
    let source = crate::Source::open(&path, None).unwrap();
    assert!(source.copy(&stream, crate::Target::StreamOptimized, |_| true).unwrap());
    drop(source);
    check(&stream);
    assert!(refusal(&stream, PLAIN).contains("streamOptimized vmdk images are not written to"));
    assert_eq!(crate::describe(&stream, None).unwrap().subformat.unwrap(), "streamOptimized");
    let error = open(&path, PLAIN).unwrap().resize(200 * MIB).unwrap_err().to_string();
    assert!(error.contains("vmdk images are not resized; convert it to qcow2"), "{error}");
}

#[test]
fn damaged_vmdk_is_refused_with_its_damage() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    create(&path, Format::Vmdk, &new(64 * MIB)).unwrap();
    drive(&path, PLAIN).write(0, &[(0, 4096)], &pattern(0, 4096));
    let whole = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_le_bytes(whole[at..at + 8].try_into().unwrap());
    let directory = number(56) as usize * 512;
    let table = u32::from_le_bytes(whole[directory..directory + 4].try_into().unwrap()) as usize;
    for (at, bytes, said) in [
        (4, &9u32.to_le_bytes()[..], "vmdk images with version 9 are not supported"),
        (12, &[0; 8], "a disk of 0 sectors"),
        (12, &[0xFF; 8], "a disk of 18446744073709551615 sectors"),
        (20, &3u64.to_le_bytes(), "grains of 3 sectors"),
        (20, &(1u64 << 40).to_le_bytes(), "grains of 1099511627776 sectors"),
        (44, &[0xFF; 4], "tables of 4294967295 entries"),
        (56, &(1u64 << 60).to_le_bytes(), "its grain directory at sector"),
        (56, &[0xFF; 8], "its file ends before its footer; get the file again"),
        (74, b"\r", "it was copied as text"),
        (directory, &[0xFF; 4], "its file ends before its data do"),
        (table * 512, &[0xFF; 4], "its file ends before its data do"),
        // A guest would be given the tables themselves.
        (table * 512, &30u32.to_le_bytes(), "its grains lie among its tables"),
        (
            directory + 4,
            &whole[directory..directory + 4],
            "two of its grain tables lie at one place",
        ),
        (directory, &[0; 4], "without some of their grain tables are not written to"),
    ] {
        let mut image = whole.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &image).unwrap();
        let error = refusal(&path, PLAIN);
        assert!(error.contains(said), "byte {at}: {error}");
    }
    std::fs::write(&path, &whole[..whole.len() - 512]).unwrap();
    assert!(refusal(&path, READONLY).contains("its file ends before its data do"));
    std::fs::write(&path, b"KDMV\x01\0\0\0").unwrap();
    assert!(refusal(&path, READONLY).contains("damaged vmdk image: it ends after 8 bytes"));
}

#[test]
fn vmdk_of_one_file_many_times_is_refused() {
    let folder = folder();
    let (path, other) = (folder.path().join("disk.vmdk"), folder.path().join("part.vmdk"));
    let refused = |extents: String| {
        std::fs::write(&path, format!("# Disk DescriptorFile\nversion=1\n{extents}")).unwrap();
        refusal(&path, READONLY)
    };
    create(&other, Format::Vmdk, &new(MIB)).unwrap();
    let twice = "RW 2048 SPARSE \"part.vmdk\"\nRW 2048 SPARSE \"./part.vmdk\"\n".into();
    assert!(refused(twice).contains("a file is too many of its extents"));
    std::fs::write(folder.path().join("flat"), [0; 512]).unwrap();
    let many = "RW 1 FLAT \"flat\" 0\n".repeat(257);
    assert!(refused(many).contains("a file is too many of its extents"));
}

#[test]
fn stream_that_is_damaged_fails_where_it_is_read() {
    let folder = folder();
    let (raw, path) = (folder.path().join("disk.img"), folder.path().join("disk.vmdk"));
    std::fs::write(&raw, pattern(0, 1 << 20)).unwrap();
    let source = crate::Source::open(&raw, None).unwrap();
    source.copy(&path, crate::Target::StreamOptimized, |_| true).unwrap();
    let whole = std::fs::read(&path).unwrap();
    // The first grain is behind 64 KiB: its number, its size, its data.
    for (at, value) in [(0, 1), (10, 0xFF), (12, 0xFF), (40, whole[65536 + 40] ^ 0xFF)] {
        let mut image = whole.clone();
        image[65536 + at] = value;
        std::fs::write(&path, &image).unwrap();
        let mut driver = drive(&path, READONLY);
        let read = driver.read(0, &[(0, 4096)]);
        // What deflate has no sum of is wrong at the end, where the sum of the grain is.
        assert!(read.is_err(), "byte {at}");
        assert!(driver.read(MIB / 2, &[(0, 4096)]).unwrap() == pattern(MIB / 2, 4096));
        let copy = folder.path().join("copy.img");
        let copied = crate::Source::open(&path, None).unwrap().copy(
            &copy,
            crate::Target::Image(Format::Raw),
            |_| true,
        );
        let error = copied.unwrap_err().to_string();
        assert!(error.contains("the grain at 0x10000") || error.contains("of another grain"));
        assert!(error.ends_with("; get the file again, or restore the image from a backup"));
        assert!(!copy.exists());
    }
    std::fs::write(&path, &whole[..whole.len() - 512]).unwrap();
    assert!(refusal(&path, READONLY).contains("its file ends before its footer; get the file"));
}

#[test]
fn disk_that_was_guessed_to_be_raw_cannot_be_made_another_format() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, [0; 4096]).unwrap();
    let raw = ImageOptions { format: Some(Format::Raw), ..PLAIN };
    for magic in [&b"QFI\xFB"[..], b"KDMV", b"# Disk DescriptorFile"] {
        let mut first = magic.to_vec();
        first.resize(512, 1);
        let mut driver = drive(&path, PLAIN);
        let data = driver.list(&[(0x2, 2), (0x1000, 510)]);
        data.write_at(0, &first);
        let write = Request::Write { offset: 0, data };
        assert_eq!(driver.run(write.clone()), Err(BlockError::LooksLikeAnImage));
        assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
        drop(driver);
        // Where the user says what it is, the guest may write what it likes.
        let mut driver = drive(&path, raw);
        driver.list(&[(0x2, 2), (0x1000, 510)]).write_at(0, &first);
        let data = driver.list(&[(0x2, 2), (0x1000, 510)]);
        assert_eq!(driver.run(Request::Write { offset: 0, data }), Ok(()));
        std::fs::write(&path, [0; 4096]).unwrap();
    }
}

#[test]
fn first_bytes_that_change_behind_the_look_at_them_are_not_written() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    for (pieces, len) in [(&[(0x1000, 512)][..], 512), (&[(0x2, 30), (0x1000, 4066)], 4096)] {
        std::fs::write(&path, [0; 8192]).unwrap();
        let mut driver = drive(&path, PLAIN);
        let data = driver.list(pieces);
        data.write_at(0, &pattern(3, len));
        driver.queue.submit(7, Request::Write { offset: 0, data: data.clone() });
        data.write_at(0, b"QFI\xFB");
        let done = driver.wait(1);
        drop(driver);
        let written = std::fs::read(&path).unwrap();
        match done[0].1 {
            Ok(()) => assert!(written[..len] == pattern(3, len)),
            // It was looked at later: without io_uring.
            error => {
                assert_eq!((error, &written[..4]), (Err(BlockError::LooksLikeAnImage), &[0; 4][..]))
            }
        }
    }
}

#[test]
fn qcow2_whose_refcounts_leave_out_its_header_is_read_and_not_written() {
    use std::os::unix::fs::FileExt;
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    create(&path, Format::Qcow2, &new(MIB)).unwrap();
    drive(&path, PLAIN).write(0, &[(0, 4096)], &pattern(1, 4096));
    let whole = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
    let table = number(48);
    let block = number(table as usize);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    // No block of refcounts, or one that says 0.
    for (at, zeroes) in [(table, 8), (block, 2)] {
        file.write_all_at(&whole, 0).unwrap();
        file.write_all_at(&[0; 8][..zeroes], at).unwrap();
        assert!(refusal(&path, PLAIN).contains("refcounts leave out its header; repair it"));
        for options in [READONLY, SNAPSHOT] {
            let mut driver = drive(&path, options);
            assert!(driver.read(0, &[(0, 4096)]).unwrap() == pattern(1, 4096));
        }
    }
    file.write_all_at(&whole, 0).unwrap();
    drive(&path, PLAIN);
}

#[test]
fn resized_qcow2_has_its_new_size_for_who_opens_it_next() {
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    create(&path, Format::Qcow2, &new(MIB)).unwrap();
    let disk = open(&path, PLAIN).unwrap();
    disk.resize(3 * MIB).unwrap();
    let mut driver = Driver::new(disk.open_queue().unwrap());
    driver.write(3 * MIB - 512, &[(0, 512)], &pattern(1, 512));
    drop((driver, disk));
    assert_eq!(open(&path, PLAIN).unwrap().info().size, 3 * MIB);
}
