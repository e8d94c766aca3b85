//! Three whole machines as one cluster: the first has the control plane, the others join it by tokens, as a user would have them
//! do it. Each has its own runtime, agent and proxy; a link is cut and mended.

mod yard;

use std::collections::BTreeSet;
use std::process::Output;
use std::time::Duration;

use oarlock_testkit::{Snapshot, image_archive, in_fresh_namespaces, wait_for};
use yard::{Machine, text};

const PATIENCE: Duration = Duration::from_secs(60);
/// A lost node is missed after 40 s.
const LOSS: Duration = Duration::from_secs(75);

/// A page on each machine, one Service over all, and one of the first machine's page alone, on a port of every node.
fn manifest() -> String {
    let mut all = String::new();
    for node in ["a", "b", "c"] {
        all.push_str(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-{node}, labels: {{app: web, on: {node}}}}}\nspec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 0\n  tolerations: [{{operator: Exists}}]\n  containers:\n  - {{name: web, image: \"oarlock.local/testimage:1\", command: [/bin/http, \"8080\"]}}\n---\n"
        ));
    }
    all.push_str("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n---\n");
    all.push_str("apiVersion: v1\nkind: Service\nmetadata: {name: first}\nspec: {type: NodePort, selector: {on: a}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}\n");
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

    fn fetch(&self, pod: &str, target: &str) -> Option<String> {
        let output = self.try_kubectl(&format!("exec {pod} -- /bin/fetch {target} 2"));
        output.status.success().then(|| text(&output.stdout).trim().to_owned())
    }

    fn ready_endpoints(&self, count: usize, patience: Duration) {
        let line = "get endpointslices -l kubernetes.io/service-name=web -o jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].nodeName}";
        self.wait(line, &format!("{count} ready endpoints"), patience, |said| said.split_whitespace().count() == count);
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

fn everybody_reaches_everybody(cluster: &Cluster<'_>, machines: [&Machine; 3]) {
    let names = ["web-a", "web-b", "web-c"];
    for to in names {
        let address = cluster.kubectl(&format!("get pod {to} -o jsonpath={{.status.podIP}}"));
        for from in names {
            assert_eq!(cluster.fetch(from, &format!("{address}:8080/hostname")).as_deref(), Some(to), "from {from}");
        }
    }
    for from in names {
        let mut seen = BTreeSet::new();
        wait_for("all three pods through the Service's name", PATIENCE, || {
            seen.extend(cluster.fetch(from, "web.default:80/hostname"));
            (seen.len() == 3).then_some(())
        });
    }
    for from in machines {
        for to in machines {
            let page = from.run("curl", ["-sS", "-m", "3", &format!("http://{}:30080/hostname", to.address)]);
            assert_eq!(text(&page.stdout).trim(), "web-a", "the port of {} from {}", to.name, from.name);
        }
    }
    for (pod, machine) in names.iter().zip(machines) {
        let address = cluster.kubectl(&format!("get pod {pod} -o jsonpath={{.status.hostIP}}"));
        assert_eq!(address, machine.address);
        assert!(cluster.try_kubectl(&format!("logs {pod}")).status.success(), "logs of {pod}");
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

fn a_lost_machine_is_missed_and_comes_back(cluster: &Cluster<'_>, lost: &Machine) {
    lost.set_link(false);
    cluster.node_is("c", "Unknown", LOSS);
    cluster.ready_endpoints(2, PATIENCE);
    for _ in 0..12 {
        let answer = cluster.fetch("web-b", "web.default:80/hostname");
        assert!(matches!(answer.as_deref(), Some("web-a" | "web-b")), "{answer:?}");
    }
    lost.set_link(true);
    cluster.node_is("c", "True", PATIENCE);
    cluster.ready_endpoints(3, PATIENCE);
    wait_for("the pod that was cut off", PATIENCE, || {
        let address = cluster.kubectl("get pod web-c -o jsonpath={.status.podIP}");
        (cluster.fetch("web-b", &format!("{address}:8080/hostname"))? == "web-c").then_some(())
    });
}

fn a_node_goes_on_without_a_token(cluster: &Cluster<'_>, machine: &Machine) {
    let started = "get pod web-b -o jsonpath={.metadata.uid}{.status.containerStatuses[0].containerID}";
    let before = cluster.kubectl(started);
    machine.oarlock("stop --keep-pods");
    assert!(text(&machine.try_oarlock("up").stderr).contains("a node of the cluster at https://192.0.2.1:6443"));
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

#[test]
fn three_machines_are_one_cluster() {
    in_fresh_namespaces(|| {
        let before = Snapshot::take("oarlock-node-");
        yard::lay_out();
        let (a, b, c) = (Machine::start("a", 1), Machine::start("b", 2), Machine::start("c", 3));
        let cluster = Cluster(&a);
        a.oarlock("up --detach --bind-address 0.0.0.0 --advertise-address 192.0.2.1 --tls-san yard.example");
        joining_is_guarded(&a, &b);
        for machine in [&b, &c] {
            println!("{}", machine.oarlock(&format!("{} --detach", join_command(&a))));
        }
        let archive = image_archive();
        for machine in [&a, &b, &c] {
            machine.oarlock(&format!("images import {}", archive.display()));
        }
        let file = a.data_dir().join("pods.yaml");
        std::fs::write(&file, manifest()).expect("write");
        cluster.kubectl(&format!("apply -f {}", file.display()));
        std::fs::remove_file(file).expect("remove");
        cluster.kubectl("wait --for=condition=Ready pod --all --timeout=60s");
        certificates_are_signed(&cluster);
        cluster.ready_endpoints(3, PATIENCE);
        everybody_reaches_everybody(&cluster, [&a, &b, &c]);
        expired_tokens_go(&cluster, &a);
        a_node_goes_on_without_a_token(&cluster, &b);
        a_lost_machine_is_missed_and_comes_back(&cluster, &c);
        for machine in [&c, &b, &a] {
            machine.oarlock("reset --yes");
            let left = std::fs::read_dir(machine.data_dir()).into_iter().flatten().count();
            assert_eq!(left, 0, "files left on {}", machine.name);
        }
        drop((a, b, c));
        yard::clear();
        // Groups of other programs that run beside this one are theirs.
        let own = format!("oarlock-node-{}-", std::process::id());
        let mut left = before.leaked(&Snapshot::take("oarlock-node-"));
        left.retain(|line| !line.starts_with("cgroup ") || line.contains(&own));
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    });
}
