//! Service-account tokens in hand, and when each is due to be replaced.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};

use crate::source::{IssuedToken, ObjectSource, SourceError, TokenOrder};

/// No token is used for longer than this, however long it lives.
const MAX_AGE: SignedDuration = SignedDuration::from_hours(24);

#[derive(Clone)]
struct Held {
    token: IssuedToken,
    issued_at: Timestamp,
}

/// Tokens by what was ordered.
#[derive(Default)]
pub(crate) struct TokenCache {
    held: Mutex<HashMap<TokenOrder, Held>>,
}

/// Whether a token is to be replaced: 80 % of its life or a day is over.
fn is_due(issued_at: Timestamp, expires_at: Timestamp, now: Timestamp) -> bool {
    let life = expires_at.duration_since(issued_at);
    let used = now.duration_since(issued_at);
    used >= MAX_AGE || used >= life.saturating_mul(4) / 5
}

impl TokenCache {
    /// The token for an order: the one in hand while it is fresh; when replacing fails, the old one for as long as it lives.
    pub async fn get(
        &self,
        source: &dyn ObjectSource,
        order: &TokenOrder,
        now: Timestamp,
    ) -> Result<IssuedToken, SourceError> {
        let held = self.lock().get(order).cloned();
        if let Some(held) = &held
            && !is_due(held.issued_at, held.token.expires_at, now)
        {
            return Ok(held.token.clone());
        }
        match source.token(order).await {
            Ok(token) => {
                self.lock().insert(order.clone(), Held { token: token.clone(), issued_at: now });
                Ok(token)
            }
            Err(error) => match held {
                Some(held) if now < held.token.expires_at => {
                    tracing::warn!(
                        pod.namespace = %order.namespace,
                        pod.name = %order.pod_name,
                        error = %error,
                        "could not replace a service-account token, the old one stays in use"
                    );
                    Ok(held.token)
                }
                _ => Err(error),
            },
        }
    }

    /// Forgets a pod's tokens.
    pub fn forget(&self, pod_uid: &str) {
        self.lock().retain(|order, _| order.pod_uid != pod_uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<TokenOrder, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn tokens_are_replaced_at_four_fifths_of_their_life() {
        assert!(!is_due(at(0), at(3600), at(2879)));
        assert!(is_due(at(0), at(3600), at(2880)));
    }

    #[test]
    fn no_token_is_used_for_more_than_a_day() {
        let year = 365 * 86400;
        assert!(!is_due(at(0), at(year), at(86399)));
        assert!(is_due(at(0), at(year), at(86400)));
    }
}
