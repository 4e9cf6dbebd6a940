//! The device as its function has it: registers, doorbells that the host rings, life.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_io::{Attachment, Event, IoThread, Trigger};
use tetrarch_memory::GuestMemory;

use crate::core::{Core, PROGRAMS, WORK};
use crate::inbox::Inbox;
use crate::interrupts::Interrupts;
use crate::layout::Handle;
use crate::pairs::Pairs;
use crate::registers::Registers;
use crate::saved::{DamagedState, Saved};
use crate::sockets::Sockets;

/// The VMCI device of a machine.
///
/// Lock: `core`, for all of it; interrupts are raised under it.
pub struct Vmci {
    core: Arc<Mutex<Core>>,
    /// Keeps it on the I/O thread.
    _attachment: Attachment,
}

impl Vmci {
    /// Without `notifications` there are no doorbells; without `sockets` nobody is at the host.
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        interrupts: Interrupts,
        notifications: bool,
        sockets: Option<Sockets>,
    ) -> io::Result<Self> {
        let work = Arc::new(Event::new()?);
        let mut core = Core {
            memory,
            master: false,
            interrupts,
            notifications,
            used: 0,
            result: 0,
            sent: Vec::new(),
            refused: false,
            data_in: 0,
            data_out: 0,
            inbox: Inbox::default(),
            flags_page: 0,
            doorbells: BTreeMap::new(),
            pairs: Pairs::default(),
            sockets,
            work: Arc::clone(&work),
        };
        core.forget();
        let core = Arc::new(Mutex::new(core));
        let attachment = io.attach("vmci", Arc::clone(&core) as _);
        attachment.add(&*work, WORK, Trigger::Edge)?;
        if let Some(sockets) = &core.lock().sockets {
            attachment.add(sockets.descriptor(), PROGRAMS, Trigger::Readable)?;
        }
        Ok(Self { core, _attachment: attachment })
    }

    pub fn registers(&self) -> Registers {
        Registers(Arc::clone(&self.core))
    }

    /// Rings a doorbell of the guest's: its context, and its number there. False where it has none.
    pub fn ring(&self, context: u32, resource: u32) -> bool {
        self.core.lock().ring(Handle { context, resource })
    }

    /// Whether the function may access memory; at first it may not.
    pub fn set_master(&self, master: bool) {
        self.core.lock().set_master(master);
    }

    /// As it was made.
    pub fn reset(&self) {
        self.core.lock().forget();
    }

    /// Ends all connections, and those that would come.
    pub fn close(&self) {
        self.core.lock().sockets = None;
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        self.core.lock().save()
    }

    /// Goes on as it was saved, without connections; where that cannot be it is reset.
    pub fn load(&self, saved: &Saved) -> Result<(), DamagedState> {
        self.core.lock().load(saved)
    }
}
