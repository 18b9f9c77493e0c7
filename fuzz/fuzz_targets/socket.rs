//! Requests on the control socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_tests::hostile::socket(bytes));
