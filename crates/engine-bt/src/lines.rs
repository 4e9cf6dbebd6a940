//! Interrupt lines as devices drive them: pins of the I/O APIC, and lines that
//! send a message.

use std::sync::Arc;

use parking_lot::RwLock;
use tetrarch_engine::{Clock, EngineError, GSI_COUNT, Msi, MsiRoutes};

use crate::irqchip::IrqChip;

pub struct Lines {
    pub irqchip: Arc<IrqChip>,
    pub clock: Arc<Clock>,
    routes: RwLock<MsiRoutes>,
}

impl Lines {
    pub fn new(irqchip: Arc<IrqChip>, clock: Arc<Clock>) -> Self {
        Self { irqchip, clock, routes: RwLock::default() }
    }

    pub fn drive(&self, gsi: u32, level: bool) {
        if gsi < GSI_COUNT {
            self.irqchip.irq_line(gsi, level, self.clock.now_ns());
        } else if level && let Some(Msi { address, data }) = self.message(gsi) {
            self.irqchip.msi(address, data);
        }
    }

    /// What a line above the pins sends.
    pub fn message(&self, gsi: u32) -> Option<Msi> {
        self.routes.read().get(gsi)
    }

    pub fn change_routes(&self, changes: &[(u32, Option<Msi>)]) -> Result<(), EngineError> {
        let mut routes = self.routes.write();
        *routes = routes.changed(changes)?;
        Ok(())
    }
}
