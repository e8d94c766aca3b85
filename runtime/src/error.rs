//! Owns what can go wrong, and the one mapping of it to gRPC status codes.

/// A failure of the daemon or of one call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon was configured in a way it cannot work with.
    #[error("configuration: {field}: {problem}")]
    Configuration {
        /// The field of [`crate::Config`].
        field: &'static str,
        /// What is wrong with its value.
        problem: String,
    },
}
