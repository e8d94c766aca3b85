//! Which permission on `nodes` a request needs. Pure.

use http::Method;

/// A verb and the subresources of which one is enough, narrowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Permission {
    pub verb: &'static str,
    pub subresources: Vec<&'static str>,
}

/// What a path needs. Whatever runs or reaches into a container needs `create`, also by GET: a WebSocket upgrade is a GET,
/// and being allowed to read must not be being allowed to run.
pub(crate) fn needed(method: &Method, path: &str) -> Permission {
    let first = path.split('/').find(|part| !part.is_empty()).unwrap_or_default();
    let subresources = match first {
        "stats" => vec!["stats"],
        "metrics" => vec!["metrics"],
        "logs" => vec!["log"],
        "checkpoint" => vec!["checkpoint"],
        "pods" | "runningpods" => vec!["pods", "proxy"],
        "healthz" => vec!["healthz", "proxy"],
        "configz" => vec!["configz", "proxy"],
        _ => vec!["proxy"],
    };
    let reaches_in = matches!(first, "exec" | "attach" | "run" | "portForward");
    let verb = match *method {
        _ if reaches_in => "create",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    };
    Permission { verb, subresources }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_its_permission() {
        let cases: &[(Method, &str, &str, &[&str])] = &[
            (Method::GET, "/pods", "get", &["pods", "proxy"]),
            (Method::GET, "/runningpods/", "get", &["pods", "proxy"]),
            (Method::GET, "/healthz/ping", "get", &["healthz", "proxy"]),
            (Method::GET, "/configz", "get", &["configz", "proxy"]),
            (Method::GET, "/stats/summary", "get", &["stats"]),
            (Method::GET, "/metrics", "get", &["metrics"]),
            (Method::GET, "/metrics/cadvisor", "get", &["metrics"]),
            (Method::GET, "/logs/x", "get", &["log"]),
            (Method::GET, "/containerLogs/a/b/c", "get", &["proxy"]),
            (Method::POST, "/checkpoint/a/b/c", "create", &["checkpoint"]),
            (Method::GET, "/exec/a/b/c", "create", &["proxy"]),
            (Method::POST, "/exec/a/b/c", "create", &["proxy"]),
            (Method::GET, "/attach/a/b/c", "create", &["proxy"]),
            (Method::GET, "/portForward/a/b", "create", &["proxy"]),
            (Method::POST, "/run/a/b/c", "create", &["proxy"]),
            (Method::GET, "//exec/a/b/c", "create", &["proxy"]),
            (Method::GET, "/podsx", "get", &["proxy"]),
            (Method::DELETE, "/anything", "delete", &["proxy"]),
            (Method::OPTIONS, "/", "get", &["proxy"]),
        ];
        for (method, path, verb, subresources) in cases {
            let permission = needed(method, path);
            assert_eq!(
                (permission.verb, permission.subresources.as_slice()),
                (*verb, *subresources),
                "{method} {path}"
            );
        }
    }
}
