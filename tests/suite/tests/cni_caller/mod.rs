//! A runtime that calls the CNI plugins one by one, and containers that answer.
#![allow(dead_code, reason = "each test program uses a part")]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oarlock_netlink::{Connection, Link, Protocol};
use oarlock_netns::{create_pinned, run_in};
use oarlock_testkit::binary;
use serde_json::{Value, json};

const NAMES: [&str; 7] = ["bandwidth", "bridge", "firewall", "host-local", "loopback", "portmap", "tuning"];

/// A runtime that calls plugins one by one.
pub struct Caller {
    pub directory: tempfile::TempDir,
}

impl Caller {
    pub fn new() -> Caller {
        oarlock_netns::bring_loopback_up().unwrap();
        let directory = tempfile::tempdir().unwrap();
        for plugin in NAMES {
            symlink(binary("oarlock-cni-plugins"), directory.path().join(plugin)).unwrap();
        }
        Caller { directory }
    }

    /// Calls a plugin for a container; the result, or the error object's message.
    pub fn call(&self, verb: &str, container: &str, config: Value, previous: Option<&Value>) -> Result<Value, String> {
        let refused = |error: Value| error["msg"].as_str().unwrap_or_default().to_owned();
        self.call_with(verb, container, config, previous, "").map_err(refused)
    }

    /// As [`Caller::call`], with `CNI_ARGS`; fails with the whole error object. The version is the newest unless the
    /// configuration has one.
    pub fn call_with(
        &self,
        verb: &str,
        container: &str,
        mut config: Value,
        previous: Option<&Value>,
        arguments: &str,
    ) -> Result<Value, Value> {
        if config["cniVersion"].is_null() {
            config["cniVersion"] = "1.1.0".into();
        }
        config["prevResult"] = previous.cloned().unwrap_or(Value::Null);
        let plugin = config["type"].as_str().unwrap().to_owned();
        let mut child = Command::new(self.directory.path().join(plugin))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns(container))
            .env("CNI_PATH", self.directory.path())
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() { Ok(answer) } else { Err(answer) }
    }

    pub fn bridge(&self, network: &str, third: u8) -> Value {
        json!({
            "name": network, "type": "bridge", "bridge": format!("br-{network}"), "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": self.directory.path().join("ipam"),
                     "ranges": [[{"subnet": format!("10.42.{third}.0/24")}], [{"subnet": format!("fd42:{third}::/64")}]],
                     "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
        })
    }

    /// A container on the bridge of a network.
    pub fn attach(&self, container: &str, bridge: Value) -> Value {
        create_pinned(&netns(container)).unwrap();
        self.call("ADD", container, bridge, None).unwrap()
    }
}

pub fn netns(container: &str) -> PathBuf {
    Path::new("/run/netns").join(container)
}

pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let text = |ip: &Value| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
    result["ips"].as_array().unwrap().iter().map(text).collect()
}

pub fn link_inside(container: &str) -> Link {
    Connection::open_in(Protocol::Route, &netns(container)).unwrap().require_link("eth0").unwrap()
}

pub fn host_links() -> Vec<String> {
    Connection::open(Protocol::Route).unwrap().links().unwrap().into_iter().map(|link| link.name).collect()
}

/// A server in the container that takes everything in, and then sends as much as it was asked for by the first 8 bytes.
pub fn serve(container: &str) {
    let listener = run_in(&netns(container), || TcpListener::bind(("::", 80)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut header = [0; 8];
            if stream.read_exact(&mut header).is_err() {
                continue;
            }
            let wanted = u64::from_be_bytes(header);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
            let _ = std::io::copy(&mut std::io::repeat(7).take(wanted), &mut stream);
        }
    });
}

/// How long it takes to send and to receive that much.
pub fn transfer(from: Option<&str>, to: IpAddr, send: u64, receive: u64) -> std::io::Result<Duration> {
    let work = || {
        let begin = Instant::now();
        let mut stream = TcpStream::connect_timeout(&(to, 80).into(), Duration::from_secs(2))?;
        stream.write_all(&receive.to_be_bytes())?;
        std::io::copy(&mut std::io::repeat(7).take(send), &mut stream)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        assert_eq!(std::io::copy(&mut stream, &mut std::io::sink())?, receive);
        Ok(begin.elapsed())
    };
    match from {
        Some(container) => run_in(&netns(container), work).unwrap(),
        None => work(),
    }
}
