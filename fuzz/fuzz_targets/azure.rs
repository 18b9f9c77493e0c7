//! Azure's JSON: import and the tag file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_tests::hostile::azure(bytes));
