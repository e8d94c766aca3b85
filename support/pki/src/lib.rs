//! A small certificate authority on disk: makes, keeps and re-reads a CA, the certificates it signs, and signing keys.
//!
//! Every file is written with mode 0600, synced and renamed into place, so a crash leaves either nothing or the whole file.
//! Who gets which certificate is the caller's business.

mod authority;
mod files;
mod pin;
mod signing;

pub use authority::{Authority, Identity, PkiError, Request, Usage, ensure_signing_key};
pub use pin::{Pin, PinError};
pub use signing::Asked;
