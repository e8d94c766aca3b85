//! `bench agent`: pods through the API beside others that run: at a steady rate, in a burst, a hundred at once; then what the
//! agent takes of memory and CPU, without probes and with them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::runtime::watcher;
use serde_json::json;
use tokio::sync::mpsc;

use crate::cluster::Cluster;
use crate::memory;
use crate::table::{self, Row};

/// What is measured, and with how much beside it.
#[derive(clap::Args)]
pub(crate) struct AgentFlags {
    /// Pods that run beside those that are measured
    #[arg(long, default_value_t = 50)]
    background: usize,
    /// Pods made at a steady rate
    #[arg(long, default_value_t = 100)]
    steady: usize,
    /// That rate, in pods a second
    #[arg(long, default_value_t = 10)]
    rate: u32,
    /// Pods made at once, a few and many
    #[arg(long, num_args = 1.., default_values_t = [30, 100])]
    bursts: Vec<usize>,
    /// Seconds over which CPU time is measured
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Measure instead a node that is filled to so many pods at once, for example 110 250
    #[arg(long, num_args = 1..)]
    full: Vec<usize>,
}

const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run(flags: &AgentFlags) -> anyhow::Result<()> {
    let beside = flags.background + flags.steady + flags.bursts.iter().sum::<usize>();
    let most = flags.full.iter().copied().max().unwrap_or(beside);
    let cluster = Cluster::start_with(false, Some(&format!("maxPods: {most}\n")))?;
    cluster.import()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        if flags.full.is_empty() { measure(&cluster, flags).await } else { fill(&cluster, flags).await }
    })
}

/// A node with as many pods as it takes: until all are Ready, what it costs to have them, and until all are gone.
async fn fill(cluster: &Cluster, flags: &AgentFlags) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(cluster.client().await?, "default");
    let mut news = follow(api.clone());
    println!("agent PSS, empty: {:.1} MB", megabytes(memory::pss_kib(cluster.daemon("agent")?)?));
    for count in &flags.full {
        let began = Instant::now();
        let made = create(&api, &format!("full{count}"), *count, None, &json!(null)).await?;
        let ready = news.ready(&made).await?;
        let all_ready = began.elapsed().as_secs_f64();
        table::print(
            &format!("each of {count} pods made at once"),
            &[Row { name: "to Ready".to_owned(), samples: ready }],
        );
        println!("{count} pods: all Ready after {all_ready:.2} s");
        let mut daemons = Vec::new();
        for name in ["agent", "runtime", "server", "netproxy"] {
            let pid = cluster.daemon(name)?;
            daemons.push((name, pid, memory::cpu_seconds(pid)?));
        }
        tokio::time::sleep(Duration::from_secs(flags.seconds)).await;
        for (name, pid, before) in daemons {
            let busy = (memory::cpu_seconds(pid)? - before) * 100.0 / flags.seconds as f64;
            let pss = megabytes(memory::pss_kib(pid)?);
            println!("{count} pods: {name} PSS {pss:.1} MB, {busy:.2} % of a core over {} s", flags.seconds);
        }
        let began = Instant::now();
        for name in made.keys() {
            api.delete(name, &DeleteParams::default()).await?;
        }
        while !api.list(&ListParams::default()).await?.items.is_empty() {
            anyhow::ensure!(began.elapsed() < PATIENCE, "pods are left");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        println!("{count} pods: all gone after {:.2} s", began.elapsed().as_secs_f64());
        news.ready.clear();
    }
    Ok(())
}

fn megabytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

async fn measure(cluster: &Cluster, flags: &AgentFlags) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(cluster.client().await?, "default");
    let mut news = follow(api.clone());
    let agent = cluster.daemon("agent")?;
    let mut sizes = vec![("empty".to_owned(), memory::pss_kib(agent)?)];

    let background = create(&api, "background", flags.background, None, &json!(null)).await?;
    news.ready(&background).await?;
    let steady = create(&api, "steady", flags.steady, Some(flags.rate), &json!(null)).await?;
    let ready = news.ready(&steady).await?;
    let mut rows = vec![Row { name: format!("POST to Ready, {} a second", flags.rate), samples: ready }];
    rows.push(Row { name: "DELETE to gone".to_owned(), samples: delete(&api, &mut news, &steady).await? });
    for count in &flags.bursts {
        let name = format!("burst{count}");
        let began = Instant::now();
        let burst = create(&api, &name, *count, None, &json!(null)).await?;
        let ready = news.ready(&burst).await?;
        rows.push(Row { name: format!("each of {count} at once"), samples: ready });
        let all = began.elapsed().as_secs_f64() * 1000.0;
        rows.push(Row { name: format!("all of {count} at once"), samples: vec![all] });
        sizes.push((format!("{} pods", flags.background + count), memory::pss_kib(agent)?));
        if Some(count) == flags.bursts.last() {
            let busy = cpu_percent(agent, flags.seconds).await?;
            println!("agent CPU with {} pods without probes: {busy:.2} % of a core", flags.background + count);
        }
        delete(&api, &mut news, &burst).await?;
    }
    table::print(&format!("pods through the API beside {} others", flags.background), &rows);

    delete(&api, &mut news, &background).await?;
    for (kind, probe) in probes() {
        let made = create(&api, kind, 50, None, &probe).await?;
        news.ready(&made).await?;
    }
    let busy = cpu_percent(agent, flags.seconds).await?;
    println!("agent CPU with 100 pods, half with HTTP and half with exec probes every 10 s: {busy:.2} % of a core");
    for (what, kib) in sizes {
        println!("agent PSS, {what}: {:.1} MB", megabytes(kib));
    }
    Ok(())
}

/// Both sorts of probes, each with a pod's command.
fn probes() -> [(&'static str, serde_json::Value); 2] {
    [
        ("http", json!({ "httpGet": { "path": "/hostname", "port": 8080 }, "periodSeconds": 10 })),
        ("exec", json!({ "exec": { "command": ["/bin/true"] }, "periodSeconds": 10 })),
    ]
}

type Made = HashMap<String, Instant>;

async fn create(
    api: &Api<Pod>,
    prefix: &str,
    count: usize,
    rate: Option<u32>,
    probe: &serde_json::Value,
) -> anyhow::Result<Made> {
    let mut pace = rate.map(|rate| tokio::time::interval(Duration::from_secs(1) / rate));
    let mut made = Made::new();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..count {
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        let name = format!("{prefix}-{number}");
        let command = if probe["httpGet"].is_object() { "/bin/http" } else { "/bin/sleep" };
        let mut container = json!({ "name": "main", "image": "oarlock.local/testimage:1", "command": [command] });
        if probe.is_object() {
            container["readinessProbe"] = probe.clone();
            container["livenessProbe"] = probe.clone();
        }
        let pod: Pod = serde_json::from_value(json!({ "metadata": { "name": name },
            "spec": { "terminationGracePeriodSeconds": 5, "containers": [container] } }))?;
        made.insert(name, Instant::now());
        let api = api.clone();
        calls.spawn(async move { api.create(&PostParams::default(), &pod).await });
    }
    while let Some(call) = calls.join_next().await {
        call??;
    }
    Ok(made)
}

async fn delete(api: &Api<Pod>, news: &mut News, made: &Made) -> anyhow::Result<Vec<f64>> {
    let mut samples = Vec::new();
    // One after another, so that each figure is that of one pod.
    let few: Vec<&String> = made.keys().take(30).collect();
    for name in &few {
        let began = Instant::now();
        api.delete(name, &DeleteParams::default()).await?;
        news.gone(name).await?;
        samples.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    for name in made.keys().filter(|name| !few.contains(name)) {
        api.delete(name, &DeleteParams::default()).await?;
    }
    let began = Instant::now();
    while api.list(&ListParams::default()).await?.items.iter().any(|pod| made.contains_key(name_of(pod))) {
        anyhow::ensure!(began.elapsed() < PATIENCE, "pods are left");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(samples)
}

fn name_of(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// What a watch of all pods says.
enum Event {
    Ready(String, Instant),
    Gone(String),
}

struct News {
    events: mpsc::UnboundedReceiver<Event>,
    ready: HashMap<String, Instant>,
}

fn follow(api: Api<Pod>) -> News {
    let (sender, events) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut pods = watcher(api, watcher::Config::default()).boxed();
        while let Ok(Some(event)) = pods.try_next().await {
            let told = match event {
                watcher::Event::Apply(pod) | watcher::Event::InitApply(pod) if crate::pod::is_ready(&pod) => {
                    Event::Ready(name_of(&pod).to_owned(), Instant::now())
                }
                watcher::Event::Delete(pod) => Event::Gone(name_of(&pod).to_owned()),
                _ => continue,
            };
            if sender.send(told).is_err() {
                return;
            }
        }
    });
    News { events, ready: HashMap::new() }
}

impl News {
    async fn next(&mut self) -> anyhow::Result<Event> {
        let event = tokio::time::timeout(PATIENCE, self.events.recv()).await.context("nothing happens any more")?;
        event.context("the watch ended")
    }

    /// Milliseconds from each pod's POST to Ready.
    async fn ready(&mut self, made: &Made) -> anyhow::Result<Vec<f64>> {
        while !made.keys().all(|name| self.ready.contains_key(name)) {
            match self.next().await? {
                Event::Ready(name, at) => drop(self.ready.entry(name).or_insert(at)),
                Event::Gone(name) => drop(self.ready.remove(&name)),
            }
        }
        let took = |(name, began): (&String, &Instant)| self.ready[name].duration_since(*began).as_secs_f64() * 1000.0;
        Ok(made.iter().map(took).collect())
    }

    async fn gone(&mut self, wanted: &str) -> anyhow::Result<()> {
        loop {
            match self.next().await? {
                Event::Gone(name) => {
                    self.ready.remove(&name);
                    if name == wanted {
                        return Ok(());
                    }
                }
                Event::Ready(name, at) => drop(self.ready.entry(name).or_insert(at)),
            }
        }
    }
}

async fn cpu_percent(pid: i32, seconds: u64) -> anyhow::Result<f64> {
    let before = memory::cpu_seconds(pid)?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    Ok((memory::cpu_seconds(pid)? - before) * 100.0 / seconds as f64)
}
