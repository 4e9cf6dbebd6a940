//! A virtio queue over guest memory, as a device in Rust has one: what the
//! device writes is in the guest's RAM, and observers hear of it.

use std::sync::{Arc, Mutex};

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryObserver, PAGE_SIZE};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddressSpace};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x4000;
const ANSWER: u64 = 0x5000;
const SIZE: u16 = 8;

/// Written pages, as a dirty log keeps them.
#[derive(Default)]
struct DirtyLog(Mutex<Vec<u64>>);

impl MemoryObserver for DirtyLog {
    fn written(&self, address: GuestPhys, length: u64) {
        assert!(address.page_offset() + length <= PAGE_SIZE, "no write here crosses a page");
        self.0.lock().unwrap().push(address.page() * PAGE_SIZE);
    }
}

/// Written bytes, as a code map looks at them.
#[derive(Default)]
struct CodeMap(Mutex<Vec<(u64, u64)>>);

impl MemoryObserver for CodeMap {
    fn written(&self, address: GuestPhys, length: u64) {
        self.0.lock().unwrap().push((address.0, length));
    }
}

/// A driver's part: VirtIO 1.2, 2.7.5 (descriptors) and 2.7.6 (available ring).
fn offer(memory: &GuestMemory) {
    let descriptor = |address: u64, len: u32, flags: u32, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend((flags as u16).to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let table = [
        descriptor(REQUEST, 4, VRING_DESC_F_NEXT, 1),
        descriptor(ANSWER, 16, VRING_DESC_F_WRITE, 0),
    ];
    memory.write(GuestPhys(DESCRIPTORS), &table.concat()).unwrap();
    memory.write(GuestPhys(REQUEST), b"ping").unwrap();
    // Flags, index, and the head of the chain in the first place.
    memory.write(GuestPhys(AVAILABLE), &[0, 0, 1, 0, 0, 0]).unwrap();
}

#[test]
fn queue_serves_a_request_and_observers_hear_of_its_writes() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    offer(&memory);
    let (log, code) = (Arc::new(DirtyLog::default()), Arc::new(CodeMap::default()));
    memory.add_observer(log.clone());
    memory.add_observer(code.clone());

    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let space = memory.space();
    let regions = space.memory();
    assert!(queue.is_valid(&*regions));

    let chain = queue.pop_descriptor_chain(regions.clone()).expect("one chain is available");
    let head = chain.head_index();
    let (mut read, mut answered) = (Vec::new(), 0);
    for part in chain {
        if part.is_write_only() {
            regions.write_slice(b"pong", part.addr()).unwrap();
            answered += 4;
        } else {
            let mut bytes = vec![0; part.len() as usize];
            regions.read_slice(&mut bytes, part.addr()).unwrap();
            read.extend(bytes);
        }
    }
    queue.add_used(&*regions, head, answered).unwrap();

    assert_eq!(read, b"ping");
    let mut answer = [0; 4];
    memory.read(GuestPhys(ANSWER), &mut answer).unwrap();
    assert_eq!(&answer, b"pong");
    // 2.7.8: flags, index, then (id, length) of each used chain.
    let mut used = [0; 12];
    memory.read(GuestPhys(USED), &mut used).unwrap();
    assert_eq!(used, [0, 0, 1, 0, 0, 0, 0, 0, 4, 0, 0, 0]);

    let mut pages = log.0.lock().unwrap().clone();
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pages, [USED, ANSWER]);
    let code = code.0.lock().unwrap();
    assert!(code.contains(&(ANSWER, 4)), "{code:x?}");
    assert!(code.iter().any(|&(at, len)| at <= USED + 2 && at + len >= USED + 4), "{code:x?}");
}
