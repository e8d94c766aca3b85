//! What can go wrong with the table and its records.

use std::io;
use std::path::PathBuf;

use oarlock_nft::NftError;

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("cannot {operation} {}", path.display())]
    File { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {operation} of the CNI plugins")]
    Nft { operation: &'static str, source: NftError },
    /// Somebody else has what was to be added.
    #[error("another attachment has an element of {set} already")]
    Taken { set: &'static str },
    #[error("the table of the CNI plugins was deleted again as soon as it was there")]
    Vanished,
}

impl TableError {
    pub(crate) fn nft(operation: &'static str) -> impl Fn(NftError) -> TableError {
        move |source| TableError::Nft { operation, source }
    }
}
