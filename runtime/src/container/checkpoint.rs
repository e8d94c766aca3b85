//! Writes checkpoints of running containers: what CRIU dumps of their processes, what they changed of their image, and what
//! they were made of, in one archive as clients of other runtimes know it. The container goes on.
//!
//! The dump is the work of the OCI runtime that runs the container, which knows how the container was made; the built-in engine
//! makes none.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use oarlock_failpoint::step;
use serde_json::json;
use tokio::process::Command;

use super::running;
use crate::core::Core;
use crate::error::Error;
use crate::mounts;
use crate::record::ContainerRecord;
use crate::state::{blocking, new_id};
use crate::view;

/// For a client that names no limit: dumping the memory of a large process takes its time.
const DEFAULT_LIMIT: Duration = Duration::from_secs(300);
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// Writes the archive to `location`, whole or not at all.
pub(crate) async fn checkpoint(
    core: Arc<Core>,
    id: &str,
    location: &Path,
    limit: Option<Duration>,
) -> Result<(), Error> {
    if !location.is_absolute() {
        return Err(Error::Invalid(format!("location: {} is not an absolute path", location.display())));
    }
    let (container, sandbox) = running(&core, id, "make a checkpoint of it")?;
    let handler = sandbox.record().handler.clone();
    let Some(binary) = core.handler(&handler)? else {
        let reason = "the built-in engine makes none; a container of a runtime handler such as runc or crun has them";
        return Err(Error::Unimplemented(format!("CheckpointContainer: {reason}")));
    };
    check_criu(&core.config.criu_binary).await?;
    let record = container.record();
    let directory = core.paths.checkpoints().join(new_id());
    let dumped = async {
        make_directory(directory.clone()).await?;
        dump(&core, &binary, &record, &directory, limit.unwrap_or(DEFAULT_LIMIT)).await?;
        step("the container's processes are dumped");
        describe(&core, &record, &handler, &directory).await?;
        let (changes, key) = (directory.join("rootfs-diff.tar"), record.id.clone());
        core.images.rootfs_changes(&key, &changes).await?;
        pack(directory.clone(), location.to_owned()).await
    };
    let dumped = dumped.await;
    let cleared = blocking("clearing away", move || mounts::remove_tree(&directory)).await;
    dumped?;
    tracing::info!(container.id = %record.id, location = %location.display(), "checkpoint written");
    cleared
}

/// Whether CRIU is there and can work on this kernel, in its own words if not.
async fn check_criu(criu: &Path) -> Result<(), Error> {
    let unusable = |why: String| Error::Unimplemented(format!("CheckpointContainer: CRIU cannot be used: {why}"));
    let mut command = Command::new(criu);
    command.arg("check").stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(CHECK_LIMIT, command.output()).await {
        Err(_) => return Err(unusable(format!("its check took longer than {CHECK_LIMIT:?}"))),
        Ok(Err(error)) => return Err(unusable(format!("{}: {error}", criu.display()))),
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stderr, output.stdout].concat();
    let text = String::from_utf8_lossy(&text);
    let first =
        text.lines().find(|line| line.contains("Error")).or(text.lines().next_back()).unwrap_or("it says nothing");
    Err(unusable(first.trim().to_owned()))
}

async fn make_directory(directory: PathBuf) -> Result<(), Error> {
    blocking("a directory", move || {
        let inner = directory.join("checkpoint");
        // Memory holds secrets.
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&inner);
        made.map_err(Error::io("create", &inner))
    })
    .await
}

async fn dump(
    core: &Core,
    binary: &Path,
    record: &ContainerRecord,
    directory: &Path,
    limit: Duration,
) -> Result<(), Error> {
    let name = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut command = Command::new(binary);
    command.arg("--root").arg(core.paths.engine().join(format!(".{name}")));
    command.args(["checkpoint", "--leave-running", "--image-path"]).arg(directory.join("checkpoint"));
    command.arg("--work-path").arg(directory).arg(&record.id);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let operation = || format!("checkpoint of container {}", record.id);
    let output = tokio::time::timeout(limit, command.output());
    let output = output.await.map_err(|_| Error::TimedOut { operation: operation(), limit })?;
    let output = output.map_err(Error::io("run", binary))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("it says nothing").to_owned();
    Err(Error::Program { id: record.id.clone(), message: format!("checkpoint failed: {message}") })
}

/// What the container is, for tools that read checkpoints.
async fn describe(
    core: &Arc<Core>,
    record: &Arc<ContainerRecord>,
    handler: &str,
    directory: &Path,
) -> Result<(), Error> {
    let status = view::container_status(core, record);
    let image = status.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    let created = Timestamp::from_nanosecond(i128::from(record.created_at_nanos)).unwrap_or_default();
    let config = json!({
        "id": record.id, "name": record.metadata().name, "rootfsImage": image, "rootfsImageRef": record.image_id,
        "rootfsImageName": image, "runtime": handler, "createdTime": created.to_string(),
        "checkpointedTime": Timestamp::now().to_string(), "restoredTime": "0001-01-01T00:00:00Z", "restored": false,
    });
    let metadata = record.metadata();
    let state = json!({
        "id": status.id, "metadata": {"name": metadata.name, "attempt": metadata.attempt}, "state": status.state,
        "created_at": status.created_at, "started_at": status.started_at, "image": {"image": image},
        "image_ref": status.image_ref, "image_id": status.image_id, "labels": status.labels,
        "annotations": status.annotations, "log_path": status.log_path,
    });
    let (spec, log) = (core.paths.bundle(&record.id).config(), record.log_path.clone());
    let directory = directory.to_owned();
    blocking("a checkpoint", move || {
        for (name, document) in [("config.dump", &config), ("status.dump", &state)] {
            let path = directory.join(name);
            fs::write(&path, document.to_string()).map_err(Error::io("write", &path))?;
        }
        let copy = directory.join("spec.dump");
        fs::copy(&spec, &copy).map_err(Error::io("copy to", &copy))?;
        if let Some(log) = log.filter(|log| Path::new(log).exists()) {
            let copy = directory.join("container.log");
            fs::copy(log, &copy).map_err(Error::io("copy to", &copy))?;
        }
        Ok(())
    })
    .await
}

async fn pack(directory: PathBuf, location: PathBuf) -> Result<(), Error> {
    blocking("a checkpoint", move || {
        let mut name = location.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = location.with_file_name(name);
        let open = || fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let written = open().and_then(|file| {
            let file = oarlock_images::pack(&directory, file)?;
            file.sync_all()?;
            fs::rename(&partial, &location)
        });
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written.map_err(Error::io("write", &location))
    })
    .await
}
