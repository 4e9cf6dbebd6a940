//! The queues of one device, as its data path uses them.

use std::ops::ControlFlow;
use std::sync::Arc;

use tetrarch_bus::Interrupt;
use tetrarch_io::Event;

use crate::queue::{Chain, Queue, QueueError, QueuePosition, Used};

pub(crate) struct Active {
    pub queue: Queue,
    pub interrupt: Arc<dyn Interrupt>,
    /// By which the driver, or we, have the queue served.
    pub doorbell: Arc<Event>,
}

/// The queues that the driver has enabled, by their number.
#[derive(Default)]
pub struct Queues {
    pub(crate) list: Vec<Option<Active>>,
    /// Chains that came back while the device has no access to memory.
    pub(crate) kept: Option<Vec<(usize, Used, u32)>>,
    /// No chain is taken: the device is held, broken, or has no access to memory.
    pub(crate) quiet: bool,
    /// For changes of the configuration, and of the status when the device needs a reset.
    pub(crate) config: Option<Arc<dyn Interrupt>>,
}

impl Queues {
    /// The next chain of a queue; none where it is not enabled.
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain>, QueueError> {
        match self.active(index) {
            Some(active) => active.queue.pop(),
            None => Ok(None),
        }
    }

    /// The next chain of a queue; where there is none, the driver is asked to notify of it.
    pub fn take(&mut self, index: usize) -> Result<Option<Chain>, QueueError> {
        let Some(active) = self.active(index) else { return Ok(None) };
        if let Some(chain) = active.queue.pop()? {
            return Ok(Some(chain));
        }
        // It may have come before the driver saw that it is wanted.
        if active.queue.ask_notification() { active.queue.pop() } else { Ok(None) }
    }

    /// Puts back the chain that was taken last from a queue: nothing is in flight by it. Of
    /// several, the last comes first.
    pub fn put_back(&mut self, index: usize, used: Used) {
        if let Some(Some(active)) = self.list.get_mut(index) {
            active.queue.put_back(used);
        }
    }

    /// Has a queue served once more, after others on the thread.
    pub fn serve_again(&self, index: usize) {
        if let Some(Some(active)) = self.list.get(index) {
            active.doorbell.signal();
        }
    }

    /// Tells the driver that the configuration has changed.
    pub fn config_changed(&self) {
        if let Some(interrupt) = &self.config {
            interrupt.raise();
        }
    }

    /// How many descriptors a queue has; 0 where it is not enabled.
    pub fn size(&self, index: usize) -> u16 {
        self.list.get(index).and_then(Option::as_ref).map_or(0, |active| active.queue.size())
    }

    fn active(&mut self, index: usize) -> Option<&mut Active> {
        self.list.get_mut(index).filter(|_| !self.quiet)?.as_mut()
    }

    /// Gives a chain back: `written` bytes of it are the answer. [`Queues::interrupt`] is due
    /// after a batch of them.
    pub fn push(&mut self, index: usize, used: Used, written: u32) {
        if let Some(kept) = &mut self.kept {
            kept.push((index, used, written));
        } else if let Some(Some(active)) = self.list.get_mut(index) {
            active.queue.push(used, written);
        }
    }

    /// Gives chains back of which the driver sees all or none.
    pub fn push_all(&mut self, index: usize, answers: impl Iterator<Item = (Used, u32)>) {
        if let Some(kept) = &mut self.kept {
            kept.extend(answers.map(|(used, written)| (index, used, written)));
        } else if let Some(Some(active)) = self.list.get_mut(index) {
            active.queue.push_all(answers);
        }
    }

    /// Interrupts the driver if it wants that for what was pushed.
    pub fn interrupt(&mut self, index: usize) {
        if self.accessible()
            && let Some(Some(active)) = self.list.get_mut(index)
            && active.queue.wants_interrupt()
        {
            active.interrupt.raise();
        }
    }

    /// Calls `each` with every chain that is there. What it gives is pushed: the chain and how
    /// much was written; None: that is done later.
    ///
    /// After a queue full of chains it is the turn of others on the thread: a driver that is
    /// faster than the device would have it for itself.
    pub fn serve(
        &mut self,
        index: usize,
        mut each: impl FnMut(Chain) -> Option<(Used, u32)>,
    ) -> Result<(), QueueError> {
        self.serve_until(index, |chain| ControlFlow::Continue(each(chain))).map(drop)
    }

    /// The same until `each` gives a chain back unserved: it is the next one, when the queue
    /// is served again. Whether that was so.
    pub fn serve_until(
        &mut self,
        index: usize,
        mut each: impl FnMut(Chain) -> ControlFlow<Used, Option<(Used, u32)>>,
    ) -> Result<bool, QueueError> {
        let Some(active) = self.active(index) else { return Ok(false) };
        let mut left = active.queue.size();
        loop {
            active.queue.spare_notifications();
            let (mut pushed, mut stopped) = (false, false);
            let result = loop {
                if left == 0 {
                    active.doorbell.signal();
                    break Ok(());
                }
                match active.queue.pop() {
                    Ok(Some(chain)) => {
                        left -= 1;
                        match each(chain) {
                            ControlFlow::Continue(Some((used, written))) => {
                                active.queue.push(used, written);
                                pushed = true;
                            }
                            ControlFlow::Continue(None) => {}
                            ControlFlow::Break(used) => {
                                active.queue.put_back(used);
                                stopped = true;
                                break Ok(());
                            }
                        }
                    }
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };
            if pushed && active.queue.wants_interrupt() {
                active.interrupt.raise();
            }
            result?;
            if stopped || left == 0 || !active.queue.ask_notification() {
                return Ok(stopped);
            }
        }
    }

    /// Whether what is in a chain may be accessed.
    pub(crate) fn accessible(&self) -> bool {
        self.kept.is_none()
    }

    /// From now on the rings are left alone.
    pub(crate) fn keep(&mut self) {
        self.kept.get_or_insert_default();
    }

    /// Gives back what was kept.
    pub(crate) fn push_kept(&mut self) {
        for (index, used, written) in self.kept.take().unwrap_or_default() {
            self.push(index, used, written);
            self.interrupt(index);
        }
    }

    /// Whether the driver has enabled a queue.
    pub fn is_enabled(&self, index: usize) -> bool {
        matches!(self.list.get(index), Some(Some(_)))
    }

    pub(crate) fn positions(&self) -> Vec<Option<QueuePosition>> {
        self.list.iter().map(|one| Some(one.as_ref()?.queue.position())).collect()
    }
}
