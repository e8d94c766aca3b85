//! Addresses for Services of type LoadBalancer, on machines without a provider: from pools that the administrator names.
//!
//! The addresses are in the Services' status and nowhere else. Whatever changes, all are planned anew (`plan`), and only
//! differences are written, each on condition that nobody wrote meanwhile. Announcing them is the work of the nodes.

mod plan;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, EventType, Key, Next, Recorder, WorkQueue, merge_status, queue};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use plan::Provider;

use crate::shared::{Shared, Task};

/// All Services are planned together, so there is one thing to do.
const EVERYTHING: &str = "all";

struct Controller {
    shared: Arc<Shared>,
    pools: watch::Receiver<Vec<IpNet>>,
    /// The pools that the Services' statuses are of.
    planned: Mutex<Vec<IpNet>>,
    class: String,
    recorder: Recorder,
    /// What was said last about each Service that has a problem.
    told: Mutex<HashMap<Key, String>>,
}

pub(crate) fn start(
    shared: &Arc<Shared>,
    stop: &CancellationToken,
    mut pools: watch::Receiver<Vec<IpNet>>,
    class: String,
) -> Task {
    let planned = Mutex::new(pools.borrow_and_update().clone());
    let controller = Arc::new(Controller {
        shared: shared.clone(),
        pools: pools.clone(),
        planned,
        class,
        recorder: shared.recorder.named("service-controller"),
        told: Mutex::default(),
    });
    let queue: Arc<WorkQueue<&'static str>> = WorkQueue::new();
    let on_service = queue.clone();
    shared.services.on_change(move |change| {
        let before = matches!(change, Change::Updated { old, .. } if plan::concerns(old));
        if before || plan::concerns(change.object()) {
            on_service.add(EVERYTHING);
        }
    });
    let stop = stop.clone();
    Box::pin(async move {
        // Only when every Service is known it is known which addresses are free.
        controller.shared.services.wait_synced().await;
        let on_pools = queue.clone();
        let told = async {
            while pools.changed().await.is_ok() {
                on_pools.add(EVERYTHING);
            }
            std::future::pending().await
        };
        tokio::select! {
            () = queue::work("service-load-balancer", queue, 1, stop, |_| controller.clone().reconcile()) => {}
            () = told => {}
        }
    })
}

impl Controller {
    async fn reconcile(self: Arc<Self>) -> Result<Next, ApiError> {
        let pools = self.pools.borrow().clone();
        let mut services = self.shared.services.list();
        services.retain(|service| plan::concerns(service));
        if pools.is_empty() {
            // Then the statuses are somebody else's business, but for what was given from pools that were there before.
            let former = Provider { pools: self.planned.lock().clone(), class: self.class.clone() };
            services.retain(|service| plan::has_of(service, &former));
        }
        let provider = Provider { pools: pools.clone(), class: self.class.clone() };
        let plan = plan::plan(&services, &provider);
        self.tell(&plan.problems);
        let mut failed = None;
        for (key, addresses) in plan.write {
            match self.write(&key, &addresses).await {
                Ok(()) => {}
                Err(error) if error.is_not_found() => {}
                // The others shall not wait for this one.
                Err(error) => failed = Some(error),
            }
        }
        if failed.is_none() {
            *self.planned.lock() = pools;
        }
        failed.map_or(Ok(Next::Done), Err)
    }

    async fn write(&self, key: &Key, addresses: &[IpAddr]) -> Result<(), ApiError> {
        let Some(service) = self.shared.services.get_key(key) else { return Ok(()) };
        let entry = |address: &IpAddr| json!({"ip": address.to_string(), "ipMode": "VIP"});
        let ingress: Vec<Value> = addresses.iter().map(entry).collect();
        let patch = json!({
            "metadata": {"uid": service.uid(), "resourceVersion": service.resource_version()},
            "status": {"loadBalancer": {"ingress": if ingress.is_empty() { Value::Null } else { ingress.into() }}},
        });
        let api: Api<Service> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        merge_status("patch service status", &api, &key.name, &patch).await?;
        if !addresses.is_empty() {
            self.recorder.event(service.as_ref(), EventType::Normal, "EnsuredLoadBalancer", "Ensured load balancer");
        }
        Ok(())
    }

    /// Says once what is wrong with a Service, and again when it is something else.
    fn tell(&self, problems: &[(Key, String)]) {
        let mut told = self.told.lock();
        told.retain(|key, _| problems.iter().any(|(other, _)| other == key));
        for (key, problem) in problems {
            if told.insert(key.clone(), problem.clone()).as_ref() == Some(problem) {
                continue;
            }
            if let Some(service) = self.shared.services.get_key(key) {
                let message = format!("Error syncing load balancer: {problem}");
                self.recorder.event(service.as_ref(), EventType::Warning, "SyncLoadBalancerFailed", message);
            }
        }
    }
}
