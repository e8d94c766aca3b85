//! Names, Services and addresses as pods and the host see them.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use oarlock_testkit::wait_for;
use serde_json::json;

use super::Case;
use super::cluster::{Cluster, PATIENCE, in_url, text};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[
    ("names_resolve_in_pods", names),
    ("pods_reach_services_and_themselves_through_them", hairpin),
    ("udp_services_work", udp),
    ("a_service_without_endpoints_is_refused_at_once", reject),
    ("endpoints_follow_readiness", readiness),
    ("endpoints_that_somebody_keeps_are_mirrored_and_followed", mirroring),
    ("a_balancer_gets_an_address_that_answers", balancer),
];

fn in_pod(cluster: &Cluster, pod: &str, command: &str) -> (bool, String) {
    let output = cluster.try_kubectl(&format!("exec {pod} -- {command}"));
    (output.status.success(), format!("{}{}", text(&output.stdout), text(&output.stderr)))
}

fn words(cluster: &Cluster, line: &str) -> Vec<String> {
    cluster.kubectl(line).split_whitespace().map(str::to_owned).collect()
}

/// Makes a Service in as many families as there are, and gives its addresses.
fn service(cluster: &Cluster, namespace: &str, name: &str, spec: &str) -> Vec<String> {
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  ipFamilyPolicy: PreferDualStack\n{spec}"
    ));
    let addresses = words(cluster, &format!("get service -n {namespace} {name} -o jsonpath={{.spec.clusterIPs[*]}}"));
    assert_eq!(addresses.len(), cluster.mode.addresses().len(), "{addresses:?}");
    addresses
}

fn names(cluster: &Cluster) {
    cluster.apply(&pod("asker", &["/bin/sleep"]));
    cluster.kubectl("wait --for=condition=Ready pod/asker --timeout=180s");
    let ports = "  selector: {app: page}\n  ports: [{port: 80, targetPort: 8080}]\n";
    for address in service(cluster, "demo", "pages", ports) {
        let kind = if address.contains(':') { "AAAA" } else { "A" };
        for name in ["pages.demo", "pages.demo.svc", "pages.demo.svc.cluster.local"] {
            let (resolved, answer) = in_pod(cluster, "asker", &format!("/bin/resolve {name} {kind}"));
            assert!(resolved && answer.trim() == address, "{name}: {answer}");
        }
    }
    let (found, _) = in_pod(cluster, "asker", "/bin/resolve absent.demo.svc.cluster.local");
    assert!(!found, "a name that does not exist must not resolve");
    let (fetched, page) = in_pod(cluster, "asker", "/bin/fetch page.demo:80/");
    assert!(fetched && page.contains("Oarlock rows"), "{page}");
    cluster.kubectl("delete pod asker --timeout=180s");
    cluster.kubectl("delete service -n demo pages --timeout=180s");
}

fn hairpin(cluster: &Cluster) {
    cluster.apply(&pod("mirror", &["/bin/http", "8080"]));
    cluster.kubectl("wait --for=condition=Ready pod/mirror --timeout=180s");
    let of = |app: &str| format!("  selector: {{app: {app}}}\n  ports: [{{port: 80, targetPort: 8080}}]\n");
    let mut targets: Vec<String> =
        service(cluster, "default", "mirror", &of("mirror")).iter().map(|address| in_url(address)).collect();
    targets.push("mirror.default".to_owned());
    for target in targets {
        let answer = wait_for("the pod to reach itself", PATIENCE, || {
            let (fetched, answer) = in_pod(cluster, "mirror", &format!("/bin/fetch {target}:80/hostname 2"));
            fetched.then_some(answer)
        });
        assert_eq!(answer.trim(), "mirror", "{target}");
    }
    let own = words(cluster, "get pod mirror -o jsonpath={.status.podIPs[*].ip}");
    for (address, own) in service(cluster, "demo", "pages", &of("page")).iter().zip(&own) {
        let client = wait_for("a page", PATIENCE, || {
            let (fetched, client) = in_pod(cluster, "mirror", &format!("/bin/fetch {}:80/client 2", in_url(address)));
            fetched.then_some(client)
        });
        assert!(client.contains(own), "a pod's address is kept on the way to another pod: {client} is not {own}");
    }
    cluster.kubectl("delete pod/mirror service/mirror --timeout=180s");
    cluster.kubectl("delete service -n demo pages --timeout=180s");
}

fn udp(cluster: &Cluster) {
    cluster.apply(&pod("echo", &["/bin/udp-echo", "8081"]));
    let spec = "  type: NodePort\n  selector: {app: echo}\n  ports:\n  - {port: 53, targetPort: 8081, nodePort: 30053, protocol: UDP}\n";
    let services = service(cluster, "default", "echo", spec);
    cluster.kubectl("wait --for=condition=Ready pod/echo --timeout=180s");
    let services = services.iter().map(|address| format!("{}:53", in_url(address)));
    let ports = cluster.mode.addresses().iter().map(|address| format!("{}:30053", in_url(address)));
    for target in services.chain(ports) {
        let any = if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let answer = wait_for("an echo", PATIENCE, || {
            let socket = UdpSocket::bind(any).ok()?;
            socket.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
            socket.send_to(b"ahoy", &target).ok()?;
            let mut buffer = [0u8; 64];
            let length = socket.recv(&mut buffer).ok()?;
            Some(text(&buffer[..length]))
        });
        assert_eq!(answer, "echo: ahoy", "{target}");
    }
    cluster.kubectl("delete pod/echo service/echo --timeout=180s");
}

fn reject(cluster: &Cluster) {
    refused(&service(cluster, "default", "empty", "  selector: {app: nobody}\n  ports: [{port: 80}]\n"));
    cluster.kubectl("delete service empty");
}

/// Waits until connections to port 80 of the addresses are refused at once.
fn refused(addresses: &[String]) {
    for address in addresses {
        let target = format!("{}:80", in_url(address)).parse().expect("address");
        wait_for("a refusal", PATIENCE, || {
            match std::net::TcpStream::connect_timeout(&target, Duration::from_secs(2)) {
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Some(()),
                _ => None,
            }
        });
    }
}

fn balancer(cluster: &Cluster) {
    let spec = "  type: LoadBalancer\n  selector: {app: page}\n  ports: [{port: 80, targetPort: 8080}]\n";
    service(cluster, "demo", "balanced", spec);
    let show = "get service -n demo balanced -o jsonpath={.status.loadBalancer.ingress[*].ip}";
    let count = cluster.mode.addresses().len();
    let is_ours = |one: &str| one.starts_with("192.0.2.") || one.starts_with("fd07::");
    let addresses = cluster.wait_for_output(show, "an address of each family", |text| {
        text.split_whitespace().count() == count && text.split_whitespace().all(is_ours)
    });
    let fetch = |from: &str| Command::new("curl").args(["-sS", "-g", "-m", "3", from]).output().expect("curl");
    for address in addresses.split_whitespace() {
        wait_for("the page at the balancer's address", PATIENCE, || {
            text(&fetch(&format!("http://{}/", in_url(address))).stdout).contains("Oarlock rows").then_some(())
        });
    }
    wait_for("the node to announce it", PATIENCE, || {
        let metrics = text(&fetch("http://127.0.0.1:10249/metrics").stdout);
        metrics.contains(&format!("oarlock_netproxy_announced_addresses {count}")).then_some(())
    });
    let lease = cluster.kubectl("get leases -n kube-system -o jsonpath={.items[*].metadata.name}");
    assert!(lease.contains("oarlock-announcer-"), "{lease}");
    cluster.kubectl("delete service -n demo balanced --timeout=180s");
}

fn readiness(cluster: &Cluster) {
    let first = cluster.kubectl("get pods -n demo -l app=page -o jsonpath={.items[0].metadata.name}");
    let addresses = "get endpointslices -n demo -l kubernetes.io/service-name=page -o jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].addresses[0]}";
    let ready = |count: usize| move |text: &str| text.split_whitespace().count() == count;
    cluster.wait_for_output(addresses, "three ready endpoints", ready(3));
    let (unready, message) = in_pod(cluster, &format!("-n demo {first}"), "/bin/fetch localhost:8080/set/unready");
    assert!(unready, "{message}");
    cluster.wait_for_output(addresses, "two ready endpoints", ready(2));
    let (again, message) = in_pod(cluster, &format!("-n demo {first}"), "/bin/fetch localhost:8080/set/ready");
    assert!(again, "{message}");
    cluster.wait_for_output(addresses, "three ready endpoints again", ready(3));
}

/// A Service without selector, whose Endpoints somebody else keeps: first one pod's addresses, then another's.
fn mirroring(cluster: &Cluster) {
    const SLICES: &str = "get endpointslices -l kubernetes.io/service-name=kept -o";
    let addresses_of = |pod: &str| words(cluster, &format!("get pod {pod} -o jsonpath={{.status.podIPs[*].ip}}"));
    ["first", "second"].iter().for_each(|name| drop(cluster.apply(&pod(name, &["/bin/http", "8080"]))));
    cluster.kubectl("wait --for=condition=Ready pod/first pod/second --timeout=180s");
    let services = service(cluster, "default", "kept", "  ports: [{name: web, port: 80, targetPort: 8080}]\n");
    let subsets = |pod: &str| {
        let addresses: Vec<_> = addresses_of(pod).into_iter().map(|ip| json!({"ip": ip})).collect();
        json!([{"addresses": addresses, "ports": [{"name": "web", "port": 8080}]}])
    };
    let mirrored = |pod: &str| {
        let mut wanted = addresses_of(pod);
        wanted.sort();
        let shown = format!("{SLICES} jsonpath={{.items[*].endpoints[*].addresses[*]}}");
        cluster.wait_for_output(&shown, "slices of the addresses", |text| {
            let mut found: Vec<&str> = text.split_whitespace().collect();
            found.sort_unstable();
            found == wanted
        });
        for address in &services {
            let url = format!("http://{}/hostname", in_url(address));
            wait_for("an answer of the pod", PATIENCE, || {
                let page = Command::new("curl").args(["-sS", "-g", "-m", "3", &url]).output().expect("curl");
                (text(&page.stdout).trim() == pod).then_some(())
            });
        }
    };
    let endpoints =
        json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "kept"}, "subsets": subsets("first")});
    cluster.apply(&endpoints.to_string());
    mirrored("first");
    let families = words(cluster, &format!("{SLICES} jsonpath={{.items[*].addressType}}"));
    assert_eq!(families.len(), cluster.mode.addresses().len(), "one slice of each family: {families:?}");
    cluster.kubectl(&format!("patch endpoints kept -p {}", json!({"subsets": subsets("second")})));
    mirrored("second");
    cluster.kubectl("delete endpoints kept");
    cluster.wait_for_output(&format!("{SLICES} name"), "no slices", |text| !text.contains("endpointslice.discovery"));
    refused(&services);
    cluster.kubectl("delete pod/first pod/second service/kept --timeout=180s");
}
