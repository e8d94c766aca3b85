//! metrics.k8s.io: what nodes and pods use now, which `kubectl top` and autoscalers read.
//!
//! Owns the last sample of each node, since CPU use is the difference of two. Samples come from the nodes' `/metrics/resource`
//! when somebody asks; nothing is collected for nobody. Where no recent sample is at hand, two are taken a moment apart.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use jiff::Timestamp;
use oarlock_kinds::Kind;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::core::{Context, Core, Target};
use crate::error::{ApiError, ApiResult};
use crate::kubelet::{Backend, Security};
use crate::object;
use crate::registry;
use crate::strategy::connect::kubelet_address;
use crate::wire::{self, Answer};

/// The shortest and longest time between two samples that make a rate.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(120);
const FETCH: Duration = Duration::from_secs(10);
const MOST_BYTES: usize = 16 << 20;
const CPU: &str = "container_cpu_usage_seconds_total";
const MEMORY: &str = "container_memory_working_set_bytes";

/// CPU seconds so far, and memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Reading {
    cpu_seconds: f64,
    memory_bytes: f64,
}

/// Namespace, pod, container.
type ContainerKey = (String, String, String);

/// One look at a node.
#[derive(Debug, Clone)]
struct Sample {
    at: Instant,
    node: Reading,
    containers: HashMap<ContainerKey, Reading>,
}

/// The last samples of all nodes.
#[derive(Default)]
pub(crate) struct ResourceMetrics {
    last: Mutex<HashMap<String, Arc<Sample>>>,
}

/// Two samples of a node.
struct Pair {
    before: Arc<Sample>,
    now: Arc<Sample>,
}

impl Pair {
    fn window(&self) -> Duration {
        self.now.at.duration_since(self.before.at)
    }

    fn usage(&self, before: Option<&Reading>, now: &Reading) -> Value {
        // What began in between has used all of it since.
        let before = before.map_or(0.0, |reading| reading.cpu_seconds);
        let cores = (now.cpu_seconds - before).max(0.0) / self.window().as_secs_f64().max(1e-3);
        json!({ "cpu": format!("{}n", (cores * 1e9).round() as i64),
            "memory": format!("{}Ki", (now.memory_bytes / 1024.0).ceil() as i64) })
    }
}

/// Reads the Prometheus text of `/metrics/resource`. Lines that say something else are left out.
fn parse(text: &str, at: Instant) -> Sample {
    let mut sample = Sample { at, node: Reading::default(), containers: HashMap::new() };
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, labels, rest) = match line.split_once('{') {
            Some((name, rest)) => match rest.split_once('}') {
                Some((labels, rest)) => (name, labels, rest),
                None => continue,
            },
            None => match line.split_once(' ') {
                Some((name, rest)) => (name, "", rest),
                None => continue,
            },
        };
        // A time stamp may follow the value.
        let Some(value) = rest.split_whitespace().next().and_then(|value| value.parse::<f64>().ok()) else { continue };
        match name {
            "node_cpu_usage_seconds_total" => sample.node.cpu_seconds = value,
            "node_memory_working_set_bytes" => sample.node.memory_bytes = value,
            CPU | MEMORY => {
                let label = |name: &str| {
                    let found = labels.split(',').find_map(|pair| pair.trim().strip_prefix(name)?.strip_prefix('='));
                    found.map(|value| value.trim_matches('"').to_owned()).unwrap_or_default()
                };
                let key = (label("namespace"), label("pod"), label("container"));
                let reading = sample.containers.entry(key).or_default();
                if name == CPU {
                    reading.cpu_seconds = value;
                } else {
                    reading.memory_bytes = value;
                }
            }
            _ => {}
        }
    }
    sample
}

async fn fetch(core: &Core, node: &str, address: SocketAddr) -> ApiResult<Arc<Sample>> {
    let backend = Backend { address, security: Security::Kubelet, path: "/metrics/resource".to_owned() };
    let request = Request::get("/metrics/resource").body(wire::empty()).map_err(ApiError::internal)?;
    let fetched = async {
        let answer = core.kubelets.forward(&backend, request, &core.stopping).await?;
        if !answer.status().is_success() {
            return Err(ApiError::internal(format_args!("node {node} answered {}", answer.status())));
        }
        let (mut body, mut bytes) = (answer.into_body(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| ApiError::internal(format_args!("node {node}: {error}")))?;
            bytes.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
            if bytes.len() > MOST_BYTES {
                return Err(ApiError::internal(format_args!("node {node} says too much")));
            }
        }
        Ok(bytes)
    };
    let late = |_| ApiError::internal(format_args!("node {node} did not answer in time"));
    let bytes = tokio::time::timeout(FETCH, fetched).await.map_err(late)??;
    Ok(Arc::new(parse(&String::from_utf8_lossy(&bytes), Instant::now())))
}

/// Two samples of a node, the earlier one from memory where it is good for a rate.
async fn sample(core: Arc<Core>, node: String, address: ApiResult<SocketAddr>) -> ApiResult<Pair> {
    let address = address?;
    let kept = core.resource_metrics.last.lock().get(&node).cloned();
    let age = kept.as_ref().map(|sample| sample.at.elapsed());
    let before = match kept {
        Some(kept) if age.is_some_and(|age| age <= LONGEST) => kept,
        _ => fetch(&core, &node, address).await?,
    };
    if let Some(missing) = SHORTEST.checked_sub(before.at.elapsed()) {
        tokio::time::sleep(missing).await;
    }
    let now = fetch(&core, &node, address).await?;
    // Within its time the older sample stays: a longer window makes a steadier rate.
    if age.is_none_or(|age| age > LONGEST / 4) {
        core.resource_metrics.last.lock().insert(node, now.clone());
    }
    Ok(Pair { before, now })
}

fn envelope(kind: &str, of: &Value, window: Duration) -> Value {
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default().to_string();
    let mut metadata = json!({ "name": of["metadata"]["name"], "creationTimestamp": now });
    for field in ["namespace", "labels"] {
        if let Some(value) = of["metadata"].get(field) {
            metadata[field] = value.clone();
        }
    }
    json!({ "kind": kind, "apiVersion": "metrics.k8s.io/v1beta1", "metadata": metadata, "timestamp": now,
        "window": format!("{:.3}s", window.as_secs_f64()) })
}

fn node_metrics(node: &Value, pair: &Pair) -> Value {
    let mut metrics = envelope("NodeMetrics", node, pair.window());
    metrics["usage"] = pair.usage(Some(&pair.before.node), &pair.now.node);
    metrics
}

/// None while the pod has no container that was measured.
fn pod_metrics(pod: &Value, pair: &Pair) -> Option<Value> {
    let (namespace, name) = (object::text(pod, "/metadata/namespace"), object::name(pod));
    let own = pair.now.containers.iter().filter(|((ns, pod, _), _)| ns == namespace && *pod == name);
    let containers: BTreeMap<&str, Value> = own
        .map(|(key, now)| {
            let usage = pair.usage(pair.before.containers.get(key), now);
            (key.2.as_str(), json!({ "name": key.2, "usage": usage }))
        })
        .collect();
    if containers.is_empty() {
        return None;
    }
    let mut metrics = envelope("PodMetrics", pod, pair.window());
    metrics["containers"] = containers.into_values().collect();
    Some(metrics)
}

/// Measures nodes, all at once. One that cannot be measured is left out.
async fn measure(core: Arc<Core>, nodes: Vec<(String, ApiResult<SocketAddr>)>) -> HashMap<String, Pair> {
    let mut samples = JoinSet::new();
    for (node, address) in nodes {
        let core = core.clone();
        samples.spawn(async move { (node.clone(), sample(core, node, address).await) });
    }
    let mut known = HashMap::new();
    while let Some(sampled) = samples.join_next().await {
        match sampled {
            Ok((node, Ok(pair))) => drop(known.insert(node, pair)),
            Ok((node, Err(error))) => {
                tracing::debug!(node, error = error.message, "a node's use could not be measured");
            }
            Err(error) => tracing::error!(%error, "measuring a node broke"),
        }
    }
    known
}

/// The node that an object is measured on.
fn node_of<'a>(kind: &Kind, object: &'a Value) -> &'a str {
    if kind.kind == "NodeMetrics" { object::name(object) } else { object::text(object, "/spec/nodeName") }
}

fn addresses(ctx: &Context, kind: &Kind, objects: &[Value]) -> Vec<(String, ApiResult<SocketAddr>)> {
    let mut nodes: Vec<&str> = objects.iter().map(|object| node_of(kind, object)).filter(|n| !n.is_empty()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes.into_iter().map(|node| (node.to_owned(), kubelet_address(ctx, node))).collect()
}

/// Answers get and list of either kind; `kind` is the row of metrics.k8s.io.
pub(crate) async fn answer(ctx: &Context, kind: &'static Kind, target: &Target) -> ApiResult<Answer> {
    let of = oarlock_kinds::find("", "v1", kind.plural).ok_or_else(ApiError::no_such_resource)?;
    let measured = Target { kind: of, ..target.clone() };
    let one = match ctx.info.verb {
        "list" => false,
        "get" if !target.name.is_empty() => true,
        _ => return Err(ApiError::method_not_allowed()),
    };
    let records = if one {
        vec![ctx.core.store.get(&measured.key()).ok_or_else(|| ApiError::not_found(kind, &target.name))?]
    } else {
        registry::select(ctx, &measured).await?.records
    };
    let objects: Vec<Value> = records.iter().map(|record| object::parse(record)).collect();
    let known = measure(ctx.core.clone(), addresses(ctx, kind, &objects)).await;
    let mut items = Vec::new();
    for object in &objects {
        let Some(pair) = known.get(node_of(kind, object)) else { continue };
        let metrics =
            if kind.kind == "NodeMetrics" { Some(node_metrics(object, pair)) } else { pod_metrics(object, pair) };
        items.extend(metrics);
    }
    if one {
        let found = items.pop().ok_or_else(|| ApiError::not_found(kind, &target.name))?;
        return registry::spelled(ctx, StatusCode::OK, &found);
    }
    let list = json!({ "kind": format!("{}List", kind.kind), "apiVersion": "metrics.k8s.io/v1beta1", "metadata": {},
        "items": items });
    registry::spelled(ctx, StatusCode::OK, &list)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container=\"c\",namespace=\"n\",pod=\"p\"} 10.5 1700000000000
container_memory_working_set_bytes{container=\"c\",namespace=\"n\",pod=\"p\"} 2048
node_cpu_usage_seconds_total 100
node_memory_working_set_bytes 1048576
scrape_error 0
nonsense{
";

    #[test]
    fn use_is_the_difference_of_two_samples() {
        let start = Instant::now();
        let later = BEFORE.replace("10.5", "11.5").replace("total 100", "total 104");
        let pair = Pair {
            before: Arc::new(parse(BEFORE, start)),
            now: Arc::new(parse(&later, start + Duration::from_secs(2))),
        };
        let pod = json!({"metadata": {"name": "p", "namespace": "n", "labels": {"app": "x"}}});
        let metrics = pod_metrics(&pod, &pair).expect("a measured pod");
        assert_eq!(metrics["containers"], json!([{"name": "c", "usage": {"cpu": "500000000n", "memory": "2Ki"}}]));
        assert_eq!((&metrics["metadata"]["labels"]["app"], &metrics["window"]), (&json!("x"), &json!("2.000s")));
        let node = node_metrics(&json!({"metadata": {"name": "one"}}), &pair);
        assert_eq!(node["usage"], json!({"cpu": "2000000000n", "memory": "1024Ki"}));
        assert!(pod_metrics(&json!({"metadata": {"name": "other", "namespace": "n"}}), &pair).is_none());
    }
}
