//! What each signer may sign, and how long requests are kept. Pure.

use std::time::Duration;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::jiff::Timestamp;
use oarlock_pki::Asked;
use serde_json::Value;

const NODES: &str = "system:nodes";
const NODE: &str = "system:node:";
const HOUR: u64 = 3600;

/// The signers that are served here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signer {
    Client,
    KubeletClient,
    KubeletServing,
}

impl Signer {
    pub(super) fn of(request: &CertificateSigningRequest) -> Option<Self> {
        match request.spec.signer_name.as_str() {
            "kubernetes.io/kube-apiserver-client" => Some(Signer::Client),
            "kubernetes.io/kube-apiserver-client-kubelet" => Some(Signer::KubeletClient),
            "kubernetes.io/kubelet-serving" => Some(Signer::KubeletServing),
            _ => None,
        }
    }
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Wanted,
    /// To be signed.
    Approved,
    /// Signed, denied or failed.
    Over,
}

fn since(request: &CertificateSigningRequest, kind: &str) -> Option<Option<Timestamp>> {
    let mut conditions = request.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let found = conditions.find(|condition| condition.type_ == kind)?;
    Some(found.last_update_time.as_ref().map(|at| at.0))
}

pub(super) fn decision(request: &CertificateSigningRequest) -> Decision {
    let issued = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
    if issued || since(request, "Denied").is_some() || since(request, "Failed").is_some() {
        Decision::Over
    } else if since(request, "Approved").is_some() {
        Decision::Approved
    } else {
        Decision::Wanted
    }
}

/// How long the request is kept from now on: an hour once it is approved, denied or failed, a day while it waits.
pub(super) fn time_left(request: &CertificateSigningRequest, now: Timestamp) -> Duration {
    let created = request.metadata.creation_timestamp.as_ref().map(|at| at.0);
    let decided = ["Denied", "Failed", "Approved"].into_iter().find_map(|kind| since(request, kind));
    let (from, keep) = match decided {
        Some(at) => (at.or(created), HOUR),
        None => (created, 24 * HOUR),
    };
    let age = from.map_or(0, |from| now.as_second() - from.as_second());
    Duration::from_secs(keep.saturating_sub(u64::try_from(age).unwrap_or(0)))
}

/// The request's conditions with one more.
pub(super) fn with(request: &CertificateSigningRequest, condition: Value) -> Vec<Value> {
    let all = request.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut all: Vec<Value> = all.filter_map(|condition| serde_json::to_value(condition).ok()).collect();
    all.push(condition);
    all
}

/// Why the signer does not sign such a request; None where it does.
pub(super) fn refusal(signer: Signer, asked: &Asked, usages: &[String]) -> Option<String> {
    let has = |usage: &str| usages.iter().any(|own| own == usage);
    let only = |allowed: &[&str]| usages.iter().all(|own| allowed.contains(&own.as_str()));
    let names = asked.dns_names.len() + asked.addresses.len() + asked.other_names;
    let is_node = || {
        if asked.organizations != [NODES] {
            return Some(format!("subject organization is not {NODES}"));
        }
        let named = asked.common_name.strip_prefix(NODE).is_some_and(|name| !name.is_empty());
        (!named).then(|| format!("subject common name does not begin with {NODE}"))
    };
    match signer {
        Signer::Client => {
            if asked.organizations.iter().any(|organization| organization == "system:masters") {
                return Some("subject organization system:masters is not allowed".to_owned());
            }
            let fits = has("client auth") && only(&["client auth", "digital signature", "key encipherment"]);
            (!fits).then(|| "usages did not match [client auth], [digital signature], [key encipherment]".to_owned())
        }
        Signer::KubeletClient => is_node().or_else(|| {
            if names > 0 {
                return Some("subjectAltNames are not allowed".to_owned());
            }
            let fits = has("client auth")
                && has("digital signature")
                && only(&["client auth", "digital signature", "key encipherment"]);
            (!fits).then(|| "usages did not match [client auth digital signature]".to_owned())
        }),
        Signer::KubeletServing => is_node().or_else(|| {
            if asked.dns_names.is_empty() && asked.addresses.is_empty() {
                return Some("DNS or IP subjectAltName is required".to_owned());
            }
            if asked.other_names > 0 {
                return Some("Email and URI subjectAltNames are not allowed".to_owned());
            }
            let fits = has("server auth")
                && has("digital signature")
                && only(&["server auth", "digital signature", "key encipherment"]);
            (!fits).then(|| "usages did not match [server auth digital signature]".to_owned())
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn usages(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn node() -> Asked {
        Asked { common_name: "system:node:a".into(), organizations: vec![NODES.into()], ..Default::default() }
    }

    #[test]
    fn kubelets_get_what_is_theirs_and_nothing_more() {
        let client = usages(&["client auth", "digital signature"]);
        let judge = |asked: &Asked, usages: &[String]| refusal(Signer::KubeletClient, asked, usages);
        assert_eq!(judge(&node(), &client), None);
        assert!(judge(&node(), &usages(&["client auth", "digital signature", "server auth"])).is_some());
        assert!(judge(&Asked { organizations: vec!["system:masters".into()], ..node() }, &client).is_some());
        assert!(judge(&Asked { common_name: "admin".into(), ..node() }, &client).is_some());
        assert!(judge(&Asked { dns_names: vec!["a".into()], ..node() }, &client).is_some());
        let server = usages(&["server auth", "digital signature"]);
        assert!(refusal(Signer::KubeletServing, &node(), &server).is_some(), "a server has a name");
        let named = Asked { dns_names: vec!["a".into()], ..node() };
        assert_eq!(refusal(Signer::KubeletServing, &named, &server), None);
        assert!(
            refusal(Signer::Client, &Asked { organizations: vec!["system:masters".into()], ..node() }, &client)
                .is_some()
        );
    }

    #[test]
    fn requests_go_through_their_states_and_do_not_stay() {
        let request = |conditions: Value, certificate: Value| -> CertificateSigningRequest {
            serde_json::from_value(json!({"metadata": {"name": "r", "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"request": "", "signerName": "kubernetes.io/kubelet-serving"},
                "status": {"conditions": conditions, "certificate": certificate}}))
            .unwrap()
        };
        let approved = json!([{"type": "Approved", "status": "True", "lastUpdateTime": "2026-01-01T00:30:00Z"}]);
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!(decision(&request(json!([]), Value::Null)), Decision::Wanted);
        assert_eq!(decision(&request(approved.clone(), Value::Null)), Decision::Approved);
        assert_eq!(decision(&request(approved.clone(), json!("QQ=="))), Decision::Over);
        let left = |conditions: Value, now: &str| time_left(&request(conditions, Value::Null), at(now)).as_secs();
        assert_eq!(left(json!([]), "2026-01-01T01:00:00Z"), 23 * HOUR);
        assert_eq!(left(approved.clone(), "2026-01-01T01:00:00Z"), HOUR / 2);
        assert_eq!(left(approved, "2026-01-01T02:00:00Z"), 0);
    }
}
