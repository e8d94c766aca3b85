//! Asking one plugin: a request on its standard input, an answer on its standard output.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use super::config::Provider;
use super::kept::{Login, Scope};
use crate::go_duration;

const LIMIT: Duration = Duration::from_secs(60);
const MOST_BYTES: u64 = 1 << 20;
/// How often and how far apart a program is tried that is just being replaced (ETXTBSY).
const BUSY_ATTEMPTS: u32 = 40;
const BUSY_PAUSE: Duration = Duration::from_millis(25);

/// What a plugin said.
#[derive(Debug)]
pub(super) struct Answer {
    pub scope: Scope,
    /// None leaves it to the configuration.
    pub keep: Option<Duration>,
    pub logins: Vec<Login>,
}

/// A plugin that could not be asked or made no sense. What it wrote may hold secrets and is not shown.
#[derive(Debug, thiserror::Error)]
pub(super) enum PluginError {
    #[error("start the plugin")]
    Start(#[source] std::io::Error),
    #[error("talk to the plugin")]
    Talk(#[source] std::io::Error),
    #[error("the plugin took longer than {} s", LIMIT.as_secs())]
    Timeout,
    #[error("the plugin ended with {0}")]
    Failed(std::process::ExitStatus),
    #[error("the plugin's answer is larger than {MOST_BYTES} bytes")]
    TooLong,
    #[error("the plugin's answer is not one: {0}")]
    Answer(&'static str),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    cache_key_type: String,
    cache_duration: Option<String>,
    auth: Option<BTreeMap<String, Auth>>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Auth {
    username: String,
    password: String,
}

pub(super) fn parse(bytes: &[u8], api_version: &str) -> Result<Answer, PluginError> {
    let response: Response =
        serde_json::from_slice(bytes).map_err(|_| PluginError::Answer("it is not JSON of its form"))?;
    if response.kind != "CredentialProviderResponse" {
        return Err(PluginError::Answer("its kind is not CredentialProviderResponse"));
    }
    if response.api_version != api_version {
        return Err(PluginError::Answer("its apiVersion is not the configured one"));
    }
    let scope = match response.cache_key_type.as_str() {
        "Image" => Scope::Image,
        "Registry" => Scope::Registry,
        "Global" => Scope::Global,
        _ => return Err(PluginError::Answer("its cacheKeyType is none of Image, Registry, Global")),
    };
    let bad = PluginError::Answer("its cacheDuration is no duration");
    let keep = response.cache_duration.map(|text| go_duration::parse(&text).ok_or(bad)).transpose()?;
    let auth = response.auth.unwrap_or_default().into_iter();
    let login = |(pattern, auth): (String, Auth)| Login { pattern, username: auth.username, password: auth.password };
    Ok(Answer { scope, keep, logins: auth.map(login).collect() })
}

/// A plugin and what it started, killed when nobody waits for it any longer. Not after it has been waited for: its number
/// may be another's then.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

/// What a plugin is told of who pulls.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub token: String,
    pub annotations: BTreeMap<String, String>,
}

/// Starts a plugin, also one that is just being replaced: its file is busy for a moment then.
async fn start(command: &mut Command) -> io::Result<Child> {
    let mut attempts = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && attempts < BUSY_ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// Asks for credentials for the image, by its full name.
pub(super) async fn ask(
    bin_dir: &Path,
    provider: &Provider,
    image: &str,
    account: Option<&Account>,
) -> Result<Answer, PluginError> {
    let mut request = serde_json::json!({
        "kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": image
    });
    if let Some(account) = account {
        request["serviceAccountToken"] = account.token.as_str().into();
        if !account.annotations.is_empty() {
            request["serviceAccountAnnotations"] = serde_json::json!(account.annotations);
        }
    }
    let mut command = Command::new(bin_dir.join(&provider.name));
    command.args(&provider.args).envs(provider.env.iter().map(|variable| (&variable.name, &variable.value)));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    command.process_group(0);
    let mut child = start(&mut command).await.map_err(PluginError::Start)?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        let said = async {
            if let Some(mut stdin) = stdin {
                // A plugin that needs no question may be gone before it is asked.
                let _ = stdin.write_all(request.to_string().as_bytes()).await;
            }
        };
        let mut heard = Vec::new();
        let listen = async {
            match stdout {
                Some(stdout) => stdout.take(MOST_BYTES + 1).read_to_end(&mut heard).await,
                None => Ok(0),
            }
        };
        let ((), read) = tokio::join!(said, listen);
        read.map_err(PluginError::Talk)?;
        if heard.len() as u64 > MOST_BYTES {
            return Err(PluginError::TooLong);
        }
        let status = child.wait().await.map_err(PluginError::Talk)?;
        group.0 = None;
        if status.success() { parse(&heard, &provider.api_version) } else { Err(PluginError::Failed(status)) }
    };
    tokio::time::timeout(LIMIT, talk).await.unwrap_or(Err(PluginError::Timeout))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = "credentialprovider.kubelet.k8s.io/v1";

    #[test]
    fn only_an_answer_of_the_right_form_is_one() {
        let good = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"{VERSION}","cacheKeyType":"Registry","cacheDuration":"6h0m0s","auth":{{"r.io":{{"username":"u","password":"p"}}}}}}"#
        );
        let answer = parse(good.as_bytes(), VERSION).expect("an answer");
        assert_eq!((answer.scope, answer.keep), (Scope::Registry, Some(Duration::from_secs(21_600))));
        assert_eq!(answer.logins[0].username, "u");
        for (from, to) in
            [("Response", "Request"), ("/v1\"", "/v2\""), ("Registry", "Node"), ("6h0m0s", "soon"), ("{", "")]
        {
            assert!(parse(good.replace(from, to).as_bytes(), VERSION).is_err(), "{from}");
        }
        let none = good.split(",\"cacheDuration").next().unwrap().to_owned() + "}";
        let answer = parse(none.as_bytes(), VERSION).expect("an answer");
        assert!(answer.keep.is_none() && answer.logins.is_empty());
    }
}
