//! `cargo xtask lab up`: three virtual machines on one segment as a cluster, a server and two machines that join it by the
//! commands that a user would type. What the server prints for them is typed on their consoles.
//!
//! The machines are those of `lab test` ([`crate::lab`]); the segment is a multicast group on loopback.

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
/// The machines and their addresses on the segment, the server first.
const MACHINES: [(&str, &str); 3] = [("server", "192.0.2.1"), ("one", "192.0.2.2"), ("two", "192.0.2.3")];
/// How long all of it may take, emulated in software.
const DEADLINE: Duration = Duration::from_secs(15 * 60);
const SEGMENT: &str = "230.0.0.79:16479";
/// The port on this machine that leads to the API server.
const API_PORT: u16 = 16_443;
/// Begins a line of the server's that is to be typed on the others' consoles.
const JOIN: &str = "oarlock join ";
/// A machine says so once it listens to its console.
const LISTENS: &str = "waiting for the command by which to join";
/// Before the administrator's kubeconfig, in base64.
const KUBECONFIG: &str = "kubeconfig: ";
/// What the server says at the end of its checks.
const PASSED: &str = "all checks passed";
const FAILED: &str = "a check failed";

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
    /// How packets get to other machines' pods: auto, vxlan or wireguard
    #[arg(long, default_value = "wireguard")]
    tunnel: String,
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
    for (number, (name, address)) in MACHINES.into_iter().enumerate() {
        let guest = make(&lab, &system, &bin, (name, address), flags)?;
        machines.push(Machine::boot(&guest, name, number, flags.kvm, sender.clone())?);
    }
    drop(sender);
    let outcome = follow(&mut machines, &said, flags, &lab);
    drop(machines);
    for (name, _) in MACHINES {
        lab::remove(&lab.join(format!("{name}.img")))?;
    }
    outcome
}

/// Makes a machine's disk.
fn make(lab: &Path, system: &Path, bin: &Path, machine: (&str, &str), flags: &UpFlags) -> anyhow::Result<Guest> {
    let (name, address) = machine;
    let root = lab.join("root");
    lab::remove(&root)?;
    fs::create_dir_all(&root)?;
    step::run(&format!("the system of {name}"), Command::new("tar").arg("xf").arg(system).arg("-C").arg(&root))?;
    let network = format!(
        "[Match]\nMACAddress={}\n[Network]\nAddress={address}/24\nIPv6AcceptRA=no\n",
        hardware_address(address)
    );
    let is_server = name == MACHINES[0].0;
    let script = if is_server { server_script(flags.check, &flags.tunnel) } else { node_script(name, address) };
    lab::equip(&root, bin, name, &network, &script)?;
    if is_server {
        // The way by which this machine reaches the API server.
        fs::write(
            root.join("etc/systemd/network/20-host.network"),
            "[Match]\nName=en*\n[Network]\nAddress=10.0.2.15/24\nIPv6AcceptRA=no\n",
        )?;
        fs::create_dir_all(root.join("etc/oarlock"))?;
        fs::write(root.join("etc/oarlock/config.yaml"), format!("nodeTunnel: {}\n", flags.tunnel))?;
        fs::write(root.join("opt/pods.yaml"), pods())?;
    }
    let guest = Guest::make(lab, &root, &format!("{name}.img"))?;
    lab::remove(&root)?;
    Ok(guest)
}

fn hardware_address(address: &str) -> String {
    format!("52:54:00:00:02:0{}", address.rsplit('.').next().unwrap_or_default())
}

const HEAD: &str = "#!/bin/bash\nexec >/dev/ttyS0 2>&1 </dev/ttyS0\nstty -echo\nexport PATH=/opt/oarlock:$PATH HOME=/root KUBECONFIG=/etc/oarlock/admin.kubeconfig\necho \"kernel $(uname -r), $(stat -fc %T /sys/fs/cgroup), up $(cut -d' ' -f1 /proc/uptime) s\"\n";

fn node_script(name: &str, address: &str) -> String {
    format!(
        "{HEAD}echo '{LISTENS}'\nread -r command\n$command --node-name {name} --node-ip {address} --detach || {{ echo '{FAILED}: cannot join'; tail -n 5 /var/lib/oarlock/log/*.log; }}\noarlock images import /opt/oarlock/testimage.tar\n"
    )
}

fn server_script(check: bool, tunnel: &str) -> String {
    let (name, address) = MACHINES[0];
    let mut script = format!(
        "{HEAD}oarlock up --node-name {name} --node-ip {address} --detach || {{ echo '{FAILED}: up'; tail -n 5 /var/lib/oarlock/log/*.log; }}\necho \"{KUBECONFIG}$(base64 -w0 $KUBECONFIG)\"\noarlock token create --ttl 1h\noarlock images import /opt/oarlock/testimage.tar\n"
    );
    if check {
        // On one segment only WireGuard is asked for by name: the others are for packets that a router sees.
        let way = if tunnel == "wireguard" { "dev oar-wg0" } else { "via 192.0.2.3" };
        script.push_str(&format!("way='{way}'\n"));
        script.push_str(CHECKS);
        script.push_str(&format!("[ $failed = 0 ] && echo '{PASSED}' || echo '{FAILED}'\n"));
    }
    script
}

/// What is looked at between the machines: pods, names, ports of other machines, the tunnel, and consoles.
const CHECKS: &str = r#"
failed=0
expect() { echo "$1: $2"; case "$2" in *$3*) ;; *) failed=1; echo "  not as expected: $3" ;; esac; }
until [ "$(kubectl get nodes --no-headers 2>/dev/null | grep -cw Ready)" = 3 ]; do sleep 1; done
kubectl get nodes -o wide
kubectl apply -f /opt/pods.yaml
kubectl wait --for=condition=Ready pod --all --timeout=240s || { failed=1; kubectl describe pods; }
kubectl get pods -o wide
for to in server one two; do
  ip=$(kubectl get pod web-$to -o jsonpath={.status.podIP})
  for from in server one two; do
    expect "web-$from to web-$to" "$(kubectl exec web-$from -- /bin/fetch $ip:8080/hostname 10)" web-$to
  done
done
for from in one two; do
  expect "web-$from to the Service's name" "$(kubectl exec web-$from -- /bin/fetch first.default:80/hostname 10)" web-server
done
for address in 192.0.2.2 192.0.2.3; do
  expect "node port of $address" "$(curl -sS -m 10 http://$address:30080/hostname)" web-server
done
ip=$(kubectl get pod web-two -o jsonpath={.status.podIP})
expect "the way to web-two" "$(ip route get $ip)" "$way"
expect "proxy's certificates" "$(kubectl get csr | grep -c 'kube-apiserver-client .*Approved,Issued')" 2
"#;

fn pods() -> String {
    let mut all = String::new();
    for (node, _) in MACHINES {
        all.push_str(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-{node}, labels: {{on: {node}}}}}\nspec:\n  nodeName: {node}\n  containers:\n  - {{name: web, image: \"oarlock.local/testimage:1\", imagePullPolicy: IfNotPresent, command: [/bin/http, \"8080\"]}}\n---\n"
        ));
    }
    all.push_str("apiVersion: v1\nkind: Service\nmetadata: {name: first}\nspec: {type: NodePort, selector: {on: server}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}\n");
    all
}

/// A running guest; it ends with this value.
struct Machine {
    name: &'static str,
    child: Child,
    console: ChildStdin,
    listens: bool,
}

type Said = (&'static str, String);

impl Machine {
    fn boot(
        guest: &Guest,
        name: &'static str,
        number: usize,
        kvm: bool,
        sender: mpsc::SyncSender<Said>,
    ) -> anyhow::Result<Self> {
        let mut command = guest.command(kvm, MEMORY_MEGABYTES);
        let hardware = hardware_address(MACHINES[number].1);
        command
            .args(["-netdev", &format!("socket,id=segment,mcast={SEGMENT},localaddr=127.0.0.1")])
            .args(["-device", &format!("virtio-net-pci,netdev=segment,mac={hardware}")]);
        if number == 0 {
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
        Ok(Self { name, child, console, listens: false })
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
    let (mut nodes, mut join) = (0, None);
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
        if !line.is_empty() {
            println!("    {name:>6} | {line}");
        }
        if line == LISTENS {
            machines.iter_mut().filter(|machine| machine.name == name).for_each(|machine| machine.listens = true);
        }
        if line.starts_with(JOIN) && name == MACHINES[0].0 {
            join = Some(line.clone());
        }
        if let Some(command) = &join {
            for machine in machines.iter_mut().filter(|machine| machine.listens) {
                writeln!(machine.console, "{command}").context("cannot type on a console")?;
                machine.listens = false;
            }
        }
        nodes += usize::from(line.contains("this machine is a node of the cluster"));
        if nodes == MACHINES.len() - 1 && !flags.check && line.contains("this machine is a node") {
            println!(
                "three machines are up after {:.0} s; Ctrl-C ends them. kubectl --kubeconfig {} get nodes",
                start.elapsed().as_secs_f64(),
                lab.join("admin.kubeconfig").display()
            );
        }
        if line == PASSED {
            break Ok(());
        }
        if line.starts_with(FAILED) && flags.check {
            break Err(anyhow::anyhow!("{name}: {line}"));
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
    fs::write(path, text.replace(":6443", &format!(":{API_PORT}"))).context("cannot write the kubeconfig")
}
