//! What of the device goes into a saved machine, as numbers.

use tetrarch_memory::GuestPhys;

use crate::core::Core;
use crate::hypervisor::FLAGS;
use crate::layout::{Event, MAX_DATAGRAM, PAGE};

/// A saved device is none.
#[derive(Debug, thiserror::Error)]
#[error("a saved VMCI device is damaged")]
pub struct DamagedState;

/// Connections are not part of it: who was at the other ends is no part of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Causes of interrupts, their mask, and whether they are enabled.
    pub interrupts: [u32; 3],
    /// What the guest uses, the last answer, and whether a datagram that comes is too long.
    pub state: [u32; 3],
    /// Addresses of transfers, from the guest and to it, and the number of the page of flags.
    pub addresses: [u64; 3],
    /// A datagram that comes byte by byte, and what is left of a page that goes.
    pub sent: Vec<u8>,
    pub page: Vec<u8>,
    /// Doorbells: number and flag of each.
    pub doorbells: Vec<u32>,
    /// Handles of queue pairs.
    pub pairs: Vec<u64>,
}

impl Core {
    pub fn save(&self) -> Saved {
        let doorbells = self.doorbells.iter();
        Saved {
            interrupts: self.interrupts.save(),
            state: [self.used, self.result as u32, self.refused.into()],
            addresses: [self.data_out, self.data_in, self.flags_page],
            sent: self.sent.clone(),
            page: self.inbox.save(),
            doorbells: doorbells.flat_map(|(&number, &flag)| [number, flag.into()]).collect(),
            pairs: self.pairs.save(),
        }
    }

    /// On an error the device is as after a reset.
    pub fn load(&mut self, saved: &Saved) -> Result<(), DamagedState> {
        self.forget();
        let [used, result, refused] = saved.state;
        let [data_out, data_in, flags_page] = saved.addresses;
        let doorbells = saved.doorbells.chunks(2).map(|pair| match *pair {
            [number, flag] if (flag as usize) < FLAGS => Ok((number, flag as u16)),
            _ => Err(DamagedState),
        });
        let doorbells = doorbells.collect::<Result<_, _>>()?;
        let flags = flags_page.checked_mul(PAGE).ok_or(DamagedState)?;
        let flags_are_there = flags == 0 || self.memory.contains(GuestPhys(flags), PAGE);
        if !flags_are_there || saved.sent.len() > MAX_DATAGRAM || saved.page.len() > MAX_DATAGRAM {
            return Err(DamagedState);
        }
        self.used = used & self.offered();
        self.result = result as i32;
        self.refused = refused != 0;
        (self.data_out, self.data_in, self.flags_page) = (data_out, data_in, flags_page);
        self.sent.clone_from(&saved.sent);
        self.inbox.load(&saved.page);
        self.doorbells = doorbells;
        self.pairs.load(&saved.pairs);
        self.interrupts.load(saved.interrupts);
        if !self.pairs.is_empty() {
            self.inbox.push(Event::PairsResumed.datagram());
            self.announce();
        }
        Ok(())
    }
}
