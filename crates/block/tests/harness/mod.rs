//! What the fuzzer of images does with its input, through the public interface alone.
//!
//! The input is a list of patches of a good image, since the checks of a header keep
//! random bytes out. A finding is a panic that comes out, a hang, or a request that does
//! not complete (a format's code may panic where that is caught): whatever an image holds, it is an error of the image or of a request.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tempfile::TempDir;
use tetrarch_block::{
    BlockBackend, Format, ImageOptions, NewImage, Request, Source, Target, check, create, describe,
    open,
};
use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

const SIZE: u64 = 128 << 10;
/// Small clusters make every table more than one.
const CLUSTER: u64 = 512;
const CHUNK: u64 = 8 << 10;

/// What a VMDK's text is made of. Its files are those of this test.
const WORDS: [&str; 32] = [
    "RW",
    "RDONLY",
    "NOACCESS",
    "FLAT",
    "VMFS",
    "SPARSE",
    "SESPARSE",
    "ZERO",
    "\"base.img\"",
    "\"sparse.vmdk\"",
    "\"stream.vmdk\"",
    "\"disk.vmdk\"",
    "\"top.qcow2\"",
    "\"none\"",
    "\"\"",
    "\"",
    "0",
    "1",
    "63",
    "256",
    "4194304",
    "36028797018963967",
    "18446744073709551615",
    "18446744073709551616",
    "-1",
    "\n",
    "\n",
    "\r\n",
    "version=1",
    "CID=fffffffe",
    "parentCID=ffffffff",
    "createType=\"twoGbMaxExtentSparse\"",
];

/// Patches of four bytes of the place, of which two count, and of eight of the value, of
/// which as many are written as the third says. The first byte of the input chooses what
/// is patched; the text of a VMDK may be written anew, of words.
pub fn image(data: &[u8]) {
    let Some((&first, patches)) = data.split_first() else { return };
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    for (name, bytes) in chain() {
        std::fs::write(at(name), bytes).expect("room for a file");
    }
    // What is patched, and what is then used.
    let (patched, used) = match (first % 4, first & 8) {
        (0, _) => ("top.qcow2", "top.qcow2"),
        (1, _) => ("middle.qcow2", "top.qcow2"),
        (2, 0) => ("disk.vmdk", "disk.vmdk"),
        (2, _) => ("sparse.vmdk", "sparse.vmdk"),
        (_, 0) => ("disk.img", "disk.img"),
        _ => ("stream.vmdk", "stream.vmdk"),
    };
    let mut patches = patches;
    if used == "disk.vmdk" && first & 0x10 != 0 {
        std::fs::write(at(used), text_of(patches)).expect("room for a file");
        patches = &[];
    }
    let file = OpenOptions::new().write(true).open(at(patched)).expect("it was made here");
    for patch in patches.chunks(12) {
        let mut bytes = [0; 12];
        bytes[..patch.len()].copy_from_slice(patch);
        let place = u16::from_le_bytes([bytes[0], bytes[1]]);
        // Headers and the first tables: most of what counts lies there, or, of a stream, at its end.
        let place = u64::from(if bytes[2] & 1 == 0 { place % 1024 } else { place });
        let end = file.metadata().map_or(0, |metadata| metadata.len());
        let place = if bytes[3] & 1 == 0 { place } else { end.saturating_sub(place % 4096) };
        let len = 1 + usize::from(bytes[2] >> 1) % 8;
        file.write_all_at(&bytes[4..4 + len], place).expect("a file of this test's");
    }
    if first & 4 != 0 {
        let keep = u64::from(first) << 4;
        file.set_len(keep).expect("a file of this test's");
    }
    drop(file);
    use_image(&at(used), &at("copy.img"));
}

/// A VMDK's text with a word for each byte, of which most lines are extents.
fn text_of(words: &[u8]) -> String {
    let mut text = String::from("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n");
    for &byte in words {
        match byte >> 5 {
            // A whole extent.
            7 => text += "\nRW 256 FLAT \"base.img\" 0\n",
            6 => text += "\nRDONLY 256 SPARSE \"sparse.vmdk\"\n",
            5 => text += "\nRW 8 ZERO\nNOACCESS 7\n",
            _ => {
                text += WORDS[usize::from(byte) % WORDS.len()];
                text.push(' ');
            }
        }
    }
    text
}

/// The good images, by their names, made once.
fn chain() -> &'static [(&'static str, Vec<u8>)] {
    static CHAIN: OnceLock<Vec<(&str, Vec<u8>)>> = OnceLock::new();
    let make = || {
        let folder = folder();
        make_chain(folder.path());
        let read = |name| (name, std::fs::read(folder.path().join(name)).expect("it was made"));
        let images = ["base.img", "disk.img", "middle.qcow2", "top.qcow2"].map(read);
        let vmdk = ["disk.vmdk", "sparse.vmdk", "stream.vmdk"].map(read);
        images.into_iter().chain(vmdk).collect()
    };
    CHAIN.get_or_init(make)
}

/// In memory where the host has a file system for it, since images are flushed again and again.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
    TempDir::new_in(parent).expect("the host has room for temporary files")
}

fn make_chain(folder: &Path) {
    let at = |name: &str| folder.join(name);
    std::fs::write(at("base.img"), vec![0x5A; SIZE as usize]).expect("room for a file");
    std::fs::write(at("disk.img"), vec![0xA5; 64 << 10]).expect("room for a file");
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
        createType=\"monolithicFlat\"\nRW 256 FLAT \"base.img\" 0\n";
    std::fs::write(at("disk.vmdk"), descriptor).expect("room for a file");
    let new = NewImage { size: Some(SIZE), ..NewImage::default() };
    create(&at("sparse.vmdk"), Format::Vmdk, &new).expect("an image");
    write(&at("sparse.vmdk"), &[0, SIZE - CHUNK]);
    let source = Source::open(&at("sparse.vmdk"), None).expect("it was made here");
    source.copy(&at("stream.vmdk"), Target::StreamOptimized, |_| true).expect("room for a file");
    let over = |name: &str, format| NewImage {
        backing: Some((name.into(), format)),
        cluster_size: Some(CLUSTER),
        ..NewImage::default()
    };
    create(&at("middle.qcow2"), Format::Qcow2, &over("base.img", Format::Raw)).expect("an image");
    write(&at("middle.qcow2"), &[0, CHUNK, SIZE - CHUNK]);
    create(&at("top.qcow2"), Format::Qcow2, &over("middle.qcow2", Format::Qcow2))
        .expect("an image");
    write(&at("top.qcow2"), &[CHUNK, 5 * CHUNK]);
}

fn write(path: &Path, offsets: &[u64]) {
    let disk = open(path, ImageOptions::default()).expect("it was made here");
    let write = |&offset| Box::new(move |data| Request::Write { offset, data }) as Make;
    let done = serve(&*disk, offsets.iter().map(write).collect());
    assert!(done.iter().all(|&good| good), "a new image takes what is written to it");
}

type Make = Box<dyn Fn(ScatterList) -> Request>;

/// Lets a disk serve some requests, and says which succeeded.
fn serve(disk: &dyn BlockBackend, requests: Vec<Make>) -> Vec<bool> {
    let memory = GuestMemory::new(CHUNK).expect("memory for a request");
    let data = ScatterList::of(memory.snapshot(), [(GuestPhys(0), CHUNK)]).expect("it is RAM");
    let Ok(mut queue) = disk.open_queue() else { return Vec::new() };
    let count = requests.len();
    for (tag, make) in (0..).zip(requests) {
        queue.submit(tag, make(data.clone()));
    }
    queue.submit(count as u64, Request::Flush);
    queue.kick();
    let mut done = Vec::new();
    queue.completions(&mut done);
    while done.len() <= count {
        let event = queue.event();
        let bound = Timespec::try_from(Duration::from_secs(60)).expect("a short time");
        let ready = poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&bound));
        // libFuzzer looks at its clock by a signal.
        if ready != Err(Errno::INTR) {
            assert_eq!(ready, Ok(1), "a request does not complete");
        }
        queue.completions(&mut done);
    }
    done.sort_by_key(|(tag, _)| *tag);
    done.into_iter().map(|(_, result)| result.is_ok()).collect()
}

fn use_image(path: &Path, copy: &Path) {
    let _ = describe(path, None);
    for (readonly, snapshot) in [(true, false), (false, true), (false, false)] {
        let Ok(disk) = open(path, ImageOptions { readonly, snapshot, ..ImageOptions::default() })
        else {
            continue;
        };
        // A hostile size is no reason to read for years.
        let size = disk.info().size;
        let offsets = [0, CHUNK, SIZE / 2, SIZE - CHUNK, size.saturating_sub(CHUNK)];
        let mut requests: Vec<Make> = Vec::new();
        for offset in offsets {
            requests.push(Box::new(move |data| Request::Read { offset, data }));
            requests.push(Box::new(move |data| Request::Write { offset, data }));
            requests.push(Box::new(move |_| Request::Discard { offset, length: CHUNK }));
            requests.push(Box::new(move |_| Request::WriteZeroes {
                offset,
                length: 700,
                unmap: offset % 3 == 0,
            }));
        }
        serve(&*disk, requests);
        if !readonly && size < 64 << 20 {
            let _ = disk.resize(size + 65536);
        }
    }
    let _ = check(path, false);
    let _ = check(path, true);
    if let Ok(source) = Source::open(path, None)
        && source.size() < 64 << 20
    {
        let _ = source.copy(copy, Target::Image(Format::Qcow2), |_| true);
        let _ = std::fs::remove_file(copy);
        let _ = source.copy(copy, Target::StreamOptimized, |_| true);
        let _ = std::fs::remove_file(copy);
    }
}

/// The inputs that once found something, by their names.
#[allow(dead_code, reason = "libFuzzer has its own")]
pub fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let read = |path: PathBuf| std::fs::read(&path).ok().map(|data| (path, data));
    entries.flatten().filter_map(|entry| read(entry.path())).collect()
}
