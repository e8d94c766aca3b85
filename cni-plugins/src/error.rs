//! What a plugin can fail with, and the error code that the specification has for it.

use std::io;
use std::path::PathBuf;

use ipnet::IpNet;
use oarlock_cni::types::{ErrorCode, ErrorObject};
use oarlock_cni_table::TableError;
use oarlock_netlink::NetlinkError;
use oarlock_netns::NetnsError;
use oarlock_nft::NftError;

pub type Result<T, E = PluginError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    #[error("cniVersion {0:?} is not supported")]
    Version(String),
    #[error("environment variable {variable}: {problem}")]
    Environment { variable: &'static str, problem: String },
    #[error("network configuration is not valid JSON")]
    Syntax(#[source] serde_json::Error),
    #[error("network configuration: field {field}: {problem}")]
    Config { field: String, problem: String },
    #[error("prevResult")]
    PrevResult(#[source] serde_json::Error),
    #[error("cannot read the network configuration")]
    Stdin(#[source] io::Error),
    #[error("cannot {operation} {}", path.display())]
    File { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("network namespace")]
    Namespace(#[from] NetnsError),
    #[error("network namespace {} does not exist", path.display())]
    NoNamespace { path: PathBuf },
    #[error("{what}")]
    Netlink { what: String, source: NetlinkError },
    #[error("{what}")]
    Nft { what: &'static str, source: NftError },
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("no address is left in {ranges}")]
    Exhausted { ranges: String },
    #[error("address {address} is taken by another container")]
    Taken { address: std::net::IpAddr },
    #[error("address {address} is in none of the network's ranges")]
    OutOfRange { address: std::net::IpAddr },
    #[error("link {name} exists already and is not a bridge")]
    NotABridge { name: String },
    #[error("bridge {name} has address {existing}, not {wanted}")]
    OtherAddress { name: String, existing: IpNet, wanted: IpNet },
    #[error("{name} of the container is no end of a pair whose other end is on the host")]
    NoPair { name: String },
    #[error("the container has a link {name} already")]
    LinkExists { name: String },
    #[error("host port {protocol}/{port} is taken by another container")]
    PortTaken { protocol: String, port: u16 },
    #[error("IPAM plugin {plugin} was not found in CNI_PATH")]
    NoIpam { plugin: String },
    #[error("IPAM plugin {plugin} failed: {}", error.msg)]
    Ipam { plugin: String, error: ErrorObject },
    #[error("IPAM plugin {plugin} returned no address")]
    NoAddress { plugin: String },
    #[error("macspoofchk needs nftables for bridges, which this kernel does not have")]
    NoSpoofCheck { source: Box<PluginError> },
    /// STATUS: ADD would fail. With `limited`, containers that are attached may have lost their connections too.
    #[error("ADD cannot be served: {}", source)]
    NotAvailable { limited: bool, source: Box<PluginError> },
    /// CHECK found something other than what ADD left.
    #[error("{0}")]
    Drift(String),
}

impl PluginError {
    pub fn config(field: impl Into<String>, problem: impl Into<String>) -> PluginError {
        PluginError::Config { field: field.into(), problem: problem.into() }
    }

    /// What fails in STATUS as the specification wants it told. Mistakes of the caller are what they are, and so is what a
    /// plugin says that was asked in turn.
    pub fn of_status(self) -> PluginError {
        match self {
            PluginError::Version(_)
            | PluginError::Environment { .. }
            | PluginError::Syntax(_)
            | PluginError::Config { .. }
            | PluginError::Ipam { .. }
            | PluginError::NotAvailable { .. } => self,
            other => PluginError::NotAvailable { limited: false, source: Box::new(other) },
        }
    }

    fn code(&self) -> u32 {
        const DRIFT: u32 = 100;
        const EXHAUSTED: u32 = 101;
        const TAKEN: u32 = 102;
        let code = match self {
            PluginError::Version(_) => ErrorCode::IncompatibleVersion,
            PluginError::Environment { .. } => ErrorCode::InvalidEnvironment,
            PluginError::Syntax(_) | PluginError::PrevResult(_) => ErrorCode::Decode,
            PluginError::Config { .. } | PluginError::NoIpam { .. } | PluginError::NoSpoofCheck { .. } => {
                ErrorCode::InvalidNetworkConfig
            }
            PluginError::Stdin(_) | PluginError::File { .. } | PluginError::Table(TableError::File { .. }) => {
                ErrorCode::Io
            }
            PluginError::NoNamespace { .. } => ErrorCode::UnknownContainer,
            PluginError::Ipam { error, .. } => return error.code,
            PluginError::NotAvailable { limited: false, .. } => ErrorCode::PluginNotAvailable,
            PluginError::NotAvailable { limited: true, .. } => ErrorCode::LimitedConnectivity,
            PluginError::Drift(_) => return DRIFT,
            PluginError::Exhausted { .. } => return EXHAUSTED,
            PluginError::Taken { .. } | PluginError::PortTaken { .. } | PluginError::LinkExists { .. } => return TAKEN,
            _ => ErrorCode::Internal,
        };
        code as u32
    }

    /// The error object for standard output; the chain of causes is its details.
    pub fn object(&self, version: &str) -> ErrorObject {
        let mut causes = Vec::new();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        if let PluginError::Ipam { error, .. } = self {
            causes.extend(Some(error.details.clone()).filter(|details| !details.is_empty()));
        }
        ErrorObject {
            cni_version: version.to_owned(),
            code: self.code(),
            msg: self.to_string(),
            details: causes.join(": "),
        }
    }
}

/// Adds to a netlink error what it was for.
pub trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for oarlock_netlink::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| PluginError::Netlink { what: what(), source })
    }
}
