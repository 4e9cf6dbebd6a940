//! The side that writes down.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ThreadId};

use parking_lot::Mutex;
use tetrarch_engine::{EngineError, Reply};
use tetrarch_journal::{Bytes, Entry, Input, Line, Outside, Start, Stop, Writer};
use tetrarch_memory::{GuestMemory, GuestPhys, MemoryObserver, PAGE_SIZE, Refusal, Region};

use super::failed;
use super::gate::Gate;
use super::pages::{Pages, each_page, is_hole, is_zero};
use crate::irqchip::Wake;

/// What devices did since the guest last stood.
#[derive(Default)]
struct Pending {
    /// Ranges of memory: first address and length.
    writes: BTreeMap<u64, u64>,
    lines: Vec<Line>,
}

struct Log {
    writer: Option<Writer>,
    count: u64,
    /// The thread of the vCPU while it is inside.
    inside: Option<ThreadId>,
    failed: Option<EngineError>,
}

/// Locks: `log` and `pending`, neither held while the other is taken; the gate's own.
pub struct Recorder {
    gate: Gate,
    pending: Mutex<Pending>,
    any: AtomicBool,
    log: Mutex<Log>,
    pages: Mutex<Pages>,
    started: AtomicBool,
    bells: Arc<dyn Wake>,
    /// Instructions from one checkpoint to the next.
    pub checkpoint_every: u64,
}

impl Recorder {
    pub fn new(writer: Writer, checkpoint_every: u64, bells: Arc<dyn Wake>) -> Self {
        let log = Log { writer: Some(writer), count: 0, inside: None, failed: None };
        Self {
            gate: Gate::default(),
            pending: Mutex::default(),
            any: AtomicBool::new(false),
            log: Mutex::new(log),
            pages: Mutex::default(),
            started: AtomicBool::new(false),
            bells,
            checkpoint_every: checkpoint_every.max(1),
        }
    }

    pub fn started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// Writes the machine down as it is before its first instruction.
    pub fn start(&self, start: Start, memory: &GuestMemory) -> Result<(), EngineError> {
        let mut pages = self.pages.lock();
        let mut log = self.log.lock();
        log.put(&Entry::Start(start));
        each_page(memory, |page, data| {
            pages.look(page, data);
            log.put(&Entry::Memory(page << 12, Bytes::from(data)));
            Ok(())
        })?;
        self.pending.lock().writes.clear();
        self.started.store(true, Ordering::SeqCst);
        log.check()
    }

    pub fn enter(&self) {
        self.gate.enter();
        self.log.lock().inside = Some(thread::current().id());
    }

    pub fn leave(&self, count: u64) {
        let mut log = self.log.lock();
        log.count = count;
        log.inside = None;
        drop(log);
        self.gate.leave();
    }

    pub fn value(&self, read: impl FnOnce() -> u64) -> u64 {
        let value = read();
        let mut log = self.log.lock();
        if log.inside.is_some() && self.started() {
            log.put(&Entry::Input(Input::Value(value)));
        }
        value
    }

    pub fn answer(&self, reply: &Reply) {
        self.log.lock().put(&Entry::Input(Input::Answer(reply.into())));
    }

    /// A line changes, or a message comes: the guest hears of it when it next stands.
    pub fn line(&self, line: Line) {
        self.pending.lock().lines.push(line);
        self.any.store(true, Ordering::SeqCst);
        self.bells.wake(0);
    }

    /// Lets others work, if they want to.
    pub fn stand(&self) {
        if self.gate.is_wanted() {
            self.gate.leave();
            self.gate.enter();
        }
    }

    /// For who writes to memory or reads what the guest writes: the guest stands until
    /// [`go_on`](Self::go_on).
    pub fn stop(&self) {
        self.gate.stop(|| self.bells.wake(0));
    }

    pub fn go_on(&self) {
        self.gate.go_on();
    }

    /// The guest's thread gives the host's CPU away.
    pub fn asleep<T>(&self, sleep: impl FnOnce() -> T) -> T {
        self.gate.leave();
        let result = sleep();
        self.gate.enter();
        result
    }

    pub fn has_outside(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// What has come since the last time, with the memory as it is now.
    pub fn take_outside(&self, memory: &GuestMemory, now_ns: u64) -> Result<Outside, EngineError> {
        if !self.any.swap(false, Ordering::SeqCst) {
            return Ok(Outside::default());
        }
        let Pending { writes, lines } = std::mem::take(&mut *self.pending.lock());
        let mut taken = Outside { lines, now_ns, ..Outside::default() };
        for (address, length) in writes {
            if length >= PAGE_SIZE && is_hole(memory, address, length) {
                taken.holes.push((address, length));
                continue;
            }
            let mut data = vec![0; length as usize];
            memory.read(GuestPhys(address), &mut data)?;
            if length >= PAGE_SIZE && is_zero(&data) {
                taken.holes.push((address, length));
                continue;
            }
            taken.writes.push((address, Bytes::from(data)));
        }
        Ok(taken)
    }

    pub fn put_outside(&self, outside: Outside) {
        self.log.lock().put(&Entry::Input(Input::Outside(outside)));
    }

    pub fn put_stop(&self, stop: Stop) -> Result<(), EngineError> {
        let mut log = self.log.lock();
        log.count = stop.count;
        let flush = stop.checkpoint.is_some();
        log.put(&Entry::Stop(stop));
        if flush {
            log.flush();
        }
        log.check()
    }

    pub fn pages(&self) -> &Mutex<Pages> {
        &self.pages
    }

    /// Ends the recording. Returns the count and the bytes written.
    pub fn finish(&self) -> Result<(u64, u64), EngineError> {
        let mut log = self.log.lock();
        let count = log.count;
        log.put(&Entry::End(count));
        log.flush();
        log.check()?;
        let written = log.writer.as_ref().map_or(0, Writer::written);
        log.writer = None;
        Ok((count, written))
    }
}

impl Log {
    fn put(&mut self, entry: &Entry) {
        let count = self.count;
        if let Some(writer) = &mut self.writer
            && let Err(error) = writer.put(count, entry)
        {
            self.fail(failed(error).mended_by("free space, and record again"));
        }
    }

    fn flush(&mut self) {
        let count = self.count;
        if let Some(writer) = &mut self.writer
            && let Err(error) = writer.flush(count)
        {
            self.fail(failed(error).mended_by("free space, and record again"));
        }
    }

    fn fail(&mut self, error: EngineError) {
        self.failed.get_or_insert(error);
        self.writer = None;
    }

    /// What went wrong, once.
    fn check(&mut self) -> Result<(), EngineError> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

/// Hears of what devices write.
pub struct DeviceWrites(pub Arc<super::Journal>);

impl MemoryObserver for DeviceWrites {
    fn written(&self, address: GuestPhys, length: u64) {
        let super::Journal::Record(recorder) = &*self.0 else { return };
        if !recorder.started() {
            return;
        }
        if recorder.gate.runs() {
            let mut log = recorder.log.lock();
            if log.inside != Some(thread::current().id()) {
                log.fail(EngineError::Refused(format!(
                    "memory at {:#x} was written while the guest ran, by a device that cannot be \
                     recorded",
                    address.0
                )));
            }
            // The engine's own, which a replay does as well.
            return;
        }
        let mut pending = recorder.pending.lock();
        let known = pending.writes.entry(address.0).or_insert(0);
        *known = length.max(*known);
        recorder.any.store(true, Ordering::SeqCst);
    }

    fn mapped(&self, _region: &Region) -> Result<(), Refusal> {
        match &*self.0 {
            super::Journal::Record(recorder) if recorder.started() => {
                Err("memory cannot be added while the machine records".into())
            }
            _ => Ok(()),
        }
    }

    fn unmapped(&self, region: &Region) {
        if let super::Journal::Record(recorder) = &*self.0
            && recorder.started()
        {
            recorder.log.lock().fail(EngineError::Refused(format!(
                "memory at {:#x} was taken from a machine that records",
                region.start.0
            )));
        }
    }
}
