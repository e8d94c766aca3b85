//! [`Providers`]: all plugins; each is asked once at a time for one image, and its answer kept.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use oarlock_proto::cri;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::config::{self, Provider, ProvidersConfigError};
use super::kept::{Kept, Login};
use super::matching::{Place, full_name};
use super::plugin;
use crate::error::chain;

struct Known {
    provider: Provider,
    kept: parking_lot::Mutex<Kept>,
    /// Held while the plugin is asked for an image: whoever comes then takes its answer. A plugin that hangs for one image
    /// holds nobody up who wants another.
    turns: parking_lot::Mutex<HashMap<String, Weak<Mutex<()>>>>,
}

impl Known {
    fn new(provider: Provider) -> Known {
        Known { provider, kept: parking_lot::Mutex::default(), turns: parking_lot::Mutex::default() }
    }

    fn turn(&self, image: &str) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock();
        if let Some(turn) = turns.get(image).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(image.to_owned(), Arc::downgrade(&turn));
        turn
    }
}

/// The plugins of the node; none by default.
#[derive(Default)]
pub(crate) struct Providers {
    bin_dir: PathBuf,
    known: Vec<Known>,
}

impl Providers {
    /// Blocks.
    pub(crate) fn open(file: &Path, bin_dir: PathBuf) -> Result<Self, ProvidersConfigError> {
        Ok(Self { bin_dir, known: config::read(file)?.into_iter().map(Known::new).collect() })
    }

    /// What the plugins have for the image, the closest pattern first. A plugin that fails has nothing.
    pub(crate) async fn credentials(&self, image: &str) -> Vec<cri::AuthConfig> {
        let image = full_name(image);
        let Some(place) = Place::parse(&image) else { return Vec::new() };
        let mut found: Vec<Login> = Vec::new();
        for known in &self.known {
            if known.provider.images.iter().any(|pattern| pattern.fits(&place)) {
                found.extend(self.ask(known, &image).await);
            }
        }
        found.retain(|login| Place::parse(&login.pattern).is_some_and(|pattern| pattern.fits(&place)));
        found.sort_by(|a, b| b.pattern.cmp(&a.pattern));
        let auth =
            |login: Login| cri::AuthConfig { username: login.username, password: login.password, ..Default::default() };
        found.into_iter().map(auth).collect()
    }

    async fn ask(&self, known: &Known, image: &str) -> Vec<Login> {
        let turn = known.turn(image);
        let _turn = turn.lock().await;
        let kept = known.kept.lock().find(image, Instant::now());
        if let Some(logins) = kept {
            return logins;
        }
        match plugin::ask(&self.bin_dir, &known.provider, image).await {
            Ok(answer) => {
                let time = answer.keep.unwrap_or(known.provider.keep);
                known.kept.lock().keep(image, answer.scope, answer.logins.clone(), time, Instant::now());
                answer.logins
            }
            Err(error) => {
                let (plugin, error) = (&known.provider.name, chain(&error));
                tracing::warn!(plugin, image, error, "a credential provider plugin failed");
                known.kept.lock().keep_failure(image, Instant::now());
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A directory with a plugin, a shell script that keeps what it was asked.
    fn with_plugin(script: &str, duration: &str) -> (tempfile::TempDir, Providers) {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("giver");
        fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let asked = dir.path().join("asked");
        let file = dir.path().join("providers.yaml");
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: giver\n  \
             matchImages: ['*.registry.io']\n  defaultCacheDuration: {duration}\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [word]\n  \
             env: [{{name: ASKED, value: {}}}]\n",
            asked.display()
        );
        fs::write(&file, text).unwrap();
        let providers = Providers::open(&file, dir.path().to_owned()).unwrap();
        (dir, providers)
    }

    fn asked(dir: &tempfile::TempDir) -> Vec<String> {
        let text = fs::read_to_string(dir.path().join("asked")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    const ANSWER: &str = r#"{ cat; echo " $1"; } >>"$ASKED"
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry",
"auth":{"*.registry.io":{"username":"all","password":"1"},"eu.registry.io/team":{"username":"team","password":"2"},
"other.io":{"username":"other","password":"3"}}}'"#;

    #[tokio::test]
    async fn a_plugin_is_asked_once_for_a_registry_and_the_closest_answer_is_first() {
        let (dir, providers) = with_plugin(ANSWER, "1h");
        let names = |auths: Vec<cri::AuthConfig>| auths.into_iter().map(|auth| auth.username).collect::<Vec<_>>();
        let (first, second) = tokio::join!(
            providers.credentials("eu.registry.io/team/app:1"),
            providers.credentials("eu.registry.io/team/app:2"),
        );
        assert_eq!(
            (names(first), names(second)),
            (vec!["team".into(), "all".into()], vec!["team".into(), "all".into()])
        );
        assert_eq!(names(providers.credentials("eu.registry.io/team/tool").await), ["team", "all"]);
        assert_eq!(names(providers.credentials("eu.registry.io/x").await), ["all"]);
        let (request, argument) = asked(&dir)[0].rsplit_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let expected = serde_json::json!({"kind": "CredentialProviderRequest", "image": "eu.registry.io/team/app",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1"});
        assert_eq!(serde_json::from_str::<serde_json::Value>(&request).unwrap(), expected);
        assert_eq!((argument.as_str(), asked(&dir).len()), ("word", 1));
        providers.credentials("us.registry.io/x").await;
        assert_eq!(asked(&dir).len(), 2, "another registry");
        assert!(providers.credentials("busybox").await.is_empty());
        assert_eq!(asked(&dir).len(), 2, "not an image of the plugin's");
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_for_one_image_holds_up_no_other_and_leaves_no_process() {
        let script = r#"case $(cat) in */hangs*) echo $$ >>"$ASKED"; sleep 100 & echo $! >>"$ASKED"; wait;; esac
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image",
"auth":{"*.registry.io":{"username":"u","password":"p"}}}'"#;
        let (dir, providers) = with_plugin(script, "1h");
        {
            let mut hanging = std::pin::pin!(providers.credentials("eu.registry.io/hangs"));
            while asked(&dir).len() < 2 {
                tokio::select! {
                    _ = &mut hanging => panic!("it hangs"),
                    () = tokio::time::sleep(std::time::Duration::from_millis(5)) => {}
                }
            }
            assert_eq!(providers.credentials("eu.registry.io/a").await.len(), 1);
        }
        for pid in asked(&dir) {
            let gone = || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
            while !gone() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
    }

    #[tokio::test]
    async fn an_answer_for_no_time_is_not_kept() {
        let (dir, providers) = with_plugin(ANSWER, "0s");
        providers.credentials("eu.registry.io/a").await;
        providers.credentials("eu.registry.io/a").await;
        assert_eq!(asked(&dir).len(), 2);
    }

    #[tokio::test]
    async fn a_plugin_that_fails_has_nothing() {
        for script in ["exit 3", "echo '{}'", "cat >/dev/null; head -c 2000000 /dev/zero"] {
            let (_dir, providers) = with_plugin(script, "1h");
            assert!(providers.credentials("eu.registry.io/a").await.is_empty(), "{script}");
        }
        let (dir, providers) = with_plugin(r#"echo x >>"$ASKED"; exit 3"#, "1h");
        providers.credentials("eu.registry.io/a").await;
        providers.credentials("eu.registry.io/a").await;
        assert_eq!(asked(&dir).len(), 1, "a failure is good for a while");
        let (dir, providers) = with_plugin("true", "1h");
        fs::remove_file(dir.path().join("giver")).unwrap();
        assert!(providers.credentials("eu.registry.io/a").await.is_empty());
    }
}
