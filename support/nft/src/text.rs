//! Transactions as text, one line a command, in the manner of `nft --debug=netlink`: for golden files and logs.

use std::fmt;

use crate::expression::{Expr, MetaKey, NatKind, PayloadBase, Reg};
use crate::key::Field;
use crate::model::{Chain, ChainKind, Command, Element, Set, SetData, Transaction, Value, Verdict};

impl fmt::Display for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {}", self.table.family.name(), self.table.name)?;
        self.commands.iter().try_for_each(|command| write!(f, "{command}"))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::AddTable { comment, exclusive } => {
                writeln!(f, "{} table {comment:?}", if *exclusive { "create" } else { "add" })
            }
            Command::DeleteTable => writeln!(f, "delete table"),
            Command::AddSet(set) => writeln!(f, "add {set}"),
            Command::DeleteSet(name) => writeln!(f, "delete set {name}"),
            Command::AddChain(chain) => writeln!(f, "add {chain}"),
            Command::DeleteChain(name) => writeln!(f, "delete chain {name}"),
            Command::FlushChain(name) => writeln!(f, "flush chain {name}"),
            Command::AddRule(rule) => {
                write!(f, "add rule {}", rule.chain)?;
                rule.expressions.iter().try_for_each(|expression| write!(f, " [{expression}]"))?;
                rule.comment.iter().try_for_each(|comment| write!(f, " # {comment}"))?;
                writeln!(f)
            }
            Command::AddElements { set, elements, .. } => {
                elements.iter().try_for_each(|element| writeln!(f, "add element {set} {element}"))
            }
            Command::DeleteElements { set, keys } => {
                keys.iter().try_for_each(|key| writeln!(f, "delete element {set} {key:?}"))
            }
            Command::FlushSet(name) => writeln!(f, "flush set {name}"),
        }
    }
}

fn fields(fields: &[Field]) -> String {
    fields.iter().map(|field| field.name()).collect::<Vec<_>>().join(" . ")
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "set {} {}", self.name, fields(&self.key))?;
        match &self.data {
            Some(SetData::Verdict) => write!(f, " : verdict")?,
            Some(SetData::Fields(data)) => write!(f, " : {}", fields(data))?,
            None => {}
        }
        if self.dynamic {
            write!(f, " dynamic")?;
        }
        if let Some(timeout) = self.timeout {
            write!(f, " timeout {timeout:?}")?;
        }
        self.size.iter().try_for_each(|size| write!(f, " size {size}"))
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {}", self.name)?;
        let Some(hook) = self.hook else { return Ok(()) };
        let kind = match hook.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        };
        let point = format!("{:?}", hook.point).to_lowercase();
        write!(f, " {kind} {point} {} {}", hook.priority, format!("{:?}", hook.policy).to_lowercase())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accept => write!(f, "accept"),
            Verdict::Drop => write!(f, "drop"),
            Verdict::Return => write!(f, "return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.key)?;
        match &self.value {
            Some(Value::Data(bytes)) => write!(f, " : {bytes:?}")?,
            Some(Value::Verdict(verdict)) => write!(f, " : {verdict}")?,
            None => {}
        }
        self.timeout.iter().try_for_each(|timeout| write!(f, " timeout {timeout:?}"))
    }
}

impl fmt::Display for Reg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::LoadMeta { key, to } => {
                let name = match key {
                    MetaKey::Mark => "mark",
                    MetaKey::InputName => "iifname",
                    MetaKey::OutputName => "oifname",
                    MetaKey::L4Protocol => "l4proto",
                };
                write!(f, "{to} = meta {name}")
            }
            Expr::StoreMark { from } => write!(f, "meta mark = {from}"),
            Expr::LoadPayload { base, offset, len_bytes, to } => {
                let base = match base {
                    PayloadBase::Link => "link",
                    PayloadBase::Network => "network",
                    PayloadBase::Transport => "transport",
                };
                write!(f, "{to} = {base}+{offset}/{len_bytes}")
            }
            Expr::LoadCt { key, to } => write!(f, "{to} = ct {}", format!("{key:?}").to_lowercase()),
            Expr::LoadFib { of_source, to, .. } => {
                write!(f, "{to} = fib {} type", if *of_source { "saddr" } else { "daddr" })
            }
            Expr::LoadRandom { modulus, to } => write!(f, "{to} = random mod {modulus}"),
            Expr::LoadBytes { value, to } => write!(f, "{to} = {}", hex(value)),
            Expr::Bitwise { register, mask, xor } => {
                write!(f, "{register} = {register} & {} ^ {}", hex(mask), hex(xor))
            }
            Expr::Compare { register, equal, value } => {
                write!(f, "{register} {} {}", if *equal { "==" } else { "!=" }, hex(value))
            }
            Expr::Between { register, first, last } => write!(f, "{register} in {}-{}", hex(first), hex(last)),
            Expr::InSet { set, key, inverted } => write!(f, "{key} {}in @{set}", if *inverted { "not " } else { "" }),
            Expr::LoadMap { map, key, to } => write!(f, "{to} = @{map}[{key}]"),
            Expr::VerdictMap { map, key } => write!(f, "{key} vmap @{map}"),
            Expr::Update { set, key, data, timeout } => {
                write!(f, "update @{set}[{key}]")?;
                data.iter().try_for_each(|data| write!(f, " = {data}"))?;
                timeout.iter().try_for_each(|timeout| write!(f, " timeout {timeout:?}"))
            }
            Expr::Nat { kind, address, port } => {
                write!(f, "{} to {address}", if *kind == NatKind::Source { "snat" } else { "dnat" })?;
                port.iter().try_for_each(|port| write!(f, ":{port}"))
            }
            Expr::Masquerade => write!(f, "masquerade"),
            Expr::Reject => write!(f, "reject"),
            Expr::Counter => write!(f, "counter"),
            Expr::Verdict(verdict) => write!(f, "{verdict}"),
        }
    }
}
