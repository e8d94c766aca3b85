//! A node without containers, to try controllers and scheduler against an API server alone:
//! `cargo run -p oarlock-controllers --example hollow-node -- KUBECONFIG [NAME]`.
//!
//! It registers, renews its lease, says that every pod on it is ready (unless its image is `broken`), and lets go of
//! pods that are deleted.

use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).context("the path of a kubeconfig is wanted")?;
    let name = std::env::args().nth(2).unwrap_or_else(|| "hollow".to_owned());
    let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("reading {path}"))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    register(&client, &name).await?;
    tokio::select! {
        result = renew(client.clone(), name.clone()) => result,
        result = follow_pods(client, name) => result,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn register(client: &Client, name: &str) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = serde_json::from_value(json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}}))?;
    if let Err(error) = nodes.create(&PostParams::default(), &node).await {
        println!("node: {error}");
    }
    let resources = json!({"cpu": "4", "memory": "8Gi", "pods": "110"});
    let status = json!({"status": {
        "capacity": resources, "allocatable": resources,
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}],
    }});
    nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await?;
    Ok(())
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

async fn renew(client: Client, name: String) -> anyhow::Result<()> {
    let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    loop {
        let renewed = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let spec = json!({"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": renewed});
        if leases.get_opt(&name).await?.is_none() {
            let lease = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
            leases.create(&PostParams::default(), &lease).await?;
        } else {
            leases.patch(&name, &PatchParams::default(), &Patch::Merge(json!({ "spec": spec }))).await?;
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
}

async fn follow_pods(client: Client, name: String) -> anyhow::Result<()> {
    let all: Api<Pod> = Api::all(client.clone());
    let mine = watcher::Config::default().fields(&format!("spec.nodeName={name}"));
    let mut pods = Box::pin(watcher(all, mine).default_backoff().applied_objects());
    let mut addresses = 1;
    while let Some(pod) = pods.next().await {
        let pod = pod?;
        let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        let image = pod.spec.as_ref().and_then(|spec| spec.containers[0].image.clone()).unwrap_or_default();
        let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
        if pod.metadata.deletion_timestamp.is_some() {
            let gone = api.delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await;
            println!("{} {}", pod.name_any(), gone.map_or_else(|error| error.to_string(), |_| "is gone".to_owned()));
        } else if phase != "Running" && !image.starts_with("broken") {
            addresses += 1;
            let ip = format!("10.42.0.{addresses}");
            let status = json!({"status": {
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "startTime": now(), "conditions": [
                    {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()},
                    {"type": "Ready", "status": "True", "lastTransitionTime": now()},
                ],
            }});
            let said = api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&status)).await;
            println!("{} {}", pod.name_any(), said.map_or_else(|error| error.to_string(), |_| "runs".to_owned()));
        }
    }
    Ok(())
}
