//! Which announcing nodes are alive: each renews a Lease in `kube-system` while it announces something, and the others see
//! it by their watch.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Resource;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::time::{Instant, timeout};

pub const NAMESPACE: &str = "kube-system";
pub const LABEL: &str = "oarlock.io/announcer";
pub const RENEW_INTERVAL: Duration = Duration::from_secs(2);
/// A node that has not renewed for so long announces nothing any more.
pub const LIFE: Duration = Duration::from_secs(8);
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A Lease that was seen: whose, and its last renewal. None when it is gone.
pub type Seen = (Arc<str>, Option<String>);

pub fn name_of(node: &str) -> String {
    format!("oarlock-announcer-{node}")
}

/// The last renewal, as the API has it.
pub fn renewal(lease: &Lease) -> Option<String> {
    lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0.to_string())
}

/// Whose Lease it is.
pub fn holder(lease: &Lease) -> Option<Arc<str>> {
    lease.spec.as_ref()?.holder_identity.as_deref().map(Arc::from)
}

/// Who was heard of, and when by this node's own clock: others' clocks may be wrong.
#[derive(Debug, Default)]
pub struct Liveness {
    heard: HashMap<Arc<str>, (Option<String>, Instant)>,
}

impl Liveness {
    /// Takes a renewal in; says whether it is a new one.
    pub fn hear(&mut self, node: &Arc<str>, renewal: Option<String>, now: Instant) -> bool {
        let known = self.heard.get(node);
        if renewal.is_none() || known.is_some_and(|(known, _)| *known == renewal) {
            return false;
        }
        self.heard.insert(node.clone(), (renewal, now));
        true
    }

    /// Gives a node the benefit of the doubt from now on.
    pub fn trust(&mut self, node: &Arc<str>, now: Instant) {
        self.heard.entry(node.clone()).or_insert((None, now)).1 = now;
    }

    /// Whether a node can be thought to live. One that was never expected before gets its time from now on.
    pub fn is_alive(&mut self, node: &Arc<str>, now: Instant) -> bool {
        let (_, heard) = self.heard.entry(node.clone()).or_insert((None, now));
        now.duration_since(*heard) < LIFE
    }

    /// Forgets nodes that are gone.
    pub fn keep_only(&mut self, is_node: impl Fn(&str) -> bool) {
        self.heard.retain(|node, _| is_node(node));
    }
}

/// Renews this node's Lease.
pub async fn renew(api: &Api<Lease>, node: &str) -> kube::Result<()> {
    const NOT_FOUND: u16 = 404;
    let name = name_of(node);
    let mut whole = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {LABEL: "true"}},
        "spec": {
            "holderIdentity": node, "leaseDurationSeconds": LIFE.as_secs(),
            "renewTime": format!("{:.6}", jiff::Timestamp::now()),
        },
    });
    let work = async {
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(&json!({"spec": whole["spec"]}))).await {
            Err(kube::Error::Api(status)) if status.code == NOT_FOUND => {
                let nodes: Api<Node> = Api::all(api.clone().into_client());
                // It goes with the node.
                whole["metadata"]["ownerReferences"] = json!([nodes.get(node).await?.owner_ref(&())]);
                let lease = serde_json::from_value(whole).map_err(kube::Error::SerdeError)?;
                api.create(&PostParams::default(), &lease).await.map(drop)
            }
            other => other.map(drop),
        }
    };
    match timeout(CALL_TIMEOUT, work).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => Err(kube::Error::Service(Box::new(std::io::Error::from(std::io::ErrorKind::TimedOut)))),
    }
}

/// The last renewal of a node as the API has it now; an error when the API cannot say.
pub async fn ask(api: &Api<Lease>, node: &str) -> Result<Option<String>, ()> {
    match timeout(CALL_TIMEOUT, api.get_opt(&name_of(node))).await {
        Ok(Ok(lease)) => Ok(lease.as_ref().and_then(renewal)),
        Ok(Err(_)) | Err(_) => Err(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_lives_as_long_as_it_renews() {
        let mut liveness = Liveness::default();
        let node: Arc<str> = "a".into();
        assert!(liveness.is_alive(&node, Instant::now()), "nobody is dead who was never expected");
        tokio::time::advance(LIFE).await;
        assert!(!liveness.is_alive(&node, Instant::now()));
        assert!(liveness.hear(&node, Some("1".into()), Instant::now()));
        assert!(liveness.is_alive(&node, Instant::now()));
        tokio::time::advance(LIFE).await;
        assert!(!liveness.hear(&node, Some("1".into()), Instant::now()), "the same renewal again is none");
        assert!(!liveness.is_alive(&node, Instant::now()));
        liveness.trust(&node, Instant::now());
        assert!(liveness.is_alive(&node, Instant::now()));
    }
}
