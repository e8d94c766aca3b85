//! Three whole machines as one cluster: the first has the control plane, the others join it by tokens, as a user would have them
//! do it. Each has its own runtime, agent and proxy; a link is cut and mended. In IPv4, in IPv6 and in both.

mod yard;

use std::collections::BTreeSet;
use std::process::Output;
use std::time::Duration;

use oarlock_testkit::{Snapshot, image_archive, in_fresh_namespaces, wait_for};
use yard::{Machine, Mode, in_url, text};

const PATIENCE: Duration = Duration::from_secs(60);
/// A lost node is missed after 40 s.
const LOSS: Duration = Duration::from_secs(75);

/// The pods, each of which tells its name, in the order of the machines.
const PAGES: [&str; 3] = ["web-a", "web-b", "web-c"];

/// A page on each machine, one Service over all, and one of the first machine's page alone, on a port of every node.
fn manifest() -> String {
    let mut all = String::new();
    for node in ["a", "b", "c"] {
        all.push_str(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-{node}, labels: {{app: web, place: {node}}}}}\nspec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 0\n  tolerations: [{{operator: Exists}}]\n  containers:\n  - {{name: web, image: \"oarlock.local/testimage:1\", command: [/bin/http, \"8080\"]}}\n---\n"
        ));
    }
    all.push_str("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ipFamilyPolicy: PreferDualStack, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n---\n");
    all.push_str("apiVersion: v1\nkind: Service\nmetadata: {name: first}\nspec: {type: NodePort, ipFamilyPolicy: PreferDualStack, selector: {place: a}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}\n");
    all
}

/// The cluster as kubectl sees it from the first machine.
struct Cluster<'a>(&'a Machine);

impl Cluster<'_> {
    fn try_kubectl(&self, line: &str) -> Output {
        let program = std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into());
        let mut command = self.0.command(program);
        command.arg("--kubeconfig").arg(self.0.data_dir().join("admin.kubeconfig"));
        command.args(line.split(' ')).output().expect("kubectl")
    }

    fn kubectl(&self, line: &str) -> String {
        let output = self.try_kubectl(line);
        assert!(output.status.success(), "kubectl {line}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn wait(&self, line: &str, what: &str, patience: Duration, wanted: impl Fn(&str) -> bool) -> String {
        wait_for(what, patience, || {
            let output = self.try_kubectl(line);
            let said = text(&output.stdout);
            (output.status.success() && wanted(&said)).then_some(said)
        })
    }

    /// What a pod gets from there; none where nobody answers soon.
    fn fetch(&self, pod: &str, target: &str) -> Option<String> {
        self.fetch_within(pod, target, 2)
    }

    fn fetch_within(&self, pod: &str, target: &str, seconds: u32) -> Option<String> {
        let output = self.try_kubectl(&format!("exec {pod} -- /bin/fetch {target} {seconds}"));
        output.status.success().then(|| text(&output.stdout).trim().to_owned())
    }

    /// Waits for the first command in a pod of a node, which comes when the node's serving certificate has: the node runs pods
    /// before.
    fn until_entered(&self, pod: &str) {
        self.wait(&format!("exec {pod} -- /bin/cat /etc/hostname"), &format!("a command in {pod}"), PATIENCE, |_| true);
    }

    /// Waits for so many endpoints in every family.
    fn ready_endpoints(&self, mode: Mode, count: usize, patience: Duration) {
        let line = "get endpointslices -l kubernetes.io/service-name=web -o jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].nodeName}";
        let wanted = count * mode.prefixes().len();
        self.wait(line, &format!("{wanted} ready endpoints"), patience, |said| {
            said.split_whitespace().count() == wanted
        });
    }

    /// The words that a path leads to.
    fn words(&self, object: &str, path: &str) -> Vec<String> {
        self.kubectl(&format!("get {object} -o jsonpath={{{path}}}")).split_whitespace().map(str::to_owned).collect()
    }

    fn node_is(&self, node: &str, status: &str, patience: Duration) {
        let line = format!("get node {node} -o jsonpath={{.status.conditions[?(@.type==\"Ready\")].status}}");
        self.wait(&line, &format!("node {node} to be {status}"), patience, |said| said == status);
    }
}

/// The words after `oarlock` of the command that a new token comes with.
fn join_command(server: &Machine) -> String {
    let said = server.oarlock("token create --description yard");
    let line = said.lines().find_map(|line| line.trim().strip_prefix("oarlock ")).expect("a command");
    line.to_owned()
}

fn joining_is_guarded(server: &Machine, machine: &Machine) {
    let command = join_command(server);
    let wrong_pin = command.replace("sha256:", "sha256:00").split_at(command.len()).0.to_owned();
    let refused = machine.try_oarlock(&format!("{wrong_pin} --detach"));
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("is not the one with sha256:00"), "{}", text(&refused.stderr));
    let at = command.find("--token ").expect("a token") + "--token ".len();
    let wrong_token = format!("{}zzzzzz.0123456789abcdef{}", &command[..at], &command[at + 23..]);
    let refused = machine.try_oarlock(&format!("{wrong_token} --detach"));
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("the token is not good"), "{}", text(&refused.stderr));
    assert!(!machine.data_dir().join("joined.yaml").exists(), "nothing was joined");
    let id = &command[at..at + 6];
    let listed = server.oarlock("token list");
    assert!(listed.contains(id) && listed.contains("yard") && !listed.contains(&command[at + 7..at + 23]), "{listed}");
    server.oarlock(&format!("token delete {id}"));
    assert!(!server.oarlock("token list").contains(id));
}

fn everybody_reaches_everybody(mode: Mode, cluster: &Cluster<'_>, machines: [&Machine; 3]) {
    for to in PAGES {
        let addresses = cluster.words(&format!("pod {to}"), ".status.podIPs[*].ip");
        assert_eq!(addresses.len(), mode.prefixes().len(), "{addresses:?}");
        for (address, prefix) in addresses.iter().zip(mode.prefixes()) {
            assert_eq!(address.contains(':'), prefix.contains(':'), "the primary family first: {addresses:?}");
            for from in PAGES {
                let target = format!("{}:8080/hostname", in_url(address));
                let page = wait_for(&format!("{from} to reach {address}"), PATIENCE, || cluster.fetch(from, &target));
                assert_eq!(page, to, "from {from} by {address}");
            }
        }
    }
    services_lead_to_pods(mode, cluster, machines);
    for (pod, machine) in PAGES.iter().zip(machines) {
        assert_eq!(cluster.words(&format!("pod {pod}"), ".status.hostIPs[*].ip"), machine.addresses);
        assert!(cluster.try_kubectl(&format!("logs {pod}")).status.success(), "logs of {pod}");
    }
}

fn services_lead_to_pods(mode: Mode, cluster: &Cluster<'_>, machines: [&Machine; 3]) {
    let addresses = cluster.words("service web", ".spec.clusterIPs[*]");
    assert_eq!(addresses.len(), mode.prefixes().len(), "{addresses:?}");
    for address in &addresses {
        let mut seen = BTreeSet::new();
        wait_for("all three pods through the Service's address", PATIENCE, || {
            seen.extend(cluster.fetch("web-b", &format!("{}:80/hostname", in_url(address))));
            (seen.len() == 3).then_some(())
        });
    }
    for from in PAGES {
        let mut seen = BTreeSet::new();
        wait_for("all three pods through the Service's name", PATIENCE, || {
            seen.extend(cluster.fetch(from, "web.default:80/hostname"));
            (seen.len() == 3).then_some(())
        });
    }
    for from in machines {
        for to in machines {
            for address in &to.addresses {
                let url = format!("http://{}:30080/hostname", in_url(address));
                let what = format!("the port of {address} from {}", from.name);
                let page = wait_for(&what, PATIENCE, || from.page(&url));
                assert_eq!(page, "web-a", "{what}");
            }
        }
    }
}

/// A NetworkPolicy on one machine knows pods of the others, in every family.
fn policies_know_pods_of_other_machines(cluster: &Cluster<'_>, server: &Machine) {
    let addresses = cluster.words("pod web-a", ".status.podIPs[*].ip");
    let until = |from: &str, wanted: bool| {
        for address in &addresses {
            let target = format!("{}:8080/hostname", in_url(address));
            wait_for(&format!("{from} to {address}: {wanted}"), PATIENCE, || {
                (cluster.fetch(from, &target).is_some() == wanted).then_some(())
            });
        }
    };
    let manifest = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: guard}\nspec:\n  podSelector: {matchLabels: {place: a}}\n  ingress:\n  - from: [{podSelector: {matchLabels: {place: b}}}]\n";
    let file = server.data_dir().join("policy.yaml");
    std::fs::write(&file, manifest).expect("write");
    cluster.kubectl(&format!("apply -f {}", file.display()));
    until("web-c", false);
    until("web-b", true);
    cluster.kubectl("label pod web-c place=b --overwrite");
    until("web-c", true);
    cluster.kubectl("label pod web-c place=c --overwrite");
    until("web-c", false);
    cluster.kubectl("delete networkpolicy guard");
    until("web-c", true);
    std::fs::remove_file(file).expect("remove");
}

/// Names have the addresses of their families, at the DNS address of each family.
fn names_have_addresses_of_each_family(mode: Mode, cluster: &Cluster<'_>) {
    for address in cluster.words("service web", ".spec.clusterIPs[*]") {
        let kind = if address.contains(':') { "AAAA" } else { "A" };
        let said =
            cluster.wait(&format!("exec web-c -- /bin/resolve web.default {kind}"), "a name", PATIENCE, |_| true);
        assert_eq!(said.trim(), address);
    }
    let servers = cluster.kubectl("exec web-c -- /bin/cat /etc/resolv.conf");
    assert_eq!(servers.matches("nameserver ").count(), mode.prefixes().len(), "{servers}");
}

/// A link that is cut for a moment needs nobody's help.
fn a_short_cut_heals(cluster: &Cluster<'_>, cut: &Machine) {
    let addresses = cluster.words("pod web-c", ".status.podIPs[*].ip");
    cut.set_link(false);
    for address in &addresses {
        assert_eq!(cluster.fetch("web-a", &format!("{}:8080/hostname", in_url(address))), None);
    }
    cut.set_link(true);
    for address in &addresses {
        wait_for("the pod that was cut off", PATIENCE, || {
            (cluster.fetch("web-a", &format!("{}:8080/hostname", in_url(address)))? == "web-c").then_some(())
        });
    }
}

/// What a node has in hand is what it needs: a certificate for itself, one to serve with, and one for its proxy.
fn certificates_are_signed(cluster: &Cluster<'_>) {
    let show = "get csr -o jsonpath={range.items[*]}{.spec.username}:{.spec.signerName}:{.status.conditions[*].type}{\"\\n\"}{end}";
    let wanted = |node: &str| {
        [
            format!("system:node:{node}:kubernetes.io/kubelet-serving:Approved"),
            format!("system:node:{node}:kubernetes.io/kube-apiserver-client:Approved"),
        ]
    };
    let all: Vec<String> = ["b", "c"].iter().flat_map(|node| wanted(node)).collect();
    let said = cluster.wait(show, "signed certificates", PATIENCE, |said| all.iter().all(|one| said.contains(one)));
    assert_eq!(said.matches("system:bootstrap:").count(), 2, "{said}");
    let may = |what: &str| text(&cluster.try_kubectl(&format!("auth can-i {what} --as system:kube-proxy")).stdout);
    assert_eq!(may("watch endpointslices.discovery.k8s.io").trim(), "yes");
    assert_eq!(may("get secrets").trim(), "no");
    assert_eq!(may("create certificatesigningrequests.certificates.k8s.io").trim(), "no");
}

fn a_lost_machine_is_missed_and_comes_back(mode: Mode, cluster: &Cluster<'_>, lost: &Machine) {
    lost.set_link(false);
    cluster.node_is("c", "Unknown", LOSS);
    cluster.ready_endpoints(mode, 2, PATIENCE);
    let is_left = |answer: &Option<String>| matches!(answer.as_deref(), Some("web-a" | "web-b"));
    // The proxy of the other machine hears of it after the API.
    wait_for("nothing to lead to the lost machine", PATIENCE, || {
        (0..6).all(|_| is_left(&cluster.fetch("web-b", "web.default:80/hostname"))).then_some(())
    });
    for _ in 0..12 {
        let answer = cluster.fetch_within("web-b", "web.default:80/hostname", 10);
        assert!(is_left(&answer), "{answer:?}");
    }
    lost.set_link(true);
    cluster.node_is("c", "True", PATIENCE);
    cluster.ready_endpoints(mode, 3, PATIENCE);
    wait_for("the pod that was cut off", PATIENCE, || {
        let address = cluster.kubectl("get pod web-c -o jsonpath={.status.podIP}");
        (cluster.fetch("web-b", &format!("{address}:8080/hostname"))? == "web-c").then_some(())
    });
}

fn a_node_goes_on_without_a_token(cluster: &Cluster<'_>, server: &Machine, machine: &Machine) {
    let started = "get pod web-b -o jsonpath={.metadata.uid}{.status.containerStatuses[0].containerID}";
    let before = cluster.kubectl(started);
    machine.oarlock("stop --keep-pods");
    let told = format!("a node of the cluster at https://{}:6443", in_url(&server.addresses[0]));
    assert!(text(&machine.try_oarlock("up").stderr).contains(&told));
    machine.oarlock("join --detach");
    cluster.node_is("b", "True", PATIENCE);
    assert_eq!(cluster.kubectl(started), before, "the pod ran on");
    assert!(!machine.data_dir().join("bootstrap.kubeconfig").exists(), "the token is kept no longer than needed");
}

fn expired_tokens_go(cluster: &Cluster<'_>, server: &Machine) {
    let token = server.oarlock("token create --ttl 1s --quiet");
    let (id, _) = token.trim().split_once('.').expect("a token");
    wait_for("the expired token to go", PATIENCE, || {
        let output = cluster.try_kubectl(&format!("get secret -n kube-system bootstrap-token-{id}"));
        text(&output.stderr).contains("NotFound").then_some(())
    });
}

/// The pid of a daemon of a machine, by its command line.
fn daemon(machine: &Machine, name: &str) -> i32 {
    let directory = machine.data_dir().to_string_lossy().into_owned();
    let is_it = |process: &procfs::process::Process| {
        let words = process.cmdline().unwrap_or_default();
        words.last().is_some_and(|last| last == name) && words.contains(&directory)
    };
    let mut all = procfs::process::all_processes().expect("/proc").flatten();
    all.find(is_it).unwrap_or_else(|| panic!("{name} is not running")).pid
}

/// The server starts anew while a node is cut off, and nothing of the node's old connections comes through any more, either
/// way, as behind a firewall that forgot them: the node has to notice by itself, and soon. Its Services are what tells.
fn a_node_notices_connections_that_died_in_silence(cluster: &Cluster<'_>, server: &Machine, cut: &Machine) {
    // Longer than anybody who looks every so often needs, and a fifth of what a watch lasts that nobody ends.
    const NOTICED: Duration = Duration::from_secs(60);
    let service = |name: &str| {
        cluster.kubectl(&format!("expose pod web-a --name={name} --port=80 --target-port=8080"));
        cluster.words(&format!("service {name}"), ".spec.clusterIP").remove(0)
    };
    let page = |address: &str| {
        let page = cut.page(&format!("http://{}/hostname", in_url(address)));
        (page.as_deref() == Some("web-a")).then_some(())
    };
    let early = service("early");
    wait_for("a Service on the node", PATIENCE, || page(&early));
    let open = text(&cut.run("ss", ["-Htn", "state", "established", "dport", "=", ":6443"]).stdout);
    let ports: Vec<&str> = open.lines().filter_map(|line| line.split_whitespace().nth(2)?.rsplit(':').next()).collect();
    assert!(!ports.is_empty(), "the node has no connection to the server");
    cut.set_link(false);
    let before = daemon(server, "server");
    let (ports, address) = (ports.join(", "), &cut.addresses[0]);
    let silence = format!(
        "add table inet yard; add chain inet yard in {{ type filter hook input priority 0; }}; \
         add chain inet yard out {{ type filter hook output priority 0; }}; \
         add rule inet yard in ip saddr {address} tcp dport 6443 tcp sport {{ {ports} }} drop; \
         add rule inet yard out ip daddr {address} tcp sport 6443 tcp dport {{ {ports} }} drop"
    );
    let ruled = server.run("nft", [silence.as_str()]);
    assert!(ruled.status.success(), "{}", text(&ruled.stderr));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), nix::sys::signal::Signal::SIGKILL).expect("kill");
    wait_for("the server to be started again", PATIENCE, || {
        cluster.try_kubectl("get --raw /readyz").status.success().then_some(())
    });
    assert_ne!(daemon(server, "server"), before);
    cut.set_link(true);
    let healed = std::time::Instant::now();
    let late = service("late");
    wait_for("the node's proxy to know the new Service", NOTICED, || page(&late));
    println!("noticed after {:.0} s", healed.elapsed().as_secs_f64());
    assert!(server.run("nft", ["delete table inet yard"]).status.success());
    cluster.node_is("c", "True", PATIENCE);
}

/// Starts the machines in a yard of their own, runs `test` on their cluster, and looks for what is left afterwards.
fn in_a_yard(mode: Mode, test: fn(Mode, &Cluster<'_>, [&Machine; 3])) {
    in_fresh_namespaces(move || {
        let own = yard::marker();
        let before = Snapshot::take(&own);
        yard::lay_out();
        let machine = |name, number| Machine::start(mode, name, number);
        let (a, b, c) = (machine("a", 1), machine("b", 2), machine("c", 3));
        a.oarlock("up --detach --tls-san yard.example");
        if mode == Mode::Ipv4 {
            joining_is_guarded(&a, &b);
        }
        for machine in [&b, &c] {
            println!("{}", machine.oarlock(&format!("{} --detach", join_command(&a))));
        }
        let archive = image_archive();
        for machine in [&a, &b, &c] {
            machine.oarlock(&format!("images import {}", archive.display()));
        }
        let cluster = Cluster(&a);
        let file = a.data_dir().join("pods.yaml");
        std::fs::write(&file, manifest()).expect("write");
        cluster.kubectl(&format!("apply -f {}", file.display()));
        std::fs::remove_file(file).expect("remove");
        if !cluster.try_kubectl("wait --for=condition=Ready pod --all --timeout=180s").status.success() {
            [&a, &b, &c].iter().for_each(|machine| machine.show_logs());
            panic!("pods are not Ready: {}", cluster.kubectl("describe pods"));
        }
        for pod in PAGES {
            cluster.until_entered(pod);
        }
        test(mode, &cluster, [&a, &b, &c]);
        for machine in [&c, &b, &a] {
            machine.oarlock("reset --yes");
            let left = std::fs::read_dir(machine.data_dir()).into_iter().flatten().count();
            assert_eq!(left, 0, "files left on {}", machine.name);
        }
        drop((a, b, c));
        yard::clear();
        // Groups of other programs that run beside this one are theirs.
        let mut left = before.leaked(&Snapshot::take(&own));
        left.retain(|line| !line.starts_with("cgroup ") || line.contains(&own));
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    });
}

#[test]
fn three_machines_are_one_cluster() {
    in_a_yard(Mode::Ipv4, |mode, cluster, [a, b, c]| {
        certificates_are_signed(cluster);
        cluster.ready_endpoints(mode, 3, PATIENCE);
        everybody_reaches_everybody(mode, cluster, [a, b, c]);
        expired_tokens_go(cluster, a);
        a_node_goes_on_without_a_token(cluster, a, b);
        a_lost_machine_is_missed_and_comes_back(mode, cluster, c);
    });
}

#[test]
fn three_machines_are_one_cluster_of_ipv6() {
    in_a_yard(Mode::Ipv6, |mode, cluster, [a, b, c]| {
        certificates_are_signed(cluster);
        cluster.ready_endpoints(mode, 3, PATIENCE);
        everybody_reaches_everybody(mode, cluster, [a, b, c]);
        names_have_addresses_of_each_family(mode, cluster);
        policies_know_pods_of_other_machines(cluster, a);
        a_node_goes_on_without_a_token(cluster, a, b);
        a_short_cut_heals(cluster, c);
    });
}

#[test]
fn three_machines_are_one_cluster_of_both_families() {
    in_a_yard(Mode::Dual, |mode, cluster, [a, b, c]| {
        cluster.ready_endpoints(mode, 3, PATIENCE);
        everybody_reaches_everybody(mode, cluster, [a, b, c]);
        names_have_addresses_of_each_family(mode, cluster);
        policies_know_pods_of_other_machines(cluster, a);
        a_short_cut_heals(cluster, c);
    });
}

#[test]
fn a_node_is_back_soon_after_its_connections_died_in_silence() {
    in_a_yard(Mode::Dual, |_, cluster, [a, _, c]| a_node_notices_connections_that_died_in_silence(cluster, a, c));
}
