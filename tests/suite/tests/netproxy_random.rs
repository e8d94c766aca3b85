//! Random Services and endpoints one after the other: what the documentation says should happen, what a tracer makes of the
//! rules that the proxy plans, and what happens to real packets in the kernel, must be the same for each packet. The kernel's
//! tables must be those that the tracer goes by.
//!
//! A failure prints how to see its case again.

mod netproxy_world;

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use netproxy_world::sockets::{ask_stream, has_sctp, serve_sctp};
use netproxy_world::{Family, World, at, parse, serve_as};
use nix::sys::socket::SockProtocol;
use oarlock_netlink::{Connection, Protocol, Route};
use oarlock_netproxy::trial::{
    Answer, Case, Ground, Objects, Place, Probe, Replay, Source, Tracer, Transport, Trial, Verdict, describe, node_name,
};
use oarlock_nft::Netlink;
use oarlock_testkit::{in_fresh_namespaces, is_lab};
use serde_json::{Value, json};

/// New cases are begun for so long, for each family. Cases that were asked for get more.
const DURATION: Duration = Duration::from_secs(12);
const DURATION_WANTED: Duration = Duration::from_secs(300);
/// A packet that should come to nobody is given up after this.
const SILENCE: Duration = Duration::from_millis(300);
/// A packet that should be answered or refused has this long.
const PATIENCE: Duration = Duration::from_secs(4);
/// Datagrams and refusals of them can be lost, so one asks again after this.
const AGAIN: Duration = Duration::from_millis(500);
/// The proxy takes its time to hear of a change, and to release clients from endpoints that are gone.
const SETTLED: Duration = Duration::from_secs(8);
/// How often one asks at most until all endpoints have answered.
const ASKED: usize = 90;
const ASKED_STICKY: usize = 4;
const PORTS: [u16; 2] = [8080, 8081];
/// How many wait for nothing at a time.
const CROWD: usize = 96;

fn ground(family: Family) -> Ground {
    let (far, external) = match family {
        Family::V4 => ("10.42.1.5", "198.51.100.0/24"),
        Family::V6 => ("fd2a:0:0:1::5", "fd99::/64"),
    };
    Ground {
        network: family.network(),
        node: [family.node(), family.gateway()],
        loopback: family.loopback(),
        pods: [family.pod(11), family.pod(12)],
        client: family.pod(13),
        far: far.parse().unwrap(),
        outside: family.outside(),
        external: external.parse().unwrap(),
    }
}

/// The namespace of an endpoint, and the name by which its servers answer.
fn server(place: Place) -> (Option<&'static str>, &'static str) {
    match place {
        Place::First => (Some("a"), "a"),
        Place::Second => (Some("b"), "b"),
        Place::Far => (Some("outside"), "far"),
        Place::Node => (None, "node"),
    }
}

/// The name by which an endpoint answers on a port: the pods of the world have servers on the first one.
fn name_at(place: Place, port: u16) -> String {
    let name = server(place).1;
    if port == PORTS[0] { name.to_owned() } else { format!("{name}:{port}") }
}

/// Gives the world what a trial needs beyond its pods: another node's pod behind the neighbour, a route to everywhere as on
/// nearly every machine, and servers.
fn furnish(trial: &Trial) {
    // The kernel refuses only so often each second, which is less often than this test asks.
    for (limit, value) in
        [("ipv4/icmp_ratelimit", "0"), ("ipv6/icmp/ratelimit", "0"), ("ipv4/icmp_msgs_burst", "10000")]
    {
        // The last one belongs to the whole machine on older kernels, and is not here then.
        let path = format!("/proc/sys/net/{limit}");
        assert!(std::fs::write(path, value).is_ok() || limit.ends_with("burst"), "{limit}");
    }
    let mut connection = Connection::open(Protocol::Route).unwrap();
    let link = connection.require_link("to-outside").unwrap().index;
    let mut neighbour = Connection::open_in(Protocol::Route, &netproxy_world::netns("outside")).unwrap();
    let own = neighbour.require_link("eth0").unwrap().index;
    for ground in &trial.grounds {
        neighbour.add_address(own, ground.far.into()).unwrap();
        let anywhere = if ground.is_ipv4() { "0.0.0.0/0" } else { "::/0" }.parse().unwrap();
        for destination in [anywhere, ground.far.into()] {
            connection.add_route(&Route::new(destination, Some(ground.outside), link)).unwrap();
        }
        for place in Place::ALL {
            let (netns, _) = server(place);
            for port in PORTS {
                let (name, address) = (name_at(place, port), SocketAddr::new(ground.place(place), port));
                if port != PORTS[0] || matches!(place, Place::Far | Place::Node) {
                    serve_as(netns, &name, address);
                }
                if has_sctp() {
                    serve_sctp(netns, &name, address);
                }
            }
        }
    }
    assert!(has_sctp() || !is_lab(), "the guest's kernel has SCTP");
}

/// Makes the API hold these objects of the trial and no others.
fn write(world: &World, objects: &Objects) {
    for (resource, wanted) in [("endpointslices", &objects.slices), ("services", &objects.services)] {
        let name = |object: &Value| object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let names: BTreeSet<String> = wanted.iter().map(name).collect();
        for old in world.api.list(resource).iter().filter(|old| old["metadata"]["namespace"] == "default") {
            if !names.contains(&name(old)) {
                world.api.delete(resource, "default", &name(old), json!({}));
            }
        }
        for object in wanted {
            if world.api.get(resource, "default", &name(object)).is_none() {
                world.api.create(object.clone());
                continue;
            }
            world.api.edit(resource, "default", &name(object), |old| {
                let parts = object.as_object().into_iter().flatten().filter(|(part, _)| *part != "metadata");
                parts.for_each(|(part, value)| old[part] = value.clone());
                old["metadata"]["labels"] = object["metadata"]["labels"].clone();
            });
        }
    }
    world.api.edit("nodes", "", node_name(), |node| {
        node["metadata"]["labels"] =
            objects.zone.map_or(json!({}), |zone| json!({"topology.kubernetes.io/zone": zone}));
    });
}

/// What became of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    /// By whom it was answered, and whom they saw.
    Answer(String, IpAddr),
    Refusal,
    Silence,
}

fn ask(ground: &Ground, probe: &Probe, patience: Duration) -> Seen {
    let place = match probe.source {
        Source::Client => Some("client"),
        Source::First => Some("a"),
        Source::Far | Source::Outside => Some("outside"),
        Source::Node => None,
    };
    // Two of them share a namespace, which would choose either address.
    let source = matches!(probe.source, Source::Far | Source::Outside).then(|| ground.source(probe.source));
    let answer = match probe.transport {
        Transport::Tcp => ask_stream(place, SockProtocol::Tcp, source, probe.to, patience),
        Transport::Sctp => ask_stream(place, SockProtocol::Sctp, source, probe.to, patience),
        Transport::Udp => at(place, || ask_datagram(source, probe.to, patience)),
    };
    match answer {
        Ok((name, client)) => Seen::Answer(name, client),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Seen::Refusal,
        Err(_) => Seen::Silence,
    }
}

fn ask_datagram(source: Option<IpAddr>, to: SocketAddr, patience: Duration) -> io::Result<(String, IpAddr)> {
    // A port that was used before would be that flow's, whose endpoint is decided.
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let port = 2000 + NEXT.fetch_add(1, Ordering::Relaxed) % 28_000;
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((source.unwrap_or(any), port))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(patience.min(AGAIN)))?;
    let deadline = Instant::now() + patience;
    let mut buffer = [0; 256];
    let length = loop {
        // A packet of the node's own that is dropped or refused cannot be sent, and a refusal is told afterwards as well.
        let _ = socket.send(b"?");
        match socket.recv(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
            outcome => break outcome?,
        }
    };
    parse(&String::from_utf8_lossy(&buffer[..length])).ok_or_else(|| ErrorKind::InvalidData.into())
}

/// Whether the kernel does to a packet what the model says.
fn check(ground: &Ground, probe: &Probe, wanted: &Verdict) -> Result<(), String> {
    let told = |seen: &Seen| Err(format!("the kernel: {seen:?}, the model: {wanted:?}, of {probe:?}"));
    let (any_of, sticky) = match wanted {
        Verdict::Answered { any_of, sticky } => (any_of, *sticky),
        Verdict::Refused if probe.transport != Transport::Sctp => {
            let seen = ask(ground, probe, PATIENCE);
            return if seen == Seen::Refusal { Ok(()) } else { told(&seen) };
        }
        // A kernel goes on trying to begin an association that was refused.
        Verdict::Dropped | Verdict::Refused => {
            let seen = ask(ground, probe, SILENCE);
            return if seen == Seen::Silence { Ok(()) } else { told(&seen) };
        }
        Verdict::Untouched => {
            let seen = ask(ground, probe, SILENCE);
            return if matches!(seen, Seen::Answer(..)) { told(&seen) } else { Ok(()) };
        }
    };
    let node = [ground.node[0], ground.node[1], ground.loopback, ground.network.cluster_dns];
    let mut answered = BTreeSet::new();
    for _ in 0..if sticky { ASKED_STICKY } else { ASKED } {
        let seen = ask(ground, probe, PATIENCE);
        let Seen::Answer(who, client) = &seen else { return told(&seen) };
        let named = |(address, answer): &(&SocketAddr, &Answer)| name_at(answer.place, address.port()) == *who;
        let Some((address, answer)) = any_of.iter().find(named) else { return told(&seen) };
        let is_right = match probe.source {
            // Which of its addresses the node has taken itself is the kernel's choice.
            Source::Node => node.contains(client),
            _ if answer.masqueraded => node.contains(client),
            source => *client == ground.source(source),
        };
        if !is_right {
            return told(&seen);
        }
        answered.insert(*address);
        if !sticky && answered.len() == any_of.len() {
            return Ok(());
        }
    }
    if sticky && answered.len() == 1 {
        return Ok(());
    }
    Err(format!("the kernel came to {answered:?} of {wanted:?}, of {probe:?}"))
}

/// As [`check`]; clients that are bound to an endpoint may still have to be released after a change.
fn check_settled(ground: &Ground, probe: &Probe, wanted: &Verdict) -> Result<(), String> {
    let deadline = Instant::now() + SETTLED;
    loop {
        let outcome = check(ground, probe, wanted);
        let may_change = matches!(wanted, Verdict::Answered { sticky: true, .. }) && Instant::now() < deadline;
        if outcome.is_ok() || !may_change {
            return outcome;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Sends all packets that say something about a case.
fn all_packets(trial: &Trial, case: &Case, tracer: &mut Tracer) -> Result<usize, String> {
    let named = |probe: &Probe, told| format!("{told}\n{:?}\n{}", case.node, describe(&case.services[probe.service]));
    let mut unanswered = Vec::new();
    let probes = trial.probes(case);
    for probe in &probes {
        let wanted = trial.verdict(case, probe);
        tracer.check(trial, case, probe, &wanted).map_err(|told| named(probe, told))?;
        if probe.transport == Transport::Sctp && !has_sctp() {
            continue;
        }
        if !matches!(wanted, Verdict::Answered { .. }) {
            unanswered.push((*probe, wanted));
            continue;
        }
        check_settled(&trial.grounds[probe.ground], probe, &wanted).map_err(|told| named(probe, told))?;
    }
    // Those that nobody answers are sent together, because each takes its time: a refusal by the caller's own kernel comes
    // while it is still sending, is lost, and comes again a second later.
    for crowd in unanswered.chunks(CROWD) {
        std::thread::scope(|scope| {
            let one = |(probe, wanted): &(Probe, Verdict)| check(&trial.grounds[probe.ground], probe, wanted);
            let waiting: Vec<_> = crowd.iter().map(|sent| (sent.0, scope.spawn(move || one(sent)))).collect();
            waiting.into_iter().try_for_each(|(probe, thread)| {
                thread.join().expect("a packet is sent").map_err(|told| named(&probe, told))
            })
        })?;
    }
    Ok(probes.len())
}

fn run(families: &'static [Family]) {
    in_fresh_namespaces(move || {
        // A new namespace takes this setting over from the host, and ours has to start somewhere.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("forwarding off");
        let mut world = World::start(families);
        let is_filtered = |name| std::fs::read_to_string(format!("/proc/sys/net/bridge/{name}"));
        let masquerade_bridged = !is_filtered("bridge-nf-call-iptables").is_ok_and(|value| value.trim() == "1");
        let replay = Replay::from_environment();
        let grounds = families.iter().map(|family| ground(*family)).collect();
        let trial = Trial { run: replay.run, grounds, masquerade_bridged };
        furnish(&trial);
        try_cases(&mut world, &trial, replay);
    });
}

fn try_cases(world: &mut World, trial: &Trial, replay: Replay) {
    let duration = if replay.is_wanted { DURATION_WANTED } else { DURATION * trial.grounds.len() as u32 };
    let mut kernel = Netlink::open().unwrap();
    let mut tracer: Option<Tracer> = None;
    let mut node = None;
    let (mut cases, mut packets) = (0, 0);
    let begin = Instant::now();
    for number in replay.cases().take_while(|_| begin.elapsed() < duration) {
        let case = trial.case(number);
        let objects = trial.objects(&case);
        let is_set_up_anew = node != Some(case.node);
        if is_set_up_anew {
            world.stop_proxy();
        }
        write(world, &objects);
        if is_set_up_anew {
            let mut config = world.config();
            trial.configure(&case, &mut config);
            tracer = Some(Tracer::new(trial, &config, tracer.take()));
            world.start_proxy_with(config);
            node = Some(case.node);
        }
        let tracer = tracer.as_mut().unwrap();
        tracer.apply(&objects);
        let failed = |told: String| -> usize {
            panic!("case {number} of {:?}: {told}\n{}", world.families, replay.again(number))
        };
        let deadline = Instant::now() + SETTLED;
        let mut differences = tracer.differences(&mut kernel);
        while !differences.is_empty() {
            if Instant::now() > deadline {
                failed(format!("the kernel's tables are not those that were planned:\n{}", differences.join("\n")));
            }
            std::thread::park_timeout(Duration::from_millis(5));
            differences = tracer.differences(&mut kernel);
        }
        packets += all_packets(trial, &case, tracer).unwrap_or_else(failed);
        cases += 1;
    }
    eprintln!(
        "{cases} cases of {:?} with {packets} packets in {:?}, run {}",
        world.families,
        begin.elapsed(),
        trial.run
    );
    assert!(cases > 0);
}

#[test]
fn model_tracer_and_kernel_agree_in_ipv4() {
    run(&[Family::V4]);
}

#[test]
fn model_tracer_and_kernel_agree_in_ipv6() {
    run(&[Family::V6]);
}

#[test]
fn model_tracer_and_kernel_agree_in_both_families() {
    run(&[Family::V4, Family::V6]);
}
