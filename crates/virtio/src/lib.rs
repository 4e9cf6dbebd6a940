//! Virtio devices (OASIS virtio 1.2): their queues and data paths. What a driver negotiates
//! and configures is above, in Python.

pub mod queue;
