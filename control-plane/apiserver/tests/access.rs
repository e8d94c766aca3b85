//! Who gets in and what they may do: certificates, tokens, RBAC, the node rules, reviews, impersonation.

mod fixture;

use fixture::{Caller, Fixture};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const MERGE: &str = "application/merge-patch+json";
const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1";
const SECRETS: &str = "/api/v1/namespaces/default/secrets";

async fn bind(fixture: &Fixture, role: &str, user: &str) {
    let binding = json!({
        "metadata": {"name": format!("{user}-{role}")},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    });
    fixture.admin.post(&format!("{ROLES}/clusterrolebindings"), &binding).await.ok();
}

#[tokio::test]
async fn roles_decide_and_refusals_say_what_was_refused() {
    let fixture = Fixture::new().await;
    let alice = fixture.as_user("alice", &[]);
    let refused = alice.get("/api/v1/namespaces/default/pods").await;
    assert_eq!((refused.code, refused.reason()), (403, "Forbidden"));
    assert_eq!(
        refused.message(),
        "pods is forbidden: User \"alice\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    let nodes = alice.get("/apis/apps/v1/deployments").await;
    assert_eq!(
        nodes.message(),
        "deployments.apps is forbidden: User \"alice\" cannot list resource \"deployments\" in API group \"apps\" at the \
         cluster scope"
    );
    assert_eq!(alice.get("/metrics").await.message(), "forbidden: User \"alice\" cannot get path \"/metrics\"");
    bind(&fixture, "view", "alice").await;
    assert_eq!(alice.get("/api/v1/namespaces/default/pods").await.code, 200);
    assert_eq!(alice.get(SECRETS).await.code, 403);
    assert_eq!(
        alice.post("/api/v1/namespaces/default/configmaps", &json!({"metadata": {"name": "a"}})).await.code,
        403
    );
}

#[tokio::test]
async fn a_role_labelled_for_aggregation_widens_the_one_it_names() {
    let fixture = Fixture::new().await;
    bind(&fixture, "view", "alice").await;
    let role = json!({
        "metadata": {"name": "more", "labels": {"rbac.authorization.k8s.io/aggregate-to-view": "true"}},
        "rules": [{"verbs": ["list"], "apiGroups": [""], "resources": ["secrets"]}],
    });
    fixture.admin.post(&format!("{ROLES}/clusterroles"), &role).await.ok();
    assert_eq!(fixture.as_user("alice", &[]).get(SECRETS).await.code, 200);
}

#[tokio::test]
async fn nobody_grants_what_they_do_not_hold() {
    let fixture = Fixture::new().await;
    let binding = json!({
        "metadata": {"name": "a"}, "subjects": [{"kind": "User", "name": "alice"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "admin"},
    });
    let bindings = format!("{ROLES}/namespaces/default/rolebindings");
    fixture.admin.post(&bindings, &binding).await.ok();
    let alice = fixture.as_user("alice", &[]);
    let roles = format!("{ROLES}/namespaces/default/roles");
    let role = |name: &str, resource: &str| json!({"metadata": {"name": name}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]});
    assert_eq!(alice.post(&roles, &role("held", "pods")).await.code, 201);
    let refused = alice.post(&roles, &role("more", "nodes")).await;
    assert_eq!(refused.code, 403);
    assert!(
        refused.message().ends_with(
            "is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"nodes\"], \
             Verbs:[\"get\"]}"
        ),
        "{}",
        refused.message()
    );
    let mut widened = role("held", "nodes");
    widened["metadata"]["name"] = "held".into();
    assert_eq!(alice.put(&format!("{roles}/held"), &widened).await.code, 403);
    let give = |name: &str, role: &str| {
        json!({
            "metadata": {"name": name}, "subjects": [{"kind": "User", "name": "bob"}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        })
    };
    assert_eq!(alice.post(&bindings, &give("b", "cluster-admin")).await.code, 403);
    assert_eq!(alice.post(&bindings, &give("b", "edit")).await.code, 201);
}

#[tokio::test]
async fn a_node_reads_what_its_pods_refer_to_and_writes_only_its_own() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let node = fixture.as_user("system:node:n1", &["system:nodes"]);
    for name in ["used", "other"] {
        fixture.admin.post("/api/v1/namespaces/work/secrets", &json!({"metadata": {"name": name}})).await.ok();
    }
    let secret = "/api/v1/namespaces/work/secrets";
    assert_eq!(node.get(&format!("{secret}/used")).await.code, 403);
    let pod = json!({"metadata": {"name": "p"}, "spec": {
        "nodeName": "n1", "containers": [{"name": "c", "image": "i"}],
        "volumes": [{"name": "s", "secret": {"secretName": "used"}}],
    }});
    fixture.admin.post("/api/v1/namespaces/work/pods", &pod).await.ok();
    assert_eq!(node.get(&format!("{secret}/used")).await.code, 200);
    assert_eq!(node.get(&format!("{secret}/other")).await.code, 403);
    assert_eq!(node.get(secret).await.code, 403);
    assert_eq!(node.get("/api/v1/namespaces/work/configmaps/kube-root-ca.crt").await.code, 404);
    let other = fixture.as_user("system:node:n2", &["system:nodes"]);
    assert_eq!(other.get(&format!("{secret}/used")).await.code, 403);
    let status = json!({"status": {"phase": "Running"}});
    let path = "/api/v1/namespaces/work/pods/p/status";
    assert_eq!(other.patch(path, "application/merge-patch+json", &status).await.code, 403);
    assert_eq!(node.patch(path, "application/merge-patch+json", &status).await.code, 200);
    assert_eq!(node.post("/api/v1/nodes", &json!({"metadata": {"name": "n1"}})).await.code, 201);
    assert_eq!(node.post("/api/v1/nodes", &json!({"metadata": {"name": "n2"}})).await.code, 403);
    let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(node.post(lease, &json!({"metadata": {"name": "n1"}})).await.code, 201);
    assert_eq!(node.post(lease, &json!({"metadata": {"name": "n2"}})).await.code, 403);
    assert_eq!(node.get(&format!("{lease}/n2")).await.code, 403);
    assert_eq!(node.post("/api/v1/namespaces/work/pods", &pod).await.code, 403, "only mirror pods");
    let token = json!({"spec": {"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p"}}});
    let path = "/api/v1/namespaces/work/serviceaccounts/default/token";
    assert_eq!(node.post(path, &token).await.code, 201);
    assert_eq!(node.post(path, &json!({"spec": {}})).await.code, 403);
    assert_eq!(other.post(path, &token).await.code, 403);
    let account = "/api/v1/namespaces/work/serviceaccounts/default";
    assert_eq!((node.get(account).await.code, other.get(account).await.code), (200, 403));
    assert_eq!(node.get("/api/v1/namespaces/work/serviceaccounts").await.code, 403, "one by one");
}

#[tokio::test]
async fn drivers_say_how_much_room_they_have() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let path = "/apis/storage.k8s.io/v1/namespaces/work/csistoragecapacities";
    let room = |name: &str, class: &str, bytes: &str| {
        json!({"metadata": {"name": name}, "storageClassName": class, "capacity": bytes,
            "nodeTopology": {"matchLabels": {"zone": "a"}}})
    };
    fixture.admin.post(path, &room("here", "fast", "5Gi")).await.ok();
    let refused = fixture.admin.post(path, &room("no", "", "5Gi")).await;
    assert!(refused.code == 422 && refused.message().contains("storageClassName: Invalid value"), "{refused:?}");
    assert_eq!(fixture.admin.post(path, &room("no", "fast", "-1")).await.code, 422);
    let less = fixture.admin.patch(&format!("{path}/here"), MERGE, &json!({"capacity": "4Gi"})).await.ok();
    assert_eq!(less["capacity"], "4Gi");
    let moved = json!({"storageClassName": "slow"});
    assert_eq!(fixture.admin.patch(&format!("{path}/here"), MERGE, &moved).await.code, 422);
    // The scheduler reads it, and writes volumes and claims.
    let scheduler = fixture.as_user("system:kube-scheduler", &[]);
    assert_eq!(scheduler.get(path).await.code, 200);
    let claims = "/api/v1/namespaces/work/persistentvolumeclaims/absent";
    assert_eq!(scheduler.patch(claims, MERGE, &json!({})).await.code, 404);
}

#[tokio::test]
async fn a_mirror_pod_opens_nothing_to_its_node() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let node = fixture.as_user("system:node:n1", &["system:nodes"]);
    let pods = "/api/v1/namespaces/work/pods";
    fixture.admin.post("/api/v1/namespaces/work/secrets", &json!({"metadata": {"name": "s"}})).await.ok();
    let mirror = |name: &str, volumes: Value, from: Value| {
        json!({"metadata": {"name": name, "annotations": {"kubernetes.io/config.mirror": "hash"}}, "spec": {
            "nodeName": "n1", "volumes": volumes, "containers": [{"name": "c", "image": "i", "envFrom": from}]}})
    };
    let (none, claim) = (json!([]), json!({"claimName": "s"}));
    for (what, volumes, from) in [
        ("secrets", json!([{"name": "v", "secret": {"secretName": "s"}}]), none.clone()),
        ("configmaps", json!([{"name": "v", "configMap": {"name": "s"}}]), none.clone()),
        ("secrets", json!([{"name": "v", "projected": {"sources": [{"secret": {"name": "s"}}]}}]), none.clone()),
        ("persistentvolumeclaims", json!([{"name": "v", "persistentVolumeClaim": claim}]), none.clone()),
        ("secrets", none.clone(), json!([{"secretRef": {"name": "s"}}])),
    ] {
        let refused = node.post(pods, &mirror("p", volumes, from)).await;
        let why = format!("node \"n1\" can not create pods that reference {what}");
        assert!(refused.code == 403 && refused.message().ends_with(&why), "{refused:?}");
    }
    let mut with_account = mirror("p", none.clone(), none.clone());
    with_account["spec"]["serviceAccountName"] = "default".into();
    assert_eq!(node.post(pods, &with_account).await.code, 403);
    assert_eq!(node.get("/api/v1/namespaces/work/secrets/s").await.code, 403);
    let plain = json!([{"name": "v", "hostPath": {"path": "/etc"}}]);
    assert_eq!(node.post(pods, &mirror("plain", plain, none)).await.code, 201);
}

#[tokio::test]
async fn a_mirror_pod_is_owned_by_its_own_node_or_by_nobody() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let node = fixture.as_user("system:node:n1", &["system:nodes"]);
    let made = node.post("/api/v1/nodes", &json!({"metadata": {"name": "n1"}})).await.ok();
    let uid = made["metadata"]["uid"].clone();
    let own = json!({"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": uid, "controller": true});
    let mirror = |name: &str, owners: Value| {
        json!({"metadata": {"name": name, "annotations": {"kubernetes.io/config.mirror": "hash"},
            "ownerReferences": owners}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}})
    };
    let with = |field: &str, value: Value| {
        let mut owner = own.clone();
        owner[field] = value;
        json!([owner])
    };
    let second = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "u"});
    for (owners, why) in [
        (json!([own, second]), "with a single owner reference set to itself"),
        (with("name", json!("n2")), "with an owner reference set to itself"),
        (with("kind", json!("Pod")), "with an owner reference set to itself"),
        (with("controller", json!(false)), "with a controller owner reference set to itself"),
        (with("blockOwnerDeletion", json!(true)), "must not set blockOwnerDeletion on an owner reference"),
        (with("uid", json!("other")), "UID mismatch: expected other got"),
    ] {
        let refused = node.post("/api/v1/namespaces/work/pods", &mirror("p", owners)).await;
        assert!(refused.code == 403 && refused.message().contains(why), "{refused:?}");
    }
    let taken = node.post("/api/v1/namespaces/work/pods", &mirror("p", json!([own]))).await;
    assert_eq!(taken.code, 201, "{taken:?}");
}

#[tokio::test]
async fn a_node_evicts_only_its_own_pods() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let pods = "/api/v1/namespaces/work/pods";
    let pod =
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}});
    fixture.admin.post(pods, &pod).await.ok();
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    let evict = |node: &str| {
        let node = fixture.as_user(&format!("system:node:{node}"), &["system:nodes"]);
        let eviction = eviction.clone();
        async move { node.post(&format!("{pods}/p/eviction"), &eviction).await }
    };
    let refused = evict("n2").await;
    assert_eq!(refused.code, 403);
    let why = "node \"n2\" can only evict pods with spec.nodeName set to itself";
    assert!(refused.message().ends_with(why), "{}", refused.message());
    let there = fixture.admin.get(&format!("{pods}/p")).await.ok();
    assert!(there["metadata"]["deletionTimestamp"].is_null(), "it stays");
    assert_eq!(evict("n1").await.code, 201);
}

#[tokio::test]
async fn a_token_stands_for_its_account_until_what_it_is_bound_to_is_gone() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    fixture.admin.post("/api/v1/namespaces/work/pods", &pod).await.ok();
    let path = "/api/v1/namespaces/work/serviceaccounts/default/token";
    let request = json!({"spec": {"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p"}}});
    let granted = fixture.admin.post(path, &request).await.ok();
    let token = granted["status"]["token"].clone();
    let review = || async {
        let body = json!({"spec": {"token": token}});
        fixture.admin.post("/apis/authentication.k8s.io/v1/tokenreviews", &body).await.ok()
    };
    let good = review().await;
    assert_eq!(good["status"]["authenticated"], true);
    assert_eq!(good["status"]["user"]["username"], "system:serviceaccount:work:default");
    assert_eq!(good["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"], json!(["p"]));
    fixture.admin.delete("/api/v1/namespaces/work/pods/p", &json!({})).await.ok();
    assert_ne!(review().await["status"]["authenticated"], true);
    let short = fixture.admin.post(path, &json!({"spec": {"expirationSeconds": 60}})).await;
    assert_eq!((short.code, short.reason()), (422, "Invalid"));
    let foreign = json!({"spec": {"audiences": ["vault"]}});
    let foreign = fixture.admin.post(path, &foreign).await.ok()["status"]["token"].clone();
    let body = json!({"spec": {"token": foreign}});
    let refused = fixture.admin.post("/apis/authentication.k8s.io/v1/tokenreviews", &body).await.ok();
    assert_ne!(refused["status"]["authenticated"], true, "a token for others is not for this server");
    let body = json!({"spec": {"token": foreign, "audiences": ["vault", "x"]}});
    let accepted = fixture.admin.post("/apis/authentication.k8s.io/v1/tokenreviews", &body).await.ok();
    assert_eq!(accepted["status"]["audiences"], json!(["vault"]));
}

#[tokio::test]
async fn reviews_answer_for_others_and_for_oneself() {
    let fixture = Fixture::new().await;
    bind(&fixture, "view", "alice").await;
    let alice = fixture.as_user("alice", &["people"]);
    let access = |verb: &str| json!({"spec": {"resourceAttributes": {"namespace": "default", "verb": verb, "resource": "pods"}}});
    let own = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    assert_eq!(alice.post(own, &access("list")).await.ok()["status"]["allowed"], true);
    assert_eq!(alice.post(own, &access("create")).await.ok()["status"]["allowed"], false);
    let mut other = access("get");
    other["spec"]["user"] = "alice".into();
    let theirs = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    assert_eq!(fixture.admin.post(theirs, &other).await.ok()["status"]["allowed"], true);
    assert_eq!(alice.post(theirs, &other).await.code, 403);
    let me = alice.post("/apis/authentication.k8s.io/v1/selfsubjectreviews", &json!({})).await.ok();
    assert_eq!(me["status"]["userInfo"]["groups"], json!(["people", "system:authenticated"]));
    let rules = json!({"spec": {"namespace": "default"}});
    let rules = alice.post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", &rules).await.ok();
    assert!(rules["status"]["resourceRules"].as_array().is_some_and(|rules| rules.len() > 2));
}

#[tokio::test]
async fn impersonation_must_be_allowed() {
    let fixture = Fixture::new().await;
    let whoami = |caller: Caller, user: &'static str| async move {
        let request = http::Request::post("/apis/authentication.k8s.io/v1/selfsubjectreviews")
            .header("content-type", "application/json")
            .header("impersonate-user", user)
            .header("impersonate-group", "testers");
        caller.send(request, b"{}".to_vec()).await
    };
    let admin = fixture.as_user("kubernetes-admin", &["system:masters"]);
    let assumed = whoami(admin, "bob").await.ok();
    assert_eq!(assumed["status"]["userInfo"]["username"], "bob");
    assert_eq!(assumed["status"]["userInfo"]["groups"], json!(["testers", "system:authenticated"]));
    let refused = whoami(fixture.as_user("alice", &[]), "bob").await;
    assert_eq!((refused.code, refused.reason()), (403, "Forbidden"));
}

/// A client over TLS, with the given kubeconfig user.
async fn over_tls(dir: &std::path::Path, server: &oarlock_apiserver::ApiServer, user: Value) -> Caller {
    let authority = std::fs::read(dir.join("pki/ca.crt")).expect("the authority");
    let authority = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, authority);
    let config: kube::config::Kubeconfig = serde_json::from_value(json!({
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {
            "server": format!("https://{}", server.local_addr()), "certificate-authority-data": authority}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }))
    .expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.expect("a configuration");
    Caller { client: kube::Client::try_from(config).expect("a client") }
}

#[tokio::test]
async fn over_tls_certificates_and_tokens_get_in_and_nobody_else() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Fixture { dir, server, admin } = Fixture::new().await;
    let path = "/api/v1/namespaces/kube-system/serviceaccounts";
    admin.post(path, &json!({"metadata": {"name": "robot"}})).await.ok();
    let granted = admin.post(&format!("{path}/robot/token"), &json!({"spec": {}})).await.ok();
    let identity =
        fixture::client_identity(dir.path(), "kubernetes-admin", &["system:masters"]).expect("a certificate");
    let by_certificate = json!({"client-certificate": identity.cert_file, "client-key": identity.key_file});
    let certified = over_tls(dir.path(), &server, by_certificate).await;
    let robot = over_tls(dir.path(), &server, json!({"token": granted["status"]["token"]})).await;
    let forged = over_tls(dir.path(), &server, json!({"token": "not.a.token"})).await;
    let nobody = over_tls(dir.path(), &server, json!({})).await;
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(server.run(shutdown.clone()));
    assert_eq!(certified.get(path).await.code, 200);
    let whoami = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let me = robot.post(whoami, &json!({})).await.ok();
    assert_eq!(me["status"]["userInfo"]["username"], "system:serviceaccount:kube-system:robot");
    assert_eq!(robot.get(path).await.code, 403);
    assert_eq!(forged.get(path).await.code, 401);
    for (path, code) in
        [("/api/v1/pods", 401), ("/apis", 401), ("/metrics", 401), ("/version", 200), ("/readyz", 200), ("/livez", 200)]
    {
        assert_eq!(nobody.get(path).await.code, code, "{path}");
    }
    assert_eq!(nobody.get("/version").await.ok()["gitVersion"], "v1.36.0+oarlock.0.1.0");
    let mut watch = certified.watch("/api/v1/nodes?watch=true&resourceVersion=1").await;
    shutdown.cancel();
    assert!(watch.next().await.is_none(), "watches end when the server stops");
    running.await.expect("no panic").expect("stops in order");
}

#[tokio::test]
async fn the_proxy_keeps_leases_of_announcers_but_not_those_of_nodes() {
    let fixture = Fixture::new().await;
    let proxy = fixture.as_user("system:kube-proxy", &[]);
    let leases = |namespace: &str| format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases");
    let lease = json!({"metadata": {"name": "oarlock-announcer-n1"}, "spec": {"holderIdentity": "n1"}});
    assert_eq!(proxy.post(&leases("kube-system"), &lease).await.code, 201);
    assert_eq!(proxy.get(&format!("{}?labelSelector=a%3Dtrue", leases("kube-system"))).await.code, 200);
    assert_eq!(proxy.post(&leases("kube-node-lease"), &lease).await.code, 403);
}
