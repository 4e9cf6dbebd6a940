//! Interrupts: masks that a driver sets and the card may set by itself, and what the line is for.

use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_bus::Interrupt;

use crate::Drive;

/// VMXNET3_MAX_INTRS: one for each queue, and one for events.
pub const MAX_INTERRUPTS: usize = 25;

/// The interrupt cause register, and the line, which is high while there is a cause: what is used
/// where the function has no messages.
///
/// Lock: the causes, under which the line is driven, so that levels come in their order.
pub struct Causes {
    causes: Mutex<u32>,
    line: Drive,
}

impl Causes {
    pub fn new(line: Drive) -> Self {
        Self { causes: Mutex::new(0), line }
    }

    pub fn get(&self) -> u32 {
        *self.causes.lock()
    }

    pub fn set(&self, causes: u32) {
        let mut own = self.causes.lock();
        *own = causes;
        (self.line)(causes != 0);
    }

    /// Reading the register ends them.
    pub fn take(&self) -> u32 {
        let mut causes = self.causes.lock();
        let before = std::mem::take(&mut *causes);
        if before != 0 {
            (self.line)(false);
        }
        before
    }

    pub fn interrupt(self: &Arc<Self>, number: usize) -> Arc<dyn Interrupt> {
        Arc::new(Cause { causes: Arc::clone(self), bit: 1 << (number % 32) })
    }
}

struct Cause {
    causes: Arc<Causes>,
    bit: u32,
}

impl Interrupt for Cause {
    fn raise(&self) {
        let mut causes = self.causes.causes.lock();
        *causes |= self.bit;
        (self.causes.line)(true);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masks {
    pub masked: u32,
    pub pending: u32,
    /// An interrupt masks itself when it is raised (`autoMask`).
    pub auto: bool,
}

impl Masks {
    /// After a reset all are masked.
    const RESET: Self = Self { masked: u32::MAX, pending: 0, auto: false };
}

/// Lock: `masks`, under which interrupts are raised.
pub struct Interrupts {
    masks: Mutex<Masks>,
    vectors: Vec<Arc<dyn Interrupt>>,
    causes: Arc<Causes>,
}

impl Interrupts {
    pub fn new(causes: Arc<Causes>, vectors: Vec<Arc<dyn Interrupt>>) -> Self {
        Self { masks: Mutex::new(Masks::RESET), vectors, causes }
    }

    /// Raises an interrupt now, or when it is unmasked.
    pub fn raise(&self, number: usize) {
        let mut masks = self.masks.lock();
        masks.pending |= 1_u32.checked_shl(number as u32).unwrap_or(0);
        self.deliver(&mut masks, number);
    }

    pub fn is_masked(&self, number: usize) -> bool {
        self.masks.lock().masked >> (number % 32) & 1 != 0
    }

    pub fn set_masked(&self, number: usize, masked: bool) {
        let mut masks = self.masks.lock();
        let bit = 1_u32.checked_shl(number as u32).unwrap_or(0);
        if masked {
            masks.masked |= bit;
        } else {
            masks.masked &= !bit;
            self.deliver(&mut masks, number);
        }
    }

    fn deliver(&self, masks: &mut Masks, number: usize) {
        let Some(vector) = self.vectors.get(number) else { return };
        let bit = 1 << number;
        if masks.pending & !masks.masked & bit == 0 {
            return;
        }
        masks.pending &= !bit;
        if masks.auto {
            masks.masked |= bit;
        }
        vector.raise();
    }

    /// Nothing is due any more, and all are masked.
    pub fn reset(&self) {
        self.load(Masks::RESET, 0);
    }

    pub fn set_auto(&self, auto: bool) {
        self.masks.lock().auto = auto;
    }

    pub fn causes(&self) -> &Causes {
        &self.causes
    }

    pub fn save(&self) -> (Masks, u32) {
        (*self.masks.lock(), self.causes.get())
    }

    /// The line is as it was then; nothing is sent.
    pub fn load(&self, masks: Masks, causes: u32) {
        *self.masks.lock() = masks;
        self.causes.set(causes);
    }
}
