//! Runs the daemon by hand:
//! `cargo run -p oarlock-runtime --example dev-runtime -- <data-dir> <shim> <cni-conf-dir> <cni-bin-dir> [image-archive…]`.
//! The socket is `<data-dir>/run/runtime.sock`; archives are imported once it serves. Ctrl-C stops the daemon and leaves
//! containers running.

use std::error::Error;
use std::path::{Path, PathBuf};

use oarlock_proto::images::ImportRequest;
use oarlock_proto::images::images_client::ImagesClient;
use oarlock_runtime::{Config, Registries, Runtime};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

#[tokio::main]
async fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [data_dir, shim_binary, cni_conf_dir, cni_bin_dir, archives @ ..] = arguments.as_slice() else {
        eprintln!("usage: dev-runtime <data-dir> <shim-binary> <cni-conf-dir> <cni-bin-dir> [image-archive…]");
        std::process::exit(64);
    };
    // Every registry is looked for there first, such as http://127.0.0.1:5000.
    let mirror = std::env::var("OARLOCK_MIRROR").into_iter().map(|mirror| ("*".to_owned(), vec![mirror]));
    // Such as crun=/usr/bin/crun,runc=/usr/sbin/runc.
    let handlers = std::env::var("OARLOCK_HANDLERS").unwrap_or_default();
    let handlers = handlers.split(',').filter_map(|pair| pair.split_once('='));
    let config = Config {
        handlers: handlers.map(|(name, path)| (name.to_owned(), path.into())).collect(),
        registries: Registries { mirrors: mirror.collect(), ..Registries::default() },
        shim_binary: shim_binary.clone(),
        cni_conf_dir: cni_conf_dir.clone(),
        cni_bin_dirs: vec![cni_bin_dir.clone()],
        cgroup_root: std::env::var("OARLOCK_CGROUP_ROOT").unwrap_or_else(|_| "oarlock-dev".to_owned()),
        ..Config::in_dirs(data_dir, &data_dir.join("run"))
    };
    if let Err(error) = run(config, archives).await {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

async fn run(config: Config, archives: &[PathBuf]) -> Result<(), Box<dyn Error>> {
    oarlock_telemetry::init("info", oarlock_telemetry::Format::Text)?;
    let socket = config.socket.clone();
    let stop = CancellationToken::new();
    let runtime = Runtime::new(config).await.map_err(|error| error.full_message())?;
    let serving = tokio::spawn(runtime.run(stop.clone()));
    for archive in archives {
        import(&socket, archive).await?;
    }
    tokio::signal::ctrl_c().await?;
    stop.cancel();
    Ok(serving.await?.map_err(|error| error.full_message())?)
}

async fn import(socket: &Path, archive: &Path) -> Result<(), Box<dyn Error>> {
    let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))?.connect().await?;
    let path = std::path::absolute(archive)?.display().to_string();
    let mut progress = ImagesClient::new(channel).import(ImportRequest { path }).await?.into_inner();
    while let Some(message) = progress.message().await? {
        println!("{}", message.stage);
        for image in message.images {
            println!("{} {}", image.id, image.repo_tags.join(" "));
        }
    }
    Ok(())
}
