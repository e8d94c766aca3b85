//! Where pods come from: the API watch of pods bound to this node, and manifests on it: a directory of them, or one.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::watcher;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::model::PodUid;
use crate::objects::Delays;
use crate::pods::{News, Source};
use crate::shared::Shared;
use crate::spec::{self, names};

/// With the manifests watched, they are read this often anyway; and when they cannot be watched, or a mirror is not made yet.
const REREAD_PERIOD: Duration = Duration::from_secs(60);
const REREAD_RETRY: Duration = Duration::from_secs(10);
/// A file that is being written gets this long to be whole.
const SETTLE: Duration = Duration::from_millis(50);
const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const CALL: Duration = Duration::from_secs(10);

/// Watches the pods bound to the node until `shutdown`. `mirror_touched` is told when the object of a static pod goes.
pub(crate) async fn watch_api(
    client: kube::Client,
    node_name: String,
    news: mpsc::Sender<News>,
    mirror_touched: Arc<Notify>,
    shutdown: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node_name}"));
    let mut events = watcher(Api::<Pod>::all(client), config).boxed();
    let mut delays = Delays::default();
    let mut told_trouble = false;
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            event = events.next() => event,
        };
        let event = match event {
            None => return,
            Some(Ok(event)) => event,
            Some(Err(error)) => {
                if delays.failing_for() > Duration::from_secs(10) && !told_trouble {
                    tracing::warn!(%error, "the API cannot be watched; pods go on as they are");
                    told_trouble = true;
                }
                delays.wait(&shutdown).await;
                continue;
            }
        };
        // A list begins each attempt, also one that fails.
        if !matches!(event, watcher::Event::Init) {
            delays.reset();
            told_trouble = false;
        }
        if let watcher::Event::Delete(pod) | watcher::Event::Apply(pod) = &event
            && spec::is_mirror(pod)
            && (pod.metadata.deletion_timestamp.is_some() || matches!(event, watcher::Event::Delete(_)))
        {
            mirror_touched.notify_one();
        }
        let told = match event {
            watcher::Event::Init => News::SourceInit(Source::Api),
            watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => News::Pod(Source::Api, Arc::new(slim(pod))),
            watcher::Event::InitDone => News::SourceReady(Source::Api),
            watcher::Event::Delete(pod) => News::PodGone(Source::Api, PodUid::from(spec::pod_uid(&pod))),
        };
        if news.send(told).await.is_err() {
            return;
        }
    }
}

/// The pod without a claim to be static, and without the record of who wrote which field, which takes more memory than all the rest. The copy has what it
/// needs: while a pod is read its lists grow by doubling, and stay as long as they grew.
fn slim(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    // Only who can write manifests on the node can make a pod that the node needs.
    if !spec::is_mirror(&pod)
        && let Some(annotations) = &mut pod.metadata.annotations
    {
        annotations.remove(names::CONFIG_SOURCE);
    }
    pod.clone()
}

/// Reads a directory of manifests, or one manifest, whenever something happens to it, until `shutdown`. A bad manifest is
/// reported and left out; where there is one alone, its pod goes on as it was last described.
pub(crate) async fn watch_manifests(
    path: PathBuf,
    shared: Arc<Shared>,
    news: mpsc::Sender<News>,
    mirror_touched: Arc<Notify>,
    shutdown: CancellationToken,
) {
    let (client, node_name) = (shared.client.clone(), shared.config.node_name.clone());
    let mut bad: HashMap<PathBuf, String> = HashMap::new();
    let mut mirrored: HashMap<PodUid, Arc<Pod>> = HashMap::new();
    let mut known: Vec<Arc<Pod>> = Vec::new();
    let mut searched = false;
    let mut watch: Option<Watch> = None;
    loop {
        // Watched before it is read, so that nothing is missed in between.
        let place = Place::of(&path);
        if watch.as_ref().is_none_or(|watch| watch.place != place) {
            watch = Watch::new(place);
        }
        let mut whole = watch.is_some();
        let registered = shared.node_told.notified();
        let (read_path, node) = (path.clone(), node_name.clone());
        let read = tokio::task::spawn_blocking(move || read_path_of_manifests(&read_path, &node)).await;
        if let Ok((found, errors)) = read {
            for (path, error) in &errors {
                if bad.get(path) != Some(error) {
                    tracing::warn!(path = %path.display(), error, "a static pod's manifest is not usable");
                }
            }
            let pods = if errors.contains_key(&path) { std::mem::take(&mut known) } else { found };
            bad = errors;
            let _ = news.send(News::SourceInit(Source::Files)).await;
            for pod in &pods {
                let _ = news.send(News::Pod(Source::Files, pod.clone())).await;
            }
            let _ = news.send(News::SourceReady(Source::Files)).await;
            let owner = as_owner(&shared.node.load(), &node_name);
            whole &= mirror(&client, owner.as_ref(), &pods, &mut mirrored).await;
            searched = searched || remove_stale_mirrors(&client, &node_name, &pods).await;
            whole &= searched;
            known = pods;
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(if whole { REREAD_PERIOD } else { REREAD_RETRY }) => {}
            () = mirror_touched.notified() => {}
            // A node that is registered now may own mirrors.
            () = registered, if !whole => {}
            happened = next_event(&mut watch) => if !happened {
                watch = None;
            }
        }
    }
}

/// The directory whose events tell of the manifests.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directory: PathBuf,
    /// The only name in it that matters; None when all do.
    name: Option<OsString>,
}

impl Place {
    /// A directory is watched itself; a file, and what is not there, by what happens in the directory around it, since
    /// another file may take its name.
    fn of(path: &Path) -> Place {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if !path.is_dir() => {
                let directory = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
                Place { directory: directory.to_owned(), name: Some(name.to_owned()) }
            }
            _ => Place { directory: path.to_owned(), name: None },
        }
    }
}

struct Watch {
    place: Place,
    events: inotify::EventStream<[u8; 4096]>,
}

impl Watch {
    /// None while the place cannot be watched, as when it is not there.
    fn new(place: Place) -> Option<Watch> {
        use inotify::WatchMask;
        let inotify = inotify::Inotify::init().ok()?;
        let mask = WatchMask::CREATE
            | WatchMask::CLOSE_WRITE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        inotify.watches().add(&place.directory, mask).ok()?;
        Some(Watch { place, events: inotify.into_event_stream([0; 4096]).ok()? })
    }

    /// Waits for one event: Some(true) when it is about manifests, None when there will be no more.
    async fn next(&mut self) -> Option<bool> {
        use inotify::EventMask;
        let event = self.events.next().await?.ok()?;
        let over = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
        // Where events were lost, one of them may have been about manifests.
        let lost = event.mask.contains(EventMask::Q_OVERFLOW);
        let matters = self.place.name.is_none() || event.name == self.place.name;
        (!event.mask.intersects(over)).then_some(lost || matters)
    }
}

/// Waits for something to happen and then for it to be over; false when the place can no longer be watched.
async fn next_event(watch: &mut Option<Watch>) -> bool {
    let Some(watch) = watch else { return std::future::pending().await };
    loop {
        match watch.next().await {
            None => return false,
            Some(false) => {}
            Some(true) => break,
        }
    }
    let mut quiet_at = tokio::time::Instant::now() + SETTLE;
    while let Ok(event) = tokio::time::timeout_at(quiet_at, watch.next()).await {
        match event {
            None => return false,
            Some(false) => {}
            Some(true) => quiet_at = tokio::time::Instant::now() + SETTLE,
        }
    }
    true
}

type ReadOut = (Vec<Arc<Pod>>, HashMap<PathBuf, String>);

/// The usable manifests, and what is wrong with the others. Of what is not there nothing is wrong.
fn read_path_of_manifests(path: &Path, node_name: &str) -> ReadOut {
    let paths = match path.metadata() {
        Ok(meta) if meta.is_dir() => manifests_in(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        _ => vec![path.to_owned()],
    };
    let (mut pods, mut errors) = (Vec::new(), HashMap::new());
    for path in paths {
        match read_manifest(&path, node_name) {
            Ok(pod) => pods.push(Arc::new(pod)),
            Err(error) => {
                errors.insert(path, error);
            }
        }
    }
    (pods, errors)
}

/// The files of a directory that are meant to be read, in the order of their names.
fn manifests_in(directory: &Path) -> Vec<PathBuf> {
    let hidden = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = entries.filter(|path| !hidden(path) && path.is_file()).collect();
    paths.sort();
    paths
}

fn read_manifest(path: &Path, node_name: &str) -> Result<Pod, String> {
    let meta = path.metadata().map_err(|error| error.to_string())?;
    if !meta.is_file() {
        return Err("not a file".to_owned());
    }
    let length = meta.len();
    if length > MAX_MANIFEST_BYTES {
        return Err(format!("{length} bytes are too many"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    static_pod(&text, node_name)
}

/// A manifest as a pod of this node: named after the node, identified by its content.
pub(crate) fn static_pod(text: &str, node_name: &str) -> Result<Pod, String> {
    let value: serde_json::Value = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    if value["kind"] != "Pod" || value["apiVersion"] != "v1" {
        return Err("not a v1 Pod".to_owned());
    }
    let mut pod: Pod = serde_json::from_value(value).map_err(|error| error.to_string())?;
    let name = pod.metadata.name.clone().filter(|name| !name.is_empty()).ok_or("metadata.name is missing")?;
    if pod.spec.as_ref().is_none_or(|spec| spec.containers.is_empty()) {
        return Err("spec.containers is missing".to_owned());
    }
    let hash = {
        let mut bytes = Vec::new();
        for seed in [0u8, 1, 2, 3] {
            let salted = [text.as_bytes(), node_name.as_bytes(), &[seed]].concat();
            bytes.extend(spec::hash::fnv1a_32(&salted).to_be_bytes());
        }
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    pod.metadata.name = Some(format!("{name}-{node_name}"));
    pod.metadata.namespace.get_or_insert_with(|| "default".to_owned());
    pod.metadata.uid = Some(hash.clone());
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(names::CONFIG_SOURCE.to_owned(), "file".to_owned());
    annotations.insert(names::CONFIG_HASH.to_owned(), hash);
    annotations.insert(names::CONFIG_SEEN.to_owned(), Timestamp::UNIX_EPOCH.to_string());
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some(node_name.to_owned());
        spec.enable_service_links.get_or_insert(true);
        let toleration = serde_json::json!({"operator": "Exists", "effect": "NoExecute"});
        if let Ok(toleration) = serde_json::from_value(toleration) {
            spec.tolerations.get_or_insert_default().push(toleration);
        }
    }
    Ok(pod)
}

/// Keeps one API object for each static pod, so that it can be seen; removes those of manifests that went. False when some
/// object is not there yet.
async fn mirror(
    client: &kube::Client,
    owner: Option<&OwnerReference>,
    pods: &[Arc<Pod>],
    mirrored: &mut HashMap<PodUid, Arc<Pod>>,
) -> bool {
    let current: HashMap<PodUid, Arc<Pod>> =
        pods.iter().map(|pod| (PodUid::from(spec::pod_uid(pod)), pod.clone())).collect();
    for (uid, pod) in mirrored.iter().filter(|(uid, _)| !current.contains_key(*uid)) {
        tracing::info!(pod.uid = %uid, "removing the mirror of a static pod");
        delete_mirror(client, pod).await;
    }
    let mut kept = HashMap::new();
    for (uid, pod) in current {
        if create_mirror(client, &pod, owner).await {
            kept.insert(uid, pod);
        }
    }
    let all = kept.len() == pods.len();
    *mirrored = kept;
    all
}

/// Removes mirrors of manifests that went while the agent was away; true once the API could be asked.
async fn remove_stale_mirrors(client: &kube::Client, node_name: &str, pods: &[Arc<Pod>]) -> bool {
    let api: Api<Pod> = Api::all(client.clone());
    let params = kube::api::ListParams::default().fields(&format!("spec.nodeName={node_name}"));
    let Ok(Ok(found)) = tokio::time::timeout(CALL, api.list(&params)).await else { return false };
    let named = |pod: &Pod| (spec::pod_namespace(pod).to_owned(), spec::pod_name(pod).to_owned());
    for pod in found.items.iter().filter(|pod| spec::is_mirror(pod)) {
        if !pods.iter().any(|known| named(known) == named(pod)) {
            delete_mirror(client, pod).await;
        }
    }
    true
}

/// The node as the owner of its mirrors, which go with it; None while it is not registered.
fn as_owner(node: &Node, node_name: &str) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node_name.to_owned(),
        uid: node.metadata.uid.clone()?,
        controller: Some(true),
        block_owner_deletion: None,
    })
}

/// Creates the mirror, in the place of one of an older manifest; true when it is there.
async fn create_mirror(client: &kube::Client, pod: &Pod, owner: Option<&OwnerReference>) -> bool {
    let api: Api<Pod> = Api::namespaced(client.clone(), spec::pod_namespace(pod));
    let hash = spec::annotation(pod, names::CONFIG_HASH).unwrap_or_default().to_owned();
    let mut object = pod.clone();
    object.metadata.uid = None;
    object.metadata.annotations.get_or_insert_default().insert(names::CONFIG_MIRROR.to_owned(), hash.clone());
    let Some(owner) = owner else { return false };
    object.metadata.owner_references = Some(vec![owner.clone()]);
    match tokio::time::timeout(CALL, api.get_opt(spec::pod_name(pod))).await {
        Ok(Ok(Some(found)))
            if spec::annotation(&found, names::CONFIG_MIRROR) == Some(&hash)
                && found.metadata.deletion_timestamp.is_none() =>
        {
            return true;
        }
        Ok(Ok(Some(_))) => delete_mirror(client, pod).await,
        Ok(Ok(None)) => {}
        _ => return false,
    }
    matches!(tokio::time::timeout(CALL, api.create(&PostParams::default(), &object)).await, Ok(Ok(_)))
}

async fn delete_mirror(client: &kube::Client, pod: &Pod) {
    let api: Api<Pod> = Api::namespaced(client.clone(), spec::pod_namespace(pod));
    let params = DeleteParams { grace_period_seconds: Some(0), ..Default::default() };
    let _ = tokio::time::timeout(CALL, api.delete(spec::pod_name(pod), &params)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_becomes_a_pod_of_the_node() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: i}]}\n";
        let pod = static_pod(text, "node-1").expect("a pod");
        assert_eq!(pod.metadata.name.as_deref(), Some("web-node-1"));
        assert_eq!(spec::pod_uid(&pod).len(), 32);
        assert!(spec::is_static(&pod));
        let changed = static_pod(&text.replace("image: i", "image: j"), "node-1").expect("a pod");
        assert_ne!(spec::pod_uid(&pod), spec::pod_uid(&changed));
    }

    #[test]
    fn a_file_is_watched_by_its_name_in_the_directory_around_it() {
        let root = tempfile::tempdir().expect("a directory");
        let whole = Place { directory: root.path().to_owned(), name: None };
        assert_eq!(Place::of(root.path()), whole);
        let one = Place { directory: root.path().to_owned(), name: Some("pod.yaml".into()) };
        assert_eq!(Place::of(&root.path().join("pod.yaml")), one, "also while it is not there");
        assert_eq!(Place::of(Path::new("pod.yaml")).directory, Path::new("."));
    }

    #[test]
    fn bad_manifests_say_what_is_wrong() {
        assert_eq!(static_pod("kind: Service\napiVersion: v1\n", "n"), Err("not a v1 Pod".to_owned()));
        let nameless = static_pod("kind: Pod\napiVersion: v1\nspec: {containers: [{name: c}]}\n", "n");
        assert_eq!(nameless, Err("metadata.name is missing".to_owned()));
        assert!(static_pod("{", "n").is_err());
    }
}
