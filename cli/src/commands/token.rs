//! `oarlock token`: the bootstrap tokens of this cluster, with which machines join it. A token is a Secret in `kube-system` in
//! upstream's form.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, PostParams};
use oarlock_pki::Pin;
use rand::Rng;

use super::{demo, discovery};
use crate::config::Settings;

const NAMESPACE: &str = "kube-system";
const TYPE: &str = "bootstrap.kubernetes.io/token";
const PREFIX: &str = "bootstrap-token-";
const CALL: Duration = Duration::from_secs(15);

#[derive(clap::Args)]
pub(crate) struct TokenFlags {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(clap::Subcommand)]
enum TokenCommand {
    /// Make a token and print the command that joins a machine
    Create {
        /// How long the token is good for, such as `30m`, `24h` or `7d`; 0 is for ever
        #[arg(long, default_value = "24h", value_parser = super::images::age)]
        ttl: Duration,
        /// What the token is for, in words
        #[arg(long, default_value = "")]
        description: String,
        /// Print the token alone
        #[arg(long)]
        quiet: bool,
    },
    /// List tokens
    List,
    /// Delete tokens; machines that have joined by them stay
    Delete {
        /// Tokens, or their parts before the dot
        #[arg(required = true)]
        tokens: Vec<String>,
    },
}

pub(crate) fn run(settings: &Settings, flags: TokenFlags) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = demo::admin_client(settings).await.context("tokens are made on the server")?;
        match flags.command {
            TokenCommand::Create { ttl, description, quiet } => create(client, ttl, &description, quiet).await,
            TokenCommand::List => list(client).await,
            TokenCommand::Delete { tokens } => delete(client, &tokens).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn random(length: usize) -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = rand::rng();
    (0..length).map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())])).collect()
}

/// The Secret of a token.
fn secret(id: &str, secret: &str, until: Option<Timestamp>, description: &str) -> Secret {
    let mut data = BTreeMap::from([
        ("token-id", id.to_owned()),
        ("token-secret", secret.to_owned()),
        ("usage-bootstrap-authentication", "true".to_owned()),
    ]);
    if let Some(until) = until {
        data.insert("expiration", until.round(jiff::Unit::Second).unwrap_or(until).to_string());
    }
    if !description.is_empty() {
        data.insert("description", description.to_owned());
    }
    Secret {
        metadata: ObjectMeta { name: Some(format!("{PREFIX}{id}")), ..ObjectMeta::default() },
        type_: Some(TYPE.to_owned()),
        string_data: Some(data.into_iter().map(|(key, text)| (key.to_owned(), text)).collect()),
        ..Secret::default()
    }
}

async fn create(client: kube::Client, ttl: Duration, description: &str, quiet: bool) -> anyhow::Result<()> {
    let (server, authority) = discovery::cluster_info(client.clone()).await?;
    let pin = Pin::of(&authority).context("the cluster's authority cannot be read")?;
    let until = match ttl {
        Duration::ZERO => None,
        ttl => Some(Timestamp::now().checked_add(SignedDuration::try_from(ttl)?).context("--ttl is too long")?),
    };
    let (id, rest) = (random(6), random(16));
    let api: Api<Secret> = Api::namespaced(client, NAMESPACE);
    let made = api.create(&PostParams::default(), &secret(&id, &rest, until, description)).await;
    made.context("cannot make the token")?;
    if quiet {
        println!("{id}.{rest}");
        return Ok(());
    }
    let good = until.map_or("for ever".to_owned(), |until| format!("until {until:.0}"));
    println!(
        "the token is good {good}. On the machine that is to join:\n  oarlock join --server {server} --token {id}.{rest} --ca-hash {pin}"
    );
    Ok(())
}

fn text(secret: &Secret, key: &str) -> String {
    let bytes = secret.data.as_ref().and_then(|data| data.get(key));
    bytes.map(|ByteString(bytes)| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
}

/// A line for each token: what is good for joining, until when, and what it is for. Secrets are not shown in full.
fn lines(secrets: &[Secret], now: Timestamp) -> Vec<String> {
    let line = |id: &str, left: &str, usages: &str, description: &str| {
        format!("{id:<8} {left:<10} {usages:<24} {description}").trim_end().to_owned()
    };
    let rows = secrets.iter().map(|secret| {
        let expiration = text(secret, "expiration");
        let left = match expiration.parse::<Timestamp>() {
            _ if expiration.is_empty() => "forever".to_owned(),
            Ok(until) if until > now => time(until.duration_since(now)),
            _ => "expired".to_owned(),
        };
        let usages: Vec<&str> = ["authentication", "signing"]
            .into_iter()
            .filter(|usage| text(secret, &format!("usage-bootstrap-{usage}")) == "true")
            .collect();
        line(&text(secret, "token-id"), &left, &usages.join(","), &text(secret, "description"))
    });
    [line("ID", "TIME LEFT", "USAGES", "DESCRIPTION")].into_iter().chain(rows).collect()
}

/// As kubectl shows an age.
fn time(left: SignedDuration) -> String {
    match left.as_secs() {
        seconds if seconds < 120 => format!("{seconds}s"),
        seconds if seconds < 7_200 => format!("{}m", seconds / 60),
        seconds if seconds < 172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

async fn list(client: kube::Client) -> anyhow::Result<()> {
    let api: Api<Secret> = Api::namespaced(client, NAMESPACE);
    let params = ListParams::default().fields(&format!("type={TYPE}"));
    let found = tokio::time::timeout(CALL, api.list(&params)).await.context("no answer in time")??;
    for line in lines(&found.items, Timestamp::now()) {
        println!("{line}");
    }
    Ok(())
}

async fn delete(client: kube::Client, tokens: &[String]) -> anyhow::Result<()> {
    let api: Api<Secret> = Api::namespaced(client, NAMESPACE);
    for token in tokens {
        let id = token.split('.').next().unwrap_or_default();
        match api.delete(&format!("{PREFIX}{id}"), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => anyhow::bail!("there is no token {id}"),
            outcome => outcome.with_context(|| format!("cannot delete the token {id}"))?,
        };
        println!("deleted {id}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_listed_without_their_secrets() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let kept = |id: &str, until: Option<&str>| {
            let until = until.map(|until| until.parse().expect("a time"));
            let mut secret = secret(id, "0123456789abcdef", until, "for the yard");
            let given = secret.string_data.take().expect("data");
            secret.data = Some(given.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))).collect());
            secret
        };
        let all = [
            kept("aaaaaa", Some("2026-01-02T00:00:00Z")),
            kept("bbbbbb", None),
            kept("cccccc", Some("2025-12-31T00:00:00Z")),
        ];
        let shown = lines(&all, now);
        assert_eq!(shown[1], "aaaaaa   24h        authentication           for the yard");
        assert!(shown[2].contains("forever") && shown[3].contains("expired"), "{shown:?}");
        assert!(!shown.concat().contains("0123456789"));
    }

    #[test]
    fn a_token_has_upstreams_form() {
        let (id, rest) = (random(6), random(16));
        let plain = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        assert!(id.len() == 6 && rest.len() == 16 && plain(&id) && plain(&rest));
        let made = secret(&id, &rest, Some("2026-01-01T00:00:00.75Z".parse().expect("a time")), "");
        let data = made.string_data.expect("data");
        assert_eq!(data["expiration"], "2026-01-01T00:00:01Z");
        assert!(!data.contains_key("description"));
    }
}
