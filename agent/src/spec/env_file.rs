//! Environment files that a container wrote into a volume: `NAME='value'` lines. Pure.
//!
//! The format is a part of the shell's: a value stands in single quotes and may span lines; blank lines and lines that begin
//! with `#` say nothing; after a value only white space or a comment may follow.

use std::collections::BTreeMap;

/// The most that a file may hold.
pub(crate) const MAX_BYTES: usize = 64 << 10;
const MAX_KEY_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 32 << 10;

/// Reads a file; Err says what is wrong with which line.
pub(crate) fn parse(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    let mut line = 1;
    while !rest.is_empty() {
        let end = rest.find('\n').unwrap_or(rest.len());
        let current = rest[..end].trim();
        if current.is_empty() || current.starts_with('#') {
            rest = rest.get(end + 1..).unwrap_or("");
            line += 1;
            continue;
        }
        let (key, after) =
            rest.split_once('=').filter(|(key, _)| !key.contains('\n')).ok_or(format!("line {line}: no '='"))?;
        let key = key.trim();
        let printable = key.bytes().all(|byte| (0x21..0x7f).contains(&byte));
        if key.is_empty() || key.len() > MAX_KEY_BYTES || !printable {
            return Err(format!("line {line}: {key:?} is not a variable's name"));
        }
        let quoted = after.strip_prefix('\'').ok_or(format!("line {line}: the value is not in single quotes"))?;
        let (value, after) = quoted.split_once('\'').ok_or(format!("line {line}: the closing quote is missing"))?;
        if value.len() > MAX_VALUE_BYTES {
            return Err(format!("line {line}: the value is too long"));
        }
        line += value.matches('\n').count() + 1;
        let end = after.find('\n').unwrap_or(after.len());
        let trailer = after[..end].trim_start();
        let comment = trailer.starts_with('#') && after.starts_with([' ', '\t']);
        if !trailer.is_empty() && !comment {
            return Err(format!("line {}: something follows the value", line - 1));
        }
        found.insert(key.to_owned(), value.to_owned());
        rest = after.get(end + 1..).unwrap_or("");
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_values_are_read_and_anything_else_is_refused() {
        let text = "# made by init\n\nA='1'\nB='two words' # why\nC='first\nsecond'\nD=''\n";
        let pairs = [("A", "1"), ("B", "two words"), ("C", "first\nsecond"), ("D", "")];
        let expected = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        assert_eq!(parse(text), Ok(expected));
        for (text, problem) in [
            ("A=1\n", "line 1: the value is not in single quotes"),
            ("A='1'\nB='x", "line 2: the closing quote is missing"),
            ("nothing\n", "line 1: no '='"),
            ("A='1'2\n", "line 1: something follows the value"),
            ("='1'\n", "line 1: \"\" is not a variable's name"),
        ] {
            assert_eq!(parse(text), Err(problem.to_owned()), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text in "[A='# \n\u{e9}x]{0,60}") {
            let _ = parse(&text);
        }
    }
}
