//! One image from a registry: manifest, configuration, then all missing layers at once.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use oci_spec::image::{ImageConfiguration, ImageManifest};
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::layers::{Layers, Pending, Wanted};
use crate::manifest::{self, DOCUMENT_BYTES_MAX, Document};
use crate::registry::Source;
use crate::unfinished::Part;
use crate::{ImageError, Progress, ProgressSink, Reference};

/// Layers on their way at the same time, for one image.
const PARALLEL: usize = 4;
const TRIES: u32 = 3;
const RETRY_PAUSE: Duration = Duration::from_millis(300);
const NESTING_MAX: usize = 3;

/// An image whose layers are on disk, not yet in place.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) id: String,
    pub(crate) config: ImageConfiguration,
    /// Of the document the reference names, which may be an index.
    pub(crate) digest: String,
    pub(crate) size_bytes: u64,
    pub(crate) chain_ids: Vec<String>,
    pub(crate) pending: Vec<Pending>,
}

/// Fetches an image from the first source that has it.
pub(crate) async fn fetch(
    sources: &[Source],
    reference: &Reference,
    layers: &Arc<Layers>,
    progress: Option<&ProgressSink>,
) -> Result<Fetched, ImageError> {
    let mut target = reference.digest.clone();
    // Some may only give content, others only say which it is.
    if target.is_none() && sources.iter().any(|source| source.pulls() != source.resolves()) {
        target = Some(resolve(sources, reference).await?);
    }
    let mut problems = Problems::default();
    for source in sources.iter().filter(|source| source.pulls()) {
        match fetch_from(source, reference, target.as_deref(), layers, progress).await {
            Ok(fetched) => return Ok(fetched),
            Err(error) => problems.note(source, reference, error),
        }
    }
    Err(problems.into_error(reference, "pull"))
}

/// The digest that a tag has now.
async fn resolve(sources: &[Source], reference: &Reference) -> Result<String, ImageError> {
    let mut problems = Problems::default();
    for source in sources.iter().filter(|source| source.resolves()) {
        match retry(|| source.document(tag(reference))).await {
            Ok(bytes) => return Ok(manifest::digest(&bytes)),
            Err(error) => problems.note(source, reference, error),
        }
    }
    Err(problems.into_error(reference, "resolve"))
}

fn tag(reference: &Reference) -> &str {
    reference.tag.as_deref().unwrap_or("latest")
}

/// What went wrong at the places that were tried.
#[derive(Default)]
struct Problems {
    last: Option<ImageError>,
    /// Of the places that could not be used at all, the last one's left out.
    earlier: Vec<String>,
}

impl Problems {
    fn note(&mut self, source: &Source, reference: &Reference, error: ImageError) {
        tracing::info!(image = %reference, registry = source.name(), %error, "image source failed");
        if let Some(ImageError::Registry { message, .. }) = self.last.take() {
            self.earlier.push(message);
        }
        self.last = Some(named(error, reference));
    }

    /// The last place is the registry itself: its word counts. If it failed too, what the others said is told as well.
    fn into_error(self, reference: &Reference, capability: &str) -> ImageError {
        match self.last {
            None => {
                let message = format!("no configured host has the capability {capability}");
                ImageError::Registry { reference: reference.to_string(), message }
            }
            Some(ImageError::Registry { reference, message }) => {
                let all: Vec<String> = self.earlier.into_iter().chain([message]).collect();
                ImageError::Registry { reference, message: all.join("; ") }
            }
            Some(other) => other,
        }
    }
}

/// Errors name the image as the user did, not the mirror's name for it.
fn named(error: ImageError, reference: &Reference) -> ImageError {
    let reference = reference.to_string();
    match error {
        ImageError::NotFound { .. } => ImageError::NotFound { reference },
        ImageError::Denied { message, .. } => ImageError::Denied { reference, message },
        ImageError::Registry { message, .. } => ImageError::Registry { reference, message },
        other => other,
    }
}

async fn fetch_from(
    source: &Source,
    reference: &Reference,
    target: Option<&str>,
    layers: &Arc<Layers>,
    progress: Option<&ProgressSink>,
) -> Result<Fetched, ImageError> {
    let (image, digest) = manifest_of(source, reference, target).await?;
    let id = manifest::check(image.config().digest().as_ref())?;
    let config_bytes = retry(|| small_blob(source, &id, image.config().size())).await?;
    manifest::verify(&config_bytes, &id)?;
    let config = manifest::config(&config_bytes)?;
    let wanted = manifest::layers(&image, &config)?;
    let size_bytes = total(wanted.iter().map(|layer| layer.size_bytes).chain([config_bytes.len() as u64]))?;
    let chain_ids: Vec<String> = wanted.iter().map(|layer| layer.chain_id.clone()).collect();
    let mut seen = BTreeSet::new();
    let missing: Vec<Wanted> = wanted
        .into_iter()
        .filter(|layer| !layers.has(&layer.chain_id) && seen.insert(layer.chain_id.clone()))
        .collect();
    tell(
        progress,
        Progress::Layers { count: missing.len(), bytes: total(missing.iter().map(|layer| layer.size_bytes))? },
    );
    let pending = parking_lot::Mutex::new(Vec::new());
    let fetched = futures::stream::iter(missing)
        .map(|layer| async move { retry(|| one_layer(source, &layer, layers, progress)).await })
        .buffer_unordered(PARALLEL)
        .try_for_each(|layer| {
            pending.lock().push(layer);
            std::future::ready(Ok(()))
        })
        .await;
    let pending = pending.into_inner();
    match fetched {
        Ok(()) => Ok(Fetched { id, config, digest, size_bytes, chain_ids, pending }),
        Err(error) => {
            // Of an image that cannot be had nothing stays; of one that may be had later, what is whole.
            if matches!(error, ImageError::Registry { .. }) {
                pending.into_iter().for_each(Pending::keep);
            }
            Err(error)
        }
    }
}

/// The manifest says the sizes, and may say anything.
fn total(mut sizes: impl Iterator<Item = u64>) -> Result<u64, ImageError> {
    let total = sizes.try_fold(0_u64, u64::checked_add);
    total.ok_or(ImageError::LimitExceeded { what: "size of all layers" })
}

/// The manifest for this machine, and the digest of the document the reference names.
async fn manifest_of(
    source: &Source,
    reference: &Reference,
    target: Option<&str>,
) -> Result<(ImageManifest, String), ImageError> {
    let bytes = retry(|| source.document(target.unwrap_or_else(|| tag(reference)))).await?;
    let digest = manifest::digest(&bytes);
    if let Some(expected) = target {
        manifest::verify(&bytes, expected)?;
    }
    let mut document = manifest::parse(&bytes)?;
    for _ in 0..NESTING_MAX {
        let index = match document {
            Document::Image(image) => return Ok((*image, digest)),
            Document::Choice(index) => index,
        };
        let chosen = manifest::check(manifest::choose(&index, &reference.to_string())?.digest().as_ref())?;
        let bytes = retry(|| source.document(&chosen)).await?;
        manifest::verify(&bytes, &chosen)?;
        document = manifest::parse(&bytes)?;
    }
    Err(ImageError::Damaged { what: "indexes are nested too deep".into() })
}

async fn small_blob(source: &Source, digest: &str, size: u64) -> Result<Vec<u8>, ImageError> {
    let mut stream = source.blob(digest, size, 0).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk.map_err(|error| interrupted(digest, &error))?);
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(ImageError::LimitExceeded { what: "size of the configuration" });
        }
    }
    Ok(bytes)
}

fn interrupted(digest: &str, error: &io::Error) -> ImageError {
    ImageError::Registry { reference: digest.to_owned(), message: format!("the transfer broke off: {error}") }
}

async fn one_layer(
    source: &Source,
    layer: &Wanted,
    layers: &Arc<Layers>,
    progress: Option<&ProgressSink>,
) -> Result<Pending, ImageError> {
    let digest = layer.digest.clone().unwrap_or_default();
    if let Some(left) = layers.left(&layer.chain_id) {
        tell(progress, Progress::Unpacked { digest });
        return Ok(left);
    }
    let part = layers.unfinished().part(&digest, layer.size_bytes);
    let resumed = part.as_ref().is_some_and(|part| part.arrived() > 0);
    let fetched = blob_into_layer(source, layer, layers, part, progress).await;
    let pending = match fetched {
        // What was on disk may not be what came once: it is gone now, and the blob is fetched as a whole.
        Err(error) if resumed && !matches!(error, ImageError::Registry { .. } | ImageError::Cancelled) => {
            tracing::debug!(digest, %error, "what had come of a blob is not used");
            blob_into_layer(source, layer, layers, None, progress).await?
        }
        other => other?,
    };
    tell(progress, Progress::Unpacked { digest });
    Ok(pending)
}

/// Unpacks a blob while it comes. What came of it is kept if the transfer breaks off, whoever breaks it.
async fn blob_into_layer(
    source: &Source,
    layer: &Wanted,
    layers: &Arc<Layers>,
    part: Option<Part>,
    progress: Option<&ProgressSink>,
) -> Result<Pending, ImageError> {
    let digest = layer.digest.clone().unwrap_or_default();
    let arrived = part.as_ref().map_or(0, Part::arrived);
    let stream = match source.blob(&digest, layer.size_bytes, arrived).await {
        Ok(stream) => stream,
        Err(error) => {
            part.into_iter().for_each(Part::keep);
            return Err(error);
        }
    };
    let broken = Arc::new(parking_lot::Mutex::new(None));
    let watched = watched(stream, digest.clone(), (arrived, layer.size_bytes), progress.cloned(), broken.clone());
    let (layers, wanted) = (layers.clone(), layer.clone());
    let cause = broken.clone();
    let unpacked = tokio::task::spawn_blocking(move || {
        let rest = SyncIoBridge::new(Box::pin(StreamReader::new(watched)));
        let Some(mut part) = part else { return layers.unpack(&wanted, rest) };
        let whole = part.read(rest).map_err(|error| interrupted(wanted.digest.as_deref().unwrap_or(""), &error))?;
        let unpacked = layers.unpack(&wanted, whole);
        if unpacked.is_err() && cause.lock().is_some() {
            part.keep();
        }
        unpacked
    });
    // A broken transfer looks like a damaged archive from inside: tell the true cause, which is worth a retry.
    let told = |error| broken.lock().take().map_or(error, |error| interrupted(&digest, &error));
    unpacked.await.map_err(|_| ImageError::Cancelled)?.map_err(told)
}

/// Counts what passes and remembers how it ended. More bytes than announced end the stream.
fn watched(
    stream: BoxStream<'static, io::Result<Bytes>>,
    digest: String,
    (mut bytes, of): (u64, u64),
    progress: Option<ProgressSink>,
    broken: Arc<parking_lot::Mutex<Option<io::Error>>>,
) -> BoxStream<'static, io::Result<Bytes>> {
    let watched = stream.map(move |item| match item {
        Ok(chunk) => {
            bytes += chunk.len() as u64;
            if bytes > of {
                return Err(io::Error::other("more bytes than announced"));
            }
            tell(progress.as_ref(), Progress::Fetched { digest: digest.clone(), bytes, of });
            Ok(chunk)
        }
        Err(error) => {
            *broken.lock() = Some(io::Error::new(error.kind(), error.to_string()));
            Err(error)
        }
    });
    watched.boxed()
}

async fn retry<T, F: Future<Output = Result<T, ImageError>>>(mut attempt: impl FnMut() -> F) -> Result<T, ImageError> {
    let mut tries = 1;
    loop {
        match attempt().await {
            Err(error) if tries < TRIES && matches!(error, ImageError::Registry { .. }) => {
                tokio::time::sleep(RETRY_PAUSE * tries).await;
                tries += 1;
            }
            other => return other,
        }
    }
}

pub(crate) fn tell(progress: Option<&ProgressSink>, event: Progress) {
    if let Some(progress) = progress {
        progress(event);
    }
}
