//! [`client`]: a client of the API that notices when the other end is gone.

use std::time::Duration;

use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ConfigExt};
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};

/// A connection on which nothing is heard is asked after so long whether it still is one, then so often, so many times. A
/// watch is such a connection: whoever restarted without telling, as after a power cut, would otherwise be waited for as
/// long as a watch lasts, which is five minutes.
const QUIET: Duration = Duration::from_secs(15);
const ASK_AGAIN: Duration = Duration::from_secs(5);
const QUESTIONS: u32 = 3;
/// What was sent and is not acknowledged for so long ends the connection.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(30);

/// A client for the server and the identity of `config`.
pub fn client(config: kube::Config) -> Result<kube::Client, kube::Error> {
    // What is between is asked by whom it is between.
    if config.proxy_url.is_some() {
        return kube::Client::try_from(config);
    }
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_keepalive(Some(QUIET));
    connector.set_keepalive_interval(Some(ASK_AGAIN));
    connector.set_keepalive_retries(Some(QUESTIONS));
    connector.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    // Over all of it, the greeting of TLS too: whoever accepts and says nothing is not waited for.
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(connector)?);
    connector.set_connect_timeout(Some(config.connect_timeout.unwrap_or(CONNECT)));
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let requests: Client<_, Body> = Client::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(requests);
    Ok(kube::Client::new(service, config.default_namespace))
}
