//! Tables, chains, sets and the commands that change them.

use std::time::Duration;

use crate::expression::Rule;
use crate::key::{Bytes, Field, fields_len};

/// The address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    Ip,
    Ip6,
    Inet,
    /// Frames that pass a bridge.
    Bridge,
}

impl Family {
    pub(crate) fn number(self) -> u8 {
        match self {
            Family::Inet => 1,
            Family::Ip => 2,
            Family::Bridge => 7,
            Family::Ip6 => 10,
        }
    }

    /// As nft writes it.
    pub fn name(self) -> &'static str {
        match self {
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
            Family::Inet => "inet",
            Family::Bridge => "bridge",
        }
    }
}

/// A table by family and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Table {
    pub family: Family,
    pub name: String,
}

impl Table {
    pub fn new(family: Family, name: impl Into<String>) -> Table {
        Table { family, name: name.into() }
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

impl Verdict {
    /// The chain that it leads to.
    pub fn chain(&self) -> Option<&str> {
        match self {
            Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
            _ => None,
        }
    }
}

/// What a map's keys lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetData {
    Verdict,
    Fields(Vec<Field>),
}

/// A set, or with `data` a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    pub name: String,
    pub key: Vec<Field>,
    pub data: Option<SetData>,
    /// Rules may add elements.
    pub dynamic: bool,
    /// Elements can expire; the duration is the default for new ones, zero for none.
    pub timeout: Option<Duration>,
    /// The largest number of elements; dynamic sets need one.
    pub size: Option<u32>,
}

impl Set {
    /// A set of keys.
    pub fn new(name: impl Into<String>, key: &[Field]) -> Set {
        Set { name: name.into(), key: key.to_vec(), data: None, dynamic: false, timeout: None, size: None }
    }

    /// A map from keys to values.
    pub fn map(name: impl Into<String>, key: &[Field], data: &[Field]) -> Set {
        Set { data: Some(SetData::Fields(data.to_vec())), ..Set::new(name, key) }
    }

    /// A map from keys to verdicts.
    pub fn verdict_map(name: impl Into<String>, key: &[Field]) -> Set {
        Set { data: Some(SetData::Verdict), ..Set::new(name, key) }
    }

    /// How many bytes a key has.
    pub fn key_len_bytes(&self) -> u32 {
        fields_len(&self.key)
    }

    /// Lets rules add elements, which expire.
    #[must_use]
    pub fn dynamic(self, size: u32, timeout: Duration) -> Set {
        Set { dynamic: true, timeout: Some(timeout), size: Some(size), ..self }
    }
}

/// The value of a map's element.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    Data(Bytes),
    Verdict(Verdict),
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    pub key: Bytes,
    pub value: Option<Value>,
    /// How long it lives; when read, how long it still lives.
    pub timeout: Option<Duration>,
    /// Whose it is, shown by `nft list`; at most 128 bytes are kept.
    pub comment: Option<Box<str>>,
}

impl Element {
    pub fn key(key: Bytes) -> Element {
        Element { key, value: None, timeout: None, comment: None }
    }

    pub fn data(key: Bytes, value: Bytes) -> Element {
        Element { key, value: Some(Value::Data(value)), timeout: None, comment: None }
    }

    pub fn verdict(key: Bytes, verdict: Verdict) -> Element {
        Element { key, value: Some(Value::Verdict(verdict)), timeout: None, comment: None }
    }

    #[must_use]
    pub fn comment(self, comment: &str) -> Element {
        Element { comment: Some(comment.into()), ..self }
    }
}

/// What a base chain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    Filter,
    Nat,
}

/// Where a base chain is hooked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HookPoint {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What becomes of packets that no rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Drop = 0,
    Accept = 1,
}

/// A base chain's hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    pub kind: ChainKind,
    pub point: HookPoint,
    /// Lower comes first; -100 is destination NAT, 0 filtering, 100 source NAT.
    pub priority: i32,
    pub policy: Policy,
}

/// A chain: a base chain with a hook, or one that verdicts lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    pub hook: Option<Hook>,
}

impl Chain {
    pub fn regular(name: impl Into<String>) -> Chain {
        Chain { name: name.into(), hook: None }
    }

    pub fn base(name: impl Into<String>, kind: ChainKind, point: HookPoint, priority: i32) -> Chain {
        Chain { name: name.into(), hook: Some(Hook { kind, point, priority, policy: Policy::Accept }) }
    }
}

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Makes the table; with `exclusive`, the transaction fails when it is there. The comment marks whose it is.
    AddTable {
        comment: String,
        exclusive: bool,
    },
    /// Deletes the table with all that is in it; it has to be there.
    DeleteTable,
    AddSet(Set),
    DeleteSet(String),
    /// Makes a chain that may be there already.
    AddChain(Chain),
    DeleteChain(String),
    /// Deletes all rules of a chain.
    FlushChain(String),
    /// Appends a rule.
    AddRule(Rule),
    /// Adds elements. One that is there already is fine when its value is the same, unless `exclusive`.
    AddElements {
        set: String,
        elements: Vec<Element>,
        exclusive: bool,
    },
    /// Deletes elements; each has to be there.
    DeleteElements {
        set: String,
        keys: Vec<Bytes>,
    },
    /// Deletes all elements of a set.
    FlushSet(String),
}

/// Commands on one table that the kernel carries out together or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    pub table: Table,
    pub commands: Vec<Command>,
}

impl Transaction {
    pub fn new(table: Table) -> Transaction {
        Transaction { table, commands: Vec::new() }
    }

    pub fn push(&mut self, command: Command) {
        self.commands.push(command);
    }

    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }
}
