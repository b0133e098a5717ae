//! See `decoders::multifd`.
#![no_main]

#[allow(dead_code, reason = "each target runs one decoder of the list")]
#[path = "../decoders.rs"]
mod decoders;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| decoders::multifd(bytes));
