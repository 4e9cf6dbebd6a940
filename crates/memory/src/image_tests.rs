use std::io::Write;

use super::*;
use crate::HIGH_RAM_START;

const MIB: u64 = 1 << 20;
const PAGE: usize = PAGE_SIZE as usize;

fn memory() -> GuestMemory {
    let memory = GuestMemory::new(4 * MIB).unwrap();
    memory.add_region(GuestPhys(HIGH_RAM_START), 2 * MIB).unwrap();
    memory
}

fn file() -> File {
    let file = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    File::from(file)
}

fn saved(memory: &GuestMemory, ranges: Option<&[Range]>) -> Layer {
    let file = file();
    let (runs, end) = memory.save(&file, PAGE_SIZE, ranges).unwrap();
    let stored: u64 =
        runs.iter().filter(|run| run.offset != 0).map(|run| u64::from(run.length)).sum();
    assert_eq!(end, PAGE_SIZE + stored);
    Layer { name: "it".into(), file, runs }
}

fn page(memory: &GuestMemory, address: u64) -> [u8; PAGE] {
    let mut data = [1; PAGE];
    memory.read(GuestPhys(address), &mut data).unwrap();
    data
}

fn blocks(memory: &GuestMemory) -> u64 {
    use std::os::unix::fs::MetadataExt;
    memory.regions()[0].file().unwrap().file().metadata().unwrap().blocks()
}

#[test]
fn ram_survives_and_zeros_cost_nothing() {
    let one = memory();
    one.write(GuestPhys(0x3000), &[7; 2 * PAGE]).unwrap();
    one.write(GuestPhys(2 * MIB), &[0; PAGE]).unwrap();
    one.write(GuestPhys(4 * MIB - 1), &[9]).unwrap();
    one.write(GuestPhys(HIGH_RAM_START), &[8; PAGE]).unwrap();
    let layer = saved(&one, None);
    let places: Vec<_> = layer.runs.iter().map(|run| (run.address.0, run.length)).collect();
    assert_eq!(places, [(0x3000, 0x2000), (4 * MIB - PAGE_SIZE, 0x1000), (HIGH_RAM_START, 0x1000)]);
    let table: Vec<u8> = layer.runs.iter().flat_map(|run| run.to_bytes()).collect();
    assert_eq!(Run::table(&table), layer.runs);

    let two = memory();
    two.load(std::slice::from_ref(&layer)).unwrap();
    assert_eq!(blocks(&two), 0, "nothing was copied");
    assert_eq!(page(&two, 0x4000), [7; PAGE]);
    assert_eq!(page(&two, 0x5000), [0; PAGE]);
    assert_eq!(page(&two, 4 * MIB - PAGE_SIZE)[PAGE - 1], 9);
    assert_eq!(page(&two, HIGH_RAM_START), [8; PAGE]);
    // What the guest writes is its own.
    two.write(GuestPhys(0x3000), &[1]).unwrap();
    let mut first = [0];
    layer.file.read_exact_at(&mut first, PAGE_SIZE).unwrap();
    assert_eq!(first, [7]);
    // It can be saved again, by what is mapped and what is not.
    two.write(GuestPhys(0x9000), &[5; PAGE]).unwrap();
    let three = memory();
    three.load(&[saved(&two, None)]).unwrap();
    assert_eq!(page(&three, 0x3000)[..2], [1, 7]);
    assert_eq!(page(&three, 0x9000), [5; PAGE]);
    assert_eq!(page(&three, HIGH_RAM_START), [8; PAGE]);
}

#[test]
fn later_layers_count_more_their_zeros_too() {
    let one = memory();
    one.write(GuestPhys(0), &[7; 8 * PAGE]).unwrap();
    let base = saved(&one, None);
    one.write(GuestPhys(0x2000), &[0; PAGE]).unwrap();
    one.write(GuestPhys(0x3000), &[5; PAGE]).unwrap();
    let written: Range = 0x2000..0x4000;
    let top = saved(&one, Some(std::slice::from_ref(&written)));
    assert_eq!(top.runs.len(), 2);
    let two = memory();
    two.load(&[base, top]).unwrap();
    let seen = [0x1000, 0x2000, 0x3000, 0x4000, 0x7000, 0x8000].map(|at| page(&two, at)[0]);
    assert_eq!(seen, [7, 0, 5, 7, 7, 0]);
}

#[test]
fn each_damage_is_found_before_anything_is_mapped() {
    let one = memory();
    one.write(GuestPhys(0), &[7; 600 * PAGE]).unwrap();
    let refused = |change: &dyn Fn(&mut Layer)| {
        let mut layer = saved(&one, None);
        change(&mut layer);
        let memory = memory();
        let error = memory.load(&[layer]).unwrap_err();
        assert_eq!(page(&memory, 0), [0; PAGE]);
        error.to_string()
    };
    let flip = |layer: &mut Layer| layer.file.write_all_at(&[6], PAGE_SIZE + 0x12_3456).unwrap();
    assert_eq!(refused(&flip), "it has RAM with a wrong checksum");
    assert_eq!(refused(&|layer| layer.file.set_len(2 * MIB).unwrap()), "it is cut short");
    let far = |layer: &mut Layer| layer.runs[0].address = GuestPhys(8 * MIB);
    assert!(refused(&|layer| far(layer)).contains("where the machine has none"));
    let wrong: [fn(&mut Run); 5] = [
        |run| run.length = 0,
        |run| run.length = u32::MAX,
        |run| run.offset += 1,
        |run| run.address.0 = u64::MAX - 0xFFF,
        |run| run.address.0 += 0x80_0000,
    ];
    for change in wrong {
        refused(&|layer| change(&mut layer.runs[0]));
    }
    assert_eq!(refused(&|layer| layer.runs[1].address.0 = 0), "it has a run of RAM upon another");
}

#[test]
fn pages_that_the_guest_gives_up_are_zero_and_the_files_no_more() {
    let one = memory();
    one.write(GuestPhys(0), &[7; 16 * PAGE]).unwrap();
    let layer = saved(&one, None);
    let two = memory();
    two.load(&[layer]).unwrap();
    two.write(GuestPhys(0x5000), &[1]).unwrap();
    assert_eq!(two.discard(GuestPhys(0x4000), 0x3000).unwrap(), 0x3000);
    let seen = [0x3000, 0x4000, 0x5000, 0x6000, 0x7000].map(|at| page(&two, at)[0]);
    assert_eq!(seen, [7, 0, 0, 0, 7]);
    two.write(GuestPhys(0x5000), &[3]).unwrap();
    assert_eq!(page(&two, 0x5000)[0], 3);
    assert_ne!(blocks(&two), 0);
}

#[test]
fn whoever_shares_the_memfd_finds_all_of_it() {
    let one = memory();
    one.write(GuestPhys(0x3000), &[7; 2 * PAGE]).unwrap();
    let two = memory();
    two.load(&[saved(&one, None)]).unwrap();
    two.write(GuestPhys(0x4000), &[5]).unwrap();
    two.settle().unwrap();
    let mut seen = [0; 2];
    let regions = two.regions();
    regions[0].file().unwrap().file().read_exact_at(&mut seen, 0x3FFF).unwrap();
    assert_eq!(seen, [7, 5]);
    two.write(GuestPhys(0x3000), &[9]).unwrap();
    regions[0].file().unwrap().file().read_exact_at(&mut seen, 0x3000).unwrap();
    assert_eq!(seen, [9, 7]);
}

/// Every other page: more runs than may be mapped.
#[test]
fn runs_beyond_the_limit_are_copied() {
    let bytes = (2 * MAPPINGS_MAX as u64 + 64) * PAGE_SIZE;
    let one = GuestMemory::new(bytes).unwrap();
    let mut image = file();
    image.write_all(&vec![0; PAGE]).unwrap();
    for page in (0..bytes).step_by(2 * PAGE) {
        one.write(GuestPhys(page), &(page | 1).to_le_bytes()).unwrap();
    }
    let two = GuestMemory::new(bytes).unwrap();
    two.load(&[saved(&one, None)]).unwrap();
    for at in (0..bytes).step_by(2 * PAGE) {
        assert_eq!(page(&two, at)[..8], (at | 1).to_le_bytes());
    }
    assert!(two.lazy.lock().len() <= MAPPINGS_MAX);
}
