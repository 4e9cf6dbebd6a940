//! The fuzz targets of the engine. What they do is shared with the engine's
//! own tests: crates/engine-bt/tests/harness.

#[path = "../../crates/engine-bt/tests/harness/mod.rs"]
pub mod harness;

/// That of disk images: crates/block/tests/harness.
#[path = "../../crates/block/tests/harness/mod.rs"]
pub mod block_harness;

/// That of virtqueues: crates/virtio/tests/harness.
#[path = "../../crates/virtio/tests/harness/mod.rs"]
pub mod virtio_harness;

/// That of disk controllers: crates/storage/tests/harness.
#[path = "../../crates/storage/tests/harness/mod.rs"]
pub mod storage_harness;

/// That of network cards: crates/cards/tests/harness.
#[path = "../../crates/cards/tests/harness/mod.rs"]
pub mod cards_harness;
