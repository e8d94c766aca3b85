//! The controllers end to end against the in-memory API: what a user would see after apply, scale, rollout, undo and
//! delete. Pods are made ready by a stand-in for scheduler and agent.

use std::sync::Arc;

use ipnet::IpNet;
use oarlock_controllers::{Config, Controllers};
use oarlock_machinery::fake::{FakeApi, Refused};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

struct Cluster {
    api: Arc<FakeApi>,
    pools: watch::Sender<Vec<IpNet>>,
    _stop: DropGuard,
    _tasks: Vec<JoinHandle<()>>,
}

impl std::ops::Deref for Cluster {
    type Target = FakeApi;
    fn deref(&self) -> &FakeApi {
        &self.api
    }
}

fn cluster() -> Cluster {
    let api = FakeApi::new();
    api.create(json!({"kind": "Namespace", "metadata": {"name": "default"}}));
    api.create(json!({
        "kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }));
    let stop = CancellationToken::new();
    let (pools, balancer_pools) = watch::channel(vec!["192.0.2.0/30".parse().unwrap()]);
    let config = Config {
        cluster_cidrs: vec![("10.42.0.0/16".parse().unwrap(), 24)],
        root_ca_pem: "PEM".to_owned(),
        balancer_pools,
        balancer_class: "ours".to_owned(),
        signing_ca_dir: None,
        server_names: Vec::new(),
    };
    let controllers = Controllers::new(api.client(), config);
    let token = stop.clone();
    let running = tokio::spawn(async move { controllers.run(token).await.expect("the controllers run until stopped") });
    let agent = tokio::spawn(stand_in(api.clone()));
    Cluster { api, pools, _stop: stop.drop_guard(), _tasks: vec![running, agent] }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Binds every pod, makes it ready unless its image is "broken", and lets it go when it is deleted.
async fn stand_in(api: Arc<FakeApi>) {
    let mut addresses = 0;
    loop {
        let before = api.changes("pods", "ADDED") + api.changes("pods", "MODIFIED");
        let todo = api.list("pods").into_iter().find(|pod| {
            let deleting = !text(pod, "/metadata/deletionTimestamp").is_empty();
            let fresh = text(pod, "/status/phase") == "Pending";
            let broken = text(pod, "/spec/containers/0/image") == "broken";
            deleting || (fresh && !broken)
        });
        let Some(pod) = todo else {
            api.wait_for_change(before).await;
            continue;
        };
        let (namespace, name) = (text(&pod, "/metadata/namespace"), text(&pod, "/metadata/name"));
        if !text(&pod, "/metadata/deletionTimestamp").is_empty() {
            api.delete("pods", namespace, name, json!({"gracePeriodSeconds": 0}));
            continue;
        }
        addresses += 1;
        api.edit("pods", namespace, name, |pod| {
            pod["spec"]["nodeName"] = json!("n1");
            pod["status"] = json!({
                "phase": "Running", "podIP": format!("10.42.0.{addresses}"),
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            });
        });
    }
}

fn deployment(replicas: i32, image: &str) -> Value {
    json!({
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "default", "annotations": {"note": "x"}},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "progressDeadlineSeconds": 600,
            "revisionHistoryLimit": 10,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "template": {"metadata": {"labels": {"app": "web"}},
                         "spec": {"containers": [{"name": "c", "image": image,
                                                  "ports": [{"name": "http", "containerPort": 8080}]}]}},
        },
    })
}

fn condition<'a>(object: &'a Value, type_: &str) -> &'a str {
    let all = object["status"]["conditions"].as_array();
    let found = all.into_iter().flatten().find(|condition| condition["type"] == type_);
    found.map_or("", |condition| text(condition, "/reason"))
}

/// As `kubectl rollout status` decides.
fn is_rolled_out(deployment: &Value) -> bool {
    let number = |pointer: &str| deployment.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    number("/status/observedGeneration") >= number("/metadata/generation")
        && number("/status/updatedReplicas") == number("/spec/replicas")
        && number("/status/replicas") == number("/status/updatedReplicas")
        && number("/status/availableReplicas") == number("/status/updatedReplicas")
        && condition(deployment, "Progressing") == "NewReplicaSetAvailable"
}

impl Cluster {
    async fn rolled_out(&self) -> Value {
        let rolled_out = |api: &FakeApi| api.get("deployments", "default", "web").filter(is_rolled_out);
        self.until("the deployment is rolled out", rolled_out).await
    }

    fn set_image(&self, image: &str) {
        self.edit("deployments", "default", "web", |web| {
            web["spec"]["template"]["spec"]["containers"][0]["image"] = json!(image)
        });
    }

    fn images(&self) -> Vec<String> {
        self.list("pods").iter().map(|pod| text(pod, "/spec/containers/0/image").to_owned()).collect()
    }

    async fn event(&self, reason: &str, message: &str) {
        let what = format!("event {reason}: {message}");
        let is_it = |event: &Value| event["reason"] == reason && text(event, "/message").contains(message);
        self.until_true(&what, |api| api.list("events").iter().any(is_it)).await;
    }
}

#[tokio::test]
async fn a_deployment_becomes_pods_and_says_so() {
    let cluster = cluster();
    cluster.create(deployment(3, "one"));
    let web = cluster.rolled_out().await;
    assert_eq!(condition(&web, "Available"), "MinimumReplicasAvailable");
    assert_eq!(text(&web, "/metadata/annotations/deployment.kubernetes.io~1revision"), "1");
    let sets = cluster.list("replicasets");
    assert_eq!(sets.len(), 1);
    let hash = text(&sets[0], "/metadata/labels/pod-template-hash");
    assert_eq!(text(&sets[0], "/metadata/name"), format!("web-{hash}"));
    assert_eq!(text(&sets[0], "/metadata/annotations/note"), "x");
    assert_eq!(sets[0].pointer("/metadata/annotations/deployment.kubernetes.io~1max-replicas").unwrap(), "4");
    let pods = cluster.list("pods");
    assert_eq!(pods.len(), 3);
    assert!(pods.iter().all(|pod| text(pod, "/metadata/labels/pod-template-hash") == hash));
    assert_eq!(cluster.changes("pods", "ADDED"), 3, "no pod was created twice");
    cluster.event("ScalingReplicaSet", "from 0 to 3").await;
    cluster.event("SuccessfulCreate", "Created pod: web-").await;
}

#[tokio::test]
async fn scaling_up_and_down_keeps_the_replica_set() {
    let cluster = cluster();
    cluster.create(deployment(2, "one"));
    cluster.rolled_out().await;
    for wanted in [5, 1, 0] {
        cluster.edit("deployments", "default", "web", |web| web["spec"]["replicas"] = json!(wanted));
        cluster.rolled_out().await;
        cluster.until_true("the pods follow", |api| api.list("pods").len() == wanted).await;
    }
    assert_eq!(cluster.list("replicasets").len(), 1);
}

#[tokio::test]
async fn a_rolling_update_replaces_pods_within_its_fences_and_undo_reuses_the_old_set() {
    let cluster = cluster();
    cluster.create(deployment(4, "one"));
    cluster.rolled_out().await;
    let first = text(&cluster.list("replicasets")[0], "/metadata/name").to_owned();
    cluster.set_image("two");
    cluster
        .until("the new pods are the only ones", |api| {
            let pods = api.list("pods");
            assert!(pods.len() <= 5 + 4, "surge of one, and those still going");
            let serving = pods.iter().filter(|pod| {
                text(pod, "/metadata/deletionTimestamp").is_empty() && text(pod, "/status/phase") == "Running"
            });
            assert!(serving.count() >= 3, "at most one pod unavailable");
            (pods.len() == 4 && pods.iter().all(|pod| text(pod, "/spec/containers/0/image") == "two")).then_some(())
        })
        .await;
    let web = cluster.rolled_out().await;
    assert_eq!(text(&web, "/metadata/annotations/deployment.kubernetes.io~1revision"), "2");
    // kubectl rollout undo puts the old template back.
    cluster.set_image("one");
    cluster.until_true("the old image is back", |_| cluster.images() == ["one"; 4]).await;
    let web = cluster.rolled_out().await;
    assert_eq!(text(&web, "/metadata/annotations/deployment.kubernetes.io~1revision"), "3");
    assert_eq!(cluster.list("replicasets").len(), 2);
    let revived = cluster.get("replicasets", "default", &first).unwrap();
    assert_eq!(text(&revived, "/metadata/annotations/deployment.kubernetes.io~1revision"), "3");
    assert_eq!(text(&revived, "/metadata/annotations/deployment.kubernetes.io~1revision-history"), "1");
}

#[tokio::test]
async fn a_broken_image_stops_the_rollout_and_costs_no_availability() {
    let cluster = cluster();
    cluster.create(deployment(4, "one"));
    cluster.rolled_out().await;
    cluster.set_image("broken");
    cluster
        .until_true("the rollout stands still", |api| {
            let web = api.get("deployments", "default", "web").unwrap();
            web["status"]["updatedReplicas"] == 2 && web["status"]["availableReplicas"] == 3
        })
        .await;
    assert_eq!(condition(&cluster.get("deployments", "default", "web").unwrap(), "Progressing"), "ReplicaSetUpdated");
    cluster.set_image("one");
    cluster.rolled_out().await;
    cluster.until_true("no broken pod is left", |_| cluster.images() == ["one"; 4]).await;
}

#[tokio::test]
async fn recreate_stops_every_old_pod_before_it_starts_a_new_one() {
    let cluster = cluster();
    let mut web = deployment(3, "one");
    web["spec"]["strategy"] = json!({"type": "Recreate"});
    cluster.create(web);
    cluster.rolled_out().await;
    cluster.set_image("two");
    cluster
        .until("only new pods", |api| {
            let pods = api.list("pods");
            let of = |image: &str| pods.iter().filter(|pod| text(pod, "/spec/containers/0/image") == image).count();
            assert!(of("one") == 0 || of("two") == 0, "old and new at the same time");
            (of("two") == 3).then_some(())
        })
        .await;
    cluster.rolled_out().await;
}

#[tokio::test]
async fn a_paused_deployment_scales_but_does_not_roll() {
    let cluster = cluster();
    cluster.create(deployment(2, "one"));
    cluster.rolled_out().await;
    cluster.edit("deployments", "default", "web", |web| web["spec"]["paused"] = json!(true));
    cluster.set_image("two");
    cluster.edit("deployments", "default", "web", |web| web["spec"]["replicas"] = json!(3));
    cluster.until_true("three old pods", |_| cluster.images() == ["one"; 3]).await;
    cluster
        .until_true("it says that it is paused", |api| {
            condition(&api.get("deployments", "default", "web").unwrap(), "Progressing") == "DeploymentPaused"
        })
        .await;
    cluster.edit("deployments", "default", "web", |web| web["spec"]["paused"] = json!(false));
    cluster.rolled_out().await;
    cluster.until_true("three new pods", |_| cluster.images() == ["two"; 3]).await;
}

#[tokio::test]
async fn old_sets_beyond_the_history_limit_go() {
    let cluster = cluster();
    let mut web = deployment(1, "v0");
    web["spec"]["revisionHistoryLimit"] = json!(1);
    cluster.create(web);
    cluster.rolled_out().await;
    for version in 1..4 {
        cluster.set_image(&format!("v{version}"));
        cluster.rolled_out().await;
    }
    cluster.until_true("two sets are left", |api| api.list("replicasets").len() == 2).await;
}

#[tokio::test]
async fn a_lost_pod_is_replaced_and_an_orphan_is_adopted() {
    let cluster = cluster();
    cluster.create(deployment(2, "one"));
    cluster.rolled_out().await;
    let pods = cluster.list("pods");
    let (lost, freed) = (text(&pods[0], "/metadata/name"), text(&pods[1], "/metadata/name"));
    cluster.delete("pods", "default", lost, json!({"gracePeriodSeconds": 0}));
    cluster.until_true("a new pod", |api| api.list("pods").len() == 2 && api.changes("pods", "ADDED") == 3).await;
    // Relabelled: released, and replaced. Labelled back: adopted, and one too many.
    let hash = text(&pods[1], "/metadata/labels/pod-template-hash").to_owned();
    cluster.edit("pods", "default", freed, |pod| pod["metadata"]["labels"] = json!({"app": "debug"}));
    cluster
        .until_true("it is released and replaced", |api| {
            let pod = api.get("pods", "default", freed).unwrap();
            api.list("pods").len() == 3 && pod["metadata"]["ownerReferences"].as_array().is_none_or(Vec::is_empty)
        })
        .await;
    cluster.edit("pods", "default", freed, |pod| {
        pod["metadata"]["labels"] = json!({"app": "web", "pod-template-hash": hash});
    });
    cluster.until_true("one of three goes", |api| api.list("pods").len() == 2).await;
    cluster.rolled_out().await;
}

#[tokio::test]
async fn a_refused_pod_is_reported_and_tried_again() {
    let cluster = cluster();
    cluster.refuse("POST", "pods", 3, Refused::new(403, "Forbidden", "exceeded quota"));
    cluster.create(deployment(2, "one"));
    cluster.event("FailedCreate", "Error creating: exceeded quota").await;
    cluster.rolled_out().await;
}

#[tokio::test]
async fn deleting_a_deployment_takes_everything_with_it() {
    for policy in ["Background", "Foreground"] {
        let cluster = cluster();
        cluster.create(deployment(3, "one"));
        cluster.rolled_out().await;
        cluster.delete("deployments", "default", "web", json!({"propagationPolicy": policy}));
        cluster
            .until(&format!("{policy} deletion is complete"), |api| {
                let (sets, pods) = (api.list("replicasets").len(), api.list("pods").len());
                let web = api.get("deployments", "default", "web").is_some();
                if policy == "Foreground" {
                    assert!(web || (sets == 0 && pods == 0), "the owner went before its dependents");
                }
                (!web && sets == 0 && pods == 0).then_some(())
            })
            .await;
    }
}

#[tokio::test]
async fn orphaning_leaves_the_dependents_and_a_new_owner_adopts_them() {
    let cluster = cluster();
    cluster.create(deployment(2, "one"));
    cluster.rolled_out().await;
    cluster.delete("deployments", "default", "web", json!({"propagationPolicy": "Orphan"}));
    cluster.until_true("the deployment is gone", |api| api.get("deployments", "default", "web").is_none()).await;
    let sets = cluster.list("replicasets");
    assert_eq!(sets.len(), 1);
    assert!(sets[0]["metadata"]["ownerReferences"].as_array().is_none_or(Vec::is_empty));
    let pods = cluster.list("pods").len();
    cluster.create(deployment(2, "one"));
    cluster.rolled_out().await;
    assert_eq!((cluster.list("replicasets").len(), cluster.changes("pods", "ADDED")), (1, pods));
}

#[tokio::test]
async fn an_object_whose_owner_never_existed_is_collected() {
    let cluster = cluster();
    let owner = json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "ghost", "uid": "no-such-uid"});
    cluster.create(json!({"kind": "ConfigMap", "metadata": {"name": "child", "ownerReferences": [owner]}}));
    cluster.until_true("the child is gone", |api| api.get("configmaps", "default", "child").is_none()).await;
}

#[tokio::test]
async fn a_service_gets_slices_and_endpoints_that_follow_its_pods() {
    let cluster = cluster();
    cluster.create(json!({
        "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "clusterIP": "10.43.0.9",
                 "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]},
    }));
    cluster.create(deployment(3, "one"));
    let ready = |api: &FakeApi| -> usize {
        let slices = api.list("endpointslices");
        let endpoints = slices.iter().flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count()
    };
    cluster.until_true("three ready endpoints", |api| ready(api) == 3).await;
    let with_ports = cluster.until("one slice with ports", |api| {
        let slices = api.list("endpointslices");
        (slices.len() == 1).then(|| slices[0].clone())
    });
    let slice = with_ports.await;
    assert_eq!(slice["ports"][0]["port"], 8080);
    assert_eq!(slice["endpoints"][0]["zone"], "z1");
    cluster
        .until_true("three addresses", |api| {
            let endpoints = api.get("endpoints", "default", "web").unwrap_or_default();
            endpoints["subsets"][0]["addresses"].as_array().is_some_and(|list| list.len() == 3)
        })
        .await;
    let (changed_at, pod) = ("2026-01-02T03:04:05Z", cluster.list("pods")[0].clone());
    cluster.edit("pods", "default", text(&pod, "/metadata/name"), |pod| {
        pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False", "lastTransitionTime": changed_at}]);
    });
    cluster
        .until_true("the slice to say which change it was written for", |api| {
            let annotations = &api.list("endpointslices")[0]["metadata"]["annotations"];
            ready(api) == 2 && annotations["endpoints.kubernetes.io/last-change-trigger-time"] == changed_at
        })
        .await;
    cluster.edit("deployments", "default", "web", |web| web["spec"]["replicas"] = json!(1));
    cluster.until_true("one endpoint", |api| ready(api) == 1).await;
    cluster.delete("services", "default", "web", json!({}));
    cluster
        .until_true("nothing is left of it", |api| {
            api.list("endpointslices").is_empty() && api.list("endpoints").is_empty()
        })
        .await;
}

#[tokio::test]
async fn a_namespace_gets_its_account_and_ca_and_goes_with_all_its_content() {
    let cluster = cluster();
    cluster.create(json!({"kind": "Namespace", "metadata": {"name": "team"}}));
    cluster
        .until_true("account and CA are there", |api| {
            let ca = api.get("configmaps", "team", "kube-root-ca.crt").unwrap_or_default();
            ca["data"]["ca.crt"] == "PEM" && api.get("serviceaccounts", "team", "default").is_some()
        })
        .await;
    let mut web = deployment(2, "one");
    web["metadata"]["namespace"] = json!("team");
    cluster.create(web);
    cluster.until_true("pods run", |api| api.list("pods").len() == 2).await;
    cluster.delete("namespaces", "", "team", json!({}));
    cluster.until_true("the namespace is gone", |api| api.get("namespaces", "", "team").is_none()).await;
    for resource in ["pods", "deployments", "replicasets", "serviceaccounts", "configmaps"] {
        let left = cluster.list(resource).iter().filter(|object| object["metadata"]["namespace"] == "team").count();
        assert_eq!(left, 0, "{resource}");
    }
}

#[tokio::test]
async fn a_node_gets_addresses_and_taints_follow_its_state() {
    let cluster = cluster();
    let node = cluster.until("n1 has a range", |api| {
        api.get("nodes", "", "n1").filter(|node| !text(node, "/spec/podCIDR").is_empty())
    });
    assert_eq!(text(&node.await, "/spec/podCIDR"), "10.42.0.0/24");
    cluster.edit("nodes", "", "n1", |node| node["status"]["conditions"][0]["status"] = json!("False"));
    let tainted = |api: &FakeApi, wanted: usize| {
        let node = api.get("nodes", "", "n1").unwrap();
        node["spec"]["taints"].as_array().map_or(0, Vec::len) == wanted
    };
    cluster.until_true("not-ready twice", |api| tainted(api, 2)).await;
    cluster.edit("nodes", "", "n1", |node| node["status"]["conditions"][0]["status"] = json!("True"));
    cluster.until_true("no taint", |api| tainted(api, 0)).await;
}

#[tokio::test]
async fn pods_that_do_not_tolerate_a_no_execute_taint_are_evicted() {
    let cluster = cluster();
    let pod = |name: &str, tolerations: Value| {
        json!({"kind": "Pod", "metadata": {"name": name},
               "spec": {"nodeName": "n1", "containers": [{"name": "c"}], "tolerations": tolerations}})
    };
    cluster.create(pod("stays", json!([{"operator": "Exists"}])));
    cluster.create(pod("goes", json!([])));
    cluster.until_true("both run", |api| api.list("pods").iter().all(|pod| pod["status"]["phase"] == "Running")).await;
    cluster.edit("nodes", "", "n1", |node| {
        node["spec"]["taints"] = json!([{"key": "maintenance", "effect": "NoExecute"}]);
    });
    cluster.until_true("one is gone", |api| api.get("pods", "default", "goes").is_none()).await;
    assert!(cluster.get("pods", "default", "stays").is_some());
    cluster.event("TaintManagerEviction", "Marking for deletion Pod default/goes").await;
}

#[tokio::test]
async fn a_budget_says_how_many_pods_may_go() {
    let cluster = cluster();
    cluster.create(deployment(3, "one"));
    cluster.create(json!({
        "kind": "PodDisruptionBudget", "metadata": {"name": "web"},
        "spec": {"minAvailable": 2, "selector": {"matchLabels": {"app": "web"}}},
    }));
    cluster
        .until_true("one may go", |api| {
            let budget = api.get("poddisruptionbudgets", "default", "web").unwrap();
            budget["status"]["disruptionsAllowed"] == 1 && budget["status"]["currentHealthy"] == 3
        })
        .await;
}

#[tokio::test]
async fn balancer_addresses_come_and_go_with_their_services() {
    let cluster = cluster();
    let make = |name: &str, wish: Option<&str>| {
        cluster.create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.43.0.9", "loadBalancerIP": wish, "ports": [{"port": 80}]},
        }))
    };
    let has = |api: &FakeApi, name: &str| {
        let service = api.get("services", "default", name)?;
        Some(text(&service, "/status/loadBalancer/ingress/0/ip").to_owned())
    };
    make("one", None);
    cluster.until_true("the first address", |api| has(api, "one").as_deref() == Some("192.0.2.0")).await;
    make("two", Some("192.0.2.0"));
    cluster.event("SyncLoadBalancerFailed", "192.0.2.0 belongs to Service default/one").await;
    cluster.delete("services", "default", "one", json!({}));
    cluster.until_true("the address that is free again", |api| has(api, "two").as_deref() == Some("192.0.2.0")).await;
    cluster.pools.send(vec!["198.51.100.8/30".parse().unwrap()]).unwrap();
    cluster.until_true("the address that is in no pool to end", |api| has(api, "two").as_deref() == Some("")).await;
    cluster.event("SyncLoadBalancerFailed", "192.0.2.0 is in no pool").await;
    cluster.edit("services", "default", "two", |service| service["spec"]["loadBalancerIP"] = Value::Null);
    cluster.until_true("an address of the new pool", |api| has(api, "two").as_deref() == Some("198.51.100.8")).await;
    cluster.pools.send(Vec::new()).unwrap();
    cluster.until_true("the address without a pool to end", |api| has(api, "two").as_deref() == Some("")).await;
    cluster.pools.send(vec!["192.0.2.0/30".parse().unwrap()]).unwrap();
    cluster.until_true("the address of before", |api| has(api, "two").as_deref() == Some("192.0.2.0")).await;
    cluster.edit("services", "default", "two", |service| service["spec"]["type"] = "ClusterIP".into());
    cluster.until_true("the address to be given back", |api| has(api, "two").as_deref() == Some("")).await;
}
