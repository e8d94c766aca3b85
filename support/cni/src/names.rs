//! The specification's rules for container ids, interface names and network names.

/// Whether `id` may be a container id or a network name: letters, digits, `_`, `.` and `-`, starting with a letter or digit.
pub fn is_valid_id(id: &str) -> bool {
    id.len() <= 256
        && id.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// Whether `name` may be the name of an interface: 1 to 15 bytes, not `.` or `..`, without `/`, `:` and white space.
pub fn is_valid_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_interface_names_follow_the_specification() {
        assert!(is_valid_id("a1_b.c-d") && is_valid_id("0"));
        for bad in ["", "-a", ".a", "a/b", "a b", "../x"] {
            assert!(!is_valid_id(bad), "{bad}");
        }
        assert!(is_valid_interface("eth0") && is_valid_interface("abcdefghijklmno"));
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "abcdefghijklmnop"] {
            assert!(!is_valid_interface(bad), "{bad}");
        }
    }
}
