//! The Container Device Interface's edits: their form, and what they do to a specification. Follows versions 0.3 to 1.0 of the
//! interface's specification; parts of it that are not honoured are refused.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{Hook, HookBuilder, Mount, MountBuilder, Spec};
use serde::Deserialize;

use super::SpecError;

/// Annotations whose values name devices, from times before the field.
pub(crate) const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";

const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// One vendor's file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct File {
    pub cdi_version: String,
    /// `vendor/class`.
    pub kind: String,
    #[serde(default)]
    pub devices: Vec<Device>,
    #[serde(default)]
    pub container_edits: Edits,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    pub name: String,
    #[serde(default)]
    pub container_edits: Edits,
}

/// What is to change about a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Edits {
    pub env: Vec<String>,
    pub device_nodes: Vec<Node>,
    pub mounts: Vec<EditMount>,
    pub hooks: Vec<EditHook>,
    pub additional_gids: Vec<u32>,
    pub intel_rdt: Option<serde_json::Value>,
    pub net_devices: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Node {
    pub path: PathBuf,
    pub host_path: Option<PathBuf>,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub file_mode: Option<u32>,
    pub permissions: Option<String>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct EditMount {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub options: Vec<String>,
    #[serde(rename = "type")]
    pub kind: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct EditHook {
    pub hook_name: String,
    pub path: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub timeout: Option<i64>,
}

/// Checks `vendor/class=device`.
pub(crate) fn check_name(name: &str) -> Result<(), SpecError> {
    let bad = || SpecError::invalid(format!("config.CDI_devices[{name}]"), "is not of the form vendor/class=device");
    let (kind, device) = name.split_once('=').ok_or_else(bad)?;
    let (vendor, class) = kind.split_once('/').ok_or_else(bad)?;
    let fits = |part: &str, more: &[char]| {
        let plain = |letter: char| letter.is_ascii_alphanumeric() || more.contains(&letter);
        !part.is_empty() && part.chars().all(plain)
    };
    let sound = fits(vendor, &['_', '-', '.']) && fits(class, &['_', '-', '.']) && fits(device, &['_', '-', '.', ':']);
    if sound { Ok(()) } else { Err(bad()) }
}

/// Devices named by the field and by annotations, each once.
pub(crate) fn names<'a>(
    field: impl Iterator<Item = &'a str>,
    annotations: impl Iterator<Item = (&'a str, &'a str)>,
) -> Vec<String> {
    let annotated: BTreeMap<&str, &str> = annotations.filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX)).collect();
    let annotated = annotated.values().flat_map(|names| names.split(',')).map(str::trim);
    let mut all: Vec<String> = Vec::new();
    for name in field.chain(annotated).filter(|name| !name.is_empty()) {
        if !all.iter().any(|known| known == name) {
            all.push(name.to_owned());
        }
    }
    all
}

impl File {
    /// What cannot be right, or is not honoured.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.cdi_version.is_empty() {
            return Err("cdiVersion is missing".to_owned());
        }
        for device in &self.devices {
            check_name(&format!("{}={}", self.kind, device.name)).map_err(|error| error.to_string())?;
            device.container_edits.check()?;
        }
        self.container_edits.check()
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        if self.intel_rdt.is_some() || !self.net_devices.is_empty() {
            return Err("intelRdt and netDevices are not supported".to_owned());
        }
        if let Some(variable) = self.env.iter().find(|variable| !variable.contains('=')) {
            return Err(format!("env {variable:?} is not NAME=value"));
        }
        if let Some(node) = self.device_nodes.iter().find(|node| !node.path.is_absolute()) {
            return Err(format!("device path {:?} is not absolute", node.path));
        }
        let access = self.device_nodes.iter().filter_map(|node| node.permissions.as_deref());
        if let Some(bad) = access.into_iter().find(|access| access.chars().any(|letter| !"rwm".contains(letter))) {
            return Err(format!("permissions {bad:?} are not of r, w and m"));
        }
        let paths = self.mounts.iter().flat_map(|mount| [&mount.host_path, &mount.container_path]);
        if let Some(path) = paths.chain(self.hooks.iter().map(|hook| &hook.path)).find(|path| !path.is_absolute()) {
            return Err(format!("path {path:?} is not absolute"));
        }
        match self.hooks.iter().find(|hook| !HOOKS.contains(&hook.hook_name.as_str())) {
            Some(hook) => Err(format!("hook {:?} is not known", hook.hook_name)),
            None => Ok(()),
        }
    }

    pub(crate) fn extend(&mut self, other: Edits) {
        self.env.extend(other.env);
        self.device_nodes.extend(other.device_nodes);
        self.mounts.extend(other.mounts);
        self.hooks.extend(other.hooks);
        self.additional_gids.extend(other.additional_gids);
    }

    /// Carries the edits out, but for the device nodes, which are devices like others.
    pub(crate) fn apply(&self, spec: &mut Spec) -> Result<(), SpecError> {
        let failed = |error: oci_spec::OciSpecError| SpecError::invalid("config.CDI_devices", error.to_string());
        if let Some(process) = spec.process_mut() {
            let mut env = process.env().clone().unwrap_or_default();
            for variable in &self.env {
                let name = variable.split('=').next().unwrap_or_default();
                env.retain(|known| known.split('=').next() != Some(name));
                env.push(variable.clone());
            }
            process.set_env(Some(env));
            let mut user = process.user().clone();
            let mut groups = user.additional_gids().clone().unwrap_or_default();
            for gid in self.additional_gids.iter().filter(|gid| **gid != 0) {
                if !groups.contains(gid) {
                    groups.push(*gid);
                }
            }
            user.set_additional_gids(Some(groups));
            process.set_user(user);
        }
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &self.mounts {
            mounts.retain(|known| known.destination() != &mount.container_path);
            mounts.push(mount.to_oci().map_err(failed)?);
        }
        spec.set_mounts(Some(mounts));
        if !self.hooks.is_empty() {
            let mut hooks = spec.hooks().clone().unwrap_or_default();
            for hook in &self.hooks {
                add(&mut hooks, hook).map_err(failed)?;
            }
            spec.set_hooks(Some(hooks));
        }
        Ok(())
    }
}

impl EditMount {
    fn to_oci(&self) -> Result<Mount, oci_spec::OciSpecError> {
        let plain = || ["rbind", "rprivate", "nosuid", "nodev"].map(str::to_owned).to_vec();
        MountBuilder::default()
            .destination(&self.container_path)
            .source(&self.host_path)
            .typ(self.kind.clone().unwrap_or_else(|| "bind".to_owned()))
            .options(if self.options.is_empty() { plain() } else { self.options.clone() })
            .build()
    }
}

#[allow(deprecated, reason = "vendors still write prestart")]
fn add(hooks: &mut oci_spec::runtime::Hooks, edit: &EditHook) -> Result<(), oci_spec::OciSpecError> {
    let mut builder = HookBuilder::default().path(&edit.path);
    if !edit.args.is_empty() {
        builder = builder.args(edit.args.clone());
    }
    if !edit.env.is_empty() {
        builder = builder.env(edit.env.clone());
    }
    if let Some(timeout) = edit.timeout {
        builder = builder.timeout(timeout);
    }
    let hook = builder.build()?;
    let with = |list: &Option<Vec<Hook>>| Some(list.iter().flatten().cloned().chain([hook.clone()]).collect());
    match edit.hook_name.as_str() {
        "prestart" => hooks.set_prestart(with(hooks.prestart())),
        "createRuntime" => hooks.set_create_runtime(with(hooks.create_runtime())),
        "createContainer" => hooks.set_create_container(with(hooks.create_container())),
        "startContainer" => hooks.set_start_container(with(hooks.start_container())),
        "poststart" => hooks.set_poststart(with(hooks.poststart())),
        _ => hooks.set_poststop(with(hooks.poststop())),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_field_and_from_annotations_each_once() {
        let field = ["v.example/gpu=0", "v.example/gpu=1"];
        let annotations = [("cdi.k8s.io/a", "v.example/gpu=1, w.example/nic=x"), ("other", "v/c=d")];
        assert_eq!(
            names(field.into_iter(), annotations.into_iter()),
            ["v.example/gpu=0", "v.example/gpu=1", "w.example/nic=x"]
        );
        for bad in ["", "v/c", "v=c", "v/c=", "/c=d", "v/c d=e", "v/c=../x"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn edits_change_environment_groups_mounts_and_hooks() {
        let json = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0, "additionalGids": [5]}, "cwd": "/", "env": ["A=1", "B=2"]},
            "mounts": [{"destination": "/lib/x", "source": "/old", "type": "bind"}]
        });
        let mut spec: Spec = serde_json::from_value(json).unwrap();
        let edits: Edits = serde_json::from_value(serde_json::json!({
            "env": ["A=3"], "additionalGids": [5, 44, 0],
            "mounts": [{"hostPath": "/new", "containerPath": "/lib/x", "options": ["ro", "bind"]}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/ldconfig", "args": ["ldconfig"]}]
        }))
        .unwrap();
        edits.check().unwrap();
        edits.apply(&mut spec).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.env().as_ref().unwrap(), &["B=2", "A=3"]);
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[5, 44]);
        let [mount] = spec.mounts().as_deref().unwrap() else { panic!("one mount") };
        assert_eq!(mount.source().as_deref(), Some(std::path::Path::new("/new")));
        assert_eq!(spec.hooks().as_ref().unwrap().create_container().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn what_is_not_honoured_is_refused() {
        for bad in [
            r#"{"intelRdt": {}}"#,
            r#"{"netDevices": [{}]}"#,
            r#"{"env": ["A"]}"#,
            r#"{"deviceNodes": [{"path": "dev/x"}]}"#,
            r#"{"deviceNodes": [{"path": "/dev/x", "permissions": "x"}]}"#,
            r#"{"mounts": [{"hostPath": "x", "containerPath": "/x"}]}"#,
            r#"{"hooks": [{"hookName": "later", "path": "/x"}]}"#,
        ] {
            let edits: Edits = serde_json::from_str(bad).unwrap();
            assert!(edits.check().is_err(), "{bad}");
        }
    }
}
