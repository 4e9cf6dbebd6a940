//! A short run of the fuzz target for disk controllers, with random input that is the same each time.
//! docs/fuzzing.md has more.

mod harness;

#[test]
fn any_driver_leaves_a_controller_that_serves_after_a_reset() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seed: u64 = number("FUZZ_SEED").unwrap_or(1);
    for input in 0..number("FUZZ_COUNT").unwrap_or(400u64) {
        println!("input {input} of seed {seed}");
        // xorshift64*: the same on every host.
        let mut state = (seed << 32 ^ input) | 1;
        let mut next = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8
        };
        let len = 64 + 4 * usize::from(next());
        harness::controllers(&(0..len).map(|_| next()).collect::<Vec<_>>());
    }
}
