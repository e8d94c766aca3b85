//! Defaults as a user sees them in `kubectl get -o yaml`.

use serde_json::{Value, json};

fn defaulted(function: fn(&mut Value), mut object: Value) -> Value {
    function(&mut object);
    let once = object.clone();
    function(&mut object);
    assert_eq!(object, once, "defaults are idempotent");
    object
}

#[test]
fn a_bare_pod_gets_what_upstream_gives_it() {
    let pod = defaulted(
        super::pod,
        json!({"spec": {"containers": [{"name": "a", "image": "nginx",
        "ports": [{"containerPort": 80}], "livenessProbe": {"httpGet": {"port": 80}}, "resources": {"limits": {"cpu": "1"}}}]}}),
    );
    let spec = &pod["spec"];
    assert_eq!(spec["restartPolicy"], "Always");
    assert_eq!(spec["dnsPolicy"], "ClusterFirst");
    assert_eq!(spec["schedulerName"], "default-scheduler");
    assert_eq!(spec["terminationGracePeriodSeconds"], 30);
    assert_eq!(spec["enableServiceLinks"], true);
    let container = &spec["containers"][0];
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(container["terminationMessagePath"], "/dev/termination-log");
    assert_eq!(container["ports"][0]["protocol"], "TCP");
    assert_eq!(container["resources"]["requests"]["cpu"], "1");
    assert_eq!(
        container["livenessProbe"],
        json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10,
            "successThreshold": 1, "failureThreshold": 3})
    );
}

#[test]
fn the_pull_policy_follows_the_tag() {
    for (image, policy) in [
        ("nginx", "Always"),
        ("nginx:latest", "Always"),
        ("nginx:1.27", "IfNotPresent"),
        ("localhost:5000/nginx", "Always"),
        ("localhost:5000/nginx:1", "IfNotPresent"),
        ("nginx@sha256:aa", "IfNotPresent"),
    ] {
        assert_eq!(super::container::pull_policy(image), policy, "{image}");
    }
}

#[test]
fn volumes_get_modes_and_an_empty_one_is_an_empty_dir() {
    let pod = defaulted(
        super::pod,
        json!({"spec": {"volumes": [{"name": "a"}, {"name": "b", "secret": {"secretName": "s"}},
        {"name": "c", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]}}),
    );
    assert_eq!(pod["spec"]["volumes"][0]["emptyDir"], json!({}));
    assert_eq!(pod["spec"]["volumes"][1]["secret"]["defaultMode"], 420);
    assert_eq!(pod["spec"]["volumes"][2]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"], 3600);
}

#[test]
fn a_deployment_gets_a_rolling_update() {
    let object = defaulted(super::deployment, json!({"spec": {"template": {"spec": {"containers": [{"name": "a"}]}}}}));
    let spec = &object["spec"];
    assert_eq!(spec["replicas"], 1);
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
    );
    assert_eq!(spec["template"]["spec"]["restartPolicy"], "Always");
    assert!(spec["template"]["spec"].get("enableServiceLinks").is_none());
    let object = defaulted(super::deployment, json!({"spec": {"replicas": 0, "strategy": {"type": "Recreate"}}}));
    assert_eq!(object["spec"]["replicas"], 0);
    assert_eq!(object["spec"]["strategy"], json!({"type": "Recreate"}));
}

#[test]
fn a_service_targets_its_own_port() {
    let object = defaulted(
        super::service,
        json!({"spec": {"ports": [{"port": 80}, {"port": 81, "targetPort": "web", "protocol": "UDP"}]}}),
    );
    assert_eq!(object["spec"]["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
    assert_eq!(object["spec"]["ports"][1]["targetPort"], "web");
    assert_eq!(object["spec"]["type"], "ClusterIP");
    assert_eq!(object["spec"]["internalTrafficPolicy"], "Cluster");
    assert!(object["spec"].get("externalTrafficPolicy").is_none());
}

#[test]
fn string_data_is_written_into_data() {
    let object = defaulted(super::secret, json!({"stringData": {"a": "b"}, "data": {"c": "ZA=="}}));
    assert_eq!(object, json!({"type": "Opaque", "data": {"c": "ZA==", "a": "Yg=="}}));
}
