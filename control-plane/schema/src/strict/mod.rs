//! Strict decoding: parsing of JSON and YAML bodies with duplicate keys reported, and the structural pass that types
//! an object: unknown fields are dropped and named, wrong types are worded as clients know them, and values take the
//! form in which the API writes them back (canonical quantities and times, no explicit nulls or empty optionals).

mod parse;
mod typed;

pub use parse::{ParseError, parse_json, parse_yaml};
pub use typed::{TypeError, check, prune};
