//! The table of kinds: who is served, under which names.

use crate::kind::{Column, Kind};
use crate::{columns, defaults, event_views, selectable, strategy, validate};
use jiff::Timestamp;
use serde_json::Value;

const STANDARD_VERBS: &[&str] = &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const CREATE_ONLY: &[&str] = &["create"];
const BASE: Kind = Kind {
    group: "",
    version: "v1",
    kind: "",
    plural: "",
    singular: "",
    short_names: &[],
    categories: &[],
    namespaced: true,
    subresources: &[],
    verbs: STANDARD_VERBS,
    stored: true,
    storage: "",
    to_stored: |_| {},
    from_stored: |_| {},
    default: |_| {},
    prepare_create: |_| {},
    prepare_update: |_, _| {},
    prepare_status_update: |_, _| {},
    validate: |_| Vec::new(),
    validate_update: |_, _| Vec::new(),
    validate_status_update: |_, _| Vec::new(),
    columns: &[columns::NAME, columns::AGE],
    row: default_row,
    selectable: |_| Vec::new(),
};

/// A row of a review kind: nothing is stored, POST only.
const REVIEW: Kind = Kind { stored: false, namespaced: false, verbs: CREATE_ONLY, ..BASE };

/// A row of what is measured when it is asked for.
const MEASURED: Kind = Kind { stored: false, verbs: &["get", "list"], ..BASE };

static KINDS: &[Kind] = &[
    Kind {
        kind: "Binding",
        plural: "bindings",
        singular: "binding",
        storage: "",
        stored: false,
        verbs: CREATE_ONLY,
        ..BASE
    },
    Kind {
        kind: "ConfigMap",
        plural: "configmaps",
        singular: "configmap",
        short_names: &["cm"],
        storage: "configmaps",
        columns: columns::CONFIG_MAP,
        row: columns::config_map,
        validate: validate::config_map,
        validate_update: validate::config_map_update,
        ..BASE
    },
    Kind {
        kind: "Endpoints",
        plural: "endpoints",
        singular: "endpoints",
        short_names: &["ep"],
        storage: "endpoints",
        default: defaults::endpoints,
        columns: columns::ENDPOINTS,
        row: columns::endpoints,
        validate: validate::endpoints,
        validate_update: validate::endpoints_update,
        ..BASE
    },
    Kind {
        kind: "Event",
        plural: "events",
        singular: "event",
        short_names: &["ev"],
        storage: "events",
        columns: columns::EVENT,
        row: columns::event,
        selectable: selectable::event,
        validate: validate::event,
        validate_update: validate::event_update,
        ..BASE
    },
    Kind {
        kind: "Namespace",
        plural: "namespaces",
        singular: "namespace",
        short_names: &["ns"],
        namespaced: false,
        subresources: &["finalize", "status"],
        verbs: &["create", "delete", "get", "list", "patch", "update", "watch"],
        storage: "namespaces",
        default: defaults::namespace,
        prepare_create: strategy::namespace_create,
        prepare_update: strategy::namespace_update,
        prepare_status_update: strategy::plain_status,
        columns: columns::NAMESPACE,
        row: columns::namespace,
        selectable: selectable::namespace,
        validate: validate::namespace,
        validate_update: validate::namespace_update,
        validate_status_update: validate::metadata_update,
        ..BASE
    },
    Kind {
        kind: "Node",
        plural: "nodes",
        singular: "node",
        short_names: &["no"],
        namespaced: false,
        subresources: &["proxy", "status"],
        storage: "nodes",
        default: defaults::node,
        prepare_update: strategy::keep_status,
        prepare_status_update: strategy::plain_status,
        columns: columns::NODE,
        row: columns::node,
        selectable: selectable::node,
        validate: validate::node,
        validate_update: validate::node_update,
        validate_status_update: validate::node_status_update,
        ..BASE
    },
    Kind {
        kind: "Pod",
        plural: "pods",
        singular: "pod",
        short_names: &["po"],
        categories: &["all"],
        subresources: &[
            "attach",
            "binding",
            "ephemeralcontainers",
            "eviction",
            "exec",
            "log",
            "portforward",
            "proxy",
            "resize",
            "status",
        ],
        storage: "pods",
        default: defaults::pod,
        prepare_create: strategy::pod_create,
        prepare_update: strategy::pod_update,
        prepare_status_update: strategy::pod_status,
        columns: columns::POD,
        row: columns::pod,
        selectable: selectable::pod,
        validate: validate::pod,
        validate_update: validate::pod_update,
        validate_status_update: validate::pod_status_update,
        ..BASE
    },
    Kind {
        kind: "Secret",
        plural: "secrets",
        singular: "secret",
        storage: "secrets",
        default: defaults::secret,
        columns: columns::SECRET,
        row: columns::secret,
        selectable: selectable::secret,
        validate: validate::secret,
        validate_update: validate::secret_update,
        ..BASE
    },
    Kind {
        kind: "Service",
        plural: "services",
        singular: "service",
        short_names: &["svc"],
        categories: &["all"],
        subresources: &["proxy", "status"],
        storage: "services",
        default: defaults::service,
        prepare_create: strategy::service_create,
        prepare_update: strategy::service_update,
        prepare_status_update: strategy::plain_status,
        columns: columns::SERVICE,
        row: columns::service,
        selectable: selectable::service,
        validate: validate::service,
        validate_update: validate::service_update,
        validate_status_update: validate::metadata_update,
        ..BASE
    },
    Kind {
        kind: "ServiceAccount",
        plural: "serviceaccounts",
        singular: "serviceaccount",
        short_names: &["sa"],
        subresources: &["token"],
        storage: "serviceaccounts",
        columns: columns::SERVICE_ACCOUNT,
        row: columns::service_account,
        validate: validate::service_account,
        validate_update: validate::metadata_update,
        ..BASE
    },
    Kind {
        group: "apps",
        kind: "ControllerRevision",
        plural: "controllerrevisions",
        singular: "controllerrevision",
        storage: "apps/controllerrevisions",
        columns: columns::CONTROLLER_REVISION,
        row: columns::controller_revision,
        validate: validate::controller_revision,
        validate_update: validate::controller_revision_update,
        ..BASE
    },
    Kind {
        group: "apps",
        kind: "Deployment",
        plural: "deployments",
        singular: "deployment",
        short_names: &["deploy"],
        categories: &["all"],
        subresources: &["scale", "status"],
        storage: "apps/deployments",
        default: defaults::deployment,
        prepare_create: strategy::workload_create,
        prepare_update: strategy::deployment_update,
        prepare_status_update: strategy::workload_status,
        columns: columns::DEPLOYMENT,
        row: columns::deployment,
        validate: validate::deployment,
        validate_update: validate::deployment_update,
        validate_status_update: validate::replicas_status_update,
        ..BASE
    },
    Kind {
        group: "apps",
        kind: "ReplicaSet",
        plural: "replicasets",
        singular: "replicaset",
        short_names: &["rs"],
        categories: &["all"],
        subresources: &["scale", "status"],
        storage: "apps/replicasets",
        default: defaults::replica_set,
        prepare_create: strategy::workload_create,
        prepare_update: strategy::workload_update,
        prepare_status_update: strategy::plain_status,
        columns: columns::REPLICA_SET,
        row: columns::replica_set,
        selectable: selectable::replica_set,
        validate: validate::replica_set,
        validate_update: validate::replica_set_update,
        validate_status_update: validate::replicas_status_update,
        ..BASE
    },
    Kind {
        group: "authentication.k8s.io",
        kind: "SelfSubjectReview",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        ..REVIEW
    },
    Kind {
        group: "authentication.k8s.io",
        kind: "TokenReview",
        plural: "tokenreviews",
        singular: "tokenreview",
        ..REVIEW
    },
    Kind {
        group: "authorization.k8s.io",
        kind: "LocalSubjectAccessReview",
        plural: "localsubjectaccessreviews",
        singular: "localsubjectaccessreview",
        namespaced: true,
        ..REVIEW
    },
    Kind {
        group: "authorization.k8s.io",
        kind: "SelfSubjectAccessReview",
        plural: "selfsubjectaccessreviews",
        singular: "selfsubjectaccessreview",
        ..REVIEW
    },
    Kind {
        group: "authorization.k8s.io",
        kind: "SelfSubjectRulesReview",
        plural: "selfsubjectrulesreviews",
        singular: "selfsubjectrulesreview",
        ..REVIEW
    },
    Kind {
        group: "authorization.k8s.io",
        kind: "SubjectAccessReview",
        plural: "subjectaccessreviews",
        singular: "subjectaccessreview",
        ..REVIEW
    },
    Kind {
        group: "coordination.k8s.io",
        kind: "Lease",
        plural: "leases",
        singular: "lease",
        storage: "coordination.k8s.io/leases",
        columns: columns::LEASE,
        row: columns::lease,
        validate: validate::lease,
        validate_update: validate::lease_update,
        ..BASE
    },
    Kind {
        group: "discovery.k8s.io",
        kind: "EndpointSlice",
        plural: "endpointslices",
        singular: "endpointslice",
        storage: "discovery.k8s.io/endpointslices",
        default: defaults::endpoint_slice,
        prepare_create: strategy::generation_create,
        prepare_update: strategy::generation_update,
        columns: columns::ENDPOINT_SLICE,
        row: columns::endpoint_slice,
        validate: validate::endpoint_slice,
        validate_update: validate::endpoint_slice_update,
        ..BASE
    },
    Kind {
        group: "events.k8s.io",
        kind: "Event",
        plural: "events",
        singular: "event",
        short_names: &["ev"],
        storage: "events",
        to_stored: event_views::to_core,
        from_stored: event_views::from_core,
        columns: columns::EVENT,
        row: columns::events_event,
        selectable: selectable::events_event,
        validate: validate::events_event,
        validate_update: validate::events_event_update,
        ..BASE
    },
    Kind {
        group: "metrics.k8s.io",
        version: "v1beta1",
        kind: "NodeMetrics",
        plural: "nodes",
        singular: "",
        namespaced: false,
        ..MEASURED
    },
    Kind { group: "metrics.k8s.io", version: "v1beta1", kind: "PodMetrics", plural: "pods", singular: "", ..MEASURED },
    Kind {
        group: "networking.k8s.io",
        kind: "NetworkPolicy",
        plural: "networkpolicies",
        singular: "networkpolicy",
        short_names: &["netpol"],
        storage: "networking.k8s.io/networkpolicies",
        default: defaults::network_policy,
        prepare_create: strategy::generation_create,
        prepare_update: strategy::generation_update,
        columns: columns::NETWORK_POLICY,
        row: columns::network_policy,
        validate: validate::network_policy,
        validate_update: validate::network_policy_update,
        ..BASE
    },
    Kind {
        group: "node.k8s.io",
        kind: "RuntimeClass",
        plural: "runtimeclasses",
        singular: "runtimeclass",
        namespaced: false,
        storage: "node.k8s.io/runtimeclasses",
        columns: columns::RUNTIME_CLASS,
        row: columns::runtime_class,
        validate: validate::runtime_class,
        validate_update: validate::runtime_class_update,
        ..BASE
    },
    Kind {
        group: "policy",
        kind: "PodDisruptionBudget",
        plural: "poddisruptionbudgets",
        singular: "poddisruptionbudget",
        short_names: &["pdb"],
        subresources: &["status"],
        storage: "policy/poddisruptionbudgets",
        prepare_create: strategy::workload_create,
        prepare_update: strategy::workload_update,
        prepare_status_update: strategy::plain_status,
        columns: columns::POD_DISRUPTION_BUDGET,
        row: columns::pod_disruption_budget,
        validate: validate::pod_disruption_budget,
        validate_update: validate::pod_disruption_budget_update,
        validate_status_update: validate::metadata_update,
        ..BASE
    },
    Kind {
        group: "rbac.authorization.k8s.io",
        kind: "ClusterRole",
        plural: "clusterroles",
        singular: "clusterrole",
        namespaced: false,
        storage: "rbac.authorization.k8s.io/clusterroles",
        columns: columns::ROLE,
        row: columns::role,
        validate: validate::cluster_role,
        validate_update: validate::cluster_role_update,
        ..BASE
    },
    Kind {
        group: "rbac.authorization.k8s.io",
        kind: "ClusterRoleBinding",
        plural: "clusterrolebindings",
        singular: "clusterrolebinding",
        namespaced: false,
        storage: "rbac.authorization.k8s.io/clusterrolebindings",
        default: defaults::role_binding,
        columns: columns::ROLE_BINDING,
        row: columns::role_binding,
        validate: validate::cluster_role_binding,
        validate_update: validate::cluster_role_binding_update,
        ..BASE
    },
    Kind {
        group: "rbac.authorization.k8s.io",
        kind: "Role",
        plural: "roles",
        singular: "role",
        storage: "rbac.authorization.k8s.io/roles",
        columns: columns::ROLE,
        row: columns::role,
        validate: validate::role,
        validate_update: validate::role_update,
        ..BASE
    },
    Kind {
        group: "rbac.authorization.k8s.io",
        kind: "RoleBinding",
        plural: "rolebindings",
        singular: "rolebinding",
        storage: "rbac.authorization.k8s.io/rolebindings",
        default: defaults::role_binding,
        columns: columns::ROLE_BINDING,
        row: columns::role_binding,
        validate: validate::role_binding,
        validate_update: validate::role_binding_update,
        ..BASE
    },
    Kind {
        group: "scheduling.k8s.io",
        kind: "PriorityClass",
        plural: "priorityclasses",
        singular: "priorityclass",
        short_names: &["pc"],
        namespaced: false,
        storage: "scheduling.k8s.io/priorityclasses",
        default: defaults::priority_class,
        prepare_create: strategy::generation_create,
        prepare_update: strategy::generation_update,
        columns: columns::PRIORITY_CLASS,
        row: columns::priority_class,
        validate: validate::priority_class,
        validate_update: validate::priority_class_update,
        ..BASE
    },
];

/// Every row, core group first, then by group and plural.
pub fn all() -> &'static [Kind] {
    KINDS
}

/// The row that serves `plural` of a group and version.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|row| row.group == group && row.version == version && row.plural == plural)
}

/// The row of a kind.
pub fn by_kind(group: &str, version: &str, kind: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|row| row.group == group && row.version == version && row.kind == kind)
}

/// Name and Age, for kinds without columns of their own.
pub fn default_columns() -> &'static [Column] {
    &[columns::NAME, columns::AGE]
}

/// The cells of `default_columns`.
pub fn default_row(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![columns::name(object), columns::age(object, now)]
}
