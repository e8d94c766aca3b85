//! The real kernel behind [`Kernel`].

use std::path::Path;
use std::time::Duration;

use oarlock_netlink::wire::{self, Received, attribute, attributes, flags, read_be32, read_be64, read_string};
use oarlock_netlink::{Connection, NetlinkError, Protocol};

use crate::encode::{self, encode};
use crate::kernel::Kernel;
use crate::key::Bytes;
use crate::model::{Command, Element, Table, Transaction, Value, Verdict};
use crate::{NftError, Result};

const NFGEN_BYTES: usize = 4;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const GENERATION_ID: u16 = 1;
/// The flag of a message that what it belongs to is not of one moment.
const DUMP_INTERRUPTED: u16 = 0x10;
/// How often a reading is started again because someone committed meanwhile.
const READ_ATTEMPTS: u32 = 20;

/// nf_tables of one network namespace.
#[derive(Debug)]
pub struct Netlink {
    connection: Connection,
}

/// What is read, and how.
struct Reading<'a> {
    operation: &'static str,
    kind: u16,
    /// Whether several objects may answer.
    dump: bool,
    table: &'a Table,
    attributes: &'a [(u16, &'a str)],
}

impl Netlink {
    /// Of the calling thread's network namespace.
    pub fn open() -> Result<Netlink> {
        Ok(Netlink { connection: Connection::open(Protocol::Netfilter).map_err(NftError::Netlink)? })
    }

    /// Of the network namespace at `path`.
    pub fn open_in(path: &Path) -> Result<Netlink> {
        Ok(Netlink { connection: Connection::open_in(Protocol::Netfilter, path).map_err(NftError::Netlink)? })
    }

    /// The number of the network namespace, see [`Connection::namespace_number`].
    pub fn namespace_number(&self) -> Option<u64> {
        self.connection.namespace_number()
    }

    /// Runs a reading, again when the ruleset changed under it.
    fn read(&mut self, reading: Reading<'_>, mut each: impl FnMut(&Received<'_>)) -> Result<bool> {
        let Reading { operation, kind, dump, table, attributes } = reading;
        let family = table.family.number();
        let result = self.connection.query(
            operation,
            kind,
            if dump { flags::DUMP } else { 0 },
            |w| {
                w.raw(&[family, 0, 0, 0]);
                attributes.iter().for_each(|(kind, value)| w.string(*kind, value));
            },
            |message| each(&message),
        );
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) if error.errno() == Some(nix::errno::Errno::EINTR) => Err(NftError::Interrupted),
            Err(error) => Err(NftError::Netlink(error)),
        }
    }

    /// Asks for the rules of a table and hands what is said of each to `each`.
    fn read_rules(&mut self, table: &Table, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut interrupted = false;
        self.read(
            Reading {
                operation: "list rules",
                kind: encode::GET_RULE,
                dump: true,
                table,
                attributes: &[(encode::LIST_TABLE, &table.name)],
            },
            |message| {
                interrupted |= message.flags & DUMP_INTERRUPTED != 0;
                let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                // Older kernels do not look at the table's name.
                let of_table =
                    attribute(body, encode::RULE_TABLE).map(read_string).as_deref() == Some(table.name.as_str());
                if message.kind == encode::NEW_RULE && of_table {
                    each(body);
                }
            },
        )?;
        if interrupted { Err(NftError::Interrupted) } else { Ok(()) }
    }

    fn read_elements(&mut self, table: &Table, set: &str) -> Result<Option<Vec<Element>>> {
        let mut found = Vec::new();
        let mut interrupted = false;
        let names = [(encode::LIST_TABLE, table.name.as_str()), (encode::LIST_SET, set)];
        let exists = self.read(
            Reading {
                operation: "list the elements of a set",
                kind: encode::GET_ELEMENT,
                dump: true,
                table,
                attributes: &names,
            },
            |message| {
                interrupted |= message.flags & DUMP_INTERRUPTED != 0;
                if message.kind == encode::NEW_ELEMENT {
                    let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                    let list = attribute(body, encode::LIST_ELEMENTS).unwrap_or_default();
                    found.extend(attributes(list).filter_map(|(_, element)| parse_element(element)));
                }
            },
        )?;
        if interrupted {
            return Err(NftError::Interrupted);
        }
        Ok(exists.then_some(found))
    }
}

/// Reads again when someone committed meanwhile.
fn uninterrupted<T>(mut read: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..READ_ATTEMPTS {
        match read() {
            Err(NftError::Interrupted) => {}
            outcome => return outcome,
        }
    }
    read()
}

impl Kernel for Netlink {
    fn commit(&mut self, transaction: &Transaction) -> Result<()> {
        if transaction.is_empty() {
            return Ok(());
        }
        let encoded = encode(transaction, || self.connection.next_sequence())
            .ok_or_else(|| NftError::TooLarge { table: transaction.table.name.clone() })?;
        if encoded.commands.is_empty() {
            return Ok(());
        }
        let refusals = self
            .connection
            .batch("change nf_tables", &encoded.bytes, encoded.first_sequence)
            .map_err(NftError::Netlink)?;
        let Some(first) = refusals.first() else { return Ok(()) };
        let command = encoded.command_of(first.sequence).and_then(|index| transaction.commands.get(index));
        Err(NftError::Refused {
            what: command.map_or_else(|| "commit".to_owned(), |command| describe(&transaction.table, command)),
            count: refusals.len(),
            hint: first.hint.clone(),
            source: first.errno,
        })
    }

    fn table_comment(&mut self, table: &Table) -> Result<Option<String>> {
        let mut comment = String::new();
        let exists = self.read(
            Reading {
                operation: "look up a table",
                kind: encode::GET_TABLE,
                dump: false,
                table,
                attributes: &[(1, &table.name)],
            },
            |message| {
                let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                comment = attribute(body, encode::TABLE_USERDATA).and_then(self::comment).unwrap_or_default();
            },
        )?;
        Ok(exists.then_some(comment))
    }

    fn chains(&mut self, table: &Table) -> Result<Vec<String>> {
        let mut found = Vec::new();
        self.read(
            Reading { operation: "list chains", kind: encode::GET_CHAIN, dump: true, table, attributes: &[] },
            |message| {
                if message.kind == encode::NEW_CHAIN && message.payload.first() == Some(&table.family.number()) {
                    let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                    let text = |kind| attribute(body, kind).map(read_string);
                    if text(CHAIN_TABLE).as_deref() == Some(table.name.as_str()) {
                        found.extend(text(CHAIN_NAME));
                    }
                }
            },
        )?;
        Ok(found)
    }

    fn rule_count(&mut self, table: &Table) -> Result<usize> {
        uninterrupted(|| {
            let mut count = 0;
            self.read_rules(table, |_| count += 1).map(|()| count)
        })
    }

    fn rules(&mut self, table: &Table) -> Result<Vec<(String, String)>> {
        uninterrupted(|| {
            let mut found = Vec::new();
            let read = self.read_rules(table, |body| {
                let chain = attribute(body, encode::RULE_CHAIN).map(read_string).unwrap_or_default();
                let comment = attribute(body, encode::RULE_USERDATA).and_then(comment).unwrap_or_default();
                found.push((chain, comment));
            });
            read.map(|()| found)
        })
    }

    fn elements(&mut self, table: &Table, set: &str) -> Result<Option<Vec<Element>>> {
        uninterrupted(|| self.read_elements(table, set))
    }

    fn element(&mut self, table: &Table, set: &str, key: &Bytes) -> Result<Option<Element>> {
        const ELEMENT: u16 = 1;
        let mut found = None;
        let result = self.connection.query(
            "look up an element of a set",
            encode::GET_ELEMENT,
            0,
            |w| {
                w.raw(&[table.family.number(), 0, 0, 0]);
                w.string(encode::LIST_TABLE, &table.name);
                w.string(encode::LIST_SET, set);
                w.nest(encode::LIST_ELEMENTS, |w| {
                    w.nest(ELEMENT, |w| {
                        w.nest(encode::ELEMENT_KEY, |w| w.attribute(encode::DATA_VALUE, key.as_slice()));
                    });
                });
            },
            |message| {
                if message.kind == encode::NEW_ELEMENT {
                    let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                    let list = attribute(body, encode::LIST_ELEMENTS).unwrap_or_default();
                    found = attributes(list).find_map(|(_, element)| parse_element(element));
                }
            },
        );
        match result {
            Ok(()) => Ok(found),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(NftError::Netlink(error)),
        }
    }

    fn generation(&mut self) -> Result<u32> {
        let mut generation = None;
        self.connection
            .query(
                "read the generation",
                encode::GET_GENERATION,
                0,
                |w| w.raw(&[0; NFGEN_BYTES]),
                |message| {
                    if message.kind == encode::NEW_GENERATION {
                        let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                        generation = attribute(body, GENERATION_ID).and_then(read_be32);
                    }
                },
            )
            .map_err(NftError::Netlink)?;
        generation.ok_or(NftError::Netlink(NetlinkError::Malformed { operation: "read the generation" }))
    }
}

/// The comment in an object's user data.
fn comment(user_data: &[u8]) -> Option<String> {
    match user_data {
        [0, _, text @ ..] => Some(read_string(text)),
        _ => None,
    }
}

fn parse_element(element: &[u8]) -> Option<Element> {
    let key = attribute(attribute(element, encode::ELEMENT_KEY)?, encode::DATA_VALUE)?;
    let value = match attribute(element, encode::ELEMENT_DATA) {
        Some(data) => Some(parse_value(data)?),
        None => None,
    };
    let milliseconds = attribute(element, encode::ELEMENT_EXPIRATION)
        .or_else(|| attribute(element, encode::ELEMENT_TIMEOUT))
        .and_then(read_be64);
    let comment = attribute(element, encode::ELEMENT_USERDATA).and_then(comment).map(String::into_boxed_str);
    Some(Element { key: Bytes::from_slice(key)?, value, timeout: milliseconds.map(Duration::from_millis), comment })
}

fn parse_value(data: &[u8]) -> Option<Value> {
    if let Some(bytes) = attribute(data, encode::DATA_VALUE) {
        return Some(Value::Data(Bytes::from_slice(bytes)?));
    }
    let verdict = attribute(data, encode::DATA_VERDICT)?;
    let chain = || attribute(verdict, encode::VERDICT_CHAIN).map(wire::read_string);
    let verdict = match read_be32(attribute(verdict, encode::VERDICT_CODE)?)?.cast_signed() {
        encode::CODE_ACCEPT => Verdict::Accept,
        encode::CODE_DROP => Verdict::Drop,
        encode::CODE_RETURN => Verdict::Return,
        encode::CODE_JUMP => Verdict::Jump(chain()?),
        encode::CODE_GOTO => Verdict::Goto(chain()?),
        _ => return None,
    };
    Some(Value::Verdict(verdict))
}

fn describe(table: &Table, command: &Command) -> String {
    let (verb, object) = match command {
        Command::AddTable { .. } => ("add table", String::new()),
        Command::DeleteTable => ("delete table", String::new()),
        Command::AddSet(set) => ("add set", set.name.clone()),
        Command::DeleteSet(name) => ("delete set", name.clone()),
        Command::AddChain(chain) => ("add chain", chain.name.clone()),
        Command::DeleteChain(name) => ("delete chain", name.clone()),
        Command::FlushChain(name) => ("flush chain", name.clone()),
        Command::AddRule(rule) => ("add a rule to chain", rule.chain.clone()),
        Command::AddElements { set, .. } => ("add elements to", set.clone()),
        Command::DeleteElements { set, .. } => ("delete elements from", set.clone()),
        Command::FlushSet(name) => ("flush set", name.clone()),
    };
    format!("{verb} {} {} {object}", table.family.name(), table.name).trim_end().to_owned()
}
