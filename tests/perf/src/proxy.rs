//! A netproxy of its own against a [`ListServer`]: the program under test, its readiness and its memory.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use oarlock_testkit::binary;

use crate::list_server::ListServer;

/// How long a start may take before the benchmark gives up.
const PATIENCE: Duration = Duration::from_secs(60);
const METRICS_PORT: u16 = 10_249;

pub(crate) struct Proxy {
    child: Child,
    directory: tempfile::TempDir,
}

impl Proxy {
    /// Starts `oarlock netproxy` and waits for its first commit. Returns it with the times from the process's start and
    /// from its first list to that commit.
    pub(crate) fn start(server: &Arc<ListServer>, api: std::net::SocketAddr) -> anyhow::Result<(Proxy, [Duration; 2])> {
        let directory = tempfile::Builder::new().prefix("oarlock-perf-").tempdir()?;
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("config.yaml"), "nodeName: bench\n")?;
        std::fs::write(path("netproxy.kubeconfig"), kubeconfig(api))?;
        let notify = UnixDatagram::bind(path("notify"))?;
        notify.set_read_timeout(Some(PATIENCE))?;
        let begin = Instant::now();
        let child = Command::new(binary("oarlock"))
            .arg("--config")
            .arg(path("config.yaml"))
            .arg("--data-dir")
            .arg(directory.path())
            .arg("netproxy")
            .env("NOTIFY_SOCKET", path("notify"))
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(path("log"))?)
            .stderr(std::fs::File::create(path("errors"))?)
            .spawn()
            .context("cannot start oarlock netproxy")?;
        let proxy = Proxy { child, directory };
        notify.recv(&mut [0; 64]).with_context(|| format!("netproxy does not get ready:\n{}", proxy.log()))?;
        let ready = Instant::now();
        let listed = server.first_request().context("netproxy never listed anything")?;
        Ok((proxy, [ready - begin, ready - listed]))
    }

    pub(crate) fn log(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.directory.path().join(name)).unwrap_or_default();
        read("log") + &read("errors")
    }

    /// Proportional set size, the largest resident set so far, and CPU time so far.
    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        let process = procfs::process::Process::new(self.child.id().cast_signed())?;
        let rollup = process.smaps_rollup()?;
        let map = rollup.memory_map_rollup.0.first().context("no memory map")?.extension.map.clone();
        let stat = process.stat()?;
        Ok(Usage {
            pss_bytes: map.get("Pss").copied().unwrap_or(0),
            peak_bytes: process.status()?.vmhwm.unwrap_or(0) * 1024,
            cpu: Duration::from_secs_f64((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64),
        })
    }

    /// A value that its health server tells.
    pub(crate) fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], METRICS_PORT).into(), Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.with_context(|| format!("there is no metric {name}"))
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

pub(crate) struct Usage {
    pub(crate) pss_bytes: u64,
    pub(crate) peak_bytes: u64,
    pub(crate) cpu: Duration,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kubeconfig(api: std::net::SocketAddr) -> String {
    format!(
        "apiVersion: v1\nkind: Config\nclusters: [{{name: bench, cluster: {{server: \"http://{api}\"}}}}]\n\
         users: [{{name: bench, user: {{}}}}]\ncontexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]\ncurrent-context: bench\n"
    )
}
