//! Cluster DNS and the resolvers it asks for other names: stub domains, resolvers that lose, fail or take their time, counts.

#[macro_use]
mod netproxy_world;
mod dns_client;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use dns_client::{Behaviour, Resolver, addresses_of, by_udp, headless, kind_of, question, with_stubs};
use hickory_proto::rr::RecordType;
use netproxy_world::{Family, TIMEOUT, World};
use oarlock_testkit::wait_for;
use serde_json::json;

in_each_mode! {
    domains_with_resolvers_of_their_own_are_asked_of_those
    what_became_of_questions_is_counted
    a_lost_datagram_is_sent_again_from_the_same_socket
    the_next_resolver_is_asked_beside_one_that_is_silent
    an_old_answer_comes_in_time_and_is_renewed_behind
    equal_questions_are_asked_once
    addresses_come_in_any_order
}

/// How long one resolver is asked in vain. An answer that is there before has not waited for that.
const ATTEMPT: Duration = Duration::from_secs(3);

/// A place on the node's loopback.
fn own(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.loopback(), port)
}

/// The addresses that a question gets, and how long that takes.
fn timed(family: Family, name: &str) -> (Vec<IpAddr>, Duration) {
    let begin = Instant::now();
    let answer = by_udp(Some("client"), family, &question(name, kind_of(family))).0;
    (addresses_of(&answer.answers), begin.elapsed())
}

fn domains_with_resolvers_of_their_own_are_asked_of_those(world: &mut World, family: Family) {
    let (kind, own) = (kind_of(family), |port: u16| own(family, port));
    Resolver::start(None, own(5301), &[family.pod(101)], 60);
    Resolver::start(None, own(5302), &[family.pod(102)], 60);
    Resolver::start(None, (family.node(), 53).into(), &[family.pod(103)], 60);
    // Nobody is at the first port of `corp`.
    let stubs: [(&str, &[SocketAddr]); 2] =
        [("corp.example", &[own(5300), own(5301)]), ("lab.corp.example", &[own(5302)])];
    with_stubs(world, &stubs, Some(family.node()));
    for (name, last) in [
        ("www.corp.example.", 101),
        ("WWW.Corp.Example.", 101),
        ("corp.example.", 101),
        ("www.lab.corp.example.", 102),
        ("www.notcorp.example.", 103),
        ("example.", 103),
    ] {
        let answer = by_udp(Some("client"), family, &question(name, kind)).0;
        assert_eq!(addresses_of(&answer.answers), [family.pod(last)], "{name}");
        assert!(!answer.metadata.authoritative && answer.metadata.recursion_available, "{name}");
    }
    // An answer that a resolver cut is asked for again by TCP.
    let answer = by_udp(None, family, &question("large.corp.example.", kind)).0;
    let found: BTreeSet<IpAddr> = addresses_of(&answer.answers).into_iter().collect();
    assert_eq!(found, BTreeSet::from([family.pod(101), Ipv4Addr::new(192, 0, 2, 99).into()]));
    // A Service of another name leads there.
    let alias = format!("alias-{}", family.table());
    world.service(&alias, json!({"type": "ExternalName", "externalName": "www.lab.corp.example"}));
    let asked = question(&format!("{alias}.default.svc.cluster.local."), kind);
    let answer = wait_for("the alias", TIMEOUT, || {
        Some(by_udp(Some("client"), family, &asked).0).filter(|answer| answer.answers.len() == 2)
    });
    assert_eq!(answer.answers[0].record_type(), RecordType::CNAME);
    assert_eq!(addresses_of(&answer.answers), [family.pod(102)]);
}

/// The DNS counters of the metrics, by their names without what all share.
fn counts() -> BTreeMap<String, u64> {
    let mut stream = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, 10_249).into(), TIMEOUT).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
    let text = std::io::read_to_string(stream).unwrap();
    let count = |line: &str| {
        let (name, value) = line.strip_prefix("oarlock_dns_")?.split_once(' ')?;
        Some((name.to_owned(), value.parse().unwrap()))
    };
    text.lines().filter_map(count).collect()
}

fn what_became_of_questions_is_counted(world: &mut World, family: Family) {
    let kind = kind_of(family);
    let name = headless(world, family, "counted", &[family.pod(11)]);
    let own = |port: u16| own(family, port);
    let short = Resolver::start(None, own(5301), &[family.pod(101)], 1);
    Resolver::start(None, own(5302), &[family.pod(102)], 600);
    let stubs: [(&str, &[SocketAddr]); 3] =
        [("short.example", &[own(5301)]), ("long.example", &[own(5302)]), ("none.example", &[own(5300)])];
    with_stubs(world, &stubs, None);
    wait_for("the name", TIMEOUT, || (by_udp(None, family, &question(&name, kind)).0.answers.len() == 1).then_some(()));
    // Each question and the counters that it moves.
    let steps: [(&str, &[&str]); 5] = [
        (&name, &["requests_total"]),
        ("www.long.example.", &["requests_total", "forwarded_total"]),
        ("www.long.example.", &["requests_total", "cache_hits_total"]),
        ("www.none.example.", &["requests_total", "forwarded_total", "forward_failures_total"]),
        ("www.short.example.", &["requests_total", "forwarded_total"]),
    ];
    for (name, moved) in steps {
        let mut wanted = counts();
        for counter in moved {
            *wanted.get_mut(*counter).unwrap_or_else(|| panic!("{counter} is there")) += 1;
        }
        by_udp(Some("client"), family, &question(name, kind));
        assert_eq!(counts(), wanted, "{name}");
    }
    // What was said is over after a second, and then better than nothing.
    short.behave(Behaviour::Fails);
    let before = counts()["stale_answers_total"];
    wait_for("an answer from before", TIMEOUT, || {
        let answer = by_udp(None, family, &question("www.short.example.", kind)).0;
        assert_eq!(addresses_of(&answer.answers), [family.pod(101)]);
        (counts()["stale_answers_total"] == before + 1).then_some(())
    });
}

fn a_lost_datagram_is_sent_again_from_the_same_socket(world: &mut World, family: Family) {
    let resolver = Resolver::start(None, own(family, 5301), &[family.pod(101)], 60);
    resolver.behave(Behaviour::Loses);
    with_stubs(world, &[("lossy.example", &[own(family, 5301)])], None);
    let (found, time) = timed(family, "www.lossy.example.");
    assert_eq!(found, [family.pod(101)]);
    assert!(time < ATTEMPT, "{time:?}");
    // One is lost and one is answered; the last goes where that answer takes its time.
    let heard = resolver.heard("www.lossy.example.");
    assert!((2..=3).contains(&heard.len()) && resolver.sockets("www.lossy.example.").len() == 1, "{heard:?}");
}

/// How often something is looked at that a machine which stands still for a moment may spoil.
const TRIES: u16 = 5;

/// Asks for fresh names, each with this answer, until `passes` says so of one and of the time that it took. Whoever waits for
/// another resolver's turn does so for each.
fn one_of_fresh_names(family: Family, domain: &str, answer: IpAddr, passes: impl Fn(&str, Duration) -> bool) {
    let mut times = Vec::new();
    let passed = (0..TRIES).any(|number| {
        let name = format!("{number}.{domain}");
        let (found, time) = timed(family, &name);
        assert_eq!(found, [answer], "{name} after {time:?}");
        times.push(time);
        passes(&name, time)
    });
    assert!(passed, "{domain}: {times:?}");
}

fn the_next_resolver_is_asked_beside_one_that_is_silent(world: &mut World, family: Family) {
    let (silent, good, failing) = (own(family, 5301), own(family, 5302), own(family, 5303));
    let first = Resolver::start(None, silent, &[family.pod(101)], 60);
    first.behave(Behaviour::Silent);
    let second = Resolver::start(None, good, &[family.pod(102)], 60);
    Resolver::start(None, failing, &[family.pod(103)], 60).behave(Behaviour::Fails);
    let mut domains =
        vec![("slow.example".to_owned(), [silent, good]), ("failing.example".to_owned(), [failing, good])];
    // Where nobody is, nobody is asked for a while after the first question: each name has another such place.
    domains.extend((0..TRIES).map(|number| (format!("{number}.closed.example"), [own(family, 5310 + number), good])));
    let stubs: Vec<(&str, &[SocketAddr])> = domains.iter().map(|(name, servers)| (&**name, &servers[..])).collect();
    with_stubs(world, &stubs, None);
    let (found, time) = timed(family, "a.slow.example.");
    assert_eq!(found, [family.pod(102)]);
    assert!(Duration::from_millis(300) < time && time < ATTEMPT, "{time:?}");
    // Who was silent is asked last for a while.
    let is_spared = |name: &str, _| first.heard(name).is_empty();
    one_of_fresh_names(family, "slow.example.", family.pod(102), is_spared);
    // Who cannot be there is not waited for, nor who says that it failed.
    let is_at_once = |_: &str, time| time < Duration::from_millis(350);
    one_of_fresh_names(family, "closed.example.", family.pod(102), is_at_once);
    one_of_fresh_names(family, "failing.example.", family.pod(102), is_at_once);
    // Last is not never.
    second.behave(Behaviour::Fails);
    first.behave(Behaviour::Answers);
    assert_eq!(timed(family, "c.slow.example.").0, [family.pod(101)]);
}

fn an_old_answer_comes_in_time_and_is_renewed_behind(world: &mut World, family: Family) {
    let resolver = Resolver::start(None, own(family, 5301), &[family.pod(101)], 1);
    with_stubs(world, &[("old.example", &[own(family, 5301)])], None);
    // A machine that stands still may be too late for one.
    let renewed = (0..3).any(|number| is_renewed_behind(family, &resolver, &format!("{number}.old.example.")));
    assert!(renewed, "each answer had to be asked for again");
}

/// Whether an old answer comes while the resolver is waited for, and the new one then from the question that was under way: it
/// comes in the end, and nobody has to wait for it.
fn is_renewed_behind(family: Family, resolver: &Resolver, name: &str) -> bool {
    // Nobody is asked for 30 s after an attempt that failed.
    const RENEWED: Duration = Duration::from_secs(60);
    resolver.behave(Behaviour::Answers);
    resolver.say(&[family.pod(101)], 1);
    assert_eq!(timed(family, name).0, [family.pod(101)]);
    let before = (counts()["stale_answers_total"], resolver.sockets(name).len());
    resolver.behave(Behaviour::Holds);
    resolver.say(&[family.pod(102)], 600);
    // Its time is over after a second.
    let time = wait_for("an old answer", TIMEOUT, || {
        let (found, time) = timed(family, name);
        assert_eq!(found, [family.pod(101)]);
        (counts()["stale_answers_total"] > before.0).then_some(time)
    });
    assert!(Duration::from_millis(1500) < time, "{time:?}");
    resolver.behave(Behaviour::Answers);
    wait_for("the new answer", RENEWED, || (timed(family, name).0 == [family.pod(102)]).then_some(()));
    time < ATTEMPT && resolver.sockets(name).len() == before.1 + 1
}

fn equal_questions_are_asked_once(world: &mut World, family: Family) {
    const NAME: &str = "www.busy.example.";
    let resolver = Resolver::start(None, own(family, 5301), &[family.pod(101)], 60);
    resolver.behave(Behaviour::Late(Duration::from_millis(600)));
    with_stubs(world, &[("busy.example", &[own(family, 5301)])], None);
    std::thread::scope(|scope| {
        for _ in 0..30 {
            scope.spawn(|| assert_eq!(timed(family, NAME).0, [family.pod(101)]));
        }
    });
    assert_eq!(resolver.sockets(NAME).len(), 1, "{:?}", resolver.heard(NAME));
}

fn addresses_come_in_any_order(world: &mut World, family: Family) {
    let all: Vec<IpAddr> = (0..8).map(|number| family.pod(100 + number)).collect();
    Resolver::start(None, own(family, 5301), &all, 600);
    with_stubs(world, &[("many.example", &[own(family, 5301)])], None);
    let cluster = headless(world, family, "any", &all);
    for name in ["www.many.example.", &cluster] {
        let mut firsts = BTreeSet::new();
        for _ in 0..60 {
            let mut found = timed(family, name).0;
            firsts.insert(found[0]);
            found.sort();
            assert_eq!(found, all, "{name}");
        }
        assert!(firsts.len() > 4, "{name}: {firsts:?}");
    }
}
