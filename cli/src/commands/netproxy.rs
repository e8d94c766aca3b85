//! `oarlock netproxy`: the Service proxy.

use std::process::ExitCode;

use crate::config::Settings;

pub(crate) fn run(_settings: Settings) -> anyhow::Result<ExitCode> {
    anyhow::bail!("netproxy")
}
