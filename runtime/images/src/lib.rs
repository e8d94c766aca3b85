//! Container images: pulled or imported, verified, unpacked once, and given to containers as overlay layers.
//!
//! Owns: everything under the store's root directory (blobs, layers, image records, container root file systems).
//! Does not own: mounting the overlay (the caller does, from [`Rootfs`]), or the CRI's view of images.
//!
//! Entry point: [`ImageStore`].

//!
//! ```text
//! <root>/images/<id>.json        one record an image, written when all its layers are in place
//! <root>/layers/<chain id>/fs    unpacked layers, whole or absent
//! <root>/containers/<key>/       one container's upper and work directory, and which layers it stands on
//! <root>/scratch/                unfinished work, cleared at start
//! <root>/unfinished/<boot id>/   what a pull that was cut off leaves for the next one
//! ```
//!
//! Layer blobs are not kept: a layer is verified and unpacked while it arrives, and nothing reads the blob again, unless the
//! transfer is cut off: then the next pull goes on from the bytes that came.

mod archive;
mod changes;
mod collect;
mod credentials;
mod error;
mod fetch;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod layers;
mod manifest;
mod model;
mod record;
mod reference;
mod registry;
mod rootfs;
mod store;
mod unfinished;
mod unpack;

pub use collect::{Pruned, Thresholds};
pub use error::ImageError;
pub use model::{Auth, Credential, Image, MirrorRule, Progress, ProgressSink, RegistryConfig, Rootfs, Usage};
pub use reference::{Reference, ReferenceError};
pub use store::ImageStore;

/// Packs a directory as a tar, as it is on disk. Blocks.
pub fn pack<W: std::io::Write>(directory: &std::path::Path, out: W) -> std::io::Result<W> {
    changes::write(directory, out)
}
