//! `cargo xtask lab up`: three virtual machines as a cluster, a server and two machines that join it by the commands that a
//! user would type. Two of them are on one segment, the third is on another, and the server is the router between.
//!
//! The machines are those of `lab test` ([`crate::lab`]); a segment is a multicast group on loopback. What a machine prints
//! for another one, as `to NAME: COMMAND`, is typed on that one's console.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::lab::{self, Guest};
use crate::{build, packages, step, target_dir};

const MEMORY_MEGABYTES: u32 = 1024;
/// How long all of it may take, emulated in software.
const DEADLINE: Duration = Duration::from_secs(40 * 60);
/// The multicast groups that are the segments.
const SEGMENTS: [&str; 2] = ["230.0.0.79:16479", "230.0.0.79:16480"];
/// The port on this machine that leads to the API server.
const API_PORT: u16 = 16_443;
/// A machine says so once it listens to its console.
const LISTENS: &str = "listening to the console";
/// Before the administrator's kubeconfig, in base64.
const KUBECONFIG: &str = "kubeconfig: ";
/// What the server says once all machines are nodes.
const COMPLETE: &str = "three machines are one cluster";
/// What the server says at the end of its checks.
const PASSED: &str = "all checks passed";
const FAILED: &str = "a check failed";
/// What the checks need of the server's console.
const CHECKS: &str = include_str!("lab_checks.sh");
/// Largest packets of pods, by tunnel: a link's 1500 bytes without the outer headers, which VXLAN has in IPv6 too.
const TUNNELS: [(&str, u32); 2] = [("vxlan", 1430), ("wireguard", 1440)];

/// A machine's link to a segment.
struct Port {
    segment: usize,
    last: u8,
}

/// A machine, with the link first by which others know it.
struct Place {
    name: &'static str,
    ports: &'static [Port],
}

/// The server first. It has the first address of both segments.
const MACHINES: [Place; 3] = [
    Place { name: "server", ports: &[Port { segment: 0, last: 1 }, Port { segment: 1, last: 1 }] },
    Place { name: "one", ports: &[Port { segment: 0, last: 2 }] },
    Place { name: "two", ports: &[Port { segment: 1, last: 3 }] },
];

impl Port {
    fn hardware_address(&self) -> String {
        format!("52:54:00:00:{:02x}:{:02x}", self.segment + 2, self.last)
    }

    /// The address of each family.
    fn addresses(&self, last: u8) -> [String; 2] {
        [
            format!("{}.{last}", ["192.0.2", "198.51.100"][self.segment]),
            format!("fd07:0:0:{}::{last}", self.segment + 1),
        ]
    }

    /// As systemd-networkd reads it.
    fn network(&self) -> String {
        let ([v4, v6], gateways) = (self.addresses(self.last), self.addresses(1));
        let mut text = format!(
            "[Match]\nMACAddress={}\n[Network]\nAddress={v4}/24\nAddress={v6}/64\nIPv6AcceptRA=no\n",
            self.hardware_address()
        );
        if self.last != 1 {
            gateways.iter().for_each(|gateway| text.push_str(&format!("Gateway={gateway}\n")));
        }
        text
    }
}

impl Place {
    fn addresses(&self) -> [String; 2] {
        self.ports[0].addresses(self.ports[0].last)
    }
}

#[derive(clap::Args)]
pub(crate) struct UpFlags {
    /// Check the network between the machines, then power them off
    #[arg(long)]
    check: bool,
    /// Use KVM instead of software emulation
    #[arg(long)]
    kvm: bool,
    /// Take the programs from this directory instead of building them
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
    /// How packets get to other machines' pods: auto, vxlan or wireguard; the checks look at the last two without it
    #[arg(long)]
    tunnel: Option<String>,
}

impl UpFlags {
    pub(crate) fn checks(kvm: bool, bin: &Path) -> UpFlags {
        UpFlags { check: true, kvm, bin: Some(bin.to_owned()), tunnel: None }
    }

    /// The tunnels that are looked at, one after the other, with the largest packets of pods.
    fn tunnels(&self) -> anyhow::Result<Vec<(&'static str, u32)>> {
        let Some(asked) = &self.tunnel else { return Ok(TUNNELS.to_vec()) };
        let known = TUNNELS.into_iter().find(|(name, _)| name == asked);
        known.map(|one| vec![one]).with_context(|| format!("{asked} cannot be checked; vxlan and wireguard can"))
    }
}

pub(crate) fn run(flags: &UpFlags) -> anyhow::Result<()> {
    anyhow::ensure!(lab::CAN_RUN, "the guests are x86_64 machines; this one is not");
    packages::ensure(packages::LAB)?;
    let bin = flags.bin.clone().map_or_else(build::run, Ok)?;
    let lab = target_dir().join("lab");
    fs::create_dir_all(&lab).with_context(|| format!("cannot make {}", lab.display()))?;
    let system = lab::system(&lab)?;
    let (sender, said) = mpsc::sync_channel(256);
    let mut machines = Vec::new();
    for place in &MACHINES {
        let guest = make(&lab, &system, &bin, place, flags)?;
        machines.push(Machine::boot(&guest, place, flags.kvm, sender.clone())?);
    }
    drop(sender);
    let outcome = follow(&mut machines, &said, flags, &lab);
    drop(machines);
    for place in &MACHINES {
        lab::remove(&lab.join(format!("{}.img", place.name)))?;
    }
    outcome
}

fn is_server(place: &Place) -> bool {
    place.name == MACHINES[0].name
}

/// Makes a machine's disk.
fn make(lab: &Path, system: &Path, bin: &Path, place: &Place, flags: &UpFlags) -> anyhow::Result<Guest> {
    let name = place.name;
    let root = lab.join("root");
    lab::remove(&root)?;
    fs::create_dir_all(&root)?;
    step::run(&format!("the system of {name}"), Command::new("tar").arg("xf").arg(system).arg("-C").arg(&root))?;
    let script = if is_server(place) { server_script(flags)? } else { node_script(place) };
    lab::equip(&root, bin, name, &place.ports[0].network(), &script)?;
    let networks = root.join("etc/systemd/network");
    for (number, port) in place.ports.iter().enumerate().skip(1) {
        fs::write(networks.join(format!("1{number}-lab.network")), port.network())?;
    }
    if is_server(place) {
        // The way by which this machine reaches the API server.
        fs::write(
            networks.join("20-host.network"),
            "[Match]\nName=en*\n[Network]\nAddress=10.0.2.15/24\nIPv6AcceptRA=no\n",
        )?;
        fs::write(root.join("opt/checks"), CHECKS)?;
        fs::write(root.join("opt/pods.yaml"), pods())?;
        fs::write(root.join("opt/policy.yaml"), POLICY)?;
    }
    let guest = Guest::make(lab, &root, &format!("{name}.img"))?;
    lab::remove(&root)?;
    Ok(guest)
}

const HEAD: &str = "#!/bin/bash\nexec >/dev/ttyS0 2>&1 </dev/ttyS0\nstty -echo\nexport PATH=/opt/oarlock:$PATH HOME=/root KUBECONFIG=/etc/oarlock/admin.kubeconfig\necho \"kernel $(uname -r), $(stat -fc %T /sys/fs/cgroup), up $(cut -d' ' -f1 /proc/uptime) s\"\n";

fn own_flags(place: &Place) -> String {
    format!("--node-name {} --node-ip {} --detach", place.name, place.addresses().join(","))
}

/// Carries out what is typed on the console.
fn node_script(place: &Place) -> String {
    let flags = own_flags(place);
    format!(
        r#"{HEAD}
logs() {{ tail -n 5 /var/lib/oarlock/log/*.log; return 1; }}
joins() {{ oarlock stop --keep-pods >/dev/null 2>&1; "$@" {flags} || logs; }}
echo '{LISTENS}'
while read -r line; do eval "$line"; done
"#
    )
}

/// Starts the cluster, lets the others join, and with checks starts it again with each tunnel.
fn server_script(flags: &UpFlags) -> anyhow::Result<String> {
    let (own, nodes) = (own_flags(&MACHINES[0]), "one two");
    let mut script = format!(
        r#"{HEAD}
echo '{LISTENS}'
number=0
# Lets another machine carry out a command; as successful as that.
on() {{
  number=$((number + 1))
  echo "to $1: $2; echo \"to server: $number \$?\""
  while read -r -t 240 answered status; do
    [ "$answered" = $number ] && return "$status"
  done
  return 1
}}
# start TUNNEL
start() {{
  mkdir -p /etc/oarlock
  printf '%s\n' "nodeTunnel: $1" 'clusterCIDR: 10.42.0.0/16,fd2a::/48' 'serviceCIDR: 10.43.0.0/16,fd2b::/112' 'loadBalancerPools: ["192.0.2.240/29", "fd07:0:0:1::f0/125"]' >/etc/oarlock/config.yaml
  oarlock stop --keep-pods >/dev/null 2>&1
  oarlock up {own} || {{ echo '{FAILED}: up'; tail -n 5 /var/lib/oarlock/log/*.log; }}
  for node in {nodes}; do
    on $node "joins $(oarlock token create --ttl 1h | grep -o 'oarlock join .*')" || echo "{FAILED}: $node cannot join"
  done
}}
start {first}
echo "{KUBECONFIG}$(base64 -w0 $KUBECONFIG)"
oarlock images import /opt/oarlock/testimage.tar
for node in {nodes}; do on $node 'oarlock images import /opt/oarlock/testimage.tar'; done
echo '{COMPLETE}'
"#,
        first = if flags.check { flags.tunnels()?[0].0 } else { flags.tunnel.as_deref().unwrap_or("auto") },
    );
    if !flags.check {
        return Ok(script);
    }
    script.push_str(". /opt/checks\n");
    let addresses: Vec<String> = MACHINES.iter().flat_map(Place::addresses).collect();
    for (number, (tunnel, mtu)) in flags.tunnels()?.into_iter().enumerate() {
        if number > 0 {
            // Pods get links for the other tunnel.
            script.push_str(&format!("kubectl delete --now -f /opt/pods.yaml\nstart {tunnel}\n"));
        }
        script.push_str(&format!("check {tunnel} {mtu} '{}'\n", addresses.join(" ")));
    }
    script.push_str(&format!("[ $failed = 0 ] && echo '{PASSED}' || echo '{FAILED}'\n"));
    Ok(script)
}

const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: guard}\nspec:\n  podSelector: {matchLabels: {place: two}}\n  policyTypes: [Ingress]\n  ingress: [{from: [{podSelector: {matchLabels: {place: one}}}]}]\n";

/// A page on each machine, and Services of each kind.
fn pods() -> String {
    let mut all = String::new();
    for Place { name, .. } in MACHINES {
        all.push_str(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-{name}, labels: {{app: web, place: {name}}}}}\nspec:\n  nodeName: {name}\n  hostname: web-{name}\n  subdomain: each\n  containers:\n  - {{name: web, image: \"oarlock.local/testimage:1\", imagePullPolicy: IfNotPresent, command: [/bin/http, \"8080\"]}}\n---\n"
        ));
    }
    let both = "ipFamilyPolicy: RequireDualStack";
    let ports = "ports: [{port: 80, targetPort: 8080";
    for (name, spec) in [
        ("first", format!("type: NodePort, selector: {{place: server}}, {both}, {ports}, nodePort: 30080}}]")),
        ("balanced", format!("type: LoadBalancer, selector: {{app: web}}, {both}, {ports}}}]")),
        ("each", format!("clusterIP: None, selector: {{app: web}}, {both}, {ports}}}]")),
    ] {
        all.push_str(&format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n---\n"));
    }
    all
}

/// A running guest; it ends with this value.
struct Machine {
    name: &'static str,
    child: Child,
    console: ChildStdin,
    listens: bool,
    waiting: Vec<String>,
}

type Said = (&'static str, String);

impl Machine {
    fn boot(guest: &Guest, place: &Place, kvm: bool, sender: mpsc::SyncSender<Said>) -> anyhow::Result<Self> {
        let name = place.name;
        let mut command = guest.command(kvm, MEMORY_MEGABYTES);
        for port in place.ports {
            let id = format!("segment{}", port.segment);
            command
                .args(["-netdev", &format!("socket,id={id},mcast={},localaddr=127.0.0.1", SEGMENTS[port.segment])])
                .args(["-device", &format!("virtio-net-pci,netdev={id},mac={}", port.hardware_address())]);
        }
        if is_server(place) {
            let forward = format!("user,restrict=on,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{API_PORT}-:6443");
            command.args(["-nic", &forward]);
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.context("cannot start qemu-system-x86_64")?;
        let console = child.stdin.take().context("the guest has no console")?;
        let mut output = BufReader::new(child.stdout.take().context("the guest has no console")?);
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                if sender.send((name, String::from_utf8_lossy(&line).trim().to_owned())).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Ok(Self { name, child, console, listens: false, waiting: Vec::new() })
    }

    /// Types a line on the console, or keeps it until somebody listens there.
    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        self.waiting.push(line.to_owned());
        if self.listens {
            for line in self.waiting.drain(..) {
                writeln!(self.console, "{line}")
                    .with_context(|| format!("cannot type on the console of {}", self.name))?;
            }
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Shows what the machines say and types what the others are to do, until the checks are over or, without checks, for as long
/// as the machines run.
fn follow(machines: &mut [Machine], said: &mpsc::Receiver<Said>, flags: &UpFlags, lab: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    let outcome = loop {
        let line = if flags.check {
            said.recv_timeout(DEADLINE.saturating_sub(start.elapsed()))
        } else {
            said.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
        };
        let (name, line) = match line {
            Ok(said) => said,
            Err(mpsc::RecvTimeoutError::Timeout) => anyhow::bail!("not done within {} s", DEADLINE.as_secs()),
            Err(mpsc::RecvTimeoutError::Disconnected) => anyhow::bail!("the machines have ended"),
        };
        if let Some(encoded) = line.strip_prefix(KUBECONFIG) {
            keep_kubeconfig(encoded, &lab.join("admin.kubeconfig"))?;
            continue;
        }
        if let Some((to, command)) = line.strip_prefix("to ").and_then(|rest| rest.split_once(": ")) {
            for machine in machines.iter_mut().filter(|machine| machine.name == to) {
                machine.tell(command)?;
            }
            continue;
        }
        if !line.is_empty() {
            println!("    {name:>6} | {line}");
        }
        match line.as_str() {
            LISTENS => {
                for machine in machines.iter_mut().filter(|machine| machine.name == name) {
                    machine.listens = true;
                    machine.tell("true")?;
                }
            }
            COMPLETE => println!(
                "three machines are up after {:.0} s; Ctrl-C ends them. kubectl --kubeconfig {} get nodes",
                start.elapsed().as_secs_f64(),
                lab.join("admin.kubeconfig").display()
            ),
            PASSED => break Ok(()),
            _ if line.starts_with(FAILED) && flags.check => break Err(anyhow::anyhow!("{name}: {line}")),
            _ => {}
        }
    };
    println!("    {:.0} s", start.elapsed().as_secs_f64());
    outcome
}

/// Writes the administrator's kubeconfig, with the port of this machine that leads there.
fn keep_kubeconfig(encoded: &str, path: &Path) -> anyhow::Result<()> {
    let mut child =
        Command::new("base64").arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("base64")?;
    child.stdin.take().context("base64 has no input")?.write_all(encoded.as_bytes())?;
    let text = String::from_utf8(child.wait_with_output()?.stdout).context("the kubeconfig is not text")?;
    fs::write(path, text.replace("[::1]:6443", &format!("127.0.0.1:{API_PORT}"))).context("cannot write the kubeconfig")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machines_run_is_bash() {
        let flags = UpFlags::checks(false, Path::new("/opt"));
        let scripts = [server_script(&flags).expect("a script"), node_script(&MACHINES[1]), CHECKS.to_owned()];
        for script in scripts {
            let status = Command::new("bash").args(["-n", "-c", &script]).status().expect("bash");
            assert!(status.success(), "{script}");
        }
    }

    #[test]
    fn each_machine_is_another_one_on_its_segments() {
        let mut all: Vec<String> = MACHINES.iter().flat_map(|place| place.ports).map(Port::hardware_address).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4);
        assert_eq!(MACHINES[2].addresses(), ["198.51.100.3", "fd07:0:0:2::3"]);
    }
}
