//! Plugins' names: two digits that order them, and a word.

use crate::error::Error;

/// Splits `NN-name`.
pub(crate) fn split(file: &str) -> Result<(String, String), Error> {
    let problem = "is not of the form NN-name";
    let (index, name) = file.split_once('-').ok_or(Error::Name { name: file.to_owned(), problem })?;
    check(index, name)?;
    Ok((index.to_owned(), name.to_owned()))
}

/// Refuses an index that is not two digits, and a name that does not suit a file.
pub(crate) fn check(index: &str, name: &str) -> Result<(), Error> {
    let refuse = |name: &str, problem| Err(Error::Name { name: name.to_owned(), problem });
    if index.len() != 2 || !index.bytes().all(|byte| byte.is_ascii_digit()) {
        return refuse(index, "the index is not two digits");
    }
    let fits = |letter: char| letter.is_ascii_alphanumeric() || "-_.+".contains(letter);
    if name.is_empty() || !name.chars().all(fits) {
        return refuse(name, "is empty or has letters that are not of [a-zA-Z0-9_.+-]");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_and_a_name_are_needed() {
        assert_eq!(split("10-device-injector").unwrap(), ("10".to_owned(), "device-injector".to_owned()));
        for bad in ["device", "1-x", "ab-x", "10-", "10-a/b"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
