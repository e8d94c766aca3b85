//! `oarlock demo`: applies `docs/demo/demo.yaml` through the API and fetches its page through the Service.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::images;
use super::machine::Stages;
use super::reasons;
use crate::config::Settings;

/// The demo as ordinary YAML.
const MANIFEST: &str = include_str!("../../../docs/demo/demo.yaml");
const NAMESPACE: &str = "demo";
/// The image that the manifest names.
const IMAGE: &str = "oarlock.local/testimage:1";
const REPLICAS: usize = 3;
/// Enough requests that a pod which never answers is a fault and not bad luck.
const REQUESTS: usize = 60;
/// How long the rules of pods that are Ready may be on their way: they follow endpoints, on a busy machine late.
const RULES_LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone, clap::Args)]
pub(crate) struct DemoFlags {
    /// The archive of the demo's image [default: testimage.tar beside this program]
    #[arg(long, value_name = "ARCHIVE")]
    pub(crate) image: Option<PathBuf>,
    /// How long to wait for the pods
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) timeout: u64,
}

pub(crate) fn run(settings: &Settings, flags: &DemoFlags) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = admin_client(settings).await?;
        show(settings, client, flags, &mut Stages::new()).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A client with the administrator's kubeconfig.
pub(crate) async fn admin_client(settings: &Settings) -> anyhow::Result<Client> {
    let path = settings.layout.admin_kubeconfig();
    let kubeconfig = kube::config::Kubeconfig::read_from(&path)
        .with_context(|| format!("cannot read {}; is oarlock running?", path.display()))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// The whole demo, one line a stage.
pub(crate) async fn show(
    settings: &Settings,
    client: Client,
    flags: &DemoFlags,
    stages: &mut Stages,
) -> anyhow::Result<()> {
    provide_image(settings, flags, stages).await?;
    let count = apply(&client).await?;
    stages.done(&format!("demo applied ({count} objects)"));
    let timeout = Duration::from_secs(flags.timeout);
    match tokio::time::timeout(timeout, pods_ready(&client)).await {
        Ok(ready) => ready?,
        Err(_) => {
            let reasons = reasons::of_pods(&client, NAMESPACE).await;
            anyhow::bail!("the demo's pods are not Ready after {} s{reasons}", flags.timeout);
        }
    }
    stages.done(&format!("{REPLICAS} demo pods Ready"));

    let cluster: Service = Api::namespaced(client.clone(), NAMESPACE).get("page").await?;
    let address: IpAddr = cluster
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref())
        .and_then(|address| address.parse().ok())
        .context("the demo Service has no cluster IP")?;
    let node_port: Service = Api::namespaced(client, NAMESPACE).get("page-nodeport").await?;
    let port = node_port
        .spec
        .and_then(|spec| spec.ports?.first()?.node_port)
        .and_then(|port| u16::try_from(port).ok())
        .context("the demo Service has no node port")?;
    for (what, target) in
        [("ClusterIP", SocketAddr::new(address, 80)), ("NodePort", SocketAddr::new(settings.node_ip, port))]
    {
        let (page, answers) = fetch_from_all(target).await.with_context(|| format!("through the {what} {target}"))?;
        stages.done(&format!("page fetched through the {what} http://{target}"));
        if what == "ClusterIP" {
            for line in page.lines() {
                println!("      | {line}");
            }
        }
        for (pod, count) in &answers {
            println!("      {pod} answered {count} of {REQUESTS} requests");
        }
        anyhow::ensure!(
            answers.len() >= REPLICAS,
            "only {} of {REPLICAS} pods answered through the {what}",
            answers.len()
        );
    }
    std::io::stdout().flush()?;
    Ok(())
}

/// Sees to it that the runtime has the demo's image. A runtime of others has no call for importing one.
async fn provide_image(settings: &Settings, flags: &DemoFlags, stages: &mut Stages) -> anyhow::Result<()> {
    let channel = images::connect(settings).await?;
    if !settings.has_own_runtime() {
        anyhow::ensure!(
            images::has(channel, IMAGE).await?,
            "the runtime at {} has no image {IMAGE}; import testimage.tar with its own tools",
            settings.runtime_socket.display()
        );
        stages.done("demo image found");
        return Ok(());
    }
    let archive = match &flags.image {
        Some(archive) => archive.clone(),
        None => crate::host::sibling_program("testimage.tar").context("no demo image: name it with --image")?,
    };
    images::import(channel, archive).await.context("cannot import the demo image")?;
    stages.done("demo image imported");
    Ok(())
}

/// Applies every document by server-side apply; returns how many there were.
async fn apply(client: &Client) -> anyhow::Result<usize> {
    let mut count = 0;
    for document in serde_yaml_ng::Deserializer::from_str(MANIFEST) {
        let object = DynamicObject::deserialize(document).context("docs/demo/demo.yaml")?;
        let types = object.types.clone().context("a demo object has no kind")?;
        let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
        let api: Api<DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        api.patch(&object.name_any(), &PatchParams::apply("oarlock-demo").force(), &Patch::Apply(&object))
            .await
            .with_context(|| format!("cannot apply {} {}", types.kind, object.name_any()))?;
        count += 1;
    }
    Ok(count)
}

/// Waits until the wanted number of demo pods is Ready.
async fn pods_ready(client: &Client) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let mut ready = BTreeMap::new();
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default().labels("app=page")).default_backoff());
    while let Some(event) = events.try_next().await? {
        match event {
            watcher::Event::Apply(pod) | watcher::Event::InitApply(pod) => {
                ready.insert(pod.name_any(), pod.metadata.deletion_timestamp.is_none() && is_ready(&pod));
            }
            watcher::Event::Delete(pod) => {
                ready.remove(&pod.name_any());
            }
            watcher::Event::Init | watcher::Event::InitDone => {}
        }
        if ready.values().filter(|ready| **ready).count() >= REPLICAS {
            return Ok(());
        }
    }
    anyhow::bail!("the watch of the demo's pods ended")
}

fn is_ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Fetches the page many times, each on a connection of its own; returns one page and the number of answers of each pod. An
/// answer of every pod may take a moment, for rules follow endpoints; after that no request may fail.
async fn fetch_from_all(target: SocketAddr) -> anyhow::Result<(String, BTreeMap<String, usize>)> {
    let deadline = Instant::now() + RULES_LIMIT;
    let mut heard = BTreeSet::new();
    while heard.len() < REPLICAS && Instant::now() < deadline {
        match fetch(target, "/hostname").await {
            Ok(pod) => drop(heard.insert(pod)),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    let page = fetch(target, "/").await?;
    let mut answers = BTreeMap::new();
    for _ in 0..REQUESTS {
        let pod = fetch(target, "/hostname").await?;
        *answers.entry(pod.trim().to_owned()).or_insert(0) += 1;
    }
    Ok((page, answers))
}

/// One GET on a fresh connection.
async fn fetch(target: SocketAddr, path: &str) -> anyhow::Result<String> {
    let exchange = async {
        let mut connection = tokio::net::TcpStream::connect(target).await?;
        connection
            .write_all(format!("GET {path} HTTP/1.1\r\nHost: page\r\nConnection: close\r\n\r\n").as_bytes())
            .await?;
        let mut answer = String::new();
        connection.take(1 << 20).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(5), exchange).await.context("no answer within 5 s")??;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "the page answered {}", head.lines().next().unwrap_or(""));
    Ok(body.to_owned())
}
