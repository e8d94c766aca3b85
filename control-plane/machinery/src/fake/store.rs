//! The fake's objects and their change log.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::Refused;

/// group, version, plural, kind, namespaced
pub(super) const KINDS: &[(&str, &str, &str, &str, bool)] = &[
    ("", "v1", "namespaces", "Namespace", false),
    ("", "v1", "nodes", "Node", false),
    ("", "v1", "pods", "Pod", true),
    ("", "v1", "services", "Service", true),
    ("", "v1", "endpoints", "Endpoints", true),
    ("", "v1", "configmaps", "ConfigMap", true),
    ("", "v1", "secrets", "Secret", true),
    ("", "v1", "serviceaccounts", "ServiceAccount", true),
    ("", "v1", "events", "Event", true),
    ("apps", "v1", "deployments", "Deployment", true),
    ("apps", "v1", "replicasets", "ReplicaSet", true),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", true),
    ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", true),
    ("coordination.k8s.io", "v1", "leases", "Lease", true),
    ("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", true),
    ("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", true),
    ("", "v1", "persistentvolumes", "PersistentVolume", false),
    ("storage.k8s.io", "v1", "storageclasses", "StorageClass", false),
    ("storage.k8s.io", "v1", "csidrivers", "CSIDriver", false),
    ("storage.k8s.io", "v1", "csistoragecapacities", "CSIStorageCapacity", true),
    ("storage.k8s.io", "v1", "volumeattachments", "VolumeAttachment", false),
    ("certificates.k8s.io", "v1", "certificatesigningrequests", "CertificateSigningRequest", false),
];

type ObjectKey = (String, String, String);

pub(super) struct Entry {
    pub revision: u64,
    pub resource: String,
    pub type_: &'static str,
    pub object: Value,
}

#[derive(Default)]
pub(super) struct Store {
    objects: BTreeMap<ObjectKey, Value>,
    pub log: Vec<Entry>,
    revision: u64,
    names: u64,
}

pub(super) fn kind_of(
    resource: &str,
) -> Option<&'static (&'static str, &'static str, &'static str, &'static str, bool)> {
    KINDS.iter().find(|kind| kind.2 == resource)
}

pub(super) fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn key(resource: &str, namespace: &str, name: &str) -> ObjectKey {
    (resource.to_owned(), namespace.to_owned(), name.to_owned())
}

fn refused(code: u16, reason: &'static str, message: impl Into<String>) -> Refused {
    Refused::new(code, reason, message)
}

pub(super) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn finalizers(object: &Value) -> Vec<String> {
    let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|f| f.as_str().map(str::to_owned)).collect()
}

impl Store {
    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&key(resource, namespace, name))
    }

    pub fn list<'a>(&'a self, resource: &'a str, namespace: Option<&'a str>) -> impl Iterator<Item = &'a Value> {
        let matching = move |(k, _): &(&ObjectKey, &Value)| k.0 == resource && namespace.is_none_or(|ns| k.1 == ns);
        self.objects.iter().filter(matching).map(|(_, object)| object)
    }

    pub fn changes(&self, resource: &str, type_: &str) -> usize {
        self.log.iter().filter(|entry| entry.resource == resource && entry.type_ == type_).count()
    }

    pub fn dump(&self) -> String {
        let lines = self.objects.iter().filter(|(key, _)| key.0 != "events").map(|(key, object)| {
            let metadata = |field: &str| object.pointer(&format!("/metadata/{field}")).cloned().unwrap_or_default();
            format!(
                "{} {}/{} spec={} status={} finalizers={}",
                key.0,
                key.1,
                key.2,
                object["spec"],
                object["status"],
                metadata("finalizers")
            )
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    pub fn create_typed(&mut self, object: Value) -> Result<Value, Refused> {
        let kind = KINDS.iter().find(|kind| kind.3 == text(&object, "/kind"));
        let kind = kind.ok_or_else(|| refused(400, "BadRequest", "unknown kind"))?;
        let namespace = if kind.4 { text(&object, "/metadata/namespace").to_owned() } else { String::new() };
        let namespace = if kind.4 && namespace.is_empty() { "default".to_owned() } else { namespace };
        self.create(kind.2, &namespace, object)
    }

    pub fn create(&mut self, resource: &str, namespace: &str, mut object: Value) -> Result<Value, Refused> {
        let kind = kind_of(resource).ok_or_else(|| refused(404, "NotFound", "unknown resource"))?;
        if kind.4
            && let Some(owner) = self.get("namespaces", "", namespace)
            && !text(owner, "/metadata/deletionTimestamp").is_empty()
        {
            let message =
                format!("unable to create new content in namespace {namespace} because it is being terminated");
            return Err(refused(403, "Forbidden", message));
        }
        let generate = text(&object, "/metadata/generateName").to_owned();
        if text(&object, "/metadata/name").is_empty() && !generate.is_empty() {
            self.names += 1;
            object["metadata"]["name"] = json!(format!("{generate}{:05}", self.names));
        }
        let name = text(&object, "/metadata/name").to_owned();
        if self.get(resource, namespace, &name).is_some() {
            return Err(refused(409, "AlreadyExists", format!("{resource} \"{name}\" already exists")));
        }
        object["apiVersion"] = json!(api_version(kind.0, kind.1));
        object["kind"] = json!(kind.3);
        if kind.4 {
            object["metadata"]["namespace"] = json!(namespace);
        }
        self.names += 1;
        object["metadata"]["uid"] = json!(format!("uid-{}-{}", kind.3.to_lowercase(), self.names));
        object["metadata"]["generation"] = json!(1);
        if text(&object, "/metadata/creationTimestamp").is_empty() {
            let second = Timestamp::from_second(Timestamp::now().as_second()).expect("now is in range");
            object["metadata"]["creationTimestamp"] = json!(second.to_string());
        }
        if resource == "pods" && object.pointer("/status/phase").is_none() {
            object["status"]["phase"] = json!("Pending");
        }
        if resource == "namespaces" && object.pointer("/spec/finalizers").is_none() {
            object["spec"]["finalizers"] = json!(["kubernetes"]);
            object["status"]["phase"] = json!("Active");
        }
        Ok(self.commit(resource, namespace, "ADDED", object))
    }

    fn commit(&mut self, resource: &str, namespace: &str, type_: &'static str, mut object: Value) -> Value {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let at = key(resource, namespace, text(&object, "/metadata/name"));
        match type_ {
            "DELETED" => drop(self.objects.remove(&at)),
            _ => drop(self.objects.insert(at, object.clone())),
        }
        let entry = Entry { revision: self.revision, resource: resource.to_owned(), type_, object: object.clone() };
        self.log.push(entry);
        object
    }

    fn existing(&self, resource: &str, namespace: &str, name: &str) -> Result<Value, Refused> {
        let found = self.get(resource, namespace, name).cloned();
        found.ok_or_else(|| refused(404, "NotFound", format!("{resource} \"{name}\" not found")))
    }

    pub fn edit(
        &mut self,
        resource: &str,
        namespace: &str,
        name: &str,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Value, Refused> {
        let old = self.existing(resource, namespace, name)?;
        let mut new = old.clone();
        edit(&mut new);
        Ok(self.settle(resource, namespace, &old, new))
    }

    /// Stores `new` over `old`: bumps the generation, and lets go of what only waited for its last finalizer.
    fn settle(&mut self, resource: &str, namespace: &str, old: &Value, mut new: Value) -> Value {
        if new == *old {
            return new;
        }
        if new["spec"] != old["spec"] && resource != "namespaces" {
            let generation = old.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0);
            new["metadata"]["generation"] = json!(generation + 1);
        }
        let deleting = !text(&new, "/metadata/deletionTimestamp").is_empty();
        let grace = new.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
        let held = new.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
        let held = resource == "namespaces" && held;
        let type_ = if deleting && grace == 0 && !held && finalizers(&new).is_empty() { "DELETED" } else { "MODIFIED" };
        self.commit(resource, namespace, type_, new)
    }

    /// PUT and PATCH: `make` turns the old object into the wanted one; `subresource` says which part counts.
    pub fn update(
        &mut self,
        resource: &str,
        namespace: &str,
        name: &str,
        subresource: &str,
        make: impl FnOnce(&Value) -> Value,
    ) -> Result<Value, Refused> {
        let old = self.existing(resource, namespace, name)?;
        let wanted = make(&old);
        let asked = text(&wanted, "/metadata/resourceVersion");
        if !asked.is_empty() && asked != text(&old, "/metadata/resourceVersion") {
            let message = format!(
                "Operation cannot be fulfilled on {resource} \"{name}\": the object has been modified; please apply \
                 your changes to the latest version and try again"
            );
            return Err(refused(409, "Conflict", message));
        }
        let uid = text(&wanted, "/metadata/uid");
        if !uid.is_empty() && uid != text(&old, "/metadata/uid") {
            return Err(refused(409, "Conflict", "Precondition failed: UID in precondition does not match"));
        }
        let mut new = old.clone();
        match subresource {
            "status" => new["status"] = wanted["status"].clone(),
            "finalize" => new["spec"]["finalizers"] = wanted["spec"]["finalizers"].clone(),
            _ => {
                let status = old["status"].clone();
                let fixed = ["uid", "creationTimestamp", "generation", "deletionTimestamp", "resourceVersion"];
                new = wanted;
                for field in fixed {
                    match old["metadata"].get(field) {
                        Some(value) => new["metadata"][field] = value.clone(),
                        None => drop(new["metadata"].as_object_mut().and_then(|map| map.remove(field))),
                    }
                }
                if !status.is_null() {
                    new["status"] = status;
                }
            }
        }
        Ok(self.settle(resource, namespace, &old, new))
    }

    pub fn bind(&mut self, namespace: &str, name: &str, node: &str) -> Result<(), Refused> {
        let old = self.existing("pods", namespace, name)?;
        if !text(&old, "/spec/nodeName").is_empty() {
            let message =
                format!("Operation cannot be fulfilled on pods/binding \"{name}\": pod {name} is already assigned");
            return Err(refused(409, "Conflict", message));
        }
        let mut new = old.clone();
        new["spec"]["nodeName"] = json!(node);
        new["status"]["conditions"] = json!([{"type": "PodScheduled", "status": "True"}]);
        self.settle("pods", namespace, &old, new);
        Ok(())
    }

    pub fn delete(&mut self, resource: &str, namespace: &str, name: &str, options: &Value) -> Result<Value, Refused> {
        let old = self.existing(resource, namespace, name)?;
        let wanted_uid = text(options, "/preconditions/uid");
        if !wanted_uid.is_empty() && wanted_uid != text(&old, "/metadata/uid") {
            return Err(refused(409, "Conflict", "Precondition failed: UID in precondition does not match"));
        }
        let mut new = old.clone();
        let mut kept = finalizers(&old);
        let asks = |policy: &str| text(options, "/propagationPolicy") == policy;
        for (policy, finalizer) in [("Orphan", "orphan"), ("Foreground", "foregroundDeletion")] {
            if asks(policy) && !kept.iter().any(|f| f == finalizer) {
                kept.push(finalizer.to_owned());
            }
        }
        new["metadata"]["finalizers"] = json!(kept);
        let grace = options.get("gracePeriodSeconds").and_then(Value::as_i64);
        let bound = !text(&old, "/spec/nodeName").is_empty();
        let ended = matches!(text(&old, "/status/phase"), "Succeeded" | "Failed");
        let grace = if resource == "pods" && bound && !ended { grace.unwrap_or(30) } else { 0 };
        let held = resource == "namespaces"
            && old.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
        if grace == 0 && kept.is_empty() && !held {
            return Ok(self.commit(resource, namespace, "DELETED", new));
        }
        if text(&new, "/metadata/deletionTimestamp").is_empty() {
            new["metadata"]["deletionTimestamp"] = json!(Timestamp::now().to_string());
        }
        if resource == "pods" {
            new["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        }
        if resource == "namespaces" {
            new["status"]["phase"] = json!("Terminating");
        }
        if new == old {
            return Ok(old);
        }
        Ok(self.commit(resource, namespace, "MODIFIED", new))
    }
}
