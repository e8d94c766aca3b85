//! Rotation of container logs by size and count. The runtime writes the files; the agent renames them and has it open a new
//! one, so that no line is lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tokio_util::sync::CancellationToken;

use crate::model::RunState;
use crate::shared::Shared;

/// Looks at the logs of running containers until `shutdown`.
pub(crate) async fn rotate(shared: Arc<Shared>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(shared.config.container_log_period) => {}
        }
        for entry in shared.table.all() {
            let running = entry.observed.containers.iter().filter(|c| c.state == RunState::Running);
            for container in running {
                let path = PathBuf::from(&container.log_path);
                let large = tokio::fs::symlink_metadata(&path)
                    .await
                    .is_ok_and(|meta| meta.is_file() && meta.len() > shared.config.container_log_max_bytes);
                if large && let Err(error) = rotate_one(&shared, &path, container.id.as_str()).await {
                    tracing::warn!(container.id = %container.id, %error, "a log could not be rotated");
                }
            }
        }
    }
}

async fn rotate_one(shared: &Shared, path: &Path, container_id: &str) -> Result<(), String> {
    let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S");
    let rotated = PathBuf::from(format!("{}.{stamp}", path.display()));
    tokio::fs::rename(path, &rotated).await.map_err(|error| error.to_string())?;
    if let Err(error) = shared.runtime.reopen_log(container_id).await {
        // The runtime may still write to the renamed file, and then gets its name back. If it has made a new one, only its
        // answer was lost.
        match give_back(&rotated, path) {
            Err(Errno::EEXIST) => tracing::debug!(container.id = container_id, %error, "a log was rotated after all"),
            _ => return Err(error.to_string()),
        }
    }
    remove_oldest(path, shared.config.container_log_max_files.saturating_sub(1)).await;
    Ok(())
}

/// Renames, but never over another file.
fn give_back(rotated: &Path, path: &Path) -> nix::Result<()> {
    renameat2(AT_FDCWD, rotated, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE)
}

/// Keeps the newest `keep` rotated parts of a log.
async fn remove_oldest(path: &Path, keep: usize) {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().map(|name| name.to_string_lossy().into_owned()))
    else {
        return;
    };
    let prefix = format!("{name}.");
    let mut parts = Vec::new();
    if let Ok(mut entries) = tokio::fs::read_dir(dir).await {
        while let Ok(Some(entry)) = entries.next_entry().await {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                parts.push(entry.path());
            }
        }
    }
    parts.sort();
    let surplus = parts.len().saturating_sub(keep);
    for old in parts.into_iter().take(surplus) {
        let _ = tokio::fs::remove_file(old).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_given_back_unless_there_is_a_new_log_already() {
        let dir = tempfile::tempdir().expect("a directory");
        let (log, rotated) = (dir.path().join("0.log"), dir.path().join("0.log.20260101-000000"));
        std::fs::write(&rotated, "old").unwrap();
        std::fs::write(&log, "new").unwrap();
        assert_eq!(give_back(&rotated, &log), Err(Errno::EEXIST));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "new");
        std::fs::remove_file(&log).unwrap();
        assert_eq!(give_back(&rotated, &log), Ok(()));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "old");
    }

    #[tokio::test]
    async fn the_oldest_parts_go_first() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("0.log");
        for name in ["0.log", "0.log.20260101-000000", "0.log.20260102-000000", "0.log.20260103-000000", "1.log"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        remove_oldest(&log, 1).await;
        let mut left: Vec<String> =
            std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name().to_string_lossy().into()).collect();
        left.sort();
        assert_eq!(left, ["0.log", "0.log.20260103-000000", "1.log"]);
    }
}
