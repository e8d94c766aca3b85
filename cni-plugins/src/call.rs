//! One call of a plugin: the environment and the configuration that the runtime gave.

use std::path::{Path, PathBuf};

use oarlock_cni::names::{is_valid_id, is_valid_interface};
use oarlock_cni::types::{CniResult, ValidAttachment};
use oarlock_cni::version::Version;
use oarlock_cni_table::{Owner, STATE_DIR};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{PluginError, Result};

/// What the runtime asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Status,
    Gc,
}

/// A call with everything in it.
#[derive(Debug, Clone)]
pub struct Call {
    pub container_id: String,
    pub netns: Option<PathBuf>,
    pub ifname: String,
    pub arguments: Vec<(String, String)>,
    pub plugin_path: Vec<PathBuf>,
    /// The configuration as it came.
    pub stdin: Vec<u8>,
    pub network: Network,
}

/// What every plugin's configuration has.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    pub cni_version: Version,
    #[serde(default)]
    pub name: String,
    /// Where the plugins keep records of what they wrote to the kernel.
    #[serde(default)]
    state_dir: Option<PathBuf>,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(default, rename = "cni.dev/valid-attachments", deserialize_with = "present")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    /// What the first text of the specification called it.
    #[serde(default, rename = "cni.dev/attachments", deserialize_with = "present")]
    attachments: Option<Vec<ValidAttachment>>,
}

impl Call {
    /// The environment and configuration as a call of `verb`. Only ADD and CHECK need a namespace.
    pub fn read(verb: Verb, stdin: Vec<u8>, variable: impl Fn(&str) -> Option<String>) -> Result<Call> {
        let text = |name| variable(name).filter(|value| !value.is_empty());
        let about_container = matches!(verb, Verb::Add | Verb::Del | Verb::Check);
        let checked = |name: &'static str, is_valid: fn(&str) -> bool| match text(name) {
            Some(value) if is_valid(&value) => Ok(value),
            Some(value) => Err(PluginError::Environment { variable: name, problem: format!("{value:?} is not valid") }),
            None if about_container => Err(PluginError::Environment { variable: name, problem: "is required".into() }),
            None => Ok(String::new()),
        };
        let netns = text("CNI_NETNS").map(PathBuf::from);
        if netns.is_none() && matches!(verb, Verb::Add | Verb::Check) {
            return Err(PluginError::Environment { variable: "CNI_NETNS", problem: "is required".into() });
        }
        let network: Network = parse_network(&stdin)?;
        if !is_valid_id(&network.name) {
            return Err(PluginError::config("name", format!("{:?} is not a valid network name", network.name)));
        }
        // Without the list nothing would be valid, and everything taken away.
        if verb == Verb::Gc && network.valid_attachments.is_none() && network.attachments.is_none() {
            return Err(PluginError::config("cni.dev/valid-attachments", "is required for GC"));
        }
        Ok(Call {
            container_id: checked("CNI_CONTAINERID", is_valid_id)?,
            netns,
            ifname: checked("CNI_IFNAME", is_valid_interface)?,
            arguments: parse_arguments(&text("CNI_ARGS").unwrap_or_default())?,
            plugin_path: text("CNI_PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default(),
            stdin,
            network,
        })
    }

    /// The plugin's own part of the configuration.
    pub fn config<'a, T: Deserialize<'a>>(&'a self) -> Result<T> {
        serde_json::from_slice(&self.stdin).map_err(PluginError::Syntax)
    }

    /// The result of the plugins before this one, or of ADD for DEL and CHECK.
    pub fn prev_result(&self) -> Result<Option<CniResult>> {
        match &self.network.prev_result {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone()).map(Some).map_err(PluginError::PrevResult),
        }
    }

    pub fn argument(&self, name: &str) -> Option<&str> {
        self.arguments.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// GC: the attachments that stay.
    pub fn valid_attachments(&self) -> &[ValidAttachment] {
        let given = self.network.valid_attachments.as_deref().or(self.network.attachments.as_deref());
        given.unwrap_or_default()
    }

    /// The namespace, which the verb guarantees to be named and which has to exist.
    pub fn existing_netns(&self) -> Result<&Path> {
        match self.netns.as_deref() {
            Some(path) if path.exists() => Ok(path),
            other => Err(PluginError::NoNamespace { path: other.unwrap_or(Path::new("")).to_owned() }),
        }
    }

    pub fn state_dir(&self) -> &Path {
        self.network.state_dir.as_deref().unwrap_or(Path::new(STATE_DIR))
    }

    /// A name for what belongs to this attachment.
    pub fn owner(&self) -> Owner {
        Owner::new(&self.network.name, &self.container_id, &self.ifname)
    }

    /// GC: the names of what belongs to the attachments that stay.
    pub fn valid_owners(&self) -> Vec<Owner> {
        let owner = |one: &ValidAttachment| Owner::new(&self.network.name, &one.container_id, &one.ifname);
        self.valid_attachments().iter().map(owner).collect()
    }
}

/// A list that is there, which runtimes written in Go write as null when it is empty.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<ValidAttachment>>, D::Error> {
    Option::<Vec<ValidAttachment>>::deserialize(deserializer).map(|list| Some(list.unwrap_or_default()))
}

/// Tells an unknown version apart from other mistakes.
fn parse_network(stdin: &[u8]) -> Result<Network> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Bare {
        #[serde(default)]
        cni_version: String,
    }
    let bare: Bare = serde_json::from_slice(stdin).map_err(PluginError::Syntax)?;
    bare.cni_version.parse::<Version>().map_err(|error| PluginError::Version(error.0))?;
    serde_json::from_slice(stdin).map_err(PluginError::Syntax)
}

fn parse_arguments(text: &str) -> Result<Vec<(String, String)>> {
    let pair = |part: &str| part.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    text.split(';')
        .filter(|part| !part.is_empty())
        .map(|part| {
            pair(part).ok_or_else(|| PluginError::Environment {
                variable: "CNI_ARGS",
                problem: format!("{part:?} has no \"=\""),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &[u8] = br#"{"cniVersion":"1.1.0","name":"net","type":"bridge"}"#;

    fn read(verb: Verb, config: &[u8], pairs: &[(&str, &str)]) -> Result<Call> {
        Call::read(verb, config.to_vec(), |name| {
            pairs.iter().find(|(found, _)| *found == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_verb_needs_its_own_part_of_the_environment() {
        let whole = [("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/a")];
        assert!(read(Verb::Add, CONFIG, &whole).is_ok());
        assert!(read(Verb::Del, CONFIG, &whole[..2]).is_ok());
        assert!(read(Verb::Status, CONFIG, &[]).is_ok());
        assert!(matches!(
            read(Verb::Add, CONFIG, &whole[..2]),
            Err(PluginError::Environment { variable: "CNI_NETNS", .. })
        ));
        assert!(matches!(
            read(Verb::Del, CONFIG, &whole[1..]),
            Err(PluginError::Environment { variable: "CNI_CONTAINERID", .. })
        ));
    }

    #[test]
    fn an_unknown_version_is_the_specifications_error_one() {
        let error = read(Verb::Gc, br#"{"cniVersion":"7.0.0","name":"net"}"#, &[]).unwrap_err();
        assert_eq!(error.object("1.1.0").code, 1);
        let error = read(Verb::Gc, b"{", &[]).unwrap_err();
        assert_eq!(error.object("1.1.0").code, 6);
    }

    #[test]
    fn garbage_collection_needs_to_know_what_is_valid() {
        let with = |fields: &str| format!(r#"{{"cniVersion":"1.1.0","name":"net","type":"bridge"{fields}}}"#);
        assert_eq!(read(Verb::Gc, CONFIG, &[]).unwrap_err().object("1.1.0").code, 7);
        for name in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            let one = format!(r#","{name}":[{{"containerID":"a","ifname":"eth0"}}]"#);
            assert_eq!(read(Verb::Gc, with(&one).as_bytes(), &[]).unwrap().valid_attachments().len(), 1);
            for empty in ["[]", "null"] {
                let call = read(Verb::Gc, with(&format!(r#","{name}":{empty}"#)).as_bytes(), &[]).unwrap();
                assert!(call.valid_attachments().is_empty());
            }
        }
    }

    #[test]
    fn arguments_are_pairs() {
        assert_eq!(
            parse_arguments("IgnoreUnknown=1;A=b=c;").unwrap(),
            [("IgnoreUnknown".into(), "1".into()), ("A".into(), "b=c".into())]
        );
        assert!(parse_arguments("nonsense").is_err());
    }
}
