//! What plugins' adjustments do to a specification. Pure: references to devices are resolved and mounts looked at by whoever
//! may look. What this runtime cannot do is refused, never dropped.

mod linux;
mod mounts;
mod process;
mod resources;

use oarlock_nri::api::ContainerAdjustment;
use oci_spec::runtime::Spec;
use serde::de::DeserializeOwned;

pub(crate) use linux::cgroup;
pub(crate) use mounts::{Propagation, propagation};

use super::cdi::Edits;
use super::device::HostDevice;
use super::{HostFacts, SpecError};

/// What the Container Device Interface says about the devices that plugins add.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    pub edits: Edits,
    pub nodes: Vec<HostDevice>,
}

/// Carries adjustments out.
pub(crate) fn apply(
    spec: &mut Spec,
    wanted: &ContainerAdjustment,
    devices: &Devices,
    host: &HostFacts,
) -> Result<(), SpecError> {
    process::annotations(spec, &wanted.annotations);
    process::adjust(spec, wanted, host)?;
    process::hooks(spec, wanted.hooks.as_ref())?;
    devices.edits.apply(spec)?;
    linux::host_devices(spec, &devices.nodes)?;
    if let Some(linux) = &wanted.linux {
        linux::adjust(spec, linux, host)?;
    }
    mounts::adjust(spec, &wanted.mounts)
}

/// The value of an enumeration that has this word in specifications.
fn parse<T: DeserializeOwned>(field: &str, word: &str) -> Result<T, SpecError> {
    serde_json::from_value(serde_json::Value::String(word.to_owned()))
        .map_err(|_| SpecError::invalid(named(field), format!("{word:?} is not known")))
}

/// Fields of adjustments in messages.
fn named(field: &str) -> String {
    format!("adjustment.{field}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use oarlock_nri::api::{
        CdiDevice, Hook, Hooks, KeyValue, LinuxContainerAdjustment, LinuxCpu, LinuxDevice, LinuxIoPriority,
        LinuxMemory, LinuxMemoryPolicy, LinuxNamespace, LinuxPids, LinuxRdt, LinuxResources, LinuxScheduler,
        LinuxSeccomp, LinuxSyscall, Mount, OptionalInt, OptionalInt64, OptionalString, OptionalUInt64, PosixRlimit,
    };
    use serde_json::{Value, json};

    use super::*;

    fn spec() -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "annotations": {"keep": "1", "drop": "2"},
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["own"], "env": ["A=1", "B=2"],
                        "oomScoreAdj": 10},
            "mounts": [{"destination": "/proc", "type": "proc"}, {"destination": "/data", "source": "/old"}],
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "network", "path": "/old"}],
                "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}], "cpu": {"shares": 2}, "memory": {}}
            }
        }))
        .unwrap()
    }

    fn adjusted(wanted: ContainerAdjustment) -> Result<Value, SpecError> {
        let mut spec = spec();
        let host = HostFacts { cgroup_v2: true, swap_accounting: true, hugetlb: true, ..HostFacts::default() };
        apply(&mut spec, &wanted, &Devices::default(), &host)?;
        Ok(serde_json::to_value(&spec).unwrap())
    }

    fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
        ContainerAdjustment { linux: Some(linux), ..ContainerAdjustment::default() }
    }

    fn marked(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_process_gets_its_arguments_variables_limits_and_annotations() {
        let variable = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
        let spec = adjusted(ContainerAdjustment {
            annotations: marked(&[("-drop", ""), ("new", "3")]),
            args: vec!["other".into(), "words".into()],
            env: vec![variable("A", "9"), variable("-B", ""), variable("C", "4")],
            rlimits: vec![PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 20, soft: 10 }],
            ..ContainerAdjustment::default()
        })
        .unwrap();
        assert_eq!(spec["annotations"], json!({"keep": "1", "new": "3"}));
        assert_eq!(spec["process"]["args"], json!(["other", "words"]));
        assert_eq!(spec["process"]["env"], json!(["A=9", "C=4"]));
        assert_eq!(spec["process"]["rlimits"], json!([{"type": "RLIMIT_NOFILE", "hard": 20, "soft": 10}]));
    }

    #[test]
    fn hooks_mounts_and_devices_are_added_replaced_and_removed() {
        let hook = Hook { path: "/bin/hook".into(), args: vec!["hook".into()], ..Hook::default() };
        let mount = |destination: &str, options: &[&str]| Mount {
            destination: destination.into(),
            source: "/new".into(),
            r#type: "bind".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        };
        let mut wanted = linux(LinuxContainerAdjustment {
            devices: vec![
                LinuxDevice { path: "-/dev/x".into(), ..LinuxDevice::default() },
                LinuxDevice { path: "/dev/y".into(), r#type: "b".into(), major: 8, minor: 1, ..LinuxDevice::default() },
            ],
            ..LinuxContainerAdjustment::default()
        });
        wanted.hooks = Some(Hooks { create_runtime: vec![hook], ..Hooks::default() });
        wanted.mounts = vec![mount("/data", &["rbind", "rslave", "ro"]), mount("-/proc", &[])];
        let spec = adjusted(wanted).unwrap();
        assert_eq!(spec["hooks"]["createRuntime"][0]["path"], "/bin/hook");
        let mounts = spec["mounts"].as_array().unwrap();
        assert_eq!((mounts.len(), &mounts[0]["source"]), (1, &json!("/new")));
        assert_eq!(spec["linux"]["rootfsPropagation"], "slave");
        let devices = spec["linux"]["devices"].as_array().unwrap();
        assert_eq!((devices.len(), &devices[0]["path"], &devices[0]["type"]), (1, &json!("/dev/y"), &json!("b")));
        let rules = spec["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules[1], json!({"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rwm"}));
    }

    #[test]
    fn limits_are_laid_over_those_there_are_and_memory_takes_swap_along() {
        let signed = |value| Some(OptionalInt64 { value });
        let spec = adjusted(linux(LinuxContainerAdjustment {
            resources: Some(LinuxResources {
                memory: Some(LinuxMemory { limit: signed(1 << 20), reservation: signed(4), ..LinuxMemory::default() }),
                cpu: Some(LinuxCpu { quota: signed(5000), cpus: "0".into(), ..LinuxCpu::default() }),
                pids: Some(LinuxPids { limit: 7 }),
                unified: marked(&[("memory.high", "9")]),
                ..LinuxResources::default()
            }),
            oom_score_adj: Some(OptionalInt { value: 500 }),
            ..LinuxContainerAdjustment::default()
        }))
        .unwrap();
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["memory"], json!({"limit": 1 << 20, "swap": 1 << 20, "reservation": 4}));
        assert_eq!(resources["cpu"], json!({"shares": 2, "quota": 5000, "cpus": "0"}));
        assert_eq!((&resources["pids"]["limit"], &resources["unified"]["memory.high"]), (&json!(7), &json!("9")));
        assert_eq!(spec["process"]["oomScoreAdj"], 500);
    }

    #[test]
    fn the_rest_of_the_interface_reaches_the_specification() {
        let call =
            LinuxSyscall { names: vec!["mkdir".into()], action: "SCMP_ACT_ERRNO".into(), ..LinuxSyscall::default() };
        let namespace = |kind: &str, path: &str| LinuxNamespace { r#type: kind.into(), path: path.into() };
        let spec = adjusted(linux(LinuxContainerAdjustment {
            seccomp_policy: Some(LinuxSeccomp {
                default_action: "SCMP_ACT_ALLOW".into(),
                architectures: vec!["SCMP_ARCH_X86_64".into()],
                syscalls: vec![call],
                ..LinuxSeccomp::default()
            }),
            namespaces: vec![namespace("network", "/new"), namespace("cgroup", "")],
            sysctl: marked(&[("net.core.somaxconn", "512")]),
            io_priority: Some(LinuxIoPriority { class: 2, priority: 3 }),
            scheduler: Some(LinuxScheduler { policy: 4, nice: 5, ..LinuxScheduler::default() }),
            memory_policy: Some(LinuxMemoryPolicy { mode: 2, nodes: "0".into(), flags: vec![0] }),
            rdt: Some(LinuxRdt { clos_id: Some(OptionalString { value: "gold".into() }), ..LinuxRdt::default() }),
            ..LinuxContainerAdjustment::default()
        }))
        .unwrap();
        assert_eq!(spec["linux"]["seccomp"]["syscalls"][0]["action"], "SCMP_ACT_ERRNO");
        let namespaces = json!([{"type": "mount"}, {"type": "network", "path": "/new"}, {"type": "cgroup"}]);
        assert_eq!(spec["linux"]["namespaces"], namespaces);
        assert_eq!(spec["linux"]["sysctl"], json!({"net.core.somaxconn": "512"}));
        assert_eq!(spec["process"]["ioPriority"], json!({"class": "IOPRIO_CLASS_BE", "priority": 3}));
        assert_eq!(spec["process"]["scheduler"]["policy"], "SCHED_BATCH");
        assert_eq!(spec["linux"]["memoryPolicy"]["mode"], "MPOL_BIND");
        assert_eq!(spec["linux"]["intelRdt"]["closID"], "gold");
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let class = |value: &str| {
            linux(LinuxContainerAdjustment {
                resources: Some(LinuxResources {
                    blockio_class: Some(OptionalString { value: value.into() }),
                    ..LinuxResources::default()
                }),
                ..LinuxContainerAdjustment::default()
            })
        };
        assert!(adjusted(class("slow")).unwrap_err().to_string().contains("blockio_class"));
        adjusted(class("")).unwrap();
        let gone = LinuxNamespace { r#type: "-mount".into(), ..LinuxNamespace::default() };
        let without = linux(LinuxContainerAdjustment { namespaces: vec![gone], ..LinuxContainerAdjustment::default() });
        assert!(adjusted(without).unwrap_err().to_string().contains("mount"));
        let limit = PosixRlimit { r#type: "RLIMIT_LUCK".into(), ..PosixRlimit::default() };
        let lucky = ContainerAdjustment { rlimits: vec![limit], ..ContainerAdjustment::default() };
        assert!(adjusted(lucky).unwrap_err().to_string().contains("RLIMIT_LUCK"));
        let shares = LinuxCpu { shares: Some(OptionalUInt64 { value: 4 }), cpus: "9-1".into(), ..LinuxCpu::default() };
        let resources = LinuxResources { cpu: Some(shares), ..LinuxResources::default() };
        let wrong =
            linux(LinuxContainerAdjustment { resources: Some(resources), ..LinuxContainerAdjustment::default() });
        assert!(adjusted(wrong).unwrap_err().to_string().contains("9-1"));
        // A reference that nobody resolved changes nothing here.
        let device = CdiDevice { name: "v/c=d".into() };
        adjusted(ContainerAdjustment { cdi_devices: vec![device], ..ContainerAdjustment::default() }).unwrap();
    }
}
