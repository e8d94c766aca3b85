//! A whole agent between a fake API server and a fake runtime, in a directory of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use oarlock_agent::{Agent, Config};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::api::FakeApi;
use super::runtime::FakeRuntime;

pub const POD: &str = "/api/v1/namespaces/default/pods/web";
pub const NODE: &str = "/api/v1/nodes/node-1";

/// An agent with its neighbours.
pub struct Node {
    pub api: FakeApi,
    pub runtime: FakeRuntime,
    pub dir: TempDir,
    agent: Option<(JoinHandle<()>, CancellationToken)>,
    runtime_stop: CancellationToken,
    adjust: fn(&mut Config),
}

impl Node {
    pub async fn start(images: &[&str]) -> Node {
        Self::start_with(images, |_| {}).await
    }

    /// With a configuration of its own.
    pub async fn start_with(images: &[&str], adjust: fn(&mut Config)) -> Node {
        let node = Node {
            api: FakeApi::new(),
            runtime: FakeRuntime::new(images),
            dir: tempfile::tempdir().expect("a directory"),
            agent: None,
            runtime_stop: CancellationToken::new(),
            adjust,
        };
        node.runtime.serve(&node.dir.path().join("runtime.sock"), node.runtime_stop.clone());
        node.with_agent().await
    }

    /// Starts an agent anew, with another configuration.
    pub async fn with_agent_of(mut self, adjust: fn(&mut Config)) -> Node {
        self.adjust = adjust;
        self.with_agent().await
    }

    pub async fn with_agent(mut self) -> Node {
        let root = self.dir.path();
        let authority = oarlock_pki::Authority::ensure(&root.join("pki"), "test").expect("an authority");
        let request = oarlock_pki::Request {
            common_name: "system:node:node-1".into(),
            organizations: vec!["system:nodes".into()],
            dns_names: vec!["node-1".into()],
            addresses: vec![Ipv4Addr::LOCALHOST.into()],
            usage: oarlock_pki::Usage::Server,
        };
        let identity = authority.ensure_identity("node", &request).expect("a certificate");
        let mut config = Config::new("node-1", Ipv4Addr::LOCALHOST.into());
        config.data_dir = root.join("data");
        config.kubelet_dir = root.join("kubelet");
        config.runtime_endpoint = root.join("runtime.sock");
        config.pod_logs_dir = root.join("logs/pods");
        config.container_logs_dir = Some(root.join("logs/containers"));
        config.listen = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        config.cert_file = identity.cert_file;
        config.key_file = identity.key_file;
        config.client_ca_file = authority.certificate_file();
        config.cgroups_per_qos = false;
        // How full this machine happens to be is no part of any test.
        config.eviction.thresholds.clear();
        (self.adjust)(&mut config);
        let token = CancellationToken::new();
        let agent = Agent::with_client(config, self.api.client());
        let shutdown = token.clone();
        let task = tokio::spawn(async move { agent.run(shutdown).await.expect("the agent") });
        self.agent = Some((task, token));
        self
    }

    /// Asks the agent to end and waits until it has.
    pub async fn stop_agent(&mut self) {
        let (task, token) = self.agent.take().expect("a running agent");
        token.cancel();
        task.await.expect("the agent's task");
    }

    /// Ends the agent as a kill would: without a word to anyone.
    pub async fn kill_agent(&mut self) {
        let (task, _token) = self.agent.take().expect("a running agent");
        task.abort();
        let _ = task.await;
    }

    pub fn create(&self, pod: Value) {
        self.api.put(POD, pod);
    }

    pub fn events(&self) -> Vec<String> {
        let reason = |event: Value| event["reason"].as_str().unwrap_or_default().to_owned();
        self.api.all("/events/").into_iter().map(reason).collect()
    }

    pub async fn wait_for_event(&self, wanted: &str) {
        self.wait_for_events(wanted, 1).await;
    }

    /// Waits until there are so many events of that reason.
    pub async fn wait_for_events(&self, wanted: &str, count: usize) {
        let mut changed = self.api.subscribe();
        let found = tokio::time::timeout(Duration::from_secs(20), async {
            while self.events().iter().filter(|reason| *reason == wanted).count() < count {
                changed.changed().await.expect("the fake lives");
            }
        });
        assert!(found.await.is_ok(), "not {count} events {wanted}: {:?}", self.events());
    }
}

impl Drop for Node {
    /// Ends the agent before its directory goes, in which it would go on to write.
    fn drop(&mut self) {
        self.runtime_stop.cancel();
        if let Some((task, _token)) = self.agent.take() {
            task.abort();
            if Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread {
                let _ = tokio::task::block_in_place(|| Handle::current().block_on(task));
            }
        }
        // Sub-paths of volumes are mounted for the runtime.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for point in points.filter(|point| point.starts_with(self.dir.path())) {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
        // What it began on other threads takes a moment more.
        for _ in 0..200 {
            match std::fs::remove_dir_all(self.dir.path()) {
                Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => break,
            }
        }
    }
}

pub fn pod(spec: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "default", "uid": "pod-uid-1", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": spec,
        "status": {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]},
    })
}

pub fn plain() -> Value {
    pod(json!({"nodeName": "node-1", "restartPolicy": "Always", "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "app", "image": "app:1"}]}))
}

pub fn condition(object: &Value, kind: &str) -> String {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == kind);
    found.map_or(String::new(), |condition| condition["status"].as_str().unwrap_or_default().to_owned())
}

pub fn ready(pod: &Value) -> bool {
    condition(pod, "Ready") == "True"
}
