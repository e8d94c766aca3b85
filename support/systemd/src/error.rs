//! What can go wrong between here and systemd.

use std::io;
use std::path::PathBuf;

/// systemd's name for a unit that it does not know.
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// And for one that is there already.
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

/// A failed conversation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens, or not to us.
    #[error("cannot connect to {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The peer does not take us for who we are.
    #[error("refused at the door: {answer:?}")]
    Refused { answer: String },
    /// The connection broke.
    #[error("cannot {operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    /// A message that is not one.
    #[error("a message that makes no sense: {0}")]
    Malformed(&'static str),
    /// The answer is an error.
    #[error("{method}: {message} ({name})")]
    Answer { method: &'static str, name: String, message: String },
    /// A job ended otherwise than it should.
    #[error("the job for {unit} ended as {result:?}")]
    Job { unit: String, result: String },
    /// No answer in time.
    #[error("waited in vain for {operation}")]
    TimedOut { operation: &'static str },
}

impl Error {
    fn is_named(&self, wanted: &str) -> bool {
        matches!(self, Error::Answer { name, .. } if name == wanted)
    }

    /// There is no such unit.
    pub fn is_no_such_unit(&self) -> bool {
        self.is_named(NO_SUCH_UNIT)
    }

    /// There is such a unit already.
    pub fn is_unit_exists(&self) -> bool {
        self.is_named(UNIT_EXISTS)
    }
}
