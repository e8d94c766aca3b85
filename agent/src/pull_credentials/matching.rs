//! Which images a pattern such as `*.registry.example/team` is for. Pure.

use crate::spec::image::is_host;

/// A host with an optional port, and a path: of a pattern, or of an image without tag and digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    host: Vec<String>,
    port: String,
    path: String,
}

impl Place {
    /// None for what cannot be a place.
    pub(crate) fn parse(text: &str) -> Option<Place> {
        let bare = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        let (host, path) =
            bare.split_once('/').map_or((bare, String::new()), |(host, path)| (host, format!("/{path}")));
        let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
        let sound = !name.is_empty()
            && port.bytes().all(|b| b.is_ascii_digit() || b == b'*')
            && !bare.contains(char::is_whitespace)
            && !bare.contains("://");
        sound.then(|| Place { host: name.split('.').map(str::to_owned).collect(), port: port.to_owned(), path })
    }

    /// Whether `image` is of this pattern: as many labels of the host, each fitting; the same port; a path that begins alike.
    pub(crate) fn fits(&self, image: &Place) -> bool {
        self.port == image.port
            && self.host.len() == image.host.len()
            && self
                .host
                .iter()
                .zip(&image.host)
                .all(|(pattern, label)| label_fits(pattern.as_bytes(), label.as_bytes()))
            && image.path.starts_with(&self.path)
    }
}

/// `*` stands for any characters and `?` for one, within a label.
fn label_fits(pattern: &[u8], label: &[u8]) -> bool {
    match pattern {
        [] => label.is_empty(),
        [b'*', rest @ ..] => (0..=label.len()).any(|at| label_fits(rest, &label[at..])),
        [b'?', rest @ ..] => !label.is_empty() && label_fits(rest, &label[1..]),
        [byte, rest @ ..] => label.first() == Some(byte) && label_fits(rest, &label[1..]),
    }
}

/// The image's full name, as plugins are asked for it: with its registry, without tag and digest.
pub(crate) fn full_name(image: &str) -> String {
    let named = image.split_once('@').map_or(image, |(named, _)| named);
    let slash = named.rfind('/').map_or(0, |at| at + 1);
    let path = named[slash..].find(':').map_or(named, |colon| &named[..slash + colon]);
    match path.split_once('/') {
        Some((first, _)) if is_host(first) => path.to_owned(),
        Some(_) => format!("docker.io/{path}"),
        None => format!("docker.io/library/{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_label_by_label_and_by_the_paths_beginning() {
        let fits = |pattern: &str, image: &str| {
            Place::parse(pattern).expect("a pattern").fits(&Place::parse(image).expect("an image"))
        };
        for (pattern, image, expected) in [
            ("registry.io", "registry.io/a/b", true),
            ("*.registry.io", "eu.registry.io/a", true),
            ("*.registry.io", "registry.io/a", false),
            ("*.registry.io", "a.b.registry.io/a", false),
            ("*.*.registry.io", "a.b.registry.io/a", true),
            ("app*.registry.io", "app1.registry.io/a", true),
            ("app?.registry.io", "app12.registry.io/a", false),
            ("12345.ecr.*.example.com", "12345.ecr.eu-1.example.com/x", true),
            ("registry.io:8080/path", "registry.io:8080/path/app", true),
            ("registry.io:8080", "registry.io/app", false),
            ("registry.io/team", "registry.io/other/app", false),
            ("https://registry.io/team", "registry.io/team/app", true),
        ] {
            assert_eq!(fits(pattern, image), expected, "{pattern} {image}");
        }
        assert_eq!(Place::parse(""), None);
        assert_eq!(Place::parse("a b"), None);
        assert_eq!(Place::parse("ftp://x"), None);
    }

    #[test]
    fn plugins_are_asked_by_full_names() {
        for (image, full) in [
            ("busybox:1", "docker.io/library/busybox"),
            ("team/app", "docker.io/team/app"),
            ("registry.io:5000/team/app:1@sha256:0", "registry.io:5000/team/app"),
            ("localhost/app", "localhost/app"),
            ("Registry/app", "Registry/app"),
        ] {
            assert_eq!(full_name(image), full);
        }
    }
}
