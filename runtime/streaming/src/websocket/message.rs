//! How channels and their bytes are put into messages. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use crate::negotiate::Encoding;

pub(crate) const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
pub(crate) const STDERR: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const RESIZE: u8 = 4;
/// From v5 on: the next byte names a channel that the client closes.
const CLOSE: u8 = 255;

/// What a client's message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Incoming {
    Data(u8, Bytes),
    CloseChannel(u8),
    /// Not a message of this protocol.
    Bad,
}

pub(crate) fn decode(message: Bytes, encoding: Encoding, closes: bool) -> Incoming {
    let Some((&channel, _)) = message.split_first() else { return Incoming::Bad };
    match encoding {
        Encoding::Binary if channel == CLOSE && closes => match message.get(1) {
            Some(&closed) => Incoming::CloseChannel(closed),
            None => Incoming::Bad,
        },
        Encoding::Binary => Incoming::Data(channel, message.slice(1..)),
        Encoding::Base64 => match (channel.checked_sub(b'0'), STANDARD.decode(&message[1..])) {
            (Some(channel @ 0..=9), Ok(data)) => Incoming::Data(channel, data.into()),
            _ => Incoming::Bad,
        },
    }
}

pub(crate) fn encode(channel: u8, data: &[u8], encoding: Encoding) -> Message {
    match encoding {
        Encoding::Binary => {
            let mut message = BytesMut::with_capacity(data.len() + 1);
            message.put_u8(channel);
            message.extend_from_slice(data);
            Message::Binary(message.freeze())
        }
        Encoding::Base64 => {
            Message::Text(Utf8Bytes::from(format!("{}{}", char::from(b'0' + channel), STANDARD.encode(data))))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn channels_and_closing_are_told_apart() {
        let of = |bytes: &'static [u8], closes| decode(Bytes::from_static(bytes), Encoding::Binary, closes);
        assert_eq!(of(b"\0hi", true), Incoming::Data(0, Bytes::from_static(b"hi")));
        assert_eq!(of(b"\xff\0", true), Incoming::CloseChannel(0));
        assert_eq!(of(b"\xff", true), Incoming::Bad);
        assert_eq!(of(b"\xff\0", false), Incoming::Data(255, Bytes::from_static(b"\0")));
        assert_eq!(of(b"", true), Incoming::Bad);
    }

    #[test]
    fn base64_goes_both_ways() {
        assert_eq!(encode(1, b"hi", Encoding::Base64), Message::Text("1aGk=".into()));
        let incoming = decode(Bytes::from_static(b"0aGk="), Encoding::Base64, false);
        assert_eq!(incoming, Incoming::Data(0, Bytes::from_static(b"hi")));
        assert_eq!(decode(Bytes::from_static(b"0***"), Encoding::Base64, false), Incoming::Bad);
    }

    proptest! {
        #[test]
        fn no_message_panics(bytes in prop::collection::vec(any::<u8>(), 0..50), closes: bool) {
            let _ = decode(Bytes::from(bytes.clone()), Encoding::Binary, closes);
            let _ = decode(Bytes::from(bytes), Encoding::Base64, closes);
        }
    }
}
