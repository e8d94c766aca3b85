//! Running one plugin once: environment, standard input, output limit, timeout and the reading of its answer.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use crate::error::CniError;
use crate::types::ErrorObject;

/// No plugin's output is larger than this.
const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// How often an executable that is just being replaced (ETXTBSY) is tried.
const BUSY_ATTEMPTS: u32 = 20;

/// One call of one plugin.
#[derive(Debug)]
pub(crate) struct Invocation<'a> {
    pub plugin: &'a str,
    pub bin_dirs: &'a [PathBuf],
    pub command: &'static str,
    /// Beside CNI_COMMAND and CNI_PATH: CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS as far as the command has them.
    pub environment: &'a [(&'static str, String)],
    pub config: Map<String, Value>,
    pub timeout: Duration,
}

/// Runs the plugin and returns what it printed, which is empty for commands without a result.
/// Dropping the future kills the plugin.
pub(crate) async fn run(invocation: Invocation<'_>) -> Result<Vec<u8>, CniError> {
    let path = find(invocation.plugin, invocation.bin_dirs)?;
    match tokio::time::timeout(invocation.timeout, run_to_end(&path, &invocation)).await {
        Ok(result) => result,
        Err(_) => Err(CniError::Timeout {
            plugin: invocation.plugin.to_owned(),
            command: invocation.command,
            timeout: invocation.timeout,
        }),
    }
}

fn find(plugin: &str, directories: &[PathBuf]) -> Result<PathBuf, CniError> {
    directories
        .iter()
        .map(|directory| directory.join(plugin))
        .find(|path| path.is_file())
        .ok_or_else(|| CniError::PluginNotFound { plugin: plugin.to_owned(), directories: directories.to_vec() })
}

async fn run_to_end(path: &Path, invocation: &Invocation<'_>) -> Result<Vec<u8>, CniError> {
    let exec = |source| CniError::Exec { plugin: path.to_owned(), source };
    let mut child = spawn(path, invocation).await.map_err(exec)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr, status) = tokio::join!(read(stdout), read(stderr), child.wait());
    let (stdout, stderr, status) = (stdout.map_err(exec)?, stderr.map_err(exec)?, status.map_err(exec)?);
    let too_large = CniError::OutputTooLarge { plugin: invocation.plugin.to_owned(), limit_bytes: MAX_OUTPUT_BYTES };
    match (status.success(), stdout) {
        (true, Some(stdout)) => Ok(stdout),
        (true, None) => Err(too_large),
        (false, stdout) => {
            Err(failure(invocation, &status.to_string(), &stdout.unwrap_or_default(), &stderr.unwrap_or_default()))
        }
    }
}

/// The plugin's standard input: a file in memory, whole before the plugin starts, so that it never waits for this process.
fn input(invocation: &Invocation<'_>) -> io::Result<File> {
    let mut file = File::from(memfd_create("cni-input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(&invocation.config)?)?;
    file.rewind()?;
    Ok(file)
}

async fn spawn(path: &Path, invocation: &Invocation<'_>) -> io::Result<tokio::process::Child> {
    let cni_path = std::env::join_paths(invocation.bin_dirs).map_err(io::Error::other)?;
    let input = input(invocation)?;
    let mut command = Command::new(path);
    command
        .env("CNI_COMMAND", invocation.command)
        .env("CNI_PATH", cni_path)
        .envs(invocation.environment.iter().map(|(name, value)| (*name, value)))
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut attempts = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && attempts < BUSY_ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            outcome => return outcome,
        }
    }
}

/// Reads to the end; `None` when there is more than the limit (the rest is read and thrown away, so that the plugin ends).
async fn read(source: Option<impl AsyncRead + Unpin>) -> io::Result<Option<Vec<u8>>> {
    let Some(mut source) = source else { return Ok(Some(Vec::new())) };
    let mut buffer = Vec::new();
    (&mut source).take(MAX_OUTPUT_BYTES as u64 + 1).read_to_end(&mut buffer).await?;
    if buffer.len() <= MAX_OUTPUT_BYTES {
        return Ok(Some(buffer));
    }
    tokio::io::copy(&mut source, &mut tokio::io::sink()).await?;
    Ok(None)
}

fn failure(invocation: &Invocation<'_>, status: &str, stdout: &[u8], stderr: &[u8]) -> CniError {
    let plugin = invocation.plugin.to_owned();
    let command = invocation.command;
    match serde_json::from_slice::<ErrorObject>(stdout) {
        Ok(error) => CniError::Plugin { plugin, command, error },
        Err(_) => {
            let output = [stdout, stderr]
                .map(|bytes| String::from_utf8_lossy(&bytes[..bytes.len().min(2048)]).trim().to_owned());
            CniError::PluginDied {
                plugin,
                command,
                status: status.to_owned(),
                output: output.join(" ").trim().to_owned(),
            }
        }
    }
}
