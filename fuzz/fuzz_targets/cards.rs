#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tetrarch_fuzz::cards_harness::cards(data));
