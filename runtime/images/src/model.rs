//! The types callers see.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;

/// An image in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Digest of the configuration, `sha256:…`.
    pub id: String,
    /// `docker.io/library/busybox:latest` and the like.
    pub repo_tags: Vec<String>,
    /// `docker.io/library/busybox@sha256:…`
    pub repo_digests: Vec<String>,
    /// Compressed layers and configuration together.
    pub size_bytes: u64,
    /// What to run, as whom, with what environment.
    pub config: ImageConfiguration,
    /// Never collected and not removed without being unpinned.
    pub pinned: bool,
    /// Chain ids of the layers, lowest first.
    pub chain_ids: Vec<String>,
    /// When a container was last made of it, or left it, or it came.
    pub last_used: SystemTime,
}

/// Credentials for a registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Auth {
    /// User name and password.
    Basic { username: String, password: String },
    /// A token to be sent as it is, to the registry itself only.
    Bearer(String),
    /// A token that a token server gives others for (OAuth2, `refresh_token`).
    Identity(String),
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Auth::Basic { username, .. } => f.debug_struct("Basic").field("username", username).finish_non_exhaustive(),
            Auth::Bearer(_) => f.write_str("Bearer(..)"),
            Auth::Identity(_) => f.write_str("Identity(..)"),
        }
    }
}

/// Credentials for one pull.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Credential {
    pub auth: Auth,
    /// The only host (an address or `host[:port]`) that may be shown them; None leaves it to the configuration.
    pub server: Option<String>,
}

impl From<Auth> for Credential {
    fn from(auth: Auth) -> Credential {
        Credential { auth, server: None }
    }
}

/// How registries are reached.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Where to ask instead, in order, before what `hosts_dirs` have for a registry and before the registry itself.
    pub mirrors: Vec<MirrorRule>,
    /// Directories with a `hosts.toml` for each registry, in containerd's form; the first that has one for a registry, or
    /// a `_default`, decides. Read at each pull.
    pub hosts_dirs: Vec<PathBuf>,
    /// Registries (`host` or `host:port`) spoken to by plain HTTP. Loopback addresses always may be.
    pub plain_http: Vec<String>,
    /// PEM files of further certificate authorities.
    pub ca_files: Vec<PathBuf>,
    /// A file of credentials in docker's form (`auths`), for pulls that bring none.
    pub credentials: Option<PathBuf>,
    /// Store images from archives as pinned.
    pub pin_imported: bool,
    /// Image references that are pinned whenever they arrive.
    pub pinned: Vec<String>,
}

/// Mirrors of one registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorRule {
    /// The registry, such as `docker.io`, or `*`.
    pub registry: String,
    /// `host[:port]` of each mirror, first tried first; may carry `http://` or `https://`.
    pub endpoints: Vec<String>,
}

/// Layers for one container's overlay mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    /// Read-only layers, top first. Never empty.
    pub lower: Vec<PathBuf>,
    /// The container's own layer.
    pub upper: PathBuf,
    /// Overlay's work directory, on the same file system as `upper`.
    pub work: PathBuf,
}

/// Space taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

/// How far a pull or an import is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The layers to fetch are known.
    Layers { count: usize, bytes: u64 },
    /// Bytes of one layer so far.
    Fetched { digest: String, bytes: u64, of: u64 },
    /// A layer is on disk, ready for use.
    Unpacked { digest: String },
    /// An image is complete.
    Stored { reference: String, id: String },
}

/// Receives progress; called from several tasks, must not block.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;
