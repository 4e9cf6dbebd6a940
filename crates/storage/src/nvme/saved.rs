//! What of a controller goes into a saved machine, as numbers.

use super::controller::Inner;
use super::events::MAX_REQUESTS;
use super::queue::{Completions, Submissions};
use super::{MAX_ENTRIES, PAGE};

/// A saved controller is none.
#[derive(Debug, thiserror::Error)]
#[error("a saved NVMe controller is damaged, or of another")]
pub struct DamagedState;

/// One that is enabled and at rest. Rows are of as many numbers as the comments name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// number, base, entries, completion queue, head, doorbell
    pub submissions: Vec<u64>,
    /// number, base, entries, tail, phase, doorbell, interrupts, vector
    pub completions: Vec<u64>,
    /// values by their identifiers
    pub features: Vec<u64>,
    /// commands that wait for an event
    pub requests: Vec<u64>,
    /// of each type: result plus 1 that is due, and whether it was told; whether the namespace
    /// has changed
    pub events: Vec<u64>,
}

impl Inner {
    pub fn save(&self) -> Saved {
        let mut saved = Saved { features: self.features.save(), ..Saved::default() };
        for (id, queue) in self.submissions.iter().enumerate() {
            let Some(queue) = queue else { continue };
            saved.submissions.extend([
                id as u64,
                queue.base(),
                queue.size.into(),
                queue.completions as u64,
                queue.head.into(),
                self.doorbells.tail(id).into(),
            ]);
        }
        for (id, queue) in self.completions.iter().enumerate() {
            let Some(queue) = queue else { continue };
            saved.completions.extend([
                id as u64,
                queue.base(),
                queue.size.into(),
                queue.tail.into(),
                queue.phase.into(),
                self.doorbells.head(id).into(),
                queue.vector.is_some().into(),
                queue.vector.unwrap_or(0).into(),
            ]);
        }
        saved.requests = self.events.requests.iter().map(|&id| id.into()).collect();
        for (pending, masked) in self.events.pending.iter().zip(self.events.masked) {
            let due = pending.map_or(0, |result| u64::from(result) + 1);
            saved.events.extend([due, masked.into()]);
        }
        saved.events.push(self.log.namespace_changed.into());
        saved
    }

    /// Into a controller that was reset. What is refused leaves it half loaded: it is to be
    /// reset then.
    pub fn load(&mut self, saved: &Saved) -> Result<(), DamagedState> {
        let (rows, rest) = saved.completions.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(DamagedState);
        }
        for &[id, base, size, tail, phase, head, interrupts, vector] in rows {
            let (id, size) = (self.place(id)?, entries(base, size)?);
            let vector = u16::try_from(vector).map_err(|_| DamagedState)?;
            if usize::from(vector) >= self.interrupts.len() {
                return Err(DamagedState);
            }
            let vector = (interrupts != 0).then_some(vector);
            let mut queue =
                Completions::new(&self.memory, base, size, vector).map_err(|_| DamagedState)?;
            (queue.tail, queue.phase) = (within(tail, size)?, phase != 0);
            self.doorbells.set_completions(id, (head as u32, queue.tail), vector.is_some());
            self.completions[id] = Some(queue);
        }
        let (rows, rest) = saved.submissions.as_chunks::<6>();
        if !rest.is_empty() {
            return Err(DamagedState);
        }
        for &[id, base, size, completions, head, tail] in rows {
            let (id, completions) = (self.place(id)?, self.place(completions)?);
            let size = entries(base, size)?;
            if self.completions[completions].is_none() {
                return Err(DamagedState);
            }
            let mut queue = Submissions::new(&self.memory, base, size, completions)
                .map_err(|_| DamagedState)?;
            queue.head = within(head, size)?;
            self.doorbells.set_tail(id, tail as u32);
            self.submissions[id] = Some(queue);
        }
        if self.submissions[0].is_none()
            || self.completions[0].is_none()
            || saved.requests.len() > MAX_REQUESTS
            || saved.events.len() != 2 * self.events.pending.len() + 1
            || !self.features.load(&saved.features)
        {
            return Err(DamagedState);
        }
        self.events.requests = saved.requests.iter().map(|&id| id as u16).collect();
        for (kind, pair) in saved.events.as_chunks::<2>().0.iter().enumerate() {
            self.events.pending[kind] = pair[0].checked_sub(1).map(|result| result as u32);
            self.events.masked[kind] = pair[1] != 0;
        }
        self.log.namespace_changed = saved.events.last() == Some(&1);
        Ok(())
    }

    fn place(&self, id: u64) -> Result<usize, DamagedState> {
        let id = usize::try_from(id).map_err(|_| DamagedState)?;
        if id < self.completions.len() { Ok(id) } else { Err(DamagedState) }
    }
}

fn entries(base: u64, size: u64) -> Result<u32, DamagedState> {
    let size = u32::try_from(size).map_err(|_| DamagedState)?;
    // Of admin queues there may be more than of others.
    let good = (2..=MAX_ENTRIES.max(super::MAX_ADMIN_ENTRIES)).contains(&size);
    if good && base.is_multiple_of(PAGE) { Ok(size) } else { Err(DamagedState) }
}

fn within(index: u64, size: u32) -> Result<u32, DamagedState> {
    u32::try_from(index).ok().filter(|&index| index < size).ok_or(DamagedState)
}
