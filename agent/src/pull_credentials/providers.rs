//! [`Providers`]: all plugins; each is asked once at a time for one image, and its answer kept.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::ServiceAccount;
use oarlock_proto::cri;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::config::{self, Provider, ProvidersConfigError, TokenWish};
use super::kept::{Kept, Login};
use super::matching::{Place, full_name};
use super::plugin::{self, Account};
use crate::error::chain;

/// Who pulls, for plugins that are told.
#[async_trait]
pub(crate) trait Puller: Sync {
    /// The pod's service account; None for a pod without one.
    async fn service_account(&self) -> Result<Option<ServiceAccount>, String>;
    /// A token of that account, bound to the pod.
    async fn token(&self, audience: &str) -> Result<String, String>;
}

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
    pub(crate) async fn credentials(&self, image: &str, puller: &dyn Puller) -> Vec<cri::AuthConfig> {
        let image = full_name(image);
        let Some(place) = Place::parse(&image) else { return Vec::new() };
        let mut found: Vec<Login> = Vec::new();
        for known in &self.known {
            if known.provider.images.iter().any(|pattern| pattern.fits(&place)) {
                match told(&known.provider, puller).await {
                    Ok(Told::Skip) => {}
                    Ok(Told::Nothing) => found.extend(self.ask(known, &image, "", None).await),
                    Ok(Told::Account { whose, account }) => {
                        found.extend(self.ask(known, &image, &whose, Some(&account)).await);
                    }
                    Err(error) => {
                        let plugin = &known.provider.name;
                        tracing::warn!(plugin, image, error, "a credential provider plugin cannot be asked");
                    }
                }
            }
        }
        found.retain(|login| Place::parse(&login.pattern).is_some_and(|pattern| pattern.fits(&place)));
        found.sort_by(|a, b| b.pattern.cmp(&a.pattern));
        let auth =
            |login: Login| cri::AuthConfig { username: login.username, password: login.password, ..Default::default() };
        found.into_iter().map(auth).collect()
    }

    /// `whose` tells answers for different accounts apart.
    async fn ask(&self, known: &Known, image: &str, whose: &str, account: Option<&Account>) -> Vec<Login> {
        let turn = known.turn(&format!("{whose} {image}"));
        let _turn = turn.lock().await;
        let kept = known.kept.lock().find(whose, image, Instant::now());
        if let Some(logins) = kept {
            return logins;
        }
        match plugin::ask(&self.bin_dir, &known.provider, image, account).await {
            Ok(answer) => {
                let time = answer.keep.unwrap_or(known.provider.keep);
                let logins = answer.logins.clone();
                known.kept.lock().keep((whose, image), answer.scope, logins, time, Instant::now());
                answer.logins
            }
            Err(error) => {
                let (plugin, error) = (&known.provider.name, chain(&error));
                tracing::warn!(plugin, image, error, "a credential provider plugin failed");
                known.kept.lock().keep_failure(whose, image, Instant::now());
                Vec::new()
            }
        }
    }
}

/// What a plugin is told of who pulls.
enum Told {
    /// It is not asked for this pod.
    Skip,
    Nothing,
    Account {
        whose: String,
        account: Account,
    },
}

async fn told(provider: &Provider, puller: &dyn Puller) -> Result<Told, String> {
    let Some(wish) = &provider.token else { return Ok(Told::Nothing) };
    let Some(object) = puller.service_account().await? else {
        return Ok(if wish.required { Told::Skip } else { Told::Nothing });
    };
    let annotations = object.metadata.annotations.clone().unwrap_or_default();
    if let Some(missing) = wish.required_annotations.iter().find(|key| !annotations.contains_key(*key)) {
        let name = object.metadata.name.unwrap_or_default();
        return Err(format!("service account {name:?} lacks the annotation {missing:?}"));
    }
    let token = puller.token(&wish.audience).await?;
    let wanted = wish.required_annotations.iter().chain(&wish.optional_annotations);
    let annotations = wanted.filter_map(|key| annotations.get_key_value(key)).map(|(k, v)| (k.clone(), v.clone()));
    let account = Account { token, annotations: annotations.collect() };
    Ok(Told::Account { whose: whose(wish, &object, &account), account })
}

fn whose(wish: &TokenWish, object: &ServiceAccount, account: &Account) -> String {
    let metadata = &object.metadata;
    let token = Some(&account.token).filter(|_| wish.by_token);
    format!("{:?} {:?} {:?} {:?} {token:?}", metadata.namespace, metadata.name, metadata.uid, account.annotations)
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

    /// A pod without a service account.
    struct Nobody;

    #[async_trait]
    impl Puller for Nobody {
        async fn service_account(&self) -> Result<Option<ServiceAccount>, String> {
            Ok(None)
        }

        async fn token(&self, _audience: &str) -> Result<String, String> {
            Err("nobody has none".to_owned())
        }
    }

    /// A pod of an account with these annotations; its number is in its token.
    struct Somebody(u8, &'static str);

    #[async_trait]
    impl Puller for Somebody {
        async fn service_account(&self) -> Result<Option<ServiceAccount>, String> {
            let value = serde_json::json!({"metadata": {"namespace": "default", "name": "own", "uid": "u",
                "annotations": {"example.com/role": self.1, "other": "not told"}}});
            Ok(serde_json::from_value(value).ok())
        }

        async fn token(&self, audience: &str) -> Result<String, String> {
            Ok(format!("{audience}-{}", self.0))
        }
    }

    fn with_tokens(attributes: &str) -> (tempfile::TempDir, Providers) {
        let (dir, _) = with_plugin(ANSWER, "1h");
        let file = dir.path().join("providers.yaml");
        let text = fs::read_to_string(&file).unwrap() + &format!("  tokenAttributes: {{{attributes}}}\n");
        fs::write(&file, text).unwrap();
        let providers = Providers::open(&file, dir.path().to_owned()).unwrap();
        (dir, providers)
    }

    #[tokio::test]
    async fn a_plugin_is_told_whose_pod_pulls_and_its_answer_is_kept_for_that_account() {
        let wish = "serviceAccountTokenAudience: reg, cacheType: ServiceAccount, requireServiceAccount: true, \
                    requiredServiceAccountAnnotationKeys: [example.com/role]";
        let (dir, providers) = with_tokens(wish);
        assert!(providers.credentials("eu.registry.io/a", &Nobody).await.is_empty());
        assert!(asked(&dir).is_empty(), "it is not asked for a pod without an account");
        assert_eq!(providers.credentials("eu.registry.io/a", &Somebody(1, "reader")).await.len(), 1);
        let (request, _) = asked(&dir)[0].rsplit_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let request: serde_json::Value = serde_json::from_str(&request).unwrap();
        assert_eq!(request["serviceAccountToken"], "reg-1");
        assert_eq!(request["serviceAccountAnnotations"], serde_json::json!({"example.com/role": "reader"}));
        providers.credentials("eu.registry.io/a", &Somebody(2, "reader")).await;
        assert_eq!(asked(&dir).len(), 1, "another token of the same account");
        providers.credentials("eu.registry.io/a", &Somebody(2, "writer")).await;
        assert_eq!(asked(&dir).len(), 2, "what it is told of the account has changed");

        let wish = "serviceAccountTokenAudience: reg, cacheType: Token, requireServiceAccount: false";
        let (dir, providers) = with_tokens(wish);
        for puller in [Somebody(1, ""), Somebody(1, ""), Somebody(2, "")] {
            providers.credentials("eu.registry.io/a", &puller).await;
        }
        assert_eq!(asked(&dir).len(), 2, "once for each token");
        providers.credentials("eu.registry.io/a", &Nobody).await;
        assert!(asked(&dir).len() == 3 && !asked(&dir)[2].contains("serviceAccount"));

        let wish = "serviceAccountTokenAudience: reg, cacheType: Token, requireServiceAccount: true, \
                    requiredServiceAccountAnnotationKeys: [absent]";
        let (dir, providers) = with_tokens(wish);
        assert!(providers.credentials("eu.registry.io/a", &Somebody(1, "")).await.is_empty());
        assert!(asked(&dir).is_empty());
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
            providers.credentials("eu.registry.io/team/app:1", &Nobody),
            providers.credentials("eu.registry.io/team/app:2", &Nobody),
        );
        assert_eq!(
            (names(first), names(second)),
            (vec!["team".into(), "all".into()], vec!["team".into(), "all".into()])
        );
        assert_eq!(names(providers.credentials("eu.registry.io/team/tool", &Nobody).await), ["team", "all"]);
        assert_eq!(names(providers.credentials("eu.registry.io/x", &Nobody).await), ["all"]);
        let (request, argument) = asked(&dir)[0].rsplit_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let expected = serde_json::json!({"kind": "CredentialProviderRequest", "image": "eu.registry.io/team/app",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1"});
        assert_eq!(serde_json::from_str::<serde_json::Value>(&request).unwrap(), expected);
        assert_eq!((argument.as_str(), asked(&dir).len()), ("word", 1));
        providers.credentials("us.registry.io/x", &Nobody).await;
        assert_eq!(asked(&dir).len(), 2, "another registry");
        assert!(providers.credentials("busybox", &Nobody).await.is_empty());
        assert_eq!(asked(&dir).len(), 2, "not an image of the plugin's");
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_for_one_image_holds_up_no_other_and_leaves_no_process() {
        let script = r#"case $(cat) in */hangs*) echo $$ >>"$ASKED"; sleep 100 & echo $! >>"$ASKED"; wait;; esac
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image",
"auth":{"*.registry.io":{"username":"u","password":"p"}}}'"#;
        let (dir, providers) = with_plugin(script, "1h");
        {
            let mut hanging = std::pin::pin!(providers.credentials("eu.registry.io/hangs", &Nobody));
            while asked(&dir).len() < 2 {
                tokio::select! {
                    _ = &mut hanging => panic!("it hangs"),
                    () = tokio::time::sleep(std::time::Duration::from_millis(5)) => {}
                }
            }
            assert_eq!(providers.credentials("eu.registry.io/a", &Nobody).await.len(), 1);
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
        providers.credentials("eu.registry.io/a", &Nobody).await;
        providers.credentials("eu.registry.io/a", &Nobody).await;
        assert_eq!(asked(&dir).len(), 2);
    }

    #[tokio::test]
    async fn a_plugin_that_fails_has_nothing() {
        for script in ["exit 3", "echo '{}'", "cat >/dev/null; head -c 2000000 /dev/zero"] {
            let (_dir, providers) = with_plugin(script, "1h");
            assert!(providers.credentials("eu.registry.io/a", &Nobody).await.is_empty(), "{script}");
        }
        let (dir, providers) = with_plugin(r#"echo x >>"$ASKED"; exit 3"#, "1h");
        providers.credentials("eu.registry.io/a", &Nobody).await;
        providers.credentials("eu.registry.io/a", &Nobody).await;
        assert_eq!(asked(&dir).len(), 1, "a failure is good for a while");
        let (dir, providers) = with_plugin("true", "1h");
        fs::remove_file(dir.path().join("giver")).unwrap();
        assert!(providers.credentials("eu.registry.io/a", &Nobody).await.is_empty());
    }
}
