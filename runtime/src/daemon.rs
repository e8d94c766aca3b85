//! Owns the daemon's life: opening state, serving the socket, stopping.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use oarlock_cni::CniClient;
use oarlock_images::{ImageStore, MirrorRule, RegistryConfig, Thresholds as ImageThresholds};
use oarlock_nri::Plugins;
use oarlock_streaming::StreamingServer;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::backend::Streams;
use crate::config::Config;
use crate::core::Core;
use crate::error::Error;
use crate::events::Events;
use crate::groups;
use crate::host;
use crate::joins::Joins;
use crate::mounts;
use crate::moves::Moves;
use crate::network_status::NetworkStatus;
use crate::nri::Carrier;
use crate::paths::Paths;
use crate::prometheus::Calls;
use crate::reconcile;
use crate::record::Store;
use crate::serve::serve;
use crate::spec::HostFacts;
use crate::state::{Index, blocking};

/// How long calls under way may take to end when the daemon stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// How often the use of the disk is looked at.
const IMAGE_COLLECTION_INTERVAL: Duration = Duration::from_secs(300);
/// How often CNI is asked to free what belongs to nobody.
const NETWORK_COLLECTION_INTERVAL: Duration = Duration::from_secs(600);

/// The runtime daemon.
pub struct Runtime {
    core: Arc<Core>,
    streaming: Arc<StreamingServer>,
    listener: UnixListener,
    // Held for the daemon's life: two daemons on one directory would undo each other's work.
    lock: Flock<fs::File>,
}

impl Runtime {
    /// Opens state and brings the world in line with it: everything that a crash left half made is undone. When this
    /// returns clients can connect; they are answered once the daemon runs.
    pub async fn new(config: Config) -> Result<Runtime, Error> {
        check(&config)?;
        make_room()?;
        let paths = Paths::new(&config.data_dir, &config.run_dir);
        let lock = take_directories(&config, &paths)?;
        let mounts_below = set_apart(&config, &paths);
        let records = Arc::new(Store::open(&paths.records())?);
        let images = ImageStore::open(&paths.images(), registries(&config)).await?;
        let cni =
            CniClient::new(config.cni_conf_dir.clone(), config.cni_bin_dirs.clone(), config.cni_cache_dir.clone())
                .with_timeout(config.cni_timeout);
        let (image_directory, driver) = (paths.images(), config.cgroup_driver);
        let looked = move || {
            let host = host::facts(&image_directory)?;
            Ok(HostFacts { systemd_cgroups: groups::by_systemd(driver, host.cgroup_v2)?, ..host })
        };
        let core = Arc::new(Core {
            host: blocking("the host", looked).await?,
            boot_id: host::boot_id()?,
            paths,
            mounts_below,
            records,
            index: Index::default(),
            joins: Joins::default(),
            moves: Moves::default(),
            network_status: NetworkStatus::default(),
            events: Events::default(),
            calls: Calls::default(),
            images,
            cni,
            network_gate: tokio::sync::RwLock::new(()),
            plugins: Plugins::new(config.plugins.clone()),
            streaming: std::sync::OnceLock::new(),
            shutdown: CancellationToken::new(),
            config,
        });
        let address = core.config.streaming_listen;
        let backend = Arc::new(Streams { core: Arc::downgrade(&core) });
        let streaming = StreamingServer::bind(address, backend)
            .await
            .map_err(|source| Error::Streaming { address, source })
            .map(Arc::new)?;
        let _ = core.streaming.set(streaming.clone());
        reconcile::reconcile(&core).await?;
        // Before the first request, so that installed plugins see every pod.
        core.plugins.start(Carrier::new(&core), core.shutdown.clone()).await;
        let listener = listen(&core.config.socket)?;
        Ok(Runtime { core, streaming, listener, lock })
    }

    /// Serves until `shutdown`. Containers go on without the daemon.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Runtime { core, streaming, listener, lock } = self;
        let stop = core.shutdown.clone();
        let _stop_on_return = stop.clone().drop_guard();
        let socket = core.config.socket.clone();
        let address = streaming.local_addr();
        tracing::info!(socket = %socket.display(), streaming = %address, "runtime serving");

        let streams = tokio::spawn(streaming.run(stop.clone()));
        tokio::spawn(collect_networks(core.clone(), stop.clone()));
        if let Some(thresholds) = core.config.image_thresholds {
            tokio::spawn(collect_images(core.clone(), thresholds, stop.clone()));
        }
        let serving = serve(core.clone(), listener, stop.clone());
        let served = async {
            tokio::select! {
                () = serving => {}
                () = async { stop.cancelled().await; tokio::time::sleep(DRAIN_LIMIT).await } => {}
            }
        };
        let streamed = async {
            match streams.await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(source)) => Err(Error::Streaming { address, source }),
                Err(_) => Err(Error::Worker { operation: "the streaming server" }),
            }
        };
        tokio::pin!(served, streamed);
        let result = tokio::select! {
            () = &mut served => Ok(()),
            result = &mut streamed => result,
            () = shutdown.cancelled() => Ok(()),
        };
        stop.cancel();
        if result.is_ok() {
            let _ = tokio::join!(served, tokio::time::timeout(DRAIN_LIMIT, streamed));
        }
        let _ = tokio::time::timeout(DRAIN_LIMIT, core.plugins.shut_down()).await;
        let _ = fs::remove_file(&socket);
        // A pod's shim counts on it for as long as it lives.
        if has_no_pods(&core.paths)
            && let Some(Err(error)) = core.mounts_below.as_deref().map(mounts::give_up_apart)
        {
            tracing::warn!(error = %error.full_message(), "the run directory stays a mount");
        }
        drop(lock);
        tracing::info!("runtime stopped; containers go on");
        result
    }
}

fn check(config: &Config) -> Result<(), Error> {
    let paths = [
        ("socket", &config.socket),
        ("data_dir", &config.data_dir),
        ("run_dir", &config.run_dir),
        ("shim_binary", &config.shim_binary),
        ("cni_conf_dir", &config.cni_conf_dir),
        ("cni_cache_dir", &config.cni_cache_dir),
        ("plugins.plugin_dir", &config.plugins.plugin_dir),
        ("plugins.plugin_config_dir", &config.plugins.plugin_config_dir),
    ];
    let more = config.cni_bin_dirs.iter().map(|path| ("cni_bin_dirs", path));
    let more = more.chain(config.plugins.socket.iter().map(|path| ("plugins.socket", path)));
    for (field, path) in paths.into_iter().chain(more) {
        if !path.is_absolute() {
            return Err(Error::Configuration { field, problem: format!("{} is not an absolute path", path.display()) });
        }
    }
    if let Some(thresholds) = config.image_thresholds
        && !(thresholds.low_percent < thresholds.high_percent && thresholds.high_percent <= 100)
    {
        let problem = "the low threshold has to be below the high one, which is at most 100".to_owned();
        return Err(Error::Configuration { field: "image_thresholds", problem });
    }
    let group = config.cgroup_root.trim_matches('/');
    if group.is_empty() || group.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::Configuration {
            field: "cgroup_root",
            problem: format!("{:?} is not a plain path", config.cgroup_root),
        });
    }
    if !config.shim_binary.is_file() {
        let problem = format!("{} does not exist", config.shim_binary.display());
        return Err(Error::Configuration { field: "shim_binary", problem });
    }
    Ok(())
}

/// In a container with a cgroup namespace of its own there is none for groups until its processes have moved.
fn make_room() -> Result<(), Error> {
    let moved = oarlock_cgroup::make_room().map_err(|source| Error::Cgroup {
        operation: "make room below",
        group: "/".to_owned(),
        source,
    })?;
    if moved {
        tracing::info!("the processes of this container are in the control group `init` now, beside those of pods");
    }
    Ok(())
}

/// Makes the directories, readable by root alone, and locks them.
fn take_directories(config: &Config, paths: &Paths) -> Result<Flock<fs::File>, Error> {
    for directory in [&config.data_dir, &config.run_dir] {
        fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    }
    can_hold_layers(&config.data_dir)?;
    for directory in [paths.records(), paths.volumes(), paths.sandboxes(), paths.containers(), paths.engine()] {
        fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o711))
            .map_err(Error::io("change the mode of", &directory))?;
    }
    let path = config.data_dir.join("runtime.lock");
    let file = fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&path)
        .map_err(Error::io("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => {
            let problem = format!("another runtime uses {}", config.data_dir.display());
            Error::Configuration { field: "data_dir", problem }
        }
        errno => Error::io("lock", path)(errno.into()),
    })
}

/// Takes away the mount by which the run directory shows itself, unless something is mounted below it. For a node that is taken apart.
pub fn give_up_run_directory(run_dir: &Path) -> Result<(), Error> {
    match fs::canonicalize(run_dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        resolved => mounts::give_up_apart(&resolved.map_err(Error::io("look at", run_dir))?),
    }
}

fn has_no_pods(paths: &Paths) -> bool {
    let is_empty = |directory: PathBuf| fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
    is_empty(paths.sandboxes()) && is_empty(paths.containers())
}

/// Makes the run directory a mount of its own while it is empty. Nothing depends on it but speed.
fn set_apart(config: &Config, paths: &Paths) -> Option<PathBuf> {
    match mounts::set_apart(&config.run_dir, has_no_pods(paths)) {
        Ok(point) => point,
        Err(error) => {
            tracing::warn!(error = %error.full_message(), "the run directory is no mount of its own; many pods start slower");
            None
        }
    }
}

/// The kernel does not write to an overlay through another, and a container's root file system is one.
fn can_hold_layers(data_dir: &Path) -> Result<(), Error> {
    let kind = statfs(data_dir).map_err(|errno| Error::io("look at", data_dir)(errno.into()))?.filesystem_type();
    if kind != OVERLAYFS_SUPER_MAGIC {
        return Ok(());
    }
    let problem = format!(
        "{} is on an overlay file system, as in a container: put a volume or another file system there",
        data_dir.display()
    );
    Err(Error::Configuration { field: "data_dir", problem })
}

fn registries(config: &Config) -> RegistryConfig {
    let mirrors = config.registries.mirrors.iter();
    RegistryConfig {
        mirrors: mirrors
            .map(|(registry, endpoints)| MirrorRule { registry: registry.clone(), endpoints: endpoints.clone() })
            .collect(),
        hosts_dirs: config.registries.hosts_dirs.clone(),
        plain_http: config.registries.plain_http.clone(),
        // No registry may have it: what was brought by hand is not collected to save space.
        pin_imported: true,
        ca_files: config.registries.certificate_authorities.clone(),
        credentials: config.registries.credentials.clone(),
        pinned: Some(config.pause_image.clone()).filter(|image| !image.is_empty()).into_iter().collect(),
    }
}

/// Binds the socket under another name first, so that it never can be reached with a wider mode than 0600.
fn listen(socket: &Path) -> Result<UnixListener, Error> {
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    }
    let partial = socket.with_extension("binding");
    let _ = fs::remove_file(&partial);
    let bind = || {
        let listener = StdListener::bind(&partial)?;
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o600))?;
        fs::rename(&partial, socket)?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    };
    bind().map_err(|source| Error::Serve { path: socket.to_owned(), source: source.into() })
}

/// Removes unused images while the disk is too full.
async fn collect_images(core: Arc<Core>, thresholds: ImageThresholds, stop: CancellationToken) {
    loop {
        match core.images.make_room(thresholds).await {
            Ok(pruned) if pruned.images.is_empty() => {}
            Ok(pruned) => {
                let (images, freed_bytes) = (pruned.images.len(), pruned.freed_bytes);
                tracing::info!(images, freed_bytes, "unused images removed, because the disk is full");
            }
            Err(error) => tracing::warn!(%error, "unused images could not be removed"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(IMAGE_COLLECTION_INTERVAL) => {}
        }
    }
}

async fn collect_networks(core: Arc<Core>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = reconcile::collect_network(&core) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(NETWORK_COLLECTION_INTERVAL) => {}
        }
    }
}
