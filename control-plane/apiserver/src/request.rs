//! What a request is about: verb, resource and parameters, read from method, path and query.

use std::borrow::Cow;

use http::Method;

use crate::error::{ApiError, ApiResult};

/// Query parameters in order, decoded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(raw: &str) -> Query {
        let pairs = raw.split('&').filter(|part| !part.is_empty()).map(|part| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            (decode(key, true), decode(value, true))
        });
        Query(pairs.collect())
    }

    /// The first value of a parameter; empty counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| &**value).filter(|value| !value.is_empty())
    }

    pub(crate) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(name, _)| name == key).map(|(_, value)| &**value)
    }

    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }

    /// `true` and `1` are true, as is a bare key.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .is_some_and(|(_, value)| matches!(&**value, "" | "1" | "true" | "True"))
    }

    /// A number, or a 400 that names the parameter.
    pub(crate) fn number(&self, key: &str) -> ApiResult<Option<i64>> {
        self.get(key)
            .map(|text| {
                text.parse().map_err(|_| {
                    ApiError::bad_request(format!("invalid value {text:?} for query parameter {key:?}: not an integer"))
                })
            })
            .transpose()
    }
}

/// One `/api/...` or `/apis/...` path below a group version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResourcePath {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: Option<String>,
    pub(crate) resource: String,
    pub(crate) name: Option<String>,
    pub(crate) subresource: Option<String>,
    /// What follows a `proxy` subresource, as sent, with its leading slash.
    pub(crate) tail: String,
}

/// A parsed request line.
#[derive(Debug, Clone)]
pub(crate) struct RequestInfo {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: Query,
    pub(crate) raw_query: String,
    /// `get`, `list`, `watch` … for resources, the lower-case method for other paths.
    pub(crate) verb: &'static str,
    pub(crate) resource: Option<ResourcePath>,
}

impl RequestInfo {
    pub(crate) fn parse(method: &Method, path: &str, raw_query: &str) -> RequestInfo {
        let query = Query::parse(raw_query);
        let (resource, legacy_watch) = parse_resource(path);
        let verb = match &resource {
            Some(resource) => resource_verb(method, resource, &query, legacy_watch),
            None => plain_verb(method),
        };
        let mut info = RequestInfo {
            method: method.clone(),
            path: path.to_owned(),
            query,
            raw_query: raw_query.to_owned(),
            verb,
            resource,
        };
        info.name_from_field_selector();
        info
    }

    /// A list or watch of one object by name counts as naming it, for authorization.
    fn name_from_field_selector(&mut self) {
        if !matches!(self.verb, "list" | "watch" | "deletecollection") {
            return;
        }
        let wanted = self.query.get("fieldSelector").and_then(|selector| {
            selector.split(',').find_map(|part| {
                let rest = part.strip_prefix("metadata.name=")?;
                Some(rest.strip_prefix('=').unwrap_or(rest).to_owned())
            })
        });
        if let (Some(resource), Some(name)) = (&mut self.resource, wanted)
            && resource.name.is_none()
        {
            resource.name = Some(name);
        }
    }

    pub(crate) fn is_dry_run(&self) -> ApiResult<bool> {
        let mut dry = false;
        for value in self.query.all("dryRun") {
            match value {
                "All" => dry = true,
                "" => {}
                other => {
                    return Err(ApiError::new(
                        http::StatusCode::UNPROCESSABLE_ENTITY,
                        "Invalid",
                        format!(" \"\" is invalid: dryRun: Unsupported value: {other:?}: supported values: \"All\""),
                    ));
                }
            }
        }
        Ok(dry)
    }
}

fn plain_verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => "unknown",
    }
}

fn resource_verb(method: &Method, resource: &ResourcePath, query: &Query, legacy_watch: bool) -> &'static str {
    let named = resource.name.is_some();
    match *method {
        Method::GET | Method::HEAD if resource.subresource.is_some() => "get",
        Method::GET | Method::HEAD if legacy_watch || query.flag("watch") => "watch",
        Method::GET | Method::HEAD if named => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => "unknown",
    }
}

/// The resource a path names, and whether it has the old `/watch/` prefix.
fn parse_resource(path: &str) -> (Option<ResourcePath>, bool) {
    let trimmed = path.trim_start_matches('/');
    let mut raw: Vec<&str> = trimmed.trim_end_matches('/').split('/').collect();
    let (group, version, used) = match raw[..] {
        ["api", version, _, ..] => ("", version, 2),
        ["apis", group, version, _, ..] => (group, version, 3),
        _ => return (None, false),
    };
    let mut resource =
        ResourcePath { group: decode(group, false), version: decode(version, false), ..Default::default() };
    raw.drain(..used);
    let legacy_watch = raw.first() == Some(&"watch") && raw.len() > 1;
    if legacy_watch {
        raw.remove(0);
    }
    let mut rest = &raw[..];
    if rest[0] == "namespaces" && rest.len() >= 2 {
        resource.namespace = Some(decode(rest[1], false));
        let own_subresource = rest.len() >= 3 && matches!(rest[2], "status" | "finalize");
        if rest.len() > 2 && !own_subresource {
            rest = &rest[2..];
        }
    }
    resource.resource = decode(rest[0], false);
    resource.name = rest.get(1).map(|name| decode(name, false));
    resource.subresource = rest.get(2).map(|name| decode(name, false));
    if resource.subresource.as_deref() == Some("proxy") {
        // Kept as sent: the backend sees the same escapes, and a trailing slash matters to it.
        let skip = trimmed.len()
            - trimmed.split('/').skip(used + usize::from(legacy_watch)).collect::<Vec<_>>().join("/").len();
        let consumed = raw.len() - rest.len() + 3;
        let tail: Vec<&str> = trimmed[skip..].splitn(consumed + 1, '/').collect();
        resource.tail = tail.get(consumed).map(|tail| format!("/{tail}")).unwrap_or_default();
    } else if rest.len() > 3 {
        // No resource has a path below a subresource; make sure that none is found.
        resource.subresource = Some(rest[2..].join("/"));
    }
    (Some(resource), legacy_watch)
}

/// Percent-decodes; `plus` also turns `+` into a space, as in a query.
pub(crate) fn decode(text: &str, plus: bool) -> String {
    let escaped = text.contains('%') || (plus && text.contains('+'));
    if !escaped {
        return text.to_owned();
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = |offset: usize| bytes.get(at + offset).and_then(|digit| (*digit as char).to_digit(16));
        match (bytes[at], hex(1), hex(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            (b'+', ..) if plus => {
                out.push(b' ');
                at += 1;
            }
            (byte, ..) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Percent-encodes what may not stand in a query value or a path segment.
pub(crate) fn encode(text: &str) -> Cow<'_, str> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    if text.bytes().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        if plain(byte) {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: Method, uri: &str) -> RequestInfo {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        RequestInfo::parse(&method, path, query)
    }

    fn resource(uri: &str) -> ResourcePath {
        info(Method::GET, uri).resource.expect("a resource path")
    }

    #[test]
    fn namespaces_are_both_a_resource_and_a_prefix() {
        let namespace = resource("/api/v1/namespaces/blue");
        assert_eq!((&*namespace.resource, namespace.name.as_deref()), ("namespaces", Some("blue")));
        let finalize = resource("/api/v1/namespaces/blue/finalize");
        assert_eq!((&*finalize.resource, finalize.subresource.as_deref()), ("namespaces", Some("finalize")));
        let pods = resource("/api/v1/namespaces/blue/pods");
        assert_eq!((&*pods.resource, pods.namespace.as_deref(), pods.name), ("pods", Some("blue"), None));
        let log = resource("/api/v1/namespaces/blue/pods/web/log");
        assert_eq!((log.name.as_deref(), log.subresource.as_deref()), (Some("web"), Some("log")));
    }

    #[test]
    fn verbs_follow_method_name_and_watch() {
        assert_eq!(info(Method::GET, "/apis/apps/v1/deployments").verb, "list");
        assert_eq!(info(Method::GET, "/apis/apps/v1/deployments?watch=true").verb, "watch");
        assert_eq!(info(Method::GET, "/apis/apps/v1/namespaces/a/deployments/b").verb, "get");
        assert_eq!(info(Method::DELETE, "/apis/apps/v1/namespaces/a/deployments").verb, "deletecollection");
        assert_eq!(info(Method::GET, "/api/v1/watch/pods").verb, "watch");
        assert_eq!(info(Method::GET, "/apis").verb, "get");
        assert!(info(Method::GET, "/apis/apps/v1").resource.is_none());
    }

    #[test]
    fn a_field_selector_on_the_name_names_the_object() {
        let named = info(Method::GET, "/api/v1/namespaces/a/pods?watch=1&fieldSelector=metadata.name%3Dweb");
        assert_eq!(named.resource.and_then(|resource| resource.name).as_deref(), Some("web"));
    }

    proptest::proptest! {
        #[test]
        fn no_request_line_is_too_odd(path in "/(api|apis)(/[a-z%/.:]{0,12}){0,6}", query in "[a-z%=&+,]{0,40}") {
            let parsed = RequestInfo::parse(&Method::GET, &path, &query);
            if let Some(resource) = parsed.resource {
                proptest::prop_assert!(resource.tail.is_empty() || resource.tail.starts_with('/'));
            }
        }

        #[test]
        fn encoding_is_undone_by_decoding(text in "\\PC{0,40}") {
            proptest::prop_assert_eq!(decode(&encode(&text), true), text);
        }
    }

    #[test]
    fn a_proxy_tail_is_kept_as_sent() {
        let proxied = resource("/api/v1/namespaces/a/services/http:web:80/proxy/x%2Fy/");
        assert_eq!((proxied.name.as_deref(), &*proxied.tail), (Some("http:web:80"), "/x%2Fy/"));
        assert_eq!(resource("/api/v1/nodes/n1/proxy").tail, "");
        assert_eq!(resource("/api/v1/nodes/n1/proxy/metrics").tail, "/metrics");
    }
}
