//! Somebody takes the CNI plugins' nftables table away, wholly or in part, and it is put back from the plugins' records: seen by
//! real packets.

#[macro_use]
mod cni_caller;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cni_caller::{
    Caller, Mode, addresses, are_apart, asked, gateway, neighbour, neighbour_addresses, netns, nft, reaches, serve,
    tell_who_asks,
};
use oarlock_cni_table::{Restorer, STATE_DIR, State, restore};
use oarlock_netns::create_pinned;
use oarlock_testkit::in_fresh_namespaces;
use serde_json::{Value, json};

in_each_mode! {
    what_was_flushed_works_again
    a_record_that_is_refused_keeps_no_other_away
    an_add_tells_what_the_kernel_refuses
    only_what_is_missing_is_put_back
    the_next_add_puts_everything_back
    what_was_deleted_or_refused_stays_away
    nothing_comes_back_while_containers_come_and_go
}

/// A node with a neighbour and a pod `a` that answers on port 80, which is port 8080 of the node.
struct World {
    caller: Caller,
    mode: Mode,
    addresses: Vec<IpAddr>,
}

impl World {
    fn new(mode: Mode) -> World {
        let caller = Caller::new();
        neighbour("outside");
        let mut world = World { caller, mode, addresses: Vec::new() };
        world.addresses = addresses(&world.attach("a", 8080).unwrap());
        tell_who_asks("a", 80);
        world
    }

    fn bridge(&self) -> Value {
        self.caller.masqueraded(self.mode)
    }

    fn portmap(host_port: u16) -> Value {
        json!({
            "name": "net", "type": "portmap",
            "runtimeConfig": {"portMappings": [{"hostPort": host_port, "containerPort": 80, "protocol": "tcp"}]},
        })
    }

    fn attach(&self, container: &str, host_port: u16) -> Result<Value, String> {
        create_pinned(&netns(container)).unwrap();
        let result = self.caller.call("ADD", container, self.bridge(), None)?;
        self.caller.call("ADD", container, World::portmap(host_port), Some(&result))
    }

    /// By address: whether the neighbour sees the node when the pod asks, and whether the neighbour reaches the pod by the
    /// node's port.
    fn works(&self) -> Vec<(bool, bool)> {
        let look = |address: &IpAddr| {
            let (its, nodes) = neighbour_addresses(*address);
            let masqueraded = asked(Some("a"), its, 80).is_ok_and(|seen| seen == nodes);
            (masqueraded, asked(Some("outside"), nodes, 8080).is_ok())
        };
        self.addresses.iter().map(look).collect()
    }

    fn families(&self) -> Vec<&'static str> {
        self.addresses.iter().map(|address| if address.is_ipv4() { "ip" } else { "ip6" }).collect()
    }
}

fn records() -> Vec<PathBuf> {
    let list = |directory: &Path| fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path());
    let files = list(Path::new(STATE_DIR)).flat_map(|directory| list(&directory).collect::<Vec<_>>());
    files.filter(|path| path.file_name().is_some_and(|name| name != "lock")).collect()
}

/// How many network namespaces have records.
fn directories() -> usize {
    fs::read_dir(STATE_DIR).unwrap().count()
}

fn what_was_flushed_works_again(mode: Mode) {
    let world = World::new(mode);
    let families = world.families().len();
    assert_eq!(world.works(), vec![(true, true); families]);
    let mut restorer = Restorer::new(Path::new(STATE_DIR));
    assert_eq!(restorer.restore().unwrap(), 0, "everything is in place");
    assert_eq!(restorer.restore().unwrap(), 0);
    for flush in 0..2 {
        nft("flush ruleset");
        assert_eq!(world.works(), vec![(false, false); families]);
        let put_back = if flush == 0 { restorer.restore() } else { restore(Path::new(STATE_DIR)) }.unwrap();
        assert!(put_back > 0);
        assert_eq!(world.works(), vec![(true, true); families]);
        assert_eq!(restorer.restore().unwrap() + restore(Path::new(STATE_DIR)).unwrap(), 0, "once is enough");
    }
    for address in &world.addresses {
        assert!(asked(Some("a"), gateway(*address), 8080).is_ok(), "the pod reaches itself by the node's port");
    }
}

fn a_record_that_is_refused_keeps_no_other_away(mode: Mode) {
    let world = World::new(mode);
    let families = world.families();
    let mut restorer = Restorer::new(Path::new(STATE_DIR));
    nft("flush ruleset");
    // Somebody's set in the place of the one that host ports need.
    for family in &families {
        nft(&format!("add table {family} oarlock-cni"));
        nft(&format!("add set {family} oarlock-cni hostports {{ type mark; }}"));
    }
    assert!(restorer.restore().unwrap() > 0);
    assert_eq!(world.works(), vec![(true, false); families.len()]);
    let refused: Vec<String> = restorer.refused().iter().map(ToString::to_string).collect();
    assert!(!refused.is_empty() && refused.iter().all(|one| one.contains("common rules")), "{refused:?}");
    assert_eq!(restorer.restore().unwrap(), 0, "the rest is in place");
    assert!(!restorer.refused().is_empty());
    nft("flush ruleset");
    assert!(restorer.restore().unwrap() > 0);
    assert_eq!((world.works(), restorer.refused().len()), (vec![(true, true); families.len()], 0));
}

fn an_add_tells_what_the_kernel_refuses(mode: Mode) {
    let world = World::new(mode);
    nft("flush ruleset");
    // Somebody's chain in the place of one that host ports need, and that hangs on a hook.
    for family in &world.families() {
        nft(&format!("add table {family} oarlock-cni"));
        nft(&format!("add chain {family} oarlock-cni hostports-prerouting"));
    }
    let said = world.attach("b", 8081).unwrap_err();
    assert!(said.contains("restore the table"), "{said}");
    nft("flush ruleset");
    world.attach("c", 8082).unwrap();
    assert!(world.works().into_iter().all(|works| works == (true, true)));
}

fn only_what_is_missing_is_put_back(mode: Mode) {
    let world = World::new(mode);
    let families = world.families();
    let all = vec![(true, true); families.len()];
    for family in &families {
        nft(&format!("add rule {family} oarlock-cni postrouting counter comment foreign"));
        nft(&format!("add table {family} other"));
    }
    assert_eq!(restore(Path::new(STATE_DIR)).unwrap(), families.len(), "a rule that is not ours, in each family");
    let damages: [&dyn Fn(&str) -> String; 5] = [
        &|family| format!("flush table {family} oarlock-cni"),
        &|family| format!("flush chain {family} oarlock-cni postrouting"),
        &|family| format!("flush chain {family} oarlock-cni hostports-dnat"),
        &|family| format!("flush map {family} oarlock-cni pods"),
        &|family| format!("flush map {family} oarlock-cni hostports"),
    ];
    for damage in damages {
        families.iter().for_each(|family| drop(nft(&damage(family))));
        assert_ne!(world.works(), all, "{}", damage("ip"));
        assert!(restore(Path::new(STATE_DIR)).unwrap() > 0);
        assert_eq!(world.works(), all, "{}", damage("ip"));
    }
    let listed = nft("list tables");
    assert!(families.iter().all(|family| listed.contains(&format!("table {family} other"))), "{listed}");
}

fn the_next_add_puts_everything_back(mode: Mode) {
    let world = World::new(mode);
    let families = world.families();
    let all = vec![(true, true); families.len()];
    nft("flush ruleset");
    world.attach("b", 8081).unwrap();
    assert_eq!(world.works(), all);
    families.iter().for_each(|family| drop(nft(&format!("flush table {family} oarlock-cni"))));
    assert_ne!(world.works(), all);
    world.attach("c", 8082).unwrap();
    assert_eq!(world.works(), all);
    let refused = world.attach("d", 8081).unwrap_err();
    assert_eq!(refused, "host port tcp/8081 is taken by another container");
}

fn what_was_deleted_or_refused_stays_away(mode: Mode) {
    let world = World::new(mode);
    assert_eq!(records().len(), 2);
    assert!(world.attach("rival", 8080).is_err());
    assert_eq!(records().len(), 3, "the bridge's part of the rival alone");
    world.caller.call("DEL", "rival", world.bridge(), None).unwrap();
    let second = world.attach("b", 8081).unwrap();
    // Another network's garbage collection leaves all of it alone, and this one's keeps what is valid.
    let mut gc = World::portmap(8081);
    gc["cni.dev/valid-attachments"] = json!([{"containerID": "a", "ifname": "eth0"}]);
    gc["name"] = "other".into();
    world.caller.call("GC", "", gc.clone(), None).unwrap();
    assert_eq!(records().len(), 4);
    gc["name"] = "net".into();
    world.caller.call("GC", "", gc, None).unwrap();
    assert_eq!(records().len(), 3);
    world.caller.call("DEL", "b", world.bridge(), Some(&second)).unwrap();
    nft("flush ruleset");
    restore(Path::new(STATE_DIR)).unwrap();
    assert_eq!(world.works(), vec![(true, true); world.families().len()]);
    for family in world.families() {
        let listed = nft(&format!("list table {family} oarlock-cni"));
        assert!(listed.contains("8080") && !listed.contains("8081"), "{listed}");
    }
    for config in [World::portmap(8080), world.bridge()] {
        world.caller.call("DEL", "a", config, None).unwrap();
    }
    assert_eq!(directories(), 0, "the last DEL takes the namespace's directory along");
    world.attach("c", 8083).unwrap();
    State::remove(Path::new(STATE_DIR), &oarlock_nft::Netlink::open().unwrap()).unwrap();
    assert_eq!(directories(), 0);
    nft("flush ruleset");
    assert_eq!(restore(Path::new(STATE_DIR)).unwrap(), 0);
    assert_eq!(nft("list ruleset"), "");
}

/// Somebody flushes and restores all the time; what DEL took away does not come back, and who stays has everything.
fn nothing_comes_back_while_containers_come_and_go(mode: Mode) {
    let world = World::new(mode);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                nft("flush ruleset");
                restore(Path::new(STATE_DIR)).unwrap();
            }
        });
        let come_and_go = |name: &str, host_port: u16| {
            for round in 0..10 {
                let container = format!("{name}{round}");
                let result = world.attach(&container, host_port).unwrap();
                for config in [World::portmap(host_port), world.bridge()] {
                    world.caller.call("DEL", &container, config, Some(&result)).unwrap();
                }
            }
        };
        let threads = [("b", 8081), ("c", 8082)].map(|(name, port)| scope.spawn(move || come_and_go(name, port)));
        let ended = threads.map(|thread| thread.join());
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    restore(Path::new(STATE_DIR)).unwrap();
    assert_eq!(records().len(), 2);
    assert_eq!(world.works(), vec![(true, true); world.families().len()]);
    let listed = nft("list ruleset");
    assert!(!listed.contains("8081") && !listed.contains("8082"), "{listed}");
    assert_eq!(listed.matches("goto masquerade-").count(), world.families().len(), "{listed}");
}

/// What `oarlock reset` does, beside records of a network namespace that is another node's.
#[test]
fn nothing_empty_is_left_of_the_records() {
    in_fresh_namespaces(|| {
        let temporary = tempfile::tempdir().unwrap();
        let all = temporary.path().join("oarlock-cni");
        let kernel = oarlock_nft::Netlink::open().unwrap();
        let remove = || State::remove(&all, &kernel).unwrap();
        remove();
        let theirs = all.join("1/00000000-0000000000000000.bridge");
        drop(State::open(&all, &kernel).unwrap());
        ["1", "2"].iter().for_each(|other| fs::create_dir(all.join(other)).unwrap());
        fs::write(&theirs, "{}").unwrap();
        remove();
        assert!(theirs.exists());
        assert_eq!(fs::read_dir(&all).unwrap().count(), 1);
        fs::remove_file(&theirs).unwrap();
        remove();
        assert!(!all.exists());
    });
}

/// Records of several networks, a firewall among them; a half-written one and one of another version are passed over.
#[test]
fn bridges_that_were_kept_apart_are_again() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let one = caller.attach("a", caller.bridge("one", 1));
        let two = caller.attach("b", caller.bridge("two", 2));
        ["a", "b"].into_iter().for_each(serve);
        for (container, network, result) in [("a", "one", &one), ("b", "two", &two)] {
            let config = json!({"name": network, "type": "firewall", "ingressPolicy": "same-bridge"});
            caller.call("ADD", container, config, Some(result)).unwrap();
        }
        assert!(are_apart("a", &two));
        let directory = records()[0].parent().unwrap().to_owned();
        fs::write(directory.join("00000000-0000000000000000.future"), r#"{"owner":"x","parts":[{"kind":"new"}]}"#)
            .unwrap();
        fs::write(directory.join("00000000-0000000000000001.half"), r#"{"own"#).unwrap();
        nft("flush ruleset");
        assert_eq!(reaches(Some("a"), &two), [true, true]);
        assert!(restore(Path::new(STATE_DIR)).unwrap() > 0);
        assert!(are_apart("a", &two));
    });
}
