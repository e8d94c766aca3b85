//! The roles and bindings every cluster has, by upstream's names. They are put back at start if they went missing.

use serde_json::{Value, json};

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "delete", "deletecollection", "patch", "update"];
const ALL: &[&str] = &["*"];

/// The ConfigMap in `kube-system` with what every node of the cluster is told alike.
pub(crate) const NODE_CONFIGURATION: &str = "oarlock-node-configuration";

fn rule(verbs: &[&str], groups: &[&str], resources: &[&str]) -> Value {
    json!({"verbs": verbs, "apiGroups": groups, "resources": resources})
}

fn paths(urls: &[&str]) -> Value {
    json!({"verbs": ["get"], "nonResourceURLs": urls})
}

fn role(name: &str, labels: &[(&str, &str)], rules: Vec<Value>) -> Value {
    let mut object = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"},
        },
        "rules": rules,
    });
    for (key, value) in labels {
        object["metadata"]["labels"][*key] = (*value).into();
    }
    object
}

/// The role and binding inside a namespace.
fn namespaced(mut object: Value, kind: &str, namespace: &str) -> Value {
    object["kind"] = kind.into();
    object["metadata"]["namespace"] = namespace.into();
    object
}

/// Roles that hold in one namespace only, with their bindings.
pub(crate) fn namespaced_roles() -> Vec<Value> {
    const NAME: &str = "oarlock:announcer";
    const NAMESPACE: &str = "kube-system";
    let verbs = [READ, &["create", "patch", "update"]].concat();
    let announcer = role(NAME, &[], vec![rule(&verbs, &["coordination.k8s.io"], &["leases"])]);
    let mut bound = namespaced(binding(NAME, NAME, &[("User", "system:kube-proxy")]), "RoleBinding", NAMESPACE);
    bound["roleRef"]["kind"] = "Role".into();
    let one = |map: &str, verbs: &[&str]| json!({"verbs": verbs, "apiGroups": [""], "resources": ["configmaps"], "resourceNames": [map]});
    let read = |name: &str, namespace: &str, map: &str, verbs: &[&str], groups: &[&str]| {
        let subjects: Vec<(&str, &str)> = groups.iter().map(|group| ("Group", *group)).collect();
        let mut bound = namespaced(binding(name, name, &subjects), "RoleBinding", namespace);
        bound["roleRef"]["kind"] = "Role".into();
        [namespaced(role(name, &[], vec![one(map, verbs)]), "Role", namespace), bound]
    };
    // Where the cluster is and by which authority it is known is public: whoever joins knows nothing yet.
    let everybody = ["system:authenticated", "system:unauthenticated"];
    let info = read("oarlock:cluster-info", "kube-public", "cluster-info", &["get"], &everybody);
    let nodes = ["system:bootstrappers", "system:nodes"];
    let configuration = read("oarlock:node-configuration", NAMESPACE, NODE_CONFIGURATION, READ, &nodes);
    [namespaced(announcer, "Role", NAMESPACE), bound].into_iter().chain(info).chain(configuration).collect()
}

fn binding(name: &str, role: &str, subjects: &[(&str, &str)]) -> Value {
    let subjects: Vec<Value> = subjects
        .iter()
        .map(|(kind, name)| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}))
        .collect();
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"},
        },
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": subjects,
    })
}

const VIEW_CORE: &[&str] = &[
    "configmaps",
    "endpoints",
    "persistentvolumeclaims",
    "persistentvolumeclaims/status",
    "pods",
    "replicationcontrollers",
    "replicationcontrollers/scale",
    "serviceaccounts",
    "services",
    "services/status",
    "bindings",
    "events",
    "limitranges",
    "namespaces/status",
    "pods/log",
    "pods/status",
    "replicationcontrollers/status",
    "resourcequotas",
    "resourcequotas/status",
    "namespaces",
];
const APPS: &[&str] = &[
    "daemonsets",
    "deployments",
    "deployments/scale",
    "replicasets",
    "replicasets/scale",
    "statefulsets",
    "statefulsets/scale",
];
const APPS_STATUS: &[&str] =
    &["controllerrevisions", "daemonsets/status", "deployments/status", "replicasets/status", "statefulsets/status"];

fn view_rules() -> Vec<Value> {
    vec![
        rule(READ, &[""], VIEW_CORE),
        rule(READ, &["discovery.k8s.io"], &["endpointslices"]),
        rule(READ, &["apps"], APPS),
        rule(READ, &["apps"], APPS_STATUS),
        rule(READ, &["autoscaling"], &["horizontalpodautoscalers", "horizontalpodautoscalers/status"]),
        rule(READ, &["batch"], &["cronjobs", "cronjobs/status", "jobs", "jobs/status"]),
        rule(READ, &["policy"], &["poddisruptionbudgets", "poddisruptionbudgets/status"]),
        rule(READ, &["networking.k8s.io"], &["ingresses", "ingresses/status", "networkpolicies"]),
    ]
}

fn edit_rules() -> Vec<Value> {
    let read_write: Vec<&str> = WRITE.to_vec();
    let mut rules = vec![
        rule(READ, &[""], &["pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "secrets", "services/proxy"]),
        rule(&["impersonate"], &[""], &["serviceaccounts"]),
        rule(
            &read_write,
            &[""],
            &["pods", "pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "pods/resize"],
        ),
        rule(&["create"], &[""], &["pods/eviction", "serviceaccounts/token"]),
        rule(
            &read_write,
            &[""],
            &[
                "configmaps",
                "events",
                "persistentvolumeclaims",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "secrets",
                "serviceaccounts",
                "services",
                "services/proxy",
            ],
        ),
        rule(&read_write, &["apps"], APPS),
        rule(&["create", "delete", "deletecollection", "patch", "update"], &["apps"], &["deployments/rollback"]),
        rule(&read_write, &["autoscaling"], &["horizontalpodautoscalers"]),
        rule(&read_write, &["batch"], &["cronjobs", "jobs"]),
        rule(&read_write, &["policy"], &["poddisruptionbudgets"]),
        rule(&read_write, &["networking.k8s.io"], &["ingresses", "networkpolicies"]),
        rule(
            &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
            &["coordination.k8s.io"],
            &["leases"],
        ),
    ];
    rules.extend(view_rules());
    rules
}

fn admin_rules() -> Vec<Value> {
    let mut rules = edit_rules();
    let every: Vec<&str> = READ.iter().chain(WRITE).copied().collect();
    rules.push(rule(&["create"], &["authorization.k8s.io"], &["localsubjectaccessreviews"]));
    rules.push(rule(&every, &["rbac.authorization.k8s.io"], &["rolebindings", "roles"]));
    rules
}

fn events() -> Value {
    rule(&["create", "patch", "update"], &["", "events.k8s.io"], &["events"])
}

fn reviews() -> Value {
    rule(&["create"], &["authentication.k8s.io", "authorization.k8s.io"], &["tokenreviews", "subjectaccessreviews"])
}

fn node_rules() -> Vec<Value> {
    vec![
        reviews(),
        rule(&["create"], &["authorization.k8s.io"], &["localsubjectaccessreviews"]),
        rule(READ, &[""], &["services"]),
        rule(&["create", "get", "list", "watch", "update", "patch"], &[""], &["nodes"]),
        rule(&["patch", "update"], &[""], &["nodes/status"]),
        events(),
        rule(&["get", "list", "watch", "create", "delete"], &[""], &["pods"]),
        rule(&["patch", "update", "get"], &[""], &["pods/status"]),
        rule(&["create"], &[""], &["pods/eviction"]),
        rule(READ, &["node.k8s.io"], &["runtimeclasses"]),
        rule(&["create", "get", "list", "watch"], &["certificates.k8s.io"], &["certificatesigningrequests"]),
        rule(READ, &["storage.k8s.io"], &["csidrivers"]),
    ]
}

/// What the roles that let kubelets have client certificates say.
fn certificate_rules(subresource: &str) -> Vec<Value> {
    let resource = format!("certificatesigningrequests/{subresource}");
    vec![rule(&["create"], &["certificates.k8s.io"], &[&resource])]
}

/// Approving what a signer is asked for.
fn approver_rules(signer: &str) -> Vec<Value> {
    let signer = json!({"verbs": ["approve"], "apiGroups": ["certificates.k8s.io"], "resources": ["signers"],
        "resourceNames": [signer]});
    vec![signer]
}

fn scheduler_rules() -> Vec<Value> {
    vec![
        events(),
        rule(&["create", "get", "list", "update", "watch", "patch"], &["coordination.k8s.io"], &["leases"]),
        rule(
            READ,
            &[""],
            &[
                "nodes",
                "namespaces",
                "persistentvolumeclaims",
                "persistentvolumes",
                "services",
                "replicationcontrollers",
            ],
        ),
        rule(&["delete", "get", "list", "watch"], &[""], &["pods"]),
        rule(&["create"], &[""], &["bindings", "pods/binding"]),
        rule(&["patch", "update"], &[""], &["pods/status"]),
        rule(READ, &["apps"], &["replicasets", "statefulsets"]),
        rule(READ, &["policy"], &["poddisruptionbudgets"]),
        rule(READ, &["scheduling.k8s.io"], &["priorityclasses"]),
        rule(READ, &["storage.k8s.io"], &["csidrivers", "csinodes", "csistoragecapacities", "storageclasses"]),
        reviews(),
    ]
}

fn volume_scheduler_rules() -> Vec<Value> {
    let verbs = [READ, &["patch", "update"]].concat();
    vec![
        rule(&verbs, &[""], &["persistentvolumes"]),
        rule(READ, &["storage.k8s.io"], &["storageclasses"]),
        rule(&verbs, &[""], &["persistentvolumeclaims"]),
    ]
}

/// One identity runs every controller, so this role covers what upstream spreads over one role for each.
fn controller_manager_rules() -> Vec<Value> {
    let every: Vec<&str> = READ.iter().chain(WRITE).copied().collect();
    vec![
        rule(&every, &["*"], &["*"]),
        rule(&["update"], &[""], &["namespaces/finalize"]),
        rule(&["patch", "update"], &["*"], &["*/status", "*/scale", "*/finalizers"]),
        rule(&["create"], &[""], &["serviceaccounts/token", "pods/eviction"]),
        rule(&["patch", "update"], &["certificates.k8s.io"], &["certificatesigningrequests/approval"]),
        rule(&["approve", "sign"], &["certificates.k8s.io"], &["signers"]),
        reviews(),
        paths(&["/api", "/api/*", "/apis", "/apis/*"]),
    ]
}

fn proxier_rules() -> Vec<Value> {
    vec![
        rule(&["list", "watch"], &[""], &["endpoints", "services", "namespaces", "pods"]),
        rule(READ, &[""], &["nodes"]),
        events(),
        rule(&["list", "watch"], &["discovery.k8s.io"], &["endpointslices"]),
        rule(&["list", "watch"], &["networking.k8s.io"], &["servicecidrs", "networkpolicies"]),
    ]
}

fn kubelet_api_admin_rules() -> Vec<Value> {
    vec![
        rule(READ, &[""], &["nodes"]),
        rule(&["proxy"], &[""], &["nodes"]),
        rule(
            ALL,
            &[""],
            &[
                "nodes/log",
                "nodes/metrics",
                "nodes/proxy",
                "nodes/stats",
                "nodes/configz",
                "nodes/healthz",
                "nodes/pods",
                "nodes/checkpoint",
            ],
        ),
    ]
}

/// Every bootstrap ClusterRole.
pub(crate) fn cluster_roles() -> Vec<Value> {
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let everything = vec![rule(ALL, &["*"], &["*"]), json!({"verbs": ["*"], "nonResourceURLs": ["*"]})];
    let to = |role: &'static str| match role {
        "admin" => ("rbac.authorization.k8s.io/aggregate-to-admin", "true"),
        "edit" => ("rbac.authorization.k8s.io/aggregate-to-edit", "true"),
        _ => ("rbac.authorization.k8s.io/aggregate-to-view", "true"),
    };
    let mut roles = vec![
        role("cluster-admin", &[], everything),
        role("system:aggregate-to-admin", &[to("admin")], admin_rules()),
        role("system:aggregate-to-edit", &[to("edit")], edit_rules()),
        role("system:aggregate-to-view", &[to("view")], view_rules()),
        role("system:discovery", &[], vec![paths(&discovery)]),
        role(
            "system:basic-user",
            &[],
            vec![
                rule(&["create"], &["authorization.k8s.io"], &["selfsubjectaccessreviews", "selfsubjectrulesreviews"]),
                rule(&["create"], &["authentication.k8s.io"], &["selfsubjectreviews"]),
            ],
        ),
        role(
            "system:public-info-viewer",
            &[],
            vec![paths(&["/healthz", "/livez", "/readyz", "/version", "/version/"])],
        ),
        role(
            "system:monitoring",
            &[],
            vec![paths(&[
                "/healthz",
                "/healthz/*",
                "/livez",
                "/livez/*",
                "/metrics",
                "/metrics/slis",
                "/readyz",
                "/readyz/*",
            ])],
        ),
        role("system:heapster", &[], vec![rule(READ, &[""], &["events", "namespaces", "nodes", "pods"])]),
        role("system:auth-delegator", &[], vec![reviews()]),
        role(
            "system:service-account-issuer-discovery",
            &[],
            vec![paths(&[
                "/.well-known/openid-configuration",
                "/.well-known/openid-configuration/",
                "/openid/v1/jwks",
                "/openid/v1/jwks/",
            ])],
        ),
        role("system:node", &[], node_rules()),
        role("system:certificates.k8s.io:certificatesigningrequests:nodeclient", &[], certificate_rules("nodeclient")),
        role(
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            &[],
            certificate_rules("selfnodeclient"),
        ),
        role(
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeserver",
            &[],
            certificate_rules("selfnodeserver"),
        ),
        role("oarlock:certificatesigningrequests:nodeproxyclient", &[], certificate_rules("nodeproxyclient")),
        role(
            "system:certificates.k8s.io:kube-apiserver-client-approver",
            &[],
            approver_rules("kubernetes.io/kube-apiserver-client"),
        ),
        role(
            "system:certificates.k8s.io:kube-apiserver-client-kubelet-approver",
            &[],
            approver_rules("kubernetes.io/kube-apiserver-client-kubelet"),
        ),
        role(
            "system:certificates.k8s.io:kubelet-serving-approver",
            &[],
            approver_rules("kubernetes.io/kubelet-serving"),
        ),
        role("system:node-proxier", &[], proxier_rules()),
        role("system:kube-scheduler", &[], scheduler_rules()),
        role("system:volume-scheduler", &[], volume_scheduler_rules()),
        role("system:kube-controller-manager", &[], controller_manager_rules()),
        role("system:kubelet-api-admin", &[], kubelet_api_admin_rules()),
        role(
            "system:aggregated-metrics-reader",
            &[to("view")],
            vec![rule(&["get", "list", "watch"], &["metrics.k8s.io"], &["nodes", "pods"])],
        ),
        role("system:kube-dns", &[], vec![rule(&["list", "watch"], &[""], &["endpoints", "services"])]),
        role(
            "system:node-bootstrapper",
            &[],
            vec![rule(&["create", "get", "list", "watch"], &["certificates.k8s.io"], &["certificatesigningrequests"])],
        ),
        role(
            "system:node-problem-detector",
            &[],
            vec![rule(&["get"], &[""], &["nodes"]), rule(&["patch"], &[""], &["nodes/status"]), events()],
        ),
    ];
    for (name, from, aggregated) in [
        ("admin", &["admin", "edit", "view"][..], admin_rules()),
        ("edit", &["edit", "view"], edit_rules()),
        ("view", &["view"], view_rules()),
    ] {
        let mut labels = Vec::new();
        match name {
            "edit" => labels.push(to("admin")),
            "view" => labels.push(to("edit")),
            _ => {}
        }
        let mut object = role(name, &labels, aggregated);
        let selectors: Vec<Value> = from
            .iter()
            .map(
                |source| json!({"matchLabels": {(format!("rbac.authorization.k8s.io/aggregate-to-{source}")): "true"}}),
            )
            .collect();
        object["aggregationRule"] = json!({"clusterRoleSelectors": selectors[..1]});
        roles.push(object);
    }
    roles
}

/// Every bootstrap ClusterRoleBinding.
pub(crate) fn cluster_role_bindings() -> Vec<Value> {
    const AUTHENTICATED: (&str, &str) = ("Group", "system:authenticated");
    const UNAUTHENTICATED: (&str, &str) = ("Group", "system:unauthenticated");
    vec![
        binding("cluster-admin", "cluster-admin", &[("Group", "system:masters")]),
        binding("system:discovery", "system:discovery", &[AUTHENTICATED]),
        binding("system:basic-user", "system:basic-user", &[AUTHENTICATED]),
        binding("system:public-info-viewer", "system:public-info-viewer", &[AUTHENTICATED, UNAUTHENTICATED]),
        binding("system:monitoring", "system:monitoring", &[("Group", "system:monitoring")]),
        binding("system:node", "system:node", &[("Group", "system:nodes")]),
        binding("oarlock:node-bootstrapper", "system:node-bootstrapper", &[("Group", "system:bootstrappers")]),
        binding(
            "oarlock:node-autoapprove-bootstrap",
            "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
            &[("Group", "system:bootstrappers")],
        ),
        binding(
            "oarlock:node-autoapprove-certificate-rotation",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            &[("Group", "system:nodes")],
        ),
        binding(
            "oarlock:node-autoapprove-serving",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeserver",
            &[("Group", "system:nodes")],
        ),
        binding(
            "oarlock:node-autoapprove-proxy",
            "oarlock:certificatesigningrequests:nodeproxyclient",
            &[("Group", "system:nodes")],
        ),
        binding("system:node-proxier", "system:node-proxier", &[("User", "system:kube-proxy")]),
        binding("system:kube-scheduler", "system:kube-scheduler", &[("User", "system:kube-scheduler")]),
        binding("system:volume-scheduler", "system:volume-scheduler", &[("User", "system:kube-scheduler")]),
        binding(
            "system:kube-controller-manager",
            "system:kube-controller-manager",
            &[("User", "system:kube-controller-manager")],
        ),
        binding(
            "system:kubelet-api-admin",
            "system:kubelet-api-admin",
            &[("User", "kube-apiserver-kubelet-client"), ("Group", "oarlock:kubelet-api-admin")],
        ),
        binding(
            "system:service-account-issuer-discovery",
            "system:service-account-issuer-discovery",
            &[("Group", "system:serviceaccounts")],
        ),
    ]
}
