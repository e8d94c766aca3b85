//! A cluster below a temporary directory, started and reset by the `oarlock` program.

use std::process::{Command, Stdio};

use anyhow::Context;
use kube::Client;
use oarlock_testkit::{binary, image_archive};

pub(crate) struct Cluster {
    directory: tempfile::TempDir,
    /// What `up` printed.
    pub(crate) output: String,
}

impl Cluster {
    /// `oarlock up --detach`, with the demo or without.
    pub(crate) fn start(demo: bool) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("oarlock-perf-").tempdir()?;
        let mut cluster = Self { directory, output: String::new() };
        let mut command = cluster.oarlock();
        command.args(["up", "--detach", "--image"]).arg(image_archive());
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
        command.arg("--data-dir").arg(self.directory.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.directory.path()
    }

    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let kubeconfig = kube::config::Kubeconfig::read_from(self.path().join("admin.kubeconfig"))?;
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
