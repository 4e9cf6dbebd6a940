//! What of a card goes into a saved machine, as numbers.

use super::card::{Active, Card};
use super::filter::VLAN_BYTES;
use super::interrupts::Masks;
use super::layout::{QueueSetup, Setup};
use super::rings::{Place, cursor};
use super::rss::{BYTES, Rss};
use super::{MAX_RX, MAX_TX, MacAddress};

/// A saved card is none.
#[derive(Debug, thiserror::Error)]
#[error("a saved card is damaged, or of another")]
pub struct DamagedState;

/// One at rest. A frame that waits for buffers is lost with the machine that had it, as in a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub permanent: Vec<u8>,
    pub mac: Vec<u8>,
    /// Which interrupts are masked and due, whether they mask themselves, and causes of the line.
    pub interrupts: [u32; 4],
    /// Events that the driver has not acknowledged, whether there is a network, modes of receiving.
    pub state: [u32; 3],
    pub multicast: Vec<u8>,
    /// A bit for each.
    pub vlans: Vec<u8>,
    /// Of a card that is active: addresses of what is shared and of the table, features, buffers of a
    /// frame, the interrupt of events, whether segments are told; else none.
    pub setup: Vec<u64>,
    /// Of queues to send and then of those to receive: address and size of three rings, interrupt,
    /// error, ten statistics, and of each ring that there is place and generation.
    pub tx: Vec<Vec<u64>>,
    pub rx: Vec<Vec<u64>>,
    /// As the driver gave it; empty where it is off.
    pub rss: Vec<u8>,
}

/// Numbers of a queue before the places in its rings.
const FIXED: usize = 7 + 1 + 10;

fn queue_row(setup: &QueueSetup, error: u32, statistics: &[u64; 10]) -> Vec<u64> {
    let mut row: Vec<u64> =
        setup.places.iter().flat_map(|place| [place.base, place.size.into()]).collect();
    row.extend([u64::from(setup.interrupt), error.into()]);
    row.extend(statistics);
    row
}

fn queue_setup(row: &[u64]) -> Result<QueueSetup, DamagedState> {
    let (&fixed, _) = row.split_first_chunk::<7>().ok_or(DamagedState)?;
    let [a, b, c, d, e, f, interrupt] = fixed;
    let place = |base, size| {
        let size = u32::try_from(size).map_err(|_| DamagedState)?;
        Ok(Place { base, size })
    };
    Ok(QueueSetup {
        places: [place(a, b)?, place(c, d)?, place(e, f)?],
        interrupt: u8::try_from(interrupt).map_err(|_| DamagedState)?,
    })
}

fn error_and_statistics(row: &[u64]) -> Result<(u32, [u64; 10]), DamagedState> {
    let error = row.get(7).and_then(|&error| u32::try_from(error).ok()).ok_or(DamagedState)?;
    let statistics = row.get(8..FIXED).and_then(|some| some.try_into().ok()).ok_or(DamagedState)?;
    Ok((error, statistics))
}

fn address(bytes: &[u8]) -> Result<MacAddress, DamagedState> {
    bytes.try_into().map_err(|_| DamagedState)
}

impl Card {
    pub fn save(&mut self) -> Saved {
        let (masks, causes) = self.interrupts.save();
        let mut saved = Saved {
            permanent: self.permanent.to_vec(),
            mac: self.mac.to_vec(),
            interrupts: [masks.masked, masks.pending, masks.auto.into(), causes],
            state: [self.events, self.link.into(), self.filter.mode],
            multicast: self.filter.multicast.concat(),
            vlans: self.filter.vlans.to_vec(),
            ..Saved::default()
        };
        let Some(active) = &mut self.active else { return saved };
        let setup = &active.setup;
        saved.setup = vec![
            setup.shared,
            setup.table,
            setup.features,
            setup.scatter.into(),
            setup.event_interrupt.into(),
            setup.tells_segments.into(),
        ];
        for (queue, setup) in active.tx.iter_mut().zip(&setup.tx) {
            let mut row = queue_row(setup, queue.error, &queue.statistics);
            for at in queue.cursors() {
                row.extend([u64::from(at.next), at.generation.into()]);
            }
            saved.tx.push(row);
        }
        for (queue, setup) in active.rx.iter_mut().zip(&setup.rx) {
            let mut row = queue_row(setup, queue.error, &queue.statistics);
            for at in queue.cursors() {
                row.extend([u64::from(at.next), at.generation.into()]);
            }
            saved.rx.push(row);
        }
        saved.rss = active.rss.as_ref().map_or_else(Vec::new, |rss| rss.bytes().to_vec());
        saved
    }

    /// Into a card that was reset. What is refused leaves it half loaded: it is to be reset then.
    pub fn load(&mut self, saved: &Saved) -> Result<(), DamagedState> {
        self.permanent = address(&saved.permanent)?;
        self.mac = address(&saved.mac)?;
        let [events, link, mode] = saved.state;
        self.filter.mode = mode;
        self.filter.set_multicast(&saved.multicast);
        self.filter.vlans = saved.vlans[..].try_into().map_err(|_| DamagedState)?;
        const _: () = assert!(VLAN_BYTES * 8 == 1 << 12);
        let active = match saved.setup[..] {
            [] => None,
            [shared, table, features, scatter, event_interrupt, tells_segments] => {
                let rows = |rows: &[Vec<u64>]| {
                    rows.iter().map(|row| queue_setup(row)).collect::<Result<Vec<_>, _>>()
                };
                let setup = Setup {
                    shared,
                    table,
                    features,
                    scatter: u32::try_from(scatter).map_err(|_| DamagedState)?,
                    auto_mask: saved.interrupts[2] != 0,
                    event_interrupt: u8::try_from(event_interrupt).map_err(|_| DamagedState)?,
                    tells_segments: tells_segments != 0,
                    tx: rows(&saved.tx)?,
                    rx: rows(&saved.rx)?,
                };
                Some(self.loaded(setup, saved)?)
            }
            _ => return Err(DamagedState),
        };
        let [masked, pending, auto, causes] = saved.interrupts;
        self.interrupts.load(Masks { masked, pending, auto: auto != 0 }, causes);
        if let Some(active) = active {
            self.events = events;
            self.announce = true;
            self.activate(active);
            // Whose back ends are others now may have another link.
            let link = link != 0;
            if link != self.link {
                self.set_event(super::card::LINK);
            }
        }
        Ok(())
    }

    fn loaded(&self, setup: Setup, saved: &Saved) -> Result<Active, DamagedState> {
        let counts =
            (1..=MAX_TX).contains(&setup.tx.len()) && (1..=MAX_RX).contains(&setup.rx.len());
        if !counts {
            return Err(DamagedState);
        }
        let mut active = Active::new(&self.memory, setup).map_err(|_| DamagedState)?;
        for ((queue, row), setup) in active.tx.iter_mut().zip(&saved.tx).zip(&active.setup.tx) {
            (queue.error, queue.statistics) = error_and_statistics(row)?;
            let [frames, _, completions] = setup.places;
            let [next, generation, posted, other] =
                row[FIXED..].try_into().map_err(|_| DamagedState)?;
            let loaded = [cursor(frames, next, generation), cursor(completions, posted, other)];
            for (own, loaded) in queue.cursors().into_iter().zip(loaded) {
                *own = loaded.ok_or(DamagedState)?;
            }
        }
        for ((queue, row), setup) in active.rx.iter_mut().zip(&saved.rx).zip(&active.setup.rx) {
            (queue.error, queue.statistics) = error_and_statistics(row)?;
            let [heads, bodies, completions] = setup.places;
            let (rows, odd) = row[FIXED..].as_chunks::<2>();
            let places = [heads, completions, bodies];
            let count = if bodies.size == 0 { 2 } else { 3 };
            if !odd.is_empty() || rows.len() != count {
                return Err(DamagedState);
            }
            for ((own, &[next, generation]), place) in queue.cursors().zip(rows).zip(places) {
                *own = cursor(place, next, generation).ok_or(DamagedState)?;
            }
        }
        active.rss = match &saved.rss[..] {
            [] => None,
            bytes => {
                let bytes: [u8; BYTES] = bytes.try_into().map_err(|_| DamagedState)?;
                Some(Rss::new(bytes).ok_or(DamagedState)?)
            }
        };
        Ok(active)
    }
}
