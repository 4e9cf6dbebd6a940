use std::os::unix::fs::FileExt;

use tempfile::TempDir;

use crate::testing::{Driver, pattern};
use crate::{BlockError, Format, ImageOptions, NewImage, Request, check, create, open};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Small ones make every table more than one.
const CLUSTER: u64 = 512;
const COPIED: u64 = 1 << 63;

struct Image {
    folder: TempDir,
    file: std::fs::File,
}

impl Image {
    /// With data in its first clusters.
    fn new(size: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.qcow2");
        let new = NewImage { size: Some(size), cluster_size: Some(CLUSTER), ..NewImage::default() };
        create(&path, Format::Qcow2, &new).unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let image = Self { folder, file };
        image.drive().write(0, &[(0, 2048)], &pattern(1, 2048));
        image
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("disk.qcow2")
    }

    fn drive(&self) -> Driver {
        Driver::new(open(&self.path(), ImageOptions::default()).unwrap().open_queue().unwrap())
    }

    fn number(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn l2(&self) -> u64 {
        self.number(self.number(40)) & !COPIED
    }

    /// The disk's first cluster is at this place of the file.
    fn map(&self, host: u64) {
        self.file.write_all_at(&(host | COPIED).to_be_bytes(), self.l2()).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }
}

fn write(driver: &mut Driver, offset: u64) -> Result<(), BlockError> {
    let data = driver.list(&[(0x1000, CLUSTER)]);
    driver.run(Request::Write { offset, data })
}

#[test]
fn no_data_are_written_over_the_tables() {
    let image = Image::new(MIB);
    let (l1, reftable) = (image.number(40), image.number(48));
    let whole = image.bytes();
    let length = CLUSTER;
    // The header is out of reach: an entry of 0 is none.
    for table in [l1, reftable, image.number(reftable), image.l2()] {
        for request in 0..4 {
            image.file.write_all_at(&whole, 0).unwrap();
            image.map(table);
            let before = image.bytes();
            let mut driver = image.drive();
            let data = driver.list(&[(0x1000, 100)]);
            let refused = driver.run(match request {
                0 => Request::Write { offset: 200, data },
                1 => Request::Discard { offset: 0, length },
                2 => Request::WriteZeroes { offset: 0, length, unmap: true },
                _ => Request::WriteZeroes { offset: 100, length: 50, unmap: false },
            });
            assert!(matches!(refused, Err(BlockError::Host(_))), "{table:#x}: {refused:?}");
            // It is read, and written to no more.
            assert!(driver.read(CLUSTER, &[(0, 512)]).unwrap() == pattern(1, 2048)[512..1024]);
            assert!(write(&mut driver, CLUSTER).is_err());
            drop(driver);
            let mut after = image.bytes();
            assert_eq!(after[79] & 2, 2, "marked as corrupt");
            after[79] &= !2;
            assert!(after == before, "{table:#x}");
            let error = open(&image.path(), ImageOptions::default()).err().unwrap().to_string();
            assert!(error.contains("marked as corrupt; repair it"), "{error}");
        }
    }
}

#[test]
fn nor_over_a_table_that_was_made_since() {
    let image = Image::new(MIB);
    // The next cluster that is given out: a table for another part of the disk.
    image.map(image.bytes().len() as u64);
    let mut driver = image.drive();
    assert_eq!(write(&mut driver, 512 * KIB), Ok(()));
    assert!(write(&mut driver, 0).is_err());
}

#[test]
fn tables_that_count_as_free_are_not_given_out() {
    let image = Image::new(MIB);
    let block = image.number(image.number(48));
    image.file.write_all_at(&[0; 2], block + 2 * (image.l2() / CLUSTER)).unwrap();
    let error = open(&image.path(), ImageOptions::default()).err().unwrap().to_string();
    assert!(error.contains("its refcounts leave out its tables; repair it"), "{error}");
}

/// Tables grow, move and leave room for data behind.
#[test]
fn good_image_is_written_to_its_end_and_grows() {
    let image = Image::new(4 * MIB);
    let reftable = image.number(48);
    let disk = open(&image.path(), ImageOptions::default()).unwrap();
    let mut driver = Driver::new(disk.open_queue().unwrap());
    let chunk = 128 * KIB;
    let fill = |driver: &mut Driver, from: u64, to: u64| {
        for offset in (from..to).step_by(chunk as usize) {
            driver.write(offset, &[(0, chunk)], &pattern(offset, chunk as usize));
        }
    };
    fill(&mut driver, 0, 4 * MIB);
    disk.resize(12 * MIB).unwrap();
    fill(&mut driver, 4 * MIB, 12 * MIB);
    for offset in (0..12 * MIB).step_by(chunk as usize) {
        assert!(driver.read(offset, &[(0, chunk)]).unwrap() == pattern(offset, chunk as usize));
    }
    let length = MIB;
    assert_eq!(driver.run(Request::Discard { offset: MIB, length }), Ok(()));
    fill(&mut driver, MIB, 2 * MIB);
    drop((driver, disk));
    assert_ne!(image.number(48), reftable, "the refcount table has moved");
    assert_eq!(check(&image.path(), false).unwrap().errors, 0);
}
