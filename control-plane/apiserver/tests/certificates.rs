//! Certificate requests, who may decide on them, bootstrap tokens, and what a node may see of volumes.

mod fixture;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fixture::Fixture;
use serde_json::{Value, json};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

fn pem(organization: &str) -> String {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, organization);
    params.distinguished_name.push(rcgen::DnType::CommonName, "system:node:edge");
    STANDARD.encode(params.serialize_request(&key).expect("a request").pem().expect("PEM"))
}

fn request(name: &str, signer: &str, organization: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"request": pem(organization), "signerName": signer,
        "usages": ["client auth", "digital signature"], "username": "somebody-else"}})
}

#[tokio::test]
async fn the_server_says_who_asks_and_refuses_what_is_no_request() {
    let fixture = Fixture::new().await;
    let node = fixture.as_user("system:node:edge", &["system:nodes"]);
    let signer = "kubernetes.io/kube-apiserver-client-kubelet";
    let made = node.post(REQUESTS, &request("a", signer, "system:nodes")).await;
    assert_eq!(made.code, 201, "{}", made.body);
    assert_eq!(made.body["spec"]["username"], "system:node:edge");
    assert!(made.body["spec"]["groups"].to_string().contains("system:nodes"));
    let mut rubbish = request("b", signer, "system:nodes");
    rubbish["spec"]["request"] = json!(STANDARD.encode("rubbish"));
    let refused = node.post(REQUESTS, &rubbish).await;
    assert_eq!(refused.code, 422);
    assert!(refused.message().contains("PEM block type must be CERTIFICATE REQUEST"), "{}", refused.message());
    let masters = request("c", "kubernetes.io/kube-apiserver-client", "system:masters");
    let refused = fixture.admin.post(REQUESTS, &masters).await;
    assert!(refused.message().contains("signer with system:masters group is not allowed"), "{}", refused.message());
    let mut short = request("d", signer, "system:nodes");
    short["spec"]["expirationSeconds"] = json!(60);
    assert!(node.post(REQUESTS, &short).await.message().contains("600 seconds (10 minutes)"));
}

#[tokio::test]
async fn approval_needs_the_right_and_touches_nothing_else() {
    let fixture = Fixture::new().await;
    let signer = "kubernetes.io/kube-apiserver-client-kubelet";
    fixture.admin.post(REQUESTS, &request("a", signer, "system:nodes")).await.ok();
    let path = format!("{REQUESTS}/a");
    let mut object = fixture.admin.get(&path).await.body;
    object["status"]["conditions"] = json!([{"type": "Approved", "status": "True", "reason": "Test", "message": "m"}]);
    object["status"]["certificate"] = json!(STANDARD.encode("mine"));
    let role = json!({"metadata": {"name": "approver"}, "rules": [{"verbs": ["update"], "apiGroups": ["certificates.k8s.io"],
        "resources": ["certificatesigningrequests/approval"]}]});
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    fixture.admin.post(&format!("{rbac}/clusterroles"), &role).await.ok();
    let binding = json!({"metadata": {"name": "approver"}, "subjects": [{"kind": "User", "name": "alice",
        "apiGroup": "rbac.authorization.k8s.io"}], "roleRef": {"kind": "ClusterRole", "name": "approver",
        "apiGroup": "rbac.authorization.k8s.io"}});
    fixture.admin.post(&format!("{rbac}/clusterrolebindings"), &binding).await.ok();
    let alice = fixture.as_user("alice", &[]);
    let refused = alice.put(&format!("{path}/approval"), &object).await;
    assert!(
        refused.message().contains("user not permitted to approve requests with signerName"),
        "{}",
        refused.message()
    );
    let approved = fixture.admin.put(&format!("{path}/approval"), &object).await;
    assert_eq!(approved.code, 200, "{}", approved.body);
    assert_eq!(approved.body["status"]["conditions"][0]["type"], "Approved");
    assert!(approved.body["status"]["conditions"][0]["lastUpdateTime"].is_string());
    assert_eq!(approved.body["status"].get("certificate"), None, "approving is not signing");
    let mut denied = approved.body.clone();
    denied["status"]["conditions"] = json!([{"type": "Denied", "status": "True"}]);
    let refused = fixture.admin.put(&format!("{path}/approval"), &denied).await;
    assert!(refused.message().contains("may not remove a condition of type"), "{}", refused.message());
}

#[tokio::test]
async fn claims_and_volumes_are_kept_and_a_node_sees_those_of_its_pods() {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let claims = "/api/v1/namespaces/work/persistentvolumeclaims";
    let claim = json!({"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "volumeName": "pv",
        "resources": {"requests": {"storage": "1Gi"}}}});
    let made = fixture.admin.post(claims, &claim).await;
    assert_eq!((made.code, &made.body["status"]["phase"]), (201, &json!("Pending")), "{}", made.body);
    assert_eq!(made.body["spec"]["volumeMode"], "Filesystem");
    let volume = json!({"metadata": {"name": "pv"}, "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
        "claimRef": {"namespace": "work", "name": "data"}, "csi": {"driver": "d.example.com", "volumeHandle": "h",
            "nodeStageSecretRef": {"namespace": "work", "name": "key"}}}});
    fixture.admin.post("/api/v1/persistentvolumes", &volume).await.ok();
    fixture.admin.post("/api/v1/namespaces/work/secrets", &json!({"metadata": {"name": "key"}})).await.ok();
    let two = json!({"metadata": {"name": "two"}, "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/x"}, "nfs": {"server": "s", "path": "/"}}});
    let refused = fixture.admin.post("/api/v1/persistentvolumes", &two).await;
    assert!(refused.message().contains("may not specify more than 1 volume type"), "{}", refused.message());
    let node = fixture.as_user("system:node:edge", &["system:nodes"]);
    let seen = ["/api/v1/persistentvolumes/pv", "/api/v1/namespaces/work/secrets/key", &format!("{claims}/data")];
    for path in seen {
        assert_eq!(node.get(path).await.code, 403, "{path}: no pod of the node has it");
    }
    let pod = json!({"metadata": {"name": "web"}, "spec": {"nodeName": "edge", "containers": [{"name": "c", "image": "i"}],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}});
    assert_eq!(fixture.admin.post("/api/v1/namespaces/work/pods", &pod).await.code, 201);
    for path in seen {
        assert_eq!(node.get(path).await.code, 200, "{path}");
    }
    let foreign = json!({"metadata": {"name": "other"}, "spec": {"drivers": []}});
    assert_eq!(node.post("/apis/storage.k8s.io/v1/csinodes", &foreign).await.code, 403);
    let own = json!({"metadata": {"name": "edge"}, "spec": {"drivers": []}});
    assert_eq!(node.post("/apis/storage.k8s.io/v1/csinodes", &own).await.code, 201);
}

#[tokio::test]
async fn whoever_joins_learns_where_the_cluster_is_and_nothing_else() {
    let fixture = Fixture::new().await;
    let stranger = fixture.as_user("system:anonymous", &["system:unauthenticated"]);
    let maps = "/api/v1/namespaces/kube-public/configmaps";
    let info = stranger.get(&format!("{maps}/cluster-info")).await;
    assert_eq!(info.code, 200, "{}", info.body);
    let kubeconfig: Value =
        serde_json::from_str(info.body["data"]["kubeconfig"].as_str().expect("text")).expect("a kubeconfig");
    let cluster = &kubeconfig["clusters"][0]["cluster"];
    assert!(cluster["server"].as_str().is_some_and(|server| server.starts_with("https://")), "{cluster}");
    let authority = STANDARD.decode(cluster["certificate-authority-data"].as_str().expect("text")).expect("base64");
    assert!(authority.starts_with(b"-----BEGIN CERTIFICATE-----"));
    assert_eq!(stranger.get(maps).await.code, 401, "not the others");
    assert_eq!(stranger.get("/api/v1/namespaces/kube-system/configmaps/oarlock-node-configuration").await.code, 401);
    assert_eq!(stranger.put(&format!("{maps}/cluster-info"), &info.body).await.code, 403);
    let watch = stranger.get(&format!("{maps}?watch=true&fieldSelector=metadata.name%3Dcluster-info")).await;
    assert_eq!(watch.code, 401);
}
