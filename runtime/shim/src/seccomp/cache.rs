//! Compiled filters on disk: one file a profile, shared by every pod of the machine, and a link to it beside each
//! container for its execs. Root alone reaches the directories.
//!
//! A file holds the whole profile that it was compiled from, and what else the outcome depends on; it is used only where
//! that is the same to the byte, so the short hash in its name need not be a strong one.
//!
//! ```text
//! "OARBPF01" │ flags u32 │ length u32 │ instructions │ key: kernel, library, profile as JSON
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, Spec};

use super::compile::compile;
use super::{INSTRUCTION_BYTES, Program, SeccompError};

const MAGIC: &[u8] = b"OARBPF01";
/// Content of a container's file that has no filter.
const NO_FILTER: &[u8] = b"none";
/// Beside the engine's state, where no container's id can be: those start with a letter or digit.
const DIRECTORY: &str = ".seccomp";
const CONTAINER_FILE: &str = "seccomp.bpf";
/// Profiles kept; the one compiled first goes first.
const FILES_MAX: usize = 64;

/// The filter of a container that is being made, compiled at most once, and noted for its execs. None where there is
/// none, or where the engine has to load it because a listener is to hear of the calls.
pub(crate) fn for_container(
    container_root: &Path,
    directory: &Path,
    spec: &Spec,
) -> Result<Option<Program>, SeccompError> {
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let own = directory.join(CONTAINER_FILE);
    let Some(profile) = profile else {
        return write(&own, NO_FILTER).map(|()| None);
    };
    if asks_a_listener(profile) {
        return Ok(None);
    }
    let key = key(profile)?;
    let shared = container_root.join(DIRECTORY).join(format!("{:016x}", fingerprint(&key)));
    let program = match read(&shared, Some(&key)) {
        Some(Some(program)) => program,
        _ => {
            let program = compile(profile)?;
            keep(&shared, &encode(&program, &key))?;
            program
        }
    };
    let _ = fs::remove_file(&own);
    if fs::hard_link(&shared, &own).is_err() {
        // Evicted since, or on another file system.
        write(&own, &encode(&program, &key))?;
    }
    Ok(Some(program))
}

/// The filter of a container that exists, for an exec; None if it runs without one.
pub(crate) fn of_container(container_root: &Path, directory: &Path) -> Result<Option<Program>, SeccompError> {
    if let Some(known) = read(&directory.join(CONTAINER_FILE), None) {
        return Ok(known);
    }
    let spec = Spec::load(directory.join("config.json")).map_err(SeccompError::Spec)?;
    if spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()).is_some_and(asks_a_listener) {
        return Err(SeccompError::Action(LinuxSeccompAction::ScmpActNotify));
    }
    for_container(container_root, directory, &spec)
}

fn asks_a_listener(profile: &LinuxSeccomp) -> bool {
    profile.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
}

/// All that a program depends on.
fn key(profile: &LinuxSeccomp) -> Result<Vec<u8>, SeccompError> {
    let kernel = nix::sys::utsname::uname().map(|name| name.release().to_owned()).unwrap_or_default();
    let library = libseccomp::ScmpVersion::current().map(|version| version.to_string()).unwrap_or_default();
    let api = libseccomp::get_api();
    let mut key = format!("{} {} {library} {api}\n", std::env::consts::ARCH, kernel.to_string_lossy()).into_bytes();
    key.extend(serde_json::to_vec(profile).map_err(SeccompError::Profile)?);
    Ok(key)
}

/// FNV-1a.
fn fingerprint(key: &[u8]) -> u64 {
    key.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn encode(program: &Program, key: &[u8]) -> Vec<u8> {
    let length = u32::try_from(program.instructions.len()).unwrap_or(0);
    [MAGIC, &program.flags.to_le_bytes(), &length.to_le_bytes(), &program.instructions, key].concat()
}

/// What a file holds, if it is whole and (with a key) for just that key.
fn decode(bytes: &[u8], wanted: Option<&[u8]>) -> Option<Option<Program>> {
    if bytes == NO_FILTER {
        return Some(None);
    }
    let (flags, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (instructions, key) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let whole = !instructions.is_empty() && instructions.len().is_multiple_of(INSTRUCTION_BYTES) && !key.is_empty();
    let meant = wanted.is_none_or(|wanted| wanted == key);
    let flags = u32::from_le_bytes(*flags);
    (whole && meant).then(|| Some(Program { flags, instructions: instructions.to_vec() }))
}

fn read(path: &Path, wanted: Option<&[u8]>) -> Option<Option<Program>> {
    decode(&fs::read(path).ok()?, wanted)
}

fn keep(path: &Path, bytes: &[u8]) -> Result<(), SeccompError> {
    let directory = path.parent().unwrap_or(path);
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(SeccompError::Io { operation: "make a directory for", source: error });
        }
        _ => {}
    }
    evict(directory);
    write(path, bytes)
}

/// Makes room for one more. Containers keep links of their own, so what goes is only compiled again.
fn evict(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut files: Vec<_> =
        entries.flatten().filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    files.sort();
    let surplus = (files.len() + 1).saturating_sub(FILES_MAX);
    for (_, path) in files.into_iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
}

/// Whole or not at all, whoever else writes the same at the same time.
fn write(path: &Path, bytes: &[u8]) -> Result<(), SeccompError> {
    let temporary: PathBuf = path.with_extension(std::process::id().to_string());
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        io::Write::write_all(&mut file, bytes)?;
        fs::rename(&temporary, path)
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        SeccompError::Io { operation: "keep", source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(personality: u64) -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": {"seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
                "syscalls": [
                    {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                    {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                     "args": [{"index": 0, "value": personality, "op": "SCMP_CMP_EQ"}]}
                ]
            }}
        }))
        .unwrap()
    }

    fn files(root: &Path) -> Vec<PathBuf> {
        fs::read_dir(root.join(DIRECTORY)).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn a_profile_is_compiled_once_for_all_containers() {
        let root = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| root.path().join(name));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let program = for_container(root.path(), &a, &spec(8)).unwrap().unwrap();
        assert!(!program.instructions.is_empty());
        // Told apart from a fresh compilation by an instruction that none would make.
        let [file] = files(root.path()).try_into().unwrap();
        let marked = Program { flags: 4, ..program.clone() };
        let key = key(spec(8).linux().as_ref().unwrap().seccomp().as_ref().unwrap()).unwrap();
        fs::write(&file, encode(&marked, &key)).unwrap();
        assert_eq!(for_container(root.path(), &b, &spec(8)).unwrap(), Some(marked.clone()));
        assert_eq!(of_container(root.path(), &b).unwrap(), Some(marked));
        assert_ne!(for_container(root.path(), &b, &spec(9)).unwrap(), Some(program));
        assert_eq!(files(root.path()).len(), 2);
    }

    #[test]
    fn a_file_of_another_profile_or_a_torn_one_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("a");
        fs::create_dir(&own).unwrap();
        let program = for_container(root.path(), &own, &spec(8)).unwrap().unwrap();
        let [file] = files(root.path()).try_into().unwrap();
        let bytes = fs::read(&file).unwrap();
        for damaged in [&bytes[..bytes.len() / 3], b"", b"OARBPF01", &[&bytes[..], b"x"].concat()] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(for_container(root.path(), &own, &spec(8)).unwrap(), Some(program.clone()));
        }
    }

    #[test]
    fn the_directory_does_not_grow_without_end() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("a");
        fs::create_dir(&own).unwrap();
        for personality in 0..FILES_MAX as u64 + 3 {
            for_container(root.path(), &own, &spec(personality)).unwrap();
        }
        assert_eq!(files(root.path()).len(), FILES_MAX);
    }

    #[test]
    fn a_container_without_a_filter_says_so() {
        let root = tempfile::tempdir().unwrap();
        let spec: Spec = serde_json::from_value(serde_json::json!({"ociVersion": "1.0.2"})).unwrap();
        assert_eq!(for_container(root.path(), root.path(), &spec).unwrap(), None);
        assert_eq!(of_container(root.path(), root.path()).unwrap(), None);
    }
}
