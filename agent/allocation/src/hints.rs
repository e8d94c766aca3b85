//! Agreement on NUMA nodes: every kind of resource says where it could come from, and a policy picks a place for all.

use std::collections::{BTreeMap, BTreeSet};

/// A set of NUMA nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nodes(u64);

impl Nodes {
    pub fn of(nodes: impl IntoIterator<Item = u32>) -> Self {
        Self(nodes.into_iter().filter(|node| *node < 64).fold(0, |mask, node| mask | 1 << node))
    }

    pub fn contains(self, node: u32) -> bool {
        node < 64 && self.0 & (1 << node) != 0
    }

    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..64).filter(move |node| self.contains(*node))
    }

    #[must_use]
    pub fn both(self, other: Nodes) -> Nodes {
        Nodes(self.0 & other.0)
    }

    /// Fewer nodes, or as many of lower numbers.
    fn narrower_than(self, other: Nodes) -> bool {
        (self.count(), self.0) < (other.count(), other.0)
    }

    /// Every set of some of these nodes, few before many.
    pub fn subsets(self) -> Vec<Nodes> {
        let nodes: Vec<u32> = self.iter().collect();
        let mut subsets: Vec<Nodes> = (1u64..1 << nodes.len().min(16))
            .map(|choice| Nodes::of(nodes.iter().enumerate().filter(|(i, _)| choice & (1 << i) != 0).map(|(_, n)| *n)))
            .collect();
        subsets.sort_by_key(|nodes| (nodes.count(), nodes.0));
        subsets
    }
}

/// A place that a resource could come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    /// None is anywhere.
    pub nodes: Option<Nodes>,
    pub preferred: bool,
}

/// What one kind of resource says: None where it does not care, an empty list where it cannot be had.
pub type Wishes = Option<Vec<Hint>>;

/// How much the policy insists.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    #[default]
    None,
    BestEffort,
    Restricted,
    SingleNumaNode,
}

impl Policy {
    /// By upstream's name.
    pub fn named(name: &str) -> Option<Policy> {
        match name {
            "" | "none" => Some(Policy::None),
            "best-effort" => Some(Policy::BestEffort),
            "restricted" => Some(Policy::Restricted),
            "single-numa-node" => Some(Policy::SingleNumaNode),
            _ => None,
        }
    }
}

/// What every merge needs to know.
#[derive(Debug, Clone, Default)]
pub struct Arbiter {
    pub policy: Policy,
    pub nodes: BTreeSet<u32>,
    /// Of two sets of as many nodes, the one whose nodes are closer to each other.
    pub prefer_closest: bool,
    pub distances: BTreeMap<(u32, u32), u32>,
}

impl Arbiter {
    /// The best place for all, and whether the policy accepts it.
    pub fn merge(&self, wishes: &[Wishes]) -> (Hint, bool) {
        let anywhere = Hint { nodes: None, preferred: true };
        if self.policy == Policy::None {
            return (anywhere, true);
        }
        let lists: Vec<Vec<Hint>> = wishes.iter().map(|wish| self.considered(wish)).collect();
        let all = Nodes::of(self.nodes.iter().copied());
        let widest = least_width(&lists);
        let mut best: Option<(Nodes, bool)> = None;
        permute(&lists, &mut |hints| {
            let candidate = merged(all, hints);
            if candidate.0.count() > 0 {
                best = Some(best.map_or(candidate, |best| self.better(best, candidate, widest)));
            }
        });
        let (nodes, preferred) = best.unwrap_or((all, false));
        let nowhere_special = self.policy == Policy::SingleNumaNode && nodes == all;
        let hint = Hint { nodes: Some(nodes).filter(|_| !nowhere_special), preferred };
        (hint, self.policy == Policy::BestEffort || preferred)
    }

    /// The hints of one resource that the policy looks at.
    fn considered(&self, wish: &Wishes) -> Vec<Hint> {
        let hints = match wish {
            None => vec![Hint { nodes: None, preferred: true }],
            Some(hints) if hints.is_empty() => vec![Hint { nodes: None, preferred: false }],
            Some(hints) => hints.clone(),
        };
        if self.policy != Policy::SingleNumaNode {
            return hints;
        }
        hints.into_iter().filter(|h| h.preferred && h.nodes.is_none_or(|nodes| nodes.count() == 1)).collect()
    }

    /// The better of two. Among places that nobody prefers, one as wide as the widest narrowest wish is best.
    fn better(&self, current: (Nodes, bool), candidate: (Nodes, bool), widest: u32) -> (Nodes, bool) {
        match (current.1, candidate.1) {
            (false, true) => return candidate,
            (true, false) => return current,
            (true, true) => return self.closer(current, candidate),
            (false, false) => {}
        }
        let (now, then) = (current.0.count(), candidate.0.count());
        match now.cmp(&widest) {
            std::cmp::Ordering::Greater => self.closer(current, candidate),
            std::cmp::Ordering::Equal if then == widest => self.closer(current, candidate),
            std::cmp::Ordering::Equal => current,
            std::cmp::Ordering::Less if then > widest || then < now => current,
            std::cmp::Ordering::Less if then > now => candidate,
            std::cmp::Ordering::Less => self.closer(current, candidate),
        }
    }

    fn closer(&self, current: (Nodes, bool), candidate: (Nodes, bool)) -> (Nodes, bool) {
        if self.prefer_closest && current.0.count() == candidate.0.count() {
            let (near, far) = (self.spread(candidate.0), self.spread(current.0));
            if near != far {
                return if near < far { candidate } else { current };
            }
        }
        if candidate.0.narrower_than(current.0) { candidate } else { current }
    }

    fn spread(&self, nodes: Nodes) -> u32 {
        let pairs = nodes.iter().flat_map(|a| nodes.iter().map(move |b| (a, b)));
        pairs.map(|pair| self.distances.get(&pair).copied().unwrap_or(10)).sum()
    }
}

fn merged(all: Nodes, hints: &[Hint]) -> (Nodes, bool) {
    let mut named = hints.iter().filter_map(|hint| hint.nodes);
    let first = named.next();
    let agree = named.all(|nodes| Some(nodes) == first);
    let nodes = hints.iter().filter_map(|hint| hint.nodes).fold(all, Nodes::both);
    (nodes, agree && hints.iter().all(|hint| hint.preferred))
}

/// The most nodes that some resource needs at least.
fn least_width(lists: &[Vec<Hint>]) -> u32 {
    let narrowest = |list: &Vec<Hint>| list.iter().filter_map(|hint| hint.nodes).map(Nodes::count).min();
    lists.iter().filter_map(narrowest).max().unwrap_or(0)
}

/// Calls `look` with one hint of each list, for every choice; not at all when some list is empty.
fn permute(lists: &[Vec<Hint>], look: &mut impl FnMut(&[Hint])) {
    fn deeper(lists: &[Vec<Hint>], chosen: &mut Vec<Hint>, look: &mut impl FnMut(&[Hint])) {
        let Some((first, rest)) = lists.split_first() else { return look(chosen) };
        for hint in first {
            chosen.push(*hint);
            deeper(rest, chosen, look);
            chosen.pop();
        }
    }
    deeper(lists, &mut Vec::new(), look);
}

/// The places from which `wanted` could come, those of as few nodes as the whole machine would allow preferred. `in_all` counts
/// what there is on some nodes, `free` what is free there; None where the nodes are out of question.
pub fn places(
    nodes: &BTreeSet<u32>,
    wanted: u64,
    in_all: impl Fn(Nodes) -> u64,
    free: impl Fn(Nodes) -> Option<u64>,
) -> Vec<Hint> {
    let mut least = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
    let mut found = Vec::new();
    for subset in Nodes::of(nodes.iter().copied()).subsets() {
        if in_all(subset) >= wanted {
            least = least.min(subset.count());
        }
        if free(subset).is_some_and(|free| free >= wanted) {
            found.push(subset);
        }
    }
    let hint = |nodes: Nodes| Hint { nodes: Some(nodes), preferred: nodes.count() == least };
    found.into_iter().map(hint).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arbiter(policy: Policy) -> Arbiter {
        Arbiter { policy, nodes: BTreeSet::from([0, 1]), ..Default::default() }
    }

    fn hint(nodes: &[u32], preferred: bool) -> Hint {
        Hint { nodes: Some(Nodes::of(nodes.iter().copied())), preferred }
    }

    #[test]
    fn resources_that_can_meet_on_one_node_do() {
        let cpus = Some(vec![hint(&[0], true), hint(&[1], true), hint(&[0, 1], false)]);
        let card = Some(vec![hint(&[1], true), hint(&[0, 1], false)]);
        for policy in [Policy::BestEffort, Policy::Restricted, Policy::SingleNumaNode] {
            assert_eq!(arbiter(policy).merge(&[cpus.clone(), card.clone(), None]), (hint(&[1], true), true));
        }
    }

    #[test]
    fn what_cannot_meet_is_refused_where_the_policy_insists() {
        let here = Some(vec![hint(&[0], true)]);
        let there = Some(vec![hint(&[1], true), hint(&[0, 1], false)]);
        let (best, accepted) = arbiter(Policy::BestEffort).merge(&[here.clone(), there.clone()]);
        assert_eq!((best, accepted), (hint(&[0], false), true));
        assert!(!arbiter(Policy::Restricted).merge(&[here.clone(), there.clone()]).1);
        assert!(!arbiter(Policy::SingleNumaNode).merge(&[here, there]).1);
    }

    #[test]
    fn a_need_for_two_nodes_is_met_by_restricted_and_not_by_single_node() {
        let wide = Some(vec![hint(&[0, 1], true)]);
        assert_eq!(arbiter(Policy::Restricted).merge(std::slice::from_ref(&wide)), (hint(&[0, 1], true), true));
        assert!(!arbiter(Policy::SingleNumaNode).merge(&[wide]).1);
    }

    #[test]
    fn nobody_who_cares_means_anywhere() {
        assert_eq!(arbiter(Policy::SingleNumaNode).merge(&[None, None]), (Hint { nodes: None, preferred: true }, true));
        assert!(!arbiter(Policy::Restricted).merge(&[Some(Vec::new())]).1, "what cannot be had is not accepted");
    }

    #[test]
    fn of_two_pairs_the_closer_one_is_taken_when_asked_for() {
        let nodes = BTreeSet::from([0, 1, 2]);
        let distances = BTreeMap::from([((0, 1), 40), ((1, 0), 40), ((1, 2), 11), ((2, 1), 11)]);
        let wish = Some(vec![hint(&[0, 1], true), hint(&[1, 2], true)]);
        let arbiter = |prefer_closest| Arbiter {
            policy: Policy::BestEffort,
            nodes: nodes.clone(),
            prefer_closest,
            distances: distances.clone(),
        };
        assert_eq!(arbiter(false).merge(std::slice::from_ref(&wish)).0, hint(&[0, 1], true));
        assert_eq!(arbiter(true).merge(&[wish]).0, hint(&[1, 2], true));
    }

    fn wishes() -> impl Strategy<Value = Vec<Wishes>> {
        let hint = (1u64..8, any::<bool>()).prop_map(|(mask, preferred)| Hint { nodes: Some(Nodes(mask)), preferred });
        let list = proptest::option::of(proptest::collection::vec(hint, 0..5));
        proptest::collection::vec(list, 0..4)
    }

    proptest! {
        #[test]
        fn an_accepted_place_suits_everyone_who_insists(wishes in wishes()) {
            let nodes = BTreeSet::from([0, 1, 2]);
            for policy in [Policy::Restricted, Policy::SingleNumaNode] {
                let arbiter = Arbiter { policy, nodes: nodes.clone(), ..Default::default() };
                let (best, accepted) = arbiter.merge(&wishes);
                if !accepted {
                    continue;
                }
                for wish in wishes.iter().flatten() {
                    let suits = |h: &Hint| h.preferred && (h.nodes == best.nodes || best.nodes.is_none());
                    prop_assert!(wish.iter().any(suits), "{wish:?} {best:?}");
                }
                if policy == Policy::SingleNumaNode {
                    prop_assert!(best.nodes.is_none_or(|nodes| nodes.count() == 1));
                }
            }
        }

        #[test]
        fn the_order_of_resources_makes_no_difference(wishes in wishes()) {
            let nodes = BTreeSet::from([0, 1, 2]);
            let arbiter = Arbiter { policy: Policy::Restricted, nodes, ..Default::default() };
            let mut turned = wishes.clone();
            turned.reverse();
            prop_assert_eq!(arbiter.merge(&wishes), arbiter.merge(&turned));
        }
    }
}
