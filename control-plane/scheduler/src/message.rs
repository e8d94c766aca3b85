//! The sentences by which users learn why a pod waits. Pure.

use std::collections::BTreeMap;

/// Said of nodes where nothing that could be removed would help.
pub(crate) const PREEMPTION_USELESS: &str = "Preemption is not helpful for scheduling";
/// Said of nodes where too little could be removed.
pub(crate) const NO_VICTIMS: &str = "No preemption victims found for incoming pod";
/// Said while there is no node at all.
pub(crate) const NO_NODES: &str = "no nodes available to schedule pods";

/// "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable."
pub(crate) fn unavailable<'a>(nodes: usize, reasons: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in reasons {
        *counts.entry(reason).or_default() += 1;
    }
    let mut parts: Vec<String> = counts.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    match parts.is_empty() {
        true => format!("0/{nodes} nodes are available."),
        false => format!("0/{nodes} nodes are available: {}.", parts.join(", ")),
    }
}

/// The whole sentence, with what preemption had to say.
pub(crate) fn unschedulable(unavailable: &str, preemption: &str) -> String {
    if preemption.is_empty() { unavailable.to_owned() } else { format!("{unavailable} preemption: {preemption}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_and_sorted() {
        let reasons = ["node(s) were unschedulable", "Insufficient cpu", "node(s) were unschedulable"];
        let nodes = unavailable(3, reasons.into_iter());
        assert_eq!(nodes, "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.");
        let preemption = unavailable(3, [NO_VICTIMS, PREEMPTION_USELESS, PREEMPTION_USELESS].into_iter());
        assert_eq!(
            unschedulable(&nodes, &preemption),
            "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable. preemption: 0/3 nodes are \
             available: 1 No preemption victims found for incoming pod, 2 Preemption is not helpful for scheduling."
        );
    }
}
