//! The fixed part of the table, the balancing chains, and elements as nftables has them. Pure.

mod chains;

use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use oarlock_nft::{
    Bytes, Chain, ChainKind, Command, CtKey, Element, Expr, Family, FibResult, Field, HookPoint, Key, MetaKey, Reg,
    Rule, Set, Table, Transaction, Value, Verdict,
};

use crate::element::{Backend, Balancer, Dynamic, ElementKey, Lengths, Map, Scope, Target};
use crate::packet::{Header, in_net, load_port};

pub use chains::dynamic;

/// The mark that the first packet of a connection carries from its balancing to its masquerading; the usual one of
/// Kubernetes, so that other software that keeps clear of it keeps clear of ours.
const MASQUERADE_MARK: u32 = 0x4000;
pub const AFFINITY: &str = "affinity";
const AFFINITY_SIZE: u32 = 262_144;
const AFFINITY_DEFAULT: Duration = Duration::from_secs(10_800);
// Not "reject": nft could not name a chain that is called like one of its own words.
const REJECT: &str = "refuse-now";
const SERVICES: &str = "balance";
const LOCAL: &str = "balance-local";
const NO_ENDPOINTS: &str = "refuse";
const AFTER_BALANCING: &str = "filter-prerouting-last";
const REMEMBER: &str = "remember";
/// What the numbers mean that frontends lead to. The kernel checks a verdict map as a whole whenever it changes, so the one
/// that grows with Services leads to numbers, and only these small ones to chains: one for each kind of hook, because the
/// kernel also checks that all that a hook can lead to is allowed there.
const BALANCERS: &str = "balancers";
const REFUSALS: &str = "refusals";
const REMEMBERERS: &str = "rememberers";
pub const CLASSES: [&str; 3] = [BALANCERS, REFUSALS, REMEMBERERS];
const CLASS_REJECT: u32 = 1;
const CLASS_DROP: u32 = 2;
const DESTINATION_NAT: i32 = -100;
const BEFORE_DESTINATION_NAT: i32 = -110;
const AFTER_DESTINATION_NAT: i32 = -90;
const SOURCE_NAT: i32 = 100;

/// What the fixed part depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub table: Table,
    pub cluster_cidr: IpNet,
    pub service_cidr: IpNet,
    pub dns_address: Option<IpAddr>,
    /// Addresses that nobody but Services has.
    pub balancer_pools: Vec<IpNet>,
    /// Networks of the node's addresses that node ports are served on; all of them where nothing is said.
    pub node_port_addresses: Option<Vec<IpNet>>,
    /// Whether pods of one bridge see each other's answers without passing the node's NAT, because the kernel cannot show
    /// bridged packets to nftables. Then they have to see the node as source.
    pub masquerade_bridged: bool,
}

impl Settings {
    pub fn is_ipv4(&self) -> bool {
        self.table.family == Family::Ip
    }

    fn header(&self) -> Header {
        Header::of(self.is_ipv4())
    }

    fn set(&self, map: Map) -> Set {
        let address = [self.header().address(), Field::Protocol, Field::Port];
        let node_port = [Field::Protocol, Field::Port];
        let endpoint = [self.header().address(), Field::Port];
        match map {
            Map::Services | Map::LocalServices | Map::NoEndpoints | Map::Affine => {
                Set::map(map.name(), &address, &[Field::Mark])
            }
            Map::NodePorts | Map::LocalNodePorts | Map::NoEndpointNodePorts | Map::AffineNodePorts => {
                Set::map(map.name(), &node_port, &[Field::Mark])
            }
            Map::Guarded => Set::verdict_map(map.name(), &address),
            Map::Endpoints | Map::LocalEndpoints => {
                Set::map(map.name(), &[&address[..], &[Field::Mark]].concat(), &endpoint)
            }
            Map::NodePortEndpoints | Map::LocalNodePortEndpoints => {
                Set::map(map.name(), &[&node_port[..], &[Field::Mark]].concat(), &endpoint)
            }
            Map::Hairpin => Set::new(map.name(), &[self.header().address(), self.header().address()]),
            Map::Sources => Set::new(map.name(), &[&address[..], &[self.header().address(), Field::Mark]].concat()),
        }
    }

    /// The bits of an address that a network of a length goes by.
    fn mask(&self, length: u8) -> Vec<u8> {
        let bits = if self.is_ipv4() { 32 } else { 128 };
        (0..bits / 8)
            .map(|byte| {
                let ones = length.saturating_sub(byte * 8).min(8);
                (0xff_u16 << (8 - ones)) as u8
            })
            .collect()
    }

    fn original_address(&self) -> CtKey {
        if self.is_ipv4() { CtKey::OriginalIpv4 } else { CtKey::OriginalIpv6 }
    }

    fn loopback(&self) -> IpNet {
        if self.is_ipv4() {
            IpNet::V4(ipnet::Ipv4Net::new_assert([127, 0, 0, 0].into(), 8))
        } else {
            IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128))
        }
    }

    /// A name for everything that the fixed part and the chains are made of: a table of another version is replaced.
    pub fn marker(&self) -> String {
        let mut text = foundation(self).to_string();
        let balancers = Scope::ALL.into_iter().flat_map(|scope| {
            [false, true].map(|affinity| Dynamic::Balance(Balancer { scope, endpoints: 1, affinity }))
        });
        for chain in balancers.chain([Dynamic::Remember(1), Dynamic::Guard(Lengths::of([1]))]) {
            for command in dynamic(self, &chain) {
                let _ = write!(text, "{command}");
            }
        }
        let hash = text
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        format!("oarlock netproxy {hash:016x}")
    }
}

fn goto(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Goto(chain.into()))
}

fn jump(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Jump(chain.into()))
}

fn load_protocol(to: u8) -> Expr {
    Expr::LoadMeta { key: MetaKey::L4Protocol, to: Reg(to) }
}

fn if_destination_local() -> Vec<Expr> {
    let value = u32::from(libc::RTN_LOCAL).to_ne_bytes().to_vec();
    vec![
        Expr::LoadFib { result: FibResult::AddressType, of_source: false, to: Reg(0) },
        Expr::Compare { register: Reg(0), equal: true, value },
    ]
}

/// Goes on for the first packet of a connection.
fn if_new() -> Vec<Expr> {
    const NEW: u32 = 8;
    let mask = NEW.to_ne_bytes().to_vec();
    vec![
        Expr::LoadCt { key: CtKey::State, to: Reg(0) },
        Expr::Bitwise { register: Reg(0), mask, xor: vec![0; 4] },
        Expr::Compare { register: Reg(0), equal: false, value: vec![0; 4] },
    ]
}

fn frontend_by_address(settings: &Settings) -> Vec<Expr> {
    let next = settings.header().width();
    vec![settings.header().load_destination(0), load_protocol(next), load_port(next + 1)]
}

/// Follows the class that the key in the first registers has in a map.
///
/// nft cannot list a rule that looks up the result of a lookup, and ends in a crash. So the class is the second half of a
/// key of which nft has seen both halves loaded as a constant.
fn follow_class(map: Map) -> [Expr; 3] {
    const KEY: Reg = Reg(8);
    const SECOND_HALF: Reg = Reg(9);
    let classes = match map {
        Map::NoEndpoints | Map::NoEndpointNodePorts => REFUSALS,
        Map::Affine | Map::AffineNodePorts => REMEMBERERS,
        _ => BALANCERS,
    };
    [
        Expr::LoadBytes { value: vec![0; 8], to: KEY },
        Expr::LoadMap { map: map.name().into(), key: Reg(0), to: SECOND_HALF },
        Expr::VerdictMap { map: classes.into(), key: KEY },
    ]
}

fn by_address(settings: &Settings, map: Map) -> Vec<Expr> {
    frontend_by_address(settings).into_iter().chain(follow_class(map)).collect()
}

fn by_node_port(map: Map) -> Vec<Expr> {
    let mut expressions = if_destination_local();
    expressions.extend([load_protocol(0), load_port(1)]);
    expressions.extend(follow_class(map));
    expressions
}

/// Tables, maps, base chains and their rules: everything that does not depend on Services.
pub fn foundation(settings: &Settings) -> Transaction {
    let mut transaction = Transaction::new(settings.table.clone());
    for map in Map::ALL {
        transaction.push(Command::AddSet(settings.set(map)));
    }
    for classes in CLASSES {
        transaction.push(Command::AddSet(Set::verdict_map(classes, &[Field::Mark, Field::Mark])));
    }
    let affinity_key = [settings.header().address(), settings.header().address(), Field::Protocol, Field::Port];
    let affinity = Set::map(AFFINITY, &affinity_key, &[settings.header().address(), Field::Port]);
    transaction.push(Command::AddSet(affinity.dynamic(AFFINITY_SIZE, AFFINITY_DEFAULT)));
    for name in [REJECT, SERVICES, LOCAL, NO_ENDPOINTS, REMEMBER] {
        transaction.push(Command::AddChain(Chain::regular(name)));
    }
    for (name, kind, point, priority) in [
        ("prerouting", ChainKind::Nat, HookPoint::Prerouting, DESTINATION_NAT),
        ("output", ChainKind::Nat, HookPoint::Output, DESTINATION_NAT),
        ("input", ChainKind::Nat, HookPoint::Input, SOURCE_NAT),
        ("postrouting", ChainKind::Nat, HookPoint::Postrouting, SOURCE_NAT),
        ("filter-prerouting", ChainKind::Filter, HookPoint::Prerouting, BEFORE_DESTINATION_NAT),
        ("filter-output-first", ChainKind::Filter, HookPoint::Output, BEFORE_DESTINATION_NAT),
        (AFTER_BALANCING, ChainKind::Filter, HookPoint::Prerouting, AFTER_DESTINATION_NAT),
        ("filter-input", ChainKind::Filter, HookPoint::Input, 0),
        ("filter-output", ChainKind::Filter, HookPoint::Output, 0),
    ] {
        transaction.push(Command::AddChain(Chain::base(name, kind, point, priority)));
    }
    transaction.commands.extend(rules(settings).into_iter().map(Command::AddRule));
    for (classes, element) in fixed_classes() {
        transaction.push(Command::AddElements { set: classes.into(), elements: vec![element], exclusive: false });
    }
    transaction
}

fn fixed_classes() -> [(&'static str, Element); 3] {
    let drop = Element::verdict(class_key(CLASS_DROP), Verdict::Drop);
    let reject = Element::verdict(class_key(CLASS_REJECT), Verdict::Goto(REJECT.into()));
    [(BALANCERS, drop.clone()), (REFUSALS, drop), (REFUSALS, reject)]
}

fn class_key(class: u32) -> Bytes {
    Key::new().mark(0).mark(class).bytes()
}

/// The element by which other elements lead to a chain that comes and goes, and the map that it is in.
pub fn class_of(chain: &Dynamic) -> Option<(&'static str, Element)> {
    let (classes, verdict) = match chain {
        Dynamic::Remember(_) => (REMEMBERERS, Verdict::Jump(chain.chain())),
        _ => (BALANCERS, Verdict::Goto(chain.chain())),
    };
    Some((classes, Element::verdict(class_key(chain.class()?), verdict)))
}

/// All classes of one of the maps, given the chains that come and go.
pub fn classes<'a>(set: &str, chains: impl Iterator<Item = &'a Dynamic>) -> Vec<Element> {
    let all = fixed_classes().into_iter().chain(chains.filter_map(class_of));
    all.filter(|(classes, _)| *classes == set).map(|(_, element)| element).collect()
}

fn rules(settings: &Settings) -> Vec<Rule> {
    let loopback = |verdict: Expr| {
        let mut expressions = in_net(settings.header().load_destination(0), settings.loopback(), true);
        expressions.push(verdict);
        expressions
    };
    let mut from_outside = in_net(settings.header().load_source(0), settings.cluster_cidr, false);
    from_outside.push(jump(LOCAL));
    let mut rules = vec![
        Rule::new(REJECT, vec![Expr::Reject]),
        Rule::new(SERVICES, by_address(settings, Map::Services)).comment(Map::Services.name()),
        Rule::new(SERVICES, loopback(Expr::Verdict(Verdict::Return))).comment("route_localnet stays off"),
        Rule::new(LOCAL, by_address(settings, Map::LocalServices)).comment(Map::LocalServices.name()),
        Rule::new(NO_ENDPOINTS, by_address(settings, Map::NoEndpoints)).comment(Map::NoEndpoints.name()),
        Rule::new(NO_ENDPOINTS, loopback(Expr::Verdict(Verdict::Return))).comment("the node's own, as with endpoints"),
        Rule::new("prerouting", from_outside).comment("externalTrafficPolicy Local"),
        Rule::new("prerouting", vec![jump(SERVICES)]),
        Rule::new("output", vec![jump(SERVICES)]),
        Rule::new(REMEMBER, remember_by_address(settings)).comment(Map::Affine.name()),
        Rule::new(REMEMBER, remember_by_node_port()).comment(Map::AffineNodePorts.name()),
        // Where a packet is once its endpoint is decided: at the node itself, or on its way out.
        Rule::new("input", vec![jump(REMEMBER)]),
        Rule::new("postrouting", vec![jump(REMEMBER)]),
    ];
    for (chain, map) in
        [(SERVICES, Map::NodePorts), (LOCAL, Map::LocalNodePorts), (NO_ENDPOINTS, Map::NoEndpointNodePorts)]
    {
        let rule = |expressions| Rule::new(chain, expressions).comment(map.name());
        if settings.node_port_addresses.is_none() {
            rules.push(rule(by_node_port(map)));
        }
        for net in settings.node_port_addresses.iter().flatten() {
            let on_net = in_net(settings.header().load_destination(0), *net, true);
            rules.push(rule([on_net, by_node_port(map)].concat()));
        }
    }
    rules.extend(postrouting(settings));
    rules.extend(filter(settings));
    rules
}

fn remember_by_address(settings: &Settings) -> Vec<Expr> {
    let next = settings.header().width();
    vec![
        Expr::LoadCt { key: settings.original_address(), to: Reg(0) },
        load_protocol(next),
        Expr::LoadCt { key: CtKey::OriginalPort, to: Reg(next + 1) },
    ]
    .into_iter()
    .chain(follow_class(Map::Affine))
    .collect()
}

fn remember_by_node_port() -> Vec<Expr> {
    let mut expressions = if_destination_changed();
    expressions.extend([load_protocol(0), Expr::LoadCt { key: CtKey::OriginalPort, to: Reg(1) }]);
    expressions.extend(follow_class(Map::AffineNodePorts));
    expressions
}

/// Goes on for connections whose destination was changed.
fn if_destination_changed() -> Vec<Expr> {
    const DNAT: u32 = 0x20;
    let mask = DNAT.to_ne_bytes().to_vec();
    vec![
        Expr::LoadCt { key: CtKey::Status, to: Reg(0) },
        Expr::Bitwise { register: Reg(0), mask: mask.clone(), xor: vec![0; 4] },
        Expr::Compare { register: Reg(0), equal: true, value: mask },
    ]
}

fn postrouting(settings: &Settings) -> Vec<Rule> {
    let mask = MASQUERADE_MARK.to_ne_bytes().to_vec();
    let marked = vec![
        Expr::LoadMeta { key: MetaKey::Mark, to: Reg(0) },
        Expr::Bitwise { register: Reg(0), mask: mask.clone(), xor: vec![0; 4] },
        Expr::Compare { register: Reg(0), equal: true, value: mask },
        Expr::LoadMeta { key: MetaKey::Mark, to: Reg(0) },
        Expr::Bitwise { register: Reg(0), mask: (!MASQUERADE_MARK).to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Expr::StoreMark { from: Reg(0) },
        Expr::Masquerade,
    ];
    let mut hairpin = vec![
        settings.header().load_source(0),
        settings.header().load_destination(settings.header().width()),
        Expr::InSet { set: Map::Hairpin.name().into(), key: Reg(0), inverted: false },
    ];
    // The node's own processes reach its address without any Service too, and have to be seen as themselves.
    hairpin.extend(if_destination_changed());
    hairpin.push(Expr::Masquerade);
    let mut rules = vec![
        Rule::new("postrouting", marked),
        Rule::new("postrouting", hairpin).comment("a pod that reaches itself through a Service"),
    ];
    if settings.masquerade_bridged {
        let mut expressions = if_destination_changed();
        expressions.extend(in_net(settings.header().load_source(0), settings.cluster_cidr, true));
        expressions.extend(in_net(settings.header().load_destination(0), settings.cluster_cidr, true));
        expressions.push(Expr::Masquerade);
        rules.push(Rule::new("postrouting", expressions).comment("no br_netfilter: answers must pass this node"));
    }
    rules
}

fn filter(settings: &Settings) -> Vec<Rule> {
    let mut rules = Vec::new();
    let destination_is = |address: IpAddr| {
        let value = oarlock_netlink::wire::address_bytes(address);
        vec![settings.header().load_destination(0), Expr::Compare { register: Reg(0), equal: true, value }]
    };
    if let Some(address) = settings.dns_address {
        let mut expressions = destination_is(address);
        let mut own_link = b"lo".to_vec();
        own_link.resize(16, 0);
        expressions.push(Expr::LoadMeta { key: MetaKey::InputName, to: Reg(0) });
        expressions.push(Expr::Compare { register: Reg(0), equal: false, value: own_link });
        expressions.extend(in_net(settings.header().load_source(0), settings.cluster_cidr, false));
        expressions.push(Expr::Verdict(Verdict::Drop));
        rules.push(Rule::new("filter-input", expressions).comment("cluster DNS is for pods and this node"));
    }
    for chain in ["filter-prerouting", "filter-output-first"] {
        let follow = Expr::VerdictMap { map: Map::Guarded.name().into(), key: Reg(0) };
        let guarded = [if_new(), frontend_by_address(settings), vec![follow]].concat();
        rules.push(Rule::new(chain, guarded).comment("loadBalancerSourceRanges"));
    }
    // Before the packet is routed: a refusal of one that would be forwarded back out of its own link comes after a redirect,
    // and is then one message too many for the kernel's limits.
    for chain in [AFTER_BALANCING, "filter-output"] {
        rules.push(Rule::new(chain, [if_new(), vec![jump(NO_ENDPOINTS)]].concat()));
    }
    // What is still on its way to a Service address here has no such Service or port.
    for chain in [AFTER_BALANCING, "filter-output"] {
        if let Some(address) = settings.dns_address {
            rules.push(Rule::new(chain, [destination_is(address), vec![Expr::Verdict(Verdict::Return)]].concat()));
        }
        let nets = std::iter::once(&settings.service_cidr).chain(&settings.balancer_pools);
        rules.extend(nets.map(|net| refuse_to(settings, chain, *net)));
    }
    rules
}

/// Refuses what goes to a network.
fn refuse_to(settings: &Settings, chain: &str, net: IpNet) -> Rule {
    let mut expressions = in_net(settings.header().load_destination(0), net, true);
    expressions.push(goto(REJECT));
    Rule::new(chain, expressions)
}

/// How many rules the fixed chains and these others have together.
pub fn rule_count<'a>(settings: &Settings, chains: impl Iterator<Item = &'a Dynamic>) -> usize {
    let of_chain = |chain: &Dynamic| match chain {
        Dynamic::Balance(one) => {
            usize::from(!matches!(one.scope, Scope::Local | Scope::LocalNodePort)) + 1 + usize::from(one.affinity)
        }
        Dynamic::Remember(_) => 1,
        Dynamic::Guard(lengths) => lengths.iter().count() + 1,
    };
    rules(settings).len() + chains.map(of_chain).sum::<usize>()
}

/// The key of an element as the kernel has it. Members of the set of sources are their networks, whatever their number.
pub fn key_bytes(settings: &Settings, key: &ElementKey, target: Target) -> Bytes {
    let address = |bytes: Key| bytes.address(key.address.address());
    let port = |bytes: Key| bytes.protocol(key.protocol.0).port(key.port);
    let whole = match (key.map, target) {
        (Map::Services | Map::LocalServices | Map::NoEndpoints | Map::Affine | Map::Guarded, _) => {
            port(address(Key::new()))
        }
        (Map::NodePorts | Map::LocalNodePorts | Map::NoEndpointNodePorts | Map::AffineNodePorts, _) => port(Key::new()),
        (Map::Endpoints | Map::LocalEndpoints, _) => port(address(Key::new())).mark(key.number),
        (Map::NodePortEndpoints | Map::LocalNodePortEndpoints, _) => port(Key::new()).mark(key.number),
        (Map::Hairpin, _) => address(address(Key::new())),
        (Map::Sources, Target::Source(network, length)) => {
            port(address(Key::new())).address(network.address()).mark(u32::from(length))
        }
        // Nothing else is ever in that set, and a key of this length is in no set.
        (Map::Sources, _) => Key::new(),
    };
    debug_assert_eq!(whole.bytes().as_slice().len() as u32, settings.set(key.map).key_len_bytes(), "{key:?}");
    whole.bytes()
}

/// The value of a map's element.
pub fn value(key: &ElementKey, target: Target) -> Option<Value> {
    let class = |class: u32| Some(Value::Data(Key::new().mark(class).bytes()));
    match target {
        Target::Balance(_) | Target::Remember(_) => target.dynamic().and_then(|chain| class(chain.class()?)),
        Target::Reject => class(CLASS_REJECT),
        Target::Drop if key.map == Map::Guarded => Some(Value::Verdict(Verdict::Drop)),
        Target::Drop => class(CLASS_DROP),
        Target::Guard(lengths) => Some(Value::Verdict(Verdict::Goto(Dynamic::Guard(lengths).chain()))),
        Target::Endpoint(endpoint) => Some(Value::Data(endpoint_bytes(endpoint))),
        Target::Member | Target::Source(..) => None,
    }
}

pub fn element(settings: &Settings, key: &ElementKey, target: Target) -> Element {
    Element { value: value(key, target), ..Element::key(key_bytes(settings, key, target)) }
}

/// An endpoint as the value of a map.
pub fn endpoint_bytes(endpoint: Backend) -> Bytes {
    let socket = endpoint.socket();
    Key::new().address(socket.ip()).port(socket.port()).bytes()
}
