//! hostPath: checks (and for the …OrCreate types, makes) what the manifest says lies on the host.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::HostPathVolumeSource;

use crate::error::VolumeError;

/// The path, when it is absolute and does not climb.
pub(crate) fn path(source: &HostPathVolumeSource) -> Result<PathBuf, VolumeError> {
    let path = Path::new(&source.path);
    let climbs = path.components().any(|part| part == Component::ParentDir);
    if !path.is_absolute() || climbs || source.path.contains('\0') {
        return Err(VolumeError::Invalid {
            message: format!("hostPath {:?} must be absolute and must not contain '..'", source.path),
        });
    }
    Ok(path.to_path_buf())
}

/// Checks the type. An empty type checks nothing.
pub(crate) fn check(source: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = path(source)?;
    let wrong = |wanted| VolumeError::HostPathType { path: source.path.clone(), wanted };
    let kind = match fs::metadata(&path) {
        Ok(metadata) => Some(metadata.file_type()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => None,
        Err(error) => return Err(VolumeError::io("look at", &path, error)),
    };
    let require = |holds: bool, wanted| if holds { Ok(()) } else { Err(wrong(wanted)) };
    match (source.type_.as_deref().unwrap_or_default(), kind) {
        ("", _) => Ok(()),
        ("DirectoryOrCreate", None) => make_directory(&path),
        ("DirectoryOrCreate", Some(kind)) => require(kind.is_dir(), "directory"),
        ("Directory", kind) => require(kind.is_some_and(|kind| kind.is_dir()), "directory"),
        ("FileOrCreate", None) => make_file(&path),
        ("FileOrCreate", Some(kind)) => require(!kind.is_dir(), "file"),
        ("File", kind) => require(kind.is_some_and(|kind| !kind.is_dir()), "file"),
        ("Socket", kind) => require(kind.is_some_and(|kind| kind.is_socket()), "socket file"),
        ("CharDevice", kind) => require(kind.is_some_and(|kind| kind.is_char_device()), "character device"),
        ("BlockDevice", kind) => require(kind.is_some_and(|kind| kind.is_block_device()), "block device"),
        (other, _) => Err(VolumeError::Invalid { message: format!("unknown hostPath type {other:?}") }),
    }
}

fn make_directory(path: &Path) -> Result<(), VolumeError> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(|e| VolumeError::io("create", path, e))
}

/// The parent directory must be there, as upstream has it.
fn make_file(path: &Path) -> Result<(), VolumeError> {
    match fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(VolumeError::io("create", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &Path, kind: &str) -> HostPathVolumeSource {
        HostPathVolumeSource { path: path.to_str().unwrap().into(), type_: Some(kind.into()) }
    }

    #[test]
    fn every_type_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let null = PathBuf::from("/dev/null");
        let absent = dir.path().join("absent");
        let cases = [
            ("Directory", dir.path(), true),
            ("Directory", file.as_path(), false),
            ("Directory", absent.as_path(), false),
            ("File", file.as_path(), true),
            ("File", dir.path(), false),
            ("Socket", socket.as_path(), true),
            ("Socket", file.as_path(), false),
            ("CharDevice", null.as_path(), true),
            ("CharDevice", file.as_path(), false),
            ("BlockDevice", null.as_path(), false),
            ("", absent.as_path(), true),
            ("DirectoryOrCreate", file.as_path(), false),
            ("FileOrCreate", dir.path(), false),
            ("Nonsense", dir.path(), false),
        ];
        for (kind, path, good) in cases {
            assert_eq!(check(&source(path, kind)).is_ok(), good, "{kind} {}", path.display());
        }
        let error = check(&source(&file, "Directory")).unwrap_err().to_string();
        assert_eq!(error, format!("hostPath type check failed: {} is not a directory", file.display()));
    }

    #[test]
    fn or_create_makes_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        check(&source(&dir.path().join("a/b"), "DirectoryOrCreate")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
        check(&source(&dir.path().join("a/f"), "FileOrCreate")).unwrap();
        assert!(dir.path().join("a/f").is_file());
        assert!(check(&source(&dir.path().join("none/f"), "FileOrCreate")).is_err());
    }

    #[test]
    fn climbing_paths_are_refused() {
        for path in ["relative", "/a/../etc", ""] {
            let source = HostPathVolumeSource { path: path.into(), type_: None };
            assert!(check(&source).is_err(), "{path:?}");
        }
    }
}
