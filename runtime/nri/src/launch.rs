//! Plugins that are installed with the runtime: found, given their configuration, and started with a socket of their own.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::Command;

use crate::config::Config;
use crate::error::{Error, chain};
use crate::name;
use crate::plugin::Launched;

/// What a program for a WebAssembly machine starts with.
const WEB_ASSEMBLY: &[u8] = b"\0asm";
/// Longest configuration read.
const CONFIGURATION_BYTES_MAX: u64 = 1 << 20;

/// An installed plugin.
#[derive(Debug, PartialEq)]
pub(crate) struct Installed {
    program: PathBuf,
    index: String,
    name: String,
    configuration: String,
}

/// All installed plugins, in the order of their names. What cannot be a plugin is told in the log and left alone.
pub(crate) fn find(config: &Config) -> Vec<Installed> {
    let entries = match fs::read_dir(&config.plugin_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %config.plugin_dir.display(), %error, "NRI plugins cannot be looked for");
            return Vec::new();
        }
        Ok(entries) => entries,
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| is_program(path)).collect();
    files.sort();
    let mut found = Vec::new();
    for program in files {
        match describe(&program, &config.plugin_config_dir) {
            Ok(installed) => found.push(installed),
            Err(error) => {
                tracing::warn!(path = %program.display(), error = %chain(&error), "file is not taken for an NRI plugin");
            }
        }
    }
    found
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn describe(program: &Path, configurations: &Path) -> Result<Installed, Error> {
    let file = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (index, name) = name::split(&file)?;
    let failed = |source| Error::Io { operation: "read", path: program.to_owned(), source };
    let mut head = [0; WEB_ASSEMBLY.len()];
    if fs::File::open(program).map_err(failed)?.read(&mut head).map_err(failed)? == head.len() && head == WEB_ASSEMBLY {
        return Err(Error::Name { name: file, problem: "is WebAssembly, for which this runtime has no machine" });
    }
    let configuration = configuration(configurations, &[&file, &name])?;
    Ok(Installed { program: program.to_owned(), index, name, configuration })
}

/// The first file that exists.
fn configuration(directory: &Path, names: &[&str]) -> Result<String, Error> {
    for name in names {
        let path = directory.join(format!("{name}.conf"));
        let failed = |source| Error::Io { operation: "read", path: path.clone(), source };
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(failed)?,
        };
        let mut text = String::new();
        file.take(CONFIGURATION_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
        return Ok(text);
    }
    Ok(String::new())
}

/// Starts a plugin. Its end of the socket is its standard input: the only descriptor that a child can be given without code
/// between fork and exec; the environment tells its number. What it writes to standard error is in the runtime's log.
pub(crate) fn launch(installed: Installed) -> Result<(UnixStream, Launched), Error> {
    let Installed { program, index, name, configuration } = installed;
    let failed = |source| Error::Io { operation: "launch", path: program.clone(), source };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let ours = UnixStream::from_std(ours).map_err(failed)?;
    let child = Command::new(&program)
        .env_clear()
        .env("NRI_PLUGIN_NAME", &name)
        .env("NRI_PLUGIN_IDX", &index)
        .env("NRI_PLUGIN_SOCKET", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    Ok((ours, Launched { index, name, configuration, child }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_are_found_in_order_with_the_configuration_that_fits_best() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            plugin_dir: directory.path().join("plugins"),
            plugin_config_dir: directory.path().join("conf.d"),
            ..Config::default()
        };
        assert_eq!(find(&config), []);
        fs::create_dir_all(&config.plugin_dir).unwrap();
        fs::create_dir_all(&config.plugin_config_dir).unwrap();
        let install = |name: &str, content: &[u8], mode| {
            let path = config.plugin_dir.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        install("20-second", b"#!/bin/sh\n", 0o755);
        install("10-first", b"#!/bin/sh\n", 0o755);
        install("30-web", b"\0asm\x01\0\0\0", 0o755);
        install("no-index", b"#!/bin/sh\n", 0o755);
        install("40-plain-file", b"text", 0o644);
        fs::write(config.plugin_config_dir.join("second.conf"), "general").unwrap();
        fs::write(config.plugin_config_dir.join("20-second.conf"), "its own").unwrap();
        fs::write(config.plugin_config_dir.join("first.conf"), "general").unwrap();
        let found: Vec<(String, String)> =
            find(&config).into_iter().map(|plugin| (plugin.name, plugin.configuration)).collect();
        let expected = [("first", "general"), ("second", "its own")];
        assert_eq!(found, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }
}
