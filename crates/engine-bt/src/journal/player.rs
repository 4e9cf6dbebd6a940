//! The side that reads.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tetrarch_engine::{EngineError, Met, Passed, Replay, Reply, Seek};
use tetrarch_journal::{Entry, Input, Outside, Place, Reader, Start, Stop};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::failed;
use super::pages::Pages;

/// What the vCPU is to do at a count.
pub enum Due {
    Stop(Stop),
    /// The recording ends here.
    End,
}

/// How far a recording is read.
#[derive(Clone, Default)]
pub struct Mark {
    place: Place,
    /// Read ahead, up to the first stop and beyond.
    inputs: VecDeque<Input>,
    stops: VecDeque<Stop>,
    /// There is nothing more: the count at which the recording ends.
    end: Option<u64>,
    /// What a clock said last.
    last: u64,
    checkpoints: u64,
}

struct Tape {
    reader: Reader,
    /// Its place is the reader's own.
    read: Mark,
    inside: bool,
    /// Why this is no replay any more.
    diverged: Option<String>,
}

/// What a debugger wants of the vCPU.
#[derive(Clone, Default)]
pub struct Wishes {
    /// A new way, or none any more.
    pub seek: Option<Option<Seek>>,
    pub breakpoints: Arc<BTreeSet<u64>>,
    pub stay: bool,
}

pub struct Player {
    start: Mutex<Start>,
    tsc_hz: u64,
    tape: Mutex<Tape>,
    /// Where memory at the start is.
    first_memory: Place,
    pages: Mutex<Pages>,
    wishes: Mutex<Wishes>,
    passed: Mutex<Passed>,
    /// Where the guest has left.
    count: AtomicU64,
}

impl Player {
    pub fn new(mut reader: Reader) -> Result<Self, EngineError> {
        let first = reader.read().map_err(failed)?;
        let Some(Entry::Start(start)) = first else {
            return Err(EngineError::Refused(
                "the recording ends before the guest has begun".into(),
            )
            .mended_by("record again"));
        };
        let first_memory = reader.place();
        let tape = Tape { reader, read: Mark::default(), inside: false, diverged: None };
        Ok(Self {
            tsc_hz: start.tsc_hz,
            start: Mutex::new(start),
            tape: Mutex::new(tape),
            first_memory,
            pages: Mutex::default(),
            wishes: Mutex::default(),
            passed: Mutex::default(),
            count: AtomicU64::new(0),
        })
    }

    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// The machine at the start, with its memory put in place.
    pub fn take_start(&self, memory: &GuestMemory) -> Result<Start, EngineError> {
        let start = self.start.lock().clone();
        let ram: Vec<_> = memory.regions().iter().map(|r| (r.start.0, r.len)).collect();
        if ram != start.ram {
            return Err(EngineError::Refused(
                "the recording is of a machine with other memory".into(),
            ));
        }
        let mut pages = self.pages.lock();
        self.tape.lock().each_first(|address, data| {
            pages.look(address.page(), data);
            Ok(memory.write(address, data)?)
        })?;
        Ok(start)
    }

    /// Memory at the start that is not zero, page by page.
    pub fn each_first(
        &self,
        each: impl FnMut(GuestPhys, &[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let mut tape = self.tape.lock();
        let place = tape.reader.place();
        tape.reader.go(self.first_memory);
        let result = tape.each_first(each);
        tape.reader.go(place);
        result
    }

    pub fn mark(&self) -> Mark {
        let tape = self.tape.lock();
        Mark { place: tape.reader.place(), ..tape.read.clone() }
    }

    /// Reads on at a mark.
    pub fn go(&self, mark: &Mark) {
        let mut tape = self.tape.lock();
        tape.reader.go(mark.place);
        tape.read = mark.clone();
        tape.diverged = None;
    }

    /// The guest's code runs.
    pub fn enter(&self) {
        self.tape.lock().inside = true;
    }

    pub fn leave(&self, count: u64) {
        self.tape.lock().inside = false;
        self.count.store(count, Ordering::SeqCst);
    }

    /// A seek is told once.
    pub fn take_wishes(&self) -> Wishes {
        let mut wishes = self.wishes.lock();
        let seek = wishes.seek.take();
        Wishes { seek, ..wishes.clone() }
    }

    pub fn set_passed(&self, passed: Passed) {
        *self.passed.lock() = passed;
    }

    pub fn note(&self, met: Met) {
        self.passed.lock().last_met = Some(met);
    }

    pub fn value(&self, read: impl FnOnce() -> u64) -> u64 {
        let mut tape = self.tape.lock();
        if !tape.inside {
            return if tape.read.last == 0 { read() } else { tape.read.last };
        }
        match tape.next_input() {
            Some(Input::Value(value)) => tape.read.last = value,
            found => tape.diverge("reads a clock", found),
        }
        tape.read.last
    }

    /// The answer to an exit; `None` where the recording ends with the exit.
    pub fn answer(&self) -> Option<Reply> {
        let mut tape = self.tape.lock();
        match tape.next_input() {
            Some(Input::Answer(answer)) => Some(answer.into()),
            None => None,
            found => {
                tape.diverge("asks a device", found);
                None
            }
        }
    }

    /// What came with an answer.
    pub fn take_outside(&self) -> Option<Outside> {
        let mut tape = self.tape.lock();
        tape.fill();
        if !matches!(tape.read.inputs.front(), Some(Input::Outside(_))) {
            return None;
        }
        match tape.read.inputs.pop_front() {
            Some(Input::Outside(outside)) => Some(outside),
            _ => None,
        }
    }

    /// The next count at which the guest is to stand.
    pub fn next_count(&self) -> u64 {
        let mut tape = self.tape.lock();
        tape.fill();
        match tape.read.stops.front() {
            Some(stop) => stop.count,
            None => tape.read.end.unwrap_or(0),
        }
    }

    /// What is due at this count, or why the guest has gone astray.
    pub fn due(&self, count: u64) -> Result<Option<Due>, EngineError> {
        let mut tape = self.tape.lock();
        tape.fill();
        if let Some(why) = &tape.diverged {
            return Err(astray(count, why));
        }
        let next = tape.read.stops.front().map(|stop| stop.count).or(tape.read.end);
        match next {
            Some(next) if next == count => {
                Ok(Some(tape.read.stops.pop_front().map_or(Due::End, Due::Stop)))
            }
            Some(next) if next < count => Err(astray(count, &format!("it was to stand at {next}"))),
            _ => Ok(None),
        }
    }

    pub fn pages(&self) -> &Mutex<Pages> {
        &self.pages
    }

    pub fn passed_checkpoint(&self) {
        self.tape.lock().read.checkpoints += 1;
    }

    /// Checkpoints that were alike, and whether the recorder ended the recording itself.
    pub fn report(&self) -> (u64, bool) {
        let tape = self.tape.lock();
        (tape.read.checkpoints, !tape.reader.cut)
    }
}

impl Replay for Player {
    fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    fn seek(&self, seek: Seek) {
        *self.passed.lock() = Passed::default();
        self.wishes.lock().seek = Some(Some(seek));
    }

    fn give_up(&self) {
        self.wishes.lock().seek = Some(None);
    }

    fn passed(&self) -> Passed {
        *self.passed.lock()
    }

    fn set_breakpoints(&self, linear: &[u64]) {
        let mut wishes = self.wishes.lock();
        let wanted: BTreeSet<u64> = linear.iter().copied().collect();
        if *wishes.breakpoints != wanted {
            wishes.breakpoints = Arc::new(wanted);
        }
    }

    fn stay(&self, stay: bool) {
        self.wishes.lock().stay = stay;
    }
}

pub fn astray(count: u64, why: &str) -> EngineError {
    EngineError::Refused(format!("the replay has left the recording at {count}: {why}"))
        .mended_by("report it; a recording is replayed by the release that made it")
}

impl Tape {
    /// Entries of memory, from where the reader is to the first of another kind.
    fn each_first(
        &mut self,
        mut each: impl FnMut(GuestPhys, &[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        loop {
            let place = self.reader.place();
            let Some(Entry::Memory(address, data)) = self.reader.read().map_err(failed)? else {
                self.reader.go(place);
                return Ok(());
            };
            each(GuestPhys(address), &data)?;
        }
    }

    /// Reads on until a stop is known, or the end.
    fn fill(&mut self) {
        while self.read.stops.is_empty() && self.read.end.is_none() {
            match self.reader.read() {
                Ok(Some(Entry::Input(input))) => self.read.inputs.push_back(input),
                Ok(Some(Entry::Stop(stop))) => self.read.stops.push_back(stop),
                Ok(Some(Entry::End(count))) => self.read.end = Some(count),
                Ok(Some(Entry::Start(_) | Entry::Memory(..))) => {
                    self.diverged = Some("the recording has a second start".into());
                    self.read.end = Some(0);
                }
                Ok(None) => self.read.end = Some(self.reader.last_count()),
                Err(error) => {
                    self.diverged = Some(format!("the recording: {error}"));
                    self.read.end = Some(0);
                }
            }
        }
    }

    fn next_input(&mut self) -> Option<Input> {
        self.fill();
        self.read.inputs.pop_front()
    }

    fn diverge(&mut self, what: &str, found: Option<Input>) {
        let found = match found {
            None => "nothing more",
            Some(Input::Value(_)) => "the reading of a clock",
            Some(Input::Answer(_)) => "a device's answer",
            Some(Input::Outside(_)) => "what devices did",
        };
        let next = self.read.stops.front().map(|stop| stop.count);
        let next = next.or(self.read.end).unwrap_or(0);
        self.diverged.get_or_insert_with(|| {
            format!("it {what} where there was {found}, before it stands at {next}")
        });
    }
}
