//! What is asked of systemd and login1, against fakes of both.

use std::time::Duration;

use crate::fake::Fake;
use crate::{Error, Login, Scope, Systemd, Value};

fn scope(pids: &[u32]) -> Scope<'static> {
    Scope {
        name: "cri-oarlock-1.scope",
        slice: "kubepods.slice",
        description: "a container",
        pids: pids.to_vec(),
        properties: vec![("TasksMax", Value::U64(9))],
    }
}

#[test]
fn a_scope_is_started_with_its_processes_and_all_that_keeps_its_group_ours() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path());
    let mut systemd = Systemd::at(&fake.socket).unwrap();
    assert_eq!(systemd.version().unwrap(), "257");
    systemd.start_scope(&scope(&[7, 8])).unwrap();
    let unit = fake.world().units["cri-oarlock-1.scope"].clone();
    for (name, value) in [
        ("PIDs", Value::Numbers(vec![7, 8])),
        ("Slice", Value::Text("kubepods.slice".into())),
        ("Delegate", Value::Bool(true)),
        ("DefaultDependencies", Value::Bool(false)),
        ("CollectMode", Value::Text("inactive-or-failed".into())),
        ("MemoryAccounting", Value::Bool(true)),
        ("TasksMax", Value::U64(9)),
    ] {
        assert_eq!(unit.get(name), Some(&value), "{name}");
    }
    systemd.set_properties("cri-oarlock-1.scope", &[("TasksMax", Value::U64(5))]).unwrap();
    assert_eq!(fake.world().units["cri-oarlock-1.scope"]["TasksMax"], Value::U64(5));
}

#[test]
fn a_scope_that_a_crash_left_is_ended_before_its_successor_starts() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path());
    Systemd::at(&fake.socket).unwrap().start_scope(&scope(&[7])).unwrap();
    fake.world().calls.clear();
    Systemd::at(&fake.socket).unwrap().start_scope(&scope(&[9])).unwrap();
    let name = "cri-oarlock-1.scope";
    let expected = ["StartTransientUnit", "StopUnit", "ResetFailedUnit", "StartTransientUnit"];
    assert_eq!(fake.world().calls, expected.map(|method| format!("{method} {name}")));
    assert_eq!(fake.world().units[name]["PIDs"], Value::Numbers(vec![9]));
}

#[test]
fn a_slice_that_is_there_gets_the_limits_anew() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path());
    let mut systemd = Systemd::at(&fake.socket).unwrap();
    for weight in [5, 6] {
        systemd.start_slice("kubepods.slice", "pods", &[("CPUWeight", Value::U64(weight))]).unwrap();
        assert_eq!(fake.world().units["kubepods.slice"]["CPUWeight"], Value::U64(weight));
    }
    assert_eq!(fake.world().units["kubepods.slice"].get("Delegate"), None, "slices cannot be delegated");
}

#[test]
fn a_shared_scope_is_joined_or_else_started() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path());
    let mut systemd = Systemd::at(&fake.socket).unwrap();
    systemd.join_scope(&scope(&[7])).unwrap();
    systemd.join_scope(&scope(&[8])).unwrap();
    let name = "cri-oarlock-1.scope";
    let expected = ["AttachProcessesToUnit", "StartTransientUnit", "AttachProcessesToUnit"];
    assert_eq!(fake.world().calls, expected.map(|method| format!("{method} {name}")));
}

#[test]
fn what_is_gone_is_stopped_and_a_job_that_fails_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path());
    let mut systemd = Systemd::at(&fake.socket).unwrap();
    systemd.stop("cri-oarlock-1.scope").unwrap();
    fake.world().results.push("failed");
    let failed = systemd.start_scope(&scope(&[7])).unwrap_err();
    assert!(matches!(&failed, Error::Job { result, .. } if result == "failed"), "{failed}");
    let refused = systemd.set_properties("x.slice", &[("CPUWeight", Value::U64(1))]).unwrap_err();
    assert!(refused.is_no_such_unit());
    assert_eq!(refused.to_string(), "SetUnitProperties: Refused. (org.freedesktop.systemd1.NoSuchUnit)");
}

#[test]
fn nobody_there_is_an_error_that_names_the_socket() {
    let error = Systemd::at("/nonexistent/socket".as_ref()).unwrap_err();
    assert_eq!(error.to_string(), "cannot connect to /nonexistent/socket");
}

#[test]
fn a_lock_holds_the_machine_up_until_it_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path());
    fake.world().inhibit_delay_usec = 5_000_000;
    let mut login = Login::at(&fake.socket).unwrap();
    assert_eq!(login.longest_delay().unwrap(), Duration::from_secs(5));
    let lock = login.delay_shutdown("kubelet", "pods end first").unwrap();
    assert_eq!(fake.locks_held(), 1);
    // Words that login1 does not confirm, in either direction, are nobody's.
    fake.say_shutdown(true);
    fake.say_shutdown(false);
    fake.prepare_for_shutdown(true);
    assert!(login.next_shutdown().unwrap(), "it begins");
    fake.say_shutdown(false);
    fake.prepare_for_shutdown(false);
    assert!(!login.next_shutdown().unwrap(), "it is called off");
    drop(lock);
    assert_eq!(fake.locks_held(), 0);
    drop(login.hang_up().unwrap());
    assert!(login.next_shutdown().is_err());
    let asked = fake.world().calls.clone();
    assert_eq!(asked[0], "Hello");
    assert!(asked[1].contains("sender='org.freedesktop.login1'") && asked[1].contains("PrepareForShutdown"));
}
