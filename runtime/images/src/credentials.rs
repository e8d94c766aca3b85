//! Credentials for registries from a file in the form that docker, podman and the kubelet share: `auths` by registry, or by
//! registry and the beginning of a repository's name. Read at each pull, so that a new file is used at once.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::{Auth, ImageError};

/// No real one comes near.
const FILE_BYTES_MAX: usize = 1 << 20;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    registrytoken: String,
    identitytoken: String,
}

/// The credentials for a repository of a registry: those under the longest name that fits. A file that does not exist has
/// none.
pub(crate) fn find(file: &Path, registry: &str, repository: &str) -> Result<Option<Auth>, ImageError> {
    let bytes = match std::fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(ImageError::io("read", file))?,
    };
    let damaged = |problem: &str| ImageError::Damaged { what: format!("{}: {problem}", file.display()) };
    if bytes.len() > FILE_BYTES_MAX {
        return Err(damaged("larger than any file of credentials"));
    }
    // What the file holds stays out of the message.
    let parsed: File = serde_json::from_slice(&bytes)
        .map_err(|error| damaged(&format!("no file of credentials (line {})", error.line())))?;
    let whole = format!("{registry}/{repository}");
    let fitting = parsed.auths.into_iter().filter(|(key, _)| fits(&plain(key), registry, &whole));
    let Some((key, entry)) = fitting.max_by_key(|(key, _)| plain(key).len()) else { return Ok(None) };
    auth(entry).ok_or_else(|| damaged(&format!("the entry of {key} cannot be read")))
}

/// A key without what older tools put around the registry's name.
fn plain(key: &str) -> String {
    let bare = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let bare = bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare);
    match bare {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

fn fits(key: &str, registry: &str, whole: &str) -> bool {
    key == registry || whole == key || whole.strip_prefix(key).is_some_and(|rest| rest.starts_with('/'))
}

/// None when it is no credential; `Some(None)` when it is empty, which docker writes for credentials kept elsewhere.
fn auth(entry: Entry) -> Option<Option<Auth>> {
    if !entry.registrytoken.is_empty() {
        return Some(Some(Auth::Bearer(entry.registrytoken)));
    }
    if !entry.identitytoken.is_empty() {
        return Some(Some(Auth::Identity(entry.identitytoken)));
    }
    if !entry.username.is_empty() {
        return Some(Some(Auth::Basic { username: entry.username, password: entry.password }));
    }
    if entry.auth.is_empty() {
        return Some(None);
    }
    let text = String::from_utf8(STANDARD.decode(entry.auth.trim()).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Some(Auth::Basic { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_fitting_name_has_the_credentials() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        assert!(find(&path, "r.example", "a/b").unwrap().is_none());
        let content = r#"{"credsStore": "other", "auths": {
            "r.example": {"auth": "dTpw"},
            "r.example/team": {"username": "team", "password": "t"},
            "r.example:5000": {"registrytoken": "token"},
            "https://index.docker.io/v1/": {"username": "hub", "password": "h"},
            "person.example": {"auth": "PHRva2VuPjo=", "identitytoken": "refresh"},
            "empty.example": {},
            "broken.example": {"auth": "!"}}}"#;
        std::fs::write(&path, content).unwrap();
        let user = |registry: &str, repository: &str| match find(&path, registry, repository) {
            Ok(Some(Auth::Basic { username, .. })) => username,
            Ok(Some(Auth::Bearer(token) | Auth::Identity(token))) => token,
            Ok(None) => "none".to_owned(),
            Err(error) => error.to_string(),
        };
        assert_eq!(user("r.example", "a/b"), "u");
        assert_eq!(user("r.example", "team/app"), "team");
        assert_eq!(user("r.example", "teams/app"), "u");
        assert_eq!(user("r.example:5000", "a"), "token");
        assert_eq!(user("docker.io", "library/a"), "hub");
        assert_eq!(user("person.example", "a"), "refresh");
        assert_eq!(user("empty.example", "a"), "none");
        assert_eq!(user("other.example", "a"), "none");
        assert!(user("broken.example", "a").contains("broken.example"));
        std::fs::write(&path, "{\"auths\": \"secret\"").unwrap();
        let error = find(&path, "r.example", "a").unwrap_err().to_string();
        assert!(error.contains("config.json") && !error.contains("secret"), "{error}");
    }
}
