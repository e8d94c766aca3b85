//! The clients that speak to one place and to whoever it sends us on to: certificates, limits, proxies.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::{Certificate, Client, ClientBuilder, Identity, Url};

use super::endpoints::{Endpoint, is_loopback};
use super::hosts::invalid;
use crate::{ImageError, RegistryConfig};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const READ_LIMIT: Duration = Duration::from_secs(60);
const CERTIFICATES_BYTES_MAX: u64 = 4 << 20;
const USER_AGENT: &str = concat!("oarlock/", env!("CARGO_PKG_VERSION"));

/// What is configured for a place is for its origin alone: others are shown no certificate of ours and must have a
/// trusted one.
pub(super) struct Clients {
    own: Client,
    base: Option<Url>,
    authorities: Vec<Certificate>,
    endpoint: Endpoint,
    /// For other origins, and for those on loopback; made when they are needed.
    others: [OnceLock<Client>; 2],
}

impl Clients {
    pub(super) fn new(config: &RegistryConfig, endpoint: &Endpoint) -> Result<Clients, ImageError> {
        if !endpoint.tls.skip_verify {
            ensure_roots(endpoint)?;
        }
        let mut authorities = Vec::new();
        for path in config.ca_files.iter().chain(&endpoint.tls.authorities) {
            let found = Certificate::from_pem_bundle(&read(endpoint, "ca", path)?).unwrap_or_default();
            if found.is_empty() {
                return Err(wrong(endpoint, "ca", &format!("{} has no certificate in PEM form", path.display())));
            }
            authorities.extend(found);
        }
        let base = Url::parse(&endpoint.base).ok();
        let mut builder = builder(endpoint, &authorities, base.as_ref().is_some_and(is_near));
        builder = builder.tls_danger_accept_invalid_certs(endpoint.tls.skip_verify);
        if let Some(identity) = identity(endpoint)? {
            builder = builder.identity(identity);
        }
        let own = builder.build().map_err(|error| wrong(endpoint, "tls", &chain(&error)))?;
        let others = [OnceLock::new(), OnceLock::new()];
        Ok(Clients { own, base, authorities, endpoint: endpoint.clone(), others })
    }

    /// The one to reach an address with; Err with what to tell.
    pub(super) fn client(&self, url: &Url) -> Result<&Client, String> {
        if self.base.as_ref().is_some_and(|base| base.origin() == url.origin()) {
            return Ok(&self.own);
        }
        let near = is_near(url);
        let slot = &self.others[usize::from(near)];
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        ensure_roots(&self.endpoint).map_err(|error| error.to_string())?;
        let client = builder(&self.endpoint, &self.authorities, near).build().map_err(|error| chain(&error))?;
        Ok(slot.get_or_init(|| client))
    }
}

/// `near`: on this machine, where no proxy leads.
fn builder(endpoint: &Endpoint, authorities: &[Certificate], near: bool) -> ClientBuilder {
    let builder = Client::builder()
        .connect_timeout(endpoint.dial_limit.unwrap_or(CONNECT_LIMIT))
        .read_timeout(READ_LIMIT)
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .tls_certs_merge(authorities.iter().cloned());
    if near { builder.no_proxy() } else { builder }
}

fn is_near(url: &Url) -> bool {
    url.host_str().is_some_and(is_loopback)
}

/// The certificate to show, if one is configured.
fn identity(endpoint: &Endpoint) -> Result<Option<Identity>, ImageError> {
    let Some((certificate, key)) = &endpoint.tls.client else { return Ok(None) };
    let mut pem = read(endpoint, "client", certificate)?;
    if let Some(key) = key {
        pem.push(b'\n');
        pem.extend(read(endpoint, "client", key)?);
    }
    let identity = Identity::from_pem(&pem).map_err(|_| {
        let problem = format!("{} and its key are not a pair in PEM form", certificate.display());
        wrong(endpoint, "client", &problem)
    })?;
    Ok(Some(identity))
}

fn read(endpoint: &Endpoint, field: &str, path: &Path) -> Result<Vec<u8>, ImageError> {
    let failed = |problem: &str| wrong(endpoint, field, &format!("{}: {problem}", path.display()));
    let size = std::fs::metadata(path).map_err(|error| failed(&error.to_string()))?.len();
    if size > CERTIFICATES_BYTES_MAX {
        return Err(failed("larger than any file of certificates"));
    }
    std::fs::read(path).map_err(|error| failed(&error.to_string()))
}

pub(super) fn wrong(endpoint: &Endpoint, field: &str, problem: &str) -> ImageError {
    match &endpoint.file {
        Some(file) => invalid(file, field, &format!("{}: {problem}", endpoint.name)),
        None => ImageError::Registry { reference: endpoint.name.clone(), message: format!("{field}: {problem}") },
    }
}

/// The client cannot be made at all, not even for plain HTTP, on a machine that knows no certificate authority.
fn ensure_roots(endpoint: &Endpoint) -> Result<(), ImageError> {
    static FOUND: AtomicBool = AtomicBool::new(false);
    if FOUND.load(Ordering::Relaxed) || !rustls_native_certs::load_native_certs().certs.is_empty() {
        FOUND.store(true, Ordering::Relaxed);
        return Ok(());
    }
    let message = "this machine has no certificates of authorities; install the package ca-certificates".to_owned();
    Err(ImageError::Registry { reference: endpoint.name.clone(), message })
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
