//! What of a card goes into a saved machine, as numbers.

use super::card::Card;
use super::file::{File, RDBAL, TDBAL};
use super::interrupts::LINK_CHANGED;
use super::transmit::Context;

/// A saved card is none.
#[derive(Debug, thiserror::Error)]
#[error("a saved card is damaged, or of another")]
pub struct DamagedState;

/// One at rest. A frame that waits for buffers is lost with the machine that had it, as in a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub permanent: Vec<u8>,
    /// Registers that keep what is written to them, in the order of their offsets.
    pub registers: Vec<u32>,
    /// Pairs of RAL and RAH, MTA, VFTA.
    pub filter: Vec<u32>,
    pub statistics: Vec<u32>,
    /// Causes, mask, ITR, RDTR, RADV, TIDV, TADV.
    pub interrupts: [u32; 7],
    /// TDH, TDT, RDH, RDT.
    pub places: [u32; 4],
    /// Of what is not to be divided, and of what is.
    pub contexts: [u32; 8],
    /// Whether tags are inserted and taken off, whether the PHY gives back what it is given, and
    /// whether there is a network.
    pub state: [u32; 3],
}

impl Card {
    pub fn save(&self) -> Saved {
        let filter = &self.filter;
        let [plain, big] = self.tx.contexts;
        let mut contexts = [0; 8];
        contexts[..4].copy_from_slice(&plain.0);
        contexts[4..].copy_from_slice(&big.0);
        let [tx, rx] = [&self.tx.ring, &self.rx.ring];
        Saved {
            permanent: self.permanent.to_vec(),
            registers: self.file.save(),
            filter: [&filter.addresses[..], &filter.groups, &filter.vlans].concat(),
            statistics: self.statistics.0.to_vec(),
            interrupts: self.interrupts.save(),
            places: [tx.head, tx.tail(), rx.head, rx.tail()],
            contexts,
            state: [self.tags.into(), self.loopback.into(), self.link.into()],
        }
    }

    /// Into a card that was reset. What is refused leaves it half loaded: it is to be reset then.
    pub fn load(&mut self, saved: &Saved) -> Result<(), DamagedState> {
        self.permanent = saved.permanent[..].try_into().map_err(|_| DamagedState)?;
        self.file = File::load(&saved.registers).ok_or(DamagedState)?;
        self.statistics.0 = saved.statistics[..].try_into().map_err(|_| DamagedState)?;
        let filter = &mut self.filter;
        let (addresses, rest) = saved.filter.split_at_checked(32).ok_or(DamagedState)?;
        let (groups, vlans) = rest.split_at_checked(128).ok_or(DamagedState)?;
        filter.addresses = addresses.try_into().map_err(|_| DamagedState)?;
        filter.groups = groups.try_into().map_err(|_| DamagedState)?;
        filter.vlans = vlans.try_into().map_err(|_| DamagedState)?;
        let (contexts, _) = saved.contexts.as_chunks::<4>();
        for (own, &words) in self.tx.contexts.iter_mut().zip(contexts) {
            *own = Context(words);
        }
        let places = saved.places.map(|place| place & 0xFFFF);
        for (ring, base, [head, tail]) in [
            (&mut self.tx.ring, TDBAL, [places[0], places[1]]),
            (&mut self.rx.ring, RDBAL, [places[2], places[3]]),
        ] {
            ring.put(self.file.ring(base));
            ring.head = head;
            ring.set_tail(tail);
        }
        let [tags, loopback, link] = saved.state.map(|value| value != 0);
        (self.tags, self.loopback) = (tags, loopback);
        self.announce = self.sends();
        self.accept();
        self.interrupts.load(saved.interrupts);
        // Whose back end is another now may have another link.
        if link != self.link {
            self.interrupts.raise(LINK_CHANGED);
        }
        Ok(())
    }
}
