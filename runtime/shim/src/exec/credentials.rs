//! Who a process is and what it may do: limits, groups, user, capabilities.
#![allow(unsafe_code, reason = "capability and credential system calls")]

use std::io;

use nix::libc;
use oci_spec::runtime::{Capabilities, LinuxCapabilities, PosixRlimit, PosixRlimitType, User};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub(crate) struct CredentialError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn check(step: &'static str, result: libc::c_long) -> Result<(), CredentialError> {
    if result < 0 { Err(CredentialError { step, source: io::Error::last_os_error() }) } else { Ok(()) }
}

/// Sets resource limits.
pub(crate) fn set_limits(limits: &[PosixRlimit]) -> Result<(), CredentialError> {
    for limit in limits {
        let value = libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() };
        // SAFETY: `value` lives over the call.
        let result = unsafe { libc::setrlimit(resource(limit.typ()), &value) };
        check("set a resource limit", result.into())?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// Promises never to gain privileges by an execution.
pub(crate) fn set_no_new_privileges() -> Result<(), CredentialError> {
    // SAFETY: takes numbers only.
    check("set no_new_privs", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// Becomes the user, with exactly these capabilities. Without any given, the kernel's rules for a change of user hold.
pub(crate) fn become_user(user: &User, capabilities: Option<&LinuxCapabilities>) -> Result<(), CredentialError> {
    if let Some(sets) = capabilities {
        drop_bounding(mask(sets.bounding().as_ref()))?;
        // SAFETY: takes numbers only.
        check("keep capabilities", unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into())?;
    }
    let groups: &[libc::gid_t] = user.additional_gids().as_deref().unwrap_or_default();
    let (uid, gid) = (user.uid(), user.gid());
    // Raw calls: this process has one thread, and the C library's versions signal all threads.
    // SAFETY: `groups` lives over the call; the others take numbers only.
    unsafe {
        check("set groups", libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check("set the group", libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check("set the user", libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    if let Some(sets) = capabilities {
        // SAFETY: takes numbers only.
        check("stop keeping capabilities", unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) }.into())?;
        set_capabilities(sets)?;
    }
    Ok(())
}

/// Gives up all capabilities but these, without a change of user.
pub(crate) fn limit_capabilities(sets: &LinuxCapabilities) -> Result<(), CredentialError> {
    drop_bounding(mask(sets.bounding().as_ref()))?;
    set_capabilities(sets)
}

fn drop_bounding(keep: u64) -> Result<(), CredentialError> {
    for number in 0..64 {
        // SAFETY: takes numbers only.
        let held = unsafe { libc::prctl(libc::PR_CAPBSET_READ, number as libc::c_ulong, 0, 0, 0) };
        if held < 0 {
            break; // past the last capability this kernel knows
        }
        if held == 1 && keep & (1 << number) == 0 {
            // SAFETY: takes numbers only.
            let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number as libc::c_ulong, 0, 0, 0) };
            check("drop a capability from the bounding set", result.into())?;
        }
    }
    Ok(())
}

fn set_capabilities(sets: &LinuxCapabilities) -> Result<(), CredentialError> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let bounding = mask(sets.bounding().as_ref());
    let permitted = mask(sets.permitted().as_ref());
    let (effective, inheritable) = (mask(sets.effective().as_ref()) & permitted, mask(sets.inheritable().as_ref()));
    let inheritable = inheritable & (bounding | permitted);
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes a header and two data elements, both of which live over the call.
    check("set capabilities", unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) })?;
    let ambient = mask(sets.ambient().as_ref()) & permitted & inheritable;
    // SAFETY: takes numbers only.
    let cleared = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    check("clear ambient capabilities", cleared.into())?;
    for number in (0..64u64).filter(|number| ambient & (1 << number) != 0) {
        // SAFETY: takes numbers only.
        let raised = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) };
        check("raise an ambient capability", raised.into())?;
    }
    Ok(())
}

/// A set as bits; capabilities that this kernel does not know are left out, as it can neither give nor deny them.
fn mask(set: Option<&Capabilities>) -> u64 {
    let known = caps::runtime::thread_all_supported().iter().fold(0, |bits, capability| bits | capability.bitmask());
    let named = set.into_iter().flatten().filter_map(|capability| {
        let name = caps::to_canonical(&capability.to_string());
        name.parse::<caps::Capability>().ok()
    });
    named.fold(0, |bits, capability| bits | capability.bitmask()) & known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_names_become_bits() {
        let set: Capabilities = serde_json::from_value(serde_json::json!(["CAP_CHOWN", "CAP_KILL"])).unwrap();
        assert_eq!(mask(Some(&set)), (1 << 0) | (1 << 5));
        assert_eq!(mask(None), 0);
    }
}
