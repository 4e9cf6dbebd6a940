//! Where each frame went: none is dropped without being counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Out of the guest.
    Sent,
    /// Into the guest.
    Received,
}

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// Too short or too long for a frame, or offload metadata that do not fit it.
    Malformed,
    /// The guest's buffers are smaller than the frame.
    NoRoom,
    /// Nobody is at the other end.
    NoPeer,
    /// The host's kernel would not take it.
    Refused,
    /// The filter said no.
    Filtered,
    /// By `loss=`.
    Lost,
    /// A queue of ours was full: the shaper's, or the filter's of undecided frames.
    QueueFull,
    /// The guest has not switched the card on, or its receive filter leaves it out.
    Unwanted,
}

impl DropReason {
    pub const ALL: [Self; 8] = [
        Self::Malformed,
        Self::NoRoom,
        Self::NoPeer,
        Self::Refused,
        Self::Filtered,
        Self::Lost,
        Self::QueueFull,
        Self::Unwanted,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoRoom => "no_room",
            Self::NoPeer => "no_peer",
            Self::Refused => "refused",
            Self::Filtered => "filtered",
            Self::Lost => "lost",
            Self::QueueFull => "queue_full",
            Self::Unwanted => "unwanted",
        }
    }
}

#[derive(Debug, Default)]
struct OneWay {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: [AtomicU64; DropReason::ALL.len()],
}

/// Frames of one network card. Those that the guest sent and those that came for it, and of
/// both those that got no further.
#[derive(Debug, Default)]
pub struct Counters([OneWay; 2]);

impl Counters {
    fn way(&self, direction: Direction) -> &OneWay {
        &self.0[direction as usize]
    }

    /// A frame that the guest has sent, or has got.
    pub fn frame(&self, direction: Direction, bytes: u64) {
        self.way(direction).frames.fetch_add(1, Ordering::Relaxed);
        self.way(direction).bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// One that went no further: it was sent and did not leave, or came and was not delivered.
    pub fn dropped(&self, direction: Direction, reason: DropReason) {
        self.way(direction).dropped[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn drops(&self, direction: Direction, reason: DropReason) -> u64 {
        self.way(direction).dropped[reason as usize].load(Ordering::Relaxed)
    }

    /// Names and values; of drops, those that happened.
    pub fn stats(&self) -> Vec<(String, u64)> {
        let mut stats = Vec::new();
        for (direction, name) in [(Direction::Sent, "sent"), (Direction::Received, "received")] {
            let way = self.way(direction);
            stats.push((name.to_owned(), way.frames.load(Ordering::Relaxed)));
            stats.push((format!("{name}_bytes"), way.bytes.load(Ordering::Relaxed)));
            for reason in DropReason::ALL {
                let count = self.drops(direction, reason);
                if count != 0 {
                    stats.push((format!("{name}_dropped_{}", reason.name()), count));
                }
            }
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_counter_of_its_own_each_way() {
        let counters = Counters::default();
        for (count, reason) in DropReason::ALL.into_iter().enumerate() {
            for _ in 0..=count {
                counters.dropped(Direction::Received, reason);
            }
        }
        counters.frame(Direction::Sent, 60);
        for (count, reason) in (1..).zip(DropReason::ALL) {
            assert_eq!(counters.drops(Direction::Received, reason), count);
            assert_eq!(counters.drops(Direction::Sent, reason), 0);
        }
        let stats = counters.stats();
        let value = |name: &str| stats.iter().find(|(of, _)| of == name).map(|(_, count)| *count);
        assert_eq!(
            (value("sent"), value("sent_bytes"), value("received")),
            (Some(1), Some(60), Some(0))
        );
        assert_eq!(value("received_dropped_malformed"), Some(1));
        assert_eq!(value("received_dropped_unwanted"), Some(8));
        assert_eq!(value("sent_dropped_malformed"), None);
    }
}
