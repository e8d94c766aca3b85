//! Import (oarlock.v1.Images): loads an archive that lies on this machine.

use std::path::PathBuf;
use std::sync::Arc;

use futures::StreamExt;
use oarlock_images::Progress;
use oarlock_proto::images::{ImportProgress, ImportRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Responses;
use super::prune_images::named;
use crate::core::Core;
use crate::error::Error;

/// Messages a slow reader may be behind; further ones are left out, the last one never.
const BACKLOG_MAX: usize = 64;

pub(super) fn import_images(core: &Arc<Core>, request: ImportRequest) -> Result<Responses<ImportProgress>, Status> {
    let path = PathBuf::from(&request.path);
    if !path.is_absolute() {
        return Err(Error::Invalid(format!("path: {:?} is not absolute", request.path)).into());
    }
    let (sender, receiver) = mpsc::channel(BACKLOG_MAX);
    let core = core.clone();
    // On a task of its own: a client that goes away does not tear an import.
    tokio::spawn(async move {
        let stages = sender.clone();
        let sink = Arc::new(move |progress: Progress| {
            if let Some(stage) = stage(&progress) {
                let _ = stages.try_send(Ok(ImportProgress { stage, ..ImportProgress::default() }));
            }
        });
        let outcome = match core.images.import_with_progress(&path, Some(sink)).await {
            Ok(images) => Ok(ImportProgress {
                stage: "done".to_owned(),
                done: true,
                images: images.into_iter().map(named).collect(),
            }),
            Err(error) => Err(Status::from(Error::from(error))),
        };
        let _ = sender.send(outcome).await;
    });
    Ok(ReceiverStream::new(receiver).boxed())
}

fn stage(progress: &Progress) -> Option<String> {
    match progress {
        Progress::Layers { count, bytes } => Some(format!("{count} layers, {bytes} bytes")),
        Progress::Fetched { .. } => None,
        Progress::Unpacked { digest } => Some(format!("unpacked {digest}")),
        Progress::Stored { reference, .. } => Some(format!("stored {reference}")),
    }
}
