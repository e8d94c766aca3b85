//! [`UserRanges`]: the pool with its records on disk, one file in each pod's directory, in upstream's form.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use oarlock_proto::cri;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::pool::{Host, Pool, Range, UsersError};

const FILE: &str = "userns";
/// Whose subordinate ids pods get, where the node's administrator set some aside.
const USER: &str = "kubelet";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OnDisk {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

impl Range {
    fn on_disk(self) -> OnDisk {
        let mapping = vec![Mapping { host_id: self.first, container_id: 0, length: self.length }];
        OnDisk { uid_mappings: mapping.clone(), gid_mappings: mapping }
    }

    /// Users and groups alike, with root in it; nothing else is ever written.
    fn from_disk(bytes: &[u8]) -> Result<Range, String> {
        let kept: OnDisk = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match (&kept.uid_mappings[..], &kept.gid_mappings[..]) {
            ([users], [groups]) if users == groups && users.container_id == 0 && users.host_id > 0 => {
                Ok(Range { first: users.host_id, length: users.length })
            }
            _ => Err("it is not one mapping from 0, the same for users and groups".to_owned()),
        }
    }

    /// As the runtime is told of it.
    pub(crate) fn mapping(self) -> Vec<cri::IdMapping> {
        vec![cri::IdMapping { host_id: self.first, container_id: 0, length: self.length }]
    }
}

/// Which pod has which ids.
pub(crate) struct UserRanges {
    pods_root: PathBuf,
    pool: Mutex<Pool>,
}

impl UserRanges {
    /// With what pods were given before; their records are below `pods_root`. One that cannot be read is an error: its pod may
    /// still run with ids that would be given to another. Blocks.
    pub(crate) fn open(pods_root: PathBuf, mut pool: Pool) -> Result<Self, UsersError> {
        let unread = |file: &Path, problem: String| UsersError::Record { file: file.to_owned(), problem };
        let entries = match fs::read_dir(&pods_root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            entries => Some(entries.map_err(|error| unread(&pods_root, error.to_string()))?),
        };
        for entry in entries.into_iter().flatten() {
            let entry = entry.map_err(|error| unread(&pods_root, error.to_string()))?;
            let (uid, file) = (entry.file_name(), entry.path().join(FILE));
            let bytes = match fs::read(&file) {
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                    continue;
                }
                bytes => bytes.map_err(|error| unread(&file, error.to_string()))?,
            };
            let range = Range::from_disk(&bytes).map_err(|problem| unread(&file, problem))?;
            pool.restore(&uid.to_string_lossy(), range);
        }
        Ok(Self { pods_root, pool: Mutex::new(pool) })
    }

    pub(crate) fn of(&self, uid: &str) -> Option<Range> {
        self.pool.lock().of(uid)
    }

    /// The pod's range, written down before anybody uses it. Blocks.
    pub(crate) fn take(&self, uid: &str) -> Result<Range, String> {
        let mut pool = self.pool.lock();
        if let Some(range) = pool.of(uid) {
            return Ok(range);
        }
        let file = self.pods_root.join(uid).join(FILE);
        // One that could not be read may be what a container still runs with.
        if file.exists() {
            return Err(format!("user namespace: invalid user namespace mappings file {}", file.display()));
        }
        let range = pool.take(uid).map_err(|error| format!("create user namespace: {error}"))?;
        write(&file, &range.on_disk()).map_err(|error| {
            pool.release(uid);
            format!("create user namespace: write {}: {error}", file.display())
        })?;
        Ok(range)
    }

    /// The pod is over.
    pub(crate) fn release(&self, uid: &str) {
        let _ = fs::remove_file(self.pods_root.join(uid).join(FILE));
        self.pool.lock().release(uid);
    }
}

fn write(file: &Path, kept: &OnDisk) -> io::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    let partial = file.with_extension("new");
    let mut handle = fs::File::create(&partial)?;
    handle.write_all(&serde_json::to_vec(kept).map_err(io::Error::other)?)?;
    handle.sync_all()?;
    fs::rename(&partial, file)?;
    fs::File::open(dir)?.sync_all()
}

/// The ids set aside for pods in `/etc/subuid` and `/etc/subgid`, which must say the same. None where they name nobody.
pub(crate) fn subordinate(users: &str, groups: &str) -> Result<Option<Host>, UsersError> {
    let (uids, gids) = (entry(users, "/etc/subuid")?, entry(groups, "/etc/subgid")?);
    if uids != gids {
        let problem = format!("users and groups of {USER} differ");
        return Err(UsersError::File { file: "/etc/subgid", problem });
    }
    Ok(uids)
}

fn entry(text: &str, file: &'static str) -> Result<Option<Host>, UsersError> {
    let mut lines = text.lines().filter(|line| line.split(':').next() == Some(USER));
    let Some(line) = lines.next() else { return Ok(None) };
    if lines.next().is_some() {
        return Err(UsersError::File { file, problem: format!("{USER} has more than one range") });
    }
    let mut numbers = line.split(':').skip(1).map(str::trim);
    let (first, total) = (numbers.next().and_then(|n| n.parse().ok()), numbers.next().and_then(|n| n.parse().ok()));
    match first.zip(total) {
        Some((first, total)) => Ok(Some(Host { first, total })),
        None => Err(UsersError::File { file, problem: format!("{line:?} is not a range") }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::pool::UNIT;
    use super::*;

    fn ranges(root: &Path) -> UserRanges {
        UserRanges::open(root.to_owned(), Pool::new(None, UNIT, 4).unwrap()).unwrap()
    }

    #[test]
    fn a_range_survives_the_agent_and_is_gone_with_the_pod() {
        let dir = tempfile::tempdir().unwrap();
        let before = ranges(dir.path());
        let (a, b) = (before.take("a").unwrap(), before.take("b").unwrap());
        let text = fs::read_to_string(dir.path().join("b/userns")).unwrap();
        let mapping = r#"[{"hostId":131072,"containerId":0,"length":65536}]"#;
        assert_eq!(text, format!(r#"{{"uidMappings":{mapping},"gidMappings":{mapping}}}"#), "upstream's form");
        let after = ranges(dir.path());
        assert_eq!((after.of("b"), after.take("a")), (Some(b), Ok(a)));
        assert!(![a, b].contains(&after.take("c").unwrap()));
        after.release("a");
        assert!(!dir.path().join("a/userns").exists());
        assert_eq!(after.take("d"), Ok(a));
    }

    #[test]
    fn a_record_that_cannot_be_read_keeps_everybody_from_its_ids() {
        let dir = tempfile::tempdir().unwrap();
        let opened = || UserRanges::open(dir.path().to_owned(), Pool::new(None, UNIT, 4).unwrap()).map(drop);
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("stray"), "").unwrap();
        opened().unwrap();
        let file = dir.path().join("a/userns");
        for bad in ["{", r#"{"uidMappings":[],"gidMappings":[]}"#] {
            fs::write(&file, bad).unwrap();
            let refused = opened().unwrap_err().to_string();
            assert!(refused.starts_with(&file.display().to_string()), "{refused}");
        }
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(matches!(opened(), Err(UsersError::Record { .. })), "it is there, but cannot be read");
    }

    #[test]
    fn a_record_that_came_up_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let open = ranges(dir.path());
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/userns"), "{").unwrap();
        let refused = open.take("a").unwrap_err();
        assert!(refused.contains("invalid user namespace mappings file"), "{refused}");
    }

    #[test]
    fn subordinate_ids_are_those_of_the_kubelet_user() {
        let host = |first, total| Ok(Some(Host { first, total }));
        let text = "other:1:2\nkubelet:65536:7208960\n";
        assert_eq!(subordinate(text, text), host(65_536, 7_208_960));
        assert_eq!(subordinate("other:1:2\n", ""), Ok(None));
        assert!(subordinate(text, "kubelet:131072:7208960\n").is_err());
        assert!(subordinate(text, "").is_err());
        let refused = subordinate("kubelet:x:1\n", "").unwrap_err().to_string();
        assert!(refused.contains("/etc/subuid") && refused.contains("kubelet:x:1"), "{refused}");
    }
}
