//! Packets through the whole host engine.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_tests::hostile::frames(bytes));
