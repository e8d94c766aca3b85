//! Pod addresses for nodes: each node gets one slice of each of the cluster's ranges, kept in `spec.podCIDRs` for its
//! lifetime.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, EventType, Next, Recorder, WorkQueue, merge, queue};
use parking_lot::Mutex;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Task};

/// The slices of the range, and who has which. Slices are handed out in turn, so that one that became free is used
/// again as late as possible.
#[derive(Debug)]
pub(crate) struct Pool {
    range: IpNet,
    mask: u8,
    /// The slices of each node by their numbers: one, or those that a network of another size overlaps.
    taken: HashMap<String, RangeInclusive<u128>>,
    next: u128,
}

impl Pool {
    /// `None` if slices of prefix length `mask` do not fit into `range`.
    pub fn new(range: IpNet, mask: u8) -> Option<Self> {
        let fits = mask >= range.prefix_len() && mask <= range.max_prefix_len();
        fits.then(|| Self { range: range.trunc(), mask, taken: HashMap::new(), next: 0 })
    }

    fn size(&self) -> u128 {
        1u128.checked_shl(u32::from(self.mask - self.range.prefix_len())).unwrap_or(u128::MAX)
    }

    fn shift(&self) -> u32 {
        u32::from(self.range.max_prefix_len() - self.mask)
    }

    fn slice(&self, number: u128) -> Option<IpNet> {
        let offset = number.checked_shl(self.shift())?;
        let address = match self.range.network() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base).checked_add(u32::try_from(offset).ok()?)?)),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base).checked_add(offset)?)),
        };
        IpNet::new(address, self.mask).ok()
    }

    fn number(&self, slice: &IpNet) -> Option<u128> {
        if !self.range.contains(slice) {
            return None;
        }
        Some(match (slice.network(), self.range.network()) {
            (IpAddr::V4(address), IpAddr::V4(base)) => u128::from(u32::from(address) - u32::from(base)) >> self.shift(),
            (IpAddr::V6(address), IpAddr::V6(base)) => (u128::from(address) - u128::from(base)) >> self.shift(),
            _ => return None,
        })
    }

    /// Takes note of a network that a node has: of before the slices had this size, if it has another.
    fn occupy(&mut self, node: &str, slice: &IpNet) {
        if let Some(number) = self.number(slice) {
            let larger = u32::from(self.mask.saturating_sub(slice.prefix_len()));
            let last = number.saturating_add(1_u128.checked_shl(larger).unwrap_or(u128::MAX) - 1);
            self.taken.insert(node.to_owned(), number..=last);
            self.next = self.next.max(last.saturating_add(1));
        }
    }

    /// The slice of `node`, a new one if it has none; `None` if all are taken.
    fn assign(&mut self, node: &str) -> Option<IpNet> {
        if let Some(numbers) = self.taken.get(node) {
            return self.slice(*numbers.start());
        }
        let size = self.size();
        let in_use = self.taken.values().map(|numbers| numbers.end() - numbers.start() + 1).sum::<u128>();
        let candidates = (0..size.min(in_use.saturating_add(1))).map(|step| (self.next % size + step) % size);
        let is_free = |number: &u128| !self.taken.values().any(|numbers| numbers.contains(number));
        let number = candidates.into_iter().find(is_free)?;
        self.taken.insert(node.to_owned(), number..=number);
        self.next = number + 1;
        self.slice(number)
    }

    fn release(&mut self, node: &str) {
        self.taken.remove(node);
    }
}

fn pod_cidrs(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let mut texts: Vec<&String> = spec.pod_cidrs.iter().flatten().collect();
    if texts.is_empty() {
        texts.extend(&spec.pod_cidr);
    }
    texts.into_iter().filter_map(|text| text.parse().ok()).collect()
}

/// One slice of each range, or of none: what was taken for a node that cannot have all is given back.
fn assign(pools: &mut [Pool], node: &str) -> Option<Vec<IpNet>> {
    let slices: Option<Vec<IpNet>> = pools.iter_mut().map(|pool| pool.assign(node)).collect();
    if slices.is_none() {
        release(pools, node);
    }
    slices
}

fn release(pools: &mut [Pool], node: &str) {
    pools.iter_mut().for_each(|pool| pool.release(node));
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken, pools: Vec<Pool>) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    let pools = Arc::new(Mutex::new(pools));
    let recorder = shared.recorder.named("cidrAllocator");
    let (listening, on_node) = (pools.clone(), queue.clone());
    shared.nodes.on_change(move |change| {
        let node = change.object();
        let slices = pod_cidrs(node);
        match change {
            Change::Deleted(_) => release(&mut listening.lock(), &node.name_any()),
            _ if slices.is_empty() => on_node.add(node.name_any()),
            _ => {
                for pool in listening.lock().iter_mut() {
                    slices.iter().for_each(|slice| pool.occupy(&node.name_any(), slice));
                }
            }
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        // Only when every node is known it is known which slices are free.
        shared.nodes.wait_synced().await;
        let reconcile = |name| reconcile(shared.clone(), recorder.clone(), pools.clone(), name);
        queue::work("node-ipam", queue, 1, stop, reconcile).await;
    })
}

async fn reconcile(
    shared: Arc<Shared>,
    recorder: Recorder,
    pools: Arc<Mutex<Vec<Pool>>>,
    name: String,
) -> Result<Next, ApiError> {
    let Some(node) = shared.nodes.get("", &name).filter(|node| pod_cidrs(node).is_empty()) else {
        return Ok(Next::Done);
    };
    let assigned = assign(&mut pools.lock(), &name);
    let Some(slices) = assigned else {
        recorder.event(
            node.as_ref(),
            EventType::Normal,
            "CIDRNotAvailable",
            format!("Node {name} status is now: CIDRNotAvailable"),
        );
        return Ok(Next::After(std::time::Duration::from_secs(30)));
    };
    let api: Api<Node> = Api::all(shared.client.clone());
    let cidrs: Vec<String> = slices.iter().map(ToString::to_string).collect();
    let patch = json!({"metadata": {"uid": node.uid()}, "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs}});
    match merge("patch node podCIDR", &api, &name, &patch).await {
        Err(error) if error.is_not_found() => {
            release(&mut pools.lock(), &name);
            Ok(Next::Done)
        }
        result => result.map(|_| Next::Done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool(range: &str, mask: u8) -> Pool {
        Pool::new(range.parse().unwrap(), mask).unwrap()
    }

    #[test]
    fn nodes_get_slices_in_turn_and_keep_them() {
        let mut pool = pool("10.42.0.0/16", 24);
        assert_eq!(pool.assign("a").unwrap().to_string(), "10.42.0.0/24");
        assert_eq!(pool.assign("b").unwrap().to_string(), "10.42.1.0/24");
        assert_eq!(pool.assign("a").unwrap().to_string(), "10.42.0.0/24");
        pool.release("a");
        assert_eq!(pool.assign("c").unwrap().to_string(), "10.42.2.0/24", "a free slice rests as long as possible");
    }

    #[test]
    fn slices_found_on_nodes_are_not_given_again() {
        let mut pool = pool("10.42.0.0/22", 24);
        pool.occupy("old", &"10.42.1.0/24".parse().unwrap());
        pool.occupy("foreign", &"192.168.0.0/24".parse().unwrap());
        let given: Vec<_> = ["a", "b", "c", "d"].map(|node| pool.assign(node).map(|slice| slice.to_string())).into();
        let given: Vec<_> = given.iter().map(Option::as_deref).collect();
        assert_eq!(given, [Some("10.42.2.0/24"), Some("10.42.3.0/24"), Some("10.42.0.0/24"), None]);
    }

    #[test]
    fn networks_of_another_size_are_nobody_elses() {
        let mut pool = pool("10.42.0.0/22", 24);
        pool.occupy("large", &"10.42.0.0/23".parse().unwrap());
        pool.occupy("small", &"10.42.2.128/25".parse().unwrap());
        assert_eq!(pool.assign("new").unwrap().to_string(), "10.42.3.0/24");
        assert_eq!(pool.assign("late"), None);
        pool.release("large");
        assert_eq!(pool.assign("late").unwrap().to_string(), "10.42.0.0/24");
    }

    #[test]
    fn masks_that_do_not_fit_are_refused() {
        assert!(Pool::new("10.42.0.0/16".parse().unwrap(), 15).is_none());
        assert!(Pool::new("10.42.0.0/16".parse().unwrap(), 33).is_none());
        assert_eq!(pool("fd00::/48", 64).assign("a").unwrap().to_string(), "fd00::/64");
    }

    #[test]
    fn a_node_gets_a_slice_of_each_range_or_of_none() {
        let mut pools = [pool("10.42.0.0/23", 24), pool("fd42::/63", 64)];
        let given =
            |slices: Option<Vec<IpNet>>| slices.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(given(assign(&mut pools, "a")).unwrap(), ["10.42.0.0/24", "fd42::/64"]);
        pools[1].occupy("old", &"fd42:0:0:1::/64".parse().unwrap());
        assert_eq!(given(assign(&mut pools, "b")), None, "no IPv6 is left");
        release(&mut pools, "old");
        assert_eq!(given(assign(&mut pools, "c")).unwrap(), ["10.42.1.0/24", "fd42:0:0:1::/64"]);
    }

    proptest! {
        #[test]
        fn no_two_nodes_share_a_slice(steps in proptest::collection::vec((0u8..12, any::<bool>()), 1..100)) {
            let mut pool = pool("10.0.0.0/29", 32);
            for (node, comes) in steps {
                let name = node.to_string();
                if comes { pool.assign(&name); } else { pool.release(&name); }
                let mut numbers: Vec<u128> = pool.taken.values().map(|numbers| *numbers.start()).collect();
                numbers.sort_unstable();
                numbers.dedup();
                prop_assert_eq!(numbers.len(), pool.taken.len());
                prop_assert!(numbers.iter().all(|number| *number < 8));
            }
        }
    }
}
