//! Guest memory: RAM in memfds, addressed by guest physical address.
//!
//! RAM is always a memfd, so that it can be shared with other processes
//! (vhost-user back ends, other domains) and saved without a copy. This crate
//! knows no device and no engine. Devices see vm-memory's types, whose dirty
//! marks tell the observers; engines see host addresses.

mod address;
mod device_memory;
mod discard;
mod guest_memory;
mod host_map;
mod image;
mod lazy;
mod observers;
mod scatter;
mod window;

pub use address::{GuestPhys, PAGE_SHIFT, PAGE_SIZE};
pub use device_memory::DeviceMemory;
pub use guest_memory::{GuestMemory, HIGH_RAM_START, LOW_RAM_END, MemoryError, Region, Regions};
pub use image::{ImageError, Layer, Run};
pub use lazy::Range;
pub use observers::{MemoryObserver, Refusal, WriteMarks, WriteMarksSlice};
pub use scatter::{ScatterList, Snapshot};
pub use window::Window;
