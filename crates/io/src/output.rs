//! What a guest sends, on its way to a reader on another thread.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::Event;

/// How long the first byte waits for others: below what a user at a terminal
/// notices, and far above what the guest needs for the next one.
const GATHER: Duration = Duration::from_millis(1);
/// With this many bytes the reader is called before that.
const BATCH: usize = 4096;
/// With this many the sender waits for the reader, or comes again.
const LIMIT: usize = 4 * BATCH;

/// A queue of bytes, filled one by one and emptied as a whole.
///
/// Lock: its own, held for a few instructions; no other is taken under it.
#[derive(Default)]
pub struct Output {
    queue: Mutex<Queue>,
    /// The reader has something to do.
    ready: Condvar,
    /// The reader has taken something, or is done with it.
    taken: Condvar,
    /// Signalled when there is room again for an `offer` that found too little.
    room: Option<Arc<Event>>,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// The reader has bytes that it has not delivered.
    delivering: bool,
    /// How many wait for a delivery.
    hurried: usize,
    /// An `offer` found too little room.
    starved: bool,
    ended: bool,
}

impl Output {
    /// One for a sender that must not wait, and `offer`s: `room` is signalled when it may do so
    /// again.
    pub fn with_room_event(room: Arc<Event>) -> Self {
        Self { room: Some(room), ..Self::default() }
    }

    /// Sends as much as there is room for; gives how much that was.
    pub fn offer(&self, data: &[u8]) -> usize {
        let mut queue = self.queue.lock();
        if queue.ended {
            return data.len(); // nobody is left to read it
        }
        let before = queue.bytes.len();
        let count = data.len().min(LIMIT.saturating_sub(before));
        queue.bytes.extend_from_slice(&data[..count]);
        queue.starved |= count < data.len();
        if count > 0 && (before == 0 || (before < BATCH && before + count >= BATCH)) {
            self.ready.notify_one();
        }
        count
    }

    /// True where the sender is to `wait_for_room`.
    #[must_use]
    pub fn push(&self, byte: u8) -> bool {
        let mut queue = self.queue.lock();
        queue.bytes.push(byte);
        if matches!(queue.bytes.len(), 1 | BATCH) {
            self.ready.notify_one();
        }
        queue.bytes.len() >= LIMIT
    }

    /// Waits while the reader is too far behind. To be called with no lock held.
    pub fn wait_for_room(&self) {
        let mut queue = self.queue.lock();
        self.taken.wait_while(&mut queue, |queue| queue.bytes.len() >= LIMIT && !queue.ended);
    }

    /// What was sent since the last call, at once and maybe nothing.
    pub fn take(&self) -> Vec<u8> {
        let mut queue = self.queue.lock();
        let bytes = self.emptied(&mut queue);
        drop(queue);
        self.taken.notify_all();
        bytes
    }

    /// What was sent, when there is something; the last call's bytes count as delivered.
    /// Nothing when the output has ended and all of it was given.
    pub fn wait(&self) -> Vec<u8> {
        let mut queue = self.queue.lock();
        queue.delivering = false;
        self.taken.notify_all();
        self.ready.wait_while(&mut queue, |queue| queue.bytes.is_empty() && !queue.ended);
        let few =
            |queue: &mut Queue| queue.bytes.len() < BATCH && queue.hurried == 0 && !queue.ended;
        self.ready.wait_while_for(&mut queue, few, GATHER);
        queue.delivering = !queue.bytes.is_empty();
        let bytes = self.emptied(&mut queue);
        drop(queue);
        self.taken.notify_all();
        bytes
    }

    fn emptied(&self, queue: &mut Queue) -> Vec<u8> {
        if std::mem::take(&mut queue.starved)
            && let Some(room) = &self.room
        {
            room.signal();
        }
        std::mem::take(&mut queue.bytes)
    }

    /// Waits until all that was sent is delivered; false if it is not in that time.
    pub fn flush(&self, timeout: Duration) -> bool {
        let mut queue = self.queue.lock();
        queue.hurried += 1;
        self.ready.notify_one();
        let left = |queue: &mut Queue| queue.delivering || !queue.bytes.is_empty();
        let late = self.taken.wait_while_for(&mut queue, left, timeout).timed_out();
        queue.hurried -= 1;
        !late
    }

    /// From now on nobody waits: `wait` gives what is there, then nothing.
    pub fn end(&self) {
        self.queue.lock().ended = true;
        self.ready.notify_all();
        self.taken.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn bytes_come_in_order_and_the_last_ones_too() {
        let output = Output::default();
        let sent: Vec<u8> = (0..3 * LIMIT).map(|i| i as u8).collect();
        let (mut got, mut calls) = (Vec::new(), 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                for &byte in &sent {
                    if output.push(byte) {
                        output.wait_for_room();
                    }
                }
                output.end();
            });
            loop {
                let bytes = output.wait();
                if bytes.is_empty() {
                    break;
                }
                assert!(bytes.len() <= LIMIT);
                got.extend(bytes);
                calls += 1;
            }
        });
        assert_eq!(got, sent);
        assert!(calls < sent.len() / 16, "{calls} calls are no batches");
    }

    #[test]
    fn sender_waits_for_a_slow_reader_until_the_end() {
        let output = Output::default();
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                for _ in 0..LIMIT {
                    if output.push(b'x') {
                        output.wait_for_room();
                    }
                }
            });
            while output.queue.lock().bytes.len() < LIMIT {
                thread::yield_now();
            }
            assert!(!sender.is_finished());
            output.end();
            sender.join().unwrap();
        });
        assert_eq!(output.wait().len(), LIMIT);
        assert!(output.wait().is_empty());
    }

    #[test]
    fn offer_that_finds_no_room_is_told_when_there_is_some() {
        let room = Arc::new(Event::new().unwrap());
        let output = Output::with_room_event(Arc::clone(&room));
        assert_eq!(output.offer(&[1; LIMIT - 1]), LIMIT - 1);
        assert_eq!(output.wait().len(), LIMIT - 1);
        assert!(!room.take());
        assert_eq!(output.offer(&[2; 2 * LIMIT]), LIMIT);
        assert_eq!(output.offer(&[3]), 0);
        assert!(!room.take());
        assert_eq!(output.wait(), [2; LIMIT]);
        assert!(room.take());
        output.end();
        assert_eq!(output.offer(&[4; 2 * LIMIT]), 2 * LIMIT);
    }

    #[test]
    fn flush_returns_when_the_reader_is_done() {
        let output = Output::default();
        assert!(output.flush(LONG), "nothing was sent");
        assert!(!output.push(b'x'));
        assert_eq!(output.wait(), b"x");
        assert!(!output.flush(Duration::ZERO), "the reader still has it");
        thread::scope(|scope| {
            scope.spawn(|| output.wait());
            assert!(output.flush(LONG));
            output.end();
        });
    }
}
