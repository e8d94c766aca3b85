//! Keys and values of sets and maps as the kernel compares them: fields one after the other, each padded to four bytes.

use std::fmt;
use std::net::IpAddr;

/// The type of one field of a key or value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Field {
    Ipv4,
    Ipv6,
    /// An IP protocol number, one byte.
    Protocol,
    /// A port, two bytes in network order.
    Port,
    /// A number of four bytes in host order.
    Mark,
    /// The name of a link, sixteen bytes.
    LinkName,
    /// An Ethernet address, six bytes.
    Ethernet,
}

impl Field {
    /// Bytes before padding.
    pub fn len_bytes(self) -> u32 {
        match self {
            Field::Ipv4 | Field::Mark => 4,
            Field::Ipv6 | Field::LinkName => 16,
            Field::Protocol => 1,
            Field::Port => 2,
            Field::Ethernet => 6,
        }
    }

    /// nft's number for the type, which makes listings readable.
    pub(crate) fn type_number(self) -> u32 {
        match self {
            Field::Ipv4 => 7,
            Field::Ipv6 => 8,
            Field::Ethernet => 9,
            Field::Protocol => 12,
            Field::Port => 13,
            Field::Mark => 19,
            Field::LinkName => 41,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Field::Ipv4 => "ipv4_addr",
            Field::Ipv6 => "ipv6_addr",
            Field::Protocol => "inet_proto",
            Field::Port => "inet_service",
            Field::Mark => "mark",
            Field::LinkName => "ifname",
            Field::Ethernet => "ether_addr",
        }
    }
}

/// The length of fields put together: a single field as it is, several padded to four bytes each.
pub(crate) fn fields_len(fields: &[Field]) -> u32 {
    match fields {
        [one] => one.len_bytes(),
        many => many.iter().map(|field| field.len_bytes().next_multiple_of(4)).sum(),
    }
}

pub(crate) fn fields_type(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |all, field| all << 6 | field.type_number())
}

/// The longest key: two IPv6 addresses, a protocol, a port and a number.
const CAPACITY: usize = 48;

/// A key or value of a few fields, without an allocation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bytes {
    length: u8,
    bytes: [u8; CAPACITY],
}

impl Bytes {
    /// `None` when there are more than fit.
    pub fn from_slice(slice: &[u8]) -> Option<Bytes> {
        let mut bytes = [0; CAPACITY];
        bytes.get_mut(..slice.len())?.copy_from_slice(slice);
        Some(Bytes { length: slice.len() as u8, bytes })
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Builds a key or value of several fields. A key of a single field is the same, without padding: [`Key::single`].
#[derive(Debug, Clone, Copy)]
pub struct Key(Bytes);

impl Default for Key {
    fn default() -> Self {
        Key::new()
    }
}

impl Key {
    pub fn new() -> Key {
        Key(Bytes { length: 0, bytes: [0; CAPACITY] })
    }

    #[must_use]
    pub fn address(self, address: IpAddr) -> Key {
        match address {
            IpAddr::V4(address) => self.push(&address.octets()),
            IpAddr::V6(address) => self.push(&address.octets()),
        }
    }

    #[must_use]
    pub fn protocol(self, number: u8) -> Key {
        self.push(&[number])
    }

    #[must_use]
    pub fn port(self, port: u16) -> Key {
        self.push(&port.to_be_bytes())
    }

    #[must_use]
    pub fn mark(self, number: u32) -> Key {
        self.push(&number.to_ne_bytes())
    }

    /// A link's name; one that is longer than the kernel allows is cut.
    #[must_use]
    pub fn link_name(self, name: &str) -> Key {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(name.bytes().take(15)).for_each(|(to, from)| *to = from);
        self.push(&bytes)
    }

    #[must_use]
    pub fn ethernet(self, address: [u8; 6]) -> Key {
        self.push(&address)
    }

    pub fn bytes(self) -> Bytes {
        self.0
    }

    /// The key of a set with one field.
    pub fn single(address: IpAddr) -> Bytes {
        Key::new().address(address).0
    }

    /// Fields beyond the longest possible key are not taken; the kernel refuses the short key by its length.
    fn push(mut self, field: &[u8]) -> Key {
        let start = usize::from(self.0.length);
        let padded = field.len().next_multiple_of(4);
        if let Some(slot) = self.0.bytes.get_mut(start..start + padded) {
            slot[..field.len()].copy_from_slice(field);
            self.0.length += padded as u8;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_padded_to_four_bytes_each() {
        let key = Key::new().address([10, 43, 0, 1].into()).protocol(6).port(443).mark(2).bytes();
        assert_eq!(key.as_slice(), [&[10, 43, 0, 1, 6, 0, 0, 0, 1, 187, 0, 0][..], &2u32.to_ne_bytes()].concat());
        assert_eq!(fields_len(&[Field::Ipv4, Field::Protocol, Field::Port, Field::Mark]), 16);
        assert_eq!(fields_len(&[Field::Port]), 2);
    }

    #[test]
    fn a_key_that_does_not_fit_is_told() {
        assert_eq!(Bytes::from_slice(&[0; 49]), None);
        assert_eq!(Bytes::from_slice(&[7; 48]).unwrap().as_slice(), [7; 48]);
    }
}
