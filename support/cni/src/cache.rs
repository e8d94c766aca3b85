//! What was attached with which configuration and result, kept on disk in libcni's layout:
//! `<cache>/results/<network>-<container>-<interface>`, one JSON object each.
//!
//! The configuration in it makes DEL right even when the network's file has changed or gone since ADD.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::client::Attachment;
use crate::config::NetworkList;
use crate::error::CniError;

const KIND: &str = "cniCacheV1";

/// One attachment on record.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    kind: String,
    pub container_id: String,
    /// The list's JSON, base64 as Go writes byte slices.
    config: String,
    pub if_name: String,
    pub network_name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    #[serde(default)]
    cni_args: Option<Vec<(String, String)>>,
    #[serde(default)]
    capability_args: Option<BTreeMap<String, Value>>,
    /// Absent while ADD is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
}

impl Entry {
    pub fn new(network: &NetworkList, attachment: &Attachment, result: Option<Value>) -> Entry {
        Entry {
            kind: KIND.to_owned(),
            container_id: attachment.container_id.clone(),
            config: STANDARD.encode(&network.source),
            if_name: attachment.ifname.clone(),
            network_name: network.name.clone(),
            netns: attachment.netns.as_ref().map(|path| path.display().to_string()),
            cni_args: Some(attachment.cni_args.clone()),
            capability_args: Some(attachment.capability_args.clone()),
            result,
        }
    }

    pub fn network(&self) -> Option<NetworkList> {
        let source = STANDARD.decode(&self.config).ok()?;
        NetworkList::parse(std::str::from_utf8(&source).ok()?).ok()
    }

    /// The attachment as it was when it was added.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            container_id: self.container_id.clone(),
            netns: self.netns.as_ref().map(PathBuf::from),
            ifname: self.if_name.clone(),
            cni_args: self.cni_args.clone().unwrap_or_default(),
            capability_args: self.capability_args.clone().unwrap_or_default(),
        }
    }
}

/// Longer records are not written over: up to a page, one call writes all or nothing.
const WHOLE_BYTES: usize = 4096;

/// Puts a record in the place of a shorter one by one call, which no kill cuts in two. This spares the file system a new
/// file: what ADD gave follows what it was asked for in every pod's start. False where there is no shorter record.
fn write_over(path: &Path, text: &[u8]) -> io::Result<bool> {
    let mut file = match fs::File::options().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    if text.len() > WHOLE_BYTES || file.metadata()?.len() > text.len() as u64 {
        return Ok(false);
    }
    Ok(file.write(text)? == text.len())
}

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    directory: PathBuf,
    /// A record's file that nobody needs, out of sight of others who read records.
    spare: PathBuf,
    /// Held while files are looked for and used: one that is used again belongs to another container then.
    files: Arc<Mutex<()>>,
}

impl Cache {
    pub fn new(cache_dir: &Path) -> Cache {
        Cache { directory: cache_dir.join("results"), spare: cache_dir.join("spare"), files: Arc::default() }
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        // Nothing is kept in it that a panic could leave half done.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, network: &str, container_id: &str, ifname: &str) -> PathBuf {
        self.directory.join(format!("{network}-{container_id}-{ifname}"))
    }

    /// Writes the record so that a kill leaves the old one or the new one. A power cut may leave one that cannot be read, which
    /// counts as none: DEL then goes by the network's configuration of that day.
    pub fn store(&self, entry: &Entry) -> Result<(), CniError> {
        let path = self.path(&entry.network_name, &entry.container_id, &entry.if_name);
        let _alone = self.alone();
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(entry)?;
            if write_over(&path, &text)? {
                return Ok(());
            }
            fs::create_dir_all(&self.directory)?;
            let temporary = self.partial(&entry.container_id, &entry.if_name);
            // Of several at once one gets it, and the others make files.
            let _ = fs::rename(&self.spare, &temporary);
            let mut file = fs::File::options().create(true).truncate(false).write(true).open(&temporary)?;
            file.write_all(&text)?;
            file.set_len(text.len() as u64)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| CniError::Cache { path: path.clone(), source })
    }

    /// Removes the record, and what a writer that died left of one. The file is used again: making and removing files is
    /// what costs most here, for ext4 looks past every file that was removed seconds ago.
    pub fn remove(&self, network: &str, container_id: &str, ifname: &str) -> Result<(), CniError> {
        let (partial, path) = (self.partial(container_id, ifname), self.path(network, container_id, ifname));
        let absent_is_fine = |path: PathBuf, result: io::Result<()>| match result {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(CniError::Cache { path, source }),
            _ => Ok(()),
        };
        let _alone = self.alone();
        let (removed, renamed) = (fs::remove_file(&partial), fs::rename(&path, &self.spare));
        absent_is_fine(partial, removed).and(absent_is_fine(path, renamed))
    }

    fn partial(&self, container_id: &str, ifname: &str) -> PathBuf {
        self.directory.join(format!(".{container_id}-{ifname}.tmp"))
    }

    /// The record of a container's interface, whatever the network.
    pub fn find(&self, container_id: &str, ifname: &str) -> Result<Option<Entry>, CniError> {
        let ending = format!("-{container_id}-{ifname}");
        let entries = self.entries(|name| name.ends_with(&ending))?;
        Ok(entries.into_iter().find(|entry| entry.container_id == container_id && entry.if_name == ifname))
    }

    pub fn load(&self, network: &str, container_id: &str, ifname: &str) -> Option<Entry> {
        let _alone = self.alone();
        read(&self.path(network, container_id, ifname))
    }

    /// Every readable record. A file that cannot be read is left alone: it may be another version's.
    pub fn all(&self) -> Result<Vec<Entry>, CniError> {
        self.entries(|_| true)
    }

    /// Reads only the files whose names are wanted, and none that is no record (any more).
    fn entries(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<Entry>, CniError> {
        let failed = |source| CniError::Cache { path: self.directory.clone(), source };
        let _alone = self.alone();
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(|name| !name.starts_with('.') && is_wanted(name)) {
                found.extend(read(&entry.path()));
            }
        }
        Ok(found)
    }
}

fn read(path: &Path) -> Option<Entry> {
    let hidden = path.file_name()?.to_str()?.starts_with('.');
    if hidden {
        return None;
    }
    serde_json::from_slice::<Entry>(&fs::read(path).ok()?).ok().filter(|entry| entry.kind == KIND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(container_id: &str, result: Option<Value>) -> Entry {
        let source = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"}]}"#;
        let attachment = Attachment::for_pod(container_id, Path::new("/run/netns/a"), "default", "p", "u");
        Entry::new(&NetworkList::parse(source).unwrap(), &attachment, result)
    }

    #[test]
    fn a_record_goes_with_what_a_writer_that_died_left_and_others_stay() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        for id in ["one", "two", "other-one"] {
            cache.store(&entry(id, None)).unwrap();
        }
        fs::write(cache.partial("one", "eth0"), "{").unwrap();
        assert_eq!(cache.find("one", "eth0").unwrap().unwrap().container_id, "one");
        cache.remove("net", "one", "eth0").unwrap();
        cache.remove("net", "one", "eth0").unwrap();
        assert!(cache.find("one", "eth0").unwrap().is_none() && !cache.partial("one", "eth0").exists());
        assert_eq!(cache.all().unwrap().len(), 2);
    }

    #[test]
    fn a_file_that_is_used_again_holds_nothing_of_the_record_before() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        let result = serde_json::json!({"ips": [{"address": "10.42.0.2/24"}]});
        let mut inodes = Vec::new();
        for id in ["long-name-of-a-container", "b", "container-c"] {
            let path = cache.path("net", id, "eth0");
            for result in [None, Some(result.clone())] {
                cache.store(&entry(id, result.clone())).unwrap();
                let [found] = cache.all().unwrap().try_into().expect("one record");
                assert_eq!((found.container_id.as_str(), found.result), (id, result));
                inodes.push(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap()));
            }
            cache.remove("net", id, "eth0").unwrap();
            assert!(cache.all().unwrap().is_empty());
        }
        inodes.dedup();
        assert_eq!(inodes.len(), 1, "one file serves all");
    }
}
