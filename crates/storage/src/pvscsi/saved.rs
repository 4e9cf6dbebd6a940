//! What of a controller goes into a saved machine, as numbers.

use std::sync::Arc;

use super::MAX_TARGETS;
use super::hba::{Hba, News};
use super::request::{Completion, HostStatus, Reply};
use super::rings::{RingPages, Rings};
pub use crate::saved::DamagedState;
use crate::saved::{load_unit, save_unit, sense, sense_of};

/// One at rest. Rows are of as many numbers as the comments name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Interrupts that are due, and their mask.
    pub interrupts: [u32; 2],
    /// Of rings that are set up: requests taken, completions and messages written; else none.
    pub positions: Vec<u64>,
    /// Page numbers: of the rings' state; of requests, of completions, of messages.
    pub state: u64,
    pub requests: Vec<u64>,
    pub completions: Vec<u64>,
    pub messages: Vec<u64>,
    /// Answers that wait: whether it has an address of its own, that; context, bytes, the
    /// adapter's status, sense data plus 1, its place, bytes there
    pub answers: Vec<u64>,
    /// News that wait: kind, target
    pub news: Vec<u64>,
    /// By target, what was told to go: the message's index plus 1
    pub leaving: Vec<u64>,
    /// Of each target, what commands have changed; empty where there is none.
    pub targets: Vec<Vec<u64>>,
}

impl Hba {
    pub fn save(&self) -> Saved {
        let (status, mask) = self.interrupts.save();
        let mut saved = Saved { interrupts: [status, mask], ..Saved::default() };
        if let Some(rings) = &self.rings {
            let (pages, messages, positions) = rings.save();
            saved.positions = positions.iter().map(|&position| position.into()).collect();
            (saved.state, saved.requests, saved.completions) =
                (pages.state, pages.requests, pages.completions);
            saved.messages = messages;
        }
        for end in &self.answers {
            let (own, at) = match end.reply {
                Reply::Ring => (0, 0),
                Reply::At(at) => (1, at),
            };
            let why = end.sense.map_or(0, |why| sense(why) + 1);
            let (place, room) = end.sense_place;
            let host = end.host.0.into();
            saved.answers.extend([own, at, end.context, end.bytes, host, why, place, room.into()]);
        }
        for &News { kind, target } in &self.news {
            saved.news.extend([kind.into(), target as u64]);
        }
        let leaving =
            self.leaving.iter().map(|index| index.map_or(0, |index| u64::from(index) + 1));
        saved.leaving = leaving.collect();
        let unit = |target: &Option<super::target::Target>| {
            target.as_ref().map_or_else(Vec::new, |target| save_unit(&target.unit))
        };
        saved.targets = self.targets.iter().map(unit).collect();
        saved
    }

    /// Into a controller that was reset. What is refused leaves it half loaded: it is to be
    /// reset then.
    pub fn load(&mut self, saved: &Saved) -> Result<(), DamagedState> {
        let small = |value: u64| u32::try_from(value).map_err(|_| DamagedState);
        match saved.positions[..] {
            [] => {}
            [taken, posted, told] => {
                let pages = RingPages {
                    state: saved.state,
                    requests: saved.requests.clone(),
                    completions: saved.completions.clone(),
                };
                let positions = [small(taken)?, small(posted)?, small(told)?];
                let memory = Arc::clone(&self.memory);
                let rings = Rings::load(&memory, &pages, &saved.messages, positions);
                self.rings = Some(rings.map_err(|_| DamagedState)?);
            }
            _ => return Err(DamagedState),
        }
        let (rows, rest) = saved.answers.as_chunks::<8>();
        let (news, odd) = saved.news.as_chunks::<2>();
        if !rest.is_empty()
            || !odd.is_empty()
            || saved.leaving.len() != MAX_TARGETS
            || saved.targets.len() != MAX_TARGETS
        {
            return Err(DamagedState);
        }
        for &[own, at, context, bytes, host, why, place, room] in rows {
            let reply = if own == 0 { Reply::Ring } else { Reply::At(at) };
            self.issued += usize::from(own != 0);
            self.answers.push_back(Completion {
                reply,
                context,
                bytes,
                host: HostStatus(host as u16),
                sense: why.checked_sub(1).map(sense_of),
                sense_place: (place, small(room)?),
            });
        }
        for &[kind, target] in news {
            let target = usize::try_from(target).ok().filter(|&target| target < MAX_TARGETS);
            self.news.push_back(News { kind: small(kind)?, target: target.ok_or(DamagedState)? });
        }
        for (place, &index) in self.leaving.iter_mut().zip(&saved.leaving) {
            *place = index.checked_sub(1).map(small).transpose()?;
        }
        for (target, saved) in self.targets.iter_mut().zip(&saved.targets) {
            match target {
                Some(target) => load_unit(&mut target.unit, saved)?,
                None if saved.is_empty() => {}
                None => return Err(DamagedState),
            }
        }
        self.interrupts.load(saved.interrupts.into());
        Ok(())
    }
}
