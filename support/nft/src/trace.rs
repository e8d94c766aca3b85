//! A virtual packet on its way through the tables of a [`Fake`]: what the first packet of a connection would meet.
//!
//! Base chains run in the order of their priorities at each hook. Routing is the caller's: `locals` are the addresses of
//! the node, everything else is forwarded.

use std::net::IpAddr;

use crate::expression::{CtKey, Expr, MetaKey, NatKind, PayloadBase, Reg};
use crate::fake::{Fake, FakeTable};
use crate::key::Bytes;
use crate::model::{Element, HookPoint, Table, Value, Verdict};

/// How deep jumps may nest.
const MAX_DEPTH: u32 = 16;

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub protocol: u8,
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// Whether a process of the node itself sends it.
    pub from_node: bool,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It arrives there; `masqueraded` when the source became the node's.
    Delivered {
        destination: IpAddr,
        port: u16,
        masqueraded: bool,
    },
    Rejected,
    Dropped,
}

/// Sends `packet` through all tables of `fake`. `random` draws the numbers that rules ask for, given the modulus.
pub fn trace(fake: &mut Fake, locals: &[IpAddr], packet: Packet, mut random: impl FnMut(u32) -> u32) -> Outcome {
    let original = (packet.destination, packet.destination_port);
    let mut state = State { packet, original, mark: 0, dnat: false, masqueraded: false, locals, random: &mut random };
    let first = if packet.from_node { HookPoint::Output } else { HookPoint::Prerouting };
    let mut hooks = vec![first];
    let mut position = 0;
    while let Some(hook) = hooks.get(position).copied() {
        if let Some(outcome) = run_hook(fake, hook, &mut state) {
            return outcome;
        }
        if hook == first {
            let local = locals.contains(&state.packet.destination);
            hooks.extend(match (packet.from_node, local) {
                (true, _) => vec![HookPoint::Postrouting],
                (false, true) => vec![HookPoint::Input],
                (false, false) => vec![HookPoint::Forward, HookPoint::Postrouting],
            });
        }
        position += 1;
    }
    Outcome::Delivered {
        destination: state.packet.destination,
        port: state.packet.destination_port,
        masqueraded: state.masqueraded,
    }
}

struct State<'a> {
    packet: Packet,
    /// Where the packet was sent at first.
    original: (IpAddr, u16),
    mark: u32,
    dnat: bool,
    masqueraded: bool,
    locals: &'a [IpAddr],
    random: &'a mut dyn FnMut(u32) -> u32,
}

enum Step {
    Continue,
    Return,
    Accept,
    End(Outcome),
}

fn run_hook(fake: &mut Fake, point: HookPoint, state: &mut State<'_>) -> Option<Outcome> {
    let mut bases: Vec<(i32, Table, String)> = Vec::new();
    for (table, content) in &fake.tables {
        for (name, (chain, _)) in &content.chains {
            if let Some(hook) = chain.hook.filter(|hook| hook.point == point) {
                bases.push((hook.priority, table.clone(), name.clone()));
            }
        }
    }
    bases.sort();
    for (_, table, chain) in bases {
        if let Some(content) = fake.tables.get_mut(&table)
            && let Step::End(outcome) = run_chain(content, &chain, state, 0)
        {
            return Some(outcome);
        }
    }
    None
}

fn run_chain(table: &mut FakeTable, chain: &str, state: &mut State<'_>, depth: u32) -> Step {
    let Some((_, rules)) = table.chains.get(chain).filter(|_| depth < MAX_DEPTH).cloned() else {
        return Step::Continue;
    };
    for rule in rules {
        match run_rule(table, &rule.expressions, state, depth) {
            Step::Continue => {}
            step => return step,
        }
    }
    Step::Continue
}

/// The registers of one rule.
struct Registers([u8; 64]);

impl Registers {
    fn store(&mut self, to: Reg, value: &[u8]) {
        let start = usize::from(to.0) * 4;
        let padded = value.len().next_multiple_of(4);
        self.0[start..start + padded].fill(0);
        self.0[start..start + value.len()].copy_from_slice(value);
    }

    fn load(&self, from: Reg, len_bytes: usize) -> &[u8] {
        &self.0[usize::from(from.0) * 4..][..len_bytes]
    }
}

fn run_rule(table: &mut FakeTable, expressions: &[Expr], state: &mut State<'_>, depth: u32) -> Step {
    let mut registers = Registers([0; 64]);
    for expression in expressions {
        match run_expression(table, expression, &mut registers, state) {
            Flow::Next => {}
            Flow::Break => return Step::Continue,
            Flow::Verdict(verdict) => match follow(table, &verdict, state, depth) {
                Step::Continue => {}
                step => return step,
            },
            Flow::Done(step) => return step,
        }
    }
    Step::Continue
}

fn follow(table: &mut FakeTable, verdict: &Verdict, state: &mut State<'_>, depth: u32) -> Step {
    match verdict {
        Verdict::Accept => Step::Accept,
        Verdict::Drop => Step::End(Outcome::Dropped),
        Verdict::Return => Step::Return,
        Verdict::Jump(chain) => match run_chain(table, chain, state, depth + 1) {
            Step::Return => Step::Continue,
            step => step,
        },
        Verdict::Goto(chain) => match run_chain(table, chain, state, depth + 1) {
            Step::Continue => Step::Return,
            step => step,
        },
    }
}

enum Flow {
    Next,
    Break,
    Verdict(Verdict),
    Done(Step),
}

fn run_expression(table: &mut FakeTable, expression: &Expr, registers: &mut Registers, state: &mut State<'_>) -> Flow {
    let go_on_if = |condition: bool| if condition { Flow::Next } else { Flow::Break };
    match expression {
        Expr::LoadMeta { key, to } => match key {
            MetaKey::Mark => registers.store(*to, &state.mark.to_ne_bytes()),
            MetaKey::L4Protocol => registers.store(*to, &[state.packet.protocol]),
            MetaKey::InputName | MetaKey::OutputName => registers.store(*to, &[0; 16]),
        },
        Expr::StoreMark { from } => {
            state.mark = u32::from_ne_bytes(registers.load(*from, 4).try_into().unwrap_or_default())
        }
        Expr::LoadPayload { base, offset, len_bytes, to } => match payload(&state.packet, *base, *offset, *len_bytes) {
            Some(bytes) => registers.store(*to, &bytes),
            None => return Flow::Break,
        },
        Expr::LoadCt { key, to } => {
            const NEW: u32 = 8;
            const DNAT: u32 = 0x20;
            let bytes = match key {
                CtKey::State => NEW.to_ne_bytes().to_vec(),
                CtKey::Status => (if state.dnat { DNAT } else { 0 }).to_ne_bytes().to_vec(),
                CtKey::OriginalPort => state.original.1.to_be_bytes().to_vec(),
                CtKey::OriginalIpv4 | CtKey::OriginalIpv6 => oarlock_netlink::wire::address_bytes(state.original.0),
            };
            registers.store(*to, &bytes);
        }
        Expr::LoadFib { of_source, to, .. } => {
            let address = if *of_source { state.packet.source } else { state.packet.destination };
            let kind = if state.locals.contains(&address) || address.is_loopback() {
                libc::RTN_LOCAL
            } else {
                libc::RTN_UNICAST
            };
            registers.store(*to, &u32::from(kind).to_ne_bytes());
        }
        Expr::LoadRandom { modulus, to } => registers.store(*to, &((state.random)(*modulus) % modulus).to_ne_bytes()),
        Expr::LoadBytes { value, to } => registers.store(*to, value),
        Expr::Bitwise { register, mask, xor } => {
            let old = registers.load(*register, mask.len()).to_vec();
            let new: Vec<u8> = old.iter().zip(mask).zip(xor).map(|((byte, mask), xor)| (byte & mask) ^ xor).collect();
            registers.store(*register, &new);
        }
        Expr::Compare { register, equal, value } => {
            return go_on_if((registers.load(*register, value.len()) == value.as_slice()) == *equal);
        }
        Expr::Between { register, first, last } => {
            let value = registers.load(*register, first.len());
            return go_on_if(value >= first.as_slice() && value <= last.as_slice());
        }
        Expr::InSet { set, key, inverted } => {
            return go_on_if(lookup(table, set, *key, registers).is_some() != *inverted);
        }
        Expr::LoadMap { map, key, to } => match lookup(table, map, *key, registers).and_then(|element| element.value) {
            Some(Value::Data(bytes)) => registers.store(*to, bytes.as_slice()),
            _ => return Flow::Break,
        },
        Expr::VerdictMap { map, key } => {
            if let Some(Value::Verdict(verdict)) = lookup(table, map, *key, registers).and_then(|element| element.value)
            {
                return Flow::Verdict(verdict);
            }
        }
        other => return run_statement(table, other, registers, state),
    }
    Flow::Next
}

fn run_statement(table: &mut FakeTable, expression: &Expr, registers: &Registers, state: &mut State<'_>) -> Flow {
    match expression {
        Expr::Update { set, key, data, timeout } => {
            let value =
                data.and_then(|data| Some(Value::Data(Bytes::from_slice(registers.load(data, data_len(table, set)))?)));
            if let Some(target) = table.sets.get_mut(set)
                && let Some(key) = Bytes::from_slice(registers.load(*key, key_len(&target.declaration)))
            {
                target.elements.entry(key).or_insert(Element { key, value, timeout: *timeout, comment: None });
            }
            Flow::Next
        }
        Expr::Nat { kind, address, port } => {
            let len_bytes = if state.packet.destination.is_ipv4() { 4 } else { 16 };
            let address = oarlock_netlink::wire::read_address(registers.load(*address, len_bytes));
            let port = port.map(|port| u16::from_be_bytes(registers.load(port, 2).try_into().unwrap_or_default()));
            match (kind, address) {
                (NatKind::Destination, Some(address)) => {
                    state.packet.destination = address;
                    state.packet.destination_port = port.unwrap_or(state.packet.destination_port);
                    state.dnat = true;
                }
                (NatKind::Source, Some(_)) => state.masqueraded = true,
                (_, None) => {}
            }
            Flow::Done(Step::Accept)
        }
        Expr::Masquerade => {
            state.masqueraded = true;
            Flow::Done(Step::Accept)
        }
        Expr::Reject => Flow::Done(Step::End(Outcome::Rejected)),
        Expr::Verdict(verdict) => Flow::Verdict(verdict.clone()),
        _ => Flow::Next,
    }
}

fn key_len(set: &crate::Set) -> usize {
    crate::key::fields_len(&set.key) as usize
}

fn data_len(table: &FakeTable, set: &str) -> usize {
    match table.sets.get(set).and_then(|set| set.declaration.data.as_ref()) {
        Some(crate::SetData::Fields(fields)) => crate::key::fields_len(fields) as usize,
        _ => 0,
    }
}

fn lookup(table: &FakeTable, set: &str, key: Reg, registers: &Registers) -> Option<Element> {
    let set = table.sets.get(set)?;
    let key = Bytes::from_slice(registers.load(key, key_len(&set.declaration)))?;
    set.elements.get(&key).cloned()
}

fn payload(packet: &Packet, base: PayloadBase, offset: u32, len_bytes: u32) -> Option<Vec<u8>> {
    let bytes = |address: IpAddr| oarlock_netlink::wire::address_bytes(address);
    let whole = match (base, offset, packet.source.is_ipv4()) {
        (PayloadBase::Network, 12, true) | (PayloadBase::Network, 8, false) => bytes(packet.source),
        (PayloadBase::Network, 16, true) | (PayloadBase::Network, 24, false) => bytes(packet.destination),
        (PayloadBase::Transport, 0, _) => packet.source_port.to_be_bytes().to_vec(),
        (PayloadBase::Transport, 2, _) => packet.destination_port.to_be_bytes().to_vec(),
        _ => return None,
    };
    whole.get(..len_bytes as usize).map(<[u8]>::to_vec)
}
