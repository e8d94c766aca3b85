//! Images from a file or directory: an OCI image layout, or what `docker save` writes; tar, plain or compressed.
//!
//! A tar is first unpacked as plain files into scratch space, then read like a directory; every path in it is resolved
//! within that directory. All of it blocks.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};
use serde::Deserialize;

use crate::fetch::{Fetched, tell};
use crate::files::Scratch;
use crate::layers::{Layers, Pending, Wanted, chain_ids};
use crate::manifest::{self, DOCUMENT_BYTES_MAX, Document};
use crate::unpack::{self, Content, Limits, Tree};
use crate::{ImageError, Progress, ProgressSink, Reference};

const IMAGES_MAX: usize = 256;
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// An image of an archive with the names it has there.
#[derive(Debug)]
pub(crate) struct Imported {
    pub(crate) fetched: Fetched,
    pub(crate) names: Vec<Reference>,
    /// Whether the digest is that of a manifest which registries would serve.
    pub(crate) has_manifest: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: PathBuf,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<PathBuf>,
}

/// Reads every image for this machine.
pub(crate) fn import(
    archive: &Path,
    scratch: &Path,
    layers: &Layers,
    progress: Option<&ProgressSink>,
) -> Result<Vec<Imported>, ImageError> {
    let not_archive = |what: &str| ImageError::NotAnArchive { path: archive.into(), what: what.to_owned() };
    let unpacked;
    let directory = if fs::metadata(archive).map_err(ImageError::io("open", archive))?.is_dir() {
        archive
    } else {
        unpacked = Scratch::new(scratch)?;
        let file = File::open(archive).map_err(ImageError::io("open", archive))?;
        unpack::unpack(file, unpacked.path(), Content::Blobs, Limits::default()).map_err(|error| match error {
            ImageError::Damaged { what } => not_archive(&what),
            other => other,
        })?;
        unpacked.path()
    };
    let reader = Reader { tree: Tree::open(directory)?, layers, progress };
    // Newer docker writes both: the layout says more.
    let images = if directory.join("index.json").exists() {
        reader.layout()?
    } else if directory.join("manifest.json").exists() {
        reader.docker()?
    } else {
        return Err(not_archive("it has neither index.json nor manifest.json"));
    };
    if images.is_empty() {
        return Err(not_archive("it holds no image"));
    }
    Ok(images)
}

struct Reader<'a> {
    tree: Tree,
    layers: &'a Layers,
    progress: Option<&'a ProgressSink>,
}

impl Reader<'_> {
    fn document(&self, path: &Path) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let file = self.tree.read(path)?;
        file.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(ImageError::io("read", path))?;
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(ImageError::LimitExceeded { what: "size of a document" });
        }
        Ok(bytes)
    }

    fn blob(&self, digest: &str) -> Result<Vec<u8>, ImageError> {
        let bytes = self.document(&blob_path(digest)?)?;
        manifest::verify(&bytes, digest)?;
        Ok(bytes)
    }

    fn layout(&self) -> Result<Vec<Imported>, ImageError> {
        let bytes = self.document(Path::new("index.json"))?;
        let index: ImageIndex = serde_json::from_slice(&bytes)
            .map_err(|error| ImageError::Damaged { what: format!("index.json: {error}") })?;
        if index.manifests().len() > IMAGES_MAX {
            return Err(ImageError::LimitExceeded { what: "number of images" });
        }
        let mut images: Vec<Imported> = Vec::new();
        for descriptor in index.manifests() {
            let names = names(descriptor)?;
            let digest = manifest::check(descriptor.digest().as_ref())?;
            // The same image under several names is listed several times.
            if let Some(known) = images.iter_mut().find(|known| known.fetched.digest == digest) {
                known.names.extend(names);
                continue;
            }
            let fetched = self.image(&digest)?;
            images.push(Imported { fetched, names, has_manifest: true });
        }
        Ok(images)
    }

    fn image(&self, digest: &str) -> Result<Fetched, ImageError> {
        let mut document = manifest::parse(&self.blob(digest)?)?;
        if let Document::Choice(index) = &document {
            let chosen = manifest::check(manifest::choose(index, digest)?.digest().as_ref())?;
            document = manifest::parse(&self.blob(&chosen)?)?;
        }
        let Document::Image(image) = document else {
            return Err(ImageError::Damaged { what: "indexes are nested too deep".into() });
        };
        let id = manifest::check(image.config().digest().as_ref())?;
        let config_bytes = self.blob(&id)?;
        let config = manifest::config(&config_bytes)?;
        let wanted = manifest::layers(&image, &config)?;
        let size_bytes = wanted.iter().map(|layer| layer.size_bytes).sum::<u64>() + config_bytes.len() as u64;
        let sources = wanted.into_iter().map(|layer| {
            let path = blob_path(layer.digest.as_deref().unwrap_or_default())?;
            Ok((layer, path))
        });
        let (chain_ids, pending) = self.unpack(sources.collect::<Result<_, ImageError>>()?)?;
        Ok(Fetched { id, config, digest: digest.to_owned(), size_bytes, chain_ids, pending })
    }

    fn docker(&self) -> Result<Vec<Imported>, ImageError> {
        let bytes = self.document(Path::new("manifest.json"))?;
        let entries: Vec<DockerEntry> = serde_json::from_slice(&bytes)
            .map_err(|error| ImageError::Damaged { what: format!("manifest.json: {error}") })?;
        if entries.len() > IMAGES_MAX {
            return Err(ImageError::LimitExceeded { what: "number of images" });
        }
        entries.into_iter().map(|entry| self.docker_image(entry)).collect()
    }

    fn docker_image(&self, entry: DockerEntry) -> Result<Imported, ImageError> {
        let config_bytes = self.document(&entry.config)?;
        let id = manifest::digest(&config_bytes);
        let config = manifest::config(&config_bytes)?;
        let diff_ids: Vec<String> = config.rootfs().diff_ids().to_vec();
        if diff_ids.len() != entry.layers.len() || diff_ids.is_empty() {
            let what = format!("{} layers, {} of them in the configuration", entry.layers.len(), diff_ids.len());
            return Err(ImageError::Damaged { what });
        }
        let chain = chain_ids(&diff_ids);
        let mut size_bytes = config_bytes.len() as u64;
        let mut sources = Vec::new();
        for ((path, diff_id), chain_id) in entry.layers.into_iter().zip(diff_ids).zip(chain) {
            manifest::check(&diff_id)?;
            let size = self.tree.read(&path)?.metadata().map_err(ImageError::io("look at", &path))?.len();
            size_bytes += size;
            sources.push((Wanted { digest: None, size_bytes: size, diff_id, chain_id }, path));
        }
        let (chain_ids, pending) = self.unpack(sources)?;
        let names = entry.repo_tags.unwrap_or_default();
        let names = names.iter().map(|name| parse(name)).collect::<Result<_, _>>()?;
        let fetched = Fetched { digest: id.clone(), id, config, size_bytes, chain_ids, pending };
        Ok(Imported { fetched, names, has_manifest: false })
    }

    /// Unpacks what is not there yet, several layers at once.
    fn unpack(&self, sources: Vec<(Wanted, PathBuf)>) -> Result<(Vec<String>, Vec<Pending>), ImageError> {
        let chain_ids: Vec<String> = sources.iter().map(|(layer, _)| layer.chain_id.clone()).collect();
        let mut seen = BTreeSet::new();
        let missing: Vec<_> = sources
            .into_iter()
            .filter(|(layer, _)| !self.layers.has(&layer.chain_id) && seen.insert(layer.chain_id.clone()))
            .collect();
        let bytes = missing.iter().map(|(layer, _)| layer.size_bytes).sum();
        tell(self.progress, Progress::Layers { count: missing.len(), bytes });
        let mut pending = Vec::new();
        for group in missing.chunks(4) {
            let done: Vec<Result<_, ImageError>> = std::thread::scope(|scope| {
                let unpack = |(layer, path): &(Wanted, PathBuf)| {
                    let done = self.layers.unpack(layer, self.tree.read(path)?)?;
                    tell(self.progress, Progress::Unpacked { digest: layer.diff_id.clone() });
                    Ok(done)
                };
                let workers: Vec<_> = group.iter().map(|source| scope.spawn(move || unpack(source))).collect();
                workers.into_iter().map(|worker| worker.join().unwrap_or(Err(ImageError::Cancelled))).collect()
            });
            for layer in done {
                pending.push(layer?);
            }
        }
        Ok((chain_ids, pending))
    }
}

fn blob_path(digest: &str) -> Result<PathBuf, ImageError> {
    let digest = manifest::check(digest)?;
    Ok(Path::new("blobs/sha256").join(digest.trim_start_matches("sha256:")))
}

/// The references an index entry carries. A bare tag names nothing outside its layout.
fn names(descriptor: &Descriptor) -> Result<Vec<Reference>, ImageError> {
    let annotations = descriptor.annotations().as_ref();
    let named = NAME_ANNOTATIONS.iter().find_map(|key| annotations?.get(*key).filter(|name| name.contains(['/', ':'])));
    named.map(|name| parse(name)).transpose().map(|name| name.into_iter().collect())
}

fn parse(name: &str) -> Result<Reference, ImageError> {
    Reference::parse(name).map_err(|source| ImageError::Reference { reference: name.to_owned(), source })
}
