//! Answers of the kernel that are any bytes; see `oarlock_netlink::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oarlock_netlink::fuzzing::answers(data));
