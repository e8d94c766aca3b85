//! `firewall`: which packets are forwarded to containers, by nftables.
//!
//! With `ingressPolicy` `open` everything is, as far as this table is concerned. With `same-bridge`, bridges whose
//! networks say so are kept apart: new connections from one of them to another are dropped, others pass. The administrator's
//! own rules go into the chain `firewall-admin`, which comes first and is never touched.
//!
//! The table is that of [`crate::masquerade`]. What `accept` says here does not overrule other tables that drop.

use oarlock_cni::types::CniResult;
use oarlock_netlink::{Connection, Protocol};
use oarlock_nft::{
    Chain, ChainKind, Command, CtKey, Element, Expr, Field, HookPoint, Kernel, Key, MetaKey, Netlink, NftError, Reg,
    Rule, Set, Transaction, Verdict,
};
use serde::Deserialize;

use crate::call::Call;
use crate::chained::required_result;
use crate::error::{Context, PluginError, Result};
use crate::masquerade::table;
use crate::plugin::Plugin;

pub const PLUGIN: Plugin = Plugin { name: "firewall", add, del, check, status, gc };

const ADMIN: &str = "firewall-admin";
const FORWARD: &str = "firewall-forward";
const BETWEEN: &str = "firewall-between-bridges";
const BRIDGES: &str = "firewall-bridges";
/// Each bridge with itself: inside one, everything passes.
const SAME: &str = "firewall-same-bridge";
/// Where the name of the outgoing link begins in registers.
const SECOND_NAME: Reg = Reg(4);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Open,
    SameBridge,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    backend: Option<String>,
    #[serde(default)]
    ingress_policy: Option<String>,
}

fn read(call: &Call) -> Result<Policy> {
    let raw: Raw = call.config()?;
    if let Some(backend) = raw.backend.filter(|backend| !backend.is_empty() && backend != "nftables") {
        return Err(PluginError::config("backend", format!("{backend:?} is not supported, only \"nftables\"")));
    }
    match raw.ingress_policy.as_deref() {
        None | Some("" | "open") => Ok(Policy::Open),
        Some("same-bridge") => Ok(Policy::SameBridge),
        Some(other) => Err(PluginError::config("ingressPolicy", format!("{other:?} is unknown"))),
    }
}

fn nft(what: &'static str) -> impl Fn(NftError) -> PluginError {
    move |source| PluginError::Nft { what, source }
}

fn load_names() -> Vec<Expr> {
    vec![
        Expr::LoadMeta { key: MetaKey::InputName, to: Reg(0) },
        Expr::LoadMeta { key: MetaKey::OutputName, to: SECOND_NAME },
    ]
}

/// Chains, sets and rules: the same however often they are made, without the administrator's rules.
fn foundation(is_ipv4: bool) -> Transaction {
    let mut transaction = Transaction::new(table(is_ipv4));
    transaction.push(Command::AddTable { comment: String::new(), exclusive: false });
    transaction.push(Command::AddSet(Set::new(BRIDGES, &[Field::LinkName])));
    transaction.push(Command::AddSet(Set::new(SAME, &[Field::LinkName, Field::LinkName])));
    transaction.push(Command::AddChain(Chain::regular(ADMIN)));
    transaction.push(Command::AddChain(Chain::regular(BETWEEN)));
    transaction.push(Command::AddChain(Chain::base(FORWARD, ChainKind::Filter, HookPoint::Forward, 0)));
    for chain in [FORWARD, BETWEEN] {
        transaction.push(Command::FlushChain(chain.into()));
    }
    let established = (2_u32 | 4).to_ne_bytes().to_vec();
    let known = vec![
        Expr::LoadCt { key: CtKey::State, to: Reg(0) },
        Expr::Bitwise { register: Reg(0), mask: established, xor: vec![0; 4] },
        Expr::Compare { register: Reg(0), equal: false, value: vec![0; 4] },
        Expr::Verdict(Verdict::Accept),
    ];
    let in_bridges = |key| Expr::InSet { set: BRIDGES.into(), key, inverted: false };
    let mut between = load_names();
    between.extend([in_bridges(Reg(0)), in_bridges(SECOND_NAME), Expr::Verdict(Verdict::Jump(BETWEEN.into()))]);
    let mut same = load_names();
    same.push(Expr::InSet { set: SAME.into(), key: Reg(0), inverted: false });
    same.push(Expr::Verdict(Verdict::Return));
    for (chain, expressions) in [
        (FORWARD, vec![Expr::Verdict(Verdict::Jump(ADMIN.into()))]),
        (FORWARD, known),
        (FORWARD, between),
        (BETWEEN, same),
        (BETWEEN, vec![Expr::Verdict(Verdict::Drop)]),
    ] {
        transaction.push(Command::AddRule(Rule::new(chain, expressions)));
    }
    transaction
}

/// The bridge that the result names: the first link of the host, as the plugin `bridge` tells it.
fn bridge_of(result: &CniResult) -> Result<String> {
    let host = |sandbox: Option<&String>| sandbox.is_none_or(String::is_empty);
    let mut connection = Connection::open(Protocol::Route).context(|| "cannot talk to the kernel".into())?;
    for interface in result.interfaces.iter().filter(|one| host(one.sandbox.as_ref())) {
        let link = connection.link(&interface.name).context(|| format!("look up {}", interface.name))?;
        if link.is_some_and(|link| link.kind.as_deref() == Some("bridge")) {
            return Ok(interface.name.clone());
        }
    }
    Err(PluginError::config("prevResult", "names no bridge, which \"same-bridge\" needs"))
}

fn families(result: &CniResult) -> Vec<bool> {
    let addresses = result.container_ips();
    [true, false].into_iter().filter(|is_ipv4| addresses.iter().any(|one| one.is_ipv4() == *is_ipv4)).collect()
}

fn keys(bridge: &str) -> [(&'static str, oarlock_nft::Bytes); 2] {
    [(BRIDGES, Key::new().link_name(bridge).bytes()), (SAME, Key::new().link_name(bridge).link_name(bridge).bytes())]
}

fn add(call: &Call) -> Result<CniResult> {
    let policy = read(call)?;
    let result = required_result(call, "firewall")?;
    let bridge = if policy == Policy::SameBridge { Some(bridge_of(&result)?) } else { None };
    let failed = nft("cannot set up the firewall");
    let mut kernel = Netlink::open().map_err(&failed)?;
    for is_ipv4 in families(&result) {
        let mut elements = Transaction::new(table(is_ipv4));
        for (set, key) in bridge.iter().flat_map(|bridge| keys(bridge)) {
            let elements_of = vec![Element::key(key)];
            elements.push(Command::AddElements { set: set.into(), elements: elements_of, exclusive: false });
        }
        let has_chain = kernel.chains(&table(is_ipv4)).map_err(&failed)?.iter().any(|name| name == FORWARD);
        let mut whole = if has_chain { Transaction::new(table(is_ipv4)) } else { foundation(is_ipv4) };
        whole.commands.append(&mut elements.commands);
        kernel.commit(&whole).map_err(&failed)?;
    }
    Ok(result)
}

/// What belongs to bridges that are gone. A bridge is kept apart from the others as long as it exists, whichever of its
/// containers asked for it.
fn del(call: &Call) -> Result<()> {
    read(call)?;
    let failed = nft("cannot clean up the firewall");
    let mut kernel = Netlink::open().map_err(&failed)?;
    let mut connection = Connection::open(Protocol::Route).context(|| "cannot talk to the kernel".into())?;
    for is_ipv4 in [true, false] {
        let table = table(is_ipv4);
        for element in kernel.elements(&table, BRIDGES).map_err(&failed)?.unwrap_or_default() {
            let name = oarlock_netlink::wire::read_string(element.key.as_slice());
            if connection.link(&name).context(|| format!("look up {name}"))?.is_some() {
                continue;
            }
            let mut transaction = Transaction::new(table.clone());
            for (set, key) in keys(&name) {
                transaction.push(Command::DeleteElements { set: set.into(), keys: vec![key] });
            }
            match kernel.commit(&transaction) {
                Err(error) if error.is_not_found() => {}
                other => other.map_err(&failed)?,
            }
        }
    }
    Ok(())
}

fn check(call: &Call) -> Result<()> {
    let policy = read(call)?;
    let result = required_result(call, "firewall")?;
    let failed = nft("cannot read the firewall");
    let mut kernel = Netlink::open().map_err(&failed)?;
    for is_ipv4 in families(&result) {
        let table = table(is_ipv4);
        if !kernel.chains(&table).map_err(&failed)?.iter().any(|name| name == FORWARD) {
            return Err(PluginError::Drift(format!("chain {FORWARD} is missing")));
        }
        if policy == Policy::SameBridge {
            let bridge = bridge_of(&result)?;
            for (set, key) in keys(&bridge) {
                if kernel.element(&table, set, &key).map_err(&failed)?.is_none() {
                    return Err(PluginError::Drift(format!("{bridge} is not in {set}")));
                }
            }
        }
    }
    Ok(())
}

fn status(call: &Call) -> Result<()> {
    read(call)?;
    Netlink::open().map(drop).map_err(nft("nftables cannot be used"))
}

fn gc(call: &Call) -> Result<()> {
    del(call)
}
