//! [`Kept`]: answers of one plugin while they are good. Pure: the time comes in.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// What an answer is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    Image,
    Registry,
    Global,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Image(String),
    Registry(String),
    Global,
    /// The plugin failed for this image.
    Failure(String),
}

/// Whose answer it is: empty where the plugin is told nothing of who pulls.
type Whose = String;

/// A plugin that fails is left alone for so long: pulls go on without it meanwhile.
const FAILURE_TIME: Duration = Duration::from_secs(10);

/// A user name and a password for the images of a pattern.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub pattern: String,
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("pattern", &self.pattern).finish_non_exhaustive()
    }
}

/// Answers and until when.
#[derive(Default)]
pub(super) struct Kept {
    answers: HashMap<(Whose, Key), (Instant, Vec<Login>)>,
}

fn registry(image: &str) -> String {
    image.split('/').next().unwrap_or_default().to_owned()
}

impl Kept {
    pub(super) fn find(&mut self, whose: &str, image: &str, now: Instant) -> Option<Vec<Login>> {
        self.answers.retain(|_, (until, _)| *until > now);
        let keys =
            [Key::Image(image.to_owned()), Key::Registry(registry(image)), Key::Global, Key::Failure(image.to_owned())];
        let found = keys.into_iter().find_map(|key| self.answers.get(&(whose.to_owned(), key)));
        found.map(|(_, logins)| logins.clone())
    }

    pub(super) fn keep_failure(&mut self, whose: &str, image: &str, now: Instant) {
        let key = (whose.to_owned(), Key::Failure(image.to_owned()));
        self.answers.insert(key, (now + FAILURE_TIME, Vec::new()));
    }

    /// `of` is whose answer it is and for which image.
    pub(super) fn keep(&mut self, of: (&str, &str), scope: Scope, logins: Vec<Login>, time: Duration, now: Instant) {
        let (whose, image) = of;
        let key = match scope {
            Scope::Image => Key::Image(image.to_owned()),
            Scope::Registry => Key::Registry(registry(image)),
            Scope::Global => Key::Global,
        };
        // Too long a time to be one is for ever.
        let until = now.checked_add(time).unwrap_or(now + Duration::from_secs(u64::from(u32::MAX)));
        if !time.is_zero() {
            self.answers.insert((whose.to_owned(), key), (until, logins));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(username: &str) -> Vec<Login> {
        vec![Login { pattern: "r.io".into(), username: username.into(), password: "p".into() }]
    }

    #[test]
    fn an_answer_is_good_for_its_scope_and_its_time() {
        let now = Instant::now();
        let found = |kept: &mut Kept, image: &str, at: u64| {
            kept.find("", image, now + Duration::from_secs(at)).map(|logins| logins[0].username.clone())
        };
        let mut kept = Kept::default();
        kept.keep(("", "r.io/a"), Scope::Image, login("image"), Duration::from_secs(10), now);
        assert_eq!(found(&mut kept, "r.io/a", 9).as_deref(), Some("image"));
        assert_eq!(found(&mut kept, "r.io/b", 9), None);
        kept.keep(("", "r.io/b"), Scope::Registry, login("registry"), Duration::from_secs(20), now);
        assert_eq!(found(&mut kept, "r.io/c", 9).as_deref(), Some("registry"));
        assert_eq!(found(&mut kept, "r.io/a", 9).as_deref(), Some("image"), "the closest first");
        assert_eq!(found(&mut kept, "r.io/a", 10).as_deref(), Some("registry"), "its time is over");
        kept.keep(("", "x.io/b"), Scope::Global, login("global"), Duration::from_secs(30), now);
        assert_eq!(found(&mut kept, "y.io/c", 25).as_deref(), Some("global"));
        kept.keep(("", "z.io/b"), Scope::Image, login("never"), Duration::ZERO, now);
        assert_eq!(found(&mut kept, "z.io/b", 0).as_deref(), Some("global"));
        assert_eq!(found(&mut kept, "y.io/c", 30), None);
    }

    #[test]
    fn an_answer_is_only_for_whom_it_was_given() {
        let now = Instant::now();
        let mut kept = Kept::default();
        kept.keep(("account-a", "r.io/a"), Scope::Global, login("a"), Duration::from_secs(9), now);
        assert_eq!(kept.find("account-a", "x.io/y", now), Some(login("a")));
        assert_eq!(kept.find("account-b", "r.io/a", now), None);
        assert_eq!(kept.find("", "r.io/a", now), None);
    }

    #[test]
    fn a_failure_is_good_for_a_short_time_and_until_there_is_an_answer() {
        let now = Instant::now();
        let mut kept = Kept::default();
        kept.keep_failure("", "r.io/a", now);
        assert_eq!(kept.find("", "r.io/a", now), Some(Vec::new()));
        assert_eq!(kept.find("", "r.io/b", now), None);
        kept.keep(("", "r.io/b"), Scope::Registry, login("registry"), Duration::from_secs(5), now);
        assert_eq!(kept.find("", "r.io/a", now), Some(login("registry")));
        assert_eq!(kept.find("", "r.io/a", now + FAILURE_TIME), None);
    }
}
