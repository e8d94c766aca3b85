//! What form of answer a client wants, read from its Accept header.

use http::{HeaderMap, header};

use crate::error::{ApiError, ApiResult};

/// How an answer is spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    Json,
    Yaml,
}

/// Which rendering of the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Object,
    /// A Table of the columns a printer shows, in this version of the meta group.
    Table {
        version: &'static str,
    },
    /// Metadata only.
    Partial {
        version: &'static str,
    },
}

/// The negotiated form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accept {
    pub(crate) spelling: Spelling,
    pub(crate) form: Form,
}

impl Accept {
    pub(crate) const JSON: Accept = Accept { spelling: Spelling::Json, form: Form::Object };

    pub(crate) fn negotiate(headers: &HeaderMap) -> ApiResult<Accept> {
        let mut offered = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).peekable();
        if offered.peek().is_none() {
            return Ok(Accept::JSON);
        }
        offered.flat_map(|line| line.split(',')).find_map(parse_range).ok_or_else(ApiError::not_acceptable)
    }
}

fn parse_range(range: &str) -> Option<Accept> {
    let mut parts = range.split(';').map(str::trim);
    let spelling = match parts.next()? {
        "" | "*/*" | "application/*" | "application/json" => Spelling::Json,
        "application/yaml" | "application/vnd.yaml" => Spelling::Yaml,
        _ => return None,
    };
    let (mut shape, mut group, mut version) = ("", "", "v1");
    for part in parts {
        match part.split_once('=') {
            Some(("as", value)) => shape = value,
            Some(("g", value)) => group = value,
            Some(("v", value)) => version = value,
            _ => {}
        }
    }
    let version = match version {
        "v1" => "v1",
        "v1beta1" => "v1beta1",
        _ => return None,
    };
    let form = match (shape, group) {
        ("", _) => Form::Object,
        ("Table", "meta.k8s.io") => Form::Table { version },
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io") => Form::Partial { version },
        _ => return None,
    };
    Some(Accept { spelling, form })
}

/// Whether any offer asks for aggregated discovery, and in which version.
pub(crate) fn wants_aggregated_discovery(headers: &HeaderMap) -> Option<&'static str> {
    let lines = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    for range in lines.flat_map(|line| line.split(',')) {
        if !range.contains("as=APIGroupDiscoveryList") {
            if matches!(range.trim(), "application/json" | "*/*") {
                return None;
            }
            continue;
        }
        if range.trim_start().starts_with("application/json") {
            return Some(if range.contains("v=v2beta1") { "v2beta1" } else { "v2" });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(value: &str) -> ApiResult<Accept> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, value.parse().expect("a header"));
        Accept::negotiate(&headers)
    }

    #[test]
    fn the_first_form_that_can_be_given_is_given() {
        let table = accept("application/json;as=Table;v=v1;g=meta.k8s.io,application/json").expect("a table");
        assert_eq!(table.form, Form::Table { version: "v1" });
        let fallen_back = accept("application/vnd.kubernetes.protobuf,application/json").expect("json");
        assert_eq!(fallen_back, Accept::JSON);
        assert_eq!(accept("application/vnd.kubernetes.protobuf").expect_err("none fits").code, 406);
        assert_eq!(accept("application/yaml").expect("yaml").spelling, Spelling::Yaml);
    }
}
