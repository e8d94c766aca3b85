//! Names of all sorts. Each function answers what is wrong with a value, in upstream's words; nothing when it is fine.

const LABEL_FORMAT: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const LABEL_TEXT: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', \
    and must start and end with an alphanumeric character";
const SUBDOMAIN_TEXT: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
    and must start and end with an alphanumeric character";
const LABEL_1035_FORMAT: &str = "[a-z]([-a-z0-9]*[a-z0-9])?";
const LABEL_1035_TEXT: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', \
    start with an alphabetic character, and end with an alphanumeric character";
const KEY_FORMAT: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";
const KEY_TEXT: &str =
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
const VALUE_TEXT: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', \
    and must start and end with an alphanumeric character";
const CONFIG_KEY_FORMAT: &str = "[-._a-zA-Z0-9]+";
const CONFIG_KEY_TEXT: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'";
const HEADER_FORMAT: &str = "[-A-Za-z0-9]+";
const HEADER_TEXT: &str = "a valid HTTP header must consist of alphanumeric characters or '-'";

pub(super) type Messages = Vec<String>;
/// What a kind asks of its names.
pub(super) type NameRule = fn(&str) -> Messages;

const MOST_LABEL: usize = 63;
const MOST_SUBDOMAIN: usize = 253;

/// Upstream words names and labels apart.
fn too_long(length: usize, unit: &str) -> String {
    format!("must be no more than {length} {unit}")
}

fn pattern(text: &str, format: &str, examples: &[&str]) -> String {
    let examples: Vec<String> = examples.iter().map(|example| format!("'{example}', ")).collect();
    format!("{text} (e.g. {}regex used for validation is '{format}')", examples.join("or "))
}

/// Inner characters by `inner`, the first and the last by `edge`.
fn shaped(value: &str, edge: fn(u8) -> bool, inner: fn(u8) -> bool) -> bool {
    let bytes = value.as_bytes();
    matches!((bytes.first(), bytes.last()), (Some(first), Some(last)) if edge(*first) && edge(*last))
        && bytes.iter().all(|byte| inner(*byte))
}

fn lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_label(value: &str) -> bool {
    shaped(value, lower, |byte| lower(byte) || byte == b'-')
}

fn is_subdomain(value: &str) -> bool {
    value.split('.').all(is_label)
}

pub(super) fn dns_label(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.len() > MOST_LABEL {
        messages.push(too_long(MOST_LABEL, "characters"));
    }
    if !is_label(value) {
        messages.push(if is_subdomain(value) {
            "must not contain dots".to_owned()
        } else {
            pattern(LABEL_TEXT, LABEL_FORMAT, &["my-name", "123-abc"])
        });
    }
    messages
}

pub(super) fn dns_subdomain(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.len() > MOST_SUBDOMAIN {
        messages.push(too_long(MOST_SUBDOMAIN, "characters"));
    }
    if !is_subdomain(value) {
        let format = format!("{LABEL_FORMAT}(\\.{LABEL_FORMAT})*");
        messages.push(pattern(SUBDOMAIN_TEXT, &format, &["example.com"]));
    }
    messages
}

pub(super) fn dns_1035_label(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.len() > MOST_LABEL {
        messages.push(too_long(MOST_LABEL, "characters"));
    }
    if !is_label(value) || !value.starts_with(|first: char| first.is_ascii_lowercase()) {
        messages.push(pattern(LABEL_1035_TEXT, LABEL_1035_FORMAT, &["my-name", "abc-123"]));
    }
    messages
}

fn is_key(value: &str) -> bool {
    shaped(value, |byte| byte.is_ascii_alphanumeric(), |byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Keys of labels, annotations, taints; condition types; finalizers.
pub(super) fn qualified_name(value: &str) -> Messages {
    let examples = ["MyName", "my.name", "123-abc"];
    let mut messages = Messages::new();
    let parts: Vec<&str> = value.split('/').collect();
    let name = match parts[..] {
        [name] => name,
        [prefix, name] => {
            if prefix.is_empty() {
                messages.push("prefix part must be non-empty".to_owned());
            } else {
                messages.extend(dns_subdomain(prefix).into_iter().map(|message| format!("prefix part {message}")));
            }
            name
        }
        _ => {
            return vec![format!(
                "a valid label key {} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')",
                pattern(KEY_TEXT, KEY_FORMAT, &examples)
            )];
        }
    };
    if name.is_empty() {
        messages.push("name part must be non-empty".to_owned());
    } else if name.len() > MOST_LABEL {
        messages.push(format!("name part {}", too_long(MOST_LABEL, "bytes")));
    }
    if !is_key(name) {
        messages.push(format!("name part {}", pattern(KEY_TEXT, KEY_FORMAT, &examples)));
    }
    messages
}

pub(super) fn label_value(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.len() > MOST_LABEL {
        messages.push(too_long(MOST_LABEL, "bytes"));
    }
    if !value.is_empty() && !is_key(value) {
        let format = format!("({KEY_FORMAT})?");
        messages.push(pattern(VALUE_TEXT, &format, &["MyValue", "my_value", "12345"]));
    }
    messages
}

/// Keys of ConfigMaps and Secrets.
pub(super) fn config_key(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.len() > MOST_SUBDOMAIN {
        messages.push(too_long(MOST_SUBDOMAIN, "characters"));
    }
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if value.is_empty() || !value.bytes().all(fine) {
        messages.push(pattern(CONFIG_KEY_TEXT, CONFIG_KEY_FORMAT, &["key.name", "KEY_NAME", "key-name"]));
    }
    match value {
        "." => messages.push("must not be '.'".to_owned()),
        ".." => messages.push("must not be '..'".to_owned()),
        _ if value.starts_with("..") => messages.push("must not start with '..'".to_owned()),
        _ => {}
    }
    messages
}

pub(super) fn port_name(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.len() > 15 {
        messages.push(too_long(15, "characters"));
    }
    if value.is_empty() || !value.bytes().all(|byte| lower(byte) || byte == b'-') {
        messages.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !value.bytes().any(|byte| byte.is_ascii_lowercase()) {
        messages.push("must contain at least one letter (a-z)".to_owned());
    }
    if value.contains("--") {
        messages.push("must not contain consecutive hyphens".to_owned());
    }
    if value.starts_with('-') || value.ends_with('-') {
        messages.push("must not begin or end with a hyphen".to_owned());
    }
    messages
}

pub(super) fn http_header(value: &str) -> Messages {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if !value.is_empty() && value.bytes().all(fine) {
        return Messages::new();
    }
    vec![pattern(HEADER_TEXT, HEADER_FORMAT, &["X-Header-Name"])]
}

pub(super) fn environment_name(value: &str) -> Messages {
    let mut messages = Messages::new();
    if value.is_empty() {
        messages.push("environment variable name must be non-empty".to_owned());
    }
    if value.chars().any(|letter| !(' '..='~').contains(&letter) || letter == '=') {
        let text = "a valid environment variable name must consist only of printable ASCII characters other than '='";
        messages.push(text.to_owned());
    }
    messages
}

pub(super) fn percent(value: &str) -> Messages {
    let digits = value.strip_suffix('%').unwrap_or_default();
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Messages::new();
    }
    let text = "a valid percent string must be a numeric string followed by an ending '%'";
    vec![pattern(text, "[0-9]+%", &["1%", "93%"])]
}

/// Names of RBAC objects: any segment of a path.
pub(super) fn path_segment(value: &str) -> Messages {
    if matches!(value, "." | "..") {
        return vec![format!("may not be '{value}'")];
    }
    ["/", "%"].iter().filter(|part| value.contains(**part)).map(|part| format!("may not contain '{part}'")).collect()
}
