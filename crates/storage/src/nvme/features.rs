//! Features: what a driver sets and asks (5.14, 5.21).

use super::status::Status;

/// Feature identifiers (figure 271).
const ARBITRATION: u8 = 0x01;
const POWER: u8 = 0x02;
const TEMPERATURE: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
const WRITE_CACHE: u8 = 0x06;
const QUEUES: u8 = 0x07;
const COALESCING: u8 = 0x08;
const VECTOR: u8 = 0x09;
const ATOMICITY: u8 = 0x0A;
const EVENTS: u8 = 0x0B;

/// Kelvin: where a controller calls itself too warm (WCTEMP).
pub const WARM: u16 = 343;

/// Asynchronous event configuration: notices of changed namespaces.
const NAMESPACE_NOTICES: u32 = 1 << 8;

const COUNT: usize = EVENTS as usize + 1;

/// Values by their identifiers.
pub struct Features {
    values: [u32; COUNT],
    /// Queue pairs that the controller has, and interrupts.
    pairs: u32,
}

/// Which of a feature's values is asked for (figure 179): the one in use, or what it can do.
fn select(word: u32) -> u32 {
    word >> 8 & 7
}

impl Features {
    pub fn new(pairs: usize) -> Self {
        let pairs = pairs as u32;
        Self { values: Self::defaults(pairs), pairs }
    }

    fn defaults(pairs: u32) -> [u32; COUNT] {
        let mut values = [0; COUNT];
        values[usize::from(TEMPERATURE)] = WARM.into();
        values[usize::from(WRITE_CACHE)] = 1;
        values[usize::from(QUEUES)] = (pairs - 1) | (pairs - 1) << 16;
        values
    }

    /// A write is durable when it ends.
    pub fn write_through(&self) -> bool {
        self.values[usize::from(WRITE_CACHE)] & 1 == 0
    }

    pub fn tells_namespaces(&self) -> bool {
        self.values[usize::from(EVENTS)] & NAMESPACE_NOTICES != 0
    }

    /// The result of Get Features, by its words 10 and 11.
    pub fn get(&self, word: u32, argument: u32) -> Result<u32, Status> {
        let id = word as u8;
        let defaults = Self::defaults(self.pairs);
        let values = match select(word) {
            0 => &self.values,
            // Nothing is saved: the default is what it would be.
            1 | 2 => &defaults,
            // Changeable.
            3 if known(id) => return Ok(1 << 2),
            _ => return Err(Status::INVALID_FIELD),
        };
        match id {
            VECTOR => self.vector(argument),
            // Of other sensors, and the lower threshold, there are none.
            TEMPERATURE if argument >> 16 & 0x3F != 0 => Ok(0),
            _ if known(id) => Ok(values[usize::from(id)]),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Set Features; `queues` says whether I/O queues were made already.
    pub fn set(&mut self, word: u32, argument: u32, queues: bool) -> Result<u32, Status> {
        const SAVE: u32 = 1 << 31;
        let id = word as u8;
        if word & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        let value = match id {
            ARBITRATION | ERROR_RECOVERY | COALESCING | ATOMICITY | EVENTS => argument,
            WRITE_CACHE => argument & 1,
            // One power state.
            POWER if argument & 0x1F == 0 => argument,
            TEMPERATURE if argument >> 16 & 0x3F == 0 => argument & 0xFFFF,
            TEMPERATURE => return Ok(0),
            VECTOR => return self.vector(argument).map(|_| 0),
            QUEUES => {
                let (submissions, completions) = (argument & 0xFFFF, argument >> 16);
                if submissions == 0xFFFF || completions == 0xFFFF {
                    return Err(Status::INVALID_FIELD);
                }
                if queues {
                    return Err(Status::SEQUENCE);
                }
                let most = self.pairs - 1;
                let value = submissions.min(most) | completions.min(most) << 16;
                self.values[usize::from(QUEUES)] = value;
                return Ok(value);
            }
            _ => return Err(Status::INVALID_FIELD),
        };
        self.values[usize::from(id)] = value;
        Ok(0)
    }

    /// Interrupts are never put together: each vector says so.
    fn vector(&self, argument: u32) -> Result<u32, Status> {
        let vector = argument & 0xFFFF;
        if vector > self.pairs { Err(Status::INVALID_FIELD) } else { Ok(vector | 1 << 16) }
    }

    pub fn save(&self) -> Vec<u64> {
        self.values.iter().map(|&value| value.into()).collect()
    }

    /// What `save` gave; false where it is not that.
    pub fn load(&mut self, saved: &[u64]) -> bool {
        let fits = saved.len() == COUNT;
        for (value, &saved) in self.values.iter_mut().zip(saved) {
            *value = saved as u32;
        }
        fits
    }
}

fn known(id: u8) -> bool {
    matches!(id, ARBITRATION | POWER | TEMPERATURE..=EVENTS)
}
