//! Device access on version 2 hosts, where it is a BPF program on the cgroup. The engine's own is behind a feature that
//! takes libbpf; the program is a dozen instructions a rule, so it is written here.
//!
//! ```text
//! for each rule, last first:  type, major, minor match? ─▶ allow: all that is asked for is in the rule  ─▶ 1
//!                                                          deny:  any of what is asked for is in it    ─▶ 0
//! nothing matched ─▶ 0
//! ```
#![allow(unsafe_code, reason = "the bpf system call")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::libc;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};

/// Rules past this are refused: a program has room for that many, and no specification has.
const RULES_MAX: usize = 256;

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const MOVE: u8 = 0xbf; // dst = src
const MOVE_VALUE: u8 = 0xb7;
const AND_VALUE: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

fn instruction(code: u8, target: u8, source: u8, offset: i16, value: i32) -> Instruction {
    Instruction { code, registers: target | source << 4, offset, value }
}

/// What every container may use, whatever its rules say: the devices the engine makes in each `/dev`, and making nodes.
fn defaults() -> Vec<LinuxDeviceCgroup> {
    let character = LinuxDeviceType::C;
    let mut rules = vec![(character, None, None, "m"), (LinuxDeviceType::B, None, None, "m")];
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)] {
        rules.push((character, Some(major), Some(minor), "rwm"));
    }
    rules.push((character, Some(136), None, "rwm"));
    let build = |(kind, major, minor, access): (LinuxDeviceType, Option<i64>, Option<i64>, &str)| {
        let mut rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(kind).access(access);
        if let Some(major) = major {
            rule = rule.major(major);
        }
        if let Some(minor) = minor {
            rule = rule.minor(minor);
        }
        rule.build().ok()
    };
    rules.into_iter().filter_map(build).collect()
}

/// The rules as a program.
fn program(rules: &[LinuxDeviceCgroup]) -> Vec<Instruction> {
    // r1: {access << 16 | type, major, minor}; then r2 type, r3 access, r4 major, r5 minor.
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(AND_VALUE, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 3, 1, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // The kernel takes no program with instructions that cannot be reached.
        if append_rule(&mut code, rule) == Reach::Everything {
            return code;
        }
    }
    code.extend([instruction(MOVE_VALUE, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    code
}

/// What a rule leaves for those before it.
#[derive(PartialEq, Eq)]
enum Reach {
    Something,
    Everything,
}

fn append_rule(code: &mut Vec<Instruction>, rule: &LinuxDeviceCgroup) -> Reach {
    let mut tests = Vec::new();
    match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => {}
        LinuxDeviceType::B => tests.push((2, BLOCK)),
        LinuxDeviceType::C | LinuxDeviceType::U => tests.push((2, CHARACTER)),
        LinuxDeviceType::P => return Reach::Something, // pipes are not governed here
    }
    // -1 is how specifications may write "any".
    let number = |value: Option<i64>| value.filter(|value| *value >= 0).and_then(|value| i32::try_from(value).ok());
    tests.extend(number(rule.major()).map(|major| (4, major)));
    tests.extend(number(rule.minor()).map(|minor| (5, minor)));
    let mask = access_mask(rule.access().as_deref());
    // What a test must jump over: later tests, the access test (3 unless all access is meant), the verdict (2).
    let access_length = if mask == 0b111 { 0 } else { 3 };
    let count = tests.len();
    let reach = if count + access_length == 0 { Reach::Everything } else { Reach::Something };
    for (index, (register, value)) in tests.into_iter().enumerate() {
        let over = (count - index - 1 + access_length + 2) as i16;
        code.push(instruction(JUMP_NOT_EQUAL, register, 0, over, value));
    }
    if access_length > 0 {
        code.push(instruction(MOVE, 6, 3, 0, 0));
        if rule.allow() {
            code.push(instruction(AND_VALUE, 6, 0, 0, !mask & 0b111));
            code.push(instruction(JUMP_NOT_EQUAL, 6, 0, 2, 0));
        } else {
            code.push(instruction(AND_VALUE, 6, 0, 0, mask));
            code.push(instruction(JUMP_EQUAL, 6, 0, 2, 0));
        }
    }
    code.push(instruction(MOVE_VALUE, 0, 0, 0, i32::from(rule.allow())));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    reach
}

/// Bits as the kernel has them: make 1, read 2, write 4.
fn access_mask(access: Option<&str>) -> i32 {
    let Some(access) = access.filter(|access| !access.is_empty()) else { return 0b111 };
    access.chars().fold(0, |mask, letter| {
        mask | match letter {
            'm' => 1,
            'r' => 2,
            'w' => 4,
            _ => 0,
        }
    })
}

/// Puts the rules on a version 2 cgroup directory, for all that will run in it.
pub(super) fn confine(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    if rules.len() > RULES_MAX {
        return Err(io::Error::other("too many device rules"));
    }
    // The defaults come after a "deny all", which specifications begin with, and before what they add.
    let deny_all = |rule: &LinuxDeviceCgroup| !rule.allow() && rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A);
    let split = rules.iter().take_while(|rule| deny_all(rule)).count();
    let all: Vec<LinuxDeviceCgroup> = [&rules[..split], &defaults(), &rules[split..]].concat();
    let loaded = load(&program(&all))?;
    attach(&File::open(cgroup)?, &loaded)
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are one of the kernel's plain structures and live over the call, as does what they point to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn load(code: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        program_type: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        kernel_version: u32,
        flags: u32,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attributes = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: code.len() as u32,
        instructions: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Load::default()
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: a descriptor just made for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn attach(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    #[repr(C)]
    struct Attach {
        target: i32,
        program: i32,
        kind: u32,
        flags: u32,
    }
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attributes = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: serde_json::Value) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_value(json).unwrap()
    }

    /// Runs the program as the kernel would.
    fn allows(code: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i64; 11];
        let mut at = 0usize;
        for _ in 0..10_000 {
            let Instruction { code: operation, registers: both, offset, value } = code[at];
            let (target, source) = (usize::from(both & 15), usize::from(both >> 4));
            at += 1;
            match operation {
                LOAD_WORD => registers[target] = i64::from(context[offset as usize / 4]),
                MOVE => registers[target] = registers[source],
                MOVE_VALUE => registers[target] = i64::from(value),
                AND_VALUE => registers[target] &= i64::from(value),
                SHIFT_RIGHT => registers[target] >>= value,
                JUMP_NOT_EQUAL if registers[target] != i64::from(value) => at += offset as usize,
                JUMP_EQUAL if registers[target] == i64::from(value) => at += offset as usize,
                JUMP_NOT_EQUAL | JUMP_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => panic!("unknown operation {other:#x}"),
            }
        }
        panic!("does not end")
    }

    #[test]
    fn later_rules_win_and_nothing_is_allowed_that_no_rule_allows() {
        let (make, read, write) = (1, 2, 4);
        let code = program(&rules(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rw"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "r"},
        ])));
        assert!(allows(&code, CHARACTER, read | write, 10, 200));
        assert!(!allows(&code, CHARACTER, make, 10, 200));
        assert!(!allows(&code, CHARACTER, read, 10, 201));
        assert!(!allows(&code, BLOCK, read, 10, 200));
        assert!(allows(&code, BLOCK, read, 8, 7));
        assert!(!allows(&code, BLOCK, read | write, 8, 7));
        assert!(!allows(&code, BLOCK, read, 8, 1));
        assert!(!allows(&program(&[]), CHARACTER, read, 1, 3));
    }

    #[test]
    fn defaults_are_what_every_container_has_and_no_more() {
        let code = program(&[rules(serde_json::json!([{"allow": false, "access": "rwm"}])), defaults()].concat());
        for (major, minor) in [(1, 3), (1, 9), (5, 2), (136, 17)] {
            assert!(allows(&code, CHARACTER, 2 | 4, major, minor), "{major}:{minor}");
        }
        assert!(allows(&code, BLOCK, 1, 8, 0));
        for (kind, major, minor) in [(CHARACTER, 1, 11), (CHARACTER, 1, 1), (BLOCK, 8, 0)] {
            assert!(!allows(&code, kind, 2, major, minor), "{major}:{minor}");
        }
    }

    #[test]
    fn the_kernel_takes_the_program_and_holds_a_process_to_it() {
        let Ok(layout) = oarlock_cgroup::Layout::host() else { panic!("no cgroups on this host") };
        let Some(unified) = layout.hierarchies().iter().find(|mount| mount.join("cgroup.controllers").exists()) else {
            return; // a host without the unified hierarchy governs devices by files
        };
        if !nix::unistd::geteuid().is_root() {
            return; // only root may load programs; the pure test above says what they do
        }
        let group = unified.join(format!("oarlock-devices-{}", std::process::id()));
        std::fs::create_dir(&group).unwrap();
        confine(&group, &rules(serde_json::json!([{"allow": false, "access": "rwm"}]))).unwrap();
        let script = format!(
            "echo $$ > {}/cgroup.procs; true < /dev/null || exit 7; if true < /dev/kmsg; then exit 8; fi; exit 0",
            group.display()
        );
        let status =
            std::process::Command::new("sh").args(["-c", &script]).stderr(std::process::Stdio::null()).status();
        std::fs::remove_dir(&group).unwrap();
        assert_eq!(status.unwrap().code(), Some(0));
    }
}
