//! Seccomp filters: compiled once for all containers with the same profile, kept as programs on disk, loaded by the
//! very process they bind.
//!
//! Compiling the default profile costs libseccomp several milliseconds, more than all the rest of a container's start.
#![allow(unsafe_code, reason = "loading a filter program")]

mod cache;
mod compile;

use std::io;

use nix::libc;
use oci_spec::runtime::LinuxSeccompAction;

pub(crate) use cache::{for_container, of_container};

/// Why there is no filter where there should be one. A process without it must not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeccompError {
    #[error("cannot read the container's specification")]
    Spec(#[source] oci_spec::OciSpecError),
    #[error("cannot encode the seccomp profile")]
    Profile(#[source] serde_json::Error),
    #[error("cannot compile the seccomp filter")]
    Compile(#[source] libseccomp::error::SeccompError),
    #[error("seccomp action {0:?} is not supported here")]
    Action(LinuxSeccompAction),
    #[error("cannot {operation} the seccomp program")]
    Io { operation: &'static str, source: io::Error },
}

const INSTRUCTION_BYTES: usize = size_of::<libc::sock_filter>();

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    flags: u32,
    instructions: Vec<u8>,
}

/// Binds this process. Takes `no_new_privs` or CAP_SYS_ADMIN.
pub(crate) fn load(program: &Program) -> Result<(), SeccompError> {
    const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
    let count = program.instructions.len() / INSTRUCTION_BYTES;
    let failed = |source| SeccompError::Io { operation: "load", source };
    let len = u16::try_from(count).map_err(|_| failed(io::ErrorKind::InvalidData.into()))?;
    let fields = |chunk: &[u8]| libc::sock_filter {
        code: u16::from_ne_bytes([chunk[0], chunk[1]]),
        jt: chunk[2],
        jf: chunk[3],
        k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
    };
    let mut filter: Vec<libc::sock_filter> = program.instructions.chunks_exact(INSTRUCTION_BYTES).map(fields).collect();
    let prepared = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: `prepared` points to `len` instructions, which live over the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, program.flags, &prepared) };
    if result < 0 { Err(failed(io::Error::last_os_error())) } else { Ok(()) }
}
