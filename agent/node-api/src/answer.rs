//! Response bodies and plain answers.

use std::io;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};

use crate::backend::NodeError;

/// Any body that is sent.
pub(crate) type Answer = BoxBody<Bytes, io::Error>;

pub(crate) fn full(data: impl Into<Bytes>) -> Answer {
    Full::new(data.into()).map_err(|never| match never {}).boxed()
}

pub(crate) fn of_type(status: StatusCode, content_type: &'static str, data: impl Into<Bytes>) -> Response<Answer> {
    let mut response = Response::new(full(data));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(crate) fn text(status: StatusCode, message: &str) -> Response<Answer> {
    of_type(status, "text/plain; charset=utf-8", message.to_string())
}

pub(crate) fn json(value: &impl serde::Serialize) -> Response<Answer> {
    match serde_json::to_vec(value) {
        Ok(body) => of_type(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// The one mapping of errors to status codes.
pub(crate) fn error(error: &NodeError) -> Response<Answer> {
    let status = match error {
        NodeError::NotFound(_) => StatusCode::NOT_FOUND,
        NodeError::BadRequest(_) => StatusCode::BAD_REQUEST,
        NodeError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        NodeError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        NodeError::NotImplemented(_) => StatusCode::NOT_IMPLEMENTED,
    };
    text(status, &error.to_string())
}
