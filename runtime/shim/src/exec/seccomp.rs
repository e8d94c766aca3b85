//! Seccomp filters for execs: compiled once a container, kept as a program in the shim's state directory, loaded by the
//! process they bind.
#![allow(unsafe_code, reason = "loading a filter program")]

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::Path;

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator, Spec,
};

/// Why there is no filter where there should be one. An exec without it must fail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeccompError {
    #[error("cannot read the container's specification")]
    Spec(#[source] oci_spec::OciSpecError),
    #[error("cannot compile the seccomp filter")]
    Compile(#[source] libseccomp::error::SeccompError),
    #[error("seccomp action {0:?} is not supported in an exec")]
    Action(LinuxSeccompAction),
    #[error("cannot {operation} the seccomp program")]
    Io { operation: &'static str, source: io::Error },
}

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    flags: u32,
    instructions: Vec<u8>,
}

const INSTRUCTION_BYTES: usize = size_of::<libc::sock_filter>();
const NO_FILTER: &[u8] = b"none";

/// The container's filter; None if it runs without one. The directory belongs to the shim, no container reaches it.
pub(crate) fn of_container(directory: &Path) -> Result<Option<Program>, SeccompError> {
    let cache = directory.join("seccomp.bpf");
    if let Some(known) = fs::read(&cache).ok().and_then(|bytes| decode(&bytes)) {
        return Ok(known);
    }
    let spec = Spec::load(directory.join("config.json")).map_err(SeccompError::Spec)?;
    let program = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()).map(compile).transpose()?;
    let failed = |source| SeccompError::Io { operation: "keep", source };
    let temporary = directory.join(format!("seccomp.{}", std::process::id()));
    fs::write(&temporary, encode(program.as_ref())).and_then(|()| fs::rename(&temporary, &cache)).map_err(failed)?;
    Ok(program)
}

fn encode(program: Option<&Program>) -> Vec<u8> {
    match program {
        None => NO_FILTER.to_vec(),
        Some(program) => [&program.flags.to_le_bytes(), program.instructions.as_slice()].concat(),
    }
}

fn decode(bytes: &[u8]) -> Option<Option<Program>> {
    if bytes == NO_FILTER {
        return Some(None);
    }
    let (flags, instructions) = bytes.split_first_chunk::<4>()?;
    let whole = !instructions.is_empty() && instructions.len().is_multiple_of(INSTRUCTION_BYTES);
    whole.then(|| Some(Program { flags: u32::from_le_bytes(*flags), instructions: instructions.to_vec() }))
}

fn compile(seccomp: &LinuxSeccomp) -> Result<Program, SeccompError> {
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(SeccompError::Compile)?;
    // Only the program is wanted here: the process sets its own no_new_privs.
    filter.set_ctl_nnp(false).map_err(SeccompError::Compile)?;
    let _ = filter.set_ctl_optimize(2);
    for architecture in seccomp.architectures().iter().flatten() {
        filter.add_arch(arch(*architecture)).map_err(SeccompError::Compile)?;
    }
    for rule in seccomp.syscalls().iter().flatten() {
        let wanted = action(rule.action(), rule.errno_ret())?;
        if wanted == default {
            continue;
        }
        let comparisons: Vec<ScmpArgCompare> = rule.args().iter().flatten().map(compare).collect();
        for name in rule.names() {
            // Profiles name system calls of every kernel and machine; unknown ones cannot be called here.
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            add_rule(&mut filter, wanted, syscall, rule.args().as_deref().unwrap_or_default(), &comparisons)?;
        }
    }
    export(&filter, flags(seccomp))
}

/// Several conditions on one argument mean "any of them", as runc reads them; on different ones, "all".
fn add_rule(
    filter: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    args: &[LinuxSeccompArg],
    comparisons: &[ScmpArgCompare],
) -> Result<(), SeccompError> {
    let repeats = args.iter().enumerate().any(|(at, arg)| args[..at].iter().any(|other| other.index() == arg.index()));
    if repeats {
        for comparison in comparisons {
            filter
                .add_rule_conditional(action, syscall, std::slice::from_ref(comparison))
                .map_err(SeccompError::Compile)?;
        }
        return Ok(());
    }
    filter.add_rule_conditional(action, syscall, comparisons).map(drop).map_err(SeccompError::Compile)
}

fn export(filter: &ScmpFilterContext, flags: u32) -> Result<Program, SeccompError> {
    let failed = |source| SeccompError::Io { operation: "export", source };
    let memory = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC).map_err(|errno| failed(errno.into()))?;
    filter.export_bpf(&memory).map_err(SeccompError::Compile)?;
    let mut memory = File::from(memory);
    let mut instructions = Vec::new();
    memory.rewind().and_then(|()| memory.read_to_end(&mut instructions)).map_err(failed)?;
    Ok(Program { flags, instructions })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    let errno = errno.and_then(|errno| i32::try_from(errno).ok()).unwrap_or(libc::EPERM);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).unwrap_or(1)),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        other @ LinuxSeccompAction::ScmpActNotify => return Err(SeccompError::Action(other)),
    })
}

fn arch(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        _ => ScmpArch::Native,
    }
}

fn compare(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let operator = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpCompareOp::MaskedEqual(arg.value()),
    };
    let datum = match arg.op() {
        LinuxSeccompOperator::ScmpCmpMaskedEq => arg.value_two().unwrap_or(0),
        _ => arg.value(),
    };
    ScmpArgCompare::new(u32::try_from(arg.index()).unwrap_or(u32::MAX), operator, datum)
}

fn flags(seccomp: &LinuxSeccomp) -> u32 {
    seccomp.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
                // One thread; and no listener in an exec.
                _ => 0,
            }
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> LinuxSeccomp {
        serde_json::from_value(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "syscalls": [
                {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
            ]
        }))
        .unwrap()
    }

    #[test]
    fn a_profile_compiles_once_and_is_kept() {
        let program = compile(&profile()).unwrap();
        assert!(!program.instructions.is_empty());
        assert_eq!(decode(&encode(Some(&program))), Some(Some(program)));
        assert_eq!(decode(&encode(None)), Some(None));
        assert_eq!(decode(b"abc"), None);
    }
}
