//! Pull (oarlock.v1.Images): as PullImage, with progress for a person who waits.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use oarlock_images::Progress;
use oarlock_proto::images::{LayerProgress, PullProgress, PullRequest};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Responses;
use super::prune_images::named;
use crate::core::Core;
use crate::error::Error;

/// As often as an eye wants it.
const INTERVAL: Duration = Duration::from_millis(100);
const BACKLOG_MAX: usize = 4;

pub(super) fn pull_with_progress(core: &Arc<Core>, request: PullRequest) -> Result<Responses<PullProgress>, Status> {
    if request.image.is_empty() {
        return Err(Error::Invalid("image: is required".to_owned()).into());
    }
    let (sender, receiver) = mpsc::channel(BACKLOG_MAX);
    let core = core.clone();
    // On a task of its own: the pull goes on when the person has seen enough.
    tokio::spawn(async move {
        let layers = Arc::new(Mutex::new(Vec::new()));
        let sink = {
            let layers = layers.clone();
            Arc::new(move |progress: Progress| note(&mut layers.lock(), progress))
        };
        let pull = core.images.pull_with_progress(&request.image, None, Some(sink));
        tokio::pin!(pull);
        let mut ticks = tokio::time::interval(INTERVAL);
        let pulled = loop {
            tokio::select! {
                pulled = &mut pull => break pulled,
                _ = ticks.tick() => {
                    // A slow reader sees fewer steps.
                    let _ = sender.try_send(Ok(PullProgress { layers: layers.lock().clone(), ..PullProgress::default() }));
                }
            }
        };
        let last = match pulled {
            Ok(image) => {
                let layers = layers.lock().clone();
                Ok(PullProgress { layers, image: Some(named(image)), done: true })
            }
            Err(error) => Err(Status::from(Error::from(error))),
        };
        let _ = sender.send(last).await;
    });
    Ok(ReceiverStream::new(receiver).boxed())
}

fn note(layers: &mut Vec<LayerProgress>, progress: Progress) {
    let mut layer = |digest: String, change: &dyn Fn(&mut LayerProgress)| match layers
        .iter_mut()
        .find(|known| known.digest == digest)
    {
        Some(known) => change(known),
        None => {
            let mut new = LayerProgress { digest, ..LayerProgress::default() };
            change(&mut new);
            layers.push(new);
        }
    };
    match progress {
        Progress::Fetched { digest, bytes, of } => layer(digest, &|layer| (layer.bytes, layer.of) = (bytes, of)),
        Progress::Unpacked { digest } => layer(digest, &|layer| {
            layer.bytes = layer.of;
            layer.done = true;
        }),
        Progress::Layers { .. } | Progress::Stored { .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_keep_their_order_and_the_newest_word_counts() {
        let mut layers = Vec::new();
        let fetched = |digest: &str, bytes| Progress::Fetched { digest: digest.into(), bytes, of: 10 };
        for progress in [fetched("a", 1), fetched("b", 2), fetched("a", 7), Progress::Unpacked { digest: "b".into() }] {
            note(&mut layers, progress);
        }
        let seen: Vec<_> = layers.iter().map(|layer| (layer.digest.as_str(), layer.bytes, layer.done)).collect();
        assert_eq!(seen, [("a", 7, false), ("b", 10, true)]);
    }
}
