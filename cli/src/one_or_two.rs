//! [`OneOrTwo`]: a value of one address family, or one of each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One value, or one of each address family with a comma between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OneOrTwo<T> {
    pub(crate) first: T,
    pub(crate) second: Option<T>,
}

impl<T: FromStr<Err: fmt::Display>> FromStr for OneOrTwo<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |part: &str| part.trim().parse::<T>().map_err(|error| format!("{part:?}: {error}"));
        match text.split_once(',') {
            Some((first, second)) => Ok(OneOrTwo { first: parse(first)?, second: Some(parse(second)?) }),
            None => Ok(OneOrTwo { first: parse(text)?, second: None }),
        }
    }
}

impl<T: fmt::Display> fmt::Display for OneOrTwo<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        self.second.as_ref().map_or(Ok(()), |second| write!(f, ",{second}"))
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for OneOrTwo<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<T: fmt::Display> Serialize for OneOrTwo<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
