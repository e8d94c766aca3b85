//! What every pod is given at creation: a service account with its token volume, tolerations, a priority, and the
//! overhead and scheduling of its runtime class.

use std::time::Duration;

use oarlock_kinds::{FieldError, Kind};
use oarlock_store::Range;
use rand::Rng;
use serde_json::{Map, Value, json};

use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const TOKEN_SECONDS: i64 = 3607;
const TOLERATION_SECONDS: i64 = 300;
/// How long a pod waits for the account that every new namespace gets a moment after it is made.
const ACCOUNT_ARRIVAL: Duration = Duration::from_secs(1);

pub(crate) async fn on_create(ctx: &Context, target: &Target, pod: &mut Value) -> ApiResult<()> {
    service_account(ctx, target, pod).await?;
    tolerations(pod);
    priority(ctx, target, pod)?;
    runtime_class(ctx, target, pod)
}

fn is_mirror(pod: &Value) -> bool {
    pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some()
}

async fn service_account(ctx: &Context, target: &Target, pod: &mut Value) -> ApiResult<()> {
    if is_mirror(pod) {
        let names = ["serviceAccountName", "serviceAccount"];
        if names.iter().any(|name| !object::text(pod, &format!("/spec/{name}")).is_empty()) {
            return Err(ApiError::forbidden(
                target.kind,
                object::name(pod),
                "a mirror pod may not reference service accounts",
            ));
        }
        return Ok(());
    }
    let spec = object::section(pod, "spec");
    let named = spec.get("serviceAccountName").or_else(|| spec.get("serviceAccount"));
    let name = named.and_then(Value::as_str).filter(|name| !name.is_empty()).unwrap_or("default").to_owned();
    spec.insert("serviceAccountName".into(), name.clone().into());
    spec.insert("serviceAccount".into(), name.clone().into());
    let Some(account) = find_account(ctx, &target.namespace, &name).await else {
        let why = format!(
            "error looking up service account {}/{name}: serviceaccount \"{name}\" not found",
            target.namespace
        );
        return Err(ApiError::forbidden(target.kind, object::name(pod), &why));
    };
    let own = pod.pointer("/spec/automountServiceAccountToken").and_then(Value::as_bool);
    let mounts = own.or_else(|| account.get("automountServiceAccountToken").and_then(Value::as_bool)).unwrap_or(true);
    if mounts {
        mount_token(pod);
    }
    let spec = object::section(pod, "spec");
    let has_own_secrets = spec.get("imagePullSecrets").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    if let Some(secrets) = account.get("imagePullSecrets").filter(|_| !has_own_secrets) {
        spec.insert("imagePullSecrets".into(), secrets.clone());
    }
    Ok(())
}

async fn find_account(ctx: &Context, namespace: &str, name: &str) -> Option<Value> {
    let kind = oarlock_kinds::find("", "v1", "serviceaccounts")?;
    let key = object::key(kind, namespace, name);
    let from = ctx.core.store.current_revision();
    if let Some(record) = ctx.core.store.get(&key) {
        return Some(object::parse(&record));
    }
    if name == "default" {
        let mut changes = ctx.core.store.watch(&key, from).ok()?;
        let _ = tokio::time::timeout(ACCOUNT_ARRIVAL, changes.next(1)).await;
    }
    ctx.core.store.get(&key).map(|record| object::parse(&record))
}

/// Adds the projected token volume, and mounts it where a container has nothing of its own at that path.
fn mount_token(pod: &mut Value) {
    let mut random = rand::rng();
    let letters = b"bcdfghjklmnpqrstvwxz2456789";
    let suffix: String = (0..5).map(|_| letters[random.random_range(0..letters.len())] as char).collect();
    let volume = format!("kube-api-access-{suffix}");
    let spec = object::section(pod, "spec");
    let mut used = false;
    for list in ["initContainers", "containers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten().filter_map(Value::as_object_mut) {
            let mounts = container.entry("volumeMounts").or_insert_with(|| json!([]));
            let Some(mounts) = mounts.as_array_mut() else { continue };
            if !mounts.iter().any(|mount| mount["mountPath"] == TOKEN_PATH) {
                mounts.push(json!({"name": volume, "readOnly": true, "mountPath": TOKEN_PATH}));
                used = true;
            }
        }
    }
    if !used {
        return;
    }
    let volumes = spec.entry("volumes").or_insert_with(|| json!([]));
    if let Some(volumes) = volumes.as_array_mut() {
        volumes.push(json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
            {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [
                {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}}));
    }
}

/// A pod stays five minutes on a node that is not ready or not reachable, unless it says otherwise.
fn tolerations(pod: &mut Value) {
    let spec = object::section(pod, "spec");
    let list = spec.entry("tolerations").or_insert_with(|| json!([]));
    let Some(list) = list.as_array_mut() else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = list.iter().any(|toleration| {
            let of_key = toleration.get("key").and_then(Value::as_str).unwrap_or_default();
            let effect = toleration.get("effect").and_then(Value::as_str).unwrap_or_default();
            (of_key == key || of_key.is_empty()) && matches!(effect, "" | "NoExecute")
        });
        if !tolerated {
            list.push(json!({
                "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS,
            }));
        }
    }
}

fn priority(ctx: &Context, target: &Target, pod: &mut Value) -> ApiResult<()> {
    let Some(classes) = oarlock_kinds::find("scheduling.k8s.io", "v1", "priorityclasses") else { return Ok(()) };
    let name = object::text(pod, "/spec/priorityClassName").to_owned();
    let class = if name.is_empty() {
        default_priority_class(ctx, classes)
    } else {
        let record = ctx.core.store.get(&object::key(classes, "", &name)).ok_or_else(|| {
            ApiError::forbidden(target.kind, object::name(pod), &format!("no PriorityClass with name {name} was found"))
        })?;
        Some(object::parse(&record))
    };
    let value = class.as_ref().and_then(|class| class.get("value")).and_then(Value::as_i64).unwrap_or(0);
    let asked = pod.pointer("/spec/priority").and_then(Value::as_i64);
    if asked.is_some_and(|asked| asked != value) {
        let why = "the integer value of priority must not be provided in pod spec; priority admission controller computed \
                   a different value from the given PriorityClass name";
        return Err(ApiError::forbidden(target.kind, object::name(pod), why));
    }
    let spec = object::section(pod, "spec");
    spec.insert("priority".into(), value.into());
    if let Some(class) = class {
        if name.is_empty() {
            spec.insert("priorityClassName".into(), object::name(&class).into());
        }
        if let Some(policy) = class.get("preemptionPolicy") {
            spec.entry("preemptionPolicy").or_insert_with(|| policy.clone());
        }
    }
    spec.entry("preemptionPolicy").or_insert_with(|| "PreemptLowerPriority".into());
    Ok(())
}

fn default_priority_class(ctx: &Context, classes: &Kind) -> Option<Value> {
    let prefix = object::bucket(classes);
    let page = ctx.core.store.range(Range { prefix: &prefix, ..Range::default() }).ok()?;
    let all = page.records.iter().map(|record| object::parse(record));
    all.filter(|class| class["globalDefault"] == true).min_by_key(|class| class["value"].as_i64())
}

fn runtime_class(ctx: &Context, target: &Target, pod: &mut Value) -> ApiResult<()> {
    let name = object::text(pod, "/spec/runtimeClassName").to_owned();
    let Some(classes) = oarlock_kinds::find("node.k8s.io", "v1", "runtimeclasses") else { return Ok(()) };
    if name.is_empty() {
        if pod.pointer("/spec/overhead").and_then(Value::as_object).is_some_and(|overhead| !overhead.is_empty()) {
            let why = "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead";
            return Err(ApiError::forbidden(target.kind, object::name(pod), why));
        }
        return Ok(());
    }
    let Some(record) = ctx.core.store.get(&object::key(classes, "", &name)) else {
        let why = format!("pod rejected: RuntimeClass \"{name}\" not found");
        return Err(ApiError::forbidden(target.kind, object::name(pod), &why));
    };
    let class = object::parse(&record);
    let pod_name = object::name(pod).to_owned();
    let spec = object::section(pod, "spec");
    if let Some(fixed) = class.pointer("/overhead/podFixed") {
        if spec.get("overhead").is_some_and(|own| own != fixed) {
            let error = FieldError::forbidden("spec.overhead", "must match the overhead of the RuntimeClass");
            return Err(ApiError::invalid("", "Pod", &pod_name, &[error]));
        }
        spec.insert("overhead".into(), fixed.clone());
    }
    if let Some(wanted) = class.pointer("/scheduling/nodeSelector").and_then(Value::as_object) {
        let selector = spec.entry("nodeSelector").or_insert_with(|| Value::Object(Map::new()));
        for (key, value) in wanted {
            if selector.get(key).is_some_and(|own| own != value) {
                let why = format!(
                    "pod rejected: conflict: runtimeClass.scheduling.nodeSelector[{key}] differs from the pod's"
                );
                return Err(ApiError::forbidden(target.kind, &pod_name, &why));
            }
            selector[key.as_str()] = value.clone();
        }
    }
    if let Some(Value::Array(added)) = class.pointer("/scheduling/tolerations")
        && let Some(list) = spec.entry("tolerations").or_insert_with(|| json!([])).as_array_mut()
    {
        for toleration in added {
            if !list.contains(toleration) {
                list.push(toleration.clone());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_mounted_where_nothing_else_is() {
        let mut pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "volumeMounts": [{"mountPath": TOKEN_PATH, "name": "own"}]}]}});
        mount_token(&mut pod);
        let volume = pod["spec"]["volumes"][0]["name"].as_str().expect("a volume").to_owned();
        assert!(volume.starts_with("kube-api-access-"));
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"][0]["name"], volume);
        assert_eq!(pod["spec"]["containers"][1]["volumeMounts"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn tolerations_are_added_once() {
        let mut pod = json!({"spec": {"tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}]}});
        tolerations(&mut pod);
        tolerations(&mut pod);
        assert_eq!(pod["spec"]["tolerations"].as_array().map(Vec::len), Some(2));
    }
}
