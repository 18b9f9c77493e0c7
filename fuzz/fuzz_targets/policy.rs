//! Policy YAML: reading, checking, compiling, linting.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_tests::hostile::policy(bytes));
