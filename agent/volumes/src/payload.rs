//! What a configMap, secret, downwardAPI or projected volume contains. Pure: objects in, files out.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret};

use crate::downward;
use crate::error::VolumeError;
use crate::manager::PodFacts;

/// One file to project.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct FileProjection {
    pub data: Vec<u8>,
    pub mode: u32,
    pub owner_uid: Option<u32>,
}

impl std::fmt::Debug for FileProjection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileProjection({} bytes, {:o}, {:?})", self.data.len(), self.mode, self.owner_uid)
    }
}

/// Files by their path relative to the volume.
pub(crate) type Payload = BTreeMap<PathBuf, FileProjection>;

/// The mode of files unless the manifest says otherwise.
pub(crate) const DEFAULT_FILE_MODE: u32 = 0o644;

pub(crate) fn mode_or_default(mode: Option<i32>) -> u32 {
    mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(DEFAULT_FILE_MODE) & 0o777
}

/// How keys of a configMap or secret become files.
pub(crate) struct KeySelection<'a> {
    /// The word in errors.
    pub kind: &'static str,
    pub items: &'a [KeyToPath],
    pub default_mode: u32,
    pub optional: bool,
}

impl KeySelection<'_> {
    /// The files for an object's data. No items means every key under its own name.
    fn project(&self, data: BTreeMap<&str, &[u8]>) -> Result<Payload, VolumeError> {
        let mut payload = Payload::new();
        if self.items.is_empty() {
            for (key, value) in data {
                insert(&mut payload, key, value.to_vec(), self.default_mode)?;
            }
            return Ok(payload);
        }
        for item in self.items {
            match data.get(item.key.as_str()) {
                Some(value) => {
                    let mode = item.mode.map_or(self.default_mode, |mode| mode_or_default(Some(mode)));
                    insert(&mut payload, &item.path, value.to_vec(), mode)?;
                }
                None if self.optional => {}
                None => return Err(VolumeError::KeyNotFound { kind: self.kind, key: item.key.clone() }),
            }
        }
        Ok(payload)
    }

    pub fn config_map(&self, object: &ConfigMap) -> Result<Payload, VolumeError> {
        let mut data: BTreeMap<&str, &[u8]> = BTreeMap::new();
        for (key, value) in object.data.iter().flatten() {
            data.insert(key, value.as_bytes());
        }
        for (key, value) in object.binary_data.iter().flatten() {
            data.insert(key, &value.0);
        }
        self.project(data)
    }

    pub fn secret(&self, object: &Secret) -> Result<Payload, VolumeError> {
        let mut data: BTreeMap<&str, &[u8]> = BTreeMap::new();
        for (key, value) in object.data.iter().flatten() {
            data.insert(key, &value.0);
        }
        for (key, value) in object.string_data.iter().flatten() {
            data.insert(key, value.as_bytes());
        }
        self.project(data)
    }
}

/// The files of a downwardAPI volume or source.
pub(crate) fn downward_api(
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
    pod: &Pod,
    facts: &PodFacts,
) -> Result<Payload, VolumeError> {
    let mut payload = Payload::new();
    for item in items {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => downward::field(pod, &field.field_path)?,
            (None, Some(resource)) => downward::resource(pod, resource, &facts.allocatable)?,
            (None, None) => {
                return Err(VolumeError::Invalid {
                    message: format!("downwardAPI file {:?} has neither fieldRef nor resourceFieldRef", item.path),
                });
            }
        };
        let mode = item.mode.map_or(default_mode, |mode| mode_or_default(Some(mode)));
        insert(&mut payload, &item.path, text.into_bytes(), mode)?;
    }
    Ok(payload)
}

/// Adds a file; a later one of the same path wins, as upstream has it.
pub(crate) fn insert(payload: &mut Payload, path: &str, data: Vec<u8>, mode: u32) -> Result<(), VolumeError> {
    payload.insert(clean_path(path)?, FileProjection { data, mode, owner_uid: None });
    Ok(())
}

/// Checks a payload path: relative, no `..` anywhere, not starting with `..` (those names are the writer's own).
pub(crate) fn clean_path(path: &str) -> Result<PathBuf, VolumeError> {
    let invalid = |why: &str| VolumeError::Invalid { message: format!("invalid path {path:?}: {why}") };
    if path.is_empty() {
        return Err(invalid("must not be empty"));
    }
    if path.len() > 4096 {
        return Err(invalid("must not be longer than 4096 bytes"));
    }
    let mut clean = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) if name.len() > 255 => return Err(invalid("a part is longer than 255 bytes")),
            Component::Normal(name) if name.as_encoded_bytes().contains(&0) => return Err(invalid("contains a NUL")),
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            Component::ParentDir => return Err(invalid("must not contain '..'")),
            Component::RootDir | Component::Prefix(_) => return Err(invalid("must be relative")),
        }
    }
    if clean.as_os_str().is_empty() {
        return Err(invalid("must name a file"));
    }
    if clean.as_os_str().as_encoded_bytes().starts_with(b"..") {
        return Err(invalid("must not start with '..'"));
    }
    Ok(clean)
}

/// Refuses a payload in which one file's path is a directory of another's.
pub(crate) fn check_no_nesting(payload: &Payload) -> Result<(), VolumeError> {
    for path in payload.keys() {
        if let Some(parent) = path.ancestors().skip(1).find(|parent| payload.contains_key(*parent)) {
            return Err(VolumeError::Invalid {
                message: format!("{:?} cannot be both a file and the directory of {:?}", parent, path),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn selection(items: &[KeyToPath], optional: bool) -> KeySelection<'_> {
        KeySelection { kind: "config", items, default_mode: 0o644, optional }
    }

    fn sample() -> ConfigMap {
        ConfigMap {
            data: Some([("a".to_string(), "1".to_string())].into()),
            binary_data: Some([("b".to_string(), ByteString(vec![0, 255]))].into()),
            ..Default::default()
        }
    }

    fn item(key: &str, path: &str, mode: Option<i32>) -> KeyToPath {
        KeyToPath { key: key.into(), path: path.into(), mode }
    }

    #[test]
    fn every_key_becomes_a_file_by_default() {
        let payload = selection(&[], false).config_map(&sample()).unwrap();
        assert_eq!(payload[Path::new("a")].data, b"1");
        assert_eq!(payload[Path::new("b")].data, [0, 255]);
        assert_eq!(payload[Path::new("a")].mode, 0o644);
    }

    #[test]
    fn items_choose_paths_and_modes() {
        let items = [item("a", "deep/er/x", Some(0o400))];
        let payload = selection(&items, false).config_map(&sample()).unwrap();
        assert_eq!(payload.len(), 1);
        assert_eq!(payload[Path::new("deep/er/x")].mode, 0o400);
    }

    #[test]
    fn a_missing_key_is_an_error_unless_optional() {
        let items = [item("nope", "x", None)];
        let error = selection(&items, false).config_map(&sample()).unwrap_err();
        assert_eq!(error.to_string(), "references non-existent config key: nope");
        assert!(selection(&items, true).config_map(&sample()).unwrap().is_empty());
    }

    #[test]
    fn hostile_paths_are_refused() {
        for path in ["", "/etc/passwd", "../x", "a/../../x", "..data", "..2024", ".", "a\0b"] {
            assert!(clean_path(path).is_err(), "{path:?}");
        }
        assert_eq!(clean_path("./a//b").unwrap(), Path::new("a/b"));
        assert_eq!(clean_path("a/..b").unwrap(), Path::new("a/..b"));
    }

    #[test]
    fn file_and_directory_of_one_name_are_refused() {
        let mut payload = Payload::new();
        insert(&mut payload, "a", vec![], 0o644).unwrap();
        insert(&mut payload, "a/b", vec![], 0o644).unwrap();
        assert!(check_no_nesting(&payload).is_err());
    }
}
