//! SPDY/3.1 frames: eight bytes of head, then a payload. Pure.

use bytes::{BufMut, Bytes, BytesMut};

use super::headers::{HeaderError, HeaderReader, HeaderWriter, Headers};

pub(crate) const HEAD_BYTES: usize = 8;
/// Payload of a control frame.
pub(crate) const CONTROL_LIMIT: u32 = 64 * 1024;

const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const ID_MASK: u32 = 0x7fff_ffff;

/// Why a stream is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Reset {
    Protocol = 1,
    InvalidStream = 2,
    Refused = 3,
    Cancel = 5,
    InUse = 8,
}

/// The first eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    Control { kind: u16, flags: u8, length: u32 },
    Data { id: u32, fin: bool, length: u32 },
}

/// A control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Control {
    SynStream {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
        fin: bool,
    },
    Reset {
        id: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    Headers {
        id: u32,
        fin: bool,
    },
    WindowUpdate {
        id: u32,
        delta: u32,
    },
    /// SETTINGS and kinds that say nothing to us.
    Other,
}

/// What breaks a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("unsupported SPDY version {0}")]
    Version(u16),
    #[error("control frame of {0} bytes is too large")]
    TooLarge(u32),
    #[error("control frame is too short")]
    TooShort,
    #[error(transparent)]
    Headers(#[from] HeaderError),
}

/// Reads the head of a frame.
pub(crate) fn parse_head(bytes: [u8; HEAD_BYTES]) -> Result<Head, FrameError> {
    let [a, b, c, d, flags, rest @ ..] = bytes;
    let first = u32::from_be_bytes([a, b, c, d]);
    let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]);
    if first & !ID_MASK == 0 {
        return Ok(Head::Data { id: first, fin: flags & FLAG_FIN != 0, length });
    }
    let version = (first >> 16) as u16 & 0x7fff;
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    if length > CONTROL_LIMIT {
        return Err(FrameError::TooLarge(length));
    }
    Ok(Head::Control { kind: first as u16, flags, length })
}

/// Reads a control frame's payload. Every header block must pass through `reader`, also those of no interest.
pub(crate) fn parse_control(
    kind: u16,
    flags: u8,
    payload: &[u8],
    reader: &mut HeaderReader,
) -> Result<Control, FrameError> {
    let fin = flags & FLAG_FIN != 0;
    let word = |index: usize| -> Result<u32, FrameError> {
        let bytes = payload.get(index * 4..index * 4 + 4).ok_or(FrameError::TooShort)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let block = |from: usize| payload.get(from..).ok_or(FrameError::TooShort);
    Ok(match kind {
        1 => Control::SynStream { id: word(0)? & ID_MASK, fin, headers: reader.read(block(10)?)? },
        2 => {
            reader.read(block(4)?)?;
            Control::SynReply { id: word(0)? & ID_MASK, fin }
        }
        3 => {
            word(1)?;
            Control::Reset { id: word(0)? & ID_MASK }
        }
        6 => Control::Ping { id: word(0)? },
        7 => Control::GoAway,
        8 => {
            reader.read(block(4)?)?;
            Control::Headers { id: word(0)? & ID_MASK, fin }
        }
        9 => Control::WindowUpdate { id: word(0)? & ID_MASK, delta: word(1)? & ID_MASK },
        _ => Control::Other,
    })
}

/// A frame to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Out {
    Data {
        id: u32,
        fin: bool,
        data: Bytes,
    },
    #[cfg_attr(not(test), allow(dead_code, reason = "only the client side of the tests opens streams"))]
    SynStream {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
    },
    Reset {
        id: u32,
        why: Reset,
    },
    Ping {
        id: u32,
    },
    WindowUpdate {
        id: u32,
        delta: u32,
    },
    /// The last frame of a session.
    GoAway {
        last: u32,
    },
}

/// Writes frames.
pub(crate) struct Encoder {
    headers: HeaderWriter,
}

impl Encoder {
    pub fn new() -> Self {
        Self { headers: HeaderWriter::new() }
    }

    /// Appends a frame. Data must be shorter than 16 MiB.
    pub fn encode(&mut self, frame: Out, to: &mut BytesMut) {
        match frame {
            Out::Data { id, fin, data } => {
                to.put_u32(id & ID_MASK);
                to.put_u32(u32::from(fin) << 24 | data.len() as u32 & 0xff_ffff);
                to.extend_from_slice(&data);
            }
            Out::SynStream { id, fin, headers } => {
                let block = self.headers.write(&headers);
                control(to, 1, u8::from(fin), 10 + block.len());
                to.put_u32(id & ID_MASK);
                to.put_u32(0);
                to.put_u16(0);
                to.extend_from_slice(&block);
            }
            Out::SynReply { id } => {
                let block = self.headers.write(&Headers::default());
                control(to, 2, 0, 4 + block.len());
                to.put_u32(id & ID_MASK);
                to.extend_from_slice(&block);
            }
            Out::Reset { id, why } => {
                control(to, 3, 0, 8);
                to.put_u32(id & ID_MASK);
                to.put_u32(why as u32);
            }
            Out::Ping { id } => {
                control(to, 6, 0, 4);
                to.put_u32(id);
            }
            Out::GoAway { last } => {
                control(to, 7, 0, 8);
                to.put_u32(last & ID_MASK);
                to.put_u32(0);
            }
            Out::WindowUpdate { id, delta } => {
                control(to, 9, 0, 8);
                to.put_u32(id & ID_MASK);
                to.put_u32(delta & ID_MASK);
            }
        }
    }
}

fn control(to: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    to.put_u16(0x8000 | VERSION);
    to.put_u16(kind);
    to.put_u32(u32::from(flags) << 24 | length as u32 & 0xff_ffff);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(frame: Out) -> BytesMut {
        let mut bytes = BytesMut::new();
        Encoder::new().encode(frame, &mut bytes);
        bytes
    }

    fn decoded(bytes: &[u8]) -> Result<Control, FrameError> {
        let head = parse_head(bytes[..8].try_into().unwrap())?;
        let Head::Control { kind, flags, length } = head else { panic!("{head:?}") };
        assert_eq!(length as usize, bytes.len() - 8);
        parse_control(kind, flags, &bytes[8..], &mut HeaderReader::new())
    }

    #[test]
    fn frames_have_the_protocols_bytes() {
        assert_eq!(encoded(Out::Ping { id: 1 })[..], [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]);
        let reset = [0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 3];
        assert_eq!(encoded(Out::Reset { id: 5, why: Reset::Refused })[..], reset);
        let data = Out::Data { id: 7, fin: true, data: Bytes::from_static(b"hi") };
        assert_eq!(encoded(data)[..], [0, 0, 0, 7, 1, 0, 0, 2, b'h', b'i']);
        let window = [0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0x80, 0];
        assert_eq!(encoded(Out::WindowUpdate { id: 1, delta: 0x8000 })[..], window);
        assert_eq!(encoded(Out::GoAway { last: 3 })[..], [0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0]);
    }

    #[test]
    fn an_opening_frame_is_read_back() {
        let headers = Headers::of(&[("streamType", "data"), ("port", "80")]);
        let bytes = encoded(Out::SynStream { id: 3, fin: true, headers: headers.clone() });
        assert_eq!(decoded(&bytes).unwrap(), Control::SynStream { id: 3, fin: true, headers });
        assert_eq!(decoded(&encoded(Out::SynReply { id: 3 })).unwrap(), Control::SynReply { id: 3, fin: false });
    }

    #[test]
    fn other_versions_and_huge_control_frames_are_refused() {
        assert_eq!(parse_head([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(FrameError::Version(2)));
        assert_eq!(parse_head([0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]), Err(FrameError::TooLarge(0xff_ffff)));
    }

    proptest! {
        #[test]
        fn no_payload_panics(kind in 0u16..12, flags: u8, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_control(kind, flags, &payload, &mut HeaderReader::new());
        }

        #[test]
        fn data_heads_survive(id in 0u32..0x8000_0000, fin: bool, length in 0usize..5000) {
            let bytes = encoded(Out::Data { id, fin, data: Bytes::from(vec![7; length]) });
            let head = parse_head(bytes[..8].try_into().unwrap()).unwrap();
            prop_assert_eq!(head, Head::Data { id, fin, length: length as u32 });
        }

        #[test]
        fn no_head_panics(bytes: [u8; 8]) {
            let _ = parse_head(bytes);
        }
    }
}
