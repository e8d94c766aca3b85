//! Sets, chains and rules: what is there once for all attachments, and whether it still is.

use ipnet::IpNet;
use oarlock_nft::{Chain, Command, Expr, Family, Field, PayloadBase, Reg, Rule, Set, Table, Transaction};

use crate::owner::stable_hash;

pub const TABLE: &str = "oarlock-cni";

/// The table of an address family.
pub fn table(is_ipv4: bool) -> Table {
    Table::new(if is_ipv4 { Family::Ip } else { Family::Ip6 }, TABLE)
}

/// Every table that the plugins have.
pub(crate) fn tables() -> [Table; 3] {
    [table(true), table(false), crate::spoof_check::table()]
}

pub fn address_field(is_ipv4: bool) -> Field {
    if is_ipv4 { Field::Ipv4 } else { Field::Ipv6 }
}

pub(crate) fn load_source(is_ipv4: bool, to: Reg) -> Expr {
    let (offset, len_bytes) = if is_ipv4 { (12, 4) } else { (8, 16) };
    Expr::LoadPayload { base: PayloadBase::Network, offset, len_bytes, to }
}

pub(crate) fn load_destination(is_ipv4: bool, to: Reg) -> Expr {
    let (offset, len_bytes) = if is_ipv4 { (16, 4) } else { (24, 16) };
    Expr::LoadPayload { base: PayloadBase::Network, offset, len_bytes, to }
}

/// Expressions that go on only when the destination is in `net`.
pub(crate) fn destination_in(net: IpNet) -> Vec<Expr> {
    let bytes = oarlock_netlink::wire::address_bytes;
    let mut expressions = vec![load_destination(net.addr().is_ipv4(), Reg(0))];
    let mask = bytes(net.netmask());
    let xor = vec![0; mask.len()];
    expressions.push(Expr::Bitwise { register: Reg(0), mask, xor });
    expressions.push(Expr::Compare { register: Reg(0), equal: true, value: bytes(net.network()) });
    expressions
}

/// What a kind of parts needs in the table before its elements. Every rule carries a hash of itself as its comment, so that
/// missing, foreign and outdated rules are found by reading comments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foundation {
    pub table: Table,
    sets: Vec<Set>,
    chains: Vec<Chain>,
    /// Chains that others fill: made, but never emptied.
    foreign_chains: Vec<Chain>,
    rules: Vec<Rule>,
}

impl Foundation {
    pub(crate) fn new(table: Table) -> Foundation {
        Foundation { table, sets: Vec::new(), chains: Vec::new(), foreign_chains: Vec::new(), rules: Vec::new() }
    }

    pub(crate) fn set(&mut self, set: Set) {
        self.sets.push(set);
    }

    pub(crate) fn chain(&mut self, chain: Chain) {
        self.chains.push(chain);
    }

    pub(crate) fn foreign_chain(&mut self, chain: Chain) {
        self.foreign_chains.push(chain);
    }

    pub(crate) fn rule(&mut self, chain: &str, expressions: Vec<Expr>) {
        let text: Vec<String> = expressions.iter().map(ToString::to_string).collect();
        let parts: Vec<&str> = text.iter().map(String::as_str).collect();
        let mark = format!("rule {:08x}", stable_hash(&parts) as u32);
        self.rules.push(Rule::new(chain, expressions).comment(mark));
    }

    /// What lays it, or lays it again in the place of what there is.
    pub fn transaction(&self) -> Transaction {
        let mut transaction = Transaction::new(self.table.clone());
        transaction.push(Command::AddTable { comment: String::new(), exclusive: false });
        self.sets.iter().for_each(|set| transaction.push(Command::AddSet(set.clone())));
        for chain in self.foreign_chains.iter().chain(&self.chains) {
            transaction.push(Command::AddChain(chain.clone()));
        }
        self.chains.iter().for_each(|chain| transaction.push(Command::FlushChain(chain.name.clone())));
        self.rules.iter().for_each(|rule| transaction.push(Command::AddRule(rule.clone())));
        transaction
    }

    /// The first chain that does not have its rules; `found` are those of the table, as chain and comment.
    pub fn broken_chain(&self, found: &[(String, String)]) -> Option<&str> {
        let broken = |chain: &&Chain| {
            let wanted = self.rules.iter().filter(|rule| rule.chain == chain.name);
            let wanted = wanted.map(|rule| rule.comment.as_deref().unwrap_or_default());
            !wanted.eq(found.iter().filter(|(name, _)| *name == chain.name).map(|(_, comment)| comment.as_str()))
        };
        self.chains.iter().find(broken).map(|chain| chain.name.as_str())
    }
}
