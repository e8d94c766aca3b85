//! Rules and the expressions they are made of.

use std::time::Duration;

use crate::model::Verdict;

/// One of the sixteen registers of four bytes that expressions read and write. A longer value takes the following
/// registers too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(pub u8);

impl Reg {
    pub(crate) fn number(self) -> u32 {
        const FIRST: u32 = 8;
        FIRST + u32::from(self.0)
    }
}

/// Facts about the packet and its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaKey {
    Mark = 3,
    InputName = 6,
    OutputName = 7,
    L4Protocol = 16,
}

/// Facts about the packet's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CtKey {
    /// A bit set: 1 invalid, 2 established, 4 related, 8 new.
    State = 0,
    /// A bit set: 32 (0x20) is destination NAT.
    Status = 2,
    /// The port that the connection was made to, before NAT.
    OriginalPort = 12,
    /// The IPv4 address that the connection was made to, before NAT.
    OriginalIpv4 = 20,
    /// The IPv6 address that the connection was made to, before NAT.
    OriginalIpv6 = 22,
}

impl CtKey {
    /// Whether the key is about one direction, which here is always the original one.
    pub(crate) fn is_of_a_direction(self) -> bool {
        matches!(self, CtKey::OriginalPort | CtKey::OriginalIpv4 | CtKey::OriginalIpv6)
    }
}

/// Where a payload offset counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadBase {
    Link = 0,
    Network = 1,
    Transport = 2,
}

/// What a routing lookup tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FibResult {
    /// The type of the address, such as `libc::RTN_LOCAL`.
    AddressType = 3,
}

/// Which end of the connection is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatKind {
    Source = 0,
    Destination = 1,
}

/// One expression. Comparisons and lookups that fail end the rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    LoadMeta {
        key: MetaKey,
        to: Reg,
    },
    StoreMark {
        from: Reg,
    },
    LoadPayload {
        base: PayloadBase,
        offset: u32,
        len_bytes: u32,
        to: Reg,
    },
    LoadCt {
        key: CtKey,
        to: Reg,
    },
    /// The type of the packet's source or destination address.
    LoadFib {
        result: FibResult,
        of_source: bool,
        to: Reg,
    },
    /// A random number below `modulus`.
    LoadRandom {
        modulus: u32,
        to: Reg,
    },
    LoadBytes {
        value: Vec<u8>,
        to: Reg,
    },
    /// `register = (register & mask) ^ xor`
    Bitwise {
        register: Reg,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Compare {
        register: Reg,
        equal: bool,
        value: Vec<u8>,
    },
    /// Goes on only when a value in network order is between these two, which are included.
    Between {
        register: Reg,
        first: Vec<u8>,
        last: Vec<u8>,
    },
    /// Goes on only when the key is in the set (or is not, with `inverted`).
    InSet {
        set: String,
        key: Reg,
        inverted: bool,
    },
    /// Reads a map; goes on only when the key is there.
    LoadMap {
        map: String,
        key: Reg,
        to: Reg,
    },
    /// Follows a verdict map; goes on when the key is not there.
    VerdictMap {
        map: String,
        key: Reg,
    },
    /// Adds to a dynamic set or map, or refreshes the element's timeout.
    Update {
        set: String,
        key: Reg,
        data: Option<Reg>,
        timeout: Option<Duration>,
    },
    /// Rewrites an address and, with `port`, a port.
    Nat {
        kind: NatKind,
        address: Reg,
        port: Option<Reg>,
    },
    /// Rewrites the source to the outgoing link's address; ports are drawn at random.
    Masquerade,
    /// Refuses with ICMP port unreachable, which `connect` reports as "connection refused".
    Reject,
    Counter,
    Verdict(Verdict),
}

/// A rule of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub chain: String,
    pub expressions: Vec<Expr>,
    /// Shown by `nft list`; at most 128 bytes are kept.
    pub comment: Option<String>,
}

impl Rule {
    pub fn new(chain: impl Into<String>, expressions: Vec<Expr>) -> Rule {
        Rule { chain: chain.into(), expressions, comment: None }
    }

    #[must_use]
    pub fn comment(self, comment: impl Into<String>) -> Rule {
        Rule { comment: Some(comment.into()), ..self }
    }
}
