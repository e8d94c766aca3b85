//! What all plugins have in common: reading the call, running the verb, printing the answer.

use std::io::{Read, Write};
use std::process::ExitCode;

use oarlock_cni::types::CniResult;
use oarlock_cni::version::Version;
use serde_json::json;

use crate::call::{Call, Verb};
use crate::error::{PluginError, Result};
use crate::linger;

/// A configuration larger than this is refused.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// A plugin as its verbs.
#[derive(Clone, Copy)]
pub struct Plugin {
    pub name: &'static str,
    pub add: fn(&Call) -> Result<CniResult>,
    pub del: fn(&Call) -> Result<()>,
    pub check: fn(&Call) -> Result<()>,
    pub status: fn(&Call) -> Result<()>,
    pub gc: fn(&Call) -> Result<()>,
}

/// Runs the verb that the environment names. The result, or an error object, goes to standard output.
pub fn run(plugin: &Plugin) -> ExitCode {
    let mut version = Version::default().to_string();
    let code = match answer(plugin, &mut version) {
        Ok(output) => {
            print(&output);
            ExitCode::SUCCESS
        }
        Err(error) => {
            print(&serde_json::to_string(&error.object(&version)).unwrap_or_default());
            ExitCode::FAILURE
        }
    };
    linger::leave_to_child();
    code
}

fn print(output: &str) {
    if !output.is_empty() {
        // A runtime that is gone does not read, and there is nobody else to tell.
        let _ = writeln!(std::io::stdout(), "{output}");
    }
}

fn answer(plugin: &Plugin, version: &mut String) -> Result<String> {
    let variable = |name: &str| std::env::var(name).ok();
    let verb = match variable("CNI_COMMAND").as_deref() {
        Some("ADD") => Verb::Add,
        Some("DEL") => Verb::Del,
        Some("CHECK") => Verb::Check,
        Some("STATUS") => Verb::Status,
        Some("GC") => Verb::Gc,
        Some("VERSION") => return Ok(versions()),
        Some(other) => {
            return Err(PluginError::Environment { variable: "CNI_COMMAND", problem: format!("{other:?} is unknown") });
        }
        None => return Err(PluginError::Environment { variable: "CNI_COMMAND", problem: "is required".into() }),
    };
    let mut stdin = Vec::new();
    std::io::stdin().take(MAX_CONFIG_BYTES).read_to_end(&mut stdin).map_err(PluginError::Stdin)?;
    let call = Call::read(verb, stdin, variable)?;
    *version = call.network.cni_version.to_string();
    check_verb(verb, call.network.cni_version)?;
    match verb {
        Verb::Add => Ok((plugin.add)(&call)?.to_json(call.network.cni_version).to_string()),
        Verb::Del => (plugin.del)(&call).map(|()| String::new()),
        Verb::Check => (plugin.check)(&call).map(|()| String::new()),
        Verb::Status => (plugin.status)(&call).map(|()| String::new()).map_err(PluginError::of_status),
        Verb::Gc => (plugin.gc)(&call).map(|()| String::new()),
    }
}

fn check_verb(verb: Verb, version: Version) -> Result<()> {
    let exists = match verb {
        Verb::Add | Verb::Del => true,
        Verb::Check => version.has_check(),
        Verb::Status | Verb::Gc => version.has_gc_and_status(),
    };
    if exists { Ok(()) } else { Err(PluginError::Version(version.to_string())) }
}

fn versions() -> String {
    let supported: Vec<&str> = std::iter::once("0.3.0").chain(Version::ALL.map(Version::as_str)).collect();
    json!({"cniVersion": Version::default().as_str(), "supportedVersions": supported}).to_string()
}
