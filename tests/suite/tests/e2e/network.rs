//! Names, Services and addresses as pods and the host see them.

use std::net::UdpSocket;
use std::time::Duration;

use oarlock_testkit::{NODE_ADDRESS, wait_for};

use super::Case;
use super::cluster::{Cluster, PATIENCE, text};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[
    ("names_resolve_in_pods", names),
    ("pods_reach_services_and_themselves_through_them", hairpin),
    ("udp_services_work", udp),
    ("a_service_without_endpoints_is_refused_at_once", reject),
    ("endpoints_follow_readiness", readiness),
    ("a_balancer_gets_an_address_that_answers", balancer),
];

fn in_pod(cluster: &Cluster, pod: &str, command: &str) -> (bool, String) {
    let output = cluster.try_kubectl(&format!("exec {pod} -- {command}"));
    (output.status.success(), format!("{}{}", text(&output.stdout), text(&output.stderr)))
}

fn names(cluster: &Cluster) {
    cluster.apply(&pod("asker", &["/bin/sleep"]));
    cluster.kubectl("wait --for=condition=Ready pod/asker --timeout=60s");
    let address = cluster.kubectl("get service -n demo page -o jsonpath={.spec.clusterIP}");
    for name in ["page.demo", "page.demo.svc", "page.demo.svc.cluster.local"] {
        let (resolved, answer) = in_pod(cluster, "asker", &format!("/bin/resolve {name}"));
        assert!(resolved && answer.trim() == address, "{name}: {answer}");
    }
    let (found, _) = in_pod(cluster, "asker", "/bin/resolve absent.demo.svc.cluster.local");
    assert!(!found, "a name that does not exist must not resolve");
    let (fetched, page) = in_pod(cluster, "asker", "/bin/fetch page.demo:80/");
    assert!(fetched && page.contains("Oarlock rows"), "{page}");
    cluster.kubectl("delete pod asker --timeout=60s");
}

fn hairpin(cluster: &Cluster) {
    cluster.apply(&pod("mirror", &["/bin/http", "8080"]));
    cluster.kubectl("wait --for=condition=Ready pod/mirror --timeout=60s");
    cluster.kubectl("expose pod mirror --port=80 --target-port=8080");
    let answer = wait_for("the pod to reach itself", PATIENCE, || {
        let (fetched, answer) = in_pod(cluster, "mirror", "/bin/fetch mirror.default:80/hostname 2");
        fetched.then_some(answer)
    });
    assert_eq!(answer.trim(), "mirror");
    let (fetched, client) = in_pod(cluster, "mirror", "/bin/fetch page.demo:80/client");
    let own = cluster.kubectl("get pod mirror -o jsonpath={.status.podIP}");
    assert!(
        fetched && client.contains(&own),
        "a pod's address is kept on the way to another pod: {client} is not {own}"
    );
    cluster.kubectl("delete pod/mirror service/mirror --timeout=60s");
}

fn udp(cluster: &Cluster) {
    cluster.apply(&pod("echo", &["/bin/udp-echo", "8081"]));
    cluster.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: echo}\nspec:\n  type: NodePort\n  selector: {app: echo}\n  ports:\n  - {port: 53, targetPort: 8081, nodePort: 30053, protocol: UDP}\n",
    );
    cluster.kubectl("wait --for=condition=Ready pod/echo --timeout=60s");
    let address = cluster.kubectl("get service echo -o jsonpath={.spec.clusterIP}");
    for target in [format!("{address}:53"), format!("{NODE_ADDRESS}:30053")] {
        let answer = wait_for("an echo", PATIENCE, || {
            let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
            socket.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
            socket.send_to(b"ahoy", &target).ok()?;
            let mut buffer = [0u8; 64];
            let length = socket.recv(&mut buffer).ok()?;
            Some(text(&buffer[..length]))
        });
        assert_eq!(answer, "echo: ahoy", "{target}");
    }
    cluster.kubectl("delete pod/echo service/echo --timeout=60s");
}

fn reject(cluster: &Cluster) {
    cluster.apply("apiVersion: v1\nkind: Service\nmetadata: {name: empty}\nspec:\n  selector: {app: nobody}\n  ports: [{port: 80}]\n");
    let address = cluster.kubectl("get service empty -o jsonpath={.spec.clusterIP}");
    let target = format!("{address}:80").parse().expect("address");
    wait_for("a refusal", PATIENCE, || match std::net::TcpStream::connect_timeout(&target, Duration::from_secs(2)) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Some(()),
        _ => None,
    });
    cluster.kubectl("delete service empty");
}

fn balancer(cluster: &Cluster) {
    cluster.kubectl("expose -n demo deployment page --name=balanced --type=LoadBalancer --port=80 --target-port=8080");
    let show = "get service -n demo balanced -o jsonpath={.status.loadBalancer.ingress[*].ip}";
    let address = cluster.wait_for_output(show, "an address", |text| text.starts_with("192.0.2."));
    let fetch = |from: &str| std::process::Command::new("curl").args(["-sS", "-m", "3", from]).output().expect("curl");
    wait_for("the page at the balancer's address", PATIENCE, || {
        text(&fetch(&format!("http://{address}/")).stdout).contains("Oarlock rows").then_some(())
    });
    wait_for("the node to announce it", PATIENCE, || {
        let metrics = text(&fetch("http://127.0.0.1:10249/metrics").stdout);
        metrics.contains("oarlock_netproxy_announced_addresses 1").then_some(())
    });
    let lease = cluster.kubectl("get leases -n kube-system -o jsonpath={.items[*].metadata.name}");
    assert!(lease.contains("oarlock-announcer-"), "{lease}");
    cluster.kubectl("delete service -n demo balanced --timeout=60s");
}

fn readiness(cluster: &Cluster) {
    let first = cluster.kubectl("get pods -n demo -l app=page -o jsonpath={.items[0].metadata.name}");
    let addresses = "get endpointslices -n demo -l kubernetes.io/service-name=page -o jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].addresses}";
    let ready = |count: usize| move |text: &str| text.matches("10.42.").count() == count;
    cluster.wait_for_output(addresses, "three ready endpoints", ready(3));
    let (unready, message) = in_pod(cluster, &format!("-n demo {first}"), "/bin/fetch localhost:8080/set/unready");
    assert!(unready, "{message}");
    cluster.wait_for_output(addresses, "two ready endpoints", ready(2));
    let (again, message) = in_pod(cluster, &format!("-n demo {first}"), "/bin/fetch localhost:8080/set/ready");
    assert!(again, "{message}");
    cluster.wait_for_output(addresses, "three ready endpoints again", ready(3));
}
