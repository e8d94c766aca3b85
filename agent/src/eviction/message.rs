//! What the user of an ended pod reads. Pure; the words are upstream's.

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::judge::Reading;
use super::threshold::{Amount, Signal, Threshold};
use super::usage::PodUsage;
use crate::spec::resources::value;

/// The status reason of every ended pod.
pub(crate) const REASON: &str = "Evicted";

/// Why a pod may not start on a node under pressure.
pub(crate) fn pressed(conditions: &[&str]) -> String {
    format!("The node had condition: [{}]. ", conditions.join(" "))
}

/// Bytes in the notation of messages.
pub(super) fn bytes(count: i64) -> String {
    oarlock_quantity::Quantity::binary(count).to_string()
}

fn amount(signal: Signal, count: i64) -> String {
    if signal.in_bytes() { bytes(count) } else { count.to_string() }
}

/// The message of a pod that is ended because the node is short of something.
pub(super) fn shortage(pod: &Pod, usage: Option<&PodUsage>, threshold: &Threshold, reading: Option<Reading>) -> String {
    let signal = threshold.signal;
    let mut text = format!("The node was low on resource: {}. ", signal.resource());
    if let Some(reading) = reading {
        let quantity = match threshold.below {
            Amount::Absolute(units) => units,
            percent => percent.of(reading.capacity),
        };
        let (quantity, available) = (amount(signal, quantity), amount(signal, reading.available));
        text.push_str(&format!("Threshold quantity: {quantity}, available: {available}. "));
    }
    let (Some(spec), Some(usage)) = (&pod.spec, usage) else { return text };
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    for container in sidecars.chain(&spec.containers) {
        let Some(used) = usage.containers.get(&container.name) else { continue };
        let used = match signal {
            Signal::MemoryAvailable => used.memory_bytes,
            Signal::NodefsAvailable | Signal::ImagefsAvailable => Some(used.layer_bytes + used.log_bytes),
            _ => None,
        };
        let Some(used) = used.and_then(|used| i64::try_from(used).ok()) else { continue };
        let request = request(container, signal.resource());
        if used > request.as_ref().map_or(0, value) {
            text.push_str(&format!(
                "Container {} was using {}, request is {}, has larger consumption of {}. ",
                container.name,
                bytes(used),
                request.map_or("0".to_owned(), |request| request.0),
                signal.resource()
            ));
        }
    }
    text
}

fn request(container: &Container, resource: &str) -> Option<Quantity> {
    container.resources.as_ref()?.requests.as_ref()?.get(resource).cloned()
}

/// An emptyDir that grew past its sizeLimit.
pub(super) fn empty_dir(volume: &str, limit: &str) -> String {
    format!("Usage of EmptyDir volume \"{volume}\" exceeds the limit \"{limit}\". ")
}

/// A container that uses more disk than its limit.
pub(super) fn container_storage(container: &str, limit: &str) -> String {
    format!("Container {container} exceeded its local ephemeral storage limit \"{limit}\". ")
}

/// A pod whose containers and volumes together use more disk than their limits.
pub(super) fn pod_storage(limit: &str) -> String {
    format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. ")
}

#[cfg(test)]
mod tests {
    use super::super::usage::ContainerUsage;
    use super::*;

    #[test]
    fn the_message_says_what_was_short_and_who_used_more_than_it_asked_for() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": {"containers": [
            {"name": "greedy", "resources": {"requests": {"memory": "64Mi"}}},
            {"name": "modest", "resources": {"requests": {"memory": "64Mi"}}}, {"name": "open"}]}}))
        .expect("a pod");
        let mut usage = PodUsage::default();
        for (name, bytes) in [("greedy", 200 << 20), ("modest", 32 << 20), ("open", 1024)] {
            let used = ContainerUsage { memory_bytes: Some(bytes), ..Default::default() };
            usage.containers.insert(name.to_owned(), used);
        }
        let threshold = Threshold {
            signal: Signal::MemoryAvailable,
            below: Amount::Absolute(100 << 20),
            grace: None,
            min_reclaim: None,
        };
        let reading = Reading { available: 5 << 20, capacity: 1 << 30 };
        assert_eq!(
            shortage(&pod, Some(&usage), &threshold, Some(reading)),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 5Mi. \
             Container greedy was using 200Mi, request is 64Mi, has larger consumption of memory. \
             Container open was using 1Ki, request is 0, has larger consumption of memory. "
        );
    }
}
