//! Questions to cluster DNS, and answers of upstream, that are any bytes; see `oarlock_netproxy::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oarlock_netproxy::fuzzing::dns_message(data));
