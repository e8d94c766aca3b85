//! The chains that come and go with Services: balancing, remembering clients, and looking whether a source is allowed.

use std::time::Duration;

use oarlock_nft::{Chain, Command, CtKey, Expr, MetaKey, NatKind, Reg, Rule, Verdict};

use super::{AFFINITY, MASQUERADE_MARK, Settings, class_of, load_port, load_protocol};
use crate::element::{Balancer, Dynamic, Lengths, Map, Scope};
use crate::packet::in_net;

/// A chain that comes and goes, with its rules.
pub fn dynamic(settings: &Settings, chain: &Dynamic) -> Vec<Command> {
    let name = chain.chain();
    let rules = match chain {
        Dynamic::Balance(balancer) => balance(settings, balancer),
        Dynamic::Remember(seconds) => vec![remember(settings, *seconds)],
        Dynamic::Guard(lengths) => guard(settings, lengths),
    };
    let mut commands = vec![Command::AddChain(Chain::regular(&name))];
    commands.extend(rules.into_iter().map(|expressions| Command::AddRule(Rule::new(&name, expressions))));
    if let Some((classes, element)) = class_of(chain) {
        commands.push(Command::AddElements { set: classes.into(), elements: vec![element], exclusive: false });
    }
    commands
}

fn balance(settings: &Settings, balancer: &Balancer) -> Vec<Vec<Expr>> {
    let width = settings.header().width();
    let dnat = |map: &str| {
        vec![
            Expr::LoadMap { map: map.into(), key: Reg(0), to: Reg(0) },
            Expr::Nat { kind: NatKind::Destination, address: Reg(0), port: Some(Reg(width)) },
        ]
    };
    let mut rules: Vec<Vec<Expr>> = mark(settings, balancer.scope).into_iter().collect();
    if balancer.affinity {
        let mut known = vec![
            settings.header().load_source(0),
            settings.header().load_destination(width),
            load_protocol(2 * width),
            load_port(2 * width + 1),
        ];
        known.extend(dnat(AFFINITY));
        rules.push(known);
    }
    let mut any = Vec::new();
    let mut next = 0;
    if balancer.scope.is_by_address() {
        any.push(settings.header().load_destination(0));
        next = width;
    }
    any.extend([
        load_protocol(next),
        load_port(next + 1),
        Expr::LoadRandom { modulus: balancer.endpoints.max(1), to: Reg(next + 2) },
    ]);
    any.extend(dnat(balancer.scope.endpoints().name()));
    rules.push(any);
    rules
}

/// Remembers which endpoint a client got, or refreshes that. It runs after the destination was changed, when the endpoint is
/// in the packet itself: nft cannot print a rule that remembers the result of a lookup, and ends in a crash.
fn remember(settings: &Settings, seconds: u32) -> Vec<Expr> {
    let width = settings.header().width();
    let data = 2 * width + 2;
    vec![
        settings.header().load_source(0),
        Expr::LoadCt { key: settings.original_address(), to: Reg(width) },
        load_protocol(2 * width),
        Expr::LoadCt { key: CtKey::OriginalPort, to: Reg(2 * width + 1) },
        settings.header().load_destination(data),
        load_port(data + width),
        Expr::Update {
            set: AFFINITY.into(),
            key: Reg(0),
            data: Some(Reg(data)),
            timeout: Some(Duration::from_secs(u64::from(seconds))),
        },
    ]
}

/// Goes back when the source is in a network that is listed for the frontend, and drops everything else.
fn guard(settings: &Settings, lengths: &Lengths) -> Vec<Vec<Expr>> {
    let width = settings.header().width();
    let source = width + 2;
    let listed = |length: u8| {
        let mask = settings.mask(length);
        let xor = vec![0; mask.len()];
        vec![
            settings.header().load_destination(0),
            load_protocol(width),
            load_port(width + 1),
            settings.header().load_source(source),
            Expr::Bitwise { register: Reg(source), mask, xor },
            Expr::LoadBytes { value: u32::from(length).to_ne_bytes().to_vec(), to: Reg(source + width) },
            Expr::InSet { set: Map::Sources.name().into(), key: Reg(0), inverted: false },
            Expr::Verdict(Verdict::Return),
        ]
    };
    lengths.iter().map(listed).chain([vec![Expr::Verdict(Verdict::Drop)]]).collect()
}

/// The rule that decides about the source address, where there is anything to decide.
fn mark(settings: &Settings, scope: Scope) -> Option<Vec<Expr>> {
    let set_mark = vec![
        Expr::LoadMeta { key: MetaKey::Mark, to: Reg(0) },
        Expr::Bitwise {
            register: Reg(0),
            mask: (!MASQUERADE_MARK).to_ne_bytes().to_vec(),
            xor: MASQUERADE_MARK.to_ne_bytes().to_vec(),
        },
        Expr::StoreMark { from: Reg(0) },
    ];
    match scope {
        Scope::External | Scope::NodePort => Some(set_mark),
        Scope::Cluster | Scope::NodePortCluster => {
            Some([in_net(settings.header().load_source(0), settings.cluster_cidr, false), set_mark].concat())
        }
        Scope::Local | Scope::LocalNodePort => None,
    }
}
