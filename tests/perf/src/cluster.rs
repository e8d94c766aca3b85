//! A cluster below a temporary directory, started and reset by the `oarlock` program.

use std::process::{Command, Stdio};

use anyhow::Context;
use kube::Client;
use oarlock_testkit::{binary, image_archive};

pub(crate) struct Cluster {
    directory: tempfile::TempDir,
    config: Option<std::path::PathBuf>,
    /// What `up` printed.
    pub(crate) output: String,
}

impl Cluster {
    /// `oarlock up --detach`, with the demo or without.
    pub(crate) fn start(demo: bool) -> anyhow::Result<Self> {
        Self::start_as(demo, None, None)
    }

    /// Without the demo, with daemons that log what `filter` says.
    pub(crate) fn start_logging(filter: &str) -> anyhow::Result<Self> {
        Self::start_as(false, None, Some(filter))
    }

    /// The same with a configuration file of that content.
    pub(crate) fn start_with(demo: bool, config: Option<&str>) -> anyhow::Result<Self> {
        Self::start_as(demo, config, None)
    }

    fn start_as(demo: bool, config: Option<&str>, log_filter: Option<&str>) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("oarlock-perf-").tempdir()?;
        let mut cluster = Self { directory, config: None, output: String::new() };
        if let Some(text) = config {
            let path = cluster.path().join("config.yaml");
            std::fs::write(&path, text)?;
            cluster.config = Some(path);
        }
        let mut command = cluster.oarlock();
        command.args(["up", "--detach", "--image"]).arg(image_archive());
        if let Some(filter) = log_filter {
            command.env("OARLOCK_LOG", filter);
        }
        if demo {
            command.arg("--demo");
        }
        let output = command.output().context("cannot run oarlock")?;
        cluster.output = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::ensure!(output.status.success(), "oarlock up failed:\n{}", cluster.output);
        Ok(cluster)
    }

    /// The `oarlock` program on this cluster's directory.
    pub(crate) fn oarlock(&self) -> Command {
        let mut command = Command::new(binary("oarlock"));
        command.arg("--data-dir").arg(self.data_dir()).stdin(Stdio::null());
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        command
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.directory.path()
    }

    fn data_dir(&self) -> std::path::PathBuf {
        // A configuration file of ours lies beside the data, which `reset` removes.
        if self.config.is_some() { self.path().join("data") } else { self.path().to_owned() }
    }

    /// The process of one daemon.
    pub(crate) fn daemon(&self, name: &str) -> anyhow::Result<i32> {
        let directory = self.data_dir().to_string_lossy().into_owned();
        let mut all = procfs::process::all_processes()?.flatten();
        let found = all.find(|process| {
            process.cmdline().is_ok_and(|words| words.last().is_some_and(|w| w == name) && words.contains(&directory))
        });
        found.map(|process| process.pid).with_context(|| format!("{name} does not run"))
    }

    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let kubeconfig = kube::config::Kubeconfig::read_from(self.data_dir().join("admin.kubeconfig"))?;
        let config =
            kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    /// Imports the test image.
    pub(crate) fn import(&self) -> anyhow::Result<()> {
        let status = self.oarlock().args(["images", "import"]).arg(image_archive()).stdout(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "the test image could not be imported");
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.oarlock().args(["reset", "--yes"]).stdout(Stdio::null()).status();
    }
}
