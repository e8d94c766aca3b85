//! Common mistakes and the texts that clients show for them.

use crate::{FieldError, by_kind};
use serde_json::{Value, json};

fn texts(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

/// A defaulted pod with one container, changed by `change`.
fn pod(change: impl FnOnce(&mut Value)) -> Value {
    let mut pod = json!({"metadata": {"name": "p", "namespace": "default"}, "spec": {"containers": [{"name": "a", "image": "x"}]}});
    change(&mut pod);
    crate::defaults::pod(&mut pod);
    pod
}

fn deployment(change: impl FnOnce(&mut Value)) -> Value {
    let mut object = json!({"metadata": {"name": "d", "namespace": "default"}, "spec": {"selector": {"matchLabels": {"app": "d"}},
        "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [{"name": "a", "image": "x"}]}}}});
    change(&mut object);
    crate::defaults::deployment(&mut object);
    object
}

fn service(change: impl FnOnce(&mut Value)) -> Value {
    let mut object = json!({"metadata": {"name": "s", "namespace": "default"}, "spec": {"ports": [{"port": 80}]}});
    change(&mut object);
    crate::defaults::service(&mut object);
    object
}

#[test]
fn good_objects_have_no_errors() {
    assert_eq!(texts(&super::pod(&pod(|_| {}))), Vec::<String>::new());
    assert_eq!(texts(&super::deployment(&deployment(|_| {}))), Vec::<String>::new());
    assert_eq!(texts(&super::service(&service(|_| {}))), Vec::<String>::new());
}

#[test]
fn mistakes_in_pods() {
    type Change = fn(&mut Value);
    let cases: &[(Change, &str)] = &[
        (|p| p["spec"]["containers"] = json!([]), "spec.containers: Required value"),
        (
            |p| p["spec"]["containers"][0]["name"] = json!("A"),
            "spec.containers[0].name: Invalid value: \"A\": a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name', or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')",
        ),
        (|p| p["spec"]["containers"][0]["image"] = json!(""), "spec.containers[0].image: Required value"),
        (
            |p| p["spec"]["containers"][0]["image"] = json!(" x"),
            "spec.containers[0].image: Invalid value: \" x\": must not have leading or trailing whitespace",
        ),
        (
            |p| p["spec"]["containers"][0]["imagePullPolicy"] = json!("Sometimes"),
            "spec.containers[0].imagePullPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"IfNotPresent\", \"Never\"",
        ),
        (
            |p| p["spec"]["containers"] = json!([{"name": "a", "image": "x"}, {"name": "a", "image": "x"}]),
            "spec.containers[1].name: Duplicate value: \"a\"",
        ),
        (
            |p| p["spec"]["containers"][0]["ports"] = json!([{"containerPort": 70000}]),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ),
        (
            |p| p["spec"]["containers"][0]["ports"] = json!([{"name": "web"}]),
            "spec.containers[0].ports[0].containerPort: Required value",
        ),
        (
            |p| p["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]),
            "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
        ),
        (
            |p| p["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ),
        (
            |p| p["spec"]["containers"][0]["resources"] = json!({"limits": {"cpus": "1"}}),
            "spec.containers[0].resources.limits[cpus]: Invalid value: \"cpus\": must be a standard resource for containers",
        ),
        (
            |p| p["spec"]["containers"][0]["livenessProbe"] = json!({"periodSeconds": 1}),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        (
            |p| {
                p["spec"]["containers"][0]["livenessProbe"] = json!({"exec": {"command": ["x"]}, "successThreshold": 2})
            },
            "spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
        ),
        (
            |p| {
                p["spec"]["containers"][0]["readinessProbe"] =
                    json!({"exec": {"command": ["x"]}, "tcpSocket": {"port": 1}})
            },
            "spec.containers[0].readinessProbe.tcpSocket: Forbidden: may not specify more than 1 handler type",
        ),
        (
            |p| p["spec"]["containers"][0]["readinessProbe"] = json!({"httpGet": {"port": "Not_A_Port"}}),
            "spec.containers[0].readinessProbe.httpGet.port: Invalid value: \"Not_A_Port\": must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)",
        ),
        (
            |p| {
                p["spec"]["containers"][0]["env"] =
                    json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.phase"}}}])
            },
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Invalid value: \"status.phase\": error converting fieldPath: field label not supported: status.phase",
        ),
        (
            |p| p["spec"]["containers"][0]["env"] = json!([{"value": "x"}]),
            "spec.containers[0].env[0].name: Required value",
        ),
        (
            |p| {
                p["spec"]["initContainers"] =
                    json!([{"name": "i", "image": "x", "livenessProbe": {"exec": {"command": ["x"]}}}])
            },
            "spec.initContainers[0].livenessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
        ),
        (
            |p| p["spec"]["restartPolicy"] = json!("Maybe"),
            "spec.restartPolicy: Unsupported value: \"Maybe\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        ),
        (
            |p| p["spec"]["dnsPolicy"] = json!("None"),
            "spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None",
        ),
        (
            |p| p["spec"]["volumes"] = json!([{"name": "v", "secret": {}}]),
            "spec.volumes[0].secret.secretName: Required value",
        ),
        (
            |p| p["spec"]["volumes"] = json!([{"name": "v", "hostPath": {"path": "/a/../b"}}]),
            "spec.volumes[0].hostPath.path: Invalid value: \"/a/../b\": must not contain '..'",
        ),
        (
            |p| p["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}, "hostPath": {"path": "/a"}}]),
            "spec.volumes[0].hostPath: Forbidden: may not specify more than 1 volume type",
        ),
        (
            |p| p["spec"]["volumes"] = json!([{"name": "v"}, {"name": "v"}]),
            "spec.volumes[1].name: Duplicate value: \"v\"",
        ),
        (
            |p| p["spec"]["tolerations"] = json!([{"operator": "Equal", "value": "x"}]),
            "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
        ),
        (
            |p| p["spec"]["activeDeadlineSeconds"] = json!(0),
            "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
        ),
        (
            |p| p["spec"]["nodeSelector"] = json!({"a b": "c"}),
            "spec.nodeSelector: Invalid value: \"a b\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName', or 'my.name', or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
        ),
        (
            |p| p["spec"]["securityContext"] = json!({"runAsUser": -1}),
            "spec.securityContext.runAsUser: Invalid value: -1: must be between 0 and 2147483647, inclusive",
        ),
        (
            |p| p["spec"]["ephemeralContainers"] = json!([{"name": "e", "image": "x"}]),
            "spec.ephemeralContainers: Forbidden: cannot be set on create",
        ),
        (
            |p| p["metadata"]["labels"] = json!({"a": "b c"}),
            "metadata.labels: Invalid value: \"b c\": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue', or 'my_value', or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
        ),
        (|p| p["metadata"]["name"] = json!(""), "metadata.name: Required value: name or generateName is required"),
    ];
    for (change, message) in cases {
        let found = texts(&super::pod(&pod(*change)));
        assert!(found.iter().any(|text| text == message), "{message}\nfound: {found:#?}");
    }
}

#[test]
fn what_may_not_change_of_a_pod() {
    type Change = fn(&mut Value);
    let old = pod(|_| {});
    let cases: &[(Change, Option<&str>)] = &[
        (|p| p["spec"]["containers"][0]["image"] = json!("y"), None),
        (|p| p["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}]), None),
        (|p| p["metadata"]["labels"] = json!({"a": "b"}), None),
        (
            |p| p["spec"]["nodeName"] = json!("n"),
            Some(
                "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)\n+ nodeName: \"n\"\n",
            ),
        ),
        (
            |p| p["spec"]["containers"].as_array_mut().expect("a list").push(json!({"name": "b", "image": "x"})),
            Some("spec.containers: Forbidden: pod updates may not add or remove containers"),
        ),
        (|p| p["metadata"]["name"] = json!("q"), Some("metadata.name: Invalid value: \"q\": field is immutable")),
    ];
    for (change, message) in cases {
        let found = texts(&super::pod_update(&pod(*change), &old));
        match message {
            None => assert!(found.is_empty(), "{found:#?}"),
            Some(message) => assert!(found.iter().any(|text| text == message), "{message}\nfound: {found:#?}"),
        }
    }
    let tolerating = pod(|p| p["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}]));
    let found = texts(&super::pod_update(&old, &tolerating));
    assert_eq!(
        found,
        ["spec.tolerations: Forbidden: existing toleration can not be modified except its tolerationSeconds"]
    );
}

#[test]
fn mistakes_in_deployments() {
    type Change = fn(&mut Value);
    let cases: &[(Change, &str)] = &[
        (|d| d["spec"]["replicas"] = json!(-1), "spec.replicas: Invalid value: -1: must be greater than or equal to 0"),
        (|d| drop(d["spec"].as_object_mut().expect("a spec").remove("selector")), "spec.selector: Required value"),
        (
            |d| d["spec"]["selector"] = json!({}),
            "spec.selector: Invalid value: {}: empty selector is invalid for deployment",
        ),
        (
            |d| d["spec"]["selector"] = json!({"matchLabels": {"app": "x"}}),
            "spec.template.metadata.labels: Invalid value: {\"app\":\"d\"}: `selector` does not match template `labels`",
        ),
        (
            |d| d["spec"]["template"]["spec"]["restartPolicy"] = json!("Never"),
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        ),
        (|d| d["spec"]["template"]["spec"]["containers"] = json!([]), "spec.template.spec.containers: Required value"),
        (
            |d| d["spec"]["strategy"] = json!({"type": "Recreate", "rollingUpdate": {}}),
            "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'",
        ),
        (
            |d| d["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}),
            "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0",
        ),
        (
            |d| d["spec"]["progressDeadlineSeconds"] = json!(0),
            "spec.progressDeadlineSeconds: Invalid value: 0: must be greater than minReadySeconds",
        ),
    ];
    for (change, message) in cases {
        let found = texts(&super::deployment(&deployment(*change)));
        assert!(found.iter().any(|text| text == message), "{message}\nfound: {found:#?}");
    }
    let old = deployment(|_| {});
    let new = deployment(|d| {
        d["spec"]["selector"] = json!({"matchLabels": {"app": "e"}});
        d["spec"]["template"]["metadata"]["labels"] = json!({"app": "e"});
    });
    let found = texts(&super::deployment_update(&new, &old));
    assert_eq!(found, ["spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"e\"}}: field is immutable"]);
}

#[test]
fn mistakes_in_services() {
    type Change = fn(&mut Value);
    let cases: &[(Change, &str)] = &[
        (
            |s| s["metadata"]["name"] = json!("1s"),
            "metadata.name: Invalid value: \"1s\": a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name', or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')",
        ),
        (|s| s["spec"]["ports"] = json!([]), "spec.ports: Required value"),
        (
            |s| s["spec"]["ports"] = json!([{"port": 0}]),
            "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
        ),
        (|s| s["spec"]["ports"] = json!([{"port": 80}, {"port": 81}]), "spec.ports[0].name: Required value"),
        (
            |s| s["spec"]["ports"] = json!([{"port": 80, "nodePort": 30000}]),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (
            |s| s["spec"]["type"] = json!("Magic"),
            "spec.type: Unsupported value: \"Magic\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
        ),
        (|s| s["spec"]["type"] = json!("ExternalName"), "spec.externalName: Required value"),
        (
            |s| s["spec"]["externalIPs"] = json!(["127.0.0.1"]),
            "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)",
        ),
        (
            |s| s["spec"]["clusterIP"] = json!("x"),
            "spec.clusterIPs[0]: Invalid value: \"x\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        ),
    ];
    for (change, message) in cases {
        let found = texts(&super::service(&service(*change)));
        assert!(found.iter().any(|text| text == message), "{message}\nfound: {found:#?}");
    }
    let with = |address: &str| service(|s| s["spec"]["clusterIP"] = json!(address));
    let found = texts(&super::service_update(&with("10.43.0.9"), &with("10.43.0.8")));
    assert_eq!(found, ["spec.clusterIPs[0]: Invalid value: [\"10.43.0.9\"]: may not change once set"]);
}

#[test]
fn mistakes_in_the_other_kinds() {
    let meta = json!({"name": "x", "namespace": "default"});
    let cluster = json!({"name": "x"});
    for (group, version, kind, object, message) in [
        (
            "",
            "v1",
            "ConfigMap",
            json!({"metadata": meta, "data": {"a b": "c"}}),
            "data[a b]: Invalid value: \"a b\": a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name', or 'KEY_NAME', or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
        ),
        ("", "v1", "Secret", json!({"metadata": meta, "type": "kubernetes.io/tls"}), "data[tls.crt]: Required value"),
        (
            "",
            "v1",
            "Namespace",
            json!({"metadata": {"name": "A_b"}}),
            "metadata.name: Invalid value: \"A_b\": a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name', or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')",
        ),
        ("", "v1", "Namespace", json!({"metadata": meta}), "metadata.namespace: Forbidden: not allowed on this type"),
        (
            "",
            "v1",
            "Node",
            json!({"metadata": cluster, "spec": {"taints": [{"key": "a", "effect": "x"}]}}),
            "metadata.taints[0].effect: Unsupported value: \"x\": supported values: \"NoSchedule\", \"PreferNoSchedule\", \"NoExecute\"",
        ),
        (
            "",
            "v1",
            "Event",
            json!({"metadata": meta, "involvedObject": {"namespace": "other"}}),
            "involvedObject.namespace: Invalid value: \"other\": does not match event.namespace",
        ),
        (
            "coordination.k8s.io",
            "v1",
            "Lease",
            json!({"metadata": meta, "spec": {"leaseDurationSeconds": 0}}),
            "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0",
        ),
        (
            "discovery.k8s.io",
            "v1",
            "EndpointSlice",
            json!({"metadata": meta, "addressType": "IPv4", "endpoints": [{"addresses": ["fd00::1"]}]}),
            "endpoints[0].addresses[0]: Invalid value: \"fd00::1\": must be an IPv4 address",
        ),
        ("discovery.k8s.io", "v1", "EndpointSlice", json!({"metadata": meta}), "addressType: Required value"),
        (
            "rbac.authorization.k8s.io",
            "v1",
            "Role",
            json!({"metadata": meta, "rules": [{"apiGroups": [""], "resources": ["pods"]}]}),
            "rules[0].verbs: Required value: verbs must contain at least one value",
        ),
        (
            "rbac.authorization.k8s.io",
            "v1",
            "ClusterRoleBinding",
            json!({"metadata": cluster, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}}),
            "roleRef.kind: Unsupported value: \"Role\": supported values: \"ClusterRole\"",
        ),
        (
            "networking.k8s.io",
            "v1",
            "NetworkPolicy",
            json!({"metadata": meta, "spec": {"ingress": [{"ports": [{"port": 90, "endPort": 80}]}]}}),
            "spec.ingress[0].ports[0].endPort: Invalid value: 80: must be greater than or equal to `port`",
        ),
        (
            "networking.k8s.io",
            "v1",
            "NetworkPolicy",
            json!({"metadata": meta, "spec": {"egress": [{"to": [
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}]}]}}),
            "spec.egress[0].to[0].ipBlock.except[0]: Invalid value: \"11.0.0.0/8\": must be a strict subset of `cidr`: 10.0.0.0/8",
        ),
        (
            "policy",
            "v1",
            "PodDisruptionBudget",
            json!({"metadata": meta, "spec": {"minAvailable": 1, "maxUnavailable": 1}}),
            "spec: Invalid value: {\"minAvailable\":1,\"maxUnavailable\":1}: minAvailable and maxUnavailable cannot be both set",
        ),
        (
            "scheduling.k8s.io",
            "v1",
            "PriorityClass",
            json!({"metadata": {"name": "system-x"}, "value": 1}),
            "metadata.name: Forbidden: priority class names with 'system-' prefix are reserved for system use only",
        ),
    ] {
        let row = by_kind(group, version, kind).expect("a row");
        let found = texts(&(row.validate)(&object));
        assert!(found.iter().any(|text| text == message), "{message}\nfound: {found:#?}");
    }
}

#[test]
fn what_stays_once_it_is_set() {
    let meta = json!({"name": "x", "namespace": "default"});
    for (group, kind, old, new, message) in [
        (
            "",
            "ConfigMap",
            json!({"metadata": meta, "immutable": true, "data": {"a": "b"}}),
            json!({"metadata": meta, "immutable": true, "data": {"a": "c"}}),
            "data: Forbidden: field is immutable when `immutable` is set",
        ),
        (
            "",
            "Secret",
            json!({"metadata": meta, "type": "a"}),
            json!({"metadata": meta, "type": "b"}),
            "type: Invalid value: \"b\": field is immutable",
        ),
        (
            "rbac.authorization.k8s.io",
            "RoleBinding",
            json!({"metadata": meta, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "a"}}),
            json!({"metadata": meta, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "b"}}),
            "roleRef: Invalid value: {\"apiGroup\":\"rbac.authorization.k8s.io\",\"kind\":\"Role\",\"name\":\"b\"}: cannot change roleRef",
        ),
        (
            "discovery.k8s.io",
            "EndpointSlice",
            json!({"metadata": meta, "addressType": "IPv4"}),
            json!({"metadata": meta, "addressType": "IPv6"}),
            "addressType: Invalid value: \"IPv6\": field is immutable",
        ),
        (
            "",
            "Node",
            json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.42.0.0/24", "podCIDRs": ["10.42.0.0/24"]}}),
            json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24"]}}),
            "spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \"\" to valid",
        ),
    ] {
        let row = by_kind(group, "v1", kind).expect("a row");
        let found = texts(&(row.validate_update)(&new, &old));
        assert!(found.iter().any(|text| text == message), "{message}\nfound: {found:#?}");
        assert_eq!(texts(&(row.validate_update)(&old, &old)), Vec::<String>::new(), "{kind}");
    }
}

#[test]
fn every_validator_takes_any_object() {
    for row in crate::all() {
        for object in [
            json!(null),
            json!({}),
            json!({"metadata": [], "spec": 1, "status": "x", "subsets": {}, "rules": [1, null]}),
        ] {
            let mut defaulted = object.clone();
            (row.default)(&mut defaulted);
            (row.prepare_create)(&mut defaulted);
            let _ = (row.validate)(&defaulted);
            let _ = (row.validate_update)(&defaulted, &object);
            let _ = (row.validate_status_update)(&object, &defaulted);
            let cells = (row.row)(&defaulted, jiff::Timestamp::UNIX_EPOCH);
            assert_eq!(cells.len(), row.columns.len(), "{}", row.kind);
        }
    }
}

#[test]
fn an_ended_container_is_shown_as_running_again_only_where_it_may() {
    let allowed = |policy: &str, container: Value, code: i64| {
        let with = |state: Value| {
            let mut container = container.clone();
            container["name"] = json!("c");
            pod(|p| {
                p["spec"]["restartPolicy"] = json!(policy);
                p["spec"]["containers"] = json!([container]);
                p["status"] = json!({"containerStatuses": [{"name": "c", "state": state}]});
            })
        };
        let (old, new) = (with(json!({"terminated": {"exitCode": code}})), with(json!({"running": {}})));
        let found = texts(&super::pod_status_update(&new, &old));
        let refusal = "status.containerStatuses[0].state: Forbidden: may not be transitioned to non-terminated state";
        assert!(found.is_empty() || found == [refusal], "{found:?}");
        found.is_empty()
    };
    assert!(allowed("Always", json!({}), 0));
    assert!(allowed("OnFailure", json!({}), 1));
    assert!(!allowed("OnFailure", json!({}), 0));
    assert!(!allowed("Never", json!({}), 1));
    assert!(allowed("Never", json!({"restartPolicy": "Always"}), 0));
    assert!(!allowed("Always", json!({"restartPolicy": "Never"}), 1));
    let rule = |operator: &str, action: &str| {
        let codes = json!({"operator": operator, "values": [42]});
        json!({"restartPolicy": "Never", "restartPolicyRules": [{"action": action, "exitCodes": codes}]})
    };
    assert!(allowed("Never", rule("In", "Restart"), 42));
    assert!(!allowed("Never", rule("In", "Restart"), 43));
    assert!(allowed("Never", rule("NotIn", "Restart"), 43));
    assert!(!allowed("Never", rule("NotIn", "Restart"), 42));
    assert!(allowed("Never", rule("In", "RestartAllContainers"), 1), "others may have asked for it");
}
