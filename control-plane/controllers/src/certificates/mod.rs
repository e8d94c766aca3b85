//! CertificateSigningRequests: approving those of nodes for themselves, signing what is approved, and clearing away old ones.
//!
//! `judge` says (purely) what each signer may sign; this part asks authorization, signs, and reports.

mod judge;
mod nodes;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Next, WorkQueue, call, merge_status, queue};
use oarlock_pki::{Asked, Authority};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Task};
use judge::{Decision, Signer};

const CONCURRENCY: usize = 2;
/// How long a certificate is good for unless it asks for less.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// Signs with the authority in `directory`. `server_names` are those that no node serves under.
pub(crate) fn start(
    shared: &Arc<Shared>,
    stop: &CancellationToken,
    directory: PathBuf,
    server_names: Vec<String>,
) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    // What a node may serve under follows from its addresses, which it reports after it has asked.
    let (on_node, known) = (queue.clone(), shared.clone());
    shared.nodes.on_change(move |change| {
        let user = format!("system:node:{}", change.object().name_any());
        let waiting = known.signing_requests.list().into_iter().filter(|request| {
            request.spec.username.as_deref() == Some(&user) && judge::decision(request) == Decision::Wanted
        });
        waiting.for_each(|request| on_node.add(request.name_any()));
    });
    let on_request = queue.clone();
    shared.signing_requests.on_change(move |change| on_request.add(change.object().name_any()));
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        let opened = tokio::task::spawn_blocking(move || Authority::ensure(&directory, "oarlock-ca")).await;
        let authority = match opened {
            Ok(Ok(authority)) => Arc::new(authority),
            Ok(Err(error)) => {
                tracing::error!(%error, "the authority cannot be opened: certificate requests are not signed");
                return stop.cancelled().await;
            }
            Err(_) => return stop.cancelled().await,
        };
        shared.signing_requests.wait_synced().await;
        shared.nodes.wait_synced().await;
        let server_names: Arc<[String]> = server_names.into();
        let reconcile = |name| reconcile(shared.clone(), authority.clone(), server_names.clone(), name);
        queue::work("certificates", queue, CONCURRENCY, stop, reconcile).await;
    })
}

async fn reconcile(
    shared: Arc<Shared>,
    authority: Arc<Authority>,
    server_names: Arc<[String]>,
    name: String,
) -> Result<Next, ApiError> {
    let Some(request) = shared.signing_requests.get("", &name) else { return Ok(Next::Done) };
    let api: Api<CertificateSigningRequest> = Api::all(shared.client.clone());
    let left = judge::time_left(&request, Timestamp::now());
    if left.is_zero() {
        let gone = call("delete certificatesigningrequest", api.delete(&name, &DeleteParams::default())).await;
        return gone
            .map(|_| Next::Done)
            .or_else(|error| if error.is_not_found() { Ok(Next::Done) } else { Err(error) });
    }
    let later = Ok(Next::After(left));
    let Some(signer) = Signer::of(&request) else { return later };
    match judge::decision(&request) {
        Decision::Over => later,
        Decision::Wanted => {
            approve(&shared, &api, &request, signer, &server_names).await?;
            later
        }
        Decision::Approved => {
            sign(&authority, &api, &request, signer).await?;
            later
        }
    }
}

/// The PEM request and what it asks for.
fn read(request: &CertificateSigningRequest) -> Option<(String, Asked)> {
    let pem = String::from_utf8(request.spec.request.0.clone()).ok()?;
    let asked = Asked::read(&pem)?;
    Some((pem, asked))
}

/// Approves a node's request for a certificate of its own, where authorization lets it.
async fn approve(
    shared: &Shared,
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    signer: Signer,
    server_names: &[String],
) -> Result<(), ApiError> {
    let Some((_, asked)) = read(request) else { return Ok(()) };
    if judge::refusal(signer, &asked, request.spec.usages.as_deref().unwrap_or_default()).is_some() {
        return Ok(());
    }
    let user = request.spec.username.as_deref().unwrap_or_default();
    let ways = match signer {
        Signer::KubeletClient if nodes::takes_a_nodes_name(user, &asked, &shared.nodes.list()) => {
            let name = &asked.common_name;
            tracing::warn!(
                request = request.name_any(),
                name,
                "a node of this name exists: delete it, or approve the request by hand"
            );
            return Ok(());
        }
        Signer::KubeletClient if user == asked.common_name => vec![nodes::SELF_CLIENT, nodes::CLIENT],
        Signer::KubeletClient => vec![nodes::CLIENT],
        Signer::Client if nodes::is_proxy_of_node(user, &asked) => vec![nodes::PROXY],
        Signer::Client => return Ok(()),
        Signer::KubeletServing => {
            if let Some(why) = nodes::doubt_about_names(user, &asked, &shared.nodes.list(), server_names) {
                tracing::debug!(request = request.name_any(), why, "a node's serving certificate waits for approval");
                return Ok(());
            }
            vec![nodes::SELF_SERVER]
        }
    };
    for nodes::Way { subresource, message } in ways {
        if may(shared, request, subresource).await? {
            let condition = json!({"type": "Approved", "status": "True", "reason": "AutoApproved", "message": message});
            let conditions = judge::with(request, condition);
            let patch = Patch::Merge(json!({ "status": { "conditions": conditions } }));
            let (name, params) = (request.name_any(), PatchParams::default());
            let approved = api.patch_subresource("approval", &name, &params, &patch);
            return call("approve certificatesigningrequest", approved).await.map(drop);
        }
    }
    Ok(())
}

async fn may(shared: &Shared, request: &CertificateSigningRequest, subresource: &str) -> Result<bool, ApiError> {
    let spec = &request.spec;
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: spec.username.clone(),
            uid: spec.uid.clone(),
            groups: spec.groups.clone(),
            extra: spec.extra.clone(),
            resource_attributes: Some(ResourceAttributes {
                group: Some("certificates.k8s.io".to_owned()),
                version: Some("*".to_owned()),
                resource: Some("certificatesigningrequests".to_owned()),
                subresource: Some(subresource.to_owned()),
                verb: Some("create".to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        },
        ..Default::default()
    };
    let api: Api<SubjectAccessReview> = Api::all(shared.client.clone());
    let answer = call("create subjectaccessreview", api.create(&PostParams::default(), &review)).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

async fn sign(
    authority: &Arc<Authority>,
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    signer: Signer,
) -> Result<(), ApiError> {
    let usages = request.spec.usages.clone().unwrap_or_default();
    let read = read(request);
    let refusal = match &read {
        None => Some("the request cannot be read".to_owned()),
        Some((_, asked)) => judge::refusal(signer, asked, &usages),
    };
    if let Some(message) = refusal {
        return fail(api, request, "SignerValidationFailure", &message).await;
    }
    let asked_for = request.spec.expiration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let life = asked_for.map_or(LONGEST, Duration::from_secs).min(LONGEST);
    let (authority, pem) = (authority.clone(), read.map(|(pem, _)| pem).unwrap_or_default());
    let signed = tokio::task::spawn_blocking(move || authority.sign(&pem, &usages, life)).await;
    match signed {
        Ok(Ok(certificate)) => {
            let status = json!({ "status": { "certificate": STANDARD.encode(certificate) } });
            merge_status("sign certificatesigningrequest", api, &request.name_any(), &status).await.map(drop)
        }
        Ok(Err(error)) => fail(api, request, "SigningFailed", &error.to_string()).await,
        Err(_) => Ok(()),
    }
}

async fn fail(
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    reason: &str,
    message: &str,
) -> Result<(), ApiError> {
    let condition: Value = json!({"type": "Failed", "status": "True", "reason": reason, "message": message});
    let status = json!({ "status": { "conditions": judge::with(request, condition) } });
    merge_status("fail certificatesigningrequest", api, &request.name_any(), &status).await.map(drop)
}
