//! The inputs of a short run: random, and the same each time and on every host.

/// Gives `target` as many inputs as FUZZ_COUNT says, or `count`, by the seed FUZZ_SEED. `len` says how
/// long one is, by a random byte.
pub fn run(count: u64, len: impl Fn(u8) -> usize, target: impl Fn(&[u8])) {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seed: u64 = number("FUZZ_SEED").unwrap_or(1);
    for input in 0..number("FUZZ_COUNT").unwrap_or(count) {
        println!("input {input} of seed {seed}");
        // xorshift64*.
        let mut state = (seed << 32 ^ input) | 1;
        let mut next = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8
        };
        let len = len(next());
        target(&(0..len).map(|_| next()).collect::<Vec<_>>());
    }
}
