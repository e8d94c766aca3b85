//! The controllers: they watch the cluster's objects and bring what is closer to what was asked for.
//!
//! One informer a kind feeds all controllers (`shared`). Each controller is a module with a pure part that decides
//! (`plan`, `status`, `rolling` …) and a thin part that reads the caches, asks the pure part, and carries its answer
//! out. All are level-based: nothing is remembered that cannot be computed again from the API. This crate owns no
//! storage and no HTTP: everything goes through a `kube::Client`.

mod attachments;
mod balancer;
mod certificates;
mod claims;
mod conditions;
mod deployment;
mod disruption;
mod endpoints;
mod garbage;
mod namespace;
mod node;
mod owners;
mod pods;
mod replicaset;
mod root_ca;
mod service_account;
mod shared;
mod token_cleaner;

use ipnet::IpNet;
use oarlock_machinery::Recorder;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use shared::Shared;

/// What the controllers need to know beside what the API tells them.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pod addresses of the whole cluster, of one family or of each with the primary one first; each node gets a slice of
    /// each, with the prefix length beside it (by default 24 for IPv4 and 64 for IPv6).
    pub cluster_cidrs: Vec<(IpNet, u8)>,
    /// PEM of the cluster's CA, published as `kube-root-ca.crt` in each namespace.
    pub root_ca_pem: String,
    /// Addresses for Services of type LoadBalancer; none are handed out without any. They may change.
    pub balancer_pools: watch::Receiver<Vec<IpNet>>,
    /// The `loadBalancerClass` that asks for them, beside no class at all.
    pub balancer_class: String,
    /// The directory of the authority that signs certificate requests; None signs none.
    pub signing_ca_dir: Option<std::path::PathBuf>,
    /// Names and addresses that the API server is known by: no node gets a certificate to serve under one of them.
    pub server_names: Vec<String>,
}

/// Why the controllers stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A task that should run for ever ended, by itself or by a panic.
    #[error("controller task {task} ended unexpectedly")]
    TaskEnded { task: &'static str },
    /// The node slices do not fit into the cluster's addresses.
    #[error("node prefix length {mask} does not fit into cluster CIDR {cidr}")]
    NodeMask { cidr: IpNet, mask: u8 },
}

/// All controllers over one client.
pub struct Controllers {
    client: kube::Client,
    config: Config,
}

impl Controllers {
    pub fn new(client: kube::Client, config: Config) -> Self {
        Self { client, config }
    }

    /// Runs until `shutdown`. An error means that a task died; the caller should end the process.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let pool = |(cidr, mask): &(IpNet, u8)| {
            node::ipam::Pool::new(*cidr, *mask).ok_or(Error::NodeMask { cidr: *cidr, mask: *mask })
        };
        let cidrs = self.config.cluster_cidrs.iter().map(pool).collect::<Result<Vec<_>, _>>()?;
        let (recorder, writer) = Recorder::new(self.client.clone(), "controller-manager");
        let shared = Shared::new(self.client, recorder);
        let mut tasks: JoinSet<&'static str> = JoinSet::new();
        // Ends every task when this function does, however it ends.
        let stop = shutdown.child_token();
        let _stop_on_return = stop.clone().drop_guard();

        let mut start = |name: &'static str, task: shared::Task| {
            tasks.spawn(async move {
                task.await;
                name
            });
        };
        start("events", Box::pin(writer.run(stop.clone())));
        start("deployment", deployment::start(&shared, &stop));
        start("replicaset", replicaset::start(&shared, &stop));
        start("endpointslice", endpoints::start(&shared, &stop));
        start("endpointslicemirroring", endpoints::mirror::start(&shared, &stop));
        let (pools, class) = (self.config.balancer_pools, self.config.balancer_class);
        start("service-load-balancer", balancer::start(&shared, &stop, pools, class));
        start("namespace", namespace::start(&shared, &stop));
        start("garbage", garbage::start(&shared, &stop));
        start("serviceaccount", service_account::start(&shared, &stop));
        start("root-ca", root_ca::start(&shared, &stop, self.config.root_ca_pem));
        start("node-lifecycle", node::lifecycle::start(&shared, &stop));
        start("taint-eviction", node::eviction::start(&shared, &stop));
        start("node-ipam", node::ipam::start(&shared, &stop, cidrs));
        start("pod-gc", node::pod_gc::start(&shared, &stop));
        start("disruption", disruption::start(&shared, &stop));
        start("claims", claims::start(&shared, &stop));
        start("storage-protection", claims::protection::start(&shared, &stop));
        start("attachments", attachments::start(&shared, &stop));
        start("tokencleaner", token_cleaner::start(&shared, &stop));
        if let Some(directory) = self.config.signing_ca_dir {
            let names = self.config.server_names;
            start("certificates", certificates::start(&shared, &stop, directory, names));
        }
        // Informers start last: every listener is in place and misses nothing.
        for (name, task) in shared.informer_tasks(&stop) {
            start(name, task);
        }

        tokio::select! {
            () = shutdown.cancelled() => {}
            ended = tasks.join_next() => if !shutdown.is_cancelled() {
                let task = ended.and_then(Result::ok).unwrap_or("panicked");
                return Err(Error::TaskEnded { task });
            }
        }
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        Ok(())
    }
}
