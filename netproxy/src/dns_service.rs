//! The `kube-dns` Service, whose addresses cluster DNS answers on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Api, PostParams};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

const RETRY_INTERVAL: Duration = Duration::from_secs(2);
const DNS_PORT: u16 = 53;
const DNS_NAMESPACE: &str = "kube-system";
const DNS_SERVICE: &str = "kube-dns";

/// Makes the DNS Service unless it exists; its selector lets an installed CoreDNS take over.
pub async fn keep(client: kube::Client, addresses: Vec<IpAddr>, shutdown: CancellationToken) {
    const FORBIDDEN: u16 = 403;
    const CONFLICT: u16 = 409;
    let api: Api<core::Service> = Api::namespaced(client, DNS_NAMESPACE);
    let mut told = false;
    loop {
        let outcome = async {
            let named = kube::api::ListParams::default().fields(&format!("metadata.name={DNS_SERVICE}"));
            match api.list(&named).await?.items.is_empty() {
                false => Ok(None),
                true => api.create(&PostParams::default(), &dns_service(&addresses)).await.map(Some),
            }
        };
        match outcome.await {
            Ok(None) => break,
            Ok(Some(_)) => {
                info!(service = DNS_SERVICE, ?addresses, "cluster DNS Service made");
                break;
            }
            Err(kube::Error::Api(status)) if status.code == CONFLICT => break,
            Err(error) => {
                let forbidden = matches!(&error, kube::Error::Api(status) if status.code == FORBIDDEN);
                if !std::mem::replace(&mut told, true) {
                    warn!(error = &error as &dyn std::error::Error, "cluster DNS Service cannot be made");
                }
                if forbidden {
                    break;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
    shutdown.cancelled().await;
}

fn dns_service(addresses: &[IpAddr]) -> core::Service {
    let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let port = |name: &str, protocol: &str| core::ServicePort {
        name: Some(name.to_owned()),
        protocol: Some(protocol.to_owned()),
        port: i32::from(DNS_PORT),
        target_port: Some(IntOrString::Int(i32::from(DNS_PORT))),
        ..core::ServicePort::default()
    };
    core::Service {
        metadata: ObjectMeta {
            name: Some(DNS_SERVICE.to_owned()),
            namespace: Some(DNS_NAMESPACE.to_owned()),
            labels: Some(pairs(&[
                ("k8s-app", "kube-dns"),
                ("kubernetes.io/cluster-service", "true"),
                ("kubernetes.io/name", "CoreDNS"),
            ])),
            ..ObjectMeta::default()
        },
        spec: Some(core::ServiceSpec {
            selector: Some(pairs(&[("k8s-app", "kube-dns")])),
            cluster_ip: addresses.first().map(ToString::to_string),
            cluster_ips: Some(addresses.iter().map(ToString::to_string).collect()),
            ip_family_policy: (addresses.len() > 1).then(|| "RequireDualStack".to_owned()),
            ports: Some(vec![port("dns", "UDP"), port("dns-tcp", "TCP")]),
            ..core::ServiceSpec::default()
        }),
        status: None,
    }
}
