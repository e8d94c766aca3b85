//! `$(NAME)` in commands, arguments and values. `$$` is a dollar sign; an unknown name stays as it is written.

/// Replaces every reference that `lookup` knows.
pub(crate) fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_are_replaced_and_the_rest_stays() {
        let lookup = |name: &str| (name == "A").then(|| "x$(A)".to_owned());
        for (text, expanded) in [
            ("$(A)-$(B)", "x$(A)-$(B)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$x$(A)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$()", "$()"),
            ("end$", "end$"),
        ] {
            assert_eq!(expand(text, lookup), expanded, "{text}");
        }
    }
}
