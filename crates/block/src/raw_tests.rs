use std::os::unix::fs::MetadataExt;

use parking_lot::Mutex;
use tempfile::NamedTempFile;
use tetrarch_memory::{GuestPhys, MemoryObserver};

use super::*;
use crate::Request;
use crate::testing::{Driver, pattern};

const MIB: u64 = 1 << 20;

/// Files lie beside the build: the system's place for temporary ones may be memory,
/// which knows neither O_DIRECT nor holes as disks do.
fn image(len: u64) -> NamedTempFile {
    let directory = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let file = NamedTempFile::new_in(directory).unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn open(image: &NamedTempFile, cache: Cache) -> RawDisk {
    let options = RawOptions { cache, ..RawOptions::default() };
    RawDisk::open(image.path(), options).unwrap()
}

/// Every way to serve a raw disk: by either cache, by io_uring and by threads.
fn each_way(len: u64, mut test: impl FnMut(&NamedTempFile, &RawDisk, &mut Driver)) {
    for cache in [Cache::Writeback, Cache::None] {
        for threads in [false, true] {
            let image = image(len);
            let disk = open(&image, cache);
            let queue = if threads { disk.workers() } else { disk.open_queue() };
            test(&image, &disk, &mut Driver::new(queue.unwrap()));
        }
    }
}

#[test]
fn bytes_go_to_their_place_at_any_alignment() {
    each_way(MIB, |image, _, driver| {
        let mut disk = vec![0; MIB as usize];
        for (offset, pieces) in [
            (0, &[(0x1000, 4096)][..]),
            (8192, &[(0x4000, 4096), (0x1000, 8192)]),
            (MIB - 512, &[(0x2200, 512)]),
            (512, &[(0x1001, 3), (0x3003, 509)]),
            (5, &[(0x1007, 1), (0x8000, 4096), (0x9FFF, 2)]),
        ] {
            let len = pieces.iter().map(|(_, len)| *len as usize).sum();
            let data = pattern(offset, len);
            driver.write(offset, pieces, &data);
            assert_eq!(driver.read(offset, pieces).unwrap(), data);
            disk[offset as usize..offset as usize + len].copy_from_slice(&data);
        }
        assert_eq!(driver.run(Request::Flush), Ok(()));
        assert!(std::fs::read(image.path()).unwrap() == disk);
    });
}

#[test]
fn more_requests_than_the_ring_has_places_are_served() {
    each_way(8 * MIB, |_, _, driver| {
        let block = |i: u64| [((i * 7 % 1000) * 4096, 4096)];
        for i in 0..1000 {
            driver.list(&block(i)).write_at(0, &pattern(i, 4096));
            let data = driver.list(&block(i));
            driver.queue.submit(i, Request::Write { offset: i * 4096, data });
        }
        let tags: Vec<u64> = (0..1000).collect();
        let ended = |done: Vec<(u64, Result<(), BlockError>)>| {
            assert!(done.iter().all(|(_, result)| result.is_ok()), "{done:?}");
            done.into_iter().map(|(tag, _)| tag).collect::<Vec<_>>()
        };
        assert_eq!(ended(driver.wait(1000)), tags);
        for i in 0..1000 {
            let data = driver.list(&[(i * 4096, 4096)]);
            driver.queue.submit(i, Request::Read { offset: i * 4096, data });
        }
        assert_eq!(ended(driver.wait(1000)), tags);
        for i in 0..1000 {
            let mut data = vec![0; 4096];
            driver.memory.read(GuestPhys(i * 4096), &mut data).unwrap();
            assert!(data == pattern(i, 4096), "block {i}");
        }
    });
}

#[test]
fn what_a_disk_cannot_do_is_refused() {
    each_way(MIB, |image, _, driver| {
        let data = driver.list(&[(0, 1024)]);
        for offset in [MIB - 512, MIB, u64::MAX - 1023, u64::MAX] {
            let beyond = Err(BlockError::Beyond { offset, length: 1024, size: MIB });
            for request in [
                Request::Read { offset, data: data.clone() },
                Request::Write { offset, data: data.clone() },
                Request::Discard { offset, length: 1024 },
                Request::WriteZeroes { offset, length: 1024, unmap: true },
            ] {
                assert_eq!(driver.run(request), beyond);
            }
        }
        assert_eq!(image.as_file().metadata().unwrap().len(), MIB);
    });
}

#[test]
fn readonly_disk_is_read_and_not_written() {
    let image = image(MIB);
    std::fs::write(image.path(), pattern(3, MIB as usize)).unwrap();
    let options = RawOptions { readonly: true, ..RawOptions::default() };
    let disk = RawDisk::open(image.path(), options).unwrap();
    assert!(disk.info().readonly);
    let mut driver = Driver::new(disk.open_queue().unwrap());
    assert_eq!(driver.read(512, &[(0, 512)]).unwrap(), pattern(515, 512));
    let data = driver.list(&[(0, 512)]);
    for request in [
        Request::Write { offset: 0, data },
        Request::Discard { offset: 0, length: 512 },
        Request::WriteZeroes { offset: 0, length: 512, unmap: false },
    ] {
        assert_eq!(driver.run(request), Err(BlockError::ReadOnly));
    }
    assert_eq!(driver.run(Request::Flush), Ok(()));
}

#[test]
fn discarded_space_is_given_back_and_zeroes_are_read() {
    each_way(MIB, |image, _, driver| {
        let blocks = || image.as_file().metadata().unwrap().blocks();
        let fill = |driver: &mut Driver| driver.write(0, &[(0, MIB)], &pattern(1, MIB as usize));
        fill(driver);
        assert_eq!(driver.run(Request::Flush), Ok(()));
        let full = blocks();
        assert_eq!(driver.run(Request::Discard { offset: 0, length: MIB / 2 }), Ok(()));
        assert!(blocks() <= full / 2 + 16, "{} of {full} blocks", blocks());
        for unmap in [true, false] {
            fill(driver);
            let (offset, length) = (4096 + 512, 10_000);
            let zeroes = Request::WriteZeroes { offset, length, unmap };
            assert_eq!(driver.run(zeroes), Ok(()));
            let mut expected = pattern(1, MIB as usize);
            expected[offset as usize..(offset + length) as usize].fill(0);
            assert!(driver.read(0, &[(0, MIB)]).unwrap() == expected);
        }
    });
}

#[test]
fn zeroes_are_written_where_the_file_system_knows_no_holes() {
    each_way(4 * MIB, |_, disk, driver| {
        driver.write(0, &[(0, 4 * MIB)], &pattern(1, 4 << 20));
        let modes = [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];
        assert!(modes.iter().all(|&mode| disk.file.refused(mode, Errno::OPNOTSUPP)));
        assert!(!disk.info().discards);
        assert_eq!(driver.run(Request::Discard { offset: 0, length: 4096 }), Ok(()));
        let (offset, length) = (512, 3 * MIB + 1);
        assert_eq!(driver.run(Request::WriteZeroes { offset, length, unmap: true }), Ok(()));
        let mut expected = pattern(1, 4 << 20);
        expected[offset as usize..(offset + length) as usize].fill(0);
        assert!(driver.read(0, &[(0, 4 * MIB)]).unwrap() == expected);
    });
}

#[test]
fn last_sector_of_a_file_that_ends_in_it_is_padded() {
    each_way(1000, |image, disk, driver| {
        std::fs::write(image.path(), pattern(0, 1000)).unwrap();
        assert_eq!(disk.info().size, 1024);
        let mut expected = pattern(0, 1000);
        expected.resize(1024, 0);
        assert_eq!(driver.read(0, &[(0, 1024)]).unwrap(), expected);
        driver.write(512, &[(0, 512)], &pattern(9, 512));
        expected[512..].copy_from_slice(&pattern(9, 512));
        assert_eq!(std::fs::read(image.path()).unwrap(), expected);
    });
}

#[test]
fn file_that_somebody_cut_is_an_error_where_it_is_missing() {
    each_way(MIB, |image, _, driver| {
        image.as_file().set_len(MIB / 2).unwrap();
        assert!(driver.read(0, &[(0, 4096)]).is_ok());
        assert_eq!(driver.read(MIB / 2 - 512, &[(0, 1024)]), Err(BlockError::Truncated));
        assert_eq!(driver.read(MIB - 512, &[(0, 512)]), Err(BlockError::Truncated));
    });
}

#[test]
fn failed_flush_is_not_forgotten() {
    let image = image(MIB);
    let disk = open(&image, Cache::Writeback);
    let mut driver = Driver::new(disk.open_queue().unwrap());
    assert_eq!(driver.run(Request::Flush), Ok(()));
    assert_eq!(disk.file.flushed(Err(Errno::NOSPC)), Err(BlockError::NoSpace));
    assert_eq!(driver.run(Request::Flush), Err(BlockError::LostWrites));
}

#[test]
fn resized_disk_is_as_large_as_its_file() {
    each_way(MIB, |image, disk, driver| {
        disk.resize(2 * MIB).unwrap();
        assert_eq!(
            (disk.info().size, image.as_file().metadata().unwrap().len()),
            (2 * MIB, 2 * MIB)
        );
        driver.write(2 * MIB - 512, &[(0, 512)], &pattern(0, 512));
        disk.resize(MIB / 2).unwrap();
        let data = driver.list(&[(0, 512)]);
        assert!(driver.run(Request::Write { offset: MIB / 2, data }).is_err());
    });
}

#[test]
fn observers_hear_what_the_disk_writes_into_memory() {
    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>);
    impl MemoryObserver for Log {
        fn written(&self, address: GuestPhys, length: u64) {
            self.0.lock().push((address.0, length));
        }
    }
    each_way(MIB, |_, _, driver| {
        let log = Arc::new(Log::default());
        driver.memory.add_observer(log.clone());
        let data = driver.list(&[(0x3000, 4096), (0x1000, 512)]);
        assert_eq!(driver.run(Request::Read { offset: 0, data: data.clone() }), Ok(()));
        assert_eq!(*log.0.lock(), [(0x3000, 4096), (0x1000, 512)]);
        assert_eq!(driver.run(Request::Write { offset: 0, data }), Ok(()));
        assert_eq!(log.0.lock().len(), 2);
    });
}

#[test]
fn queue_that_goes_waits_for_what_is_in_flight() {
    each_way(8 * MIB, |_, disk, driver| {
        let mut queue = disk.open_queue().unwrap();
        for i in 0..500 {
            let data = driver.list(&[(i * 4096, 4096)]);
            queue.submit(i, Request::Read { offset: i * 4096, data });
        }
        queue.kick();
        drop(queue);
        // Nothing is written into this memory any more.
        driver.memory.write(GuestPhys(0), &pattern(5, 2 << 20)).unwrap();
        let mut after = vec![0; 2 << 20];
        driver.memory.read(GuestPhys(0), &mut after).unwrap();
        assert!(after == pattern(5, 2 << 20));
    });
}

#[test]
fn image_has_one_writer_or_any_number_of_readers() {
    let image = image(MIB);
    let open =
        |readonly| RawDisk::open(image.path(), RawOptions { readonly, ..RawOptions::default() });
    let in_use = |readonly| {
        let error = open(readonly).err().expect("the image is in use").to_string();
        assert!(error.contains("the image is in use; stop the machine"), "{error}");
    };
    let readers = [open(true).unwrap(), open(true).unwrap()];
    in_use(false);
    drop(readers);
    let writer = open(false).unwrap();
    in_use(false);
    in_use(true);
    drop(writer);
    open(false).unwrap();
}

#[test]
fn what_is_no_image_is_refused_with_cause_and_mend() {
    let error = |path: &str| RawDisk::open(path, RawOptions::default()).err().unwrap().to_string();
    let missing = error("/nonexistent/disk.img");
    assert!(missing.contains("no such file or directory; give the path of an image"), "{missing}");
    let directory = error("/");
    assert!(directory.contains("is a directory; give the path of an image"), "{directory}");
    let device = error("/dev/null");
    assert!(device.contains("neither a file nor a block device; give"), "{device}");
}

/// As a container runtime does: a filter of this thread's system calls.
fn refuse_io_uring() {
    let statement = |code: u32, k| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: libc::SYS_io_uring_setup as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter live through the calls, which change no memory.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program),
        ]
    };
    assert_eq!(results, [0, 0]);
}

#[test]
fn threads_serve_where_the_host_refuses_io_uring() {
    let image = image(MIB);
    let disk = open(&image, Cache::Writeback);
    let read = std::thread::spawn(move || {
        refuse_io_uring();
        assert!(UringQueue::new(Arc::clone(&disk.file)).is_err());
        let mut driver = Driver::new(disk.open_queue().unwrap());
        driver.write(4096, &[(0x1000, 4096)], &pattern(1, 4096));
        driver.read(4096, &[(0x8000, 4096)])
    });
    assert_eq!(read.join().unwrap().unwrap(), pattern(1, 4096));
}

/// A controller may wait for the event alone, also for what is refused at once.
#[test]
fn event_tells_of_what_was_done_without_the_file() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    each_way(MIB, |_, _, driver| {
        let data = driver.list(&[(0x1000, 512)]);
        let beyond = Request::Write { offset: MIB, data };
        let nothing = Request::Discard { offset: 0, length: 0 };
        for (request, good) in [(beyond, false), (nothing, true)] {
            driver.queue.submit(7, request);
            driver.queue.kick();
            let bound = Timespec { tv_sec: 20, tv_nsec: 0 };
            let event = driver.queue.event();
            let ready = poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&bound)).unwrap();
            assert_eq!(ready, 1, "nobody hears of it");
            let mut done = Vec::new();
            driver.queue.completions(&mut done);
            assert_eq!(done.len(), 1);
            assert_eq!((done[0].0, done[0].1.is_ok()), (7, good));
        }
    });
}
