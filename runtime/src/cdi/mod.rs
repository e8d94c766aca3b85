//! Container Device Interface: what vendors say a container needs to use a device, from their files on the node.
//!
//! Owns finding, reading and choosing; what an edit does to a specification is in `spec::cdi`. The files are read when a
//! container is made: drivers come and go without the runtime being told.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::spec::SpecError;
use crate::spec::cdi::{Edits, File, Node, check_name};
use crate::spec::device::HostDevice;

/// Larger files are refused.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// All that the named devices need. Of directories the later ones win; two files of one directory that name the same device
/// make it unusable, as nobody can say which is meant.
pub(crate) fn resolve(directories: &[PathBuf], names: &[String]) -> Result<Edits, Error> {
    if names.is_empty() {
        return Ok(Edits::default());
    }
    let mut known: BTreeMap<String, Vec<(usize, Edits)>> = BTreeMap::new();
    let mut common: BTreeMap<(usize, PathBuf), Edits> = BTreeMap::new();
    let mut homes: BTreeMap<String, Vec<(usize, PathBuf)>> = BTreeMap::new();
    let mut broken = Vec::new();
    for (priority, directory) in directories.iter().enumerate() {
        for path in files(directory) {
            match read(&path) {
                Ok(file) => {
                    common.insert((priority, path.clone()), file.container_edits);
                    for device in file.devices {
                        let name = format!("{}={}", file.kind, device.name);
                        known.entry(name.clone()).or_default().push((priority, device.container_edits));
                        homes.entry(name).or_default().push((priority, path.clone()));
                    }
                }
                // One vendor's mistake is not another's; it is told if a device is missing because of it.
                Err(error) => broken.push(error.full_message()),
            }
        }
    }
    let mut edits = Edits::default();
    let mut files_used = Vec::new();
    for name in names {
        check_name(name)?;
        let field = format!("config.CDI_devices[{name}]");
        let Some(found) = known.get(name) else {
            let why = if broken.is_empty() { String::new() } else { format!(" (unreadable: {})", broken.join("; ")) };
            return Err(SpecError::invalid(field, format!("no file describes this device{why}")).into());
        };
        let best = found.iter().map(|(priority, _)| *priority).max().unwrap_or_default();
        let chosen: Vec<&Edits> = found.iter().filter(|(priority, _)| *priority == best).map(|(_, e)| e).collect();
        let [only] = chosen.as_slice() else {
            return Err(SpecError::invalid(field, "several files of one directory describe this device").into());
        };
        // What a file says for all of its devices counts once.
        let home = homes.get(name).and_then(|homes| homes.iter().find(|(priority, _)| *priority == best));
        if let Some(home) = home.filter(|home| !files_used.contains(*home)) {
            edits.extend(common.get(home).cloned().unwrap_or_default());
            files_used.push(home.clone());
        }
        edits.extend((*only).clone());
    }
    Ok(edits)
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "json" || extension == "yaml"))
        .collect();
    files.sort();
    files
}

fn read(path: &Path) -> Result<File, Error> {
    let size = fs::metadata(path).map_err(Error::io("read", path))?.len();
    if size > FILE_BYTES_MAX {
        return Err(Error::Invalid(format!("{}: larger than {FILE_BYTES_MAX} bytes", path.display())));
    }
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    // JSON is YAML as well, but its own reader says better what is wrong.
    let parsed: Result<File, String> = match path.extension().is_some_and(|extension| extension == "json") {
        true => serde_json::from_str(&text).map_err(|error| error.to_string()),
        false => serde_yaml_ng::from_str(&text).map_err(|error| error.to_string()),
    };
    let file = parsed.map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?;
    file.check().map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?;
    Ok(file)
}

/// The device nodes of the edits, with what they leave to the host looked up there.
pub(crate) fn nodes(edits: &Edits) -> Result<Vec<HostDevice>, Error> {
    edits.device_nodes.iter().map(node).collect()
}

fn node(node: &Node) -> Result<HostDevice, Error> {
    let source = node.host_path.as_ref().unwrap_or(&node.path);
    let complete = node.major.is_some() && matches!(node.kind.as_deref(), Some("b" | "c" | "u"));
    let found = match fs::metadata(source) {
        Ok(found) => Some(found),
        Err(_) if complete => None,
        Err(error) => return Err(Error::io("look at device", source)(error)),
    };
    let is = |kind: fn(&fs::FileType) -> bool| found.as_ref().is_some_and(|found| kind(&found.file_type()));
    let block = node.kind.as_deref().map_or_else(|| is(FileTypeExt::is_block_device), |kind| kind == "b");
    if !complete && !is(FileTypeExt::is_block_device) && !is(FileTypeExt::is_char_device) {
        let problem = format!("{} is not a device", source.display());
        return Err(SpecError::invalid("config.CDI_devices", problem).into());
    }
    let number = found.as_ref().map_or(0, MetadataExt::rdev);
    Ok(HostDevice {
        path: node.path.clone(),
        block,
        major: node.major.unwrap_or_else(|| i64::from(libc::major(number))),
        minor: node.minor.unwrap_or_else(|| i64::from(libc::minor(number))),
        mode: node.file_mode.unwrap_or_else(|| found.as_ref().map_or(0o666, MetadataExt::mode)) & 0o7777,
        uid: node.uid.unwrap_or_else(|| found.as_ref().map_or(0, MetadataExt::uid)),
        gid: node.gid.unwrap_or_else(|| found.as_ref().map_or(0, MetadataExt::gid)),
        access: node.permissions.clone().filter(|access| !access.is_empty()).unwrap_or_else(|| "rwm".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, name: &str, content: &str) {
        fs::create_dir_all(directory).unwrap();
        fs::write(directory.join(name), content).unwrap();
    }

    fn env(edits: &Edits) -> Vec<&str> {
        edits.env.iter().map(String::as_str).collect()
    }

    #[test]
    fn later_directories_win_and_what_is_common_counts_once() {
        let root = tempfile::tempdir().unwrap();
        let [etc, run] = ["etc", "run"].map(|name| root.path().join(name));
        write(
            &etc,
            "a.yaml",
            "cdiVersion: 0.5.0\nkind: v.example/gpu\ncontainerEdits: {env: [ALL=1]}\ndevices:\n- {name: zero, containerEdits: {env: [ZERO=1]}}\n- {name: one, containerEdits: {env: [ONE=1]}}\n",
        );
        write(
            &run,
            "b.json",
            r#"{"cdiVersion":"0.6.0","kind":"v.example/gpu","devices":[{"name":"one","containerEdits":{"env":["ONE=2"]}}]}"#,
        );
        let directories = [etc.clone(), run];
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let both = resolve(&directories, &names(&["v.example/gpu=zero", "v.example/gpu=one"])).unwrap();
        assert_eq!(env(&both), ["ALL=1", "ZERO=1", "ONE=2"]);
        let twice = resolve(&directories[..1], &names(&["v.example/gpu=zero", "v.example/gpu=one"])).unwrap();
        assert_eq!(env(&twice), ["ALL=1", "ZERO=1", "ONE=1"]);

        write(&etc, "broken.json", "{");
        let missing = resolve(&directories, &names(&["v.example/gpu=two"])).unwrap_err().full_message();
        assert!(missing.contains("v.example/gpu=two") && missing.contains("broken.json"), "{missing}");
        write(
            &etc,
            "c.json",
            r#"{"cdiVersion":"0.5.0","kind":"v.example/gpu","devices":[{"name":"zero","containerEdits":{"env":["X=1"]}}]}"#,
        );
        let unclear = resolve(&directories, &names(&["v.example/gpu=zero"])).unwrap_err().full_message();
        assert!(unclear.contains("several files"), "{unclear}");
        assert!(resolve(&directories, &names(&["no name"])).is_err());
        assert!(resolve(&directories, &[]).unwrap().env.is_empty());
    }

    #[test]
    fn a_node_that_says_little_is_looked_up_on_the_host() {
        let null = Node { path: "/dev/other-null".into(), host_path: Some("/dev/null".into()), ..Node::default() };
        let found = node(&null).unwrap();
        assert_eq!((found.block, found.major, found.minor, found.access.as_str()), (false, 1, 3, "rwm"));
        assert!(node(&Node { path: "/etc/passwd".into(), ..Node::default() }).is_err());
        assert!(node(&Node { path: "/dev/no-such".into(), ..Node::default() }).is_err());
        let told = Node {
            path: "/dev/no-such".into(),
            kind: Some("b".into()),
            major: Some(9),
            minor: Some(1),
            permissions: Some("r".into()),
            ..Node::default()
        };
        let found = node(&told).unwrap();
        assert_eq!((found.block, found.major, found.minor, found.access.as_str()), (true, 9, 1, "r"));
    }
}
