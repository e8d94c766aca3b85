//! The shim with real containers: processes, logs, terminals, execs, limits, and what is left afterwards. Needs root.

mod shim_pod;

use std::fs;
use std::io::{Read, Write};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use oarlock_shim_api::{
    ContainerStatus, CreateRequest, ErrorKind, Event, ExecRequest, Shim, ShimError, SpawnOptions, read_exit_record,
};
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::json;
use shim_pod::{LIMIT, Pod, Wish, options, parse_log, process, process_json, read_all};

#[tokio::test]
async fn exit_codes_signals_and_log_lines_are_what_the_program_did() {
    let mut pod = Pod::start("exit").await;
    pod.run("code", &Wish::new(&["exit", "7"])).await;
    let record = pod.exited("code").await;
    assert_eq!((record.exit_code, record.signal, record.oom_killed), (7, None, false));

    pod.run("lines", &Wish::new(&["log", "20"])).await;
    assert_eq!(pod.exited("lines").await.exit_code, 0);
    let log = pod.log("lines");
    assert_eq!(log.iter().filter(|line| line.0 == "stdout" && line.1 == "F").count(), 18);
    assert_eq!(log.iter().filter(|line| line.0 == "stderr").count(), 2);

    pod.run("long", &Wish::new(&["log", "1", "40000"])).await;
    pod.exited("long").await;
    let tags: Vec<(String, usize)> = pod.log("long").into_iter().map(|(_, tag, text)| (tag, text.len())).collect();
    assert_eq!(tags, [("P".to_owned(), 16384), ("P".to_owned(), 16384), ("F".to_owned(), 40000 - 2 * 16384)]);

    pod.run("killed", &Wish::new(&["sleep"])).await;
    pod.shim.signal("killed", 9, false).await.unwrap();
    let record = pod.exited("killed").await;
    assert_eq!((record.exit_code, record.signal), (137, Some(9)));
    assert!(pod.shim.signal("killed", 15, false).await.unwrap_err().is_not_found());

    for id in ["code", "lines", "long", "killed"] {
        pod.shim.delete(id).await.unwrap();
        pod.shim.delete(id).await.unwrap();
        assert_eq!(read_exit_record(&pod.state_dir(), id).unwrap(), None);
    }
    assert!(pod.shim.state().await.unwrap().containers.is_empty());
    pod.finish().await;
}

#[tokio::test]
async fn a_created_container_waits_for_its_start_and_can_be_deleted_before() {
    let mut pod = Pod::start("created").await;
    let pid = pod.create("c", &Wish::new(&["echo", "started"])).await.unwrap();
    let state = pod.shim.state().await.unwrap().containers.remove(0);
    assert_eq!((state.status, state.pid, state.exit), (ContainerStatus::Created, pid, None));
    let again = pod.create("c", &Wish::new(&["true"])).await.unwrap_err();
    assert_eq!(again.kind(), Some(ErrorKind::AlreadyExists));
    assert!(pod.log("c").is_empty());
    pod.shim.start("c").await.unwrap();
    assert_eq!(pod.shim.start("c").await.unwrap_err().kind(), Some(ErrorKind::InvalidState));
    pod.exited("c").await;
    assert_eq!(pod.log("c"), [("stdout".into(), "F".into(), "started".into())]);

    pod.create("never", &Wish::new(&["true"])).await.unwrap();
    pod.shim.delete("never").await.unwrap();
    pod.finish().await;
}

#[test]
fn a_container_is_made_out_of_sight_of_other_pods_where_their_mounts_lie_below_one() {
    in_fresh_namespaces(|| {
        let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        threads.block_on(async {
            let dir = tempfile::Builder::new().prefix("oarlock-secluded-").tempdir().unwrap();
            let point = dir.path().canonicalize().unwrap();
            let options = SpawnOptions { mounts_below: Some(point.clone()), ..options(&point, "secluded", false) };
            let pod = Pod::start_in(dir, "secluded", options).await;
            let made = async |id: &str| {
                let bundle = pod.bundle(id, &Wish::new(&["true"]));
                let rootfs = bundle.join("rootfs");
                mount(Some(&rootfs), &rootfs, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
                let request = CreateRequest {
                    container_id: id.into(),
                    bundle,
                    log_path: None,
                    tty: false,
                    stdin: false,
                    stdin_once: false,
                    oci_runtime: None,
                };
                let reply = pod.shim.create(request).await.unwrap();
                pod.shim.start(id).await.unwrap();
                pod.shim.delete(id).await.unwrap();
                umount(&rootfs).unwrap();
                reply.secluded
            };
            assert!(!made("before").await, "nothing to leave");
            mount(Some(&point), &point, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            assert!(made("beside").await);
            umount2(&point, MntFlags::MNT_DETACH).unwrap();
            assert!(!made("after").await, "a mount that is gone stops nobody");
            pod.finish().await;
        });
    });
}

#[tokio::test]
async fn removals_that_meet_join_each_other_and_one_that_meets_a_creation_follows_it() {
    let pod = Pod::start("removals").await;
    pod.run("c", &Wish::new(&["sleep"])).await;
    let again = || async { pod.shim.delete("c").await.unwrap() };
    tokio::join!(again(), again(), again());
    // Which of the two comes first is the kernel's choice: what is left is the same.
    let wish = Wish::new(&["sleep"]);
    let (_, deleted) = tokio::join!(pod.create("early", &wish), pod.shim.delete("early"));
    deleted.unwrap();
    pod.shim.delete("early").await.unwrap();
    assert!(pod.shim.state().await.unwrap().containers.is_empty());
    pod.finish().await;
}

#[tokio::test]
async fn programs_that_cannot_run_fail_in_words_users_know_and_leave_nothing() {
    let pod = Pod::start("missing").await;
    let error = pod.create("none", &Wish::new(&["no-such-program"])).await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::ExecutableNotFound));
    assert!(error.to_string().contains(r#"exec: "no-such-program": executable file not found in $PATH"#), "{error}");
    let error = pod.create("dir", &Wish::new(&["/etc"])).await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::NotExecutable), "{error}");
    let broken = |spec: &mut serde_json::Value| spec["process"]["cwd"] = json!("/no/such/directory");
    let wish = Wish { patch: broken, ..Wish::new(&["true"]) };
    pod.create("cwd", &wish).await.unwrap_err();
    assert!(pod.shim.state().await.unwrap().containers.is_empty());
    pod.finish().await;
}

#[tokio::test]
async fn an_exec_has_the_container_s_namespaces_and_limits_and_its_own_credentials() {
    let mut pod = Pod::start("exec").await;
    let seccomp = |spec: &mut serde_json::Value| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
        });
    };
    pod.run("c", &Wish { patch: seccomp, ..Wish::new(&["sleep"]) }).await;

    let mut user = process_json(&["id"], false);
    user["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [2000, 3000]});
    user["noNewPrivileges"] = json!(true);
    user["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]
    });
    let (output, code) = pod.exec("c", "id", serde_json::from_value(user).unwrap()).await;
    assert_eq!(code, 0);
    assert!(output.contains("uid=1000 gid=1000 groups=2000,3000"), "{output}");
    let field = |name: &str| {
        let line = output.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_ascii_whitespace().nth(1).unwrap_or_default().to_owned()
    };
    let kill = format!("{:016x}", 1 << 5);
    assert_eq!(field("CapBnd:"), format!("{:016x}", (1 << 5) | 1));
    for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set), kill, "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");

    let (output, _) = pod.exec("c", "filtered", process(&["cat", "/proc/self/status"])).await;
    assert!(output.lines().any(|line| line == "Seccomp:\t2"), "{output}");
    let (output, _) = pod.exec("c", "host", process(&["cat", "/proc/sys/kernel/hostname"])).await;
    assert_eq!(output.trim(), "shim-test");
    let (output, _) = pod.exec("c", "descriptors", process(&["ls", "/proc/self/fd"])).await;
    let open: Vec<&str> = output.split_ascii_whitespace().collect();
    assert!(open.iter().all(|fd| fd.parse::<u32>().is_ok_and(|fd| fd <= 3)), "{open:?}");
    let (output, _) = pod.exec("c", "cgroup", process(&["cat", "/proc/self/cgroup"])).await;
    assert!(output.lines().all(|line| line.ends_with(&pod.cgroup_of("c"))), "{output}");

    let mut limited = process_json(&["cat", "/proc/self/limits"], false);
    limited["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
    let (output, _) = pod.exec("c", "limits", serde_json::from_value(limited).unwrap()).await;
    assert!(output.lines().any(|line| line.starts_with("Max open files") && line.contains("77")), "{output}");
    pod.finish().await;
}

/// The filter is compiled for the first container and found by the second; both are bound alike.
#[tokio::test]
async fn a_container_s_program_has_its_filter_and_its_capabilities_and_no_more() {
    let mut pod = Pod::start("confined").await;
    fn confine(spec: &mut serde_json::Value) {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        });
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [2000]});
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]
        });
    }
    type Patch = fn(&mut serde_json::Value);
    let privileges: [(&str, Patch); 3] = [
        ("unset", confine),
        ("may", |spec| {
            confine(spec);
            spec["process"]["noNewPrivileges"] = json!(false);
        }),
        ("never", |spec| {
            confine(spec);
            spec["process"]["noNewPrivileges"] = json!(true);
        }),
    ];
    let mut compiled = Vec::new();
    for (name, patch) in privileges {
        for turn in ["first", "second"] {
            let id = format!("{name}-{turn}");
            pod.run(&id, &Wish { patch, ..Wish::new(&["id"]) }).await;
            assert_eq!(pod.exited(&id).await.exit_code, 0, "{id}");
            let output: String = pod.log(&id).into_iter().map(|(_, _, text)| text + "\n").collect();
            assert!(output.contains("uid=1000 gid=1000 groups=2000"), "{id}: {output}");
            let field = |name: &str| {
                let line = output.lines().find(|line| line.starts_with(name)).unwrap_or_default();
                line.split_ascii_whitespace().nth(1).unwrap_or_default().to_owned()
            };
            assert_eq!(field("CapBnd:"), format!("{:016x}", (1 << 5) | 1), "{id}");
            for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
                assert_eq!(field(set), format!("{:016x}", 1 << 5), "{id} {set}");
            }
            assert_eq!(field("NoNewPrivs:"), if name == "never" { "1" } else { "0" }, "{id}");
            assert_eq!(field("Seccomp:"), "2", "{id}");
        }
        let files = fs::read_dir(pod.dir.path().join("containers/.seccomp")).unwrap();
        compiled = files.map(|file| file.unwrap().path()).collect();
    }
    assert_eq!(compiled.len(), 1, "one profile, one program: {compiled:?}");
    pod.finish().await;
}

#[tokio::test]
async fn exec_failures_are_reported_and_exec_exits_and_signals_announced() {
    let mut pod = Pod::start("failing").await;
    pod.run("c", &Wish::new(&["sleep"])).await;
    let request = |args: &[&str], exec_id: &str| ExecRequest {
        container_id: "c".into(),
        exec_id: exec_id.into(),
        process: process(args),
        tty: false,
        stdin: true,
    };
    let error = pod.shim.exec(request(&["foo"], "e1")).await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::ExecutableNotFound));
    assert!(error.to_string().contains(r#"exec: "foo": executable file not found in $PATH"#), "{error}");
    let error = pod.shim.exec(request(&["/etc/passwd"], "e2")).await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::NotExecutable));
    let mut outside = process_json(&["true"], false);
    outside["cwd"] = json!("/proc/self/fd/7");
    let process = serde_json::from_value(outside).unwrap();
    pod.shim.exec(ExecRequest { process, ..request(&["true"], "e3") }).await.unwrap_err();

    let (_, code) = pod.exec("c", "e4", shim_pod::process(&["exit", "3"])).await;
    assert_eq!(code, 3);
    let reply = pod.shim.exec(request(&["cat"], "e5")).await.unwrap();
    let mut stdin = fs::File::from(reply.stdin.unwrap());
    stdin.write_all(b"hello").unwrap();
    drop(stdin);
    assert_eq!(read_all(reply.stdout.unwrap()).await, "hello");
    assert_eq!(pod.exec_exited("e5").await, 0);
    let _reply = pod.shim.exec(request(&["sleep"], "e6")).await.unwrap();
    pod.shim.exec_signal("c", "e6", 9).await.unwrap();
    assert_eq!(pod.exec_exited("e6").await, 137);
    assert!(pod.shim.exec_signal("c", "e6", 9).await.unwrap_err().is_not_found());
    pod.finish().await;
}

#[tokio::test]
async fn running_out_of_memory_is_told_and_recorded() {
    let mut pod = Pod::start("oom").await;
    let limit = |spec: &mut serde_json::Value| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    };
    pod.run("c", &Wish { patch: limit, ..Wish::new(&["oom"]) }).await;
    let mut told = false;
    let record = loop {
        match pod.next_event().await {
            Event::Oom { id } => told = id == "c",
            Event::Exited { record, .. } => break record,
            _ => {}
        }
    };
    assert!(told && record.oom_killed);
    assert_eq!((record.exit_code, record.signal), (137, Some(9)));
    pod.finish().await;
}

#[tokio::test]
async fn a_terminal_has_the_size_it_was_given_and_ends_with_its_process() {
    let mut pod = Pod::start("tty").await;
    pod.create("c", &Wish { tty: true, stdin: true, ..Wish::new(&["cat"]) }).await.unwrap();
    let attached = pod.shim.attach("c").await.unwrap();
    assert!(attached.terminal && attached.stderr.is_none());
    pod.shim.resize("c", None, 100, 40).await.unwrap();
    pod.shim.start("c").await.unwrap();

    let request = ExecRequest {
        container_id: "c".into(),
        exec_id: "size".into(),
        process: serde_json::from_value(process_json(&["tty-size"], true)).unwrap(),
        tty: true,
        stdin: true,
    };
    let reply = pod.shim.exec(request.clone()).await.unwrap();
    assert_eq!(read_all(reply.terminal.unwrap()).await.trim(), "0 0");
    pod.exec_exited("size").await;
    let held = ExecRequest {
        exec_id: "held".into(),
        process: serde_json::from_value(process_json(&["cat"], true)).unwrap(),
        ..request
    };
    let reply = pod.shim.exec(held).await.unwrap();
    pod.shim.resize("c", Some("held"), 132, 43).await.unwrap();
    let terminal = fs::File::from(reply.terminal.unwrap());
    let size = nix_winsize(&terminal);
    assert_eq!(size, (43, 132));
    pod.shim.exec_signal("c", "held", 9).await.unwrap();
    pod.exec_exited("held").await;

    let mut input = fs::File::from(attached.stdin.unwrap());
    input.write_all(b"typed\n").unwrap();
    let log = pod.log_path("c");
    wait_for("the echo and the answer in the log", LIMIT, || (parse_log(&log).len() >= 2).then_some(()));
    drop(input);
    assert_eq!(pod.exited("c").await.exit_code, 0);
    assert!(read_all(attached.stdout.unwrap()).await.contains("typed"));
    pod.finish().await;
}

fn nix_winsize(terminal: &fs::File) -> (u16, u16) {
    nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[allow(unsafe_code, reason = "a terminal ioctl")]
    // SAFETY: fills the winsize it is given.
    unsafe { window_size(std::os::fd::AsRawFd::as_raw_fd(terminal), &mut size) }.unwrap();
    (size.ws_row, size.ws_col)
}

#[tokio::test]
async fn attached_clients_share_input_and_output_and_a_slow_one_holds_up_nobody() {
    let mut pod = Pod::start("attach").await;
    pod.create("c", &Wish { stdin: true, ..Wish::new(&["cat"]) }).await.unwrap();
    let first = pod.shim.attach("c").await.unwrap();
    let second = pod.shim.attach_output("c").await.unwrap();
    let slow = pod.shim.attach_output("c").await.unwrap();
    pod.shim.start("c").await.unwrap();
    let mut input = fs::File::from(first.stdin.unwrap());
    input.write_all(b"to all\n").unwrap();
    let mut line = [0; 7];
    fs::File::from(second.stdout.unwrap()).read_exact(&mut line).unwrap();
    assert_eq!(&line, b"to all\n");

    // `slow` never reads: the container, its log and the other clients go on.
    let reader = tokio::spawn(read_all(first.stdout.unwrap()));
    let writer = tokio::task::spawn_blocking(move || {
        let block = [b"x".repeat(1023), b"\n".to_vec()].concat();
        (0..4096).for_each(|_| input.write_all(&block).unwrap());
    });
    tokio::time::timeout(LIMIT, writer).await.expect("writing is not held up").unwrap();
    assert_eq!(pod.exited("c").await.exit_code, 0);
    assert_eq!(pod.log("c").len(), 4097);
    assert_eq!(reader.await.unwrap().len(), 7 + 4096 * 1024);
    assert!(read_all(slow.stdout.unwrap()).await.len() < 4096 * 1024);
    pod.finish().await;
}

#[tokio::test]
async fn a_log_reopened_while_lines_are_written_loses_none() {
    let mut pod = Pod::start("reopen").await;
    let path = pod.log_path("c");
    pod.run("c", &Wish::new(&["log", "20000", "100"])).await;
    let mut files = Vec::new();
    for turn in 0..10 {
        let old = pod.dir.path().join(format!("c.log.{turn}"));
        fs::rename(&path, &old).unwrap();
        pod.shim.reopen_log("c").await.unwrap();
        files.push(old);
    }
    assert_eq!(pod.exited("c").await.exit_code, 0);
    files.push(path);
    let lines: Vec<_> = files.iter().flat_map(|file| parse_log(file)).collect();
    let mut numbers: Vec<u64> = lines.iter().map(|(_, _, text)| text[..10].parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..20000).collect::<Vec<u64>>());
    pod.finish().await;
}

#[tokio::test]
async fn a_shim_outlives_its_client_and_is_found_again() {
    let mut pod = Pod::start("reconnect").await;
    pod.run("c", &Wish::new(&["exit", "5", "0.3"])).await;
    let state_dir = pod.state_dir();
    let record = pod.shim.record().clone();
    let options = options(pod.dir.path(), "reconnect", false);
    assert!(matches!(Shim::spawn(options).await, Err(ShimError::AlreadyRunning { .. })));

    // The connection goes without a word, as when the daemon is killed.
    let (shim, events) = (pod.shim, pod.events);
    drop((shim, events));
    assert!(record.is_alive());
    wait_for("the exit record", LIMIT, || read_exit_record(&state_dir, "c").unwrap());
    pod.shim = Shim::connect(&state_dir).await.unwrap();
    pod.events = pod.shim.subscribe();
    let state = pod.shim.state().await.unwrap().containers.remove(0);
    assert_eq!(state.status, ContainerStatus::Stopped);
    assert_eq!(state.exit.unwrap().exit_code, 5);
    pod.finish().await;
    assert!(matches!(Shim::connect(&state_dir).await, Err(ShimError::NotRunning { .. })));
}

#[tokio::test]
async fn a_frozen_container_stands_still_and_still_dies_when_deleted() {
    let mut pod = Pod::start("freeze").await;
    pod.run("c", &Wish::new(&["log", "1000000", "20", "1"])).await;
    let log = pod.log_path("c");
    wait_for("the first lines", LIMIT, || (parse_log(&log).len() > 3).then_some(()));
    pod.shim.pause("c").await.unwrap();
    assert_eq!(pod.shim.state().await.unwrap().containers[0].status, ContainerStatus::Paused);
    // What was in the pipe may still be on its way to the file. A container that runs writes a line each millisecond.
    let before = wait_for("two hundred milliseconds without a line", LIMIT, || {
        let before = parse_log(&log).len();
        std::thread::sleep(Duration::from_millis(200));
        (parse_log(&log).len() == before).then_some(before)
    });
    pod.shim.resume("c").await.unwrap();
    wait_for("lines after the thaw", LIMIT, || (parse_log(&log).len() > before).then_some(()));
    pod.shim.pause("c").await.unwrap();
    pod.shim.delete("c").await.unwrap();
    assert_eq!(next_exit(&mut pod).await, 137);
    pod.finish().await;
}

async fn next_exit(pod: &mut Pod) -> i32 {
    loop {
        if let Event::Exited { record, .. } = pod.next_event().await {
            return record.exit_code;
        }
    }
}

#[tokio::test]
async fn containers_of_a_pod_can_share_a_pid_namespace() {
    let mut pod = Pod::start_with("pids", true).await;
    let path = pod.dir.path().join("pidns");
    assert!(path.exists());
    let bundle_patch = |spec: &mut serde_json::Value| {
        spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": "PIDNS"});
    };
    for id in ["a", "b"] {
        let bundle = pod.bundle(id, &Wish { patch: bundle_patch, ..Wish::new(&["sleep"]) });
        let config = fs::read_to_string(bundle.join("config.json")).unwrap();
        fs::write(bundle.join("config.json"), config.replace("PIDNS", &path.to_string_lossy())).unwrap();
        let request = oarlock_shim_api::CreateRequest { container_id: id.into(), bundle, ..Default::default() };
        pod.shim.create(request).await.unwrap();
        pod.shim.start(id).await.unwrap();
    }
    let (output, _) = pod.exec("a", "ls", process(&["ls", "/proc"])).await;
    let processes = output.split_ascii_whitespace().filter(|name| name.parse::<u32>().is_ok()).count();
    assert!(processes >= 4, "the reaper, both containers and the exec: {output}");
    pod.shim.signal("a", 9, false).await.unwrap();
    assert_eq!(pod.exited("a").await.exit_code, 137);
    pod.finish().await;
    assert!(!path.exists());
}

/// A margin below the megabyte that is promised.
const BUDGET_KILOBYTES: u64 = 800;

#[tokio::test]
async fn an_idle_shim_with_a_container_takes_less_than_a_megabyte() {
    let mut pod = Pod::start("memory").await;
    pod.run("c", &Wish::new(&["sleep"])).await;
    let (_, code) = pod.exec("c", "warm", process(&["true"])).await;
    assert_eq!(code, 0);
    let pid = pod.shim.record().pid;
    let pss = wait_for("the shim to be idle", LIMIT, || {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = rollup.lines().find(|line| line.starts_with("Pss:")).unwrap();
        let kilobytes: u64 = line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap();
        (kilobytes < BUDGET_KILOBYTES).then_some(kilobytes)
    });
    println!("shim PSS with one container: {pss} kB");
    pod.finish().await;
}

#[tokio::test]
async fn a_killed_shim_is_noticed_and_a_new_one_clears_away_its_containers() {
    let mut pod = Pod::start("killed").await;
    let first = pod.run("c", &Wish::new(&["sleep"])).await;
    let state_dir = pod.state_dir();
    let old = pod.shim.record().clone();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old.pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    while pod.next_event().await != Event::Disconnected {}
    assert!(matches!(pod.shim.state().await, Err(ShimError::Disconnected)));
    wait_for("the shim to be gone", LIMIT, || (!old.is_alive()).then_some(()));
    assert!(matches!(Shim::connect(&state_dir).await, Err(ShimError::NotRunning { .. })));

    // Its socket and record are still there; both are replaced.
    pod.shim = Shim::spawn(options(pod.dir.path(), "killed", false)).await.unwrap();
    pod.events = pod.shim.subscribe();
    assert!(pod.shim.state().await.unwrap().containers.is_empty());
    assert!(oarlock_shim_api::process_start_time(first).is_some(), "the container outlives its shim");
    pod.shim.delete("c").await.unwrap();
    wait_for("the container's process to end", LIMIT, || {
        oarlock_shim_api::process_start_time(first).is_none().then_some(())
    });
    pod.run("c", &Wish::new(&["exit", "4"])).await;
    assert_eq!(pod.exited("c").await.exit_code, 4);
    pod.finish().await;
}

#[tokio::test]
async fn a_helper_that_is_killed_fails_its_call_and_leaves_nothing() {
    let mut pod = Pod::start("helper").await;
    // Holds the helper up after everything of the container but its program has been made.
    let held = |spec: &mut serde_json::Value| {
        spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "20"]}]});
    };
    let shim = pod.shim.record().pid;
    let killer = tokio::task::spawn_blocking(move || {
        let hook = |pid: &str| {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            children
                .split_whitespace()
                .any(|child| fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name.trim() == "sleep"))
        };
        let helper = wait_for("the helper to wait for its hook", LIMIT, || {
            let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).ok()?;
            children.split_whitespace().find(|pid| hook(pid)).map(|pid| pid.parse::<i32>().unwrap())
        });
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(helper), nix::sys::signal::Signal::SIGKILL).unwrap();
    });
    let error = pod.create("c", &Wish { patch: held, ..Wish::new(&["sleep"]) }).await.unwrap_err();
    killer.await.unwrap();
    assert_eq!(error.kind(), Some(ErrorKind::HelperDied), "{error}");
    assert!(pod.shim.state().await.unwrap().containers.is_empty());
    assert!(!oarlock_cgroup::Cgroup::new(&pod.cgroup_of("c")).unwrap().exists());
    pod.run("c", &Wish::new(&["exit", "6"])).await;
    assert_eq!(pod.exited("c").await.exit_code, 6);
    pod.finish().await;
}

#[tokio::test]
async fn a_hook_that_reads_nothing_holds_up_nobody_and_programs_have_their_signals() {
    let mut pod = Pod::start("hooks").await;
    let patch = |spec: &mut serde_json::Value| {
        // More than a pipe holds: writing it fails for sure.
        spec["annotations"] = json!({"long": "x".repeat(200_000)});
        spec["hooks"] = json!({"createRuntime": [{"path": "/bin/true"}], "poststop": [{"path": "/bin/true"}]});
    };
    pod.run("c", &Wish { patch, ..Wish::new(&["sleep"]) }).await;
    for (exec, file) in [("first", "/proc/1/status"), ("own", "/proc/self/status")] {
        let (output, _) = pod.exec("c", exec, process(&["cat", file])).await;
        let ignored = output.lines().find(|line| line.starts_with("SigIgn:")).unwrap_or_default();
        let broken_pipe = 1u64 << (nix::sys::signal::Signal::SIGPIPE as i32 - 1);
        // A Rust program ignores that one by itself.
        let mask = u64::from_str_radix(ignored.trim_start_matches("SigIgn:").trim(), 16).unwrap();
        assert_eq!(mask & !broken_pipe, 0, "{file}: {ignored}");
    }
    pod.shim.delete("c").await.unwrap();
    pod.finish().await;
}

#[tokio::test]
async fn a_container_cannot_change_its_own_limits() {
    let mut pod = Pod::start("limits").await;
    let patch = |spec: &mut serde_json::Value| {
        spec["linux"]["resources"]["pids"] = json!({"limit": 50});
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}));
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}));
        // With version 2 the one hierarchy is seen from the container's own group.
        if oarlock_cgroup::Layout::host().unwrap().is_v2() {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "cgroup"}));
        }
    };
    pod.run("c", &Wish { patch, ..Wish::new(&["sleep"]) }).await;
    let v2 = oarlock_cgroup::Layout::host().unwrap().is_v2();
    let file = if v2 { "/sys/fs/cgroup/pids.max" } else { "/sys/fs/cgroup/pids/pids.max" };
    let (output, _) = pod.exec("c", "read", process(&["cat", file])).await;
    assert_eq!(output.trim(), "50");
    let mut of_user = process_json(&["cat", file], false);
    of_user["user"] = json!({"uid": 1000, "gid": 1000});
    let (output, _) = pod.exec("c", "of-user", serde_json::from_value(of_user).unwrap()).await;
    assert_eq!(output.trim(), "50", "programs ask for their limits as whoever they run as");
    let (_, code) = pod.exec("c", "write", process(&["write", file, "5000"])).await;
    assert_ne!(code, 0);
    let (output, _) = pod.exec("c", "again", process(&["cat", file])).await;
    assert_eq!(output.trim(), "50");

    // From outside they change while it runs.
    let cgroup = oarlock_cgroup::Cgroup::new(&pod.cgroup_of("c")).unwrap();
    cgroup.set_limits(&oarlock_cgroup::Limits { pids_max: Some(60), ..Default::default() }).unwrap();
    let (output, _) = pod.exec("c", "changed", process(&["cat", file])).await;
    assert_eq!(output.trim(), "60");
    let stats = cgroup.stats().unwrap();
    assert!(stats.pids >= 1 && stats.memory_usage_bytes > 0 && stats.cpu_usage_nanos > 0, "{stats:?}");
    pod.finish().await;
}
