//! Endpoints that a user keeps for a Service without selector, and the EndpointSlices that show them, against the in-memory API.

use std::collections::BTreeMap;
use std::sync::Arc;

use oarlock_controllers::{Config, Controllers};
use oarlock_machinery::fake::FakeApi;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const SERVICE: &str = "kubernetes.io/service-name";
const MIRRORING: &str = "endpointslicemirroring-controller.k8s.io";

struct Cluster {
    api: Arc<FakeApi>,
    _stop: DropGuard,
}

impl std::ops::Deref for Cluster {
    type Target = FakeApi;
    fn deref(&self) -> &FakeApi {
        &self.api
    }
}

/// A cluster with a Service without selector.
fn cluster() -> Cluster {
    let api = FakeApi::new();
    api.create(json!({"kind": "Namespace", "metadata": {"name": "default"}}));
    api.create(json!({
        "kind": "Service", "metadata": {"name": "db"},
        "spec": {"clusterIP": "10.43.0.9", "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}]},
    }));
    let stop = CancellationToken::new();
    let config = Config {
        cluster_cidrs: vec![("10.42.0.0/16".parse().unwrap(), 24)],
        root_ca_pem: "PEM".to_owned(),
        balancer_pools: watch::channel(Vec::new()).1,
        balancer_class: "ours".to_owned(),
        signing_ca_dir: None,
        server_names: Vec::new(),
    };
    let (controllers, token) = (Controllers::new(api.client(), config), stop.clone());
    tokio::spawn(async move { controllers.run(token).await.expect("the controllers run until stopped") });
    Cluster { api, _stop: stop.drop_guard() }
}

fn endpoints(name: &str, subsets: Value) -> Value {
    json!({
        "kind": "Endpoints", "metadata": {"name": name, "labels": {"team": "x"}, "annotations": {
            "note": "n", "kubectl.kubernetes.io/last-applied-configuration": "{}",
        }},
        "subsets": subsets,
    })
}

fn subset(addresses: &[&str], port: u16) -> Value {
    let addresses: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!([{"addresses": addresses, "ports": [{"name": "sql", "port": port, "protocol": "TCP"}]}])
}

fn mirrored(api: &FakeApi) -> Vec<Value> {
    api.list("endpointslices")
        .into_iter()
        .filter(|slice| slice["metadata"]["labels"][MANAGED_BY] == MIRRORING)
        .collect()
}

/// All mirrored addresses with their port and whether they are ready.
fn shown(api: &FakeApi) -> BTreeMap<String, (u64, bool)> {
    let mut all = BTreeMap::new();
    for slice in mirrored(api) {
        let port = slice["ports"][0]["port"].as_u64().unwrap_or(0);
        for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
            let address = endpoint["addresses"][0].as_str().unwrap_or_default().to_owned();
            all.insert(address, (port, endpoint["conditions"]["ready"] == true));
        }
    }
    all
}

fn table(of: &[(&str, u64, bool)]) -> BTreeMap<String, (u64, bool)> {
    of.iter().map(|(address, port, ready)| ((*address).to_owned(), (*port, *ready))).collect()
}

impl Cluster {
    async fn shows(&self, wanted: &[(&str, u64, bool)]) {
        self.until_true(&format!("slices of {wanted:?}"), |api| shown(api) == table(wanted)).await;
    }
}

#[tokio::test]
async fn endpoints_of_a_service_without_selector_are_slices_through_create_update_and_delete() {
    let cluster = cluster();
    cluster.create(endpoints("db", subset(&["192.0.2.1"], 5432)));
    cluster.shows(&[("192.0.2.1", 5432, true)]).await;
    let slice = mirrored(&cluster).remove(0);
    let metadata = &slice["metadata"];
    assert_eq!((&metadata["labels"][SERVICE], &metadata["labels"]["team"]), (&json!("db"), &json!("x")));
    assert_eq!(metadata["annotations"], json!({"note": "n"}));
    let source = cluster.get("endpoints", "default", "db").unwrap();
    let owner = json!({
        "apiVersion": "v1", "kind": "Endpoints", "name": "db", "uid": source["metadata"]["uid"],
        "controller": true, "blockOwnerDeletion": true,
    });
    assert_eq!(metadata["ownerReferences"], json!([owner]));
    assert!(metadata["name"].as_str().unwrap().starts_with("db-"));
    assert_eq!((&slice["addressType"], &slice["ports"][0]["name"]), (&json!("IPv4"), &json!("sql")));

    cluster.edit("endpoints", "default", "db", |object| object["subsets"] = subset(&["192.0.2.2"], 5433));
    cluster.shows(&[("192.0.2.2", 5433, true)]).await;
    assert_eq!(mirrored(&cluster)[0]["metadata"]["name"], metadata["name"], "the slice that was there says it");
    cluster.edit("endpoints", "default", "db", |object| {
        object["metadata"]["labels"] = json!({"team": "y"});
        object["subsets"] = json!([{
            "addresses": [{"ip": "192.0.2.2"}, {"ip": "2001:db8::2"}], "notReadyAddresses": [{"ip": "192.0.2.3"}],
            "ports": [{"name": "sql", "port": 5433, "protocol": "TCP"}],
        }]);
    });
    cluster.shows(&[("192.0.2.2", 5433, true), ("192.0.2.3", 5433, false), ("2001:db8::2", 5433, true)]).await;
    let relabelled = |api: &FakeApi| mirrored(api).iter().all(|slice| slice["metadata"]["labels"]["team"] == "y");
    cluster.until_true("new labels", relabelled).await;
    assert_eq!(mirrored(&cluster).len(), 2, "one of each family");

    cluster.delete("endpoints", "default", "db", json!({}));
    cluster.shows(&[]).await;
}

#[tokio::test]
async fn whoever_wants_no_slices_gets_none() {
    let cluster = cluster();
    cluster.create(endpoints("db", subset(&["192.0.2.1"], 5432)));
    cluster.shows(&[("192.0.2.1", 5432, true)]).await;
    let set = |pointer: &str, value: Value| {
        cluster.edit("endpoints", "default", "db", |object| {
            let (map, name) = pointer.split_once(' ').unwrap();
            object["metadata"][map][name] = value;
        });
    };
    set("labels endpointslice.kubernetes.io/skip-mirror", json!("true"));
    cluster.shows(&[]).await;
    set("labels endpointslice.kubernetes.io/skip-mirror", json!("no"));
    cluster.shows(&[("192.0.2.1", 5432, true)]).await;
    set("annotations control-plane.alpha.kubernetes.io/leader", json!("{}"));
    cluster.shows(&[]).await;
}

#[tokio::test]
async fn slices_go_when_the_service_gets_a_selector_or_goes_itself() {
    let cluster = cluster();
    let service = cluster.get("services", "default", "db").unwrap();
    cluster.create(endpoints("db", subset(&["192.0.2.1"], 5432)));
    cluster.create(endpoints("nobodys", subset(&["192.0.2.9"], 1)));
    cluster.shows(&[("192.0.2.1", 5432, true)]).await;
    cluster.edit("services", "default", "db", |service| service["spec"]["selector"] = json!({"app": "db"}));
    cluster.shows(&[]).await;
    cluster
        .until_true("endpoints are the pods'", |api| {
            api.get("endpoints", "default", "db").is_some_and(|object| object["subsets"].is_null())
        })
        .await;
    cluster.delete("services", "default", "db", json!({}));
    cluster.until_true("nothing is left", |api| api.get("endpoints", "default", "db").is_none()).await;

    // Endpoints that were made by hand go with their Service too, and others stay.
    let mut again = service;
    again["metadata"] = json!({"name": "db"});
    cluster.create(again);
    cluster.create(endpoints("db", subset(&["192.0.2.4"], 5432)));
    cluster.shows(&[("192.0.2.4", 5432, true)]).await;
    cluster.delete("services", "default", "db", json!({}));
    cluster.until_true("the endpoints are gone", |api| api.get("endpoints", "default", "db").is_none()).await;
    cluster.shows(&[]).await;
    assert!(cluster.get("endpoints", "default", "nobodys").is_some(), "who never had a Service");
}

#[tokio::test]
async fn a_slice_that_somebody_changes_or_removes_is_put_right_and_none_is_made_twice() {
    let cluster = cluster();
    // The watch tells nothing of what is written meanwhile.
    cluster.until_true("the controllers run", |api| !api.list("serviceaccounts").is_empty()).await;
    cluster.hold("endpointslices");
    cluster.create(endpoints("db", subset(&["192.0.2.1"], 5432)));
    cluster.shows(&[("192.0.2.1", 5432, true)]).await;
    cluster.edit("endpoints", "default", "db", |object| object["subsets"] = subset(&["192.0.2.2"], 5432));
    // What comes after it is done, so it has had its turn.
    cluster.create(json!({"kind": "Service", "metadata": {"name": "other"}, "spec": {"ports": [{"port": 1}]}}));
    cluster.create(endpoints("other", subset(&["192.0.2.7"], 1)));
    cluster.until_true("the other's slice", |api| shown(api).contains_key("192.0.2.7")).await;
    cluster.release("endpointslices");
    cluster.shows(&[("192.0.2.2", 5432, true), ("192.0.2.7", 1, true)]).await;
    assert_eq!(cluster.changes("endpointslices", "ADDED"), 2);
    cluster.delete("services", "default", "other", json!({}));
    cluster.shows(&[("192.0.2.2", 5432, true)]).await;

    let name = mirrored(&cluster)[0]["metadata"]["name"].as_str().unwrap().to_owned();
    cluster.edit("endpointslices", "default", &name, |slice| slice["endpoints"] = json!([]));
    cluster.shows(&[("192.0.2.2", 5432, true)]).await;
    cluster.delete("endpointslices", "default", &name, json!({}));
    cluster.shows(&[("192.0.2.2", 5432, true)]).await;
}

#[tokio::test]
async fn addresses_that_are_left_out_are_told() {
    let cluster = cluster();
    let many: Vec<String> = (0..1100).map(|number| format!("10.9.{}.{}", number / 250, number % 250)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).chain(["nonsense"]).collect();
    cluster.create(endpoints("db", subset(&many, 5432)));
    cluster.until_true("as many as there may be", |api| shown(api).len() == 1000).await;
    let told = |api: &FakeApi, reason: &str| {
        api.list("events").iter().any(|event| {
            event["reason"] == reason && event["involvedObject"]["kind"] == "Endpoints" && event["type"] == "Warning"
        })
    };
    cluster.until_true("too many", |api| told(api, "TooManyAddressesToMirror")).await;
    cluster.edit("endpoints", "default", "db", |object| object["subsets"] = subset(&["192.0.2.1", "no"], 5432));
    cluster.until_true("invalid", |api| told(api, "InvalidIPAddress")).await;
    cluster.shows(&[("192.0.2.1", 5432, true)]).await;
}
