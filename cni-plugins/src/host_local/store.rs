//! Who has which address, in files, safe against `kill -9` at any point and against several calls at once.
//!
//! In `<data dir>/<network>/`:
//! - `<address>`: container id and interface of the holder, in the reference plugin's form. It appears with its content in
//!   one step (a finished file gets its name), and only if nobody has the address.
//! - `last_reserved_ip.<set>`: where to go on, so that an address is not given again soon.
//! - `attachments/<container>@<interface>`: the addresses that the holder has or was about to take, written first. It makes
//!   DEL independent of how many addresses are given; without it (files of the reference plugin) every file is read.
//! - `.new` and `.new-list`: files that are not an address's or a holder's yet, or not any more. They are used again, for
//!   making and removing files is what costs most here: ext4 looks past every file that was removed seconds ago.
//! - `lock`: held exclusively by every call.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use oarlock_cni::types::ValidAttachment;

use crate::error::{PluginError, Result};

const LOCK: &str = "lock";
const ATTACHMENTS: &str = "attachments";
const NEW: &str = ".new";
const NEW_LIST: &str = ".new-list";

/// An interface of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner<'a> {
    pub container_id: &'a str,
    pub ifname: &'a str,
}

impl Owner<'_> {
    fn content(&self) -> String {
        format!("{}\r\n{}", self.container_id, self.ifname)
    }

    fn file_name(&self) -> String {
        format!("{}@{}", self.container_id, self.ifname)
    }
}

/// The files of one network, locked for as long as this lives.
pub struct Store {
    directory: PathBuf,
    _lock: Flock<File>,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PluginError {
    move |source| PluginError::File { operation, path: path.to_owned(), source }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes a small file without emptying it first, which some file systems take as a reason to wait for the disk.
fn overwrite(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::options().create(true).truncate(false).write(true).open(path)?;
    file.write_all(text.as_bytes())?;
    if file.metadata()?.len() != text.len() as u64 {
        file.set_len(text.len() as u64)?;
    }
    Ok(())
}

impl Store {
    /// Opens, makes if need be, and locks.
    pub fn open(data_dir: &Path, network: &str) -> Result<Store> {
        let directory = data_dir.join(network);
        let attachments = directory.join(ATTACHMENTS);
        fs::create_dir_all(&attachments).map_err(failed("create", &attachments))?;
        let path = directory.join(LOCK);
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(failed("open", &path))?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
        Ok(Store { directory, _lock: lock })
    }

    /// As [`Store::open`], or nothing when no address of the network was ever given.
    pub fn open_existing(data_dir: &Path, network: &str) -> Result<Option<Store>> {
        if data_dir.join(network).is_dir() { Store::open(data_dir, network).map(Some) } else { Ok(None) }
    }

    fn address_path(&self, address: IpAddr) -> PathBuf {
        self.directory.join(address.to_string())
    }

    fn attachment_path(&self, owner: &Owner<'_>) -> PathBuf {
        self.directory.join(ATTACHMENTS).join(owner.file_name())
    }

    /// The addresses that `owner` has, whoever gave them.
    pub fn addresses_of(&self, owner: &Owner<'_>) -> Result<Vec<IpAddr>> {
        match self.recorded(owner)? {
            Some(addresses) => Ok(addresses),
            None => Ok(self.held(owner, self.all()?)),
        }
    }

    /// The addresses that `owner` has from this plugin: what is asked for is one file, however many are given.
    pub fn recorded(&self, owner: &Owner<'_>) -> Result<Option<Vec<IpAddr>>> {
        let listed = match fs::read_to_string(self.attachment_path(owner)) {
            Ok(text) => text.lines().filter_map(|line| line.parse().ok()).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &self.attachment_path(owner))(error)),
        };
        Ok(Some(self.held(owner, listed)))
    }

    fn held(&self, owner: &Owner<'_>, addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        addresses.into_iter().filter(|address| self.is_held_by(*address, owner)).collect()
    }

    fn is_held_by(&self, address: IpAddr, owner: &Owner<'_>) -> bool {
        let Ok(text) = fs::read_to_string(self.address_path(address)) else { return false };
        let mut lines = text.lines();
        let holder = lines.next().unwrap_or_default().trim();
        // Very old files have no interface name.
        holder == owner.container_id && lines.next().is_none_or(|ifname| ifname.trim() == owner.ifname)
    }

    /// Every address that is given, whoever has it.
    fn all(&self) -> Result<Vec<IpAddr>> {
        let entries = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("list", &self.directory))?;
            found.extend(entry.file_name().to_str().and_then(|name| name.parse::<IpAddr>().ok()));
        }
        Ok(found)
    }

    /// The addresses that are given, whoever has them.
    pub fn given(&self) -> Result<HashSet<IpAddr>> {
        Ok(self.all()?.into_iter().collect())
    }

    /// Takes an address if it is free.
    pub fn take(&self, owner: &Owner<'_>, set: usize, address: IpAddr) -> Result<bool> {
        let path = self.address_path(address);
        if path.exists() {
            return Ok(false);
        }
        // The intent first: whatever happens next, DEL finds the address.
        let mut listed = self.recorded(owner)?.unwrap_or_default();
        listed.push(address);
        self.write_attachment(owner, &listed)?;
        // Under the lock nobody can have taken it since.
        let new = self.directory.join(NEW);
        overwrite(&new, &owner.content()).map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("create", &path))?;
        let last = self.last_path(set);
        overwrite(&last, &address.to_string()).map_err(failed("write", &last))?;
        Ok(true)
    }

    fn write_attachment(&self, owner: &Owner<'_>, addresses: &[IpAddr]) -> Result<()> {
        let path = self.attachment_path(owner);
        let list: String = addresses.iter().map(|address| format!("{address}\n")).collect();
        let new = self.directory.join(NEW_LIST);
        overwrite(&new, &list).and_then(|()| fs::rename(&new, &path)).map_err(failed("write", &path))
    }

    fn last_path(&self, set: usize) -> PathBuf {
        self.directory.join(format!("last_reserved_ip.{set}"))
    }

    /// The address of a set of ranges that was given last.
    pub fn last_reserved(&self, set: usize) -> Option<IpAddr> {
        fs::read_to_string(self.last_path(set)).ok()?.trim().parse().ok()
    }

    /// Gives one address back.
    pub fn release(&self, owner: &Owner<'_>, address: IpAddr) -> Result<()> {
        if self.is_held_by(address, owner) {
            self.set_free(address)?;
        }
        let rest = self.recorded(owner)?.unwrap_or_default();
        if rest.is_empty() { self.forget(owner) } else { self.write_attachment(owner, &rest) }
    }

    fn set_free(&self, address: IpAddr) -> Result<()> {
        let path = self.address_path(address);
        absent_is_fine(fs::rename(&path, self.directory.join(NEW))).map_err(failed("remove", &path))
    }

    fn forget(&self, owner: &Owner<'_>) -> Result<()> {
        let path = self.attachment_path(owner);
        absent_is_fine(fs::rename(&path, self.directory.join(NEW_LIST))).map_err(failed("remove", &path))
    }

    /// Gives back all that `owner` has; nothing is fine too.
    pub fn release_all(&self, owner: &Owner<'_>) -> Result<()> {
        for address in self.addresses_of(owner)? {
            self.set_free(address)?;
        }
        self.forget(owner)
    }

    /// Gives back everything that no valid attachment has, files without a readable holder included.
    pub fn keep_only(&self, valid: &[ValidAttachment]) -> Result<()> {
        let owners: Vec<Owner<'_>> =
            valid.iter().map(|one| Owner { container_id: &one.container_id, ifname: &one.ifname }).collect();
        for address in self.all()? {
            if !owners.iter().any(|owner| self.is_held_by(address, owner)) {
                let path = self.address_path(address);
                absent_is_fine(fs::remove_file(&path)).map_err(failed("remove", &path))?;
            }
        }
        let attachments = self.directory.join(ATTACHMENTS);
        for entry in fs::read_dir(&attachments).map_err(failed("list", &attachments))? {
            let path = entry.map_err(failed("list", &attachments))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !owners.iter().any(|owner| owner.file_name() == name) {
                absent_is_fine(fs::remove_file(&path)).map_err(failed("remove", &path))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Owner<'_> = Owner { container_id: "a", ifname: "eth0" };
    const B: Owner<'_> = Owner { container_id: "b", ifname: "eth0" };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_has_one_holder_until_it_is_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "net").unwrap();
        assert!(store.take(&A, 0, ip("10.0.0.2")).unwrap());
        assert!(!store.take(&B, 0, ip("10.0.0.2")).unwrap());
        assert_eq!(store.addresses_of(&A).unwrap(), [ip("10.0.0.2")]);
        assert_eq!(fs::read_to_string(directory.path().join("net/10.0.0.2")).unwrap(), "a\r\neth0");
        store.release_all(&B).unwrap();
        assert!(!store.take(&B, 0, ip("10.0.0.2")).unwrap());
        store.release_all(&A).unwrap();
        assert!(store.take(&B, 0, ip("10.0.0.2")).unwrap());
        assert_eq!(store.last_reserved(0), Some(ip("10.0.0.2")));
    }

    #[test]
    fn files_are_used_again_and_hold_nothing_of_the_holder_before() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "net").unwrap();
        let long = Owner { container_id: "a-long-name-of-a-container", ifname: "eth0" };
        let mut inodes = Vec::new();
        for (owner, address) in [(&long, "10.0.0.200"), (&A, "10.0.0.3"), (&B, "10.0.0.44")] {
            assert!(store.take(owner, 0, ip(address)).unwrap());
            let path = directory.path().join("net").join(address);
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\r\neth0", owner.container_id));
            assert_eq!(store.recorded(owner).unwrap(), Some(vec![ip(address)]));
            inodes.push(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap()));
            store.release_all(owner).unwrap();
            assert_eq!(store.recorded(owner).unwrap(), None);
            assert!(store.all().unwrap().is_empty());
        }
        inodes.dedup();
        assert_eq!(inodes.len(), 1, "one file serves all");
    }

    #[test]
    fn a_crash_between_intent_and_address_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "net").unwrap();
        store.write_attachment(&A, &[ip("10.0.0.2")]).unwrap();
        fs::write(directory.path().join("net/.new"), "half").unwrap();
        assert!(store.addresses_of(&A).unwrap().is_empty());
        assert!(store.take(&B, 0, ip("10.0.0.2")).unwrap());
        store.release_all(&A).unwrap();
        assert_eq!(store.addresses_of(&B).unwrap(), [ip("10.0.0.2")]);
    }

    #[test]
    fn addresses_of_the_reference_plugin_are_found_and_released() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "net").unwrap();
        fs::write(directory.path().join("net/10.0.0.7"), "a\r\neth0").unwrap();
        assert_eq!(store.addresses_of(&A).unwrap(), [ip("10.0.0.7")]);
        store.release_all(&A).unwrap();
        assert!(store.all().unwrap().is_empty());
    }

    #[test]
    fn garbage_collection_keeps_only_valid_attachments() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "net").unwrap();
        assert!(store.take(&A, 0, ip("10.0.0.2")).unwrap() && store.take(&B, 0, ip("10.0.0.3")).unwrap());
        fs::write(directory.path().join("net/10.0.0.4"), "").unwrap();
        let valid = [ValidAttachment { container_id: "b".into(), ifname: "eth0".into() }];
        store.keep_only(&valid).unwrap();
        assert_eq!(store.all().unwrap(), [ip("10.0.0.3")]);
    }
}
