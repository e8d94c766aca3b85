//! Finding and executing a program as its user would: by `PATH` of its own environment, with the permissions of the
//! process that calls. Error texts are the ones users of container runtimes know.
#![allow(unsafe_code, reason = "execve with a prepared argument vector")]

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, execve, faccessat};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

static HOME: OnceLock<String> = OnceLock::new();

/// Why a program cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("unable to start container process: exec: {name:?}: executable file not found in $PATH")]
    NotInPath { name: String },
    #[error("unable to start container process: exec: {path:?}: stat {path}: no such file or directory")]
    Missing { path: String },
    #[error("unable to start container process: exec: {path:?}: permission denied")]
    Denied { path: String },
    #[error("unable to start container process: exec: {path:?}: is a directory")]
    Directory { path: String },
    #[error("exec {path}: {}", reason(*.errno))]
    Failed { path: String, errno: Errno },
}

impl LookupError {
    /// Exit code 127 by custom; otherwise it is 126.
    pub(crate) fn is_not_found(&self) -> bool {
        match self {
            LookupError::NotInPath { .. } | LookupError::Missing { .. } => true,
            LookupError::Failed { errno, .. } => *errno == Errno::ENOENT,
            _ => false,
        }
    }
}

fn reason(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOEXEC => "exec format error",
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        Errno::E2BIG => "argument list too long",
        Errno::EPERM => "operation not permitted",
        other => other.desc(),
    }
}

/// The path of a program; names without a slash are looked up in the `PATH` of `env`.
pub(crate) fn find(name: &str, env: &[String]) -> Result<PathBuf, LookupError> {
    if name.contains('/') {
        return check(Path::new(name)).map(|()| name.into());
    }
    let not_found = || LookupError::NotInPath { name: name.to_owned() };
    if name.is_empty() {
        return Err(not_found());
    }
    let path = env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut denied = None;
    for dir in path.split(':') {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error @ LookupError::Denied { .. }) => denied = Some(error),
            Err(_) => {}
        }
    }
    Err(denied.unwrap_or_else(not_found))
}

fn check(path: &Path) -> Result<(), LookupError> {
    let text = || path.to_string_lossy().into_owned();
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(LookupError::Directory { path: text() }),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(LookupError::Denied { path: text() });
        }
        Err(_) => return Err(LookupError::Missing { path: text() }),
    }
    match faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        Err(Errno::EACCES) => Err(LookupError::Denied { path: text() }),
        // Filters may forbid the question; the answer then comes with the execution.
        _ => Ok(()),
    }
}

/// The HOME to use where the environment has none.
pub(crate) fn remember_home(home: &str) {
    let _ = HOME.set(home.to_owned());
}

/// Replaces this process; returns only on failure.
pub(crate) fn execute(args: &[String], env: &[String]) -> LookupError {
    let name = args.first().map_or("", String::as_str);
    let path = match find(name, env) {
        Ok(path) => path,
        Err(error) => return error,
    };
    let text = path.to_string_lossy().into_owned();
    let Some((program, argv, envp)) = vectors(&path, args, &environment(env)) else {
        return LookupError::Failed { path: text, errno: Errno::EINVAL };
    };
    crate::forked::default_signals();
    match execve(&program, &argv, &envp) {
        Ok(never) => match never {},
        Err(errno) => LookupError::Failed { path: text, errno },
    }
}

fn vectors(path: &Path, args: &[String], env: &[String]) -> Option<(CString, Vec<CString>, Vec<CString>)> {
    let strings =
        |list: &[String]| list.iter().map(|text| CString::new(text.as_bytes())).collect::<Result<_, _>>().ok();
    Some((CString::new(path.as_os_str().as_encoded_bytes()).ok()?, strings(args)?, strings(env)?))
}

/// The environment as listed, a later entry replacing an earlier one of the same name, with PATH and HOME.
fn environment(env: &[String]) -> Vec<String> {
    let mut result: Vec<String> = Vec::with_capacity(env.len() + 2);
    for entry in env {
        let name = entry.split('=').next().unwrap_or_default();
        match result.iter_mut().find(|known| known.split('=').next() == Some(name)) {
            Some(known) => known.clone_from(entry),
            None => result.push(entry.clone()),
        }
    }
    let has = |name: &str| result.iter().any(|entry| entry.starts_with(name));
    let (no_path, no_home) = (!has("PATH="), !has("HOME="));
    if no_path {
        result.push(format!("PATH={DEFAULT_PATH}"));
    }
    if no_home {
        result.push(format!("HOME={}", HOME.get().map_or("/", String::as_str)));
    }
    result
}

/// A user's home by the password file of the root this process is in.
pub(crate) fn home_of(uid: u32) -> Option<String> {
    let text = std::fs::read(Path::new("/etc/passwd")).ok().filter(|text| text.len() < 1 << 20)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let matches = fields.get(2).and_then(|id| id.parse::<u32>().ok()) == Some(uid);
        fields.get(5).filter(|home| matches && home.starts_with('/')).map(|home| (*home).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn failures_are_worded_as_users_know_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = format!("PATH={}", dir.path().display());
        let error = find("foo", std::slice::from_ref(&path)).unwrap_err();
        assert!(error.to_string().ends_with(r#"exec: "foo": executable file not found in $PATH"#));
        assert!(error.is_not_found());
        let error = find("/no/such", &[]).unwrap_err();
        assert!(error.to_string().ends_with(r#"exec: "/no/such": stat /no/such: no such file or directory"#));
        let plain = dir.path().join("plain");
        std::fs::write(&plain, "x").unwrap();
        std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = find("plain", &[path]).unwrap_err();
        assert!(error.to_string().ends_with("permission denied") && !error.is_not_found());
        let error = find(dir.path().to_str().unwrap(), &[]).unwrap_err();
        assert!(error.to_string().ends_with("is a directory"));
    }

    #[test]
    fn a_program_only_its_owner_may_run_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("p");
        std::fs::write(&program, "x").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(find("p", &[format!("PATH=/nowhere:{}", dir.path().display())]).unwrap(), program);
    }

    #[test]
    fn the_environment_keeps_order_and_gets_path_and_home() {
        let env = ["A=1", "B=2", "A=3"].map(str::to_owned);
        assert_eq!(environment(&env)[..2], ["A=3", "B=2"]);
        assert!(environment(&env).iter().any(|entry| entry.starts_with("PATH=/usr")));
        assert!(environment(&env).contains(&"HOME=/".to_owned()));
    }
}
