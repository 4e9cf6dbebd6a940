//! Doorbells of devices, at an engine while their region is where they are.

use std::os::fd::AsFd;
use std::sync::Arc;

use tetrarch_engine::{Doorbell, DoorbellAddress, Vm};

use crate::table::Table;
use crate::{Device, Sizes};

/// A register of a device where a write only signals an eventfd(2), which does not block.
#[derive(Clone)]
pub struct DeviceDoorbell {
    /// From the start of the region.
    pub offset: u64,
    /// Of writes that signal; of each size where there is none.
    pub size: Option<u8>,
    /// What they write; anything where there is none. Only with a size.
    pub value: Option<u64>,
    pub event: Arc<dyn AsFd + Send + Sync>,
}

/// The doorbells of one address space.
///
/// They are a shortcut: what cannot be placed, since the engine refuses it or because
/// another region has some of its writes, comes to [`Device::write`] as before.
pub(crate) struct Placement {
    engine: Arc<dyn Vm>,
    address: fn(u64) -> Option<DoorbellAddress>,
    placed: Vec<Placed>,
}

struct Placed {
    doorbell: Doorbell,
    event: Arc<dyn AsFd + Send + Sync>,
}

impl Placed {
    fn is(&self, other: &Self) -> bool {
        self.doorbell == other.doorbell && Arc::ptr_eq(&self.event, &other.event)
    }
}

/// A region that is mapped, with the doorbells that its device has.
pub(crate) struct Wanted<'a> {
    pub base: u64,
    pub sizes: Sizes,
    pub device: &'a Arc<dyn Device>,
    pub doorbells: &'a [DeviceDoorbell],
}

impl Placement {
    pub fn new(engine: Arc<dyn Vm>, address: fn(u64) -> Option<DoorbellAddress>) -> Self {
        Self { engine, address, placed: Vec::new() }
    }

    /// Brings the engine's doorbells to what the table says.
    pub fn follow<'a>(&mut self, regions: impl Iterator<Item = Wanted<'a>>, table: &Table) {
        let wanted: Vec<_> = regions
            .flat_map(|region| {
                region.doorbells.iter().flat_map(move |doorbell| region.place(doorbell, table))
            })
            .filter_map(|(address, doorbell)| {
                let DeviceDoorbell { size, value, ref event, .. } = doorbell;
                let address = (self.address)(address)?;
                let doorbell = Doorbell { address, size, value };
                Some(Placed { doorbell, event: Arc::clone(event) })
            })
            .collect();
        let engine = &self.engine;
        self.placed.retain(|placed| {
            let stays = wanted.iter().any(|wanted| wanted.is(placed));
            if !stays {
                // It is there, so that this cannot fail.
                let _ = engine.remove_doorbell(&placed.doorbell);
            }
            stays
        });
        for wanted in wanted {
            if !self.placed.iter().any(|placed| placed.is(&wanted))
                && engine.add_doorbell(wanted.doorbell, wanted.event.as_fd()).is_ok()
            {
                self.placed.push(wanted);
            }
        }
    }
}

impl Wanted<'_> {
    /// Where the doorbell is, one for each size that is not another region's.
    fn place(&self, doorbell: &DeviceDoorbell, table: &Table) -> Vec<(u64, DeviceDoorbell)> {
        let Some(address) = self.base.checked_add(doorbell.offset) else { return Vec::new() };
        let own = |size: u8| {
            self.sizes.has(size)
                && table.find(address, size).is_some_and(|hit| {
                    let device = std::ptr::from_ref(hit.device).cast::<()>();
                    hit.offset == doorbell.offset && device == Arc::as_ptr(self.device).cast()
                })
        };
        let sizes = match doorbell.size {
            Some(size) if Sizes::EACH.contains(&size) && own(size) => vec![Some(size)],
            Some(_) => vec![],
            None if Sizes::EACH.into_iter().all(own) => vec![None],
            None => Sizes::EACH.into_iter().filter(|&size| own(size)).map(Some).collect(),
        };
        sizes
            .into_iter()
            .map(|size| (address, DeviceDoorbell { size, ..doorbell.clone() }))
            .collect()
    }
}
