//! Tests of the pool on machines given as data, and its properties over many machines and orders of events.

use proptest::prelude::*;

use super::*;
use crate::topology::synthetic::{Shape, dual, machine};

fn cpus(text: &str) -> CpuSet {
    text.parse().unwrap()
}

fn pool(options: CpuOptions) -> CpuPool {
    CpuPool::new(dual(), options, &Reserved::Milli(1500), None).unwrap()
}

#[test]
fn whole_cores_and_nodes_are_taken_before_single_threads() {
    let mut pool = pool(CpuOptions::default());
    // Threads of core n are n and n+8; cores 0 to 3 are on node 0.
    assert_eq!(pool.reserved(), &cpus("0,8"), "the reserved ones are one core");
    let none = CpuSet::default();
    assert_eq!(pool.allocate("a", "c", 2, None, &none).unwrap(), cpus("1,9"));
    assert_eq!(pool.allocate("b", "c", 8, None, &none).unwrap(), cpus("4-7,12-15"), "a whole socket");
    assert_eq!(pool.allocate("c", "c", 1, None, &none).unwrap(), cpus("2"));
    assert_eq!(pool.allocate("d", "c", 1, None, &none).unwrap(), cpus("10"), "the other half of a broken core");
    assert_eq!(pool.shared(), &cpus("0,3,8,11"));
    let short = pool.allocate("e", "c", 3, None, &none).unwrap_err();
    assert_eq!(short.to_string(), "not enough cpus available to satisfy request: requested=3, available=2");
    pool.release("b");
    assert_eq!(pool.shared(), &cpus("0,3-8,11-15"));
}

#[test]
fn nothing_reserved_is_refused_and_named_processors_are_kept() {
    assert_eq!(
        CpuPool::new(dual(), CpuOptions::default(), &Reserved::Milli(0), None).unwrap_err(),
        CpuError::NothingReserved
    );
    let named = CpuPool::new(dual(), CpuOptions::default(), &Reserved::These(cpus("3")), None).unwrap();
    assert_eq!((named.allocatable(), named.shared()), (cpus("0-2,4-15"), &cpus("0-15")));
    let strict = CpuOptions { strict_reservation: true, ..Default::default() };
    let strict = CpuPool::new(dual(), strict, &Reserved::These(cpus("3")), None).unwrap();
    assert_eq!(strict.shared(), &cpus("0-2,4-15"));
}

#[test]
fn full_physical_processors_are_never_split() {
    let mut pool = pool(CpuOptions { full_physical: true, ..Default::default() });
    let none = CpuSet::default();
    let odd = pool.allocate("a", "c", 3, None, &none).unwrap_err();
    assert!(odd.is_alignment());
    assert_eq!(odd.to_string(), "SMT Alignment Error: requested 3 cpus not multiple cpus per core = 2");
    let many = pool.allocate("a", "c", 16, None, &none).unwrap_err();
    assert_eq!(
        many.to_string(),
        "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = 14, requested CPUs = 16, CPUs per core = 2"
    );
    assert_eq!(pool.allocate("a", "c", 2, None, &none).unwrap(), cpus("1,9"));
}

#[test]
fn processors_are_spread_over_nodes_or_cores_when_asked_for() {
    let none = CpuSet::default();
    let mut numa = pool(CpuOptions { distribute_across_numa: true, ..Default::default() });
    assert_eq!(numa.allocate("a", "c", 4, None, &none).unwrap().len(), 4);
    let wide = numa.allocate("b", "c", 8, None, &none).unwrap();
    let (first, second) =
        (wide.iter().filter(|cpu| cpu % 8 < 4).count(), wide.iter().filter(|cpu| cpu % 8 >= 4).count());
    assert!(first == second, "{wide}");
    let mut cores = pool(CpuOptions { distribute_across_cores: true, ..Default::default() });
    assert_eq!(cores.allocate("a", "c", 3, None, &none).unwrap(), cpus("1-3"));
}

#[test]
fn a_cache_is_kept_together_when_preferred() {
    let none = CpuSet::default();
    let mut pool = pool(CpuOptions { prefer_cache: true, ..Default::default() });
    // Cores 0 and 1 share one cache, 2 and 3 the next.
    assert_eq!(pool.allocate("a", "c", 4, None, &none).unwrap(), cpus("2-3,10-11"));
}

#[test]
fn an_init_containers_processors_go_to_the_next_one() {
    let mut pool = pool(CpuOptions::default());
    let first = pool.allocate("a", "init", 2, None, &CpuSet::default()).unwrap();
    let second = pool.allocate("a", "app", 4, None, &first).unwrap();
    assert!(first.is_subset(&second), "{first} {second}");
    pool.release("a");
    assert_eq!(pool.shared(), &cpus("0-15"));
}

#[test]
fn hints_prefer_one_node_and_a_choice_follows_them() {
    let mut pool = pool(CpuOptions::default());
    let hints = pool.hints("a", "c", 8, &CpuSet::default());
    // Node 0 has six left beside the reserved core.
    let best: Vec<_> = hints.iter().filter(|hint| hint.preferred).map(|hint| hint.nodes.unwrap()).collect();
    assert_eq!(best, [Nodes::of([1])]);
    let on_first = pool.allocate("a", "c", 2, Some(Nodes::of([1])), &CpuSet::default()).unwrap();
    assert!(on_first.iter().all(|cpu| cpu % 8 >= 4), "{on_first}");
    let kept = pool.hints("a", "c", 2, &CpuSet::default());
    assert!(kept.iter().all(|hint| hint.nodes.unwrap().contains(1)), "what it has is where it stays");
}

#[test]
fn a_state_of_another_machine_is_refused() {
    let mut before = pool(CpuOptions::default());
    before.allocate("a", "c", 2, None, &CpuSet::default()).unwrap();
    let again = CpuPool::new(dual(), CpuOptions::default(), &Reserved::Milli(1500), Some(before.state())).unwrap();
    assert_eq!(again.of("a", "c"), before.of("a", "c"));
    let small = machine(Shape { sockets: 1, nodes_per_socket: 1, cores_per_node: 4, threads_per_core: 1 });
    let refused = CpuPool::new(small, CpuOptions::default(), &Reserved::Milli(1500), Some(before.state())).unwrap_err();
    assert!(matches!(refused, CpuError::OtherMachine { .. }));
}

#[test]
fn options_have_upstreams_names_and_clash_where_they_must() {
    let named = |pairs: &[(&str, &str)]| {
        CpuOptions::named(&pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect())
    };
    assert!(named(&[("full-pcpus-only", "true")]).unwrap().full_physical);
    assert_eq!(named(&[("full-pcpus", "true")]).unwrap_err().0, "full-pcpus");
    assert_eq!(named(&[("full-pcpus-only", "yes")]).unwrap_err().0, "full-pcpus-only");
    assert!(named(&[("full-pcpus-only", "true"), ("distribute-cpus-across-cores", "true")]).is_err());
}

fn shapes() -> impl Strategy<Value = Shape> {
    (1u32..3, 1u32..3, 1u32..5, 1u32..3).prop_map(|(sockets, nodes_per_socket, cores_per_node, threads_per_core)| {
        Shape { sockets, nodes_per_socket, cores_per_node, threads_per_core }
    })
}

fn options() -> impl Strategy<Value = CpuOptions> {
    (any::<bool>(), 0u8..4, any::<bool>(), any::<bool>()).prop_map(|(full, spread, socket, strict)| CpuOptions {
        full_physical: full && spread != 2,
        distribute_across_numa: spread == 1,
        distribute_across_cores: spread == 2,
        prefer_cache: spread == 3,
        align_by_socket: socket,
        strict_reservation: strict,
    })
}

proptest! {
    /// Whatever comes and goes: no processor has two owners, none is lost, none that is reserved is given away, and a request
    /// that was granted got as many as it asked for.
    #[test]
    fn every_processor_is_in_one_place(
        shape in shapes(),
        options in options(),
        events in proptest::collection::vec((0u32..6, 1usize..9, 0u32..5), 1..30),
    ) {
        let topology = machine(shape);
        let all = topology.all();
        let mut pool = CpuPool::new(topology.clone(), options, &Reserved::Milli(1000), None).unwrap();
        let start = pool.shared().clone();
        for (pod, wanted, node) in events {
            let name = format!("pod-{pod}");
            if wanted == 8 || pool.of(&name, "c").is_some() {
                pool.release(&name);
                continue;
            }
            let available = pool.available();
            let nodes = (node < 4).then(|| Nodes::of([node]));
            match pool.allocate(&name, "c", wanted, nodes, &CpuSet::default()) {
                Ok(taken) => {
                    prop_assert_eq!(taken.len(), wanted);
                    prop_assert!(taken.is_subset(&available));
                    prop_assert!(taken.both(pool.reserved()).is_empty());
                    if options.full_physical {
                        for core in topology.by(&taken, |cpu| cpu.core).values() {
                            prop_assert_eq!(core.len(), topology.cpus_per_core());
                        }
                    }
                }
                Err(error) => prop_assert!(error.is_alignment() || wanted > available.len()),
            }
            let mut seen = pool.shared().clone();
            for cpus in pool.state().assigned.values().flat_map(|containers| containers.values()) {
                prop_assert!(cpus.both(&seen).is_empty());
                seen = seen.union(cpus);
            }
            prop_assert_eq!(&seen, &start);
            prop_assert!(seen.is_subset(&all));
            let again = CpuPool::new(topology.clone(), options, &Reserved::Milli(1000), Some(pool.state()));
            prop_assert!(again.is_ok(), "its own state is taken again");
        }
    }

    /// A preferred place that is accepted is where the processors come from.
    #[test]
    fn a_hint_can_be_kept(shape in shapes(), wanted in 1usize..9) {
        let mut pool = CpuPool::new(machine(shape), CpuOptions::default(), &Reserved::Milli(1000), None).unwrap();
        for hint in pool.hints("p", "c", wanted, &CpuSet::default()) {
            let taken = pool.allocate("p", "c", wanted, hint.nodes, &CpuSet::default()).unwrap();
            let nodes = hint.nodes.unwrap();
            prop_assert!(taken.iter().all(|cpu| nodes.contains(pool.topology.node_of(cpu).unwrap())));
            pool.release("p");
        }
    }
}
