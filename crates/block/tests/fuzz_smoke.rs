//! A short run of the fuzz target for images: with what once found something, and with
//! random input that is the same each time. docs/fuzzing.md has more.

mod harness;

#[test]
fn findings_stay_fixed() {
    for (path, data) in harness::corpus() {
        println!("{}", path.display());
        harness::image(&data);
    }
}

#[test]
fn random_patches_of_images_are_errors_at_most() {
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1u64);
    let count = std::env::var("FUZZ_COUNT").ok().and_then(|count| count.parse().ok());
    for number in 0..count.unwrap_or(40u64) {
        println!("input {number} of seed {seed}");
        // xorshift64*: the same on every host.
        let mut state = (seed << 32 ^ number) | 1;
        let mut next = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8
        };
        let len = 1 + 12 * usize::from(1 + next() % 8);
        harness::image(&(0..len).map(|_| next()).collect::<Vec<_>>());
    }
}
