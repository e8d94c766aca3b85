//! CredentialProviderConfig: which plugins there are, read strictly. Pure but for reading the file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::matching::Place;
use crate::go_duration;

/// Why the plugins cannot be used. Display names the field.
#[derive(Debug, thiserror::Error)]
pub enum ProvidersConfigError {
    #[error("read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: {problem}", path.display())]
    Form { path: PathBuf, problem: String },
    #[error("{}: {field}: {problem}", path.display())]
    Field { path: PathBuf, field: String, problem: String },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    token_attributes: Option<TokenFields>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TokenFields {
    #[serde(default)]
    service_account_token_audience: String,
    #[serde(default)]
    cache_type: String,
    require_service_account: Option<bool>,
    #[serde(default)]
    required_service_account_annotation_keys: Vec<String>,
    #[serde(default)]
    optional_service_account_annotation_keys: Vec<String>,
}

/// What a plugin is told of the service account of the pod that pulls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenWish {
    pub audience: String,
    /// An answer is for one token, or else for all of the account's.
    pub by_token: bool,
    /// The plugin is not asked for pods without an account.
    pub required: bool,
    pub required_annotations: Vec<String>,
    pub optional_annotations: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Variable {
    pub name: String,
    pub value: String,
}

/// One plugin, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Provider {
    pub name: String,
    pub images: Vec<Place>,
    /// How long an answer that does not say is kept.
    pub keep: Duration,
    pub api_version: String,
    pub args: Vec<String>,
    pub env: Vec<Variable>,
    pub token: Option<TokenWish>,
}

pub(super) fn read(path: &Path) -> Result<Vec<Provider>, ProvidersConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ProvidersConfigError::Read { path: path.to_owned(), source })?;
    parse(&text, path)
}

const FILE_VERSIONS: &[&str] =
    &["kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"];
const PLUGIN_VERSIONS: &[&str] = &[
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// The version of plugins that are given tokens.
const TOKEN_VERSION: &str = "credentialprovider.kubelet.k8s.io/v1";

fn parse(text: &str, path: &Path) -> Result<Vec<Provider>, ProvidersConfigError> {
    let wrong = |field: String, problem: &str| ProvidersConfigError::Field {
        path: path.to_owned(),
        field,
        problem: problem.to_owned(),
    };
    let file: File = serde_yaml_ng::from_str(text)
        .map_err(|error| ProvidersConfigError::Form { path: path.to_owned(), problem: error.to_string() })?;
    if file.kind != "CredentialProviderConfig" {
        return Err(wrong("kind".to_owned(), "must be CredentialProviderConfig"));
    }
    if !FILE_VERSIONS.contains(&file.api_version.as_str()) {
        return Err(wrong("apiVersion".to_owned(), "must be kubelet.config.k8s.io/v1, v1beta1 or v1alpha1"));
    }
    if file.providers.is_empty() {
        return Err(wrong("providers".to_owned(), "at least 1 item in plugins is required"));
    }
    let mut providers: Vec<Provider> = Vec::new();
    for (index, entry) in file.providers.into_iter().enumerate() {
        let provider =
            check(entry).map_err(|(field, problem)| wrong(format!("providers[{index}].{field}"), problem))?;
        if providers.iter().any(|known| known.name == provider.name) {
            return Err(wrong(format!("providers[{index}].name"), "duplicate provider name"));
        }
        providers.push(provider);
    }
    Ok(providers)
}

fn check(entry: Entry) -> Result<Provider, (String, &'static str)> {
    let wrong = |field: &str, problem: &'static str| (field.to_owned(), problem);
    let plain = !entry.name.contains(['/', '\\', '\0']) && !matches!(entry.name.as_str(), "" | "." | "..");
    if !plain || entry.name.contains(char::is_whitespace) {
        return Err(wrong("name", "must be the plain name of a program, without spaces"));
    }
    if !PLUGIN_VERSIONS.contains(&entry.api_version.as_str()) {
        return Err(wrong("apiVersion", "must be credentialprovider.kubelet.k8s.io/v1, v1beta1 or v1alpha1"));
    }
    if entry.match_images.is_empty() {
        return Err(wrong("matchImages", "at least 1 item in matchImages is required"));
    }
    let mut images = Vec::new();
    for (index, pattern) in entry.match_images.iter().enumerate() {
        let place = Place::parse(pattern);
        images.push(place.ok_or_else(|| (format!("matchImages[{index}]"), "is not a host with an optional path"))?);
    }
    let keep = entry.default_cache_duration.ok_or_else(|| wrong("defaultCacheDuration", "is required"))?;
    let keep = go_duration::parse(&keep);
    let keep = keep.ok_or_else(|| wrong("defaultCacheDuration", "must be a duration such as 10m, and not negative"))?;
    let token = entry.token_attributes.map(|fields| token_wish(fields, &entry.api_version)).transpose();
    let token = token.map_err(|(field, problem)| (format!("tokenAttributes{field}"), problem))?;
    let Entry { name, api_version, args, env, .. } = entry;
    Ok(Provider { name, images, keep, api_version, args, env, token })
}

/// A wrong field with the dot before it.
fn token_wish(fields: TokenFields, api_version: &str) -> Result<TokenWish, (&'static str, &'static str)> {
    if api_version != TOKEN_VERSION {
        return Err(("", "is only for plugins of credentialprovider.kubelet.k8s.io/v1"));
    }
    if fields.service_account_token_audience.is_empty() {
        return Err((".serviceAccountTokenAudience", "is required"));
    }
    let by_token = match fields.cache_type.as_str() {
        "Token" => true,
        "ServiceAccount" => false,
        _ => return Err((".cacheType", "must be Token or ServiceAccount")),
    };
    let required = fields.require_service_account.ok_or((".requireServiceAccount", "is required"))?;
    let (must, may) =
        (fields.required_service_account_annotation_keys, fields.optional_service_account_annotation_keys);
    if !required && !must.is_empty() {
        return Err((".requiredServiceAccountAnnotationKeys", "must be empty unless requireServiceAccount is true"));
    }
    for (keys, field) in
        [(&must, ".requiredServiceAccountAnnotationKeys"), (&may, ".optionalServiceAccountAnnotationKeys")]
    {
        if !keys.iter().all(|key| is_annotation_key(key)) {
            return Err((field, "must hold qualified names of annotations"));
        }
        if keys.iter().enumerate().any(|(place, key)| keys[..place].contains(key)) {
            return Err((field, "holds a name twice"));
        }
    }
    if must.iter().any(|key| may.contains(key)) {
        return Err(("", "annotation keys cannot be both required and optional"));
    }
    Ok(TokenWish {
        audience: fields.service_account_token_audience,
        by_token,
        required,
        required_annotations: must,
        optional_annotations: may,
    })
}

/// A name with an optional DNS prefix. Case does not matter, as for annotations themselves.
fn is_annotation_key(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    let (prefix, name) = key.rsplit_once('/').map_or((None, key.as_str()), |(prefix, name)| (Some(prefix), name));
    let end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let plain = |text: &str, inner: &[char]| {
        text.starts_with(end) && text.ends_with(end) && text.chars().all(|c| end(c) || inner.contains(&c))
    };
    name.len() <= 63
        && plain(name, &['-', '_', '.'])
        && prefix.is_none_or(|prefix| prefix.len() <= 253 && prefix.split('.').all(|label| plain(label, &['-'])))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: ecr\n  \
        matchImages: ['*.registry.io', 'other.io/team']\n  defaultCacheDuration: 12h\n  \
        apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [get]\n  env: [{name: PROFILE, value: a}]\n";

    fn refused(text: &str) -> String {
        parse(text, Path::new("providers.yaml")).unwrap_err().to_string()
    }

    #[test]
    fn annotation_keys_are_qualified_names_in_either_case() {
        for good in ["plain", "example.com/roleARN", "azure.workload.identity/clientID", "A_b.c"] {
            assert!(is_annotation_key(good), "{good}");
        }
        for bad in ["", "A b", "/x", "a/", "-a", "a_b.com/x"] {
            assert!(!is_annotation_key(bad), "{bad}");
        }
    }

    #[test]
    fn a_plugin_is_read_with_all_that_it_needs() {
        let providers = parse(GOOD, Path::new("p")).unwrap();
        assert_eq!((providers[0].name.as_str(), providers[0].keep), ("ecr", Duration::from_secs(43_200)));
        assert_eq!((providers[0].images.len(), providers[0].args.len(), providers[0].env.len()), (2, 1, 1));
    }

    #[test]
    fn a_plugin_may_want_tokens() {
        let wish = "  tokenAttributes: {serviceAccountTokenAudience: registry, cacheType: ServiceAccount, \
                    requireServiceAccount: true, requiredServiceAccountAnnotationKeys: [example.com/role]}";
        let providers = parse(&GOOD.replace("  args: [get]", wish), Path::new("p")).unwrap();
        let wish = providers[0].token.clone().unwrap();
        assert_eq!((wish.audience.as_str(), wish.by_token, wish.required), ("registry", false, true));
        assert_eq!(wish.required_annotations, ["example.com/role"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, expected) in [
            ("name: ecr", "name: ../ecr", "providers[0].name: must be the plain name"),
            ("'*.registry.io', 'other.io/team'", "", "providers[0].matchImages: at least 1"),
            ("'other.io/team'", "'a b'", "providers[0].matchImages[1]: is not a host"),
            ("12h", "-1h", "providers[0].defaultCacheDuration: must be a duration"),
            ("  defaultCacheDuration: 12h\n", "", "providers[0].defaultCacheDuration: is required"),
            ("k8s.io/v1\n  args", "k8s.io/v2\n  args", "providers[0].apiVersion: must be"),
            ("kind: Cred", "kind: Fred", "kind: must be"),
            ("  args: [get]", "  arg: [get]", "unknown field"),
            (
                "  args: [get]",
                "  tokenAttributes: {}",
                "providers[0].tokenAttributes.serviceAccountTokenAudience: is req",
            ),
            (
                "  args: [get]",
                "  tokenAttributes: {serviceAccountTokenAudience: a}",
                "tokenAttributes.cacheType: must be",
            ),
            (
                "  args: [get]",
                "  tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token}",
                "tokenAttributes.requireServiceAccount: is required",
            ),
            (
                "  args: [get]",
                "  tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token, requireServiceAccount: false, \
                 requiredServiceAccountAnnotationKeys: [a]}",
                "requiredServiceAccountAnnotationKeys: must be empty unless",
            ),
            (
                "  args: [get]",
                "  tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token, requireServiceAccount: true, \
                 requiredServiceAccountAnnotationKeys: [a], optionalServiceAccountAnnotationKeys: [a]}",
                "tokenAttributes: annotation keys cannot be both",
            ),
            (
                "  args: [get]",
                "  tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token, requireServiceAccount: true, \
                 optionalServiceAccountAnnotationKeys: [A b]}",
                "optionalServiceAccountAnnotationKeys: must hold qualified names",
            ),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let said = refused(&GOOD.replace(from, to));
            assert!(said.starts_with("providers.yaml: ") && said.contains(expected), "{said}");
        }
        let (head, entry) = GOOD.split_once("- name").unwrap();
        assert!(refused(&format!("{head}- name{entry}- name{entry}")).contains("providers[1].name: duplicate"));
        assert!(refused(&head.replace("providers:", "providers: []")).contains("at least 1 item in plugins"));
    }
}
