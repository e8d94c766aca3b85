//! `bench pod`: from POST to Ready, and from DELETE to gone, through the API, one pod at a time.

use std::time::Instant;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;

use crate::cluster::Cluster;
use crate::table::{self, Row};

pub(crate) fn run(rounds: usize) -> anyhow::Result<()> {
    let cluster = Cluster::start(false)?;
    cluster.import()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(&cluster, rounds))
}

async fn measure(cluster: &Cluster, rounds: usize) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(cluster.client().await?, "default");
    let mut ready = Row { name: "POST to Ready".to_owned(), samples: Vec::new() };
    let mut gone = Row { name: "DELETE to gone".to_owned(), samples: Vec::new() };
    for round in 0..rounds {
        let name = format!("bench-{round}");
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": {
                "terminationGracePeriodSeconds": 5,
                "containers": [{ "name": "main", "image": "oarlock.local/testimage:1", "command": ["/bin/sleep"] }],
            },
        }))?;
        let start = Instant::now();
        let created = api.create(&PostParams::default(), &pod).await?;
        let version = created.metadata.resource_version.context("no resourceVersion")?;
        let version = wait(&api, &name, &version, is_ready).await?;
        ready.samples.push(start.elapsed().as_secs_f64() * 1000.0);
        let start = Instant::now();
        api.delete(&name, &DeleteParams::default()).await?;
        wait(&api, &name, &version, |_| false).await?;
        gone.samples.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    table::print("one pod through the API", &[ready, gone]);
    Ok(())
}

/// Watches one pod until `done` or until it is deleted; returns the last resourceVersion seen.
async fn wait(api: &Api<Pod>, name: &str, version: &str, done: impl Fn(&Pod) -> bool) -> anyhow::Result<String> {
    let parameters = WatchParams::default().fields(&format!("metadata.name={name}")).timeout(60);
    let mut events = api.watch(&parameters, version).await?.boxed();
    while let Some(event) = events.try_next().await? {
        let (pod, ended) = match event {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                let ended = done(&pod);
                (pod, ended)
            }
            WatchEvent::Deleted(pod) => (pod, true),
            WatchEvent::Error(error) => anyhow::bail!("watch: {error:?}"),
            WatchEvent::Bookmark(_) => continue,
        };
        if ended {
            return pod.metadata.resource_version.context("no resourceVersion");
        }
    }
    anyhow::bail!("pod {name} did not get there within 60 s")
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
