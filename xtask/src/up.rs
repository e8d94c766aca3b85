//! `cargo xtask up`: from a fresh machine to a Deployment behind a Service.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::{build, packages, step};

#[derive(clap::Args)]
pub(crate) struct UpFlags {
    /// Return once the demo is shown and leave the cluster running
    #[arg(long)]
    detach: bool,
    /// Keep everything below this directory
    #[arg(long, value_name = "DIR")]
    data_dir: Option<std::path::PathBuf>,
}

/// Replaces this process by `oarlock up --demo`, so that Ctrl-C reaches it directly.
pub(crate) fn run(flags: &UpFlags) -> anyhow::Result<()> {
    packages::ensure(packages::RUN)?;
    let bin = build::run()?;
    let mut command = Command::new(bin.join("oarlock"));
    if let Some(directory) = &flags.data_dir {
        command.arg("--data-dir").arg(directory);
    }
    command.args(["up", "--demo"]).arg("--image").arg(bin.join("testimage.tar"));
    if flags.detach {
        command.arg("--detach");
        return step::run("oarlock up", &mut command);
    }
    Err(command.exec().into())
}
