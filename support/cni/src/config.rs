//! Network configuration: finding, reading and checking conflist files, and the configuration that each plugin is sent.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::names::is_valid_id;
use crate::types::ValidAttachment;
use crate::version::{UnsupportedVersion, Version};

/// Files larger than this are not read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A network configuration list: a name, a version and a chain of plugins.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkList {
    pub name: String,
    pub version: Version,
    pub disable_check: bool,
    pub disable_gc: bool,
    /// The plugins' own objects, each with at least a `type`.
    pub plugins: Vec<Map<String, Value>>,
    /// The file that the list came from, if it came from one.
    pub path: Option<PathBuf>,
    /// The JSON that the list was read from.
    pub source: String,
}

/// Why a configuration could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("cannot read the CNI configuration directory {}", path.display())]
    ReadDirectory { path: PathBuf, source: io::Error },
    #[error("cannot read CNI configuration {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("CNI configuration {} is larger than 1 MiB", path.display())]
    TooLarge { path: PathBuf },
    #[error("CNI configuration is not valid JSON")]
    Syntax(#[source] serde_json::Error),
    #[error("CNI configuration: field {field}: {problem}")]
    Field { field: String, problem: String },
    #[error("CNI configuration: field cniVersion")]
    Version(#[source] UnsupportedVersion),
    #[error("CNI configuration {}", path.display())]
    InFile { path: PathBuf, source: Box<ConfigError> },
    #[error("no CNI network is configured in {}", path.display())]
    NoNetwork { path: PathBuf },
}

fn field(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Field { field: field.into(), problem: problem.into() }
}

impl NetworkList {
    /// Reads a list, or a single plugin's configuration as a list of one.
    pub fn parse(json: &str) -> Result<NetworkList, ConfigError> {
        let root: Map<String, Value> = serde_json::from_str(json).map_err(ConfigError::Syntax)?;
        let name = root.get("name").and_then(Value::as_str).ok_or_else(|| field("name", "is required"))?;
        if !is_valid_id(name) {
            return Err(field("name", format!("{name:?} is not a valid network name")));
        }
        let plugins = match root.get("plugins") {
            Some(Value::Array(plugins)) => plugins.clone(),
            Some(_) => return Err(field("plugins", "must be a list")),
            None => vec![Value::Object(root.clone())],
        };
        if plugins.is_empty() {
            return Err(field("plugins", "must have at least one plugin"));
        }
        let plugins = plugins.into_iter().enumerate().map(plugin_object).collect::<Result<Vec<_>, _>>()?;
        Ok(NetworkList {
            name: name.to_owned(),
            version: negotiated_version(&root)?,
            disable_check: flag(&root, "disableCheck")?,
            disable_gc: flag(&root, "disableGC")?,
            plugins,
            path: None,
            source: json.to_owned(),
        })
    }

    /// Reads one file.
    pub fn load(path: &Path) -> Result<NetworkList, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.to_owned(), source };
        if fs::metadata(path).map_err(failed)?.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        let mut list = NetworkList::parse(&text)
            .map_err(|source| ConfigError::InFile { path: path.to_owned(), source: Box::new(source) })?;
        list.path = Some(path.to_owned());
        Ok(list)
    }

    /// The default network of a directory: the first file by name (`.conflist`, `.conf`, `.json`) that can be used.
    ///
    /// # Errors
    /// [`ConfigError::NoNetwork`] without any file; the first file's error when none can be used.
    pub fn load_default(directory: &Path) -> Result<NetworkList, ConfigError> {
        let mut first_error = None;
        for path in config_files(directory)? {
            match NetworkList::load(&path) {
                Ok(list) => return Ok(list),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| ConfigError::NoNetwork { path: directory.to_owned() }))
    }

    /// The object that plugin `index` is sent on its standard input.
    pub fn plugin_config(&self, index: usize, extra: &PluginExtra<'_>) -> Map<String, Value> {
        let mut config = self.plugins[index].clone();
        let capabilities = config.remove("capabilities");
        config.insert("name".into(), self.name.clone().into());
        config.insert("cniVersion".into(), self.version.as_str().into());
        let declared =
            |name: &str| capabilities.as_ref().and_then(|all| all.get(name)).and_then(Value::as_bool) == Some(true);
        let runtime_config: Map<String, Value> = extra
            .capability_args
            .iter()
            .filter(|(name, _)| declared(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !runtime_config.is_empty() {
            config.insert("runtimeConfig".into(), runtime_config.into());
        }
        if let Some(result) = extra.prev_result {
            config.insert("prevResult".into(), result.clone());
        }
        if let Some(valid) = extra.valid_attachments {
            config.insert("cni.dev/valid-attachments".into(), serde_json::to_value(valid).unwrap_or_default());
        }
        config
    }

    pub fn plugin_type(&self, index: usize) -> &str {
        self.plugins[index].get("type").and_then(Value::as_str).unwrap_or_default()
    }
}

/// What the runtime adds to a plugin's own configuration.
#[derive(Debug, Default)]
pub struct PluginExtra<'a> {
    pub capability_args: BTreeMap<String, Value>,
    pub prev_result: Option<&'a Value>,
    pub valid_attachments: Option<&'a [ValidAttachment]>,
}

fn plugin_object((index, plugin): (usize, Value)) -> Result<Map<String, Value>, ConfigError> {
    let Value::Object(plugin) = plugin else {
        return Err(field(format!("plugins[{index}]"), "must be an object"));
    };
    match plugin.get("type").and_then(Value::as_str) {
        Some(kind) if !kind.is_empty() && !kind.contains('/') => Ok(plugin),
        Some(kind) => Err(field(format!("plugins[{index}].type"), format!("{kind:?} is not a plugin's name"))),
        None => Err(field(format!("plugins[{index}].type"), "is required")),
    }
}

/// The newest of the versions that the list offers and that is known here.
fn negotiated_version(root: &Map<String, Value>) -> Result<Version, ConfigError> {
    let single = root.get("cniVersion").and_then(Value::as_str);
    let offered: Vec<&str> = match root.get("cniVersions").and_then(Value::as_array) {
        Some(versions) => versions.iter().filter_map(Value::as_str).chain(single).collect(),
        None => single.into_iter().collect(),
    };
    let Some(first) = offered.first() else {
        return Err(field("cniVersion", "is required"));
    };
    offered
        .iter()
        .filter_map(|text| text.parse::<Version>().ok())
        .max()
        .ok_or_else(|| ConfigError::Version(UnsupportedVersion((*first).to_owned())))
}

fn flag(root: &Map<String, Value>, name: &str) -> Result<bool, ConfigError> {
    match root.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        // libcni takes strings here too.
        Some(Value::String(text)) if text == "true" => Ok(true),
        Some(Value::String(text)) if text == "false" => Ok(false),
        Some(_) => Err(field(name, "must be a boolean")),
    }
}

fn config_files(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::ReadDirectory { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conflist" | "conf" | "json")) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIST: &str = r#"{"cniVersion":"1.1.0","name":"oarlock","plugins":[
        {"type":"bridge","bridge":"oar0"},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;

    #[test]
    fn capabilities_reach_only_the_plugins_that_declare_them() {
        let list = NetworkList::parse(LIST).unwrap();
        let mappings = json!([{"hostPort": 80, "containerPort": 80, "protocol": "tcp"}]);
        let extra = PluginExtra {
            capability_args: BTreeMap::from([
                ("portMappings".to_owned(), mappings.clone()),
                ("mac".to_owned(), json!("x")),
            ]),
            ..PluginExtra::default()
        };
        assert_eq!(list.plugin_config(0, &extra).get("runtimeConfig"), None);
        let portmap = list.plugin_config(1, &extra);
        assert_eq!(portmap["runtimeConfig"], json!({"portMappings": mappings}));
        assert_eq!(portmap.get("capabilities"), None);
        assert_eq!(portmap["name"], "oarlock");
    }

    #[test]
    fn the_newest_common_version_wins() {
        let with =
            |extra: &str| NetworkList::parse(&format!(r#"{{"name":"a","type":"bridge",{extra}}}"#)).map(|l| l.version);
        assert_eq!(with(r#""cniVersion":"0.3.1""#).unwrap(), Version::V0_3_1);
        assert_eq!(with(r#""cniVersion":"0.4.0","cniVersions":["0.4.0","1.0.0","2.0.0"]"#).unwrap(), Version::V1_0_0);
        assert!(matches!(with(r#""cniVersion":"9.9.9""#), Err(ConfigError::Version(_))));
        assert!(matches!(with(r#""x":1"#), Err(ConfigError::Field { field, .. }) if field == "cniVersion"));
    }

    #[test]
    fn a_bad_configuration_names_its_field() {
        let problem = |json: &str| NetworkList::parse(json).unwrap_err().to_string();
        assert!(problem(r#"{"cniVersion":"1.0.0","plugins":[]}"#).contains("field name"));
        assert!(problem(r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#).contains("field plugins"));
        assert!(
            problem(r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../x"}]}"#).contains("plugins[0].type")
        );
    }

    #[test]
    fn the_first_usable_file_by_name_is_the_default_network() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(NetworkList::load_default(directory.path()), Err(ConfigError::NoNetwork { .. })));
        fs::write(directory.path().join("05-broken.conflist"), "{").unwrap();
        assert!(matches!(NetworkList::load_default(directory.path()), Err(ConfigError::InFile { .. })));
        fs::write(directory.path().join("10-a.conflist"), LIST).unwrap();
        fs::write(directory.path().join("20-b.conflist"), LIST.replace("oarlock", "other")).unwrap();
        fs::write(directory.path().join("01-note.txt"), "not a network").unwrap();
        assert_eq!(NetworkList::load_default(directory.path()).unwrap().name, "oarlock");
    }
}
