//! `bench cni`: ADD and DEL of the CNI plugins by exec, ours beside the distribution's reference plugins where installed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use oarlock_cni::{Attachment, CniClient};
use oarlock_testkit::binary;
use serde_json::{Value, json};

use crate::table::{self, Row};

/// Where Debian's containernetworking-plugins are.
const REFERENCE: &str = "/usr/lib/cni";

/// How many rounds, beside how many pods, and how long the kernel may tidy up before the next pod.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub rounds: usize,
    pub present: usize,
    pub pause: Duration,
}

pub(crate) fn run(plan: Plan) -> anyhow::Result<()> {
    oarlock_netns::bring_loopback_up()?;
    start_of_a_program(plan)?;
    for chained in [None, Some("portmap")] {
        compare(plan, chained)?;
    }
    beside_many_addresses(plan)
}

/// The floor: a plugin that is started, says its versions and ends.
fn start_of_a_program(plan: Plan) -> anyhow::Result<()> {
    let mut row = Row { name: "oarlock VERSION".to_owned(), samples: Vec::new() };
    for _ in 0..2 * plan.rounds {
        let mut program = std::process::Command::new(binary("oarlock-cni-plugins"));
        program.arg("loopback").env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).stdout(Stdio::null());
        std::thread::sleep(plan.pause);
        let begin = Instant::now();
        anyhow::ensure!(program.status()?.success(), "the plugin does not say its versions");
        row.samples.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    table::print("a plugin that does nothing", &[row]);
    Ok(())
}

/// How many addresses of other containers `host-local` has on record in the last table.
const ADDRESSES: usize = 4000;

/// The same with thousands of addresses given out: what is on record for others costs nothing.
fn beside_many_addresses(plan: Plan) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("oarlock-perf-").tempdir()?;
    let own = directory.path().join("bin");
    install(&own)?;
    let mut rows = Vec::new();
    for (name, addresses) in [("no others", 0), ("others", ADDRESSES)] {
        let state = directory.path().join(name);
        let network = state.join("ipam").join("oarlock-bridge");
        std::fs::create_dir_all(network.join("attachments"))?;
        for number in 0..addresses {
            let address = std::net::Ipv4Addr::from(u32::from(std::net::Ipv4Addr::new(10, 42, 0, 2)) + number as u32);
            std::fs::write(network.join(address.to_string()), format!("other-{number}\r\neth0"))?;
            std::fs::write(network.join(format!("attachments/other-{number}@eth0")), format!("{address}\n"))?;
            std::fs::write(network.join("last_reserved_ip.0"), address.to_string())?;
        }
        let measured = measure(&state, "oarlock", &own, plan, None)?;
        rows.extend(measured.into_iter().map(|row| Row { name: format!("{name}: {}", row.name), ..row }));
    }
    table::print(&format!("CNI bridge with masquerade, {ADDRESSES} addresses of others in host-local"), &rows);
    Ok(())
}

fn install(own: &Path) -> anyhow::Result<()> {
    std::fs::create_dir(own)?;
    for plugin in ["bridge", "host-local", "portmap", "loopback"] {
        std::os::unix::fs::symlink(binary("oarlock-cni-plugins"), own.join(plugin))?;
    }
    Ok(())
}

fn compare(plan: Plan, chained: Option<&str>) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("oarlock-perf-").tempdir()?;
    let own = directory.path().join("bin");
    install(&own)?;
    let mut rows = measure(&directory.path().join("own"), "oarlock", &own, plan, chained)?;
    if Path::new(REFERENCE).join("bridge").exists() {
        rows.extend(measure(&directory.path().join("reference"), "reference", Path::new(REFERENCE), plan, chained)?);
    } else {
        println!(
            "{REFERENCE} has no plugins, so there is nothing to compare with (Debian: containernetworking-plugins)"
        );
    }
    let and_chained = chained.map(|name| format!(" and {name}")).unwrap_or_default();
    table::print(&format!("CNI bridge with masquerade{and_chained}, {} pods present", plan.present), &rows);
    Ok(())
}

fn list(name: &str, own: bool, state: &Path, chained: Option<&str>) -> Value {
    let (bridge, subnet) = if own { ("oar0", "10.42.0.0/16") } else { ("ref0", "10.44.0.0/16") };
    let mut plugin = json!({
        "type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "dataDir": state, "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
    });
    if own {
        plugin["ipMasqExclude"] = json!(["10.42.0.0/16"]);
    }
    let chained = chained.map(|kind| json!({"type": kind, "capabilities": {"portMappings": true}, "snat": true}));
    let plugins: Vec<Value> = std::iter::once(plugin).chain(chained).collect();
    json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins})
}

fn measure(
    directory: &Path,
    name: &str,
    plugins: &Path,
    plan: Plan,
    chained: Option<&str>,
) -> anyhow::Result<Vec<Row>> {
    let Plan { rounds, present, pause } = plan;
    let network = format!("{name}-{}", chained.unwrap_or("bridge"));
    let path = |part: &str| directory.join(part);
    std::fs::create_dir_all(path("net.d"))?;
    std::fs::write(
        path("net.d/10-bench.conflist"),
        list(&network, name == "oarlock", &path("ipam"), chained).to_string(),
    )?;
    let client = CniClient::new(path("net.d"), vec![plugins.to_owned()], path("cache"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let pod = |number: usize| -> anyhow::Result<(Attachment, PathBuf)> {
        let netns = path(&format!("netns-{number}"));
        oarlock_netns::create_pinned(&netns)?;
        Ok((Attachment::for_pod(&format!("{network}-{number}"), &netns, "default", "bench", "uid"), netns))
    };
    for number in 0..present {
        let (attachment, _) = pod(number)?;
        runtime.block_on(client.add(&attachment))?;
    }
    let row = |what: &str| Row { name: format!("{name} {what}"), samples: Vec::new() };
    let (mut add, mut del, mut gone) = (row("ADD"), row("DEL"), row("DEL, namespace gone first"));
    for round in 0..rounds {
        for (is_gone, row) in [(false, &mut del), (true, &mut gone)] {
            let (attachment, netns) = pod(present + round)?;
            std::thread::sleep(pause);
            let begin = Instant::now();
            runtime.block_on(client.add(&attachment))?;
            add.samples.push(begin.elapsed().as_secs_f64() * 1000.0);
            if is_gone {
                oarlock_netns::remove_pinned(&netns)?;
            }
            let begin = Instant::now();
            runtime.block_on(client.del(&attachment))?;
            row.samples.push(begin.elapsed().as_secs_f64() * 1000.0);
            if !is_gone {
                oarlock_netns::remove_pinned(&netns)?;
            }
        }
    }
    for number in 0..present {
        oarlock_netns::remove_pinned(&path(&format!("netns-{number}")))?;
    }
    Ok(vec![add, del, gone])
}
