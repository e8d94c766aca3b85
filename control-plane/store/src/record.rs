//! Values and records: bytes with the revision spelled into them.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

/// Something the caller computes once from a record and keeps with it, such as an index of its fields.
pub type Attachment = Arc<dyn Any + Send + Sync>;

/// A value to be written. Where it has a hole, the revision of the write is put in as decimal digits at commit.
#[derive(Clone)]
pub struct Value {
    bytes: Bytes,
    hole: Option<u32>,
    attachment: Option<Attachment>,
}

impl Value {
    /// A value that is stored as it is.
    pub fn plain(bytes: impl Into<Bytes>) -> Value {
        Value { bytes: bytes.into(), hole: None, attachment: None }
    }

    /// A value in which the revision is inserted at byte `hole`. A hole past the end is taken as none.
    pub fn with_hole(bytes: impl Into<Bytes>, hole: usize) -> Value {
        let bytes = bytes.into();
        let hole = u32::try_from(hole).ok().filter(|hole| *hole as usize <= bytes.len());
        Value { bytes, hole, attachment: None }
    }

    /// Hands over what the caller already knows about the value, so that it need not be computed again.
    pub fn attach(mut self, attachment: Attachment) -> Value {
        self.attachment = Some(attachment);
        self
    }

    pub(crate) fn into_record(self, key: Arc<str>, revision: u64, created: u64, expires_at: Option<u64>) -> Record {
        let value = match self.hole {
            Some(hole) => splice(&self.bytes, hole as usize, 0, revision),
            None => self.bytes,
        };
        let attachment = OnceLock::new();
        if let Some(known) = self.attachment {
            let _ = attachment.set(known);
        }
        Record { key, revision, created_revision: created, value, digits_at: self.hole, expires_at, attachment }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Value").field("bytes", &self.bytes.len()).field("hole", &self.hole).finish()
    }
}

/// One stored state of one key. The value prints as a length: it may be a secret.
pub struct Record {
    key: Arc<str>,
    revision: u64,
    created_revision: u64,
    value: Bytes,
    digits_at: Option<u32>,
    expires_at: Option<u64>,
    attachment: OnceLock<Attachment>,
}

impl Record {
    pub(crate) fn loaded(row: LoadedRow) -> Record {
        let LoadedRow { key, revision, created_revision, digits_at, expires_at, value } = row;
        let value = Bytes::from(value);
        Record { key, revision, created_revision, value, digits_at, expires_at, attachment: OnceLock::new() }
    }

    /// The record's key.
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    /// The revision of the write (or deletion) that made this state.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The revision of the write that created the key.
    pub fn created_revision(&self) -> u64 {
        self.created_revision
    }

    /// The value with its revision in place.
    pub fn value(&self) -> &Bytes {
        &self.value
    }

    /// When the record expires, in seconds since the Unix epoch.
    pub fn expires_at(&self) -> Option<u64> {
        self.expires_at
    }

    /// The attachment, computed now if it is not there yet.
    pub fn attachment_or_init(&self, compute: impl FnOnce() -> Attachment) -> &Attachment {
        self.attachment.get_or_init(compute)
    }

    pub(crate) fn digits_at(&self) -> Option<u32> {
        self.digits_at
    }

    /// The same state, spelled with the revision of what ended it. The attachment is carried over.
    pub fn at_revision(&self, revision: u64) -> Record {
        let value = match self.digits_at {
            Some(at) => splice(&self.value, at as usize, decimal_length(self.revision), revision),
            None => self.value.clone(),
        };
        Record {
            key: self.key.clone(),
            revision,
            created_revision: self.created_revision,
            value,
            digits_at: self.digits_at,
            expires_at: None,
            attachment: self.attachment.clone(),
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("key", &self.key)
            .field("revision", &self.revision)
            .field("created_revision", &self.created_revision)
            .field("value", &self.value.len())
            .finish()
    }
}

/// A record as it lies in the database.
pub(crate) struct LoadedRow {
    pub key: Arc<str>,
    pub revision: u64,
    pub created_revision: u64,
    pub digits_at: Option<u32>,
    pub expires_at: Option<u64>,
    pub value: Vec<u8>,
}

/// Copies `bytes` with `removed` bytes at `at` replaced by the decimal digits of `revision`.
fn splice(bytes: &[u8], at: usize, removed: usize, revision: u64) -> Bytes {
    let digits = revision.to_string();
    let at = at.min(bytes.len());
    let resume = (at + removed).min(bytes.len());
    let mut out = Vec::with_capacity(bytes.len() - (resume - at) + digits.len());
    out.extend_from_slice(&bytes[..at]);
    out.extend_from_slice(digits.as_bytes());
    out.extend_from_slice(&bytes[resume..]);
    Bytes::from(out)
}

fn decimal_length(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_is_spelled_into_the_hole_and_replaced_on_deletion() {
        let value = Value::with_hole(&br#"{"rv":""}"#[..], 7);
        let record = value.into_record("a/b".into(), 99, 99, None);
        assert_eq!(&record.value()[..], br#"{"rv":"99"}"#);
        assert_eq!(&record.at_revision(100).value()[..], br#"{"rv":"100"}"#);
        assert_eq!(&record.at_revision(100).at_revision(7).value()[..], br#"{"rv":"7"}"#);
    }

    #[test]
    fn a_debug_print_never_shows_the_value() {
        let record = Value::plain(&b"hunter2"[..]).into_record("secrets/x".into(), 1, 1, None);
        assert!(!format!("{record:?}").contains("hunter2"));
    }
}
