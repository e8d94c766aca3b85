//! Container images: pulled or imported, verified, unpacked once, and given to containers as overlay layers.
//!
//! Owns: everything under the store's root directory (blobs, layers, image records, container root file systems).
//! Does not own: mounting the overlay (the caller does, from [`Rootfs`]), or the CRI's view of images.
//!
//! Entry point: [`ImageStore`].

mod error;
mod model;
mod reference;
mod store;

pub use error::ImageError;
pub use model::{Auth, Image, MirrorRule, Progress, ProgressSink, RegistryConfig, Rootfs, Usage};
pub use reference::{Reference, ReferenceError};
pub use store::ImageStore;
