//! A short run of the fuzz target for network cards, with random input that is the same each time.
//! docs/fuzzing.md has more.

mod harness;
#[path = "../../virtio/tests/smoke/mod.rs"]
mod smoke;

#[test]
fn any_driver_leaves_a_card_that_serves_after_a_reset() {
    smoke::run(400, |byte| 64 + 4 * usize::from(byte), harness::cards);
}
