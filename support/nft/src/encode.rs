//! Commands as nf_tables netlink messages.

use oarlock_netlink::wire::{Writer, flags};

use crate::expression::{Expr, MetaKey, Rule};
use crate::key::{fields_len, fields_type};
use crate::model::{Chain, ChainKind, Command, Element, Set, SetData, Table, Transaction, Value, Verdict};

pub(crate) const SUBSYSTEM: u16 = 10 << 8;
pub(crate) const NEW_TABLE: u16 = SUBSYSTEM;
pub(crate) const GET_TABLE: u16 = SUBSYSTEM | 1;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
pub(crate) const NEW_CHAIN: u16 = SUBSYSTEM | 3;
pub(crate) const GET_CHAIN: u16 = SUBSYSTEM | 4;
const DELETE_CHAIN: u16 = SUBSYSTEM | 5;
pub(crate) const NEW_RULE: u16 = SUBSYSTEM | 6;
pub(crate) const GET_RULE: u16 = SUBSYSTEM | 7;
const DELETE_RULE: u16 = SUBSYSTEM | 8;
const NEW_SET: u16 = SUBSYSTEM | 9;
const DELETE_SET: u16 = SUBSYSTEM | 11;
pub(crate) const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
pub(crate) const GET_ELEMENT: u16 = SUBSYSTEM | 13;
const DELETE_ELEMENT: u16 = SUBSYSTEM | 14;
pub(crate) const NEW_GENERATION: u16 = SUBSYSTEM | 15;
pub(crate) const GET_GENERATION: u16 = SUBSYSTEM | 16;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

pub(crate) const ELEMENT_KEY: u16 = 1;
pub(crate) const ELEMENT_DATA: u16 = 2;
pub(crate) const ELEMENT_TIMEOUT: u16 = 4;
pub(crate) const ELEMENT_EXPIRATION: u16 = 5;
pub(crate) const ELEMENT_USERDATA: u16 = 6;
const SET_USERDATA: u16 = 13;
pub(crate) const DATA_VALUE: u16 = 1;
pub(crate) const DATA_VERDICT: u16 = 2;
pub(crate) const VERDICT_CODE: u16 = 1;
pub(crate) const VERDICT_CHAIN: u16 = 2;
pub(crate) const LIST_TABLE: u16 = 1;
pub(crate) const LIST_SET: u16 = 2;
pub(crate) const LIST_ELEMENTS: u16 = 3;
pub(crate) const TABLE_USERDATA: u16 = 6;
pub(crate) const RULE_TABLE: u16 = 1;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_USERDATA: u16 = 7;
pub(crate) const CODE_DROP: i32 = 0;
pub(crate) const CODE_ACCEPT: i32 = 1;
pub(crate) const CODE_JUMP: i32 = -3;
pub(crate) const CODE_GOTO: i32 = -4;
pub(crate) const CODE_RETURN: i32 = -5;
const LIST_ITEM: u16 = 1;
const VERDICT_TYPE: u32 = 0xffff_ff00;
const SET_IS_MAP: u32 = 8;
const SET_HAS_TIMEOUT: u32 = 16;
const SET_IS_DYNAMIC: u32 = 32;

/// Elements a message: the list's length is a 16-bit number of bytes, and an element has less than 400.
const ELEMENTS_A_MESSAGE: usize = 150;
const MAX_COMMENT_BYTES: usize = 128;

/// A transaction as one datagram, and which command each message belongs to.
pub(crate) struct Encoded {
    pub bytes: Vec<u8>,
    /// The sequence number of the first message, which is the one that asks for an acknowledgement.
    pub first_sequence: u32,
    /// For each message the index of its command.
    pub commands: Vec<usize>,
}

impl Encoded {
    pub fn command_of(&self, sequence: u32) -> Option<usize> {
        self.commands.get(sequence.wrapping_sub(self.first_sequence) as usize).copied()
    }
}

/// The messages of a batch as they are written.
struct Batch<'a, S> {
    writer: Writer,
    table: &'a Table,
    sequence: S,
    first_sequence: Option<u32>,
    commands: Vec<usize>,
}

impl<S: FnMut() -> u32> Batch<'_, S> {
    fn message(&mut self, command: usize, kind: u16, extra_flags: u16, body: impl FnOnce(&mut Writer)) {
        let sequence = (self.sequence)();
        let acknowledge = if self.first_sequence.is_none() { flags::ACK } else { 0 };
        self.first_sequence.get_or_insert(sequence);
        let family = self.table.family.number();
        self.writer.message(kind, flags::REQUEST | extra_flags | acknowledge, sequence, |w| {
            w.raw(&[family, 0, 0, 0]);
            body(w);
        });
        self.commands.push(command);
    }

    fn bracket(&mut self, kind: u16) {
        let sequence = (self.sequence)();
        self.writer.message(kind, flags::REQUEST, sequence, |w| w.raw(&[0, 0, 0, (SUBSYSTEM >> 8) as u8]));
    }

    fn command(&mut self, index: usize, command: &Command) {
        let table = self.table;
        let exclusively = |on: bool| flags::CREATE | if on { flags::EXCL } else { 0 };
        match command {
            Command::AddTable { comment, exclusive } => self.message(index, NEW_TABLE, exclusively(*exclusive), |w| {
                w.string(1, &table.name);
                w.be32(2, 0);
                if !comment.is_empty() {
                    w.attribute(TABLE_USERDATA, &user_comment(comment));
                }
            }),
            Command::DeleteTable => self.message(index, DELETE_TABLE, 0, |w| w.string(1, &table.name)),
            Command::AddSet(set) => {
                self.message(index, NEW_SET, flags::CREATE, |w| write_set(w, table, set, index as u32 + 1));
            }
            Command::DeleteSet(name) => self.message(index, DELETE_SET, 0, |w| named(w, table, 2, name)),
            Command::AddChain(chain) => {
                self.message(index, NEW_CHAIN, flags::CREATE, |w| write_chain(w, table, chain));
            }
            Command::DeleteChain(name) => self.message(index, DELETE_CHAIN, 0, |w| named(w, table, 3, name)),
            Command::FlushChain(name) => self.message(index, DELETE_RULE, 0, |w| named(w, table, 2, name)),
            Command::AddRule(rule) => {
                self.message(index, NEW_RULE, flags::CREATE | flags::APPEND, |w| write_rule(w, table, rule));
            }
            Command::AddElements { set, elements, exclusive } => {
                for part in elements.chunks(ELEMENTS_A_MESSAGE) {
                    self.message(index, NEW_ELEMENT, exclusively(*exclusive), |w| {
                        write_elements(w, table, set, |w| part.iter().for_each(|element| write_element(w, element)));
                    });
                }
            }
            Command::DeleteElements { set, keys } => {
                for part in keys.chunks(ELEMENTS_A_MESSAGE) {
                    self.message(index, DELETE_ELEMENT, 0, |w| {
                        write_elements(w, table, set, |w| {
                            for key in part {
                                w.nest(LIST_ITEM, |w| data(w, ELEMENT_KEY, key.as_slice()));
                            }
                        });
                    });
                }
            }
            Command::FlushSet(name) => self.message(index, DELETE_ELEMENT, 0, |w| named(w, table, LIST_SET, name)),
        }
    }
}

/// `None` when an attribute does not fit into its length field.
pub(crate) fn encode(transaction: &Transaction, sequence: impl FnMut() -> u32) -> Option<Encoded> {
    let mut batch = Batch {
        writer: Writer::new(),
        table: &transaction.table,
        sequence,
        first_sequence: None,
        commands: Vec::new(),
    };
    batch.bracket(BATCH_BEGIN);
    for (index, command) in transaction.commands.iter().enumerate() {
        batch.command(index, command);
    }
    batch.bracket(BATCH_END);
    Some(Encoded {
        bytes: batch.writer.finish()?,
        first_sequence: batch.first_sequence.unwrap_or(0),
        commands: batch.commands,
    })
}

fn named(w: &mut Writer, table: &Table, kind: u16, name: &str) {
    w.string(1, &table.name);
    w.string(kind, name);
}

/// nft's user data: type 0 is a comment.
fn user_comment(comment: &str) -> Vec<u8> {
    let mut end = comment.len().min(MAX_COMMENT_BYTES);
    while !comment.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![0, (end + 1) as u8];
    bytes.extend_from_slice(&comment.as_bytes()[..end]);
    bytes.push(0);
    bytes
}

fn write_set(w: &mut Writer, table: &Table, set: &Set, id: u32) {
    let mut set_flags = 0;
    if set.data.is_some() {
        set_flags |= SET_IS_MAP;
    }
    if set.dynamic {
        set_flags |= SET_IS_DYNAMIC;
    }
    if set.timeout.is_some() {
        set_flags |= SET_HAS_TIMEOUT;
    }
    named(w, table, 2, &set.name);
    w.be32(3, set_flags);
    w.be32(4, fields_type(&set.key));
    w.be32(5, fields_len(&set.key));
    match &set.data {
        Some(SetData::Verdict) => {
            w.be32(6, VERDICT_TYPE);
            w.be32(7, 0);
        }
        Some(SetData::Fields(fields)) => {
            w.be32(6, fields_type(fields));
            w.be32(7, fields_len(fields));
        }
        None => {}
    }
    if set.key == [crate::key::Field::LinkName] {
        // For nft alone, which takes a name for a number of the other byte order otherwise.
        const HOST_ORDER: u32 = 1;
        let order = HOST_ORDER.to_ne_bytes();
        w.attribute(SET_USERDATA, &[0, 4, order[0], order[1], order[2], order[3]]);
    }
    if let Some(size) = set.size {
        w.nest(9, |w| w.be32(1, size));
    }
    w.be32(10, id);
    if let Some(timeout) = set.timeout.filter(|timeout| !timeout.is_zero()) {
        w.be64(11, timeout.as_millis() as u64);
    }
}

fn write_chain(w: &mut Writer, table: &Table, chain: &Chain) {
    named(w, table, 3, &chain.name);
    if let Some(hook) = chain.hook {
        w.nest(4, |w| {
            w.be32(1, hook.point as u32);
            w.be32(2, hook.priority.cast_unsigned());
        });
        w.be32(5, hook.policy as u32);
        w.string(
            7,
            match hook.kind {
                ChainKind::Filter => "filter",
                ChainKind::Nat => "nat",
            },
        );
    }
}

fn write_elements(w: &mut Writer, table: &Table, set: &str, items: impl FnOnce(&mut Writer)) {
    w.string(LIST_TABLE, &table.name);
    w.string(LIST_SET, set);
    w.nest(LIST_ELEMENTS, items);
}

fn write_element(w: &mut Writer, element: &Element) {
    w.nest(LIST_ITEM, |w| {
        data(w, ELEMENT_KEY, element.key.as_slice());
        match &element.value {
            Some(Value::Data(bytes)) => data(w, ELEMENT_DATA, bytes.as_slice()),
            Some(Value::Verdict(verdict)) => verdict_data(w, ELEMENT_DATA, verdict),
            None => {}
        }
        if let Some(timeout) = element.timeout {
            w.be64(ELEMENT_TIMEOUT, timeout.as_millis() as u64);
        }
        if let Some(comment) = &element.comment {
            w.attribute(ELEMENT_USERDATA, &user_comment(comment));
        }
    });
}

fn data(w: &mut Writer, kind: u16, value: &[u8]) {
    w.nest(kind, |w| w.attribute(DATA_VALUE, value));
}

fn verdict_data(w: &mut Writer, kind: u16, verdict: &Verdict) {
    let code = match verdict {
        Verdict::Accept => CODE_ACCEPT,
        Verdict::Drop => CODE_DROP,
        Verdict::Return => CODE_RETURN,
        Verdict::Jump(_) => CODE_JUMP,
        Verdict::Goto(_) => CODE_GOTO,
    };
    w.nest(kind, |w| {
        w.nest(DATA_VERDICT, |w| {
            w.be32(VERDICT_CODE, code.cast_unsigned());
            if let Some(chain) = verdict.chain() {
                w.string(VERDICT_CHAIN, chain);
            }
        });
    });
}

fn write_rule(w: &mut Writer, table: &Table, rule: &Rule) {
    named(w, table, 2, &rule.chain);
    w.nest(4, |w| {
        for expression in &rule.expressions {
            w.nest(LIST_ITEM, |w| {
                w.string(1, expression_name(expression));
                w.nest(2, |w| write_expression(w, table, expression));
            });
        }
    });
    if let Some(comment) = &rule.comment {
        w.attribute(RULE_USERDATA, &user_comment(comment));
    }
}

fn expression_name(expression: &Expr) -> &'static str {
    match expression {
        Expr::LoadMeta { .. } | Expr::StoreMark { .. } => "meta",
        Expr::LoadPayload { .. } => "payload",
        Expr::LoadCt { .. } => "ct",
        Expr::LoadFib { .. } => "fib",
        Expr::LoadRandom { .. } => "numgen",
        Expr::LoadBytes { .. } | Expr::Verdict(_) => "immediate",
        Expr::Bitwise { .. } => "bitwise",
        Expr::Compare { .. } => "cmp",
        Expr::Between { .. } => "range",
        Expr::InSet { .. } | Expr::LoadMap { .. } | Expr::VerdictMap { .. } => "lookup",
        Expr::Update { .. } => "dynset",
        Expr::Nat { .. } => "nat",
        Expr::Masquerade => "masq",
        Expr::Reject => "reject",
        Expr::Counter => "counter",
    }
}

fn write_expression(w: &mut Writer, table: &Table, expression: &Expr) {
    match expression {
        Expr::LoadMeta { key, to } => {
            w.be32(2, *key as u32);
            w.be32(1, to.number());
        }
        Expr::StoreMark { from } => {
            w.be32(2, MetaKey::Mark as u32);
            w.be32(3, from.number());
        }
        Expr::LoadPayload { base, offset, len_bytes, to } => {
            for (kind, value) in [(1, to.number()), (2, *base as u32), (3, *offset), (4, *len_bytes)] {
                w.be32(kind, value);
            }
        }
        Expr::LoadCt { key, to } => {
            const ORIGINAL: u8 = 0;
            w.be32(2, *key as u32);
            w.be32(1, to.number());
            if key.is_of_a_direction() {
                w.u8(3, ORIGINAL);
            }
        }
        Expr::LoadFib { result, of_source, to } => {
            w.be32(3, if *of_source { 1 } else { 2 });
            w.be32(2, *result as u32);
            w.be32(1, to.number());
        }
        Expr::LoadRandom { modulus, to } => {
            for (kind, value) in [(1, to.number()), (2, *modulus), (3, 1), (4, 0)] {
                w.be32(kind, value);
            }
        }
        Expr::LoadBytes { value, to } => {
            w.be32(1, to.number());
            data(w, 2, value);
        }
        Expr::Verdict(verdict) => {
            w.be32(1, 0);
            verdict_data(w, 2, verdict);
        }
        Expr::Bitwise { register, mask, xor } => {
            for (kind, value) in [(1, register.number()), (2, register.number()), (3, mask.len() as u32)] {
                w.be32(kind, value);
            }
            data(w, 4, mask);
            data(w, 5, xor);
        }
        Expr::Compare { register, equal, value } => {
            w.be32(1, register.number());
            w.be32(2, u32::from(!equal));
            data(w, 3, value);
        }
        Expr::Between { register, first, last } => {
            const INSIDE: u32 = 0;
            w.be32(1, register.number());
            w.be32(2, INSIDE);
            data(w, 3, first);
            data(w, 4, last);
        }
        Expr::InSet { set, key, inverted } => {
            w.string(1, set);
            w.be32(2, key.number());
            w.be32(5, u32::from(*inverted));
        }
        Expr::LoadMap { map, key, to } => {
            w.string(1, map);
            w.be32(2, key.number());
            w.be32(3, to.number());
        }
        Expr::VerdictMap { map, key } => {
            w.string(1, map);
            w.be32(2, key.number());
            w.be32(3, 0);
        }
        other => write_statement(w, table, other),
    }
}

fn write_statement(w: &mut Writer, table: &Table, expression: &Expr) {
    match expression {
        Expr::Update { set, key, data, timeout } => {
            w.string(1, set);
            w.be32(3, 1);
            w.be32(4, key.number());
            if let Some(data) = data {
                w.be32(5, data.number());
            }
            if let Some(timeout) = timeout {
                w.be64(6, timeout.as_millis() as u64);
            }
        }
        Expr::Nat { kind, address, port } => {
            const MAP_ADDRESS: u32 = 1;
            const MAP_PORT: u32 = 2;
            w.be32(1, *kind as u32);
            w.be32(2, u32::from(table.family.number()));
            w.be32(3, address.number());
            w.be32(4, address.number());
            if let Some(port) = port {
                w.be32(5, port.number());
                w.be32(6, port.number());
            }
            w.be32(7, MAP_ADDRESS | if port.is_some() { MAP_PORT } else { 0 });
        }
        Expr::Masquerade => {
            const RANDOM_FULLY: u32 = 16;
            w.be32(1, RANDOM_FULLY);
        }
        Expr::Reject => {
            const PORT_UNREACHABLE: u8 = 3;
            const PORT_UNREACHABLE_V6: u8 = 4;
            w.be32(1, 0);
            w.u8(2, if table.family == crate::Family::Ip6 { PORT_UNREACHABLE_V6 } else { PORT_UNREACHABLE });
        }
        // A counter starts at zero, and everything else has been written by the caller.
        _ => {}
    }
}
