//! Reading manifests, indexes and configurations: which blobs an image is made of. Pure.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use sha2::{Digest, Sha256};

use crate::layers::{Wanted, chain_ids};
use crate::unpack::digest_of;
use crate::{ImageError, reference};

/// Manifests, indexes and configurations larger than this are refused.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 8 << 20;
const LAYERS_MAX: usize = 512;

/// A document that is either one image or a choice of several.
#[derive(Debug)]
pub(crate) enum Document {
    Image(Box<ImageManifest>),
    Choice(Box<ImageIndex>),
}

/// What kind of document the bytes are, by what they hold rather than by what they are said to be.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document, ImageError> {
    let damaged = |error: serde_json::Error| ImageError::Damaged { what: format!("manifest: {error}") };
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(damaged)?;
    // A document that could be read both ways would be two images under one digest.
    match (value.get("layers").is_some(), value.get("manifests").is_some()) {
        (true, false) => Ok(Document::Image(serde_json::from_value(value).map_err(damaged)?)),
        (false, true) => Ok(Document::Choice(serde_json::from_value(value).map_err(damaged)?)),
        _ => Err(ImageError::Damaged { what: "neither an image manifest nor an index".into() }),
    }
}

/// The entry of an index for this machine.
pub(crate) fn choose<'a>(index: &'a ImageIndex, reference: &str) -> Result<&'a Descriptor, ImageError> {
    let architecture = architecture();
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().is_some_and(|platform| {
            platform.os().to_string() == "linux" && platform.architecture().to_string() == architecture
        })
    };
    let without = |descriptor: &&Descriptor| descriptor.platform().is_none();
    let found = index.manifests().iter().find(fits).or_else(|| index.manifests().iter().find(without));
    found.ok_or_else(|| ImageError::NoPlatform {
        reference: reference.to_owned(),
        platform: format!("linux/{architecture}"),
    })
}

/// This machine's architecture as images name it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The layers to have, from the manifest's blobs and the configuration's diff ids, which must pair.
pub(crate) fn layers(manifest: &ImageManifest, config: &ImageConfiguration) -> Result<Vec<Wanted>, ImageError> {
    let diff_ids: Vec<String> = config.rootfs().diff_ids().to_vec();
    let blobs = manifest.layers();
    if blobs.len() != diff_ids.len() || blobs.is_empty() {
        let what = format!("{} layers, {} of them in the configuration", blobs.len(), diff_ids.len());
        return Err(ImageError::Damaged { what });
    }
    if blobs.len() > LAYERS_MAX {
        return Err(ImageError::LimitExceeded { what: "number of layers" });
    }
    let chain = chain_ids(&diff_ids);
    let pairs = blobs.iter().zip(diff_ids).zip(chain);
    pairs
        .map(|((blob, diff_id), chain_id)| {
            check(&diff_id)?;
            let digest = check(blob.digest().as_ref())?;
            Ok(Wanted { digest: Some(digest), size_bytes: blob.size(), diff_id, chain_id })
        })
        .collect()
}

/// A digest of the one supported form; digests become file names.
pub(crate) fn check(digest: &str) -> Result<String, ImageError> {
    reference::check_digest(digest).map_err(|_| ImageError::Damaged { what: format!("unsupported digest {digest:?}") })
}

/// The digest of bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(bytes);
    digest_of(hash)
}

/// Refuses bytes that are not what was asked for.
pub(crate) fn verify(bytes: &[u8], expected: &str) -> Result<(), ImageError> {
    let actual = digest(bytes);
    if actual == expected { Ok(()) } else { Err(ImageError::DigestMismatch { expected: expected.to_owned(), actual }) }
}

/// Reads a configuration.
pub(crate) fn config(bytes: &[u8]) -> Result<ImageConfiguration, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::Damaged { what: format!("configuration: {error}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_that_is_both_or_neither_is_refused() {
        assert!(parse(b"{}").is_err());
        assert!(parse(br#"{"layers": [], "manifests": []}"#).is_err());
        assert!(parse(b"not json").is_err());
    }

    #[test]
    fn the_entry_of_this_machine_is_chosen() {
        let digest = |digit: &str| format!("sha256:{}", digit.repeat(64));
        let entry = |digit, arch| {
            serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(digit), "size": 1,
                "platform": {"os": "linux", "architecture": arch}})
        };
        let index = |entries: Vec<serde_json::Value>| {
            let json = serde_json::json!({"schemaVersion": 2, "manifests": entries});
            serde_json::from_value::<ImageIndex>(json).unwrap()
        };
        let both = index(vec![entry("a", "s390x"), entry("b", architecture())]);
        assert_eq!(choose(&both, "x").unwrap().digest().to_string(), digest("b"));
        let none = index(vec![entry("a", "s390x")]);
        assert!(matches!(choose(&none, "x"), Err(ImageError::NoPlatform { .. })));
    }
}
