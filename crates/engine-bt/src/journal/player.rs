//! The side that reads.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tetrarch_engine::{EngineError, Reply};
use tetrarch_journal::{Entry, Input, Outside, Reader, Start, Stop};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::failed;
use super::pages::Pages;

/// What the vCPU is to do at a count.
pub enum Due {
    Stop(Stop),
    /// The recording ends here.
    End,
}

struct Tape {
    reader: Reader,
    /// Read ahead, up to the first stop and beyond.
    inputs: VecDeque<Input>,
    stops: VecDeque<Stop>,
    /// There is nothing more: the count at which the recording ends.
    end: Option<u64>,
    inside: bool,
    /// What a clock said last.
    last: u64,
    /// Why this is no replay any more.
    diverged: Option<String>,
    checkpoints: u64,
}

pub struct Player {
    start: Mutex<Start>,
    tsc_hz: u64,
    tape: Mutex<Tape>,
    pages: Mutex<Pages>,
}

impl Player {
    pub fn new(mut reader: Reader) -> Result<Self, EngineError> {
        let first = reader.read().map_err(failed)?;
        let Some(Entry::Start(start)) = first else {
            return Err(EngineError::Refused(
                "the recording ends before the guest has begun".into(),
            ));
        };
        let tape = Tape {
            reader,
            inputs: VecDeque::new(),
            stops: VecDeque::new(),
            end: None,
            inside: false,
            last: 0,
            diverged: None,
            checkpoints: 0,
        };
        Ok(Self {
            tsc_hz: start.tsc_hz,
            start: Mutex::new(start),
            tape: Mutex::new(tape),
            pages: Mutex::default(),
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
        let mut tape = self.tape.lock();
        let mut pages = self.pages.lock();
        loop {
            let place = tape.reader.place();
            match tape.reader.read().map_err(failed)? {
                Some(Entry::Memory(address, data)) => {
                    memory.write(GuestPhys(address), &data)?;
                    pages.look(address >> 12, &data);
                }
                _ => {
                    tape.reader.go(place);
                    break;
                }
            }
        }
        Ok(start)
    }

    pub fn set_inside(&self, inside: bool) {
        self.tape.lock().inside = inside;
    }

    pub fn value(&self, read: impl FnOnce() -> u64) -> u64 {
        let mut tape = self.tape.lock();
        if !tape.inside {
            return if tape.last == 0 { read() } else { tape.last };
        }
        match tape.next_input() {
            Some(Input::Value(value)) => tape.last = value,
            found => tape.diverge("reads a clock", found),
        }
        tape.last
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
        if !matches!(tape.inputs.front(), Some(Input::Outside(_))) {
            return None;
        }
        match tape.inputs.pop_front() {
            Some(Input::Outside(outside)) => Some(outside),
            _ => None,
        }
    }

    /// The next count at which the guest is to stand.
    pub fn next_count(&self) -> u64 {
        let mut tape = self.tape.lock();
        tape.fill();
        match tape.stops.front() {
            Some(stop) => stop.count,
            None => tape.end.unwrap_or(0),
        }
    }

    /// What is due at this count, or why the guest has gone astray.
    pub fn due(&self, count: u64) -> Result<Option<Due>, EngineError> {
        let mut tape = self.tape.lock();
        tape.fill();
        if let Some(why) = &tape.diverged {
            return Err(astray(count, why));
        }
        let next = tape.stops.front().map(|stop| stop.count).or(tape.end);
        match next {
            Some(next) if next == count => {
                Ok(Some(tape.stops.pop_front().map_or(Due::End, Due::Stop)))
            }
            Some(next) if next < count => Err(astray(count, &format!("it was to stand at {next}"))),
            _ => Ok(None),
        }
    }

    pub fn pages(&self) -> &Mutex<Pages> {
        &self.pages
    }

    pub fn passed_checkpoint(&self) {
        self.tape.lock().checkpoints += 1;
    }

    /// Checkpoints that were alike, and whether the recorder ended the recording itself.
    pub fn report(&self) -> (u64, bool) {
        let tape = self.tape.lock();
        (tape.checkpoints, !tape.reader.cut)
    }
}

pub fn astray(count: u64, why: &str) -> EngineError {
    EngineError::Refused(format!("the replay has left the recording at {count}: {why}"))
        .mended_by("report it; a recording is replayed by the release that made it")
}

impl Tape {
    /// Reads on until a stop is known, or the end.
    fn fill(&mut self) {
        while self.stops.is_empty() && self.end.is_none() {
            match self.reader.read() {
                Ok(Some(Entry::Input(input))) => self.inputs.push_back(input),
                Ok(Some(Entry::Stop(stop))) => self.stops.push_back(stop),
                Ok(Some(Entry::End(count))) => self.end = Some(count),
                Ok(Some(Entry::Start(_) | Entry::Memory(..))) => {
                    self.diverged = Some("the recording has a second start".into());
                    self.end = Some(0);
                }
                Ok(None) => self.end = Some(self.reader.last_count()),
                Err(error) => {
                    self.diverged = Some(format!("the recording: {error}"));
                    self.end = Some(0);
                }
            }
        }
    }

    fn next_input(&mut self) -> Option<Input> {
        self.fill();
        self.inputs.pop_front()
    }

    fn diverge(&mut self, what: &str, found: Option<Input>) {
        let found = match found {
            None => "nothing more",
            Some(Input::Value(_)) => "the reading of a clock",
            Some(Input::Answer(_)) => "a device's answer",
            Some(Input::Outside(_)) => "what devices did",
        };
        let next = self.stops.front().map(|stop| stop.count);
        let next = next.or(self.end).unwrap_or(0);
        self.diverged.get_or_insert_with(|| {
            format!("it {what} where there was {found}, before it stands at {next}")
        });
    }
}
