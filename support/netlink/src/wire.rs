//! Netlink messages as bytes: a writer for messages and nested attributes, and iterators to read them.
//!
//! Integers are in host order unless the name says `be`. The writer never panics on an attribute that grows too large;
//! it remembers, and [`Writer::finish`] tells.

/// Flags of a netlink message header.
pub mod flags {
    pub const REQUEST: u16 = 1;
    pub const MULTI: u16 = 2;
    pub const ACK: u16 = 4;
    /// The kernel tells what it made.
    pub const ECHO: u16 = 8;
    pub const DUMP: u16 = 0x300;
    pub const REPLACE: u16 = 0x100;
    pub const EXCL: u16 = 0x200;
    pub const CREATE: u16 = 0x400;
    pub const APPEND: u16 = 0x800;
}

/// Types below this are netlink's own.
pub const FIRST_FAMILY_TYPE: u16 = 16;
pub(crate) const TYPE_ERROR: u16 = 2;
pub(crate) const TYPE_DONE: u16 = 3;
pub(crate) const TYPE_OVERRUN: u16 = 4;

/// Size of a message header.
pub const HEADER_BYTES: usize = 16;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// One or more messages under construction.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    buffer: Vec<u8>,
    too_large: bool,
}

impl Writer {
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// One whole message; `body` writes what follows the header.
    pub fn message(&mut self, kind: u16, flags: u16, sequence: u32, body: impl FnOnce(&mut Writer)) {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&0u32.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(&flags.to_ne_bytes());
        self.buffer.extend_from_slice(&sequence.to_ne_bytes());
        self.buffer.extend_from_slice(&0u32.to_ne_bytes());
        body(self);
        self.pad();
        match u32::try_from(self.buffer.len() - start) {
            Ok(length) => self.buffer[start..start + 4].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.too_large = true,
        }
    }

    /// Bytes as they are: the family's own header.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.pad();
    }

    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let start = self.open(kind);
        self.buffer.extend_from_slice(value);
        self.close(start);
    }

    /// A string with its terminating zero.
    pub fn string(&mut self, kind: u16, value: &str) {
        let start = self.open(kind);
        self.buffer.extend_from_slice(value.as_bytes());
        self.buffer.push(0);
        self.close(start);
    }

    pub fn u8(&mut self, kind: u16, value: u8) {
        self.attribute(kind, &[value]);
    }

    pub fn u16(&mut self, kind: u16, value: u16) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    pub fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    pub fn be16(&mut self, kind: u16, value: u16) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub fn be64(&mut self, kind: u16, value: u64) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// An attribute made of attributes.
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        let start = self.open(kind | NESTED);
        body(self);
        self.close(start);
    }

    /// The bytes, or `None` when some attribute or message was larger than its length field can say.
    pub fn finish(self) -> Option<Vec<u8>> {
        (!self.too_large).then_some(self.buffer)
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&0u16.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        match u16::try_from(self.buffer.len() - start) {
            Ok(length) => self.buffer[start..start + 2].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.too_large = true,
        }
        self.pad();
    }

    fn pad(&mut self) {
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }
}

/// One received message.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// The messages in a datagram; a malformed rest ends the iteration.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let header = datagram.get(..HEADER_BYTES)?;
        let length = read_u32(header)? as usize;
        let message = datagram.get(..length).filter(|message| message.len() >= HEADER_BYTES)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: read_u16(&header[4..])?,
            flags: read_u16(&header[6..])?,
            sequence: read_u32(&header[8..])?,
            payload: &message[HEADER_BYTES..],
        })
    })
}

/// The attributes in a payload, as type and value; a malformed rest ends the iteration.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(bytes)?);
        let kind = read_u16(bytes.get(2..)?)? & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

pub fn read_u16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

pub fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub fn read_be16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?))
}

pub fn read_be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub fn read_be64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// A string up to its terminating zero, if it has one.
pub fn read_string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// An IPv4 or IPv6 address by its length.
pub fn read_address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}

/// An address in network order, 4 or 16 bytes.
pub fn address_bytes(address: std::net::IpAddr) -> Vec<u8> {
    match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = Writer::new();
        writer.message(20, flags::REQUEST, 7, |w| {
            w.raw(&[1, 2, 3, 4]);
            w.string(1, "abc");
            w.nest(2, |w| w.be16(5, 0x1234));
        });
        writer.message(21, 0, 8, |w| w.u8(1, 9));
        let bytes = writer.finish().unwrap();
        let found: Vec<_> = messages(&bytes).collect();
        assert_eq!((found.len(), found[0].kind, found[0].sequence, found[1].kind), (2, 20, 7, 21));
        let attributes_of_first = &found[0].payload[4..];
        assert_eq!(read_string(attribute(attributes_of_first, 1).unwrap()), "abc");
        assert_eq!(attribute(attribute(attributes_of_first, 2).unwrap(), 5), Some(&[0x12, 0x34][..]));
    }

    #[test]
    fn an_attribute_that_is_too_large_is_told_not_truncated() {
        let mut writer = Writer::new();
        writer.message(20, 0, 1, |w| w.attribute(1, &[0; 70_000]));
        assert_eq!(writer.finish(), None);
    }

    #[test]
    fn malformed_bytes_end_the_iteration() {
        assert_eq!(attributes(&[1, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 5]).count(), 0);
        assert_eq!(messages(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).count(), 0);
    }
}
