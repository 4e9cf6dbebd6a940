//! A short run of the fuzz target for virtqueues, with random input that is the same each time.
//! docs/fuzzing.md has more.

mod harness;
mod smoke;

#[test]
fn any_rings_leave_a_device_that_serves_after_a_reset() {
    smoke::run(400, |byte| 64 + 4 * usize::from(byte), harness::rings);
}
