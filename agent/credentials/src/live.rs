//! [`LiveClient`]: a client of the API whose certificate can be changed while it is used. Requests under way end on the connection
//! that they began on; new ones go with the new certificate.

use std::sync::Arc;

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::client::Body;
use serde_json::json;

use crate::store::Current;

/// A client with an identity that changes.
pub struct LiveClient {
    /// Where the server is and how it is known; without an identity.
    config: kube::Config,
    current: ArcSwap<kube::Client>,
}

/// The configuration with this identity.
pub(crate) fn with_identity(config: &kube::Config, identity: &Current) -> Result<kube::Config, kube::Error> {
    let (certificate, key) = identity.parts();
    let auth = json!({
        "client-certificate-data": STANDARD.encode(certificate),
        "client-key-data": STANDARD.encode(key),
    });
    let mut config = config.clone();
    config.auth_info = serde_json::from_value(auth).map_err(kube::Error::SerdeError)?;
    Ok(config)
}

impl LiveClient {
    /// Begins with `first`, whatever its identity is.
    pub fn new(config: kube::Config, first: kube::Client) -> Arc<Self> {
        Arc::new(Self { config, current: ArcSwap::from_pointee(first) })
    }

    /// A client with the identity, for the same server.
    pub fn client_as(config: &kube::Config, identity: &Current) -> Result<kube::Client, kube::Error> {
        crate::client(with_identity(config, identity)?)
    }

    /// From now on requests are made with this identity.
    pub fn change(&self, identity: &Current) -> Result<(), kube::Error> {
        self.current.store(Arc::new(Self::client_as(&self.config, identity)?));
        Ok(())
    }

    /// A client that follows every change.
    pub fn client(self: &Arc<Self>) -> kube::Client {
        let live = self.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let client = live.current.load_full();
            async move { client.send(request).await }
        });
        kube::Client::new(service, self.config.default_namespace.clone())
    }
}
