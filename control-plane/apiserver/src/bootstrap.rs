//! The objects every cluster has from its first second: put in place at start, in one transaction.

use std::net::{IpAddr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oarlock_kinds::Kind;
use oarlock_store::{Expect, Op, Store};
use serde_json::{Value, json};

use crate::authz::policy;
use crate::object::{self, metadata};
use crate::strategy::{namespaces, services};
use crate::{Config, Error};

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Writes what is missing, and brings up to date what follows from the configuration.
pub(crate) async fn bootstrap(config: &Config, store: &dyn Store) -> Result<(), Error> {
    let mut ops = Vec::new();
    for object in missing_or_kept(config) {
        plan(store, object, false, &mut ops);
    }
    let roles = policy::cluster_roles().into_iter().chain(policy::cluster_role_bindings());
    for object in roles.chain(policy::namespaced_roles()) {
        plan(store, object, true, &mut ops);
    }
    for object in address_objects(config) {
        plan(store, object, true, &mut ops);
    }
    if ops.is_empty() {
        return Ok(());
    }
    tracing::info!(objects = ops.len(), "putting built-in objects in place");
    store.txn(ops).await.map(|_| ()).map_err(|source| Error::Store { source })
}

/// Created when missing, otherwise left as they are.
fn missing_or_kept(config: &Config) -> Vec<Value> {
    let mut objects: Vec<Value> = NAMESPACES
        .iter()
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .collect();
    for (name, value, description) in [
        ("system-cluster-critical", 2_000_000_000, "For system pods that must run in the cluster, on any node."),
        ("system-node-critical", 2_000_001_000, "For system pods that must not be moved from their node."),
    ] {
        objects.push(json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "description": description, "preemptionPolicy": "PreemptLowerPriority",
        }));
    }
    let address = services::nth_address(config.service_cidr, 1).map(|address: IpAddr| address.to_string());
    objects.push(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "kubernetes", "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "sessionAffinity": "None",
            "ipFamilies": [if config.service_cidr.addr().is_ipv4() { "IPv4" } else { "IPv6" }],
            "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.listen.port()}],
        },
    }));
    let dns_addresses: Vec<IpAddr> = config.cluster_dns.into_iter().chain(config.second_cluster_dns).collect();
    if !dns_addresses.is_empty() {
        objects.push(dns_service(&dns_addresses));
    }
    objects
}

/// The Service whose address the nodes' DNS answers on; a DNS server of the cluster's own can stand behind it.
fn dns_service(addresses: &[IpAddr]) -> Value {
    let families: Vec<&str> = addresses.iter().map(|one| if one.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    let port = |name: &str, protocol: &str| json!({"name": name, "port": 53, "protocol": protocol, "targetPort": 53});
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "kube-dns", "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": addresses.first(), "clusterIPs": addresses, "sessionAffinity": "None",
            "selector": {"k8s-app": "kube-dns"}, "ipFamilies": families,
            "ipFamilyPolicy": if addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "internalTrafficPolicy": "Cluster",
            "ports": [port("dns", "UDP"), port("dns-tcp", "TCP")],
        },
    })
}

/// Follow the configuration: where this server is reached.
fn address_objects(config: &Config) -> Vec<Value> {
    let address = config.advertise_address.to_string();
    let port = config.listen.port();
    let family = if config.advertise_address.is_ipv4() { "IPv4" } else { "IPv6" };
    let mut objects = vec![
        json!({
            "apiVersion": "v1", "kind": "Endpoints",
            "metadata": {
                "name": "kubernetes", "namespace": "default",
                "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"},
            },
            "subsets": [{
                "addresses": [{"ip": address}], "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
            }],
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"},
            },
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        }),
    ];
    if let Ok(authority) = std::fs::read_to_string(&config.client_ca_file) {
        objects.push(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
            "data": {"client-ca-file": authority},
        }));
        objects.push(cluster_info(config, &authority));
    }
    if let Some(text) = &config.node_configuration {
        objects.push(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": policy::NODE_CONFIGURATION, "namespace": "kube-system"},
            "data": {"config.yaml": text},
        }));
    }
    objects
}

/// Where the cluster is and by which authority it is known, in upstream's form: a kubeconfig that names nobody.
fn cluster_info(config: &Config, authority: &str) -> Value {
    let server = SocketAddr::new(config.advertise_address, config.listen.port());
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config",
        "clusters": [{"name": "", "cluster": {
            "server": format!("https://{server}"), "certificate-authority-data": STANDARD.encode(authority),
        }}],
        "contexts": null, "current-context": "", "preferences": {}, "users": null,
    });
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cluster-info", "namespace": "kube-public"},
        "data": {"kubeconfig": kubeconfig.to_string()},
    })
}

fn plan(store: &dyn Store, mut object: Value, update: bool, ops: &mut Vec<Op>) {
    let Some(kind) = kind_of(&object) else { return };
    let namespace = object::text(&object, "/metadata/namespace").to_owned();
    let key = object::key(kind, &namespace, object::name(&object));
    let expect = match store.get(&key) {
        None => {
            let metadata = metadata(&mut object);
            metadata.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
            metadata.insert("creationTimestamp".into(), object::now_text().into());
            (kind.default)(&mut object);
            (kind.prepare_create)(&mut object);
            if kind.storage == "namespaces" {
                namespaces::on_create(&mut object);
            }
            Expect::Absent
        }
        Some(record) if update => {
            let old = object::parse(&record);
            if object::text(&old, "/metadata/annotations/rbac.authorization.kubernetes.io~1autoupdate") == "false" {
                return;
            }
            let Some(merged) = brought_up_to_date(kind, &old, &object) else { return };
            object = merged;
            Expect::Revision(record.revision())
        }
        Some(_) => return,
    };
    ops.push(Op::Put { key: key.into(), value: object::encode(kind, &object), expect, ttl_seconds: None });
}

/// The stored object with everything but its metadata as built in; `None` when it already is.
fn brought_up_to_date(kind: &Kind, old: &Value, built_in: &Value) -> Option<Value> {
    let mut wanted = built_in.clone();
    (kind.default)(&mut wanted);
    let mut merged = old.clone();
    for (field, value) in wanted.as_object()?.iter().filter(|(field, _)| *field != "metadata") {
        merged[field.as_str()] = value.clone();
    }
    (merged != *old).then_some(merged)
}

fn kind_of(object: &Value) -> Option<&'static Kind> {
    let api_version = object::text(object, "/apiVersion");
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    oarlock_kinds::by_kind(group, version, object::text(object, "/kind"))
}
