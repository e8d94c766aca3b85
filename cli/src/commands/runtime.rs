//! `oarlock runtime`: the CRI runtime daemon.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use anyhow::Context;
use oarlock_runtime::Runtime;

use super::{daemon, machine, netproxy};
use crate::config::Settings;
use crate::host;

pub(crate) fn run(settings: Settings) -> anyhow::Result<ExitCode> {
    host::require_root("oarlock runtime")?;
    if settings.cni_bin_dirs.contains(&settings.layout.own_cni_bin_dir()) {
        // There may be others' plugins; where there are none, the node's status says so.
        let installed = machine::prepare_directories(&settings).and_then(|()| machine::install_plugins(&settings));
        if let Err(error) = installed {
            eprintln!("oarlock: our CNI plugins are not installed: {error:#}");
        }
    }
    let export = settings.tracing.as_ref().map(|tracing| tracing.export("oarlock-runtime"));
    daemon::run_traced(&settings.clone(), 2, export.as_ref(), |shutdown| async move {
        netproxy::hold_pods_back(&settings);
        let layout = &settings.layout;
        let config = oarlock_runtime::Config {
            socket: layout.runtime_socket(),
            data_dir: layout.runtime_dir(),
            run_dir: layout.run_dir(),
            shim_binary: host::sibling_program("oarlock-shim")?,
            cni_conf_dir: settings.cni_conf_dir.clone(),
            cni_bin_dirs: settings.cni_bin_dirs.clone(),
            cni_cache_dir: layout.runtime_dir().join("cni"),
            streaming_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            registries: oarlock_runtime::Registries {
                mirrors: settings.registries.mirrors.clone(),
                hosts_dirs: settings
                    .registries
                    .hosts_dirs
                    .clone()
                    .unwrap_or_else(|| oarlock_runtime::Registries::default().hosts_dirs),
                plain_http: settings.registries.plain_http.clone(),
                certificate_authorities: settings.registries.certificate_authorities.clone(),
                credentials: settings.registries.credentials.clone(),
            },
            image_thresholds: settings.image_collection.as_ref().map(|file| file.thresholds()),
            plugins: settings.nri.config(layout),
            handlers: settings.runtime_handlers.clone(),
            cgroup_driver: settings.cgroup_driver,
            ..oarlock_runtime::Config::default()
        };
        let socket = layout.runtime_socket();
        let runtime = Runtime::new(config).await.context("cannot start the runtime")?;
        tokio::spawn(daemon::announce_when("runtime", shutdown.clone(), move || {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(&socket).await.is_ok() }
        }));
        runtime.run(shutdown).await.context("the runtime ended")
    })
}
