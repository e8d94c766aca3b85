//! Bootstrap tokens: `<id>.<secret>`, kept as Secrets of type `bootstrap.kubernetes.io/token` in `kube-system`, by which a machine
//! that is to become a node asks for its first certificate.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::Value;

use crate::core::Core;
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::user::User;

const TYPE: &str = "bootstrap.kubernetes.io/token";
const GROUP: &str = "system:bootstrappers";

/// Id and secret, where a token has the form of a bootstrap token.
pub(crate) fn parts(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let plain = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    (id.len() == 6 && secret.len() == 16 && plain(id) && plain(secret)).then_some((id, secret))
}

/// The user of the token, if it is good now.
pub(crate) fn user(core: &Core, id: &str, secret: &str) -> ApiResult<User> {
    let kind = oarlock_kinds::find("", "v1", "secrets").ok_or_else(ApiError::unauthorized)?;
    let key = object::key(kind, "kube-system", &format!("bootstrap-token-{id}"));
    let record = core.store.get(&key).ok_or_else(ApiError::unauthorized)?;
    check(&object::parse_as(kind, &record), id, secret, Timestamp::now()).ok_or_else(ApiError::unauthorized)
}

fn check(object: &Value, id: &str, secret: &str, now: Timestamp) -> Option<User> {
    let data = |name: &str| -> Option<String> {
        let encoded = object.pointer("/data")?.get(name)?.as_str()?;
        String::from_utf8(STANDARD.decode(encoded).ok()?).ok()
    };
    if object::text(object, "/type") != TYPE || object::is_deleting(object) {
        return None;
    }
    // Both are looked at to their ends: how long it takes says nothing of how much of the secret is right.
    let known = data("token-secret")?;
    let differs = known.len() != secret.len()
        || known.bytes().zip(secret.bytes()).fold(0, |differs, (a, b)| differs | (a ^ b)) != 0;
    if differs || data("token-id")? != id || data("usage-bootstrap-authentication").as_deref() != Some("true") {
        return None;
    }
    if let Some(expiration) = data("expiration") {
        let until: Timestamp = expiration.parse().ok()?;
        if until <= now {
            return None;
        }
    }
    let mut groups = vec![GROUP.to_owned()];
    for group in data("auth-extra-groups").unwrap_or_default().split(',').filter(|group| !group.is_empty()) {
        // One that is not allowed spoils the token.
        let rest = group.strip_prefix("system:bootstrappers:")?;
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, ':' | '-');
        let ends = rest.chars().last().is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !ends || rest.len() > 256 || !rest.chars().all(allowed) {
            return None;
        }
        groups.push(group.to_owned());
    }
    Some(User::authenticated(format!("system:bootstrap:{id}"), groups))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn secret(change: (&str, Option<&str>)) -> Value {
        let mut data = serde_json::Map::new();
        for (name, text) in [
            ("token-id", "abcdef"),
            ("token-secret", "0123456789abcdef"),
            ("usage-bootstrap-authentication", "true"),
            ("expiration", "2030-01-01T00:00:00Z"),
            ("auth-extra-groups", "system:bootstrappers:a:b"),
        ] {
            let text = if name == change.0 { change.1 } else { Some(text) };
            if let Some(text) = text {
                data.insert(name.to_owned(), STANDARD.encode(text).into());
            }
        }
        json!({"metadata": {"name": "bootstrap-token-abcdef"}, "type": TYPE, "data": data})
    }

    fn good(change: (&str, Option<&str>)) -> bool {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        check(&secret(change), "abcdef", "0123456789abcdef", now).is_some()
    }

    #[test]
    fn a_token_is_good_as_long_as_its_secret_says_so() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let user = check(&secret(("", None)), "abcdef", "0123456789abcdef", now).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert!(user.is_in("system:bootstrappers") && user.is_in("system:bootstrappers:a:b"));
        assert!(good(("expiration", None)));
        assert!(!good(("expiration", Some("2025-01-01T00:00:00Z"))));
        assert!(!good(("expiration", Some("never"))));
        assert!(!good(("usage-bootstrap-authentication", None)));
        assert!(!good(("token-secret", Some("0123456789abcdee"))));
        assert!(!good(("token-id", Some("fedcba"))));
        assert!(!good(("auth-extra-groups", Some("system:masters"))), "no other groups can be had this way");
    }

    #[test]
    fn other_tokens_are_left_alone() {
        assert_eq!(parts("abcdef.0123456789abcdef"), Some(("abcdef", "0123456789abcdef")));
        for other in ["abcdef.0123456789ABCDEF", "abc.def", "a.b.c", ""] {
            assert_eq!(parts(other), None, "{other}");
        }
    }
}
