//! Image references, normalised as Docker does: `busybox` is `docker.io/library/busybox:latest`. Pure.

use std::fmt;

const DEFAULT_REGISTRY: &str = "docker.io";
const LEGACY_REGISTRY: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const NAME_LENGTH_MAX: usize = 255;

/// A complete reference: registry, repository and a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: Option<String>,
}

/// Why a reference is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    #[error("the name is empty")]
    Empty,
    #[error("repository name must be lowercase")]
    Uppercase,
    #[error("invalid reference format")]
    Format,
    #[error("repository name must not be more than 255 characters")]
    TooLong,
    #[error("invalid tag")]
    Tag,
    #[error("unsupported or malformed digest")]
    Digest,
}

impl Reference {
    /// Parses and completes a reference.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(check_digest(digest)?)),
            None => (text, None),
        };
        let (name, tag) = split_tag(rest);
        let tag = tag.map(check_tag).transpose()?;
        let (registry, repository) = split_registry(name);
        check_registry(&registry)?;
        check_repository(&repository)?;
        if registry.len() + 1 + repository.len() > NAME_LENGTH_MAX {
            return Err(ReferenceError::TooLong);
        }
        let tag = if tag.is_none() && digest.is_none() { Some("latest".to_owned()) } else { tag };
        Ok(Reference { registry, repository, tag, digest })
    }

    /// Registry and repository.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The name with the tag; None for a reference by digest alone.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.name()))
    }

    /// The name with a digest.
    pub fn with_digest(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        // A colon before a slash belongs to the registry's port.
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    }
}

/// The first part is a registry only if it looks like a host: has a dot or a port, or is `localhost`, or has an
/// upper-case letter (which no repository may).
fn split_registry(name: &str) -> (String, String) {
    let host = name.split_once('/').filter(|(first, _)| {
        first.contains(['.', ':']) || *first == "localhost" || first.chars().any(|c| c.is_ascii_uppercase())
    });
    let (registry, repository) = host.unwrap_or((DEFAULT_REGISTRY, name));
    let registry = if registry == LEGACY_REGISTRY { DEFAULT_REGISTRY } else { registry };
    if registry == DEFAULT_REGISTRY && !repository.contains('/') {
        return (registry.to_owned(), format!("{OFFICIAL}{repository}"));
    }
    (registry.to_owned(), repository.to_owned())
}

fn check_registry(registry: &str) -> Result<(), ReferenceError> {
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(ReferenceError::Format)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| ReferenceError::Format)?;
            ("", port.strip_prefix(':').or_else(|| port.is_empty().then_some("0")))
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, Some("0")),
        },
    };
    let port_fits = port.is_some_and(|port| port.parse::<u16>().is_ok());
    let label_fits = |label: &str| {
        !label.is_empty()
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if port_fits && (registry.starts_with('[') || host.split('.').all(label_fits)) {
        return Ok(());
    }
    Err(ReferenceError::Format)
}

fn check_repository(repository: &str) -> Result<(), ReferenceError> {
    if repository.chars().any(|c| c.is_ascii_uppercase()) {
        return Err(ReferenceError::Uppercase);
    }
    if repository.split('/').all(is_path_component) { Ok(()) } else { Err(ReferenceError::Format) }
}

/// Letters and digits, joined by one `.`, one or two `_`, or any number of `-`.
fn is_path_component(part: &str) -> bool {
    let mut rest = part;
    loop {
        let word = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).len();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        if rest.is_empty() {
            return true;
        }
        let joint = rest.len() - rest.trim_start_matches(['.', '_', '-']).len();
        let known =
            matches!(&rest[..joint], "." | "_" | "__") || (joint > 0 && rest[..joint].bytes().all(|b| b == b'-'));
        if !known {
            return false;
        }
        rest = &rest[joint..];
    }
}

fn check_tag(tag: &str) -> Result<String, ReferenceError> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let fits = tag.len() <= 128 && tag.starts_with(word) && tag.chars().all(|c| word(c) || c == '.' || c == '-');
    if fits { Ok(tag.to_owned()) } else { Err(ReferenceError::Tag) }
}

/// Only SHA-256, which is what every registry uses; lower-case hexadecimal.
pub(crate) fn check_digest(digest: &str) -> Result<String, ReferenceError> {
    let hex = digest.strip_prefix("sha256:").ok_or(ReferenceError::Digest)?;
    let fits = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if fits { Ok(digest.to_owned()) } else { Err(ReferenceError::Digest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed_as_docker_does() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let cases = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("foo/bar", "docker.io/foo/bar:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/foo", "localhost/foo:latest"),
            ("localhost:5000/foo:v1", "localhost:5000/foo:v1"),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("a__b/c-d--e.f", "docker.io/a__b/c-d--e.f:latest"),
        ];
        for (text, expected) in cases {
            assert_eq!(Reference::parse(text).unwrap().to_string(), expected);
        }
        let both = Reference::parse(&format!("busybox:1@{digest}")).unwrap();
        assert_eq!(both.to_string(), format!("docker.io/library/busybox:1@{digest}"));
        let by_digest = Reference::parse(&format!("busybox@{digest}")).unwrap();
        assert_eq!(by_digest.tagged(), None);
    }

    #[test]
    fn malformed_references_are_refused_with_the_reason() {
        let cases = [
            ("", ReferenceError::Empty),
            ("Busybox", ReferenceError::Uppercase),
            ("foo/Bar", ReferenceError::Uppercase),
            ("a..b", ReferenceError::Format),
            ("a___b", ReferenceError::Format),
            ("-a", ReferenceError::Format),
            ("a//b", ReferenceError::Format),
            ("../../etc", ReferenceError::Format),
            ("host.io:99999/a", ReferenceError::Format),
            ("a:b c", ReferenceError::Tag),
            ("a@sha256:12", ReferenceError::Digest),
            ("a@md5:aaaa", ReferenceError::Digest),
        ];
        for (text, expected) in cases {
            assert_eq!(Reference::parse(text), Err(expected), "{text:?}");
        }
        assert_eq!(Reference::parse(&"a".repeat(300)), Err(ReferenceError::TooLong));
    }
}
