//! The hosts directory: for each registry a directory with a `hosts.toml`, in the form that containerd reads, or with
//! certificates only, in the form that docker reads. Reads files; asks no registry.
//!
//! ```text
//! <directory>/registry.example:5000/hosts.toml     or registry.example_5000_
//! <directory>/_default/hosts.toml                  for every registry without one
//!
//! server = "https://registry.example:5000"         what stands for the registry itself, tried last
//! [host."https://mirror.example"]                  tried in the order of the file
//!   capabilities = ["pull", "resolve"]
//!   ca = "ca.pem"                                  relative to this directory
//!   client = [["cert.pem", "key.pem"]]
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use crate::ImageError;

/// No real one comes near.
const FILE_BYTES_MAX: usize = 1 << 20;
const HOSTS_MAX: usize = 64;
const FILE_NAME: &str = "hosts.toml";

/// What is known of one host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Host {
    /// As it is written; for the registry itself None where the file names no server.
    pub(crate) address: Option<String>,
    pub(crate) pull: bool,
    pub(crate) resolve: bool,
    pub(crate) override_path: bool,
    pub(crate) tls: Tls,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) dial_limit: Option<Duration>,
    /// Where all this is from.
    pub(crate) file: PathBuf,
}

/// How a host shows who it is, and who calls.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Tls {
    pub(crate) skip_verify: bool,
    /// PEM files of authorities beside the system's.
    pub(crate) authorities: Vec<PathBuf>,
    /// PEM files of a certificate and its key; the key's is None where one file has both.
    pub(crate) client: Option<(PathBuf, Option<PathBuf>)>,
}

impl Tls {
    pub(crate) fn is_set(&self) -> bool {
        *self != Tls::default()
    }
}

impl Host {
    fn at(file: &Path) -> Host {
        Host {
            address: None,
            pull: true,
            resolve: true,
            override_path: false,
            tls: Tls::default(),
            headers: Vec::new(),
            dial_limit: None,
            file: file.to_owned(),
        }
    }
}

/// What is configured for a registry: the hosts to try, the registry itself last. Empty when no directory is for it.
pub(crate) fn find(directories: &[PathBuf], registry: &str) -> Result<Vec<Host>, ImageError> {
    for directory in directories {
        for name in names(registry) {
            let own = directory.join(name);
            if own.is_dir() {
                return load(&own);
            }
        }
    }
    Ok(Vec::new())
}

/// The directories that may be a registry's, best first.
fn names(registry: &str) -> Vec<String> {
    let escaped = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    // A registry is no path: the name comes from whoever asks for an image.
    let plain = Some(registry.to_owned()).filter(|name| !name.contains('/') && !name.starts_with('.'));
    escaped.filter(|name| !name.contains('/')).into_iter().chain(plain).chain(["_default".to_owned()]).collect()
}

fn load(directory: &Path) -> Result<Vec<Host>, ImageError> {
    let file = directory.join(FILE_NAME);
    let text = match std::fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(ImageError::io("read", &file))?,
    };
    if text.is_empty() {
        return certificates_only(directory).map(|host| vec![host]);
    }
    if text.len() > FILE_BYTES_MAX {
        return Err(invalid(&file, "the file", "is larger than any of its kind"));
    }
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        invalid(&file, &format!("line {line}"), error.message())
    })?;
    parse(&file, &table)
}

/// Docker's form: `*.crt` are authorities, `*.cert` and `*.key` a pair.
fn certificates_only(directory: &Path) -> Result<Host, ImageError> {
    let mut host = Host::at(directory);
    let mut entries: Vec<PathBuf> = std::fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(ImageError::io("read", directory))?;
    entries.sort();
    for path in entries {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.tls.authorities.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                if host.tls.client.replace((path, Some(key))).is_some() {
                    return Err(invalid(directory, "*.cert", "there is more than one client certificate"));
                }
            }
            _ => {}
        }
    }
    Ok(host)
}

fn parse(file: &Path, table: &Table) -> Result<Vec<Host>, ImageError> {
    let mut hosts = Vec::new();
    match table.get("host") {
        None => {}
        Some(Value::Table(entries)) if entries.len() <= HOSTS_MAX => {
            for (address, entry) in entries {
                let field = format!("host.{address:?}");
                let Value::Table(entry) = entry else { return Err(invalid(file, &field, "must be a table")) };
                hosts.push(Host { address: Some(address.clone()), ..Fields { file, prefix: &field }.host(entry)? });
            }
        }
        Some(Value::Table(_)) => return Err(invalid(file, "host", "has too many hosts")),
        Some(_) => return Err(invalid(file, "host", "must be a table")),
    }
    let root = Fields { file, prefix: "" };
    let own = root.host(table)?;
    let address = match table.get("server") {
        None => None,
        Some(Value::String(server)) => Some(server.clone()).filter(|server| !server.is_empty()),
        Some(_) => return Err(root.wrong("server", "must be a string")),
    };
    hosts.push(Host { address, ..own });
    Ok(hosts)
}

/// The fields of one table, for messages that name them.
struct Fields<'a> {
    file: &'a Path,
    prefix: &'a str,
}

impl Fields<'_> {
    fn host(&self, table: &Table) -> Result<Host, ImageError> {
        let mut host = Host::at(self.file);
        if let Some(capabilities) = table.get("capabilities") {
            (host.pull, host.resolve) = self.capabilities(capabilities)?;
        }
        host.override_path = self.flag(table, "override_path")?;
        host.tls = Tls {
            skip_verify: self.flag(table, "skip_verify")?,
            authorities: self.paths(table, "ca")?,
            client: self.client(table)?,
        };
        host.headers = self.headers(table)?;
        host.dial_limit = match table.get("dial_timeout") {
            None => None,
            Some(value) => {
                let limit = value.as_str().and_then(duration);
                Some(limit.ok_or_else(|| self.wrong("dial_timeout", "must be a duration such as \"5s\""))?)
            }
        };
        Ok(host)
    }

    fn capabilities(&self, value: &Value) -> Result<(bool, bool), ImageError> {
        let wrong = || self.wrong("capabilities", "must be a list of pull, resolve and push");
        let (mut pull, mut resolve) = (false, false);
        for item in value.as_array().ok_or_else(wrong)? {
            match item.as_str().ok_or_else(wrong)? {
                "pull" => pull = true,
                "resolve" => resolve = true,
                // This runtime does not push, nor ask who else has an image.
                "push" | "referrers" => {}
                other => return Err(self.wrong("capabilities", &format!("knows no {other:?}"))),
            }
        }
        Ok((pull, resolve))
    }

    fn flag(&self, table: &Table, field: &str) -> Result<bool, ImageError> {
        let value = table.get(field);
        value.map_or(Ok(false), |value| value.as_bool().ok_or_else(|| self.wrong(field, "must be true or false")))
    }

    fn path(&self, text: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("/")).join(text)
    }

    fn paths(&self, table: &Table, field: &str) -> Result<Vec<PathBuf>, ImageError> {
        let wrong = || self.wrong(field, "must be a path or a list of paths");
        match table.get(field) {
            None => Ok(Vec::new()),
            Some(Value::String(path)) => Ok(vec![self.path(path)]),
            Some(Value::Array(paths)) => {
                paths.iter().map(|path| path.as_str().map(|path| self.path(path)).ok_or_else(wrong)).collect()
            }
            Some(_) => Err(wrong()),
        }
    }

    /// A path, a list of them, or a list of pairs; all forms with one entry at most.
    fn client(&self, table: &Table) -> Result<Option<(PathBuf, Option<PathBuf>)>, ImageError> {
        let wrong = || self.wrong("client", "must be a path, or a list of one path or one [certificate, key]");
        let text = |value: &Value| value.as_str().map(|path| self.path(path)).ok_or_else(wrong);
        let entry = match table.get("client") {
            None => return Ok(None),
            Some(Value::Array(entries)) => match entries.as_slice() {
                [] => return Ok(None),
                [entry] => entry,
                _ => return Err(self.wrong("client", "names more than one certificate; one can be shown")),
            },
            Some(entry) => entry,
        };
        match entry {
            Value::Array(pair) => match pair.as_slice() {
                [both] => Ok(Some((text(both)?, None))),
                [certificate, key] if key.as_str() == Some("") => Ok(Some((text(certificate)?, None))),
                [certificate, key] => Ok(Some((text(certificate)?, Some(text(key)?)))),
                _ => Err(wrong()),
            },
            both => Ok(Some((text(both)?, None))),
        }
    }

    fn headers(&self, table: &Table) -> Result<Vec<(String, String)>, ImageError> {
        let wrong = || self.wrong("header", "must be a table of strings or lists of strings");
        let mut headers = Vec::new();
        let Some(value) = table.get("header") else { return Ok(headers) };
        for (name, value) in value.as_table().ok_or_else(wrong)? {
            let values = match value {
                Value::Array(values) => values.as_slice(),
                one => std::slice::from_ref(one),
            };
            for value in values {
                headers.push((name.clone(), value.as_str().ok_or_else(wrong)?.to_owned()));
            }
        }
        Ok(headers)
    }

    fn wrong(&self, field: &str, problem: &str) -> ImageError {
        let whole = if self.prefix.is_empty() { field.to_owned() } else { format!("{}.{field}", self.prefix) };
        invalid(self.file, &whole, problem)
    }
}

/// `1m30s`, `500ms` and the like.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut whole = Duration::ZERO;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?);
        let (unit, after) = after.split_at(after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len()));
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        whole = whole.checked_add(Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?)?;
        rest = after;
    }
    Some(whole).filter(|whole| !whole.is_zero())
}

pub(crate) fn invalid(file: &Path, field: &str, problem: &str) -> ImageError {
    ImageError::Configuration { file: file.to_owned(), field: field.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(content: &str) -> Result<Vec<Host>, String> {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("r.example:5000");
        std::fs::create_dir(&own).unwrap();
        std::fs::write(own.join(FILE_NAME), content).unwrap();
        let found = find(&[directory.path().to_owned()], "r.example:5000");
        let strip = |path: &PathBuf| path.strip_prefix(&own).unwrap_or(path).to_owned();
        found
            .map(|mut hosts| {
                for host in &mut hosts {
                    host.tls.authorities = host.tls.authorities.iter().map(strip).collect();
                    host.tls.client = host.tls.client.take().map(|(cert, key)| (strip(&cert), key.as_ref().map(strip)));
                }
                hosts
            })
            .map_err(|error| error.to_string().replace(&own.display().to_string(), "<own>"))
    }

    #[test]
    fn hosts_are_in_the_order_of_the_file_and_the_server_is_last() {
        let content = r#"
            server = "https://r.example:5000"
            skip_verify = true
            [host."https://z.example"]
              capabilities = ["pull"]
              ca = "ca.pem"
              [host."https://z.example".header]
                x-one = "1"
                x-many = ["2", "3"]
            [host."http://a.example/v2/proxy"]
              capabilities = ["pull", "resolve", "push"]
              override_path = true
              client = [["cert.pem", "/etc/key.pem"]]
              ca = ["/etc/a.pem", "b.pem"]
              dial_timeout = "1m1.5s"
        "#;
        let hosts = hosts(content).unwrap();
        let addresses: Vec<_> = hosts.iter().map(|host| host.address.as_deref().unwrap()).collect();
        assert_eq!(addresses, ["https://z.example", "http://a.example/v2/proxy", "https://r.example:5000"]);
        assert_eq!((hosts[0].pull, hosts[0].resolve, hosts[1].pull, hosts[1].resolve), (true, false, true, true));
        assert_eq!(hosts[0].tls.authorities, [PathBuf::from("ca.pem")]);
        let headers = [("x-one", "1"), ("x-many", "2"), ("x-many", "3")];
        assert_eq!(hosts[0].headers, headers.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(hosts[1].override_path && !hosts[1].tls.skip_verify);
        assert_eq!(hosts[1].tls.client, Some(("cert.pem".into(), Some("/etc/key.pem".into()))));
        assert_eq!(hosts[1].tls.authorities, [PathBuf::from("/etc/a.pem"), PathBuf::from("b.pem")]);
        assert_eq!(hosts[1].dial_limit, Some(Duration::from_millis(61_500)));
        assert!(hosts[2].tls.skip_verify && hosts[2].pull && hosts[2].resolve);
    }

    #[test]
    fn a_wrong_field_is_named_with_its_file() {
        for (content, said) in [
            (
                "[host.\"https://m\"]\nca = 1",
                "<own>/hosts.toml: host.\"https://m\".ca: must be a path or a list of paths",
            ),
            ("capabilities = [\"pul\"]", "<own>/hosts.toml: capabilities: knows no \"pul\""),
            ("server = 1", "<own>/hosts.toml: server: must be a string"),
            ("client = [\"a\", \"b\"]", "<own>/hosts.toml: client: names more than one certificate; one can be shown"),
            ("skip_verify = \"yes\"", "<own>/hosts.toml: skip_verify: must be true or false"),
            ("dial_timeout = \"5\"", "<own>/hosts.toml: dial_timeout: must be a duration such as \"5s\""),
        ] {
            assert_eq!(hosts(content).unwrap_err(), said);
        }
        let broken = hosts("server = \"a\"\n[host").unwrap_err();
        assert!(broken.starts_with("<own>/hosts.toml: line 2: "), "{broken}");
    }

    #[test]
    fn the_registrys_own_directory_wins_over_the_default_and_earlier_directories_over_later() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let make = |root: &Path, name: &str| {
            let own = root.join(name);
            std::fs::create_dir(&own).unwrap();
            std::fs::write(own.join(FILE_NAME), format!("server = \"https://{name}\"")).unwrap();
        };
        make(second.path(), "a.example");
        make(second.path(), "b.example_5000_");
        make(second.path(), "_default");
        let directories = [first.path().to_owned(), second.path().to_owned(), "/does/not/exist".into()];
        let server = |registry: &str| find(&directories, registry).unwrap().pop().and_then(|host| host.address);
        assert_eq!(server("a.example").as_deref(), Some("https://a.example"));
        assert_eq!(server("b.example:5000").as_deref(), Some("https://b.example_5000_"));
        assert_eq!(server("c.example").as_deref(), Some("https://_default"));
        assert_eq!(server("..").as_deref(), Some("https://_default"));
        make(first.path(), "_default");
        assert_eq!(server("a.example").as_deref(), Some("https://_default"));
    }

    #[test]
    fn a_directory_of_certificates_is_taken_as_docker_takes_it() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("r.example");
        std::fs::create_dir(&own).unwrap();
        for name in ["ca.crt", "client.cert", "client.key"] {
            std::fs::write(own.join(name), "").unwrap();
        }
        let hosts = find(&[directory.path().to_owned()], "r.example").unwrap();
        assert_eq!(hosts.len(), 1);
        assert_eq!(hosts[0].tls.authorities, [own.join("ca.crt")]);
        assert_eq!(hosts[0].tls.client, Some((own.join("client.cert"), Some(own.join("client.key")))));
    }
}
