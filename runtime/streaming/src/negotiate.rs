//! Which protocol a request asks for. Pure.

use http::HeaderMap;
use http::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE};

use crate::status::Version;

pub(crate) const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
pub(crate) const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
pub(crate) const PORT_FORWARD: &str = "portforward.k8s.io";
/// In a WebSocket subprotocol: what follows is spoken over SPDY inside binary messages.
const TUNNEL_PREFIX: &str = "SPDY/3.1+";

/// Remote command over SPDY, best first.
const SPDY_VERSIONS: [(&str, Version); 4] = [
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

/// How WebSocket messages carry channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Binary,
    Base64,
}

const WEBSOCKET_VERSIONS: [(&str, Version, Encoding); 5] = [
    ("v5.channel.k8s.io", Version::V5, Encoding::Binary),
    ("v4.channel.k8s.io", Version::V4, Encoding::Binary),
    ("v4.base64.channel.k8s.io", Version::V4, Encoding::Base64),
    ("channel.k8s.io", Version::V1, Encoding::Binary),
    ("base64.channel.k8s.io", Version::V1, Encoding::Base64),
];

/// What an upgrade request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    Spdy,
    WebSocket,
}

/// Why there is no protocol to speak.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NegotiationError {
    #[error("unable to upgrade: missing upgrade headers in request")]
    NotAnUpgrade,
    #[error("unable to upgrade: unable to negotiate protocol: client supports {client:?}, server accepts {server:?}")]
    NoCommonProtocol { client: Vec<String>, server: Vec<&'static str> },
    #[error("unable to upgrade: bad WebSocket handshake")]
    BadWebSocket,
}

pub(crate) fn upgrade(headers: &HeaderMap) -> Result<Upgrade, NegotiationError> {
    let connection = list(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let wanted = list(headers, &UPGRADE).find_map(|token| match token.to_ascii_lowercase().as_str() {
        "websocket" => Some(Upgrade::WebSocket),
        "spdy/3.1" => Some(Upgrade::Spdy),
        _ => None,
    });
    wanted.filter(|_| connection).ok_or(NegotiationError::NotAnUpgrade)
}

/// The remote command version over SPDY with the name to answer. A client that names none speaks v1 without a name.
pub(crate) fn spdy_command(headers: &HeaderMap) -> Result<(Version, Option<&'static str>), NegotiationError> {
    let client: Vec<&str> = list(headers, &STREAM_PROTOCOL).collect();
    if client.is_empty() {
        return Ok((Version::V1, None));
    }
    let common = client.iter().find_map(|name| SPDY_VERSIONS.iter().find(|(known, _)| known == name));
    common.map(|(name, version)| (*version, Some(*name))).ok_or_else(|| NegotiationError::NoCommonProtocol {
        client: client.iter().map(|name| name.to_string()).collect(),
        server: SPDY_VERSIONS.iter().map(|(name, _)| *name).collect(),
    })
}

pub(crate) fn spdy_port_forward(headers: &HeaderMap) -> Result<Option<&'static str>, NegotiationError> {
    let client: Vec<&str> = list(headers, &STREAM_PROTOCOL).collect();
    if client.is_empty() {
        return Ok(None);
    }
    if client.contains(&PORT_FORWARD) {
        return Ok(Some(PORT_FORWARD));
    }
    let client = client.iter().map(|name| name.to_string()).collect();
    Err(NegotiationError::NoCommonProtocol { client, server: vec![PORT_FORWARD] })
}

/// The remote command version over WebSocket; a client that names none speaks v1 in binary.
pub(crate) fn websocket_command(
    headers: &HeaderMap,
) -> Result<(Version, Encoding, Option<&'static str>), NegotiationError> {
    let client: Vec<&str> = list(headers, &SEC_WEBSOCKET_PROTOCOL).collect();
    if client.is_empty() {
        return Ok((Version::V1, Encoding::Binary, None));
    }
    let common = client.iter().find_map(|name| WEBSOCKET_VERSIONS.iter().find(|(known, ..)| known == name));
    common.map(|(name, version, encoding)| (*version, *encoding, Some(*name))).ok_or_else(|| {
        NegotiationError::NoCommonProtocol {
            client: client.iter().map(|name| name.to_string()).collect(),
            server: WEBSOCKET_VERSIONS.iter().map(|(name, ..)| *name).collect(),
        }
    })
}

/// The tunnelling subprotocol that the client offered, as it spelled it.
pub(crate) fn websocket_port_forward(headers: &HeaderMap) -> Result<String, NegotiationError> {
    let client: Vec<&str> = list(headers, &SEC_WEBSOCKET_PROTOCOL).collect();
    let tunnel = client.iter().find(|name| {
        name.strip_prefix(TUNNEL_PREFIX).is_some_and(|inner| inner == PORT_FORWARD || inner == "v2.portforward.k8s.io")
    });
    tunnel.map(|name| name.to_string()).ok_or_else(|| NegotiationError::NoCommonProtocol {
        client: client.iter().map(|name| name.to_string()).collect(),
        server: vec!["SPDY/3.1+portforward.k8s.io"],
    })
}

/// The key of a WebSocket handshake.
pub(crate) fn websocket_key(headers: &HeaderMap) -> Result<&[u8], NegotiationError> {
    let version = headers.get(SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    let key = headers.get(SEC_WEBSOCKET_KEY).map(|key| key.as_bytes());
    key.filter(|_| version).ok_or(NegotiationError::BadWebSocket)
}

/// The items of a header that may come several times and with commas.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|item| !item.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, http::HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn upgrades_are_recognised_whatever_their_case() {
        let of = |connection, upgrade| super::upgrade(&headers(&[("connection", connection), ("upgrade", upgrade)]));
        assert_eq!(of("Upgrade", "SPDY/3.1"), Ok(Upgrade::Spdy));
        assert_eq!(of("keep-alive, upgrade", "WebSocket"), Ok(Upgrade::WebSocket));
        assert_eq!(of("close", "websocket"), Err(NegotiationError::NotAnUpgrade));
        assert_eq!(of("upgrade", "h2c"), Err(NegotiationError::NotAnUpgrade));
    }

    #[test]
    fn the_clients_first_known_version_is_spoken() {
        let name = "x-stream-protocol-version";
        let several = headers(&[(name, "v9.channel.k8s.io"), (name, "v4.channel.k8s.io"), (name, "channel.k8s.io")]);
        assert_eq!(spdy_command(&several), Ok((Version::V4, Some("v4.channel.k8s.io"))));
        let commas = headers(&[(name, "v3.channel.k8s.io, v2.channel.k8s.io")]);
        assert_eq!(spdy_command(&commas), Ok((Version::V3, Some("v3.channel.k8s.io"))));
        assert_eq!(spdy_command(&headers(&[])), Ok((Version::V1, None)));
        assert!(spdy_command(&headers(&[(name, "v9.channel.k8s.io")])).is_err());
    }

    #[test]
    fn websocket_subprotocols_are_chosen() {
        let name = "sec-websocket-protocol";
        let v5 = headers(&[(name, "v5.channel.k8s.io")]);
        assert_eq!(websocket_command(&v5), Ok((Version::V5, Encoding::Binary, Some("v5.channel.k8s.io"))));
        let base64 = headers(&[(name, "base64.channel.k8s.io")]);
        assert_eq!(websocket_command(&base64), Ok((Version::V1, Encoding::Base64, Some("base64.channel.k8s.io"))));
        let tunnel = headers(&[(name, "SPDY/3.1+portforward.k8s.io")]);
        assert_eq!(websocket_port_forward(&tunnel).unwrap(), "SPDY/3.1+portforward.k8s.io");
        assert!(websocket_port_forward(&v5).is_err());
    }
}
