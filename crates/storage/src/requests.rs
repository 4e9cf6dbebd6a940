//! What a controller has asked of its disk.

use std::io;
use std::os::fd::AsFd;

use tetrarch_block::{BlockBackend, BlockError, BlockQueue, Completion, Request};
use tetrarch_io::{Attachment, Trigger};

/// A command that the disk has.
struct Pending<T> {
    owner: T,
    /// Requests to the disk that it became, and are not done.
    parts: usize,
    end: Result<(), BlockError>,
    /// It is to be on the disk when it ends, and is not yet.
    flush: bool,
}

/// A disk's queue, and who waits for which of its requests. Dropping it waits for what is in
/// flight.
pub struct Requests<T> {
    queue: Box<dyn BlockQueue>,
    /// By the tags that the disk has for them.
    pending: Vec<Option<Pending<T>>>,
    free: Vec<usize>,
    /// Requests that the disk has, of all commands.
    submitted: usize,
    done: Vec<Completion>,
}

impl<T> Requests<T> {
    /// `source` is called on `io` when something has ended.
    pub fn open(disk: &dyn BlockBackend, io: &Attachment, source: u32) -> io::Result<Self> {
        let queue = disk.open_queue().map_err(io::Error::other)?;
        io.add(queue.event().as_fd(), source, Trigger::Readable)?;
        let (pending, free, done) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { queue, pending, free, submitted: 0, done })
    }

    /// Takes a command's requests, of which there is one at least. With `durable` a flush
    /// follows them. [`Requests::kick`] is due after a batch of commands.
    pub fn submit(
        &mut self,
        owner: T,
        requests: impl ExactSizeIterator<Item = Request>,
        durable: bool,
    ) {
        let parts = requests.len();
        let pending = Pending { owner, parts, end: Ok(()), flush: durable };
        let tag = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        self.pending[tag] = Some(pending);
        self.submitted += parts;
        requests.for_each(|request| self.queue.submit(tag as u64, request));
    }

    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// Moves the commands that have ended to the end of `ended`.
    pub fn take(&mut self, ended: &mut Vec<(T, Result<(), BlockError>)>) {
        loop {
            self.queue.completions(&mut self.done);
            if self.done.is_empty() {
                return;
            }
            let mut flushes = false;
            self.submitted -= self.done.len();
            for (tag, result) in self.done.drain(..) {
                let Some(slot) = self.pending.get_mut(tag as usize) else { continue };
                let Some(pending) = slot else { continue };
                pending.end = pending.end.and(result);
                pending.parts -= 1;
                if pending.parts > 0 {
                    continue;
                }
                if pending.flush && pending.end.is_ok() {
                    (pending.flush, pending.parts, flushes) = (false, 1, true);
                    self.submitted += 1;
                    self.queue.submit(tag, Request::Flush);
                    continue;
                }
                ended.extend(slot.take().map(|pending| (pending.owner, pending.end)));
                self.free.push(tag as usize);
            }
            if flushes {
                self.queue.kick();
            }
        }
    }

    /// Waits for what is in flight, and gives whose it was.
    pub fn abandon(self) -> impl Iterator<Item = T> {
        drop(self.queue);
        self.pending.into_iter().flatten().map(|pending| pending.owner)
    }

    /// The machine is to come to rest: what waits for a limit goes now.
    pub fn hurry(&mut self) {
        self.queue.hurry();
    }

    pub fn is_empty(&self) -> bool {
        self.pending.len() == self.free.len()
    }

    /// Whether nothing is in flight but what waits for the host to be mended.
    pub fn idle(&self) -> bool {
        self.submitted == self.stopped()
    }

    /// How many requests wait for the host to be mended: they are no part of a saved state.
    pub fn stopped(&self) -> usize {
        self.queue.stopped()
    }
}
