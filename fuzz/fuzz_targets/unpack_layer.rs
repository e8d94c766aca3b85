//! Image layers that nobody vouches for; see `oarlock_images::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oarlock_images::fuzzing::unpack_layer(data));
