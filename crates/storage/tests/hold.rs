//! What a machine that is held and goes on does to a controller.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use tetrarch_block::{Format, ImageOptions};
use tetrarch_io::IoThread;
use tetrarch_memory::GuestMemory;
use tetrarch_storage::nvme::{About, AdminQueues, Nvme};

const LONG: Duration = Duration::from_secs(30);
/// Less than a controller waits for a disk that has nothing to say.
const SOON: Duration = Duration::from_secs(5);

/// Who takes the bus from a controller waits for what is in flight, and no longer.
#[test]
fn bus_is_taken_when_a_resume_finds_that_all_has_ended() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options = ImageOptions { format: Some(Format::Raw), ..ImageOptions::default() };
    let disk = Arc::from(tetrarch_block::open(file.path(), options).unwrap());
    let io = IoThread::new("test").unwrap();
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    let about = About { vendor: 1, model: "m".into(), serial: "s".into(), uuid: [1; 16] };
    let nvme = Nvme::new(&io, memory, "test", disk, about, vec![], Box::new(|_| ())).unwrap();
    let queues = AdminQueues {
        submissions: 0x1000,
        submission_entries: 2,
        completions: 0x2000,
        completion_entries: 2,
    };
    nvme.enable(queues).unwrap();
    io.pause(LONG).unwrap();
    // A flush that ends while nobody looks.
    nvme.shut_down();
    std::thread::scope(|scope| {
        let (taken, told) = channel();
        let nvme = &nvme;
        scope.spawn(move || {
            nvme.set_master(false);
            taken.send(()).unwrap();
        });
        // It waits by then; if not, it need not.
        std::thread::sleep(Duration::from_millis(100));
        io.resume();
        assert!(told.recv_timeout(SOON).is_ok(), "the bus is not taken");
    });
    assert!(nvme.is_shut_down());
}
