//! Request paths and queries: decoding and the parameters of each endpoint. Pure.

use std::time::Duration;

use jiff::Timestamp;

use crate::backend::{ContainerRef, ExecRequest, PortForwardRequest};
use crate::logs::{LogOptions, Streams};

/// What a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    Healthz,
    Pods,
    RunningPods,
    Logs(ContainerRef),
    Exec(ContainerRef),
    Attach(ContainerRef),
    PortForward(ContainerRef),
    Run(ContainerRef),
    StatsSummary,
    Metrics,
    MetricsResource,
    MetricsCAdvisor,
    MetricsProbes,
    Configz,
    Checkpoint(ContainerRef),
}

impl Route {
    /// Whether the kubelet calls it a debugging handler, which it can do without.
    pub fn is_debugging(&self) -> bool {
        matches!(
            self,
            Route::Logs(_)
                | Route::Exec(_)
                | Route::Attach(_)
                | Route::Run(_)
                | Route::PortForward(_)
                | Route::RunningPods
        )
    }

    /// None when there is nothing at this path.
    pub fn of(path: &str) -> Option<Route> {
        let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(decode).collect::<Option<_>>()?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        Some(match parts.as_slice() {
            ["healthz"] | ["healthz", "ping" | "syncloop" | "log"] => Route::Healthz,
            ["pods"] => Route::Pods,
            ["runningpods"] => Route::RunningPods,
            ["containerLogs", rest @ ..] => Route::Logs(exact_container(rest)?),
            ["exec", rest @ ..] => Route::Exec(container(rest)?),
            ["attach", rest @ ..] => Route::Attach(container(rest)?),
            ["run", rest @ ..] => Route::Run(container(rest)?),
            ["portForward", namespace, pod] => Route::PortForward(reference(namespace, pod, None, "")),
            ["portForward", namespace, pod, uid] => Route::PortForward(reference(namespace, pod, Some(uid), "")),
            ["stats", "summary"] => Route::StatsSummary,
            ["metrics"] => Route::Metrics,
            ["metrics", "resource"] => Route::MetricsResource,
            ["metrics", "cadvisor"] => Route::MetricsCAdvisor,
            ["metrics", "probes"] => Route::MetricsProbes,
            ["configz"] => Route::Configz,
            ["checkpoint", rest @ ..] => Route::Checkpoint(exact_container(rest)?),
            _ => return None,
        })
    }
}

fn reference(namespace: &str, pod: &str, uid: Option<&str>, container: &str) -> ContainerRef {
    ContainerRef {
        namespace: namespace.to_string(),
        pod: pod.to_string(),
        pod_uid: uid.map(str::to_string),
        container: container.to_string(),
    }
}

fn exact_container(parts: &[&str]) -> Option<ContainerRef> {
    match parts {
        [namespace, pod, container] => Some(reference(namespace, pod, None, container)),
        _ => None,
    }
}

fn container(parts: &[&str]) -> Option<ContainerRef> {
    match parts {
        [namespace, pod, uid, container] => Some(reference(namespace, pod, Some(uid), container)),
        _ => exact_container(parts),
    }
}

/// The decoded pairs of a query.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Pairs that do not decode are left out.
    pub fn parse(query: &str) -> Query {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).filter_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(&name.replace('+', " "))?, decode(&value.replace('+', " "))?))
        });
        Query(pairs.collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(candidate, _)| candidate == name).map(|(_, value)| value.as_str())
    }

    pub fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
    }

    fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(candidate, _)| candidate == name).map(|(_, value)| value.clone()).collect()
    }

    fn number(&self, name: &str) -> Result<Option<i64>, String> {
        match self.get(name) {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| format!("invalid value {text:?} for {name}")),
        }
    }
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok())?;
            bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))?);
            rest = &tail[2..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// exec and attach: the kubelet's own names (`input`, `output`, `error`), and those of the API.
pub(crate) fn exec_request(target: ContainerRef, query: &Query) -> Result<ExecRequest, String> {
    let tty = query.flag("tty");
    let request = ExecRequest {
        target,
        command: query.all("command"),
        stdin: query.flag("input") || query.flag("stdin"),
        stdout: query.flag("output") || query.flag("stdout"),
        // A terminal has one output.
        stderr: (query.flag("error") || query.flag("stderr")) && !tty,
        tty,
    };
    if !request.stdin && !request.stdout && !request.stderr {
        return Err("you must specify at least 1 of stdin, stdout, stderr".to_string());
    }
    Ok(request)
}

pub(crate) fn run_request(target: ContainerRef, query: &Query) -> Result<ExecRequest, String> {
    let command: Vec<String> =
        query.get("cmd").unwrap_or_default().split(' ').filter(|part| !part.is_empty()).map(str::to_string).collect();
    if command.is_empty() {
        return Err("cmd is required".to_string());
    }
    Ok(ExecRequest { target, command, stdin: false, stdout: true, stderr: true, tty: false })
}

/// checkpoint: `timeout` in seconds, zero without any.
pub(crate) fn checkpoint_timeout(query: &Query) -> Result<Duration, String> {
    let seconds = query.number("timeout")?.unwrap_or(0);
    u64::try_from(seconds).map(Duration::from_secs).map_err(|_| format!("invalid value \"{seconds}\" for timeout"))
}

pub(crate) fn port_forward_request(target: ContainerRef, query: &Query) -> Result<PortForwardRequest, String> {
    let names = query.all("port").into_iter().chain(query.all("ports"));
    let mut ports = Vec::new();
    for text in names.flat_map(|value| value.split(',').map(str::to_string).collect::<Vec<_>>()) {
        match text.parse::<u16>() {
            Ok(port) if port > 0 => ports.push(port),
            _ => return Err(format!("invalid port {text:?}")),
        }
    }
    Ok(PortForwardRequest { target, ports })
}

/// The log options and whether the previous container is meant.
pub(crate) fn log_options(query: &Query, now: Timestamp) -> Result<(LogOptions, bool), String> {
    let non_negative = |name: &str, smallest: i64| match query.number(name)? {
        Some(value) if value < smallest => {
            Err(format!("{name}: Invalid value: {value}: must be greater than or equal to {smallest}"))
        }
        value => Ok(value),
    };
    let since_seconds = non_negative("sinceSeconds", 1)?;
    let since_time = match query.get("sinceTime").filter(|text| !text.is_empty()) {
        Some(text) => Some(text.parse::<Timestamp>().map_err(|_| format!("invalid sinceTime {text:?}"))?),
        None => None,
    };
    let since = match (since_seconds, since_time) {
        (Some(_), Some(_)) => return Err("at most one of `sinceTime` or `sinceSeconds` may be specified".to_string()),
        (Some(seconds), None) => now.checked_sub(jiff::SignedDuration::from_secs(seconds)).ok(),
        (None, time) => time,
    };
    let streams = match query.get("stream") {
        None | Some("" | "All") => Streams::All,
        Some("Stdout") => Streams::Stdout,
        Some("Stderr") => Streams::Stderr,
        Some(other) => return Err(format!("invalid stream {other:?}: must be All, Stdout or Stderr")),
    };
    let options = LogOptions {
        follow: query.flag("follow"),
        timestamps: query.flag("timestamps"),
        tail_lines: non_negative("tailLines", 0)?.map(i64::unsigned_abs),
        since,
        limit_bytes: non_negative("limitBytes", 1)?.map(i64::unsigned_abs),
        streams,
    };
    Ok((options, query.flag("previous")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_their_containers() {
        let full = reference("shop", "web", Some("u"), "c");
        assert_eq!(Route::of("/exec/shop/web/u/c"), Some(Route::Exec(full)));
        let short = reference("shop", "web", None, "c");
        assert_eq!(Route::of("/exec/shop/web/c/"), Some(Route::Exec(short.clone())));
        assert_eq!(Route::of("/containerLogs/shop/web/c"), Some(Route::Logs(short)));
        assert_eq!(Route::of("/runningpods/"), Some(Route::RunningPods));
        for path in ["/", "/exec/a", "/containerLogs/a/b", "/nope", "/metrics/other", "/pods/x", "/exec/%zz/b/c"] {
            assert_eq!(Route::of(path), None, "{path}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("command=ls&command=-l+%2Ftmp&output=1&tty=true&error=1&&bad=%zz");
        let request = exec_request(ContainerRef::default(), &query).unwrap();
        assert_eq!(request.command, ["ls", "-l /tmp"]);
        assert!(request.tty && request.stdout && !request.stderr && !request.stdin);
        assert!(exec_request(ContainerRef::default(), &Query::parse("tty=1")).is_err());
    }

    #[test]
    fn log_options_are_checked() {
        let now = Timestamp::from_second(1000).unwrap();
        let of = |text: &str| log_options(&Query::parse(text), now);
        let (options, previous) = of("follow=true&tailLines=5&sinceSeconds=10&previous=true&limitBytes=7").unwrap();
        assert!(options.follow && previous && !options.timestamps);
        assert_eq!((options.tail_lines, options.limit_bytes), (Some(5), Some(7)));
        assert_eq!(options.since, Some(Timestamp::from_second(990).unwrap()));
        for bad in [
            "tailLines=-1",
            "tailLines=x",
            "sinceSeconds=0",
            "limitBytes=0",
            "sinceTime=monday",
            "stream=x",
            "sinceSeconds=1&sinceTime=2024-01-01T00:00:00Z",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_checked() {
        let of = |text: &str| port_forward_request(ContainerRef::default(), &Query::parse(text));
        assert_eq!(of("port=80&port=81,82").unwrap().ports, [80, 81, 82]);
        assert!(of("port=0").is_err() && of("port=70000").is_err());
        assert!(of("").unwrap().ports.is_empty());
    }
}
