//! The wire format of ttrpc: a header of ten bytes and an envelope. Only calls of one request and one response are made, which
//! is all that the interface has.
//!
//! Pure: bytes in, messages out.

use prost::Message as _;
use tokio_util::bytes::{Buf, BytesMut};

/// The envelopes.
mod envelope {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
}

pub(crate) use envelope::{Request, Response, Status};

/// Length of the data, stream, kind, flags.
pub(crate) const HEADER_BYTES: usize = 10;
/// Longest data of a message.
pub(crate) const DATA_BYTES_MAX: usize = 4 << 20;

/// Status codes, as gRPC has them.
pub(crate) const UNKNOWN: i32 = 2;
pub(crate) const RESOURCE_EXHAUSTED: i32 = 8;
pub(crate) const UNIMPLEMENTED: i32 = 12;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// A message that has come whole.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    Request { stream: u32, request: Request },
    Response { stream: u32, response: Response },
}

/// The peer does not speak the protocol.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a message of {0} bytes is longer than allowed")]
    TooLong(usize),
    #[error("messages of kind {0} are not expected")]
    Kind(u8),
    #[error("an envelope cannot be read")]
    Envelope(#[source] prost::DecodeError),
}

/// A call, ready to be sent. The length is the caller's to check.
pub(crate) fn request(stream: u32, request: &Request) -> Vec<u8> {
    framed(stream, REQUEST, request)
}

/// An answer, ready to be sent.
pub(crate) fn response(stream: u32, response: &Response) -> Vec<u8> {
    framed(stream, RESPONSE, response)
}

fn framed(stream: u32, kind: u8, envelope: &impl prost::Message) -> Vec<u8> {
    let length = envelope.encoded_len();
    let mut out = Vec::with_capacity(HEADER_BYTES + length);
    out.extend_from_slice(&(length as u32).to_be_bytes());
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(&envelope.encode_to_vec());
    out
}

/// Takes the first message out of what has come so far; None until it is whole.
pub(crate) fn take(buffer: &mut BytesMut) -> Result<Option<Message>, WireError> {
    let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let [a, b, c, d, e, f, g, h, kind, _flags] = *header;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    let stream = u32::from_be_bytes([e, f, g, h]);
    if length > DATA_BYTES_MAX {
        return Err(WireError::TooLong(length));
    }
    if buffer.len() < HEADER_BYTES + length {
        return Ok(None);
    }
    buffer.advance(HEADER_BYTES);
    let data = buffer.split_to(length);
    match kind {
        REQUEST => Ok(Some(Message::Request { stream, request: Request::decode(data).map_err(WireError::Envelope)? })),
        RESPONSE => {
            Ok(Some(Message::Response { stream, response: Response::decode(data).map_err(WireError::Envelope)? }))
        }
        other => Err(WireError::Kind(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Request {
        Request { service: "s".into(), method: "m".into(), payload: vec![1, 2], ..Request::default() }
    }

    #[test]
    fn a_message_is_taken_once_it_is_whole_and_the_next_is_left() {
        let bytes = [request(1, &call()), response(3, &Response::default())].concat();
        let mut buffer = BytesMut::new();
        for byte in &bytes[..bytes.len() - HEADER_BYTES - 1] {
            buffer.extend_from_slice(&[*byte]);
            assert_eq!(take(&mut buffer).unwrap(), None);
        }
        buffer.extend_from_slice(&bytes[bytes.len() - HEADER_BYTES - 1..]);
        assert_eq!(take(&mut buffer).unwrap(), Some(Message::Request { stream: 1, request: call() }));
        assert_eq!(take(&mut buffer).unwrap(), Some(Message::Response { stream: 3, response: Response::default() }));
        assert_eq!(take(&mut buffer).unwrap(), None);
    }

    #[test]
    fn what_is_too_long_or_of_another_kind_is_refused_before_it_has_come() {
        let mut long = BytesMut::from(&[0xff, 0, 0, 0, 0, 0, 0, 1, 1, 0][..]);
        assert!(matches!(take(&mut long), Err(WireError::TooLong(_))));
        let mut data = BytesMut::from(&[0, 0, 0, 0, 0, 0, 0, 1, 3, 0][..]);
        assert_eq!(take(&mut data), Err(WireError::Kind(3)));
    }
}
