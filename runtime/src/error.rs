//! Owns what can go wrong, and the one mapping of it to gRPC status codes.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use oarlock_cgroup::CgroupError;
use oarlock_cni::CniError;
use oarlock_images::ImageError;
use oarlock_netns::NetnsError;
use oarlock_shim_api::{ErrorKind, ShimError};
use oarlock_streaming::StreamError;
use tonic::{Code, Status};

use crate::record::RecordError;
use crate::spec::SpecError;

/// Of a message as it is sent; clients take 16 KiB of headers in all.
const MESSAGE_BYTES_MAX: usize = 8 << 10;

/// A failure of the daemon or of one call. The text leaves the cause out; [`Error::to_status`] and
/// [`Error::full_message`] give the whole chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon was configured in a way it cannot work with.
    #[error("configuration: {field}: {problem}")]
    Configuration { field: &'static str, problem: String },
    /// The socket could not be served.
    #[error("cannot serve on {}", path.display())]
    Serve { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    /// The streaming server failed.
    #[error("the streaming server on {address} failed")]
    Streaming { address: SocketAddr, source: StreamError },
    /// No such object.
    #[error("{what} {id:?} not found")]
    NotFound { what: &'static str, id: String },
    /// The start of an id fits several.
    #[error("{what} id {id:?} fits several")]
    Ambiguous { what: &'static str, id: String },
    /// The object is not in a state that allows it.
    #[error("{what} {id} is {state}: cannot {operation}")]
    State { what: &'static str, id: String, state: &'static str, operation: &'static str },
    /// The name belongs to another object.
    #[error("{what} name {name:?} is reserved for {id}")]
    NameTaken { what: &'static str, name: String, id: String },
    /// The image is not in the store.
    #[error("image {reference:?} not found: pull it first")]
    NoImage { reference: String },
    /// A request without a required field, or with a senseless one.
    #[error("{0}")]
    Invalid(String),
    /// What this runtime does not do.
    #[error("{0}")]
    Unimplemented(String),
    /// The program cannot be run.
    #[error("failed to start container {id}: {message}")]
    Program { id: String, message: String },
    /// The program of an exec cannot be run.
    #[error("failed to exec in container {id}: {message}")]
    Exec { id: String, message: String },
    /// A time limit passed.
    #[error("{operation} timed out after {limit:?}")]
    TimedOut { operation: String, limit: Duration },
    /// A step towards the outside failed.
    #[error("cannot {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    /// A background thread died.
    #[error("a worker thread of {operation} died")]
    Worker { operation: &'static str },
    /// Several steps of a teardown failed; each was tried.
    #[error("{operation}: {}", failures.join("; "))]
    Teardown { operation: String, failures: Vec<String> },
    #[error("the configuration cannot be carried out")]
    Spec(#[source] SpecErrorBox),
    #[error("cannot keep the record")]
    Record(#[source] RecordErrorBox),
    #[error("cannot set up the network of sandbox {sandbox}")]
    Network { sandbox: String, source: Box<CniError> },
    #[error("cannot {operation} the namespaces of sandbox {sandbox}")]
    Namespaces { sandbox: String, operation: &'static str, source: NetnsError },
    #[error("cannot {operation}")]
    Shim { operation: String, source: ShimError },
    #[error("cannot {operation} control group {group}")]
    Cgroup { operation: &'static str, group: String, source: CgroupError },
    #[error("cannot {operation} the systemd unit {unit}")]
    Systemd { operation: &'static str, unit: String, source: oarlock_systemd::Error },
    #[error(transparent)]
    Image(ImageError),
    /// A plugin refuses it, or what plugins want cannot be had.
    #[error(transparent)]
    Plugin(#[from] oarlock_nri::Error),
    #[error("cannot {operation}")]
    Stream { operation: &'static str, source: StreamError },
}

/// Keeps the crate's inner error types out of its public surface.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SpecErrorBox(#[from] SpecError);

/// Keeps the crate's inner error types out of its public surface.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct RecordErrorBox(#[from] RecordError);

impl From<SpecError> for Error {
    fn from(error: SpecError) -> Error {
        Error::Spec(SpecErrorBox(error))
    }
}

impl From<RecordError> for Error {
    fn from(error: RecordError) -> Error {
        Error::Record(RecordErrorBox(error))
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Error {
        Error::Image(error)
    }
}

impl Error {
    pub(crate) fn shim(operation: impl Into<String>) -> impl FnOnce(ShimError) -> Error {
        let operation = operation.into();
        move |source| Error::Shim { operation, source }
    }

    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { operation, path, source }
    }

    /// The message with all its causes, as clients see it.
    pub fn full_message(&self) -> String {
        // What the caller asked for wrongly needs no preamble.
        if let Error::Spec(inner) = self {
            return inner.0.to_string();
        }
        chain(self)
    }

    /// The status code that clients branch on.
    pub fn code(&self) -> Code {
        match self {
            Error::NotFound { .. } | Error::NoImage { .. } => Code::NotFound,
            Error::Ambiguous { .. } | Error::Invalid(_) | Error::Configuration { .. } => Code::InvalidArgument,
            Error::State { .. } => Code::FailedPrecondition,
            Error::NameTaken { .. } => Code::AlreadyExists,
            Error::Unimplemented(_) => Code::Unimplemented,
            Error::TimedOut { .. } => Code::DeadlineExceeded,
            Error::Spec(inner) => match inner.0 {
                SpecError::Invalid { .. } => Code::InvalidArgument,
                SpecError::Unsupported { .. } => Code::Unimplemented,
            },
            Error::Record(inner) => match &inner.0 {
                RecordError::Io { source, .. } => io_code(source),
                RecordError::Encode { .. } => Code::Internal,
            },
            Error::Io { source, .. } => io_code(source),
            Error::Shim { source, .. } => shim_code(source),
            Error::Image(error) => image_code(error),
            Error::Network { source, .. } if source.is_retryable() => Code::Unavailable,
            Error::Stream { source: StreamError::TooManyRequests, .. } => Code::ResourceExhausted,
            Error::Stream { source: StreamError::NotFound { .. }, .. } => Code::NotFound,
            Error::Stream { source: StreamError::Invalid { .. }, .. } => Code::InvalidArgument,
            _ => Code::Unknown,
        }
    }

    /// The gRPC form.
    pub fn to_status(&self) -> Status {
        Status::new(self.code(), sendable(self.full_message()))
    }
}

/// A message travels in a header, and a header that is too large ends the client's whole connection: what is longer than
/// it may be there, encoded, is cut.
fn sendable(mut message: String) -> String {
    // Everything but these may become `%XX` for each byte.
    let sent_bytes = |c: char| {
        let plain = c.is_ascii_alphanumeric() || "-_.,:;/()=@".contains(c);
        if plain { 1 } else { 3 * c.len_utf8() }
    };
    let mut sent = 0;
    let cut = message.char_indices().find(|(_, c)| {
        sent += sent_bytes(*c);
        sent > MESSAGE_BYTES_MAX
    });
    if let Some((at, _)) = cut {
        message.truncate(at);
        message.push('…');
    }
    message
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        error.to_status()
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn io_code(source: &io::Error) -> Code {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
        _ => Code::Unknown,
    }
}

fn shim_code(source: &ShimError) -> Code {
    match source {
        ShimError::NotRunning { .. } | ShimError::Disconnected => Code::Unavailable,
        ShimError::TimedOut { .. } => Code::DeadlineExceeded,
        _ => match source.kind() {
            Some(ErrorKind::NotFound) => Code::NotFound,
            Some(ErrorKind::AlreadyExists) => Code::AlreadyExists,
            Some(ErrorKind::InvalidState) => Code::FailedPrecondition,
            Some(ErrorKind::Invalid) => Code::InvalidArgument,
            Some(ErrorKind::TimedOut) => Code::DeadlineExceeded,
            _ => Code::Unknown,
        },
    }
}

fn image_code(error: &ImageError) -> Code {
    match error {
        ImageError::Reference { .. } => Code::InvalidArgument,
        ImageError::NotFound { .. } => Code::NotFound,
        ImageError::Denied { .. } => Code::PermissionDenied,
        ImageError::Pinned { .. } | ImageError::Configuration { .. } => Code::FailedPrecondition,
        ImageError::NotAnArchive { .. } => Code::InvalidArgument,
        ImageError::Io { source, .. } => io_code(source),
        ImageError::Shared(inner) => image_code(inner),
        ImageError::Registry { .. } => Code::Unavailable,
        _ => Code::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_honoured_and_what_makes_no_sense_differ_in_code() {
        let unsupported = Error::from(SpecError::unsupported("f", "r"));
        assert_eq!(
            (unsupported.code(), unsupported.full_message().as_str()),
            (Code::Unimplemented, "f is not supported: r")
        );
        assert_eq!(Error::from(SpecError::invalid("f", "p")).to_status().message(), "f: p");
    }

    #[test]
    fn a_status_names_the_object_and_every_cause() {
        let error = Error::Io { operation: "mount", path: "/x".into(), source: io::Error::from_raw_os_error(28) };
        assert!(error.to_status().message().starts_with("cannot mount /x: "));
        assert_eq!(error.code(), Code::ResourceExhausted);
    }

    #[test]
    fn a_message_of_any_length_fits_into_a_header() {
        for (part, shown) in [("x", 8192), ("ü", 8192 / 6)] {
            let status = Error::Invalid(part.repeat(1 << 20)).to_status();
            assert_eq!(status.message(), format!("{}…", part.repeat(shown)));
            let sent = status.into_http::<()>().headers()["grpc-message"].len();
            assert!(sent < 9000, "{sent}");
        }
        let fits = "ü".repeat(1000);
        assert_eq!(Error::Invalid(fits.clone()).to_status().message(), fits);
    }
}
