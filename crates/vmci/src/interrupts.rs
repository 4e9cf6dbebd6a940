//! Causes, their mask, and the three ways to tell the guest.

use std::sync::Arc;

use tetrarch_bus::Interrupt;

use crate::VECTORS;

/// Of the cause and mask registers, and of the vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// There are datagrams.
    Datagram = 0,
    /// A flag is set.
    Notification = 1,
    /// A transfer to memory has ended.
    Transfer = 2,
}

/// Lock: the device's, under which interrupts are raised.
pub struct Interrupts {
    line: Box<dyn Fn(bool) + Send + Sync>,
    /// By the number of the cause; one that has no messages does nothing.
    messages: Vec<Arc<dyn Interrupt>>,
    causes: u32,
    mask: u32,
    enabled: bool,
}

const ALL: u32 = (1 << VECTORS) - 1;

impl Interrupts {
    pub fn new(line: Box<dyn Fn(bool) + Send + Sync>, messages: Vec<Arc<dyn Interrupt>>) -> Self {
        Self { line, messages, causes: 0, mask: 0, enabled: false }
    }

    fn due(&self) -> u32 {
        if self.enabled { self.causes & self.mask } else { 0 }
    }

    /// Drives the line; messages are sent for what becomes due.
    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.due();
        change(self);
        let due = self.due();
        (self.line)(due != 0);
        self.send(due & !before);
    }

    fn send(&self, due: u32) {
        for (number, message) in self.messages.iter().enumerate() {
            if due & 1 << number != 0 {
                message.raise();
            }
        }
    }

    /// A message is sent each time: with vectors of its own a driver reads no causes.
    pub fn raise(&mut self, cause: Cause) {
        let bit = 1 << cause as u32;
        self.causes |= bit;
        let due = self.due();
        (self.line)(due != 0);
        self.send(due & bit);
    }

    /// To read them is to acknowledge.
    pub fn take_causes(&mut self) -> u32 {
        let causes = self.causes;
        self.change(|this| this.causes = 0);
        causes
    }

    pub fn mask(&self) -> u32 {
        self.mask
    }

    pub fn set_mask(&mut self, mask: u32) {
        self.change(|this| this.mask = mask);
    }

    pub fn enabled(&self) -> bool {
        self.enabled
    }

    pub fn set_enabled(&mut self, enabled: bool) {
        self.change(|this| this.enabled = enabled);
    }

    pub fn reset(&mut self) {
        self.load([0; 3]);
    }

    /// Causes, mask, and whether they are enabled.
    pub fn save(&self) -> [u32; 3] {
        [self.causes, self.mask, self.enabled.into()]
    }

    /// Messages of what is saved were sent.
    pub fn load(&mut self, [causes, mask, enabled]: [u32; 3]) {
        (self.causes, self.mask, self.enabled) = (causes & ALL, mask, enabled != 0);
        (self.line)(self.due() != 0);
    }
}
