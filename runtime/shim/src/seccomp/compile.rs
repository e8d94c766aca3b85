//! From a profile to the program that the kernel runs, by libseccomp. It takes milliseconds, so `cache` asks only once.

use std::fs::File;
use std::io::{Read, Seek};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use super::{Program, SeccompError};

/// Compiles a profile. Pure but for the library: it asks the kernel which actions it knows.
pub(super) fn compile(seccomp: &LinuxSeccomp) -> Result<Program, SeccompError> {
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
