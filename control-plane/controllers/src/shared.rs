//! What all controllers share: the client, the event recorder and one informer a kind.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service,
    ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass, VolumeAttachment};
use kube::runtime::watcher;
use kube::{Api, Client};
use oarlock_machinery::{Informer, Recorder};
use tokio_util::sync::CancellationToken;

use crate::{pods, token_cleaner};

/// A task of a controller.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The ConfigMap with the cluster's CA in each namespace.
pub(crate) const ROOT_CA_NAME: &str = "kube-root-ca.crt";
/// Where nodes renew their leases.
pub(crate) const NODE_LEASE_NAMESPACE: &str = "kube-node-lease";
/// Where bootstrap tokens are.
pub(crate) const TOKEN_NAMESPACE: &str = "kube-system";
const TOKEN_TYPE: &str = "bootstrap.kubernetes.io/token";

pub(crate) struct Shared {
    pub client: Client,
    pub recorder: Recorder,
    /// Indexed by node name; trimmed to what [`pods::trim`] keeps.
    pub pods: Arc<Informer<Pod>>,
    pub nodes: Arc<Informer<Node>>,
    pub leases: Arc<Informer<Lease>>,
    pub services: Arc<Informer<Service>>,
    pub endpoints: Arc<Informer<Endpoints>>,
    /// Indexed by "namespace/service".
    pub endpoint_slices: Arc<Informer<EndpointSlice>>,
    pub replica_sets: Arc<Informer<ReplicaSet>>,
    pub deployments: Arc<Informer<Deployment>>,
    pub namespaces: Arc<Informer<Namespace>>,
    pub service_accounts: Arc<Informer<ServiceAccount>>,
    /// Only those named [`ROOT_CA_NAME`].
    pub root_cas: Arc<Informer<ConfigMap>>,
    pub disruption_budgets: Arc<Informer<PodDisruptionBudget>>,
    pub signing_requests: Arc<Informer<CertificateSigningRequest>>,
    pub claims: Arc<Informer<PersistentVolumeClaim>>,
    pub volumes: Arc<Informer<PersistentVolume>>,
    pub classes: Arc<Informer<StorageClass>>,
    pub csi_drivers: Arc<Informer<CSIDriver>>,
    pub attachments: Arc<Informer<VolumeAttachment>>,
    /// Only bootstrap tokens, without what they are.
    pub tokens: Arc<Informer<Secret>>,
}

impl Shared {
    pub fn new(client: Client, recorder: Recorder) -> Arc<Self> {
        Arc::new(Self {
            client,
            recorder,
            pods: Informer::with_index(pods::trim, |pod| pod.spec.as_ref()?.node_name.clone()),
            nodes: Informer::new(|node| {
                if let Some(status) = &mut node.status {
                    status.images = None;
                }
            }),
            leases: Informer::new(|_| {}),
            services: Informer::new(drop_last_applied),
            endpoints: Informer::new(|_| {}),
            endpoint_slices: Informer::with_index(
                |_| {},
                |slice| {
                    let service = slice.metadata.labels.as_ref()?.get(crate::endpoints::SERVICE_NAME_LABEL)?;
                    Some(format!("{}/{service}", slice.metadata.namespace.as_deref().unwrap_or_default()))
                },
            ),
            replica_sets: Informer::new(|_| {}),
            deployments: Informer::new(drop_last_applied),
            namespaces: Informer::new(|_| {}),
            service_accounts: Informer::new(|_| {}),
            root_cas: Informer::new(|_| {}),
            disruption_budgets: Informer::new(|_| {}),
            signing_requests: Informer::new(|_| {}),
            claims: Informer::new(drop_last_applied),
            volumes: Informer::new(drop_last_applied),
            classes: Informer::new(drop_last_applied),
            csi_drivers: Informer::new(drop_last_applied),
            attachments: Informer::new(|_| {}),
            tokens: Informer::new(token_cleaner::trim),
        })
    }

    /// One task an informer; to be started after all listeners are in place.
    pub fn informer_tasks(self: &Arc<Self>, stop: &CancellationToken) -> Vec<(&'static str, Task)> {
        let all = watcher::Config::default;
        let named_root_ca = all().fields(&format!("metadata.name={ROOT_CA_NAME}"));
        let tokens: Api<Secret> = Api::namespaced(self.client.clone(), TOKEN_NAMESPACE);
        let are_tokens = all().fields(&format!("type={TOKEN_TYPE}"));
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), NODE_LEASE_NAMESPACE);
        macro_rules! task {
            ($name:literal, $informer:expr, $api:expr, $config:expr) => {{
                let (informer, api, config, stop) = ($informer.clone(), $api, $config, stop.clone());
                let task: Task = Box::pin(async move { informer.run(api, config, stop).await });
                ($name, task)
            }};
        }
        let client = || self.client.clone();
        vec![
            task!("watch of namespaces", self.namespaces, Api::all(client()), all()),
            task!("watch of deployments", self.deployments, Api::all(client()), all()),
            task!("watch of replicasets", self.replica_sets, Api::all(client()), all()),
            task!("watch of pods", self.pods, Api::all(client()), all()),
            task!("watch of nodes", self.nodes, Api::all(client()), all()),
            task!("watch of leases", self.leases, leases, all()),
            task!("watch of services", self.services, Api::all(client()), all()),
            task!("watch of endpoints", self.endpoints, Api::all(client()), all()),
            task!("watch of endpointslices", self.endpoint_slices, Api::all(client()), all()),
            task!("watch of serviceaccounts", self.service_accounts, Api::all(client()), all()),
            task!("watch of root CAs", self.root_cas, Api::all(client()), named_root_ca),
            task!("watch of poddisruptionbudgets", self.disruption_budgets, Api::all(client()), all()),
            task!("watch of certificatesigningrequests", self.signing_requests, Api::all(client()), all()),
            task!("watch of persistentvolumeclaims", self.claims, Api::all(client()), all()),
            task!("watch of persistentvolumes", self.volumes, Api::all(client()), all()),
            task!("watch of storageclasses", self.classes, Api::all(client()), all()),
            task!("watch of csidrivers", self.csi_drivers, Api::all(client()), all()),
            task!("watch of volumeattachments", self.attachments, Api::all(client()), all()),
            task!("watch of bootstrap tokens", self.tokens, tokens, are_tokens),
        ]
    }
}

/// kubectl's copy of the object is as large as the object, and no controller reads it.
fn drop_last_applied<K: kube::ResourceExt>(object: &mut K) {
    object.annotations_mut().remove("kubectl.kubernetes.io/last-applied-configuration");
}
