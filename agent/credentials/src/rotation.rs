//! [`Rotation`]: gets a certificate, and another one before that ends.
//!
//! ```text
//!   key on disk ─▶ request (named after the key) ─▶ approved, signed ─▶ certificate and key on disk ─▶ in use
//!        ▲                                                                                     │
//!        └──────────────────────── between 70 and 90 % of its life ────────────────────────────┘
//! ```

use std::io;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::api::{Api, PostParams};
use kube::runtime::wait;
use rcgen::KeyPair;
use tokio_util::sync::CancellationToken;

use crate::request::{self, Purpose};
use crate::store::{Current, Store};

const CALL: Duration = Duration::from_secs(10);
/// How long a request may wait to be approved and signed before it is looked at anew.
const PATIENCE: Duration = Duration::from_secs(900);
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LAST_RETRY: Duration = Duration::from_secs(120);
/// The clock may jump: what is due is looked at this often.
const LOOK: Duration = Duration::from_secs(60);

/// Why there is no new certificate yet.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("{operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot make a certificate request")]
    Request(#[source] rcgen::Error),
    #[error("cannot send certificate request {name}")]
    Api {
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("certificate request {name} was not answered in time")]
    Timeout { name: String },
    #[error("certificate request {name} was refused: {reason}: {message}")]
    Refused { name: String, reason: String, message: String },
    #[error("stopped")]
    Stopped,
}

/// A certificate of the node that is kept fresh.
#[derive(Debug, Clone)]
pub struct Rotation {
    pub store: Store,
    pub node_name: String,
    pub purpose: Purpose,
}

async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, CredentialsError> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(io::Error::other("it was cut off")));
    done.map_err(|source| CredentialsError::Io { operation, source })
}

/// When a certificate is to be replaced: somewhere between 70 and 90 % of its life, so that nodes do not come all at once.
fn due(current: &Current, random: f64) -> Timestamp {
    let life = current.not_after.duration_since(current.not_before).as_secs_f64();
    let age = life * (0.7 + 0.2 * random);
    let from = current.not_before.as_millisecond() as f64;
    Timestamp::from_millisecond((from + age * 1000.0) as i64).unwrap_or(current.not_after)
}

/// A request's answer, once there is one.
fn answer(request: &CertificateSigningRequest) -> Option<Result<String, (String, String)>> {
    let status = request.status.as_ref()?;
    let mut conditions = status.conditions.iter().flatten();
    if let Some(condition) = conditions.find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed")) {
        let of = |text: &Option<String>| text.clone().unwrap_or_default();
        return Some(Err((of(&condition.reason), of(&condition.message))));
    }
    let certificate = status.certificate.as_ref().filter(|certificate| !certificate.0.is_empty())?;
    Some(Ok(String::from_utf8_lossy(&certificate.0).into_owned()))
}

impl Rotation {
    /// Asks for a certificate and waits for it. What an agent before this one has asked for is taken up.
    pub async fn obtain(&self, client: &kube::Client) -> Result<Current, CredentialsError> {
        let store = self.store.clone();
        let key = blocking("keep the key of a certificate request", move || store.pending_key()).await?;
        let object = request::object(&self.node_name, &self.purpose, &key).map_err(CredentialsError::Request)?;
        let name = object.metadata.name.clone().unwrap_or_default();
        let api: Api<CertificateSigningRequest> = Api::all(client.clone());
        match tokio::time::timeout(CALL, api.create(&PostParams::default(), &object)).await {
            Ok(Ok(_)) => tracing::info!(request = name, "asked for a certificate"),
            Ok(Err(kube::Error::Api(refusal))) if refusal.code == 409 => {}
            Ok(Err(source)) => return Err(CredentialsError::Api { name, source: Box::new(source) }),
            Err(_) => return Err(CredentialsError::Timeout { name }),
        }
        let answered = |object: Option<&CertificateSigningRequest>| object.is_none_or(|o| answer(o).is_some());
        let waiting = wait::await_condition(api, &name, answered);
        let found = match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                let source = Box::new(kube::Error::Service(Box::new(error)));
                return Err(CredentialsError::Api { name, source });
            }
            Err(_) => return Err(CredentialsError::Timeout { name }),
        };
        self.finish(name, key, found.as_ref().and_then(answer)).await
    }

    async fn finish(
        &self,
        name: String,
        key: KeyPair,
        answer: Option<Result<String, (String, String)>>,
    ) -> Result<Current, CredentialsError> {
        let store = self.store.clone();
        let (reason, message) = match answer {
            Some(Ok(certificate)) => {
                let taken = blocking("keep a certificate", move || {
                    let taken = store.take(&certificate, &key);
                    if taken.is_err() {
                        store.forget_pending()?;
                    }
                    taken
                });
                return taken.await;
            }
            Some(Err(refusal)) => refusal,
            // Requests that nobody looked at go after a while.
            None => ("Gone".to_owned(), "the request is not there any more".to_owned()),
        };
        blocking("give a refused key up", move || store.forget_pending()).await?;
        Err(CredentialsError::Refused { name, reason, message })
    }

    /// As [`Self::obtain`], again and again until it succeeds.
    pub async fn obtain_at_last(
        &self,
        client: &kube::Client,
        stop: &CancellationToken,
    ) -> Result<Current, CredentialsError> {
        let mut pause = FIRST_RETRY;
        loop {
            let tried = tokio::select! {
                () = stop.cancelled() => return Err(CredentialsError::Stopped),
                tried = self.obtain(client) => tried,
            };
            let error = match tried {
                Ok(current) => return Ok(current),
                Err(error) => error,
            };
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(%error, cause, "no certificate yet; trying again");
            tokio::select! {
                () = stop.cancelled() => return Err(CredentialsError::Stopped),
                () = tokio::time::sleep(pause.mul_f64(1.0 + 0.1 * rand::random::<f64>())) => {}
            }
            pause = (pause * 2).min(LAST_RETRY);
        }
    }

    /// Keeps the certificate fresh until `stop`; each new one is handed to `use_it`.
    pub async fn run(self, client: kube::Client, mut use_it: impl FnMut(&Current), stop: CancellationToken) {
        let store = self.store.clone();
        let mut current = tokio::task::spawn_blocking(move || store.current()).await.ok().flatten();
        let mut not_before = Timestamp::UNIX_EPOCH;
        loop {
            let random = rand::random::<f64>();
            while let Some(current) = current.as_ref().filter(|current| !current.self_signed) {
                let left = due(current, random).max(not_before).duration_since(Timestamp::now());
                let Some(left) = Duration::try_from(left).ok().filter(|left| !left.is_zero()) else { break };
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(left.min(LOOK)) => {}
                }
            }
            match self.obtain_at_last(&client, &stop).await {
                Ok(fresh) => {
                    tracing::info!(until = %fresh.not_after, purpose = ?self.purpose, "the node has a new certificate");
                    use_it(&fresh);
                    // One that was near its end when it was made is not replaced at once.
                    let now = Timestamp::now();
                    not_before = now + fresh.not_after.duration_since(now) / 2;
                    current = Some(fresh);
                }
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_replaced_in_the_last_third_of_its_life() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let current = Current { pem: String::new(), not_before: at(1000), not_after: at(2000), self_signed: false };
        assert_eq!(due(&current, 0.0), at(1700));
        assert_eq!(due(&current, 1.0), at(1900));
    }

    #[test]
    fn a_refusal_is_an_answer_too() {
        let request = |status: serde_json::Value| -> CertificateSigningRequest {
            serde_json::from_value(
                serde_json::json!({"metadata": {}, "spec": {"request": "", "signerName": "s"}, "status": status}),
            )
            .unwrap()
        };
        assert_eq!(answer(&request(serde_json::json!({}))), None);
        let approved = serde_json::json!({"conditions": [{"type": "Approved", "status": "True"}]});
        assert_eq!(answer(&request(approved)), None, "approved is not signed");
        let denied =
            serde_json::json!({"conditions": [{"type": "Denied", "status": "True", "reason": "No", "message": "m"}]});
        assert_eq!(answer(&request(denied)), Some(Err(("No".to_owned(), "m".to_owned()))));
        let signed = serde_json::json!({"certificate": "QQ=="});
        assert_eq!(answer(&request(signed)), Some(Ok("A".to_owned())));
    }
}
