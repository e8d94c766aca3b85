//! Whole processors for containers that ask for them: the pool of shared ones, and what each container was given.

mod pool;
mod take;

pub use pool::{CpuError, CpuOptions, CpuPool, Reserved};
