//! One image at one place: its documents, and its blobs as streams that go on where they broke off.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::StatusCode;

use super::connection::{Connection, Failure};
use super::endpoints::endpoints;
use crate::manifest::DOCUMENT_BYTES_MAX;
use crate::{Credential, ImageError, Reference, RegistryConfig};

const ANSWER_LIMIT: Duration = Duration::from_secs(90);
/// How often one transfer goes on after it broke off; the first few times even without progress.
const RESUMPTIONS_MAX: u32 = 20;
const RESUMPTIONS_FREE: u32 = 2;
const RESUMPTION_PAUSE: Duration = Duration::from_millis(300);

/// A transfer that brings less than this in such a time of waiting is no progress.
const DRIP_BYTES: u64 = 1 << 20;
const DRIP_LIMIT: Duration = Duration::from_secs(300);

const DOCUMENTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const ANYTHING: &str = "*/*";

/// A place to fetch one image from: the registry itself or what stands for it.
#[derive(Clone)]
pub(crate) struct Source {
    connection: Connection,
    repository: String,
}

/// The places to try for an image, in order.
pub(crate) fn sources(
    config: &RegistryConfig,
    reference: &Reference,
    credential: Option<&Credential>,
) -> Result<Vec<Source>, ImageError> {
    let source = |endpoint| {
        let connection = Connection::new(config, endpoint, &reference.repository)?;
        Ok(Source { connection, repository: reference.repository.clone() })
    };
    endpoints(config, reference, credential)?.into_iter().map(source).collect()
}

impl Source {
    /// The registry's host, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.connection.endpoint().name
    }

    /// Whether it may give content.
    pub(crate) fn pulls(&self) -> bool {
        self.connection.endpoint().pull
    }

    /// Whether it may say which content a tag names.
    pub(crate) fn resolves(&self) -> bool {
        self.connection.endpoint().resolve
    }

    /// A manifest or index by its digest or tag.
    pub(crate) async fn document(&self, target: &str) -> Result<Bytes, ImageError> {
        let fetch = async {
            let path = format!("{}/manifests/{target}", self.repository);
            let response = self.connection.get(&path, DOCUMENTS, None).await?;
            let bytes_max = usize::try_from(DOCUMENT_BYTES_MAX).unwrap_or(usize::MAX);
            self.connection.body(response, bytes_max).await
        };
        match tokio::time::timeout(ANSWER_LIMIT, fetch).await {
            Err(_) => Err(self.failed(Failure::Other(format!("{} did not answer in time", self.name())))),
            Ok(fetched) => fetched.map_err(|failure| self.failed(failure)),
        }
    }

    /// A blob as it comes, but for its first `from` bytes. A transfer that breaks off goes on where it was, as long as each try brings it further.
    pub(crate) async fn blob(
        &self,
        digest: &str,
        size_bytes: u64,
        from: u64,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, ImageError> {
        let stream = match from {
            // There is nothing left to ask for.
            all if all == size_bytes => futures::stream::empty().boxed(),
            from => self.rest_of_blob(digest, size_bytes, from).await?,
        };
        let transfer = Transfer {
            source: self.clone(),
            digest: digest.to_owned(),
            size_bytes,
            stream,
            arrived: from,
            arrived_before: from,
            resumptions: 0,
            pace: Pace::default(),
        };
        Ok(futures::stream::unfold(transfer, |mut transfer| async move {
            transfer.next().await.map(|item| (item, transfer))
        })
        .boxed())
    }

    async fn rest_of_blob(&self, digest: &str, size_bytes: u64, from: u64) -> Result<Blob, ImageError> {
        let path = format!("{}/blobs/{digest}", self.repository);
        let range = (from > 0).then(|| (from, size_bytes.saturating_sub(1)));
        let fetch = self.connection.get(&path, ANYTHING, range);
        let response = match tokio::time::timeout(ANSWER_LIMIT, fetch).await {
            Err(_) => Err(self.failed(Failure::Other(format!("{} did not answer in time", self.name())))),
            Ok(fetched) => fetched.map_err(|failure| self.failed(failure)),
        }?;
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        let stream = response
            .bytes_stream()
            .map(|item| item.map_err(|error| std::io::Error::other(error.without_url())))
            .boxed();
        // One that cannot do ranges sends what is there already again; it is passed over.
        Ok(if from > 0 && !partial { skip(stream, from) } else { stream })
    }

    fn failed(&self, failure: Failure) -> ImageError {
        let reference = format!("{}/{}", self.name(), self.repository);
        match failure {
            Failure::NotFound => ImageError::NotFound { reference },
            Failure::Denied(message) => ImageError::Denied { reference, message },
            Failure::Other(message) => ImageError::Registry { reference, message },
        }
    }
}

type Blob = BoxStream<'static, std::io::Result<Bytes>>;

/// One blob on its way.
struct Transfer {
    source: Source,
    digest: String,
    size_bytes: u64,
    stream: Blob,
    arrived: u64,
    arrived_before: u64,
    resumptions: u32,
    pace: Pace,
}

/// How fast a stream comes. Only the time that it was waited for counts, not what was then done with it.
#[derive(Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// The next of the stream; Err if it only drips.
    async fn next(&mut self, stream: &mut Blob) -> Result<Option<std::io::Result<Bytes>>, Dripping> {
        let since = tokio::time::Instant::now();
        let left = DRIP_LIMIT.saturating_sub(self.waited);
        let item = tokio::time::timeout(left, stream.next()).await.map_err(|_| Dripping)?;
        self.waited += since.elapsed();
        if let Some(Ok(chunk)) = &item {
            self.bytes += chunk.len() as u64;
        }
        if self.bytes >= DRIP_BYTES {
            *self = Pace::default();
        }
        Ok(item)
    }
}

/// Less than 1 MiB came in five minutes.
#[derive(Debug)]
struct Dripping;

impl Transfer {
    async fn next(&mut self) -> Option<std::io::Result<Bytes>> {
        loop {
            let mut dripped = false;
            let broken = match self.pace.next(&mut self.stream).await {
                Ok(Some(Ok(chunk))) => {
                    self.arrived += chunk.len() as u64;
                    return Some(Ok(chunk));
                }
                Ok(None) if self.arrived >= self.size_bytes => return None,
                Ok(None) => std::io::Error::from(std::io::ErrorKind::UnexpectedEof),
                Ok(Some(Err(error))) => error,
                Err(Dripping) => {
                    dripped = true;
                    std::io::Error::new(std::io::ErrorKind::TimedOut, "less than 1 MiB came in five minutes")
                }
            };
            // The first two tries are free; a later one must have brought something.
            let stuck = self.resumptions >= RESUMPTIONS_FREE && (dripped || self.arrived == self.arrived_before);
            if stuck || self.resumptions >= RESUMPTIONS_MAX || self.arrived > self.size_bytes {
                return Some(Err(broken));
            }
            tracing::debug!(digest = %self.digest, arrived = self.arrived, error = %broken, "transfer broke off and goes on");
            self.arrived_before = self.arrived;
            self.resumptions += 1;
            self.pace = Pace::default();
            tokio::time::sleep(RESUMPTION_PAUSE).await;
            match self.source.rest_of_blob(&self.digest, self.size_bytes, self.arrived).await {
                Ok(stream) => self.stream = stream,
                Err(error) => return Some(Err(std::io::Error::other(error.to_string()))),
            }
        }
    }
}

fn skip(stream: Blob, bytes: u64) -> Blob {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let rest = stream.map(move |item| {
        item.map(|mut chunk| {
            let passed = left.min(chunk.len());
            left -= passed;
            chunk.split_off(passed)
        })
    });
    rest.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of that size, one every so often, for ever.
    fn dripping(bytes: usize, every: Duration) -> Blob {
        let chunks = futures::stream::repeat(()).then(move |()| async move {
            tokio::time::sleep(every).await;
            Ok(Bytes::from(vec![0; bytes]))
        });
        chunks.boxed()
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_drips_is_broken_off_and_a_slow_reader_breaks_nothing_off() {
        let (mut pace, mut stream) = (Pace::default(), dripping(1024, Duration::from_secs(40)));
        let begin = tokio::time::Instant::now();
        while pace.next(&mut stream).await.is_ok() {
            assert!(begin.elapsed() < DRIP_LIMIT);
        }
        assert_eq!(begin.elapsed(), DRIP_LIMIT);

        let (mut pace, mut stream) = (Pace::default(), dripping(256 << 10, Duration::from_secs(40)));
        for _ in 0..100 {
            pace.next(&mut stream).await.unwrap().unwrap().unwrap();
        }
        let (mut pace, mut stream) = (Pace::default(), dripping(1024, Duration::from_secs(1)));
        for _ in 0..100 {
            pace.next(&mut stream).await.unwrap().unwrap().unwrap();
            tokio::time::sleep(DRIP_LIMIT).await;
        }
    }
}
