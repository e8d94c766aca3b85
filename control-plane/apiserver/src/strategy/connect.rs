//! Works out where a log, exec, attach, port-forward or proxy request goes, and sends it there.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderValue, Request, header};
use oarlock_kinds::Kind;
use oarlock_store::Range;
use rand::seq::IndexedRandom;
use serde_json::Value;

use crate::authz::{self, Action, Decision};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::kubelet::{Backend, Security, is_proxied_method};
use crate::object;
use crate::request::{Query, encode};
use crate::wire::{Answer, Body};

/// Answers a connecting sub-resource.
pub(crate) async fn connect(ctx: &Context, target: &Target, request: Request<Body>) -> ApiResult<Answer> {
    let subresource = target.subresource.as_deref().unwrap_or_default();
    if !is_proxied_method(request.method()) {
        return Err(ApiError::method_not_allowed());
    }
    let backend = match (target.kind.storage, subresource) {
        ("pods", "log") => log(ctx, target)?,
        ("pods", "exec" | "attach") => {
            require_create(ctx)?;
            stream(ctx, target, subresource)?
        }
        ("pods", "portforward") => {
            require_create(ctx)?;
            port_forward(ctx, target)?
        }
        ("pods", "proxy") => pod_proxy(ctx, target)?,
        ("services", "proxy") => service_proxy(ctx, target)?,
        ("nodes", "proxy") => node_proxy(ctx, target)?,
        _ => return Err(ApiError::no_such_resource()),
    };
    tracing::debug!(backend = %backend.address, path = %backend.path, "passing a request on");
    let mut answer = ctx.core.kubelets.forward(&backend, request, &ctx.core.stopping).await?;
    if subresource == "log" {
        answer.headers_mut().entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
    }
    Ok(answer)
}

/// A WebSocket opens with GET; what it does is to create.
fn require_create(ctx: &Context) -> ApiResult<()> {
    if ctx.info.verb == "create" {
        return Ok(());
    }
    let action = Action { verb: "create".into(), ..Action::of(&ctx.info) };
    match authz::decide(&ctx.core, &ctx.user, &action) {
        Decision::Allowed(_) => Ok(()),
        Decision::NoOpinion(reason) => Err(authz::refusal(&ctx.user, &action, &reason)),
    }
}

fn read(ctx: &Context, target: &Target) -> ApiResult<Value> {
    let record = ctx.core.store.get(&target.key()).ok_or_else(|| target.not_found())?;
    Ok(object::parse(&record))
}

/// The address of the server on a node.
pub(crate) fn kubelet_address(ctx: &Context, node: &str) -> ApiResult<SocketAddr> {
    let nodes = row("nodes")?;
    let record = ctx.core.store.get(&object::key(nodes, "", node)).ok_or_else(|| ApiError::not_found(nodes, node))?;
    let node_object = object::parse(&record);
    let port = node_object.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0).unwrap_or(10250);
    let addresses = node_object.pointer("/status/addresses").and_then(Value::as_array).cloned().unwrap_or_default();
    let of_type = |wanted: &str| {
        let found = addresses.iter().find(|address| address["type"] == wanted)?;
        found.get("address")?.as_str()?.parse::<IpAddr>().ok()
    };
    let address = of_type("InternalIP").or_else(|| of_type("ExternalIP")).ok_or_else(|| {
        ApiError::internal(format_args!(
            "no preferred addresses found; known addresses: {}",
            Value::Array(addresses.clone())
        ))
    })?;
    Ok(SocketAddr::new(address, port))
}

fn row(plural: &str) -> ApiResult<&'static Kind> {
    oarlock_kinds::find("", "v1", plural).ok_or_else(ApiError::no_such_resource)
}

fn host_of(ctx: &Context, pod: &Value) -> ApiResult<SocketAddr> {
    let node = object::text(pod, "/spec/nodeName");
    if node.is_empty() {
        return Err(ApiError::bad_request(format!("pod {} does not have a host assigned", object::name(pod))));
    }
    kubelet_address(ctx, node)
}

/// The container a request means: the one it names, or the only one (or the default by annotation).
fn container(pod: &Value, asked: Option<&str>) -> ApiResult<String> {
    let names = |list: &str| -> Vec<String> {
        let containers = pod["spec"][list].as_array().into_iter().flatten();
        containers.filter_map(|container| container.get("name")?.as_str().map(str::to_owned)).collect()
    };
    let (main, init, ephemeral) = (names("containers"), names("initContainers"), names("ephemeralContainers"));
    let pod_name = object::name(pod);
    if let Some(asked) = asked {
        if main.iter().chain(&init).chain(&ephemeral).any(|name| name == asked) {
            return Ok(asked.to_owned());
        }
        return Err(ApiError::bad_request(format!("container {asked} is not valid for pod {pod_name}")));
    }
    if let [only] = &main[..] {
        return Ok(only.clone());
    }
    let default = object::text(pod, "/metadata/annotations/kubectl.kubernetes.io~1default-container");
    if main.iter().any(|name| name == default) {
        return Ok(default.to_owned());
    }
    let mut message =
        format!("a container name must be specified for pod {pod_name}, choose one of: [{}]", main.join(" "));
    for (what, list) in [("init containers", &init), ("ephemeral containers", &ephemeral)] {
        if !list.is_empty() {
            message.push_str(&format!(" or one of the {what}: [{}]", list.join(" ")));
        }
    }
    Err(ApiError::bad_request(message))
}

fn query_text<'q>(pairs: impl Iterator<Item = (&'q str, &'q str)>) -> String {
    let parts: Vec<String> = pairs.map(|(key, value)| format!("{}={}", encode(key), encode(value))).collect();
    if parts.is_empty() { String::new() } else { format!("?{}", parts.join("&")) }
}

fn log(ctx: &Context, target: &Target) -> ApiResult<Backend> {
    const PASSED: [&str; 9] = [
        "follow",
        "previous",
        "sinceSeconds",
        "sinceTime",
        "timestamps",
        "tailLines",
        "limitBytes",
        "insecureSkipTLSVerifyBackend",
        "stream",
    ];
    let pod = read(ctx, target)?;
    check_log_options(&ctx.info.query, &target.name)?;
    let container = container(&pod, ctx.info.query.get("container"))?;
    let address = host_of(ctx, &pod)?;
    let query = query_text(ctx.info.query.pairs().filter(|(key, value)| PASSED.contains(key) && !value.is_empty()));
    let path = format!("/containerLogs/{}/{}/{}{query}", target.namespace, target.name, encode(&container));
    Ok(Backend { address, security: Security::Kubelet, path })
}

fn check_log_options(query: &Query, pod: &str) -> ApiResult<()> {
    use oarlock_kinds::FieldError;
    let mut errors = Vec::new();
    for (field, least) in [("tailLines", 0), ("limitBytes", 1), ("sinceSeconds", 1)] {
        if let Some(number) = query.number(field)?.filter(|number| *number < least) {
            let detail = if least == 0 { "must be greater than or equal to 0" } else { "must be greater than 0" };
            errors.push(FieldError::invalid(field, number, detail));
        }
    }
    if query.get("sinceSeconds").is_some() && query.get("sinceTime").is_some() {
        errors.push(FieldError::forbidden("", "at most one of `sinceTime` or `sinceSeconds` may be specified"));
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid("", "PodLogOptions", pod, &errors)) }
}

fn stream(ctx: &Context, target: &Target, action: &str) -> ApiResult<Backend> {
    let pod = read(ctx, target)?;
    let query = &ctx.info.query;
    let wants = ["stdin", "stdout", "stderr"].map(|name| query.get(name).is_some() && query.flag(name));
    if wants == [false; 3] {
        return Err(ApiError::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    let container = container(&pod, query.get("container"))?;
    let address = host_of(ctx, &pod)?;
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for (name, wanted) in ["input", "output", "error"].into_iter().zip(wants) {
        if wanted {
            pairs.push((name, "1"));
        }
    }
    if query.get("tty").is_some() && query.flag("tty") {
        pairs.push(("tty", "1"));
    }
    if action == "exec" {
        pairs.extend(query.all("command").map(|word| ("command", word)));
    }
    let path = format!(
        "/{action}/{}/{}/{}{}",
        target.namespace,
        target.name,
        encode(&container),
        query_text(pairs.into_iter())
    );
    Ok(Backend { address, security: Security::Kubelet, path })
}

fn port_forward(ctx: &Context, target: &Target) -> ApiResult<Backend> {
    let pod = read(ctx, target)?;
    let address = host_of(ctx, &pod)?;
    // WebSocket clients name their ports in the query; SPDY clients name them stream by stream.
    let ports: Vec<&str> = ctx.info.query.all("ports").flat_map(|list| list.split(',')).collect();
    let query = query_text(ports.into_iter().filter(|port| !port.is_empty()).map(|port| ("port", port)));
    Ok(Backend {
        address,
        security: Security::Kubelet,
        path: format!("/portForward/{}/{}{query}", target.namespace, target.name),
    })
}

/// `name`, `name:port` or `scheme:name:port`, as names in proxy paths are written.
fn split_name(text: &str) -> (&str, &str, &str) {
    match text.split(':').collect::<Vec<_>>()[..] {
        [scheme, name, port] => (scheme, name, port),
        [name, port] => ("", name, port),
        _ => ("", text, ""),
    }
}

fn security_of(scheme: &str) -> ApiResult<Security> {
    match scheme {
        "" | "http" => Ok(Security::Plain),
        "https" => Ok(Security::Unverified),
        _ => Err(ApiError::bad_request(format!("invalid scheme {scheme:?} in the name"))),
    }
}

fn with_query(ctx: &Context, default: &str) -> String {
    let tail = ctx.info.resource.as_ref().map_or("", |resource| &*resource.tail);
    let path = if tail.is_empty() { default } else { tail };
    match &*ctx.info.raw_query {
        "" => path.to_owned(),
        query => format!("{path}?{query}"),
    }
}

fn pod_proxy(ctx: &Context, target: &Target) -> ApiResult<Backend> {
    let (scheme, name, port) = split_name(&target.name);
    let pod = read(ctx, &Target { name: name.into(), ..target.clone() })?;
    let address: IpAddr = object::text(&pod, "/status/podIP")
        .parse()
        .map_err(|_| ApiError::bad_request("address not allowed: the pod has no address"))?;
    check_address(address)?;
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array).into_iter().flatten();
    let mut ports = containers.flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let number = if port.is_empty() {
        ports.next().and_then(|port| port.get("containerPort")?.as_u64()).unwrap_or(80)
    } else if let Ok(number) = port.parse() {
        number
    } else {
        ports
            .find(|candidate| candidate["name"] == port)
            .and_then(|port| port.get("containerPort")?.as_u64())
            .ok_or_else(|| ApiError::bad_request(format!("the pod has no port named {port:?}")))?
    };
    Ok(Backend {
        address: SocketAddr::new(address, port_number(number)?),
        security: security_of(scheme)?,
        path: with_query(ctx, "/"),
    })
}

fn port_number(number: u64) -> ApiResult<u16> {
    u16::try_from(number)
        .ok()
        .filter(|number| *number != 0)
        .ok_or_else(|| ApiError::bad_request(format!("{number} is not a port")))
}

/// Proxies lead to workloads, never back into this host or its link.
fn check_address(address: IpAddr) -> ApiResult<()> {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local {
        return Err(ApiError::bad_request("address not allowed"));
    }
    Ok(())
}

fn service_proxy(ctx: &Context, target: &Target) -> ApiResult<Backend> {
    let (scheme, name, port) = split_name(&target.name);
    let service = read(ctx, &Target { name: name.into(), ..target.clone() })?;
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
    let number: Option<u64> = port.parse().ok();
    let chosen = match (port, &ports[..]) {
        ("", [only]) => Some(only),
        (name, all) => all.iter().find(|one| match number {
            Some(number) => one["port"].as_u64() == Some(number),
            None => object::text(one, "/name") == name,
        }),
    };
    let no_endpoints = || ApiError::unavailable(format!("no endpoints available for service \"{}\"", target.name));
    let chosen = chosen.ok_or_else(no_endpoints)?;
    let (address, number) =
        endpoint(ctx, &target.namespace, name, object::text(chosen, "/name")).ok_or_else(no_endpoints)?;
    check_address(address)?;
    Ok(Backend {
        address: SocketAddr::new(address, port_number(number)?),
        security: security_of(scheme)?,
        path: with_query(ctx, "/"),
    })
}

/// One ready endpoint of a service port, at random.
fn endpoint(ctx: &Context, namespace: &str, service: &str, port_name: &str) -> Option<(IpAddr, u64)> {
    let slices = oarlock_kinds::find("discovery.k8s.io", "v1", "endpointslices")?;
    let prefix = object::key(slices, namespace, "");
    let page = ctx.core.store.range(Range { prefix: &prefix, ..Range::default() }).ok()?;
    let mut found: Vec<(IpAddr, u64)> = Vec::new();
    for record in &page.records {
        let index = object::index(slices, record);
        let owner = index.labels.iter().find(|(key, _)| &**key == "kubernetes.io/service-name");
        if owner.is_none_or(|(_, owner)| &**owner != service) {
            continue;
        }
        let slice = object::parse(record);
        let ports = slice["ports"].as_array().into_iter().flatten();
        let Some(number) =
            ports.filter(|port| object::text(port, "/name") == port_name).find_map(|port| port.get("port")?.as_u64())
        else {
            continue;
        };
        for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
            if endpoint.pointer("/conditions/ready") == Some(&Value::Bool(false)) {
                continue;
            }
            let addresses = object::strings(endpoint.get("addresses"));
            found.extend(addresses.filter_map(|address| address.parse().ok()).map(|address: IpAddr| (address, number)));
        }
    }
    found.choose(&mut rand::rng()).copied()
}

fn node_proxy(ctx: &Context, target: &Target) -> ApiResult<Backend> {
    let (scheme, name, port) = split_name(&target.name);
    let mut address = kubelet_address(ctx, name)?;
    let mut security = Security::Kubelet;
    if let Some(number) = port.parse().ok().filter(|number: &u64| *number != u64::from(address.port())) {
        address.set_port(port_number(number)?);
        security = security_of(scheme)?;
    }
    Ok(Backend { address, security, path: with_query(ctx, "/") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_container_is_found_or_asked_for() {
        let one = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}]}});
        assert_eq!(container(&one, None).expect("the only one"), "a");
        let two = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
        let error = container(&two, None).expect_err("ambiguous");
        assert_eq!(error.message, "a container name must be specified for pod p, choose one of: [a b]");
        assert_eq!(container(&two, Some("b")).expect("named"), "b");
        assert_eq!(container(&two, Some("c")).expect_err("unknown").message, "container c is not valid for pod p");
    }

    #[test]
    fn proxies_do_not_lead_to_the_host_itself() {
        for address in ["127.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1"] {
            assert!(check_address(address.parse().expect("an address")).is_err(), "{address}");
        }
        assert!(check_address("10.42.0.5".parse().expect("an address")).is_ok());
    }

    #[test]
    fn names_in_proxy_paths_carry_scheme_and_port() {
        assert_eq!(split_name("https:web:443"), ("https", "web", "443"));
        assert_eq!(split_name("web:http"), ("", "web", "http"));
        assert_eq!(split_name("web"), ("", "web", ""));
    }
}
