//! Bodies as Go clients send them, made with the generated bindings of another project: zero values written where Go
//! writes them, inline messages, quantities, int-or-strings, raw bytes, embedded objects.

use k8s_pb::api::apps::v1 as apps;
use k8s_pb::api::authentication::v1 as authentication;
use k8s_pb::api::authorization::v1 as authorization;
use k8s_pb::api::autoscaling::v1 as autoscaling;
use k8s_pb::api::core::v1 as core;
use k8s_pb::api::policy::v1 as policy;
use k8s_pb::apimachinery::pkg::api::resource::Quantity;
use k8s_pb::apimachinery::pkg::apis::meta::v1 as meta;
use k8s_pb::apimachinery::pkg::runtime::{RawExtension, TypeMeta, Unknown};
use k8s_pb::apimachinery::pkg::util::intstr::IntOrString;
use oarlock_schema::protobuf::{DecodeError, decode};
use oarlock_schema::{Gvk, strict};
use prost::Message;
use serde_json::{Value, json};

fn body(api_version: &str, kind: &str, message: &impl Message) -> Vec<u8> {
    let unknown = Unknown {
        type_meta: Some(TypeMeta { api_version: Some(api_version.to_owned()), kind: Some(kind.to_owned()) }),
        raw: Some(message.encode_to_vec()),
        content_encoding: Some(String::new()),
        content_type: Some(String::new()),
    };
    let mut bytes = b"k8s\0".to_vec();
    bytes.extend(unknown.encode_to_vec());
    bytes
}

/// Decodes, and checks that the result is what the strict pass accepts.
fn decoded(api_version: &str, kind: &str, message: &impl Message) -> Value {
    let mut object = decode(&body(api_version, kind, message)).expect("decodes");
    let decoded = object.clone();
    let unknown = strict::prune(Gvk::from_api_version(api_version, kind), &mut object).expect("typed");
    assert_eq!(unknown, Vec::<String>::new());
    decoded
}

fn text(value: &str) -> Option<String> {
    Some(value.to_owned())
}

/// Metadata as Go writes it: every scalar that is not a pointer, zero or not.
fn metadata(name: &str) -> Option<meta::ObjectMeta> {
    Some(meta::ObjectMeta {
        name: text(name),
        generate_name: text(""),
        namespace: text("default"),
        self_link: text(""),
        uid: text(""),
        resource_version: text(""),
        generation: Some(0),
        creation_timestamp: Some(meta::Time { seconds: Some(0), nanos: Some(0) }),
        labels: [("app".to_owned(), "web".to_owned())].into_iter().collect(),
        ..Default::default()
    })
}

fn number(value: i32) -> Option<IntOrString> {
    Some(IntOrString { r#type: Some(0), int_val: Some(value), str_val: text("") })
}

fn percent(value: &str) -> Option<IntOrString> {
    Some(IntOrString { r#type: Some(1), int_val: Some(0), str_val: text(value) })
}

fn container() -> core::Container {
    let quantity = |value: &str| Quantity { string: text(value) };
    core::Container {
        name: text("web"),
        image: text("nginx:1.27"),
        working_dir: text(""),
        args: vec!["-c".to_owned(), String::new()],
        stdin: Some(false),
        tty: Some(true),
        ports: vec![core::ContainerPort {
            name: text("http"),
            host_port: Some(0),
            container_port: Some(80),
            protocol: text("TCP"),
            host_ip: text(""),
        }],
        env: vec![core::EnvVar { name: text("EMPTY"), value: text(""), value_from: None }],
        env_from: vec![core::EnvFromSource {
            prefix: text(""),
            config_map_ref: Some(core::ConfigMapEnvSource {
                local_object_reference: Some(core::LocalObjectReference { name: text("config") }),
                optional: Some(false),
            }),
            secret_ref: None,
        }],
        resources: Some(core::ResourceRequirements {
            limits: [("cpu".to_owned(), quantity("500m"))].into_iter().collect(),
            ..Default::default()
        }),
        readiness_probe: Some(core::Probe {
            handler: Some(core::ProbeHandler {
                http_get: Some(core::HttpGetAction {
                    path: text("/"),
                    port: percent("http"),
                    host: text(""),
                    scheme: text("HTTP"),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            initial_delay_seconds: Some(0),
            period_seconds: Some(10),
            ..Default::default()
        }),
        security_context: Some(core::SecurityContext {
            run_as_user: Some(0),
            privileged: Some(false),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn pod_spec() -> core::PodSpec {
    core::PodSpec {
        containers: vec![container()],
        volumes: vec![core::Volume {
            name: text("scratch"),
            volume_source: Some(core::VolumeSource {
                empty_dir: Some(core::EmptyDirVolumeSource { medium: text(""), size_limit: None }),
                ..Default::default()
            }),
        }],
        restart_policy: text(""),
        termination_grace_period_seconds: Some(0),
        host_network: Some(false),
        ..Default::default()
    }
}

#[test]
fn a_deployment_keeps_what_was_set_and_drops_zero_values() {
    let deployment = apps::Deployment {
        metadata: metadata("web"),
        spec: Some(apps::DeploymentSpec {
            replicas: Some(0),
            selector: Some(meta::LabelSelector {
                match_labels: [("app".to_owned(), "web".to_owned())].into_iter().collect(),
                match_expressions: Vec::new(),
            }),
            template: Some(core::PodTemplateSpec { metadata: metadata(""), spec: Some(pod_spec()) }),
            strategy: Some(apps::DeploymentStrategy {
                r#type: text("RollingUpdate"),
                rolling_update: Some(apps::RollingUpdateDeployment {
                    max_unavailable: number(0),
                    max_surge: percent("25%"),
                }),
            }),
            min_ready_seconds: Some(0),
            paused: Some(false),
            ..Default::default()
        }),
        status: Some(apps::DeploymentStatus { replicas: Some(0), ..Default::default() }),
    };
    let object = decoded("apps/v1", "Deployment", &deployment);
    assert_eq!(object["apiVersion"], "apps/v1");
    assert_eq!(object["kind"], "Deployment");
    assert_eq!(object["metadata"], json!({"name": "web", "namespace": "default", "labels": {"app": "web"}}));
    let spec = &object["spec"];
    assert_eq!(spec["replicas"], 0, "a pointer keeps its zero");
    assert!(spec.get("minReadySeconds").is_none(), "a plain zero goes");
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": "25%"}})
    );
    assert_eq!(
        spec["template"]["spec"],
        json!({
            "volumes": [{"name": "scratch", "emptyDir": {}}],
            "containers": [{
                "name": "web", "image": "nginx:1.27", "args": ["-c", ""], "tty": true,
                "ports": [{"name": "http", "containerPort": 80, "protocol": "TCP"}],
                "env": [{"name": "EMPTY"}],
                "envFrom": [{"configMapRef": {"name": "config", "optional": false}}],
                "resources": {"limits": {"cpu": "500m"}},
                "readinessProbe": {"httpGet": {"path": "/", "port": "http", "scheme": "HTTP"}, "periodSeconds": 10},
                "securityContext": {"runAsUser": 0, "privileged": false},
            }],
            "terminationGracePeriodSeconds": 0,
        })
    );
}

#[test]
fn config_maps_and_secrets_carry_bytes_as_base64() {
    let config = core::ConfigMap {
        metadata: metadata("c"),
        data: [("empty".to_owned(), String::new()), ("a".to_owned(), "b".to_owned())].into_iter().collect(),
        binary_data: [("bin".to_owned(), vec![0, 255])].into_iter().collect(),
        immutable: None,
    };
    let object = decoded("v1", "ConfigMap", &config);
    assert_eq!(object["data"], json!({"a": "b", "empty": ""}));
    assert_eq!(object["binaryData"], json!({"bin": "AP8="}));
    let secret = core::Secret {
        metadata: metadata("s"),
        data: [("password".to_owned(), b"hunter2".to_vec())].into_iter().collect(),
        string_data: [("user".to_owned(), "root".to_owned())].into_iter().collect(),
        r#type: text("Opaque"),
        immutable: Some(false),
    };
    let object = decoded("v1", "Secret", &secret);
    assert_eq!(object["data"], json!({"password": "aHVudGVyMg=="}));
    assert_eq!(object["stringData"], json!({"user": "root"}));
    assert_eq!(object["immutable"], false);
}

#[test]
fn pods_and_services() {
    let pod = core::Pod { metadata: metadata("p"), spec: Some(pod_spec()), status: Some(core::PodStatus::default()) };
    let object = decoded("v1", "Pod", &pod);
    assert_eq!(object["spec"]["containers"][0]["name"], "web");
    let service = core::Service {
        metadata: metadata("s"),
        spec: Some(core::ServiceSpec {
            ports: vec![core::ServicePort {
                name: text(""),
                protocol: text("TCP"),
                port: Some(80),
                target_port: number(8080),
                node_port: Some(0),
                app_protocol: None,
            }],
            cluster_ip: text(""),
            r#type: text("ClusterIP"),
            publish_not_ready_addresses: Some(false),
            ..Default::default()
        }),
        status: Some(core::ServiceStatus::default()),
    };
    let object = decoded("v1", "Service", &service);
    assert_eq!(object["spec"]["ports"], json!([{"protocol": "TCP", "port": 80, "targetPort": 8080}]));
    assert_eq!(object["spec"]["type"], "ClusterIP");
    assert!(object["spec"].get("clusterIP").is_none());
}

#[test]
fn what_kubectl_asks_of_the_auth_groups() {
    let request = authentication::TokenRequest {
        metadata: metadata(""),
        spec: Some(authentication::TokenRequestSpec {
            audiences: vec!["api".to_owned()],
            expiration_seconds: Some(600),
            bound_object_ref: None,
        }),
        status: None,
    };
    let object = decoded("authentication.k8s.io/v1", "TokenRequest", &request);
    assert_eq!(object["spec"], json!({"audiences": ["api"], "expirationSeconds": 600}));
    let review = authorization::SelfSubjectAccessReview {
        metadata: Some(meta::ObjectMeta::default()),
        spec: Some(authorization::SelfSubjectAccessReviewSpec {
            resource_attributes: Some(authorization::ResourceAttributes {
                namespace: text("default"),
                verb: text("get"),
                resource: text("pods"),
                subresource: text(""),
                ..Default::default()
            }),
            non_resource_attributes: None,
        }),
        status: Some(authorization::SubjectAccessReviewStatus { allowed: Some(false), ..Default::default() }),
    };
    let object = decoded("authorization.k8s.io/v1", "SelfSubjectAccessReview", &review);
    assert_eq!(
        object["spec"]["resourceAttributes"],
        json!({"namespace": "default", "verb": "get", "resource": "pods"})
    );
    let extra = authorization::ExtraValue { items: vec!["a".to_owned(), "b".to_owned()] };
    let review = authorization::SubjectAccessReview {
        spec: Some(authorization::SubjectAccessReviewSpec {
            user: text("u"),
            extra: [("scopes".to_owned(), extra)].into_iter().collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let object = decoded("authorization.k8s.io/v1", "SubjectAccessReview", &review);
    assert_eq!(object["spec"]["extra"], json!({"scopes": ["a", "b"]}));
}

#[test]
fn options_and_subresources() {
    let options = meta::DeleteOptions {
        grace_period_seconds: Some(0),
        propagation_policy: text("Background"),
        preconditions: Some(meta::Preconditions { uid: text("u"), resource_version: None }),
        ..Default::default()
    };
    let object = decoded("apps/v1", "DeleteOptions", &options);
    assert_eq!(object["gracePeriodSeconds"], 0);
    assert_eq!(object["preconditions"], json!({"uid": "u"}));
    let scale = autoscaling::Scale {
        metadata: metadata("web"),
        spec: Some(autoscaling::ScaleSpec { replicas: Some(3) }),
        status: None,
    };
    assert_eq!(decoded("autoscaling/v1", "Scale", &scale)["spec"]["replicas"], 3);
    let eviction = policy::Eviction { metadata: metadata("p"), delete_options: Some(options) };
    assert_eq!(decoded("policy/v1", "Eviction", &eviction)["deleteOptions"]["propagationPolicy"], "Background");
    let binding = core::Binding {
        metadata: metadata("p"),
        target: Some(core::ObjectReference { kind: text("Node"), name: text("n"), ..Default::default() }),
    };
    assert_eq!(decoded("v1", "Binding", &binding)["target"], json!({"kind": "Node", "name": "n"}));
}

#[test]
fn lists_events_and_embedded_objects() {
    let event = core::Event {
        metadata: metadata("e"),
        event_time: Some(meta::MicroTime { seconds: Some(1_767_225_600), nanos: Some(123_456_789) }),
        first_timestamp: Some(meta::Time { seconds: Some(1_767_225_600), nanos: Some(5) }),
        count: Some(2),
        ..Default::default()
    };
    let list = core::EventList { metadata: Some(meta::ListMeta::default()), items: vec![event] };
    let object = decoded("v1", "EventList", &list);
    assert_eq!(object["items"][0]["eventTime"], "2026-01-01T00:00:00.123456Z");
    assert_eq!(object["items"][0]["firstTimestamp"], "2026-01-01T00:00:00Z");
    let revision = apps::ControllerRevision {
        metadata: metadata("r"),
        data: Some(RawExtension { raw: Some(br#"{"spec":{"a":1}}"#.to_vec()) }),
        revision: Some(1),
    };
    assert_eq!(decoded("apps/v1", "ControllerRevision", &revision)["data"], json!({"spec": {"a": 1}}));
    let nested = body("v1", "Pod", &core::Pod { metadata: metadata("p"), spec: None, status: None });
    let revision = apps::ControllerRevision { data: Some(RawExtension { raw: Some(nested) }), ..revision };
    assert_eq!(decoded("apps/v1", "ControllerRevision", &revision)["data"]["metadata"]["name"], "p");
}

#[test]
fn what_is_not_a_known_object_is_refused() {
    assert_eq!(decode(b"{}"), Err(DecodeError::Magic));
    let unknown = decode(&body("example.com/v1", "Thing", &meta::ObjectMeta::default())).expect_err("unknown");
    assert_eq!(unknown.to_string(), "no kind \"Thing\" is registered for version \"example.com/v1\"");
    let mut cut = body("v1", "Pod", &core::Pod { metadata: metadata("p"), spec: Some(pod_spec()), status: None });
    cut.truncate(cut.len() - 3);
    assert!(matches!(decode(&cut), Err(DecodeError::Malformed { .. })));
}

#[test]
fn envelopes_in_envelopes_end() {
    let mut inner = body("v1", "Pod", &core::Pod::default());
    for _ in 0..500 {
        let revision = apps::ControllerRevision { data: Some(RawExtension { raw: Some(inner) }), ..Default::default() };
        inner = body("apps/v1", "ControllerRevision", &revision);
    }
    assert!(matches!(decode(&inner), Err(DecodeError::TooDeep { .. })));
}

proptest::proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400), flip in 0usize..400) {
        let mut raw = b"k8s\0".to_vec();
        raw.extend(&bytes);
        let _ = decode(&raw);
        let mut real = body("v1", "Pod", &core::Pod { metadata: metadata("p"), spec: Some(pod_spec()), status: None });
        let at = flip % real.len();
        real[at] ^= bytes.first().copied().unwrap_or(1);
        let _ = decode(&real);
    }
}
